"""Triton kernels of `soft_cross_entropy`: a program keeps a stretch of all targets of one image in registers
and meets every view of that image with it: each number is read once, each target's power is taken once.

Of a row x and a stretch of classes, with u = sign(rate) (x - center) and 2^(|rate| u) the weight of a class:
top = max u, sum = sum 2^(|rate| (u - top)). `forward` leaves these and, for each target,
sum_k q_k |rate| (top - u_k), none of whose terms is negative; `merge` adds the stretches up in fixed order.
"""

import torch
import triton
import triton.language as tl
from sslfast.kernels import tuning
from sslfast.kernels.patches import _narrow

LOG2E = 1.4426950408889634


@triton.jit
def _targets(
    target_ptr, center_ptr, image, k, view_stride, batch_stride, targets, classes, CENTER: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """(x - center [T, BLOCK], 0 outside, and what is inside)"""
    t = tl.arange(0, T)
    inside = (t < targets)[:, None] & (k < classes)[None, :]
    at = t.to(tl.int64)[:, None] * view_stride + image * batch_stride + k[None, :]
    x = tl.load(target_ptr + at, inside, 0.0).to(tl.float32)
    if CENTER:
        x = x - tl.load(center_ptr + k, k < classes, 0.0)[None, :]
    return x, inside


@triton.jit
def forward(
    logits_ptr, target_ptr, center_ptr, part_ptr, target_part_ptr, dot_ptr,
    view_stride, batch_stride, target_view_stride, target_batch_stride,
    views, targets, batch, classes, stretches, rate, sign, target_rate, target_sign,
    CENTER: tl.constexpr, SOFTMAX: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """part [S, B, J, 2] and target_part [T, B, J, 2]: top and sum; dot [S, B, J, T]."""
    program = tl.program_id(0)
    image, stretch = (program // stretches).to(tl.int64), program % stretches
    k, t = stretch * BLOCK + tl.arange(0, BLOCK), tl.arange(0, T)
    q, inside = _targets(
        target_ptr, center_ptr, image, k, target_view_stride, target_batch_stride, targets, classes, CENTER, T
    )
    place = (t * batch + image) * stretches + stretch
    if SOFTMAX:
        q = tl.where(inside, q * target_sign, float("-inf"))
        top = tl.max(q, 1)
        above = tl.where(top == float("-inf"), 0.0, top)
        q = tl.exp2((q - above[:, None]) * target_rate)
        tl.store(target_part_ptr + 2 * place, top, t < targets)
    tl.store(target_part_ptr + 2 * place + 1, tl.sum(q, 1), t < targets)
    for v in range(views):
        at = (image * 0 + v) * view_stride + image * batch_stride + k
        x = tl.load(logits_ptr + at, k < classes, 0.0).to(tl.float32)
        u = tl.where(k < classes, x * sign, float("-inf"))
        top_u = tl.max(u, 0)
        above_u = tl.where(top_u == float("-inf"), 0.0, top_u)
        power = (u - above_u) * rate
        below = tl.where((k < classes)[None, :], q * -power[None, :], 0.0)
        place_v = ((image * 0 + v) * batch + image) * stretches + stretch
        tl.store(part_ptr + 2 * place_v, top_u)
        tl.store(part_ptr + 2 * place_v + 1, tl.sum(tl.where(k < classes, tl.exp2(power), 0.0), 0))
        tl.store(dot_ptr + place_v * T + t, tl.sum(below, 1))


@triton.jit
def merge(
    part_ptr, target_part_ptr, dot_ptr, loss_ptr, state_ptr, mass_ptr, target_state_ptr,
    targets, batch, stretches, rate, sign, target_rate, target_sign,
    SOFTMAX: tl.constexpr, SKIP: tl.constexpr, T: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Loss, state (the number of greatest weight, log2 of the sum) and mass of row (v, image); view 0 leaves
    the targets' states."""
    image, v = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    j, t = tl.arange(0, J), tl.arange(0, T)
    place = (v * batch + image) * stretches + j
    tops = tl.load(part_ptr + 2 * place, j < stretches, float("-inf"))
    sums = tl.load(part_ptr + 2 * place + 1, j < stretches, 0.0)
    top = tl.max(tops, 0)
    log2_sum = tl.log2(tl.sum(tl.where(j < stretches, sums * tl.exp2((tops - top) * rate), 0.0), 0))

    inside = (t < targets)[:, None] & (j < stretches)[None, :]
    target_place = (t.to(tl.int64)[:, None] * batch + image) * stretches + j[None, :]
    masses = tl.load(target_part_ptr + 2 * target_place + 1, inside, 0.0)
    share = tl.where(inside, 1.0, 0.0)  # what a stretch's targets are to be multiplied by
    if SOFTMAX:
        target_tops = tl.load(target_part_ptr + 2 * target_place, inside, float("-inf"))
        target_top = tl.max(target_tops, 1)
        share = tl.where(inside, tl.exp2((target_tops - target_top[:, None]) * target_rate), 0.0)
        target_log2 = tl.log2(tl.sum(masses * share, 1))
        share = share * tl.exp2(-target_log2)[:, None]
        if v == 0:
            at = target_state_ptr + 2 * (t * batch + image)
            tl.store(at, target_top * target_sign, t < targets)
            tl.store(at + 1, target_log2, t < targets)
    met = inside
    if SKIP:
        met = met & (t != v)[:, None]
    dots = tl.load(dot_ptr + place[None, :] * T + t[:, None], inside, 0.0)
    dots += tl.where(masses == 0.0, 0.0, masses * ((top - tops) * rate)[None, :])
    mass = tl.sum(tl.sum(tl.where(met, masses * share, 0.0), 1), 0)
    below = tl.sum(tl.sum(tl.where(met, dots * share, 0.0), 1), 0)
    row = v * batch + image
    tl.store(loss_ptr + row, (mass * log2_sum + below) * 0.6931471805599453)  # from log2 to log
    tl.store(state_ptr + 2 * row, top * sign)
    tl.store(state_ptr + 2 * row + 1, log2_sum)
    tl.store(mass_ptr + row, mass)


@triton.jit
def backward(
    dlogits_ptr, upstream_ptr, logits_ptr, target_ptr, center_ptr, state_ptr, mass_ptr, target_state_ptr,
    out_view_stride, out_batch_stride, view_stride, batch_stride, target_view_stride, target_batch_stride,
    views, targets, batch, classes, stretches, scale, rate, target_rate,
    CENTER: tl.constexpr, SOFTMAX: tl.constexpr, SKIP: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlogits = upstream scale (mass softmax - Q); dlogits may be the logits. Rates are signed here."""
    program = tl.program_id(0)
    image, stretch = (program // stretches).to(tl.int64), program % stretches
    k, t = stretch * BLOCK + tl.arange(0, BLOCK), tl.arange(0, T)
    q, inside = _targets(
        target_ptr, center_ptr, image, k, target_view_stride, target_batch_stride, targets, classes, CENTER, T
    )
    if SOFTMAX:
        at = target_state_ptr + 2 * (t * batch + image)
        top, log2_sum = tl.load(at, t < targets, 0.0), tl.load(at + 1, t < targets, 0.0)
        q = tl.where(inside, tl.exp2((q - top[:, None]) * target_rate - log2_sum[:, None]), 0.0)
    for v in range(views):
        place = (image * 0 + v) * view_stride + image * batch_stride + k
        x = tl.load(logits_ptr + place, k < classes, 0.0).to(tl.float32)
        row = (image * 0 + v) * batch + image
        power = (x - tl.load(state_ptr + 2 * row)) * rate - tl.load(state_ptr + 2 * row + 1)
        gain = tl.load(upstream_ptr + row) * scale
        met = q
        if SKIP:
            met = tl.where((t != v)[:, None], q, 0.0)
        d = gain * (tl.load(mass_ptr + row) * tl.exp2(power) - tl.sum(met, 0))
        out = (image * 0 + v) * out_view_stride + image * out_batch_stride + k
        tl.store(dlogits_ptr + out, _narrow(d, dlogits_ptr.dtype.element_ty), k < classes)


def _block(targets: int, classes: int) -> tuple[int, int, int]:
    """(T, BLOCK, warps)"""
    count = triton.next_power_of_2(targets)
    block = min(max(tuning.TARGET_TILE // count, 128), triton.next_power_of_2(classes))
    return count, block, max(1, min(8, block // 256))


def _rates(*scales: float) -> list[float]:
    """|rate| and sign of each scale: a weight is 2 to the power of |rate| times sign times a logit."""
    return [x for s in scales for x in (abs(s) * LOG2E, -1.0 if s < 0 else 1.0)]


def launch_forward(
    logits: torch.Tensor, targets: torch.Tensor, center: torch.Tensor | None, loss: torch.Tensor,
    state: torch.Tensor, mass: torch.Tensor, target_state: torch.Tensor, scale: float, target_scale: float,
    softmax: bool, skip: bool,
) -> None:  # fmt: skip
    """logits [S, B, K], targets [T, B, K] with contiguous classes; the rest as in `sslfast.ops`."""
    (views, batch, classes), many = logits.shape, len(targets)
    count, block, warps = _block(many, classes)
    stretches = triton.cdiv(classes, block)
    part = loss.new_empty(views, batch, stretches, 2)
    target_part = loss.new_empty(many, batch, stretches, 2)
    dot = loss.new_empty(views, batch, stretches, count)
    rates = _rates(scale, target_scale)
    forward[(batch * stretches,)](
        logits, targets, loss if center is None else center, part, target_part, dot,
        *logits.stride()[:2], *targets.stride()[:2], views, many, batch, classes, stretches,
        *rates, center is not None, softmax, count, block, num_warps=warps,
    )  # fmt: skip
    merge[(batch, views)](
        part, target_part, dot, loss, state, mass, target_state, many, batch, stretches, *rates, softmax,
        skip, count, triton.next_power_of_2(stretches), num_warps=1,
    )  # fmt: skip


def launch_backward(
    dlogits: torch.Tensor, upstream: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor,
    center: torch.Tensor | None, state: torch.Tensor, mass: torch.Tensor, target_state: torch.Tensor,
    scale: float, target_scale: float, softmax: bool, skip: bool,
) -> None:  # fmt: skip
    """The classes may be a slice of those that the states are of."""
    (views, batch, classes), many = logits.shape, len(targets)
    count, block, warps = _block(many, classes)
    stretches = triton.cdiv(classes, block)
    backward[(batch * stretches,)](
        dlogits, upstream, logits, targets, mass if center is None else center, state, mass,
        target_state, *dlogits.stride()[:2], *logits.stride()[:2], *targets.stride()[:2], views, many, batch,
        classes, stretches, scale, scale * LOG2E, target_scale * LOG2E, center is not None, softmax, skip,
        count, block, num_warps=warps,
    )  # fmt: skip
