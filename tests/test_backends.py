"""Every case of every op on every backend of this machine; how one is chosen; what guards its kernels."""

import threading

import pytest
import torch

import sslfast
from sslfast import _C, similarity_lse
from sslfast.ops import _backend, _blocked
from sslfast.testing import CASES, OPS, assert_close_to_reference, similarity_lse_reference

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
SERVED = [
    pytest.param(op, case, dtype, backend, device, id=f"{op}-{backend}-{device}-{str(dtype)[6:]}-{case.name}")
    for op, cases in CASES.items()
    for backend in sslfast.available_backends()
    for device in DEVICES
    for case in cases
    for dtype in case.dtypes
    if _backend.why_not(op, backend, device, dtype) is None
    and (backend, device) != ("triton", "cpu")  # its interpreter: tests/test_triton.py
]


@pytest.mark.parametrize("op, case, dtype, backend, device", SERVED)
def test_agrees_with_the_reference(op, case, dtype, backend, device, monkeypatch):
    served = []
    serve = _backend.implementation
    monkeypatch.setattr(_backend, "implementation", lambda op, name: served.append(name) or serve(op, name))
    with sslfast.use_backend(backend):
        rounds = backend in ("triton", "cuda") and dtype.itemsize == 2
        assert_close_to_reference(op, case.inputs(dtype, device, seed=1), seed=2, rounds_tiles=rounds)
    # the reference is called directly; every other backend served the forward pass and no other one did
    assert set(served) == ({backend} if backend != "reference" else set())


def test_every_op_has_cases_and_every_case_a_name():
    assert set(CASES) == set(OPS) == set(_backend.PREFERENCE)
    for op, cases in CASES.items():
        names = [case.name for case in cases]
        assert len(names) == len(set(names)) >= 10, op


def test_cases_are_fresh_random_numbers_of_their_dtype():
    for case in (case for cases in CASES.values() for case in cases):
        dtype = case.dtypes[-1]
        inputs = (case.inputs(dtype, seed=seed) for seed in (0, 0, 1))
        first, again, other = (x.get("a", x.get("t0")) for x in inputs)
        assert first.dtype == dtype and torch.equal(first.nan_to_num(7.0), again.nan_to_num(7.0))
        changes = first.numel() and getattr(case, "fixed", "") != "equal"
        assert not changes or not torch.equal(first, other), case.name


def test_every_available_backend_runs_some_case():
    """Without a GPU Triton is available in its interpreter, whose cases are in tests/test_triton.py."""
    interpreted = set() if torch.cuda.is_available() else {"triton"}
    served = {parameter.values[3] for parameter in SERVED}
    assert served | interpreted == set(sslfast.available_backends()) | interpreted


def test_reference_and_cpu_are_always_available():
    assert sslfast.available_backends()[-1] == "reference"
    assert "cpu" in sslfast.available_backends()


@pytest.mark.parametrize("op", _backend.PREFERENCE)
def test_nothing_forced_takes_the_preferred_backend(op):
    for device, names in _backend.PREFERENCE[op].items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            able = [name for name in names if _backend.why_not(op, name, device, dtype) is None]
            assert _backend.resolve(op, device, dtype) == (able or ["reference"])[0]
    assert _backend.resolve(op, "cpu", torch.float32) == "cpu"
    assert _backend.resolve(op, "meta", torch.float32) == "reference"


# use_backend.


def test_use_backend_refuses_unknown_names():
    with pytest.raises(ValueError, match="name.*'gpu'"):
        sslfast.use_backend("gpu")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_forced_backend_that_cannot_serve_raises(name):
    a = torch.randn(4, 2, dtype=torch.float64)
    with (
        sslfast.use_backend(name),
        pytest.raises(RuntimeError, match=f"similarity_lse.*'{name}'.*float64 on cpu"),
    ):
        similarity_lse(a)
    assert similarity_lse(a).isfinite().all()


def test_use_backend_nests_and_ends_with_its_block():
    assert _backend.forced() is None
    with sslfast.use_backend("reference"):
        with sslfast.use_backend("cpu"):
            assert _backend.forced() == "cpu"
        assert _backend.forced() == "reference"
        with pytest.raises(ZeroDivisionError), sslfast.use_backend("cpu"):
            raise ZeroDivisionError
        assert _backend.forced() == "reference"
    assert _backend.forced() is None


def test_one_use_backend_object_nests_in_itself():
    forced = sslfast.use_backend("reference")
    try:
        with forced, forced:
            assert _backend.forced() == "reference"
        assert _backend.forced() is None
    finally:
        _backend._forced = None


def test_reference_is_used_when_forced(monkeypatch):
    monkeypatch.setattr(_backend, "implementation", lambda *args: pytest.fail("a kernel was used"))
    a = torch.randn(4, 2, requires_grad=True)
    with sslfast.use_backend("reference"):
        row = similarity_lse(a)
    row.sum().backward()
    assert a.grad is not None


def test_backward_uses_the_backend_of_its_forward(monkeypatch):
    """After the block has ended, inside another one, and on another thread."""
    served = []
    serve = _backend.implementation
    monkeypatch.setattr(_backend, "implementation", lambda op, name: served.append(name) or serve(op, name))
    a = torch.randn(4, 2, requires_grad=True)
    with sslfast.use_backend("cpu"):
        row = similarity_lse(a)

    def backward():
        with sslfast.use_backend("reference"):
            row.sum().backward()

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert served == ["cpu", "cpu"]
    (expected,) = torch.autograd.grad(similarity_lse_reference(a).sum(), a)
    torch.testing.assert_close(a.grad, expected)


# The choke point, and the checks of the compiled module behind it.


def test_pointer_is_an_address_of_what_was_asked_for():
    x, cpu = torch.randn(4, 3), torch.device("cpu")
    assert _backend.pointer("x", x, torch.float32, (4, 3), cpu) == x.data_ptr()
    assert _backend.pointer("x", None, torch.float32, (4, 3), cpu) == 0


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4, 3, dtype=torch.float64), torch.randn(3, 4), torch.randn(4, 4), torch.randn(12),
        torch.randn(3, 4).t(), torch.randn(8, 3)[::2], torch.tensor(1.0).expand(4, 3),
        torch.randn(4, 3, device="meta"),
    ],
    ids=["dtype", "transposed shape", "size", "rank", "transposed", "strided", "expanded", "device"],
)  # fmt: skip
def test_pointer_refuses(x):
    with pytest.raises(ValueError, match="^x: a kernel needs a contiguous"):
        _backend.pointer("x", x, torch.float32, (4, 3), torch.device("cpu"))


OUTSIDE = [
    (-1, 2, 0, 2), (0, 5, 0, 2), (3, 2, 0, 2), (0, -1, 0, 2), (0, 2, -1, 2), (0, 2, 0, 6), (0, 2, 4, 2),
    (0, 2, 0, -1), (2**62, 2**62, 0, 2), (0, 2, 2**62, 2**62),
]  # fmt: skip


def kernels(dtype: torch.dtype = torch.float32) -> tuple[_blocked.CpuTiles, torch.Tensor]:
    a, b = torch.randn(4, 3, dtype=dtype), torch.randn(5, 3, dtype=dtype)
    tiles = _blocked.CpuTiles(a, b, torch.tensor(1.0, dtype=dtype), None, None, None, False)
    return tiles, tiles.product(0, 4, 0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", OUTSIDE)
def test_tile_outside_of_the_matrix_raises(place, dtype):
    tiles, tile = kernels(dtype)
    tiles.begin_forward(True)
    with pytest.raises(IndexError, match="tile outside of the matrix"):
        tiles._kernels.forward(tile.data_ptr(), *place)
    tiles.begin_backward(*(torch.ones(n, dtype=dtype) for n in (4, 5, 4, 5)), None)
    with pytest.raises(IndexError, match="tile outside of the matrix"):
        tiles._kernels.backward(tile.data_ptr(), *place)


def test_tile_wider_than_its_scratch_raises():
    sizes = {"m": 4, "n": 9, "d": 1, "max_cols": 8, "threads": 1}
    x, scale = torch.ones(9), torch.ones(())
    made = _C.SimilarityLseF32(
        **sizes, a=x.data_ptr(), b=x.data_ptr(), scale=scale.data_ptr(), bias=0, a_ids=0, b_ids=0, same=False,
        self=False, symmetric=False,
    )  # fmt: skip
    state = torch.empty(2, 4)
    made.begin_forward(state.data_ptr(), 0)
    with pytest.raises(IndexError, match="tile outside of the matrix"):
        made.forward(torch.empty(4, 9).data_ptr(), 0, 4, 0, 9)


def test_stages_come_in_order():
    tiles, tile = kernels()
    place = (tile.data_ptr(), 0, 4, 0, 5)
    for call in (tiles._kernels.forward, tiles._kernels.backward):
        with pytest.raises(RuntimeError, match="comes first"):
            call(*place)
    with pytest.raises(RuntimeError, match="comes first"):
        tiles._kernels.finish_forward(tile.data_ptr(), 0)
    tiles.begin_forward(False)
    with pytest.raises(RuntimeError, match="comes first"):
        tiles._kernels.backward(*place)


@pytest.mark.parametrize("wrong", ["m", "n", "d", "threads", "max_cols"])
def test_negative_sizes_raise(wrong):
    sizes = {"m": 4, "n": 5, "d": 3, "max_cols": 8, "threads": 1, wrong: -1}
    addresses = dict.fromkeys(("a", "b", "scale", "bias", "a_ids", "b_ids"), 0)
    with pytest.raises(ValueError, match="sizes must be positive"):
        _C.SimilarityLseF32(**sizes, **addresses, same=False, self=False, symmetric=False)
