"""Drop-ins beside the installed originals: values, gradients of all leaves, signatures."""

import importlib
import inspect
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sslfast.testing import assert_no_worse, assert_same_direction

FLOOR = 64  # roundings allowed beside twice the original's error


def original(name: str) -> ModuleType:
    """The installed library; without it the test is skipped, or fails where all must be there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("SSLFAST_PEERS") == "all":
            raise
        pytest.skip(f"{name} is not installed: {error}", allow_module_level=True)


def assert_signature(ours: Callable, theirs: Callable) -> None:
    """The original's parameters in its order, with its defaults; ours may have further ones behind."""
    mine, its = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
    assert [p.name for p in mine[: len(its)]] == [p.name for p in its]
    for p, q in zip(mine, its, strict=False):
        assert p.kind == q.kind, f"{p.name}: {p.kind}, expected {q.kind}"
        same = p.default is q.default or p.default == q.default
        assert same, f"{p.name}: default {p.default}, expected {q.default}"
    for p in mine[len(its) :]:
        assert p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL), p.name


def evaluate(call: Callable[..., Tensor], leaves: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """(value, gradients of the floating leaves) of a fresh call; a leaf without a gradient has zeros."""
    fresh = {
        k: x.detach().clone().requires_grad_() if x.is_floating_point() else x for k, x in leaves.items()
    }
    value = call(**fresh)
    wanted = {k: x for k, x in fresh.items() if x.requires_grad}
    found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
    return value.detach(), {
        k: torch.zeros_like(x) if d is None else d for (k, x), d in zip(wanted.items(), found, strict=True)
    }


def assert_like_original(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    leaves: dict[str, Tensor],
    floor: float = FLOOR,
) -> None:
    """Both in float64, and ours in float32 beside theirs: no worse than twice the original's error.

    Args:
        ours, theirs: from the leaves, by name, to a 0-d loss. They are called several times, so state that a
            call changes has to be made within them.
        leaves: float64 tensors, which get a gradient, and integer ones.
    """
    exact = {k: x.double() if x.is_floating_point() else x for k, x in leaves.items()}
    single = {k: x.float() if x.is_floating_point() else x for k, x in leaves.items()}
    truth, slopes = evaluate(theirs, exact)
    for what, given in (("float64", exact), ("float32", single)):
        value, found = evaluate(ours, given)
        yard, yard_slopes = (truth, slopes) if what == "float64" else evaluate(theirs, given)
        eps = torch.finfo(torch.float64 if what == "float64" else torch.float32).eps
        assert value.shape == truth.shape, f"{what}: {list(value.shape)}, expected {list(truth.shape)}"
        largest = max(1.0, truth.nan_to_num(0, 0, 0).abs().max().item())
        assert_no_worse(f"{what} value", value, truth, yard, floor * eps * largest)
        for name, slope in slopes.items():
            size = slope.nan_to_num(0, 0, 0)
            unit = floor * eps * max(1e-3, size.abs().max().item())
            assert_no_worse(f"{what} gradient of {name}", found[name], slope, yard_slopes[name], unit)
            assert_same_direction(
                f"{what} gradient of {name}", found[name], slope, yard_slopes[name],
                floor * eps * max(1e-3, size.norm().item()),
            )  # fmt: skip


def same_error(ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    """Both raise, and ours an error of the original's class."""
    with pytest.raises(Exception) as expected:
        theirs()
    with pytest.raises(type(expected.value)):
        ours()
