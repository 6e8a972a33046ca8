"""similarity_lse on the cpu backend: values, gradients, ways of autograd, compilation, determinism."""

import itertools
import shutil
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sslfast.kernels import tuning
from torch import Tensor

import sslfast
from sslfast import _C
from sslfast.ops._check import FLOATS
from sslfast.testing import CASES, SimilarityLseCase, assert_close_to_reference, similarity_lse_reference

OP = "similarity_lse"
similarity_lse = sslfast.similarity_lse
BEST = _C.cpu_isa()
BY_NAME = {case.name: case for case in CASES[OP]}


def _id(value: object) -> str:
    return value.name if isinstance(value, SimilarityLseCase) else str(value).removeprefix("torch.")


@pytest.fixture(autouse=True)
def on_cpu():
    with sslfast.use_backend("cpu"):
        yield


@pytest.mark.parametrize("dtype", FLOATS, ids=_id)
@pytest.mark.parametrize("case", CASES[OP], ids=_id)
def test_case(case, dtype):
    if dtype in case.dtypes:
        assert_close_to_reference(OP, case.inputs(dtype))


# The instruction sets differ in the kernels of float32 and float64 only (16-bit inputs become float32 before
# them) and share what happens around them, so the others see two dtypes and no case that only varies strides.
@pytest.mark.parametrize("isa", [name for name in _C.cpu_isas() if name != BEST], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=_id)
@pytest.mark.parametrize("case", [c for c in CASES[OP] if c.layout == "contiguous"], ids=_id)
def test_case_on_other_instruction_sets(case, dtype, isa):
    assert_close_to_reference(OP, case.inputs(dtype, seed=3), seed=4)


# Upstream gradients: strides, absent ones, single inputs.

LAYOUTS = {
    "expanded": lambda n: torch.tensor(1.5).expand(n),
    "strided": lambda n: torch.randn(2 * n + 1)[1::2],
    "column": lambda n: torch.randn(n, 3)[:, 1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["two sides", "self", "self, bias, running maximum", "above a tile"])
def test_upstream_gradients_of_any_strides(name, layout):
    inputs = BY_NAME[name].inputs(torch.float32)
    sizes = [x.shape[0] for x in _outputs(similarity_lse_reference(**inputs))]
    assert_close_to_reference(OP, inputs, upstream=[LAYOUTS[layout](n) for n in sizes])


@pytest.mark.parametrize("name", ["two sides", "self", "self, bias drops columns"])
def test_sum_backward(name):
    """autograd hands .sum() over as one number with stride 0."""
    inputs = {**BY_NAME[name].inputs(torch.float64), "return_cols": False}

    def gradient(op):
        a = inputs["a"].clone().requires_grad_()
        op(**{**inputs, "a": a}).sum().backward()
        return a.grad

    torch.testing.assert_close(gradient(similarity_lse), gradient(similarity_lse_reference))


@pytest.mark.parametrize("used", ["rows", "columns"])
@pytest.mark.parametrize("name", ["two sides", "above a tile", "self, bias drops columns", "classes, same"])
def test_one_output_unused(name, used):
    inputs = BY_NAME[name].inputs(torch.float32)
    m = inputs["a"].shape[0]
    n = inputs["b"].shape[0] if "b" in inputs else m
    upstream = (torch.randn(m), None) if used == "rows" else (None, torch.randn(n))
    assert_close_to_reference(OP, inputs, upstream=upstream)


def test_no_output_used_gives_no_gradient():
    a = torch.randn(5, 3, requires_grad=True)
    row, col = similarity_lse(a, return_cols=True)
    assert torch.autograd.grad(a.sum() + 0 * row.detach().sum(), a)[0].eq(1).all()
    gradients = torch.autograd.grad((row, col), a, (torch.zeros(5), torch.zeros(5)))
    assert gradients[0].eq(0).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("two_sided", [False, True])
def test_every_subset_of_inputs_requiring_gradients(two_sided, bias):
    case = SimilarityLseCase("", 70, 40 if two_sided else None, learned=True, bias="normal" if bias else "")
    for return_cols in (False, True):
        inputs = {**case.inputs(torch.float32), "return_cols": return_cols}
        names = [k for k, x in inputs.items() if isinstance(x, Tensor)]
        subsets = (s for size in range(len(names) + 1) for s in itertools.combinations(names, size))
        for needs in subsets:
            assert_close_to_reference(OP, inputs, needs=needs)
            asked = {k: x.clone().requires_grad_(k in needs) if k in names else x for k, x in inputs.items()}
            outputs = _outputs(similarity_lse(**asked))
            assert all(x.requires_grad == bool(needs) for x in outputs)
            if needs:
                sum(x.sum() for x in outputs).backward()
            assert [k for k in names if asked[k].grad is not None] == list(needs)


def test_a_given_twice():
    """b = a as a tensor is two-sided: every row meets itself, and the gradients of both sides add up."""
    a = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
    (actual,) = torch.autograd.grad(similarity_lse(a, a, scale=0.7).sum(), a)
    (expected,) = torch.autograd.grad((0.7 * a @ a.T).logsumexp(1).sum(), a)
    torch.testing.assert_close(actual, expected)


def test_changing_an_input_before_backward_raises():
    a = torch.randn(6, 4, requires_grad=True)
    copy = a.clone()
    row = similarity_lse(copy)
    copy.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        row.sum().backward()


GRADCHECK = {
    "self": SimilarityLseCase("", 5, d=3, learned=True),
    "self, columns": SimilarityLseCase("", 5, d=3, learned=True, return_cols=True),
    "self, running maximum": SimilarityLseCase("", 5, d=3, scale=30.0, learned=True),
    "two sides": SimilarityLseCase("", 4, 6, d=3, learned=True),
    "columns": SimilarityLseCase("", 4, 6, d=3, scale=-0.8, learned=True, return_cols=True),
    "bias": SimilarityLseCase("", 4, 6, d=3, learned=True, bias="normal", return_cols=True),
    "self, bias": SimilarityLseCase("", 5, d=3, learned=True, bias="normal", return_cols=True),
    "ids": SimilarityLseCase("", 8, 9, d=3, learned=True, bias="normal", ids="sorted", return_cols=True),
    "same": SimilarityLseCase("", 12, 9, d=3, learned=True, ids="own", pairs="same"),
    "self, same": SimilarityLseCase("", 12, d=3, learned=True, ids="views", pairs="same", return_cols=True),
}


@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck(name):
    inputs = GRADCHECK[name].inputs(torch.float64)
    keys = [k for k, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]

    def op(*tensors):
        outputs = _outputs(similarity_lse(**{**inputs, **dict(zip(keys, tensors, strict=True))}))
        return tuple(x.masked_fill(x.isneginf(), 0.0) for x in outputs)

    assert torch.autograd.gradcheck(op, [inputs[k].requires_grad_() for k in keys])


def test_differentiable_once_on_cpu_and_twice_on_the_reference():
    a = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    row = similarity_lse(a, scale=scale)
    for upstream in (torch.ones(4, dtype=torch.float64), torch.ones_like(row, requires_grad=True)):
        (first,) = torch.autograd.grad(row, a, upstream, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiates once|does not require grad"):
            first.sum().backward()
    with sslfast.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda a, s: similarity_lse(a, scale=s), (a, scale))


def test_a_gradient_penalty_raises_on_cpu_rather_than_vanish():
    a = torch.randn(4, 3, requires_grad=True)
    row = similarity_lse(a)
    (first,) = torch.autograd.grad(row.sum(), a, create_graph=True)
    with pytest.raises(RuntimeError):
        (row.sum() + first.square().sum()).backward()


# Autocast, torch.compile, torch.library.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=_id)
def test_autocast_casts_as_mm_does(dtype):
    a, b = torch.randn(30, 8, requires_grad=True), torch.randn(20, 8).to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        assert torch.mm(a, b.T).dtype == dtype
        row = similarity_lse(a, b, scale=0.5)
        wide = similarity_lse(a.double(), b.double())
        own = similarity_lse(a)
    row.sum().backward()
    assert (row.dtype, own.dtype, wide.dtype) == (torch.float32, torch.float32, torch.float64)
    assert (a.grad.dtype, b.grad.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(row, similarity_lse(a.to(dtype), b.to(dtype), scale=0.5), rtol=0, atol=0)
    torch.testing.assert_close(own, similarity_lse(a.to(dtype)), rtol=0, atol=0)
    assert not torch.equal(own, similarity_lse(a))
    (expected,) = torch.autograd.grad(similarity_lse(a.to(dtype), b.to(dtype), scale=0.5).sum(), a)
    torch.testing.assert_close(a.grad, expected, rtol=0, atol=0)


@pytest.fixture(params=["aot_eager", "inductor"])
def compiled(request):
    if request.param == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile's default backend needs a C++ compiler, and none is on the PATH")
    torch.compiler.reset()
    yield lambda f: torch.compile(f, fullgraph=True, backend=request.param)
    torch.compiler.reset()


def test_compile(compiled):
    """Forward and backward, for numbers and tensors as the scale, and for new sizes."""

    def loss(a, b, scale, bias, ids):
        row, col = similarity_lse(
            a, b, scale=scale, bias=bias, a_ids=ids, b_ids=ids[: len(b)], return_cols=True
        )
        return row.sum() + (2 * col).sum()

    fast = compiled(loss)
    for m, scale in ((12, 1.0), (12, 2.0), (12, -3.0), (17, 0.5), (17, torch.tensor(0.25))):
        a, b, bias = (
            torch.randn(*s, requires_grad=True) for s in ((m, 4), (9, 4), (9,))
        )  # [M, D], [N, D], [N]
        ids = torch.arange(m) // 2
        for x, y in zip(
            torch.autograd.grad(fast(a, b, scale, bias, ids), (a, b, bias)),
            torch.autograd.grad(loss(a, b, scale, bias, ids), (a, b, bias)),
            strict=True,
        ):
            torch.testing.assert_close(x, y)


def test_compile_with_one_tensor_for_both_sides(compiled):
    def loss(a, ids):
        row, col = similarity_lse(a, a, a_ids=ids, b_ids=ids, return_cols=True)
        return (row + col).sum() + similarity_lse(a, a_ids=ids, pairs="same").sum()

    a, ids = torch.randn(8, 4, requires_grad=True), torch.arange(8) // 4
    fast = compiled(loss)(a, ids)
    torch.testing.assert_close(fast, loss(a, ids))
    torch.testing.assert_close(torch.autograd.grad(fast, a)[0], torch.autograd.grad(loss(a, ids), a)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=_id)
@pytest.mark.parametrize(
    "name", ["two sides", "self, ids of views", "self, bias drops columns", "strided", "no columns"]
)
def test_opcheck(name, dtype):
    inputs = BY_NAME[name].inputs(dtype)
    a, b, bias, a_ids, b_ids = (inputs.get(k) for k in ("a", "b", "bias", "a_ids", "b_ids"))
    work = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.as_tensor(inputs["scale"], dtype=work)
    for cols in (False, True):
        forward = (a, b, scale, bias, a_ids, b_ids, False, cols, False, "cpu")
        torch.library.opcheck(torch.ops.sslfast.similarity_lse_fwd, forward)
        row, col, _ = torch.ops.sslfast.similarity_lse_fwd(*forward)
        g, h = torch.randn_like(row), torch.randn_like(col) if cols else None
        for needs in ((True, b is not None, True, bias is not None), (True, False, False, False)):
            backward = (g, h, a, b, scale, bias, a_ids, b_ids, row, col, False, needs, "cpu")
            torch.library.opcheck(torch.ops.sslfast.similarity_lse_bwd, backward)


# The same bits every time; as good with any number of threads.


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "name", ["many tiles", "self, many tiles", "self, running maximum", "self, bias, many tiles"]
)
def test_bitwise_deterministic(name, threads, set_threads):
    set_threads(threads)
    inputs = BY_NAME[name].inputs(torch.float32)

    def once() -> list[Tensor]:
        leaves = {k: x.clone().requires_grad_() for k, x in inputs.items() if _floating(x)}
        outputs = _outputs(similarity_lse(**{**inputs, **leaves}))
        sum((x * torch.arange(len(x))).sum() for x in outputs).backward()
        return [*outputs, *(x.grad for x in leaves.values())]

    first = once()
    for _ in range(4):
        assert all(torch.equal(x, y) for x, y in zip(first, once(), strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=_id)
@pytest.mark.parametrize("name", ["many tiles", "self, running maximum", "sorted classes, same", "self"])
def test_any_number_of_threads(name, dtype, threads, set_threads):
    set_threads(threads)
    assert_close_to_reference(OP, BY_NAME[name].inputs(dtype))


def test_calls_from_several_threads_do_not_meet():
    inputs = [torch.randn(600, 32) for _ in range(3)]
    expected = [similarity_lse(a, scale=0.1) for a in inputs]
    results: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        results[i] = [similarity_lse(inputs[i], scale=0.1) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, row in enumerate(expected):
        for result in results[i]:
            torch.testing.assert_close(result, row)


# Anything that hypothesis thinks of.

DRAWN = st.builds(
    SimilarityLseCase,
    name=st.just("drawn"),
    m=st.integers(0, 40) | st.integers(505, 530),
    n=st.none() | st.integers(0, 40) | st.integers(505, 530),
    d=st.integers(1, 40),
    scale=st.floats(-3, 3, width=32) | st.floats(-300, 300, width=32),
    learned=st.booleans(),
    rows=st.sampled_from(["normal", "unit", "identical"]),
    bias=st.sampled_from(["", "normal", "float32", "drops", "drops all"]),
    ids=st.sampled_from(["", "views", "classes", "sorted", "apart", "shared", "equal", "wide"]),
    pairs=st.just("different"),
    return_cols=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(case=DRAWN, dtype=st.sampled_from(FLOATS), seed=st.integers(0, 9), same=st.booleans())
def test_drawn_case(case, dtype, seed, same):
    inputs = case.inputs(dtype, seed=seed)
    assert_close_to_reference(
        OP, {**inputs, "pairs": "same" if same and case.ids else "different"}, seed=seed
    )


NUMBER = st.floats(-9, 9, width=32) | st.sampled_from([0.0, -0.0, 1e-40, 1.0])


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(data=st.data(), m=st.integers(1, 5), n=st.integers(1, 5), d=st.integers(1, 3))
def test_drawn_numbers(data, m, n, d):
    """Ties, zeros of both signs, subnormal numbers and whatever else makes a small example."""

    def tensor(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.tensor(data.draw(st.lists(NUMBER, min_size=count, max_size=count))).view(shape)

    a, b, bias, g, h = tensor(m, d), tensor(n, d), tensor(n), tensor(m), tensor(n)
    inputs = {"a": a, "b": b, "bias": bias, "scale": tensor()}
    assert_close_to_reference(OP, {**inputs, "return_cols": True}, upstream=(g, h))


def _floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("amd, tile", [(False, (384, 1024)), (True, (512, 768))])
def test_tiles_are_what_the_sizes_above_assume(monkeypatch, amd, tile):
    monkeypatch.setattr(tuning, "_is_amd", lambda: amd)
    assert tuning.cpu_tile(16) == tuning.cpu_tile(128) == tile
