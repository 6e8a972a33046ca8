"""What tests of several losses share: draws in float64, comparisons with a formula, and common checks."""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sslfast

NAN, INF = math.nan, math.inf
DRAWS = settings(max_examples=60, deadline=None, derandomize=True, database=None)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def f64(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def tensors(*values: object) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor)]


def draw_number(data, *values: float) -> Tensor | float:
    """One of the values, as a number or a tensor."""
    value = data.draw(st.sampled_from(values))
    return number(value) if data.draw(st.booleans()) else value


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)


def reduced(terms: Tensor, reduction: str) -> Tensor:
    return {"none": terms, "sum": terms.sum(), "mean": terms.sum() / terms.numel()}[reduction]


def assert_same_loss(actual: Tensor, expected: Tensor, leaves: Sequence[Tensor], rtol: float = 1e-9) -> None:
    """Values, and gradients of any upstream gradient."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-11)
    upstream = torch.randn_like(expected)
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    for x, y in zip(
        torch.autograd.grad(actual, leaves, upstream, **options),
        torch.autograd.grad(expected, leaves, upstream, **options),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-11)


def leaves_of(inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in inputs]


def outcome(loss: Callable, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The loss, and the gradients of its sum."""
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def far(x: Tensor, y: Tensor) -> float:
    return (x.double() - y.double()).norm().item()


def assert_float32_is_close(loss: Callable, formula: Callable, inputs: Sequence[Tensor], rtol=1e-5) -> None:
    inputs = leaves_of(inputs, torch.float32)
    found, exact = outcome(loss, inputs), outcome(formula, leaves_of(inputs, torch.float64))
    for x, y in zip(found, exact, strict=True):
        assert x.dtype == torch.float32 and far(x, y) <= rtol * y.norm()


def assert_no_worse_than_torch(
    loss: Callable,
    formula: Callable,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    floor: float | None = None,
) -> None:
    """At most twice as far from the truth as the formula in PyTorch is in `dtype`, and a rounding more (for
    the loss: `floor` more, where given)."""
    inputs = leaves_of(inputs, dtype)
    truth = outcome(formula, leaves_of(inputs, torch.float64))
    found, torchs = outcome(loss, inputs), outcome(formula, inputs)
    assert found[0].dtype == torch.float32 and all(x.dtype == dtype for x in found[1:])
    for i, (x, y, exact) in enumerate(zip(found, torchs, truth, strict=True)):
        allowed = torch.finfo(dtype).eps if i or floor is None else floor
        assert far(x, exact) <= 2 * far(y, exact) + allowed * exact.norm()


def assert_compiles(loss: Callable, leaves: Sequence[Tensor]) -> None:
    torch.compiler.reset()
    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*may not alias")  # what an op returns
        found = outcome(fast, leaves)
    for x, y in zip(found, outcome(loss, leaves), strict=True):
        torch.testing.assert_close(x, y)
    torch.compiler.reset()


def assert_backends_agree(loss: Callable, leaves: Sequence[Tensor]) -> None:
    found = outcome(loss, leaves)
    with sslfast.use_backend("reference"):
        expected = outcome(loss, leaves)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


def assert_autocast(loss: Callable, inputs: Sequence[Tensor], tolerance: float = 0.05) -> None:
    """Gives float32 close to what it gives without, and leaves float64 as it is."""
    leaves = leaves_of(inputs, torch.float32)
    expected, exact = outcome(loss, leaves), loss(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        value, same = loss(*leaves), loss(*inputs)
    assert torch.equal(same, exact) and same.dtype == torch.float64
    for x, y in zip((value.detach(), *torch.autograd.grad(value.sum(), leaves)), expected, strict=True):
        assert x.dtype == torch.float32 and far(x, y) <= tolerance * y.norm() + 1e-6


CHECKS = {
    "gradcheck": lambda loss, formula, inputs: torch.autograd.gradcheck(loss, inputs),
    "float32": assert_float32_is_close,
    "bfloat16": lambda *args: assert_no_worse_than_torch(*args, torch.bfloat16),
    "float16": lambda *args: assert_no_worse_than_torch(*args, torch.float16),
    "compile": lambda loss, formula, inputs: assert_compiles(loss, leaves_of(inputs, torch.float32)),
    "backends": lambda loss, formula, inputs: assert_backends_agree(loss, inputs),
    "autocast": lambda loss, formula, inputs: assert_autocast(loss, inputs),
}
EACH_CHECK = pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)  # check(loss, formula, inputs)


def assert_finite(loss: Callable, leaves: Sequence[Tensor]) -> None:
    assert all(x.isfinite().all() for x in outcome(loss, leaves))


def assert_no_host_read(step: Callable[[], object]) -> None:
    """On a GPU; the first call compiles kernels."""
    step()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


BAD_NUMBER = {
    ValueError: (NAN, INF, -INF, torch.ones(1), torch.tensor(1)),
    TypeError: ("1", True, [1.0]),
}
BAD_TEMPERATURE = {
    ValueError: (*BAD_NUMBER[ValueError], 0, 0.0, 1e-40, torch.tensor(0.0), torch.tensor(NAN)),
    TypeError: (*BAD_NUMBER[TypeError], None),
}
BAD_REDUCTION = {ValueError: ("avg", None, "")}


def bad_arguments(loss: Callable, good: dict, wrong: dict) -> list:
    """Parameters of a test: (call, error, name) of a call with one argument that is wrong."""
    loss(**good)
    return [
        pytest.param(
            partial(loss, **{**good, name.partition("[")[0]: value}),
            error,
            name,
            id=f"{loss.__name__}-{name}-{error.__name__}-{i}",
        )
        for name, groups in wrong.items()
        for error, values in groups.items()
        for i, value in enumerate(values)
    ]


def assert_names(call: Callable, error: type[Exception], name: str) -> None:
    """The message says which argument, what was expected and what came."""
    with pytest.raises(error, match=f"^{re.escape(name)}: expected .*, got "):
        call()


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation returns, those inside of an op of sslfast apart."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            self.largest = max(self.largest, x.numel() if isinstance(x, Tensor) else 0)
        return result


def largest_tensor(loss: Callable, leaves: Sequence[Tensor]) -> int:
    with Sizes() as sizes:
        outcome(loss, leaves)
    return sizes.largest
