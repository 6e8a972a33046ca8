"""similarity_bce: its one pass on the CPU and in Triton's interpreter, ways of autograd, compilation, errors.
Its cases on every backend: tests/test_backends.py."""

from contextlib import nullcontext

import pytest
import torch
from interpreter import grid_order, guarded, inside_nan, interpreted, larger_tiles, launches
from sslfast.kernels import tuning
from torch import Tensor

import sslfast
from sslfast import _C
from sslfast.ops import _blocked
from sslfast.ops.similarity_bce import reference, similarity_bce
from sslfast.testing import CASES, OPS, assert_close_to_reference

OP = "similarity_bce"
BY_NAME = {case.name: case for case in CASES[OP]}


def f64(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


# Triton's interpreter

RUNS = [(torch.float32, False, 1), (torch.bfloat16, True, 1), (torch.float16, True, 2)]


@interpreted
@pytest.mark.parametrize(
    "dtype, in_order, case",
    [(*run[:2], case) for run in RUNS for case in CASES[OP][:: run[2]] if run[0] in case.dtypes],
    ids=lambda x: getattr(x, "name", str(x).removeprefix("torch.")),
)
def test_case_in_the_interpreter(dtype, in_order, case, monkeypatch):
    """In tiles smaller than the case, buffers guarded and full of NaN, programs in order or not."""
    larger_tiles(monkeypatch)
    monkeypatch.setattr(tuning, "CHUNK", (384, 640))
    names = launches(monkeypatch)
    inputs = {k: inside_nan(x) if isinstance(x, Tensor) else x for k, x in case.inputs(dtype, seed=3).items()}
    with (
        sslfast.use_backend("triton"),
        grid_order(not in_order),
        guarded() if case.m and case.n else nullcontext(),
    ):
        assert_close_to_reference(OP, inputs, seed=4, rounds_tiles=dtype.itemsize == 2)
    assert ("tile_bce" in names) == bool(case.m and case.n)


@interpreted
def test_any_order_of_programs_gives_the_same_bits():
    inputs = BY_NAME["classes"].inputs(torch.bfloat16)
    run = OPS[OP].run
    with sslfast.use_backend("triton"):
        found = []
        for reverse in (False, True):
            with grid_order(reverse):
                found.append(run(**inputs))
    assert torch.equal(*found)


# One pass


@pytest.mark.parametrize("total", [True, False])
def test_matrix_products(total, monkeypatch):
    """The sum and its gradients take three products per tile; rows apart a fourth, to recompute the tile."""
    counts = dict.fromkeys(("product", "accumulate"), 0)
    for name in counts:
        original = getattr(_blocked.CpuTiles, name)

        def counted(self, *args, name=name, original=original):
            counts[name] += 1
            return original(self, *args)

        monkeypatch.setattr(_blocked.CpuTiles, name, counted)
    a, b = torch.randn(100, 8, requires_grad=True), torch.randn(90, 8, requires_grad=True)
    similarity_bce(a, b, total=total).sum().backward()
    assert counts == {"product": 1 if total else 2, "accumulate": 2}
    with torch.no_grad():
        similarity_bce(a, b, total=total)
    assert counts["accumulate"] == 2


@pytest.mark.parametrize("total", [True, False])
@pytest.mark.parametrize("missing", ["a", "b", "scale", "bias"])
def test_only_what_needs_a_gradient_gets_one(missing, total):
    inputs = {"a": f64(7, 3), "b": f64(9, 3), "scale": number(0.7), "bias": number(-0.3)}
    inputs[missing] = inputs[missing].detach()
    ids = torch.arange(7) % 3, torch.arange(9) % 4
    others = [x for name, x in inputs.items() if name != missing]
    upstream = torch.randn(() if total else (7,), dtype=torch.float64)
    found = similarity_bce(**inputs, a_ids=ids[0], b_ids=ids[1], total=total)
    expected = reference(*inputs.values(), *ids)
    expected = expected.sum() if total else expected
    pairs = zip(
        torch.autograd.grad(found, others, upstream),
        torch.autograd.grad(expected, others, upstream),
        strict=True,
    )
    for x, y in pairs:
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("total", [True, False])
def test_gradcheck(total):
    ids = torch.tensor([0, 1, 2, 1]), torch.tensor([1, 0, 5])
    assert torch.autograd.gradcheck(
        lambda a, b, s, t: similarity_bce(a, b, scale=s, bias=t, a_ids=ids[0], b_ids=ids[1], total=total),
        (f64(4, 3), f64(3, 3), number(0.8), number(-0.2)),
    )


def test_backward_twice_and_scaled():
    """Gradients that the forward pass has left are not used up, nor is the upstream gradient taken for 1."""
    a, b = f64(5, 3), f64(5, 3)
    loss = similarity_bce(a, b, total=True)
    first = torch.autograd.grad(loss, (a, b), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (a, b))
    for x, y in zip(first, again, strict=True):
        torch.testing.assert_close(3 * x, y)


def test_no_second_derivative():
    a, b = f64(5, 3), f64(5, 3)
    (gradient,) = torch.autograd.grad(similarity_bce(a, b, total=True), a, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiates once"):
        gradient.sum().backward()


def test_expanded_upstream_gradient():
    a, b = f64(6, 3), f64(4, 3)
    ids = torch.arange(6), torch.arange(4)
    found = similarity_bce(a, b, a_ids=ids[0], b_ids=ids[1])
    upstream = torch.full((), 0.3, dtype=torch.float64).expand(6)
    expected = reference(a, b, 1.0, 0.0, *ids)
    for x, y in zip(
        torch.autograd.grad(found, (a, b), upstream),
        torch.autograd.grad(expected, (a, b), upstream),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(value):
    a, b = torch.randn(5, 4), torch.randn(6, 4)
    a[2, 1] = value
    ids = torch.arange(5), torch.arange(6)
    found = similarity_bce(a, b, a_ids=ids[0], b_ids=ids[1])
    expected = reference(a, b, 1.0, 0.0, *ids)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert not similarity_bce(torch.randn(5, 4), b, scale=torch.tensor(value)).isfinite().any()


@pytest.mark.parametrize("total", [True, False])
def test_compile(total):
    def loss(a, b, scale, bias):
        return similarity_bce(a, b, scale=scale, bias=bias, total=total).sum()

    args = torch.randn(9, 4), torch.randn(9, 4), torch.tensor(2.0), torch.tensor(-1.0)
    args = tuple(x.requires_grad_() for x in args)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(
        torch.autograd.grad(compiled(*args), args), torch.autograd.grad(loss(*args), args), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_autocast_and_the_reference():
    a, b = torch.randn(9, 4), torch.randn(8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        low = similarity_bce(a, b)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, similarity_bce(a.bfloat16(), b.bfloat16()))
    with sslfast.use_backend("reference"):
        torch.testing.assert_close(
            similarity_bce(a, b), reference(a, b, 1.0, 0.0, *map(torch.arange, (9, 8)))
        )


def test_same_bits_every_time():
    inputs = BY_NAME["many tiles"].inputs(torch.float32)
    leaves = [inputs[k].requires_grad_() for k in ("a", "b", "scale", "bias")]
    first, again = (torch.autograd.grad(similarity_bce(**inputs), leaves) for _ in range(2))
    assert all(map(torch.equal, first, again))


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"a": [1.0]}, TypeError, "a: expected a tensor"),
        ({"a": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "a: expected torch.float32"),
        ({"b": torch.zeros(4, 2)}, ValueError, r"b: expected shape \[any, 3\]"),
        ({"b": X.double()}, TypeError, "b: expected torch.float32"),
        ({"scale": torch.zeros(2)}, ValueError, "scale: expected a number or a 0-d"),
        ({"bias": float("nan")}, ValueError, "bias: expected a finite number"),
        ({"a_ids": torch.arange(4)}, ValueError, "b_ids: expected ids for both sides"),
        ({"a_ids": torch.arange(3), "b_ids": torch.arange(4)}, ValueError, "a_ids: expected shape"),
        ({"a_ids": torch.arange(4), "b_ids": torch.ones(4)}, TypeError, "b_ids: expected torch.int64"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        similarity_bce(**{"a": X, "b": X, **arguments})


@pytest.mark.parametrize("isa", [name for name in _C.cpu_isas() if name != _C.cpu_isas()[-1]], indirect=True)
@pytest.mark.parametrize("case", CASES[OP][::3], ids=lambda case: case.name)
def test_other_instruction_sets(isa, case):
    with sslfast.use_backend("cpu"):
        assert_close_to_reference(OP, case.inputs(torch.float32, seed=7), seed=8)


@pytest.mark.parametrize("isa", _C.cpu_isas(), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_terms_over_their_whole_range(isa, dtype):
    """log(1 + e^t) and 1 / (1 + e^-t), one logit per row, with relative errors of a few roundings."""
    low, high = (-86.0, 86.0) if dtype == torch.float32 else (-700.0, 700.0)
    t = torch.linspace(low, high, 20_001, dtype=dtype)
    exact = t.double()
    ids = torch.arange(len(t)), torch.tensor([-1])
    a, one = t[:, None].requires_grad_(), torch.ones(1, 1, dtype=dtype)
    with sslfast.use_backend("cpu"):
        row = similarity_bce(a, one, a_ids=ids[0], b_ids=ids[1])
        (da,) = torch.autograd.grad(row.sum(), a)
    for found, true in (
        (row, torch.nn.functional.softplus(exact, threshold=800)),
        (da[:, 0], exact.sigmoid()),
    ):
        # a base-2 logit is rounded: an error of |t| eps in the exponent
        limit = (4 + 2 * t.abs().double()) * torch.finfo(dtype).eps
        assert ((found.double() - true).abs() <= limit * true).all()
