"""Triton functions of the steps of a view, but for those that look at other pixels: colours, solarize,
normalise, and when a kernel is done with an image. They are defined in sslfast/ops/view_steps.py."""

import triton
import triton.language as tl
from sslfast.kernels.patches import _narrow

# As sslfast/ops numbers them: the bits of View.steps, and the weights of grey.
BICUBIC, JITTER, GRAY_OUT, GRAY_FIRST, BLUR, SOLARIZE, AFFINE = (1 << i for i in range(7))
GRAY = (0.299, 0.587, 0.114)
# View.steps, but GRAY_FIRST instead of GRAY_OUT, not beside it. STEPS stands on the right of them: in the
# interpreter it is an int, on whose right Python takes no constexpr.
_JITTER, _BLUR, _SOLARIZE, _GRAY_FIRST, _GRAY_OUT = (
    tl.constexpr(x) for x in (JITTER, BLUR, SOLARIZE, GRAY_FIRST, GRAY_OUT)
)
RED, GREEN, BLUE = (tl.constexpr(x) for x in GRAY)
# Columns of ViewParams.table
ROW = tl.constexpr(19)
AT_FLIP, AT_ORDER, AT_FACTORS, AT_CONTRAST, AT_GRAY, AT_SIGMA, AT_THRESHOLD, AT_MATRIX = (
    tl.constexpr(x) for x in (4, 5, 6, 7, 10, 11, 12, 13)
)
NONE = tl.constexpr(4)  # place among the jitter's steps of a contrast that changes nothing


@triton.jit
def _image(params_ptr, row, tiles):
    """(image of the round, tile of it, its row of params)"""
    program = tl.program_id(0)
    image = (program // tiles).to(tl.int64)
    return image, program % tiles, params_ptr + (row + image) * ROW


# The steps of a tile of pixels: r, g, b in [0, 1]; without COLOURS r alone counts.


@triton.jit
def _bounded(x, low, high):
    """The whole number x, which may be anything, in [low, high]."""
    return tl.where(x > low, tl.minimum(x, high), low).to(tl.int32)


@triton.jit
def _clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _gray(r, g, b, COLOURS: tl.constexpr):
    if COLOURS:
        return RED * r + GREEN * g + BLUE * b
    else:
        return r


@triton.jit
def _of_sixth(k):
    k -= 6 * tl.floor(k / 6)
    return _clip(tl.minimum(k, 4 - k))


@triton.jit
def _hue(r, g, b, turns):
    """Through hue in sixths of a turn, value and chroma."""
    value = tl.maximum(r, tl.maximum(g, b))
    chroma = value - tl.minimum(r, tl.minimum(g, b))
    is_r, is_g = value == r, value == g
    difference = tl.where(is_r, g - b, tl.where(is_g, b - r, r - g))
    sixth = difference / tl.where(chroma > 0, chroma, 1.0) + tl.where(is_r, 0.0, tl.where(is_g, 2.0, 4.0))
    sixth += 6 * turns
    r, g, b = _of_sixth(sixth + 5), _of_sixth(sixth + 3), _of_sixth(sixth + 1)
    return value - chroma * r, value - chroma * g, value - chroma * b


@triton.jit
def _jitter(r, g, b, row_ptr, order, first, last, COLOURS: tl.constexpr):
    """The jitter's steps from first to last, but for contrast."""
    for i in range(first, last):
        step = (order >> (2 * i)) & 3
        factor = tl.load(row_ptr + AT_FACTORS + step)
        if step == 0:
            r, g, b = _clip(factor * r), _clip(factor * g), _clip(factor * b)
        if COLOURS:
            if step == 2:
                gray = (1 - factor) * _gray(r, g, b, COLOURS)
                r, g, b = _clip(factor * r + gray), _clip(factor * g + gray), _clip(factor * b + gray)
            if (step == 3) & (factor != 0):
                r, g, b = _hue(r, g, b, factor)
    return r, g, b


@triton.jit
def _contrast(row_ptr):
    """(order of the jitter's steps, place of contrast among them)"""
    order = _bounded(tl.load(row_ptr + AT_ORDER), 0, 255.0)
    place = tl.where(((order >> 4) & 3) == 1, 2, tl.where(((order >> 6) & 3) == 1, 3, NONE))
    place = tl.where((order & 3) == 1, 0, tl.where(((order >> 2) & 3) == 1, 1, place))
    return order, tl.where(tl.load(row_ptr + AT_CONTRAST) == 1, NONE, place)


@triton.jit
def _drop_colours(r, g, b, row_ptr, COLOURS: tl.constexpr):
    if COLOURS:
        if tl.load(row_ptr + AT_GRAY) != 0:
            r = _gray(r, g, b, COLOURS)
            g, b = r, r
    return r, g, b


@triton.jit
def _load(from_ptr, at, plane, inside, COLOURS: tl.constexpr):
    r = tl.load(from_ptr + at, inside, 0.0)
    g, b = r, r
    if COLOURS:
        g, b = tl.load(from_ptr + plane + at, inside, 0.0), tl.load(from_ptr + 2 * plane + at, inside, 0.0)
    return r, g, b


@triton.jit
def _store(to_ptr, r, g, b, at, plane, inside, COLOURS: tl.constexpr):
    dtype: tl.constexpr = to_ptr.dtype.element_ty
    tl.store(to_ptr + at, _narrow(r, dtype), inside)
    if COLOURS:
        tl.store(to_ptr + plane + at, _narrow(g, dtype), inside)
        tl.store(to_ptr + 2 * plane + at, _narrow(b, dtype), inside)


@triton.jit
def _write(out_ptr, r, g, b, at, plane, inside, row_ptr, norm, COLOURS: tl.constexpr, STEPS: tl.constexpr):
    """Solarize and normalise; norm: each channel's scale, each channel's shift."""
    r, g, b = _clip(r), _clip(g), _clip(b)  # weights add up to 1 but for rounding
    if _SOLARIZE & STEPS:
        threshold = tl.load(row_ptr + AT_THRESHOLD)
        r, g = tl.where(r >= threshold, 1 - r, r), tl.where(g >= threshold, 1 - g, g)
        b = tl.where(b >= threshold, 1 - b, b)
    r, g, b = r * norm[0] + norm[3], g * norm[1] + norm[4], b * norm[2] + norm[5]
    _store(out_ptr, r, g, b, at, plane, inside, COLOURS)


@triton.jit
def _after_jitter(
    to_ptr, out_ptr, r, g, b, at, plane, inside, row_ptr, norm, COLOURS: tl.constexpr, STEPS: tl.constexpr
):
    if _GRAY_OUT & STEPS:
        r, g, b = _drop_colours(r, g, b, row_ptr, COLOURS)
    if _BLUR & STEPS:
        if tl.load(row_ptr + AT_SIGMA) > 0:
            _store(to_ptr, r, g, b, at, plane, inside, COLOURS)
        else:
            _write(out_ptr, r, g, b, at, plane, inside, row_ptr, norm, COLOURS, STEPS)
    else:
        _write(out_ptr, r, g, b, at, plane, inside, row_ptr, norm, COLOURS, STEPS)


@triton.jit
def _colours(
    to_ptr, part_ptr, out_ptr, r, g, b, at, plane, inside, row_ptr, norm, COLOURS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """All colours, or those before contrast, and this tile's part of the sum of gray values."""
    if _GRAY_FIRST & STEPS:
        r, g, b = _drop_colours(r, g, b, row_ptr, COLOURS)
    if _JITTER & STEPS:
        order, place = _contrast(row_ptr)
        r, g, b = _jitter(r, g, b, row_ptr, order, 0, place, COLOURS)
        if place < NONE:
            tl.store(part_ptr, tl.sum(tl.where(inside, _gray(r, g, b, COLOURS), 0.0)))
            _store(to_ptr, r, g, b, at, plane, inside, COLOURS)
        else:
            _after_jitter(to_ptr, out_ptr, r, g, b, at, plane, inside, row_ptr, norm, COLOURS, STEPS)
    else:
        _after_jitter(to_ptr, out_ptr, r, g, b, at, plane, inside, row_ptr, norm, COLOURS, STEPS)
