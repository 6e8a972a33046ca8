"""Triton kernels of `masked_patch_mse`: one program per patch reads its pixels and its prediction once."""

import torch
import triton
import triton.language as tl
from sslfast.kernels import tuning
from sslfast.kernels.patches import _narrow, _work


@triton.jit
def _target(
    corner_ptr,
    scale_ptr,
    shift_ptr,
    k,
    channel_stride,
    y_stride,
    x_stride,
    AFFINE: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    WORK: tl.constexpr,
):
    """Elements k of the target in (y, x, channel) order."""
    inside = k < PATCH * PATCH * CHANNELS
    channel, x, y = k % CHANNELS, k // CHANNELS % PATCH, k // (CHANNELS * PATCH)
    at = channel.to(tl.int64) * channel_stride + y * y_stride + x * x_stride
    t = tl.load(corner_ptr + at, inside, 0).to(WORK)
    if AFFINE:
        scale = tl.load(scale_ptr + channel, inside, 0.0).to(WORK)
        t = t * scale + tl.load(shift_ptr + channel, inside, 0.0).to(WORK)
    return tl.where(inside, t, 0.0)


@triton.jit
def patch_error(
    pred_ptr,
    images_ptr,
    weight_ptr,
    total_ptr,
    scale_ptr,
    shift_ptr,
    part_ptr,
    dpred_ptr,
    upstream_ptr,
    pred_batch_stride,
    pred_row_stride,
    batch_stride,
    channel_stride,
    y_stride,
    x_stride,
    across,
    patches,
    AFFINE: tl.constexpr,
    NORM: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    GRADIENT: tl.constexpr,
    UPSTREAM: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    WORK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """part[b, l] = w_l / (K sum w) * the sum of the errors of patch l; dpred[b, l] its gradient, UPSTREAM:
    times an upstream one."""
    SIZE: tl.constexpr = PATCH * PATCH * CHANNELS
    patch = tl.program_id(0).to(tl.int64)
    image, place = patch // patches, patch % patches
    weight, total = tl.load(weight_ptr + patch), tl.load(total_ptr)
    offsets = tl.arange(0, BLOCK)
    narrow: tl.constexpr = pred_ptr.dtype.element_ty
    if weight == 0:
        tl.store(part_ptr + patch, tl.zeros((), WORK))
        if GRADIENT:
            for first in range(0, SIZE, BLOCK):
                k = first + offsets
                tl.store(dpred_ptr + patch * SIZE + k, tl.zeros([BLOCK], narrow), k < SIZE)
    else:
        gain = tl.where(total == 0, 0.0, weight / (total * SIZE))
        corner = (
            images_ptr
            + image * batch_stride
            + place // across * PATCH * y_stride
            + place % across * PATCH * x_stride
        )
        mean = tl.zeros((), WORK)
        std = mean + 1.0
        if NORM:
            sums = tl.zeros([BLOCK], WORK)
            for first in range(0, SIZE, BLOCK):
                sums += _target(
                    corner, scale_ptr, shift_ptr, first + offsets, channel_stride, y_stride, x_stride, AFFINE,
                    PATCH, CHANNELS, WORK,
                )  # fmt: skip
            mean = tl.sum(sums, 0) / SIZE
            squares = tl.zeros([BLOCK], WORK)
            for first in range(0, SIZE, BLOCK):
                k = first + offsets
                t = _target(
                    corner, scale_ptr, shift_ptr, k, channel_stride, y_stride, x_stride, AFFINE, PATCH,
                    CHANNELS, WORK,
                )  # fmt: skip
                squares += tl.where(k < SIZE, (t - mean) * (t - mean), 0.0)
            std = tl.sqrt(tl.sum(squares, 0) / (SIZE - 1) + 1e-6)
        factor = gain
        if UPSTREAM:
            factor = gain * tl.load(upstream_ptr).to(WORK)
        errors = tl.zeros([BLOCK], WORK)
        pred = pred_ptr + image * pred_batch_stride + place * pred_row_stride
        for first in range(0, SIZE, BLOCK):
            k = first + offsets
            t = _target(
                corner,
                scale_ptr,
                shift_ptr,
                k,
                channel_stride,
                y_stride,
                x_stride,
                AFFINE,
                PATCH,
                CHANNELS,
                WORK,
            )
            if NORM:
                t = (t - mean) / std
            d = tl.where(k < SIZE, tl.load(pred + k, k < SIZE, 0.0).to(WORK) - t, 0.0)
            if ABSOLUTE:
                errors += tl.abs(d)
                slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
            else:
                errors += d * d
                slope = 2.0 * d
            if GRADIENT:
                tl.store(dpred_ptr + patch * SIZE + k, _narrow((factor * slope).to(WORK), narrow), k < SIZE)
        tl.store(part_ptr + patch, gain * tl.sum(errors, 0))


@triton.jit
def scale(x_ptr, upstream_ptr, count, WORK: tl.constexpr, BLOCK: tl.constexpr):
    """x <- upstream x; an upstream gradient of 1, the usual one, touches nothing"""
    upstream = tl.load(upstream_ptr).to(WORK)
    if upstream != 1:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, at < count, 0.0).to(WORK) * upstream
        tl.store(x_ptr + at, _narrow(x, x_ptr.dtype.element_ty), at < count)


def forward(
    pred: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    patch: int,
    norm_pix: bool,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    absolute: bool,
    dpred: torch.Tensor | None,
    upstream: torch.Tensor | None,
) -> torch.Tensor:
    """The loss, and, where there is room for it, its gradient times `upstream` (None: 1) in dpred. weight
    [B, L], scale and shift [C] are of the working dtype."""
    batch, patches, size = pred.shape
    part = weight.new_empty(batch, patches)
    block = min(tuning.PATCH_PIXELS, triton.next_power_of_2(size))
    affine, scaled = scale is not None, upstream is not None
    scale, shift, upstream = (part if x is None else x for x in (scale, shift, upstream))
    patch_error[(batch * patches,)](
        pred, images, weight, weight.sum(), scale, shift, part, part if dpred is None else dpred, upstream,
        *pred.stride()[:2], *images.stride(), images.shape[3] // patch, patches, affine, norm_pix, absolute,
        dpred is not None, scaled, patch, images.shape[1], _work(pred.dtype), block,
        num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    return part.sum()


def scale_(x: torch.Tensor, upstream: torch.Tensor) -> None:
    block, count = tuning.PATCH_TILE, x.numel()
    if count:
        scale[(triton.cdiv(count, block),)](x, upstream, count, _work(x.dtype), block, num_warps=4)
