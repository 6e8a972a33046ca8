"""similarity_lse on Triton's kernels, in its interpreter: flash and chunked form, grids in order and not,
guarded buffers. On a GPU, tests/test_backends.py and tests/test_gpu.py run the compiled kernels instead."""

import pytest
import torch
from interpreter import INTERPRETED, grid_order, guarded, inside_nan, larger_tiles, launches
from sslfast.kernels import tuning

import sslfast
from sslfast import similarity_lse
from sslfast.testing import CASES, SimilarityLseCase, assert_close_to_reference, similarity_lse_reference

OP = "similarity_lse"
BY_NAME = {case.name: case for case in CASES[OP]}
pytestmark = INTERPRETED


def _id(value: object) -> str:
    return value.name if isinstance(value, SimilarityLseCase) else str(value).removeprefix("torch.")


@pytest.fixture(autouse=True)
def on_triton():
    with sslfast.use_backend("triton"):
        yield


@pytest.fixture(params=["flash", "chunked"])
def form(request, monkeypatch):
    return use_form(request.param, monkeypatch)


def use_form(name: str, monkeypatch: pytest.MonkeyPatch, small: int = 0) -> str:
    monkeypatch.setattr(tuning, "form", lambda *args: name)
    monkeypatch.setattr(tuning, "SMALL", small)
    return name


# (form, dtype, programs in order, logits up to which attend serves alone, of how many cases one is taken).
# All cases in the dtype whose results say most; fewer, and none of the largest, in the others, which share
# all but their products.
RUNS = [
    ("flash", torch.float32, False, 0, 1),
    ("flash", torch.bfloat16, True, 0, 2),
    ("flash", torch.float16, False, tuning.SMALL, 3),
    ("chunked", torch.bfloat16, False, 0, 1),
    ("chunked", torch.float32, True, 0, 3),
    ("chunked", torch.float16, True, 0, 4),
]


@pytest.mark.parametrize(
    "form, dtype, in_order, small, case",
    [
        (*run[:4], case)
        for run in RUNS
        for case in CASES[OP][:: run[4]]
        if run[1] in case.dtypes and (run[4] == 1 or case.m * (case.n or case.m) < 2**19)
    ],
    ids=_id,
)
def test_case(form, dtype, in_order, small, case, monkeypatch):
    use_form(form, monkeypatch, small)
    if form == "flash" and not tuning.fits(case.d, dtype.itemsize):
        form = use_form("chunked", monkeypatch, small)
    if case.m * (case.n or case.m) > 2**15:
        larger_tiles(monkeypatch)
    inputs = {
        k: inside_nan(x) if isinstance(x, torch.Tensor) and x.dim() else x
        for k, x in case.inputs(dtype).items()
    }
    with grid_order(not in_order), guarded() if case.m and case.n != 0 else grid_order(not in_order):
        assert_close_to_reference(OP, inputs, rounds_tiles=dtype.itemsize == 2)


@pytest.mark.parametrize(
    "name", ["ids of pairs", "self, ids of views", "above a tile", "sorted classes, same"]
)
def test_same_bits_whatever_the_order_of_programs(name, form, monkeypatch):
    monkeypatch.setattr(tuning, "chunk", lambda device: (128, 256))
    larger_tiles(monkeypatch)
    inputs = BY_NAME[name].inputs(torch.float32)

    def once(reverse: bool) -> list[torch.Tensor]:
        leaves = {k: x.clone().requires_grad_() for k, x in inputs.items() if _floating(x)}
        with grid_order(reverse):
            outputs = _outputs(similarity_lse(**{**inputs, **leaves}))
            sum((x * torch.arange(len(x))).sum() for x in outputs).backward()
        return [*outputs, *(x.grad for x in leaves.values())]

    assert all(torch.equal(x, y) for x, y in zip(once(False), once(True), strict=True))


@pytest.mark.parametrize("name", ["two sides", "self, classes, bias", "self, identical rows", "ids of pairs"])
def test_tiles_smaller_than_the_problem(name, monkeypatch):
    """The chunked form over many tiles, ragged at the end."""
    use_form("chunked", monkeypatch)
    monkeypatch.setattr(tuning, "chunk", lambda device: (192, 320))
    larger_tiles(monkeypatch)
    case = BY_NAME[name]
    assert_close_to_reference(OP, case.inputs(torch.float32))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("x, y", [(64, 64), (128, 128), (128, 16), (32, 64)])
def test_tiles_of_any_shape(x, y, ahead, monkeypatch):
    use_form("flash", monkeypatch)
    monkeypatch.setattr(tuning, "tile", lambda *args: tuning.Tile(x, y, 4, 1, ahead))
    for name in ("self, ids of views", "two sides", "self, classes, bias"):
        assert_close_to_reference(OP, BY_NAME[name].inputs(torch.float32))


def test_spans_of_every_length(monkeypatch):
    """A few partial sums per row, and one: their number follows the device."""
    use_form("flash", monkeypatch)
    larger_tiles(monkeypatch)
    for count in (1, 64):
        monkeypatch.setattr(tuning, "multiprocessors", lambda device, count=count: count)
        for name in ("one row", "self, bias, running maximum"):
            assert_close_to_reference(OP, BY_NAME[name].inputs(torch.float32))


# What is launched, and what is not computed.


def test_symmetric_forward_multiplies_half_the_matrix(monkeypatch):
    from triton.runtime import interpreter

    use_form("flash", monkeypatch)
    multiplied = []
    dot = interpreter.InterpreterBuilder.create_dot

    def record(self, a, b, *args):
        multiplied.append(a.data.shape[0] * b.data.shape[1])
        return dot(self, a, b, *args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", record)
    larger_tiles(monkeypatch)
    a = torch.nn.functional.normalize(torch.randn(2048, 16), dim=1)
    similarity_lse(a)
    assert 0.5 < sum(multiplied) / 2048**2 < 0.58


def test_no_kernel_that_is_not_needed(monkeypatch):
    names = launches(monkeypatch)
    use_form("flash", monkeypatch)
    a, b = torch.randn(140, 16, requires_grad=True), torch.randn(150, 16)
    similarity_lse(a, scale=0.1).sum().backward()
    assert names == ["pack", "sums", "attend", "merge", "pack", "weights", "grad"]
    names.clear()
    similarity_lse(a, b, scale=0.1).sum().backward()  # a queue: the gradient comes out of the forward pass
    assert names == ["pack", "attend", "merge"]
    names.clear()
    similarity_lse(a, b.requires_grad_(), scale=0.1, return_cols=True)[1].sum().backward()
    assert names == ["pack", "sums", "attend", "merge", "attend", "merge", "pack", "weights", "grad", "grad"]
    names.clear()
    use_form("flash", monkeypatch, small=1000 * 1000)
    with torch.no_grad():
        similarity_lse(a, b)
    assert names == ["pack", "attend", "merge"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=_id)
@pytest.mark.parametrize(
    "name",
    [
        "two sides",
        "temperature 0.001",
        "classes",
        "bias drops columns",
        "one row",
        "rows without pairs",
        "D 7",
    ],
)
def test_queries_alone_have_gradients(name, dtype, monkeypatch):
    """The forward pass leaves their gradients: KERNELS of MoCo's queue."""
    use_form("flash", monkeypatch)
    inputs = {**BY_NAME[name].inputs(dtype), "return_cols": False}
    inputs = {k: inside_nan(x) if isinstance(x, torch.Tensor) and x.dim() else x for k, x in inputs.items()}
    needs = [k for k in ("a", "scale") if _floating(inputs.get(k))]
    for reverse in (False, True):
        with grid_order(reverse), guarded():
            assert_close_to_reference(OP, inputs, needs=needs, rounds_tiles=dtype.itemsize == 2)


def test_many_small_shares_do_not_vanish_in_float16(monkeypatch):
    """One key near, 32,767 far ones, each of them a millionth or less of it, together as much."""
    use_form("flash", monkeypatch)
    larger_tiles(monkeypatch)
    q, keys = torch.eye(16, dtype=torch.float16)[:1], torch.eye(16, dtype=torch.float16)[1:2].repeat(32768, 1)
    keys[0] = q[0]
    inputs = {"a": q, "b": keys, "scale": 17.4}
    assert_close_to_reference(OP, inputs, needs=["a"], upstream=[torch.ones(1)], rounds_tiles=True)


def test_nothing_is_read_by_the_host(form, monkeypatch):
    from triton.runtime import interpreter

    run = interpreter.GridExecutor.__call__
    reads = ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__")
    looking = {name: getattr(torch.Tensor, name) for name in reads}

    def forbid() -> None:
        for name in reads:
            monkeypatch.setattr(
                torch.Tensor, name, lambda self, *args: pytest.fail("the host reads a tensor")
            )

    def unobserved(self, *args, **options):  # the interpreter itself may look
        for name, read in looking.items():
            monkeypatch.setattr(torch.Tensor, name, read)
        run(self, *args, **options)
        forbid()

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", unobserved)
    inputs = BY_NAME["classes"].inputs(torch.float32)
    leaves = {k: x.clone().requires_grad_() for k, x in inputs.items() if _floating(x)}
    forbid()
    with pytest.raises(pytest.fail.Exception, match="host reads"):
        inputs["a"].sum().item()
    row, col = similarity_lse(**{**inputs, **leaves})
    (row.sum() + col.sum()).backward()
    assert all(x.grad is not None for x in leaves.values())


# Numbers.


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["a", "b", "bias", "scale"])
def test_non_finite_input_gives_what_logsumexp_gives(where, value, form):
    inputs = SimilarityLseCase("", 5, 7, d=3, learned=True, bias="normal", return_cols=True).inputs()
    x = inputs[where]
    x.fill_(value) if where == "scale" else x[1].fill_(value)
    for ours, theirs in zip(similarity_lse(**inputs), similarity_lse_reference(**inputs), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_logits_of_bfloat16_rows_are_not_rounded(form):
    """Rows whose products differ by less than bfloat16 tells apart, far from 0."""
    a = torch.full((40, 64), 1.0, dtype=torch.bfloat16)
    a[:, 0] += torch.arange(40) / 128
    row = similarity_lse(a, a.clone(), scale=1.0)
    exact = similarity_lse_reference(a.double(), a.double())
    rounded = torch.logsumexp((a @ a.T).float(), 1)
    assert (row - exact).abs().max() < 1e-4 < 0.05 < (rounded - exact).abs().max()


def test_strides_beyond_32_bits(form):
    stride = 2**31 + 16
    storage = torch.empty(
        2 * stride + 16, dtype=torch.bfloat16
    )  # 8.6 GB of addresses, of which three pages are used
    a = storage.as_strided((3, 16), (stride, 1))
    a.copy_(torch.randn(3, 16))
    torch.testing.assert_close(similarity_lse(a), similarity_lse_reference(a))


def test_precision_of_float32_follows_torch(monkeypatch):
    assert tuning.precision(torch.float32) == "tf32x3"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert tuning.precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert tuning.precision(torch.float32) == "tf32x3"


# Ways to call.


def test_compiles_without_a_break(form):
    torch._dynamo.reset()

    def loss(z, ids, scale):
        return similarity_lse(z, scale=scale, a_ids=ids).sum()

    z, ids, scale = (
        torch.randn(8, 16, requires_grad=True),
        torch.arange(8) % 4,
        torch.tensor(0.5, requires_grad=True),
    )
    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")(z, ids, scale)
    torch.testing.assert_close(fast, loss(z, ids, scale))
    for x, y in zip(
        torch.autograd.grad(fast, (z, scale)),
        torch.autograd.grad(loss(z, ids, scale), (z, scale)),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", ["two sides", "self, classes, bias", "no columns"])
def test_opcheck(name, form):
    inputs = BY_NAME[name].inputs(torch.bfloat16)
    a, b, bias, a_ids, b_ids = (inputs.get(k) for k in ("a", "b", "bias", "a_ids", "b_ids"))
    scale = torch.as_tensor(inputs["scale"], dtype=torch.float32)
    forward = (a, b, scale, bias, a_ids, b_ids, False, True, False, "triton")
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.sslfast.similarity_lse_fwd, forward, test_utils=checks)
    row, col, _ = torch.ops.sslfast.similarity_lse_fwd(*forward)
    needs = (True, b is not None, True, bias is not None)
    backward = (row, col, a, b, scale, bias, a_ids, b_ids, row, col, False, needs, "triton")
    torch.library.opcheck(torch.ops.sslfast.similarity_lse_bwd, backward, test_utils=checks)


def test_losses_run_on_it(form):
    z1, z2 = torch.randn(2, 20, 16, requires_grad=True)
    loss = sslfast.ntxent_loss(z1, z2, 0.1)
    with sslfast.use_backend("reference"):
        torch.testing.assert_close(loss, sslfast.ntxent_loss(z1, z2, 0.1))


def test_double_precision_is_refused():
    with pytest.raises(RuntimeError, match="similarity_lse.*'triton'.*float64 on cpu.*no kernel for"):
        similarity_lse(torch.randn(4, 2, dtype=torch.float64))


def _floating(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _outputs(result):
    return result if isinstance(result, tuple) else (result,)
