"""Triton kernels of `augment_views`: a view in one to six launches, each over tiles of pixels of all images.

    resample        crop, resize, flip, and the colours up to contrast, whose mean it begins to sum;
                    for bicubic views twice: images of either order of the two passes
    warp            the affine map, and the same colours after it
    colour          contrast and what follows it
    blur, twice     along rows, then along columns

A kernel writes the view of an image as soon as no later kernel has anything to do to it: one that is not
blurred never sees `blur`, one whose contrast stays as it is never sees `colour`. Otherwise its pixels wait in
a float32 buffer [B, channels, height, width].
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from sslfast.kernels import tuning
from sslfast.kernels.view_resample import resample
from sslfast.kernels.view_steps import (
    AFFINE,
    AT_CONTRAST,
    AT_MATRIX,
    AT_SIGMA,
    BICUBIC,
    BLUR,
    GRAY_FIRST,
    GRAY_OUT,
    JITTER,
    NONE,
    SOLARIZE,
    _after_jitter,
    _bounded,
    _clip,
    _colours,
    _contrast,
    _image,
    _jitter,
    _load,
    _store,
    _write,
)

View = Any  # of sslfast/ops/augment_views.py, which these modules do not import


# Kernels. Images of a round begin with image `first` of the batch and row `row` of params. Kernels that read
# a pixel's neighbours are told nothing of the sides' divisors: pixels in a row then belong to threads in a
# row, elsewhere four of them to one thread.


@triton.jit(do_not_specialize=["first", "row", "height", "width"])
def warp(
    from_ptr, params_ptr, to_ptr, part_ptr, out_ptr, norm, first, row, height, width, COLOURS: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bilinear, 0 outside."""
    plane = height * width
    image, tile, row_ptr = _image(params_ptr, row, tl.cdiv(plane, BLOCK))
    at = tile * BLOCK + tl.arange(0, BLOCK)
    inside = at < plane
    channels = 1 + 2 * COLOURS
    from_ptr += image * channels * plane
    x = (at % width).to(tl.float32) - 0.5 * (width - 1)
    y = (at // width).to(tl.float32) - 0.5 * (height - 1)
    m = row_ptr + AT_MATRIX
    column = tl.load(m) * x + tl.load(m + 1) * y + tl.load(m + 2) + 0.5 * (width - 1)
    line = tl.load(m + 3) * x + tl.load(m + 4) * y + tl.load(m + 5) + 0.5 * (height - 1)
    left, top = tl.floor(column), tl.floor(line)
    r = tl.zeros([BLOCK], tl.float32)
    g, b = r, r
    for corner in tl.static_range(4):
        v, u = top + corner // 2, left + corner % 2
        weight = (1 - tl.abs(line - v)) * (1 - tl.abs(column - u))
        valid = inside & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        place = tl.where(valid, v, 0.0).to(tl.int32) * width + tl.where(valid, u, 0.0).to(tl.int32)
        pixel_r, pixel_g, pixel_b = _load(from_ptr, place, plane, valid, COLOURS)
        weight = tl.where(valid, weight, 0.0)
        r, g, b = r + weight * pixel_r, g + weight * pixel_g, b + weight * pixel_b
    to_ptr += image * channels * plane
    out_ptr += (first + image) * channels * plane
    part_ptr += tl.program_id(0)
    _colours(to_ptr, part_ptr, out_ptr, r, g, b, at, plane, inside, row_ptr, norm, COLOURS, STEPS)


@triton.jit(do_not_specialize=["first", "row"])
def colour(
    pixels_ptr, params_ptr, part_ptr, out_ptr, norm, first, row, height, width, parts, COLOURS: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Contrast, with the mean of `parts` sums of an image, and what follows it."""
    plane = height * width
    image, tile, row_ptr = _image(params_ptr, row, tl.cdiv(plane, BLOCK))
    order, place = _contrast(row_ptr)
    if place < NONE:
        sums = tl.zeros([BLOCK], tl.float32)
        part_ptr += image * parts
        for i in range(0, parts, BLOCK):
            k = i + tl.arange(0, BLOCK)
            sums += tl.load(part_ptr + k, k < parts, 0.0)
        factor = tl.load(row_ptr + AT_CONTRAST)
        gray = (1 - factor) * (tl.sum(sums) / plane)
        at = tile * BLOCK + tl.arange(0, BLOCK)
        inside = at < plane
        channels = 1 + 2 * COLOURS
        pixels_ptr += image * channels * plane
        out_ptr += (first + image) * channels * plane
        r, g, b = _load(pixels_ptr, at, plane, inside, COLOURS)
        r, g, b = _clip(factor * r + gray), _clip(factor * g + gray), _clip(factor * b + gray)
        r, g, b = _jitter(r, g, b, row_ptr, order, place + 1, 4, COLOURS)
        _after_jitter(pixels_ptr, out_ptr, r, g, b, at, plane, inside, row_ptr, norm, COLOURS, STEPS)


@triton.jit
def _reflect(i, size, FAR: tl.constexpr):
    """Into [0, size). FAR: even what lies beyond the image's reflection, or has none, being one pixel."""
    i = tl.abs(i)
    if FAR:
        period = tl.maximum(2 * size - 2, 1)
        i = i % period
        return tl.minimum(i, period - i)
    else:
        return size - 1 - tl.abs(size - 1 - i)


@triton.jit(do_not_specialize=["first", "row", "height", "width"])
def blur(
    from_ptr, params_ptr, to_ptr, out_ptr, norm, first, row, height, width, radius, ACROSS: tl.constexpr,
    FAR: tl.constexpr, COLOURS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A Gaussian cut at the radius, or where it is below 2^-25 of its peak: along rows (ACROSS), to a buffer,
    or along columns, which is the last of all steps."""
    plane = height * width
    image, tile, row_ptr = _image(params_ptr, row, tl.cdiv(plane, BLOCK))
    sigma = tl.load(row_ptr + AT_SIGMA)
    if sigma > 0:
        at = tile * BLOCK + tl.arange(0, BLOCK)
        inside = at < plane
        channels = 1 + 2 * COLOURS
        from_ptr += image * channels * plane
        x, y = at % width, at // width
        reach = tl.minimum(radius, _bounded(tl.ceil(6 * sigma), 0, 16384.0))
        rate = -0.5 / (sigma * sigma) * 1.4426950408889634
        r, g, b = _load(from_ptr, at, plane, inside, COLOURS)
        total = tl.full((), 1.0, tl.float32)
        for d in range(1, reach + 1):
            weight = tl.exp2(rate * (d * d))
            total += 2 * weight
            if ACROSS:
                before, after = at - x + _reflect(x - d, width, FAR), at - x + _reflect(x + d, width, FAR)
            else:
                before = _reflect(y - d, height, FAR) * width + x
                after = _reflect(y + d, height, FAR) * width + x
            r_0, g_0, b_0 = _load(from_ptr, before, plane, inside, COLOURS)
            r_1, g_1, b_1 = _load(from_ptr, after, plane, inside, COLOURS)
            r, g, b = r + weight * (r_0 + r_1), g + weight * (g_0 + g_1), b + weight * (b_0 + b_1)
        scale = 1 / total
        r, g, b = r * scale, g * scale, b * scale
        if ACROSS:
            _store(to_ptr + image * channels * plane, r, g, b, at, plane, inside, COLOURS)
        else:
            out_ptr += (first + image) * channels * plane
            _write(out_ptr, r, g, b, at, plane, inside, row_ptr, norm, COLOURS, STEPS)


def _norm(view: View) -> tuple[float, ...]:
    scale, shift = ((*numbers, *(0.0,) * (3 - len(numbers))) for numbers in (view.scale, view.shift))
    return (*scale, *shift)


def _steps(view: View) -> int:
    """As the kernels take them."""
    gray = view.steps & (GRAY_OUT | GRAY_FIRST)
    unwanted = GRAY_OUT if gray == GRAY_OUT | GRAY_FIRST else GRAY_FIRST
    return view.steps & ~unwanted


def launch(
    data: torch.Tensor,
    offsets: torch.Tensor,
    sizes: torch.Tensor,
    layout: tuple[int, int, int, int],
    params: torch.Tensor,
    views: Sequence[View],
    outputs: Sequence[torch.Tensor],
) -> None:
    """The tensors are those of `Source`, with at least one image; params [V, B, 19] is contiguous."""
    batch, empty = len(offsets), params.new_empty
    size = max(view.channels * view.height * view.width * _images(view, batch) for view in views)
    parts = max(max(_tiles(view)) * _images(view, batch) for view in views)
    steps = functools.reduce(operator.or_, (view.steps for view in views))
    part = empty(parts if steps & JITTER else 1)
    a = empty(size if steps & (AFFINE | JITTER | BLUR) else 1)
    b = empty(size if steps & (AFFINE | BLUR) else 1)
    given, scratch = (data, offsets, sizes, params), (a, b, part)
    for v, (view, out) in enumerate(zip(views, outputs, strict=True)):
        most = _images(view, batch)
        for first in range(0, batch, most):
            _round(given, layout, view, out, first, v * batch + first, min(most, batch - first), scratch)


def _images(view: View, batch: int) -> int:
    """Of a round: as many as the buffers are to hold."""
    return min(batch, max(1, tuning.VIEW_BUFFER // (view.channels * view.height * view.width)))


def _tiles(view: View) -> tuple[int, int]:
    """Of an image: for `resample`, and for `warp` and `blur`."""
    rows, columns = tuning.VIEW_TILE
    across, down = triton.cdiv(view.width, columns), triton.cdiv(view.height, rows)
    return across * down, triton.cdiv(view.height * view.width, tuning.VIEW_NEIGHBOURS)


def _round(given, layout, view: View, out, first: int, row: int, images: int, scratch) -> None:
    """One view of images from `first` on, whose numbers begin in `row` of params."""
    (params, (a, b, part)), (channels, *strides) = (given[3], scratch), layout
    steps, colours, shape = _steps(view), view.channels == 3, (view.height, view.width)
    places, norm = (first, row), _norm(view)
    tiles, blocks = _tiles(view)
    for columns_first in (False, True) if steps & BICUBIC else (False,):
        resample[(images * tiles,)](
            *given, a, part, out, norm, *places, *strides, *shape, channels >= 3, colours, steps,
            columns_first, *tuning.VIEW_TILE, *tuning.VIEW_AT_A_TIME[columns_first], num_warps=1,
            maxnreg=None if columns_first else tuning.VIEW_REGISTERS,
        )  # fmt: skip
    grid, block, parts = (images * blocks,), tuning.VIEW_NEIGHBOURS, tiles
    if steps & AFFINE:
        warp[grid](a, params, b, part, out, norm, *places, *shape, colours, steps, block, num_warps=4)
        a, b, parts = b, a, blocks
    if steps & JITTER:
        pixels = tuning.VIEW_COLOURS
        colour[(images * triton.cdiv(view.height * view.width, pixels),)](
            a, params, part, out, norm, *places, *shape, parts, colours, steps, pixels, num_warps=4
        )
    if steps & BLUR:
        for across, size in ((True, view.width), (False, view.height)):
            blur[grid](
                a, params, b, out, norm, *places, *shape, view.radius, across, view.radius >= size, colours,
                steps & SOLARIZE, block, num_warps=4,
            )  # fmt: skip
            a, b = b, a
