"""Triton kernels of the masks: one program per image sorts its noise, or draws its blocks."""

import struct

import torch
import triton
import triton.language as tl
from sslfast.kernels import tuning


@triton.jit
def _ordered(x):
    """float32 bits as int64 in the order of the numbers: -0 equals 0, NaN comes last, as torch.sort has
    it."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    wide = bits.to(tl.int64) & 0xFFFFFFFF
    key = tl.where(bits < 0, wide ^ 0xFFFFFFFF, wide | 0x80000000)
    return tl.where(x != x, 0xFFFFFFFF, key)


@triton.jit
def random_mask(
    given_ptr, ids_ptr, restore_ptr, mask_ptr, length, keep, IS_ORDER: tl.constexpr, BLOCK: tl.constexpr
):
    """given [B, L]: noise, all of which fits one block, or (IS_ORDER) the patches in its order."""
    image = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < length
    given = tl.load(given_ptr + image * length + k, inside, 0)
    if IS_ORDER:
        at = given
    else:  # equal numbers stay in order, since no two keys are equal
        key = tl.where(inside, _ordered(given), 0x100000000)
        at = tl.sort((key << 16) | k) & 0xFFFF
    tl.store(restore_ptr + image * length + at, k.to(tl.int64), inside)
    tl.store(mask_ptr + image * length + at, tl.where(k < keep, 0.0, 1.0), inside)
    tl.store(ids_ptr + image * keep + k, at.to(tl.int64), k < keep)


@triton.jit
def block_mask(
    draws_ptr,
    noise_ptr,
    counts_ptr,
    mask_ptr,
    height,
    width,
    tries,
    least_bits,
    most_bits,
    least_area,
    most_area,
    MANY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """draws [B, tries, 4] float64, see propose() in csrc/patch_mask.h; MANY: counts [B] patches, or one
    block."""
    image = tl.program_id(0).to(tl.int64)
    length = height * width
    i = tl.arange(0, BLOCK)
    inside = i < length
    row, column = i // width, i % width
    least = least_bits.to(tl.int64).to(tl.float64, bitcast=True)
    most = most_bits.to(tl.int64).to(tl.float64, bitcast=True)
    masked = tl.zeros([BLOCK], tl.int32)
    left = tl.full((), 1, tl.int64)
    if MANY:
        left = tl.minimum(tl.maximum(tl.load(counts_ptr + image), 0), length)
    t = 0
    while (t < tries) & (left > 0):
        draw = draws_ptr + (image * tries + t) * 4
        high = most
        if MANY:
            high = tl.minimum(most, left.to(tl.float64))
        root = tl.load(draw + 1)
        side = tl.sqrt(least + tl.load(draw) * (high - least))
        h, w = tl.floor(side * root + 0.5), tl.floor(side / root + 0.5)
        if not MANY:
            if t == tries - 1:
                h, w = tl.minimum(tl.maximum(h, 1.0), height), tl.minimum(tl.maximum(w, 1.0), width)
        good = (h > 0) & (w > 0) & (h <= height) & (w <= width)
        top, across = (
            tl.floor(tl.load(draw + 2) * (height - h + 1)),
            tl.floor(tl.load(draw + 3) * (width - w + 1)),
        )
        block = (row >= top) & (row < top + h) & (column >= across) & (column < across + w) & inside
        more = tl.sum((block & (masked == 0)).to(tl.int32), 0)
        if MANY:
            good = good & (more > 0) & (more <= left)
        else:
            area = h * w
            good = good & (((area >= least_area) & (area <= most_area)) | (t == tries - 1))
            more = 1
        masked = tl.maximum(masked, block.to(tl.int32) * good.to(tl.int32))
        left -= more * good.to(tl.int32)
        t += 1
    if MANY:
        if left > 0:  # the free patches with the smallest noise: the lowest key that has enough up to it
            free = inside & (masked == 0)
            key = _ordered(tl.load(noise_ptr + image * length + i, inside, 0.0))
            low, high_key = tl.full((), 0, tl.int64), tl.full((), 0xFFFFFFFF, tl.int64)
            for _ in range(32):
                middle = (low + high_key) // 2
                enough = tl.sum((free & (key <= middle)).to(tl.int32), 0) >= left
                high_key = tl.where(enough, middle, high_key)
                low = tl.where(enough, low, middle + 1)
            below = free & (key < low)
            tie = free & (key == low)
            wanted = left - tl.sum(below.to(tl.int32), 0)
            masked = tl.where(below | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= wanted)), 1, masked)
    tl.store(mask_ptr + image * length + i, masked.to(tl.float32), inside)


def _warps(block: int) -> int:
    return max(1, min(16, block // 256))


def launch_random(
    given: torch.Tensor,
    is_order: bool,
    keep: int,
    ids: torch.Tensor,
    restore: torch.Tensor,
    mask: torch.Tensor,
) -> None:
    batch, length = given.shape
    block = min(triton.next_power_of_2(length), 1024 if is_order else tuning.MASK_SORT)
    grid = (batch, triton.cdiv(length, block))
    random_mask[grid](given, ids, restore, mask, length, keep, is_order, block, num_warps=_warps(block))


def launch_block(
    draws: torch.Tensor,
    noise: torch.Tensor,
    counts: torch.Tensor | None,
    sizes: tuple[int, int, int, int],
    least: float,
    most: float,
    mask: torch.Tensor,
) -> None:
    """sizes: height and width of the grid, and the least and most patches of a mask of one block."""
    height, width, *areas = sizes
    block = max(16, triton.next_power_of_2(height * width))
    bits = [struct.unpack("<q", struct.pack("<d", x))[0] for x in (least, most)]
    block_mask[(len(mask),)](
        draws, noise, draws if counts is None else counts, mask, height, width, draws.shape[1], *bits,
        *areas, counts is not None, block, num_warps=_warps(block), enable_fp_fusion=False,
    )  # fmt: skip
