"""Inputs for every op, and the assertion that a backend's results are as good as PyTorch's own.

Truth is the op's reference in float64 on the same numbers. The yardstick is the same reference at the
inputs' dtype: a result may be at most twice as far from the truth as the yardstick, plus a floor of a few
roundings. Tests, benchmarks and checks of other backends share the table CASES:

    for case in CASES["similarity_lse"]:
        assert_close_to_reference("similarity_lse", case.inputs(torch.float32))
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sslfast.testing import (
    _augment_views,
    _ema,
    _patch_mask,
    _patches,
    _prototypes,
    _similarity_bce,
    _similarity_lse,
    _soft_cross_entropy,
)
from sslfast.testing._op import Inputs, Op
from sslfast.testing._similarity_lse import SimilarityLseCase, similarity_lse_reference

__all__ = [
    "CASES",
    "OPS",
    "SimilarityLseCase",
    "assert_close_to_reference",
    "assert_no_worse",
    "assert_same_direction",
    "similarity_lse_reference",
]

# The floor of every comparison, in units of eps * max(1, max |logit|, max |result|), eps that of the dtype of
# the sums (float32, or float64 for float64 inputs). A logit and a log-sum-exp are good to a few roundings of
# themselves, exp and log to a few roundings of 1. A gradient's unit also has the sum of the absolute values
# of its terms: each of them is exp(logit - lse) times something, so an absolute error of a logit is a
# relative error of the term. Results below the smallest normal number may be 0.
FLOOR = 4.0

# Gradients are compared as vectors too. Relative to the sum of its absolute terms, a gradient may differ from
# the truth by this many of the same units, on top of twice the yardstick's difference.
VECTOR_FLOOR = 16.0

# A backend may round the tile of gradient weights to the inputs' 16-bit dtype before its product, as
# attention kernels do. That moves each term of a gradient by at most half an eps of itself, independently, so
# that their sum moves by about 0.3 eps times the root of the sum of their squares, the unit here.
TILE_FLOOR = 2.0
TILE_VECTOR_FLOOR = 1.0

CASES: dict[str, list[Any]] = {
    "similarity_lse": _similarity_lse.CASES,
    "similarity_bce": _similarity_bce.CASES,
    "ema_update_": _ema.CASES,
    "random_patch_mask": _patch_mask.RANDOM_CASES,
    "block_patch_mask": _patch_mask.BLOCK_CASES,
    "gather_patches": _patches.GATHER_CASES,
    "restore_patches": _patches.RESTORE_CASES,
    "embed_visible_patches": _patches.EMBED_CASES,
    "masked_patch_mse": _patches.MSE_CASES,
    "soft_cross_entropy": _soft_cross_entropy.CASES,
    "head_cross_entropy": _prototypes.HEAD_CASES,
    "sinkhorn_pass": _prototypes.SINKHORN_CASES,
    "augment_views": _augment_views.CASES,
}
OPS: dict[str, Op] = {
    "similarity_lse": _similarity_lse.OP,
    "similarity_bce": _similarity_bce.OP,
    "ema_update_": _ema.OP,
    "random_patch_mask": _patch_mask.RANDOM_OP,
    "block_patch_mask": _patch_mask.BLOCK_OP,
    "gather_patches": _patches.GATHER_OP,
    "restore_patches": _patches.RESTORE_OP,
    "embed_visible_patches": _patches.EMBED_OP,
    "masked_patch_mse": _patches.MSE_OP,
    "soft_cross_entropy": _soft_cross_entropy.OP,
    "head_cross_entropy": _prototypes.HEAD_OP,
    "sinkhorn_pass": _prototypes.SINKHORN_OP,
    "augment_views": _augment_views.OP,
}


def assert_close_to_reference(
    op: str,
    inputs: Inputs,
    *,
    run: Callable[..., Any] | None = None,
    seed: int = 0,
    upstream: Sequence[Tensor | None] | None = None,
    needs: Sequence[str] | None = None,
    rounds_tiles: bool = False,
) -> None:
    """Raises AssertionError unless an op's values and gradients are as good as its reference's.

    Args:
        op: a key of OPS.
        inputs: keyword arguments of the op, as a case makes them.
        run: what to check, instead of the op's public function.
        seed: of the random upstream gradients.
        upstream: gradients of the outputs instead, None for an output that the loss does not use.
        needs: names of the inputs that require a gradient; all that can have one if left out.
        rounds_tiles: gradient weights of 16-bit inputs are rounded to their dtype.
    """
    spec = OPS[op]
    floating = [k for k, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]
    if needs is None:
        needs = floating if spec.gradients is None else [k for k in floating if k in spec.gradients]
    exact = {k: x.double() if k in floating else x for k, x in inputs.items()}
    outputs = _outputs(spec.reference(**inputs))
    work = torch.finfo(torch.float64 if outputs[0].dtype == torch.float64 else torch.float32)
    if upstream is None:
        generator = torch.Generator().manual_seed(seed)
        upstream = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    in_double = [None if u is None else u.double() for u in upstream]

    truth = _evaluate(spec.reference, exact, in_double, needs)
    if outputs[0].dtype == torch.float64:  # the truth itself is rounded: the yardstick shows how much
        yardstick = _evaluate(lambda **k: spec.reference(**spec.equivalent(k)), inputs, upstream, needs)
    else:
        yardstick = _evaluate(spec.reference, inputs, upstream, needs)
    ours = _evaluate(run or spec.run, inputs, upstream, needs)

    largest, terms = spec.terms(exact, in_double)
    results = torch.cat([x.abs().flatten() for x in truth[0]])
    unit = work.eps * max(1.0, largest, *results[results.isfinite()].tolist())
    assert len(ours[0]) == len(outputs), f"{len(ours[0])} outputs, expected {len(outputs)}"
    for i, (value, true, yard) in enumerate(zip(ours[0], truth[0], yardstick[0], strict=True)):
        assert value.dtype == outputs[i].dtype, f"output {i}: {value.dtype}, expected {outputs[i].dtype}"
        assert_no_worse(f"output {i}", value, true, yard, FLOOR * unit)
    for name in needs:
        what, (size, root) = f"gradient of {name}", terms[name]
        eps = torch.finfo(inputs["a"].dtype).eps if rounds_tiles and spec.tiles else 0.0
        value, true, yard = ours[1][name], truth[1][name], yardstick[1][name]
        assert value.dtype == inputs[name].dtype, f"{what}: {value.dtype}, expected {inputs[name].dtype}"
        most, most_root = (x.max().item() if x.numel() else 0.0 for x in (size, root))
        floor = FLOOR * unit * most + TILE_FLOOR * eps * most_root + work.tiny
        assert_no_worse(what, value, true, yard, floor)
        floor = VECTOR_FLOOR * unit * size.norm().item() + TILE_VECTOR_FLOOR * eps * root.norm().item()
        floor += work.tiny * len(size.flatten())
        assert_same_direction(what, value, true, yard, floor)


def assert_no_worse(name: str, ours: Tensor, truth: Tensor, yardstick: Tensor, floor: float) -> None:
    """max |ours - truth| <= 2 max |yardstick - truth| + floor; -inf, inf and NaN in the truth's places."""
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    ours, yardstick = ours.double(), yardstick.double()
    for what, is_it in (("NaN", torch.isnan), ("-inf", torch.isneginf), ("inf", torch.isposinf)):
        wrong = int((is_it(ours) != is_it(truth)).sum())
        assert wrong == 0, f"{name}: {what} differs from the reference in {wrong} of {truth.numel()} places"
    finite = truth.isfinite()
    if not finite.any():
        return
    error = (ours - truth)[finite].abs().max().item()
    allowed = 2 * (yardstick - truth)[finite].nan_to_num(0.0, 0.0, 0.0).abs().max().item() + floor
    assert error <= allowed, f"{name}: max error {error:.3g}, allowed {allowed:.3g} (floor {floor:.3g})"


def assert_same_direction(name: str, ours: Tensor, truth: Tensor, yardstick: Tensor, floor: float) -> None:
    """Cosine and ratio of norms are 1, to (2 |yardstick - truth| + floor) / |truth|."""
    x, y = ours.double().flatten(), truth.flatten()
    if not y.isfinite().all() or y.norm() == 0:
        return  # assert_no_worse has compared these
    allowed = (2 * (yardstick.double().flatten() - y).norm().item() + floor) / y.norm().item()
    ratio, cosine = (x.norm() / y.norm()).item(), torch.dot(x / x.norm(), y / y.norm()).item()
    assert abs(ratio - 1) <= allowed, (
        f"{name}: |ours| / |truth| - 1 is {ratio - 1:.3g}, allowed {allowed:.3g}"
    )
    # |x - y| <= r |y| keeps the angle within asin(r), whose cosine is at least 1 - r^2
    room = allowed**2 + 1e-13
    assert allowed >= 1 or 1 - cosine <= room, f"{name}: 1 - cosine is {1 - cosine:.3g}, allowed {room:.3g}"


def _outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _evaluate(
    function: Callable[..., Any], inputs: Inputs, upstream: Sequence[Tensor | None], needs: Sequence[str]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Detached outputs, and the gradient of each input in `needs`."""
    leaves = {k: inputs[k].detach().requires_grad_() for k in needs}
    outputs = _outputs(function(**{**inputs, **leaves}))
    used = [(x, u) for x, u in zip(outputs, upstream, strict=True) if u is not None and x.requires_grad]
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if used and leaves:
        heads, grads = zip(*used, strict=True)
        gradients = torch.autograd.grad(heads, list(leaves.values()), grads, allow_unused=True)
    filled = {
        k: torch.zeros_like(leaves[k]) if d is None else d for k, d in zip(leaves, gradients, strict=True)
    }
    return tuple(x.detach() for x in outputs), filled
