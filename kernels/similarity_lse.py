"""Triton kernels of `similarity_lse`: tiles of logits live in registers, the matrix of them nowhere.

    t_xy = factor <x, y> + offset           logits in base 2

A kernel's own rows are x, the rows it streams past them y. `pack` has measured them; its bound on |logit|,
read on the device, tells the safe range, in which float32 holds all powers and their sums, from the rest:

    sums     (safe range)  sum_y 2^t for each x and, from the same powers, sum_x 2^t for each y; for a = b
                           only the tiles above the diagonal
    attend   (any range)   (max, sum) over y with a running maximum, and on demand sum_y 2^(t - max) y
    grad     (any range)   sum_y G_xy y with G_xy = g_x exp(S - lse_x) + h_y exp(S - lse_y), tile by tile

No atomics: a partial sum has one writer, so results are the same bits every time. Rows come in packed copies
whose sizes are multiples of the tiles, so no load is masked; a tile at an edge, on the diagonal or with equal
ids takes a branch that masks its logits.
"""

import triton
import triton.language as tl
from sslfast.kernels.similarity_lse_rows import (
    _allowed,
    _bound,
    _dot,
    _or_zero,
    _own_ids,
    _to,
    _touched,
    _upstream_unit,
)

COUNTS = ("nx", "ny", "slots", "x_supers")  # vary from batch to batch: not worth a kernel each


@triton.jit
def _super_tile(p, x_supers, UPPER: tl.constexpr):
    """(x super-block, y super-block) of program p: pairs y < x, then the diagonal, which is half the work."""
    if UPPER:
        off_diagonal = x_supers * (x_supers - 1) // 2
        column = ((tl.sqrt(8.0 * p + 1.0) + 1.0) * 0.5).to(tl.int32)
        column = tl.where(column * (column - 1) // 2 > p, column - 1, column)
        row = p - column * (column - 1) // 2
        column = tl.where(p < off_diagonal, column, p - off_diagonal)
        row = tl.where(p < off_diagonal, row, column)
        return column, row
    return p % x_supers, p // x_supers


@triton.jit(do_not_specialize=COUNTS)
def sums(
    x_ptr, y_ptr, nx, ny, x_padded, y_padded, x_ids_ptr, y_ids_ptr, x_ranges_ptr, y_ranges_ptr, offset_ptr,
    scale_ptr, state_ptr, slots, own_ptr, streamed_ptr, x_span, y_span, x_supers, TWO: tl.constexpr,
    UPPER: tl.constexpr, BOTH: tl.constexpr, SELF: tl.constexpr, BIASED: tl.constexpr, IDS: tl.constexpr,
    SAME: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program sums one super-tile: y in a span of rows against x in another. own [y super, x_padded] sums
    over y; streamed [x super, y_padded] sums over x. UPPER: pairs y < x alone, and both kinds of sums belong
    to the same rows."""
    factor, safe = _bound(scale_ptr, state_ptr, slots, TWO)
    if not safe:
        return
    x_super, y_super = _super_tile(tl.program_id(0), x_supers, UPPER)
    x_first, y_first = x_super * x_span, y_super * y_span
    x_last, y_last = tl.minimum(x_first + x_span, x_padded), tl.minimum(y_first + y_span, y_padded)
    d, xs, ys = tl.arange(0, D), tl.arange(0, X), tl.arange(0, Y)
    streamed_ptr += tl.cast(x_super, tl.int64) * y_padded + ys
    if BOTH:
        for y0 in range(y_first, y_last, Y):
            tl.store(streamed_ptr + y0, tl.zeros([Y], tl.float32))
    for x0 in range(x_first, x_last, X):
        if BOTH:
            tl.debug_barrier()  # no other program touches these sums; threads of this one take turns
        x = tl.load(x_ptr + tl.cast(x0, tl.int64) * D + (xs[:, None] * D + d[None, :]))
        x_low, x_high = _own_ids(x_ranges_ptr, x_padded, x0, IDS, SAME, X)
        # Sums over y stay apart by warp and lane until the end: adding across lanes costs more than the
        # powers do.
        own = tl.zeros([Y // 16, 8, X], tl.float32)
        y_end = tl.minimum(y_last, x0 + X) if UPPER else y_last
        for y0 in range(y_first, y_end, Y):
            y = tl.load(y_ptr + tl.cast(y0, tl.int64) * D + (ys[:, None] * D + d[None, :]))
            touched = _touched(
                x0, y0, nx, ny, x_low, x_high, y_ranges_ptr, y_padded, SELF, UPPER, IDS, SAME, X, Y
            )
            t = _dot(y, x.T, None, PRECISION) * factor
            if BIASED:
                t += tl.load(offset_ptr + y0 + ys)[:, None]
            e = tl.exp2(t)
            if touched:
                e = tl.where(
                    _allowed(y0 + ys, x0 + xs, ny, nx, y_ids_ptr, x_ids_ptr, SELF, UPPER, IDS, SAME), e, 0.0
                )
            own += tl.sum(tl.reshape(e, [Y // 16, 2, 8, X]), 1)
            if BOTH:
                tl.store(streamed_ptr + y0, tl.load(streamed_ptr + y0) + tl.sum(e, 1))
        tl.store(own_ptr + tl.cast(y_super, tl.int64) * x_padded + x0 + xs, tl.sum(tl.sum(own, 0), 0))


@triton.jit(do_not_specialize=COUNTS)
def attend(
    x_ptr, y_ptr, nx, ny, x_padded, y_padded, x_ids_ptr, y_ids_ptr, x_ranges_ptr, y_ranges_ptr, offset_ptr,
    scale_ptr, state_ptr, slots, top_ptr, total_ptr, mean_ptr, y_span, TWO: tl.constexpr,
    ALWAYS: tl.constexpr, MEAN: tl.constexpr, SELF: tl.constexpr, BIASED: tl.constexpr, IDS: tl.constexpr,
    SAME: tl.constexpr, GAIN: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (x blocks, y spans). Per x: top = max_y t and total = sum_y 2^(t - top), [y span, x_padded]; with
    MEAN also sum_y 2^(t - top) y, [y span, x_padded, D]. Unless ALWAYS, only where `sums` did not serve."""
    factor, safe = _bound(scale_ptr, state_ptr, slots, TWO)
    if safe and not ALWAYS:
        return
    x0, y_first = tl.program_id(0) * X, tl.program_id(1) * y_span
    y_last = tl.minimum(y_first + y_span, y_padded)
    d, xs, ys = tl.arange(0, D), tl.arange(0, X), tl.arange(0, Y)
    x = tl.load(x_ptr + tl.cast(x0, tl.int64) * D + (xs[:, None] * D + d[None, :]))
    x_low, x_high = _own_ids(x_ranges_ptr, x_padded, x0, IDS, SAME, X)
    top = tl.full([X], float("-inf"), tl.float32)
    total = tl.zeros([X], tl.float32)
    if MEAN:
        mean = tl.zeros([X, D], tl.float32)
    for y0 in range(y_first, y_last, Y):
        y = tl.load(y_ptr + tl.cast(y0, tl.int64) * D + (ys[:, None] * D + d[None, :]))
        touched = _touched(
            x0, y0, nx, ny, x_low, x_high, y_ranges_ptr, y_padded, SELF, False, IDS, SAME, X, Y
        )
        t = _dot(x, y.T, None, PRECISION) * factor
        if BIASED:
            t += tl.load(offset_ptr + y0 + ys)[None, :]
        if touched:
            ok = _allowed(x0 + xs, y0 + ys, nx, ny, x_ids_ptr, y_ids_ptr, SELF, False, IDS, SAME)
            t = tl.where(ok, t, float("-inf"))
        new_top = tl.maximum(top, tl.max(t, 1))
        base = _or_zero(new_top)
        fade = tl.exp2(top - base)
        e = tl.exp2(t - base[:, None])
        total = total * fade + tl.sum(e, 1)
        if MEAN:
            if GAIN:  # float16 has no room for small shares of the sum
                e *= 2.0**GAIN
            mean = _dot(_to(e, y.dtype), y, mean * fade[:, None], PRECISION)
        top = new_top
    place = tl.cast(tl.program_id(1), tl.int64) * x_padded + x0
    tl.store(top_ptr + place + xs, top)
    tl.store(total_ptr + place + xs, total)
    if MEAN:
        tl.store(mean_ptr + place * D + (xs[:, None] * D + d[None, :]), mean * 2.0**-GAIN)


@triton.jit
def _grad(
    x_ptr, y_ptr, nx, ny, x_padded, y_padded, x_ids_ptr, y_ids_ptr, x_ranges_ptr, y_ranges_ptr, offset_ptr,
    scale_ptr, state_ptr, slots, x_coef_ptr, x_lse_ptr, y_coef_ptr, y_lse_ptr, dx_ptr, dscale_ptr, dbias_ptr,
    dim, y_span, factor,
    ONE_POWER: tl.constexpr, H: tl.constexpr, X_TERM: tl.constexpr, Y_TERM: tl.constexpr,
    X_BIASED: tl.constexpr, Y_BIASED: tl.constexpr, DSCALE: tl.constexpr, DBIAS: tl.constexpr,
    SELF: tl.constexpr, IDS: tl.constexpr, SAME: tl.constexpr, GAIN: tl.constexpr, AHEAD: tl.constexpr,
    X: tl.constexpr, Y: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    x0, y_first = tl.program_id(0) * X, tl.program_id(1) * y_span
    y_last = tl.minimum(y_first + y_span, y_padded)
    d, xs, ys = tl.arange(0, D), tl.arange(0, X), tl.arange(0, Y)
    r = x0 + xs
    x_ptr += tl.cast(x0, tl.int64) * D
    x = tl.load(x_ptr + (xs[:, None] * D + d[None, :]))
    if X_TERM:
        x_coef = tl.load(x_coef_ptr + r)
        x_lse = tl.load(x_lse_ptr + r)
    if X_BIASED:
        x_offset = tl.load(offset_ptr + r)
    x_low, x_high = _own_ids(x_ranges_ptr, x_padded, x0, IDS, SAME, X)
    acc, total = tl.zeros([X, D], tl.float32), tl.zeros([X], tl.float32)  # both 2^GAIN times as large
    if AHEAD:  # the next tile's product runs on the matrix units while this one's powers are computed
        y = tl.load(y_ptr + tl.cast(y_first, tl.int64) * D + (ys[:, None] * D + d[None, :]))
        s = _dot(x, y.T, None, PRECISION)
    for y0 in range(y_first, y_last, Y):
        if AHEAD:
            y1 = tl.minimum(y0 + Y, y_last - Y)
            next_y = tl.load(y_ptr + tl.cast(y1, tl.int64) * D + (ys[:, None] * D + d[None, :]))
            next_s = _dot(x, next_y.T, None, PRECISION)
        else:
            y = tl.load(y_ptr + tl.cast(y0, tl.int64) * D + (ys[:, None] * D + d[None, :]))
            s = _dot(x, y.T, None, PRECISION)
        touched = _touched(
            x0, y0, nx, ny, x_low, x_high, y_ranges_ptr, y_padded, SELF, False, IDS, SAME, X, Y
        )
        t = s * factor
        if Y_BIASED:
            t += (tl.load(offset_ptr + y0 + ys) + GAIN)[None, :]
        elif X_BIASED:
            t += (x_offset + GAIN)[:, None]
        elif GAIN:
            t += GAIN
        if Y_TERM:
            y_coef = tl.load(y_coef_ptr + y0 + ys)
        if ONE_POWER:
            if X_TERM and Y_TERM:
                w = tl.exp2(t) * (x_coef[:, None] + y_coef[None, :])
            elif X_TERM:
                w = tl.exp2(t) * x_coef[:, None]
            else:
                w = tl.exp2(t) * y_coef[None, :]
        else:
            w = tl.zeros([X, Y], tl.float32)
            if X_TERM:
                w += tl.exp2(t - x_lse[:, None]) * x_coef[:, None]
            if Y_TERM:
                w += tl.exp2(t - tl.load(y_lse_ptr + y0 + ys)[None, :]) * y_coef[None, :]
        if touched:
            ok = _allowed(r, y0 + ys, nx, ny, x_ids_ptr, y_ids_ptr, SELF, False, IDS, SAME)
            w = tl.where(ok, w, 0.0)
        if DBIAS:
            total += tl.sum(w, 1)
        acc = _dot(_to(w, y.dtype), y, acc, PRECISION)
        if AHEAD:
            y, s = next_y, next_s
    unit = _upstream_unit(state_ptr, slots, H) * tl.exp2(tl.full([], -GAIN, tl.float32))
    span = tl.cast(tl.program_id(1), tl.int64)
    if DSCALE:
        product = tl.load(x_ptr + (xs[:, None] * D + d[None, :])).to(tl.float32) * acc
        tl.store(dscale_ptr + span * nx + r, tl.sum(product, 1) * unit, r < nx)
    if DBIAS:
        tl.store(dbias_ptr + span * nx + r, total * unit, r < nx)
    dx = _to(acc * (unit * tl.load(scale_ptr)), dx_ptr.dtype.element_ty)
    dx_ptr += (span * nx + x0) * dim
    tl.store(dx_ptr + (xs[:, None] * dim + d[None, :]), dx, (r < nx)[:, None] & (d < dim)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def grad(
    x_ptr, y_ptr, nx, ny, x_padded, y_padded, x_ids_ptr, y_ids_ptr, x_ranges_ptr, y_ranges_ptr, offset_ptr,
    scale_ptr, state_ptr, slots, x_coef_ptr, x_lse_ptr, y_coef_ptr, y_lse_ptr, dx_ptr, dscale_ptr, dbias_ptr,
    dim, y_span,
    TWO: tl.constexpr, H: tl.constexpr, X_TERM: tl.constexpr, Y_TERM: tl.constexpr, X_BIASED: tl.constexpr,
    Y_BIASED: tl.constexpr, DSCALE: tl.constexpr, DBIAS: tl.constexpr, SELF: tl.constexpr, IDS: tl.constexpr,
    SAME: tl.constexpr, GAIN: tl.constexpr, AHEAD: tl.constexpr, X: tl.constexpr, Y: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (x blocks, y spans). dx [y span, nx, dim] = scale sum_y G_xy y; dscale [y span, nx] = <x,
    sum_y G_xy y>; dbias [y span, nx] = sum_y G_xy. The ranges part before the loops and meet no more: where
    two loops shared their sums, the compiler made the matrix units wait after every instruction."""
    factor, safe = _bound(scale_ptr, state_ptr, slots, TWO)
    if safe:
        _grad(
            x_ptr, y_ptr, nx, ny, x_padded, y_padded, x_ids_ptr, y_ids_ptr, x_ranges_ptr, y_ranges_ptr,
            offset_ptr, scale_ptr, state_ptr, slots, x_coef_ptr, x_lse_ptr, y_coef_ptr, y_lse_ptr, dx_ptr,
            dscale_ptr, dbias_ptr, dim, y_span, factor, True, H, X_TERM, Y_TERM, X_BIASED, Y_BIASED, DSCALE,
            DBIAS, SELF, IDS, SAME, GAIN, AHEAD, X, Y, D, PRECISION,
        )  # fmt: skip
    else:
        _grad(
            x_ptr, y_ptr, nx, ny, x_padded, y_padded, x_ids_ptr, y_ids_ptr, x_ranges_ptr, y_ranges_ptr,
            offset_ptr, scale_ptr, state_ptr, slots, x_coef_ptr, x_lse_ptr, y_coef_ptr, y_lse_ptr, dx_ptr,
            dscale_ptr, dbias_ptr, dim, y_span, factor, False, H, X_TERM, Y_TERM, X_BIASED, Y_BIASED, DSCALE,
            DBIAS, SELF, IDS, SAME, GAIN, AHEAD, X, Y, D, PRECISION,
        )  # fmt: skip
