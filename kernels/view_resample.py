"""Triton kernel of the crop and resize of views, in two passes as Pillow's: the definition is `resize` in
sslfast/ops/view_steps.py."""

import triton
import triton.language as tl
from sslfast.kernels.view_steps import (
    AFFINE,
    AT_FLIP,
    BICUBIC,
    _bounded,
    _clip,
    _colours,
    _gray,
    _image,
    _store,
)

_AFFINE, _BICUBIC = tl.constexpr(AFFINE), tl.constexpr(BICUBIC)


@triton.jit
def _centre(at, before, after):
    """(n, rest): the centre of pixel `at` of `after` is (n + rest / after) / 2 pixels into `before`. n is
    whole and rest in [0, after), so that float32 suffices for distances from n; products stay below 2^30."""
    twice = (2 * at + 1) * before
    return twice // after, twice % after


@triton.jit
def _reach(before, after, STEPS: tl.constexpr):
    """(half the filter's width in pixels of `before`, the most pixels within, what makes twice a distance
    the filter's argument)"""
    wider, support = tl.maximum(before, after), 1
    if _BICUBIC & STEPS:
        support = 2
    count = (2 * support * wider + after - 1) // after
    return support * (wider.to(tl.float32) / after), count, 0.5 * after / wider


@triton.jit
def _first_tap(n, fraction, reach):
    """The first pixel with a centre within reach of (n + fraction) / 2; only one of weight 0 may round to the
    wrong side."""
    return (n >> 1) + tl.floor(0.5 * ((n & 1) + fraction) - reach + 0.5).to(tl.int32)


@triton.jit
def _filter(t, STEPS: tl.constexpr):
    """Pillow's: a triangle, or Keys' cubic with a = -0.5."""
    near = tl.maximum(1 - tl.abs(t), 0.0)
    if _BICUBIC & STEPS:  # its outer piece, continued to 0, and what the inner one has more
        far = tl.maximum(2 - tl.abs(t), 0.0)
        return near * near * (1 - 2 * near) + far * far * (0.5 * far - 0.5)
    else:
        return near


@triton.jit
def _clip_bytes(x, STEPS: tl.constexpr):
    """Between the passes; means of pixels need none."""
    if _BICUBIC & STEPS:
        x = tl.minimum(tl.maximum(x, 0.0), 255.0)
    return x


@triton.jit
def _of_rows(down, p, TAPS: tl.constexpr, STEPS: tl.constexpr):
    """Rows p to p + TAPS of the crop: where they are [TAPS], and their weights [ROWS, TAPS]."""
    corner_ptr, step, size, n, whole, part_t, narrower = down
    taps = p + tl.arange(0, TAPS)
    distance = tl.where(taps < size, (2 * taps + 1 - n).to(tl.float32), 1e9)
    weights = _filter((distance[None, :] - whole[:, None]) * narrower - part_t[:, None], STEPS)
    return corner_ptr + tl.minimum(taps, size - 1) * step, weights


@triton.jit
def _of_columns(across, k, STEPS: tl.constexpr):
    """Column k of each column's window: where it is in a row, and its weight; of any shape."""
    step, size, first, first_t, narrower = across
    column = tl.minimum(tl.maximum(first + k, 0), size - 1)
    weight = _filter(first_t + k * (2 * narrower), STEPS)
    return column.to(tl.int64) * step, tl.where(column == first + k, weight, 0.0)


@triton.jit
def _rows_first(
    down, low, high, across, count, channel_stride, COLOURED: tl.constexpr, COLOURS: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """TAPS rows of the crop at a time are resized along x, and added to those rows of the tile within whose
    reach they are."""
    r = tl.zeros([ROWS, COLUMNS], tl.float32)
    g, b = r, r
    total = tl.zeros([ROWS], tl.float32)
    for p in range(low, high, TAPS):
        line_ptr, weights = _of_rows(down, p, TAPS, STEPS)
        line_r = tl.zeros([TAPS, COLUMNS], tl.float32)
        line_g, line_b = line_r, line_r
        line_total = tl.zeros([COLUMNS], tl.float32)
        for k in range(0, count):
            place, weight = _of_columns(across, k, STEPS)
            line_total += weight
            pixel_ptr = line_ptr[:, None] + place[None, :]
            line_r += weight[None, :] * tl.load(pixel_ptr).to(tl.float32)
            if COLOURED:
                blue_ptr = pixel_ptr + channel_stride + channel_stride  # twice it may exceed 32 bits
                line_g += weight[None, :] * tl.load(pixel_ptr + channel_stride).to(tl.float32)
                line_b += weight[None, :] * tl.load(blue_ptr).to(tl.float32)
        if COLOURED and not COLOURS:
            line_r = _gray(line_r, line_g, line_b, True)
        total += tl.sum(weights, 1)
        scale = (1 / line_total)[None, :]
        r += tl.sum(weights[:, :, None] * _clip_bytes(line_r * scale, STEPS)[None, :, :], 1)
        if COLOURED and COLOURS:
            g += tl.sum(weights[:, :, None] * _clip_bytes(line_g * scale, STEPS)[None, :, :], 1)
            b += tl.sum(weights[:, :, None] * _clip_bytes(line_b * scale, STEPS)[None, :, :], 1)
    scale = (1 / total)[:, None]
    return r * scale, g * scale, b * scale


@triton.jit
def _columns_first(
    down, low, high, across, count, channel_stride, COLOURED: tl.constexpr, COLOURS: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """AHEAD columns of the crop at a time are resized along y, those of each column of the tile for itself:
    neighbours repeat them, but read them side by side, which the transposed image would not allow."""
    r = tl.zeros([ROWS, COLUMNS], tl.float32)
    g, b = r, r
    total = tl.zeros([COLUMNS], tl.float32)
    for k in range(0, count, AHEAD):
        place, weight = _of_columns(across, k + tl.arange(0, AHEAD)[:, None], STEPS)
        total += tl.sum(weight, 0)
        pile_r = tl.zeros([ROWS, AHEAD, COLUMNS], tl.float32)
        pile_g, pile_b = pile_r, pile_r
        pile_total = tl.zeros([ROWS], tl.float32)
        for p in range(low, high, TAPS):
            line_ptr, weights = _of_rows(down, p, TAPS, STEPS)
            pile_total += tl.sum(weights, 1)
            pixel_ptr = line_ptr[:, None, None] + place[None, :, :]
            weights = weights[:, :, None, None]
            pile_r += tl.sum(weights * tl.load(pixel_ptr).to(tl.float32)[None, :, :, :], 1)
            if COLOURED:
                x = tl.load(pixel_ptr + channel_stride).to(tl.float32)
                pile_g += tl.sum(weights * x[None, :, :, :], 1)
                x = tl.load(pixel_ptr + channel_stride + channel_stride).to(tl.float32)
                pile_b += tl.sum(weights * x[None, :, :, :], 1)
        if COLOURED and not COLOURS:
            pile_r = _gray(pile_r, pile_g, pile_b, True)
        scale = (1 / pile_total)[:, None, None]
        r += tl.sum(weight[None, :, :] * _clip_bytes(pile_r * scale, STEPS), 1)
        if COLOURED and COLOURS:
            g += tl.sum(weight[None, :, :] * _clip_bytes(pile_g * scale, STEPS), 1)
            b += tl.sum(weight[None, :, :] * _clip_bytes(pile_b * scale, STEPS), 1)
    scale = (1 / total)[None, :]
    return r * scale, g * scale, b * scale


@triton.jit(do_not_specialize=["first", "row"])
def resample(
    data_ptr, offsets_ptr, sizes_ptr, params_ptr, to_ptr, part_ptr, out_ptr, norm, first, row, channel_stride,
    row_stride, column_stride, height, width, COLOURED: tl.constexpr, COLOURS: tl.constexpr,
    STEPS: tl.constexpr, COLUMNS_FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TAPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS, COLUMNS] of a view. COLOURED: the images have red, green and blue.

    Bicubic views of images whose columns come first, and those of others, have launches of their own; to
    bilinear ones, where nothing is clipped between the passes, their order does not matter."""
    tiles_across = tl.cdiv(width, COLUMNS)
    image, tile, row_ptr = _image(params_ptr, row, tiles_across * tl.cdiv(height, ROWS))
    y = tile // tiles_across * ROWS
    j = tl.arange(0, ROWS)
    x = tile % tiles_across * COLUMNS + tl.arange(0, COLUMNS)

    # The crop, within the image whatever params say
    image_height = tl.load(sizes_ptr + 2 * (first + image)).to(tl.int32)
    image_width = tl.load(sizes_ptr + 2 * (first + image) + 1).to(tl.int32)
    top = _bounded(tl.load(row_ptr), 0, image_height - 1)
    left = _bounded(tl.load(row_ptr + 1), 0, image_width - 1)
    crop_height = _bounded(tl.load(row_ptr + 2), 1, image_height - top)
    crop_width = _bounded(tl.load(row_ptr + 3), 1, image_width - left)
    if _BICUBIC & STEPS:
        if (crop_height - height > 2 * tl.maximum(crop_width - width, 0)) != COLUMNS_FIRST:
            return
    row_step = tl.where(row_stride < 0, image_width.to(tl.int64) * column_stride, row_stride)
    corner_ptr = data_ptr + tl.load(offsets_ptr + first + image)
    corner_ptr += top * row_step + left.to(tl.int64) * column_stride

    # Along x: where the taps begin, and the filter's argument there
    reach, count, narrower = _reach(crop_width, width, STEPS)
    from_x = tl.minimum(x, width - 1)
    from_x = tl.where(tl.load(row_ptr + AT_FLIP) != 0, width - 1 - from_x, from_x)
    n, rest = _centre(from_x, crop_width, width)
    fraction = rest.to(tl.float32) / width
    first_x = _first_tap(n, fraction, reach)
    first_t = ((2 * first_x + 1 - n).to(tl.float32) - fraction) * narrower
    across = (column_stride, crop_width, first_x, first_t, narrower)

    # Along y: taps of all rows of the tile, and twice their centres, n + whole + part
    reach, taps, narrower = _reach(crop_height, height, STEPS)
    per_row = 1.0 / height
    n, rest = _centre(tl.minimum(y + ROWS, height) - 1, crop_height, height)
    high = tl.minimum(_first_tap(n, rest * per_row, reach) + taps, crop_height)
    n, rest = _centre(y, crop_height, height)
    low = tl.maximum(_first_tap(n, rest * per_row, reach), 0)
    inner = tl.minimum(j, height - 1 - y)
    rest += inner * (2 * crop_height % height)
    more = (rest * per_row).to(tl.int32)  # on either side, if it is about to be one more
    whole = (inner * (2 * crop_height // height) + more).to(tl.float32)
    part_t = (rest - more * height) * (per_row * narrower)
    down = (corner_ptr, row_step, crop_height, n, whole, part_t, narrower)

    if COLUMNS_FIRST:
        r, g, b = _columns_first(
            down, low, high, across, count, channel_stride, COLOURED, COLOURS, STEPS, ROWS, COLUMNS, TAPS,
            AHEAD,
        )  # fmt: skip
    else:
        r, g, b = _rows_first(
            down, low, high, across, count, channel_stride, COLOURED, COLOURS, STEPS, ROWS, COLUMNS, TAPS
        )
    r = _clip(r / 255)
    if COLOURED and COLOURS:
        g, b = _clip(g / 255), _clip(b / 255)
    else:
        g, b = r, r

    plane = height * width
    at = (y + j)[:, None] * width + x[None, :]
    inside = (y + j < height)[:, None] & (x < width)[None, :]
    channels = 1 + 2 * COLOURS
    to_ptr += image * channels * plane
    out_ptr += (first + image) * channels * plane
    if _AFFINE & STEPS:
        _store(to_ptr, r, g, b, at, plane, inside, COLOURS)
    else:
        part_ptr += tl.program_id(0)
        _colours(to_ptr, part_ptr, out_ptr, r, g, b, at, plane, inside, row_ptr, norm, COLOURS, STEPS)
