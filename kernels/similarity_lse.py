"""Triton kernels of `similarity_lse`: tiles of logits live in registers, the matrix of them nowhere.

    t_xy = factor <x, y> + offset           factor = scale log2 e, offset = bias log2 e: logits in base 2

A kernel's own rows are x, the rows it streams past them y. `pack` measures the rows; its bound on |logit|, read on
the device, tells the safe range, in which float32 holds all powers and their sums, from the rest:

    sums     (safe range)   sum_y 2^t for each x and, from the same powers, sum_x 2^t for each y; for a = b only the
                            tiles above the diagonal
    attend   (any range)    (max, sum) over y with a running maximum, and on demand sum_y 2^(t - max) y
    merge                   partial sums of several programs, in fixed order, to log-sum-exps
    weights, grad           sum_y G_xy y with G_xy = g_x exp(S - lse_x) + h_y exp(S - lse_y), recomputed tile by tile

No atomics: a partial sum has one writer, so results are the same bits every time. A kernel reads rows from packed
copies, whose sizes are multiples of its tiles, so no load is masked; a tile at an edge, on the diagonal or with equal
ids takes a branch that masks its logits.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LN2 = tl.constexpr(0.6931471805599453)
SLOTS = tl.constexpr(256)  # programs of `pack` per side at most; each leaves its maxima in a slot of `state`
SAFE = tl.constexpr(64.0)  # |logit| below: e^64 times 2^32 rows is a float32, and e^-64 is a normal one
GROUP = tl.constexpr(64)  # rows that share a range of ids
NORM, BIAS, GRAD = tl.constexpr(0), tl.constexpr(2), tl.constexpr(4)  # rows of `state`: [6, SLOTS], one per side


@triton.jit
def _pack(
    side, x_ptr, x_row_stride, x_col_stride, packed_ptr, rows, padded, ids_ptr, ranges_ptr, g_ptr, g_stride, bias_ptr,
    bias_stride, offset_ptr, state_ptr, dim, width,
    COPY: tl.constexpr, IDS: tl.constexpr, GRADS: tl.constexpr, BIASED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0)
    norm, size, largest_g = 0.0, 0.0, 0.0
    for first in range(p * GROUP, padded, tl.num_programs(0) * GROUP):
        r = first + tl.arange(0, GROUP)
        inside = r < rows
        row_ptr = x_ptr + r.to(tl.int64)[:, None] * x_row_stride
        # The norm of x / max |x|: squares neither overflow nor vanish. NaN counts as infinite.
        largest = tl.zeros([GROUP], tl.float32)
        for k in range(0, width, D):
            d = k + tl.arange(0, D)
            x = tl.load(row_ptr + d.to(tl.int64)[None, :] * x_col_stride, inside[:, None] & (d < dim)[None, :], other=0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(x.to(tl.float32)), 1))
        unit = tl.where(largest > 0, largest, 1.0)
        squares = tl.zeros([GROUP], tl.float32)
        for k in range(0, width, D):
            d = k + tl.arange(0, D)
            x = tl.load(row_ptr + d.to(tl.int64)[None, :] * x_col_stride, inside[:, None] & (d < dim)[None, :], other=0.0)
            if COPY:
                tl.store(packed_ptr + r.to(tl.int64)[:, None] * width + d[None, :], x)
            y = x.to(tl.float32) / unit[:, None]
            squares += tl.sum(y * y, 1)
        norms = largest * tl.sqrt(squares)
        norm = tl.maximum(norm, tl.max(tl.where(norms == norms, norms, float("inf")), 0))
        if IDS:
            ids = tl.load(ids_ptr + r, inside, other=0)
            tl.store(ranges_ptr + first // GROUP, tl.min(tl.where(inside, ids, 0x7FFFFFFFFFFFFFFF), 0))
            tl.store(ranges_ptr + (padded + first) // GROUP, tl.max(tl.where(inside, ids, -0x7FFFFFFFFFFFFFFF), 0))
        if GRADS:
            g = tl.abs(tl.load(g_ptr + r.to(tl.int64) * g_stride, inside, other=0.0))
            largest_g = tl.maximum(largest_g, tl.max(tl.where(g < float("inf"), g, 0.0), 0))
        if BIASED:
            bias = tl.load(bias_ptr + r.to(tl.int64) * bias_stride, inside, other=0.0).to(tl.float32)
            tl.store(offset_ptr + r, bias * LOG2E)
            bias = tl.where(bias == float("-inf"), 0.0, tl.abs(bias))
            size = tl.maximum(size, tl.max(tl.where(bias == bias, bias, float("inf")), 0))
    tl.store(state_ptr + (NORM + side) * SLOTS + p, norm)
    tl.store(state_ptr + (BIAS + side) * SLOTS + p, size)
    tl.store(state_ptr + (GRAD + side) * SLOTS + p, largest_g)


@triton.jit
def pack(
    a_ptr, a_row_stride, a_col_stride, a_packed_ptr, m, a_padded, a_ids_ptr, a_ranges_ptr, g_ptr, g_stride,
    b_ptr, b_row_stride, b_col_stride, b_packed_ptr, n, b_padded, b_ids_ptr, b_ranges_ptr, h_ptr, h_stride,
    bias_ptr, bias_stride, offset_ptr, state_ptr, dim, width,
    A_COPY: tl.constexpr, B_COPY: tl.constexpr, IDS: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
    BIASED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Grid (programs <= SLOTS, sides). Copies rows to [padded, width], zeros around them, and per side leaves the range
    of ids of every GROUP of rows and the maxima of norms, |bias| and |upstream gradient|."""
    if tl.program_id(1) == 0:
        _pack(0, a_ptr, a_row_stride, a_col_stride, a_packed_ptr, m, a_padded, a_ids_ptr, a_ranges_ptr, g_ptr, g_stride,
              bias_ptr, bias_stride, offset_ptr, state_ptr, dim, width, A_COPY, IDS, G, False, D)  # fmt: skip
    else:
        _pack(1, b_ptr, b_row_stride, b_col_stride, b_packed_ptr, n, b_padded, b_ids_ptr, b_ranges_ptr, h_ptr, h_stride,
              bias_ptr, bias_stride, offset_ptr, state_ptr, dim, width, B_COPY, IDS, H, BIASED, D)  # fmt: skip


@triton.jit
def _maximum(state_ptr, row, slots, TWO: tl.constexpr):
    k = tl.arange(0, SLOTS)
    top = tl.load(state_ptr + row * SLOTS + k, k < slots, other=0.0)
    if TWO:
        top = tl.maximum(top, tl.load(state_ptr + (row + 1) * SLOTS + k, k < slots, other=0.0))
    return tl.max(top, 0)


@triton.jit
def _bound(scale_ptr, state_ptr, slots, TWO: tl.constexpr):
    """factor, and whether sums of 2^t lose nothing."""
    scale = tl.load(scale_ptr)
    norms = _maximum(state_ptr, NORM, slots, False) * _maximum(state_ptr, NORM + (1 if TWO else 0), slots, False)
    bound = tl.abs(scale) * norms + _maximum(state_ptr, BIAS, slots, TWO)
    return scale * LOG2E, bound < SAFE  # false for NaN


@triton.jit
def _to(x, dtype: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:  # cuts digits off where the GPU rounds to the nearest
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # multiplies the bits of bfloat16 as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _id_range(ranges_ptr, padded, first, BLOCK: tl.constexpr):
    low = tl.load(ranges_ptr + first // GROUP)
    high = tl.load(ranges_ptr + (padded + first) // GROUP)
    for k in tl.static_range(1, BLOCK // GROUP):
        low = tl.minimum(low, tl.load(ranges_ptr + first // GROUP + k))
        high = tl.maximum(high, tl.load(ranges_ptr + (padded + first) // GROUP + k))
    return low, high


@triton.jit
def _allowed(
    r, c, rows, cols, r_ids_ptr, c_ids_ptr,
    SELF: tl.constexpr, UPPER: tl.constexpr, IDS: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """Which pairs (r, c) of a tile count."""
    ok = (r < rows)[:, None] & (c < cols)[None, :]
    if UPPER:
        ok &= r[:, None] < c[None, :]
    elif SELF:
        ok &= r[:, None] != c[None, :]
    if IDS:
        r_ids = tl.load(r_ids_ptr + r, r < rows, other=0)
        c_ids = tl.load(c_ids_ptr + c, c < cols, other=0)
        equal = r_ids[:, None] == c_ids[None, :]
        ok &= equal if SAME else ~equal
    return ok


@triton.jit
def _or_zero(x):
    """x, 0 where it is infinite or NaN: a maximum as a shift, so that +inf gives inf, as torch.logsumexp does."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _super_tile(p, x_supers, UPPER: tl.constexpr):
    """(x super-block, y super-block) of program p: the pairs y < x first, then the diagonal, which is half the work."""
    if UPPER:
        off_diagonal = x_supers * (x_supers - 1) // 2
        column = ((tl.sqrt(8.0 * p + 1.0) + 1.0) * 0.5).to(tl.int32)
        column = tl.where(column * (column - 1) // 2 > p, column - 1, column)
        row = p - column * (column - 1) // 2
        column = tl.where(p < off_diagonal, column, p - off_diagonal)
        row = tl.where(p < off_diagonal, row, column)
        return column, row
    return p % x_supers, p // x_supers


@triton.jit
def sums(
    x_ptr, y_ptr, nx, ny, x_padded, y_padded, x_ids_ptr, y_ids_ptr, x_ranges_ptr, y_ranges_ptr, offset_ptr, scale_ptr,
    state_ptr, slots, own_ptr, streamed_ptr, x_span, y_span, x_supers,
    TWO: tl.constexpr, UPPER: tl.constexpr, BOTH: tl.constexpr, SELF: tl.constexpr, BIASED: tl.constexpr,
    IDS: tl.constexpr, SAME: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program sums one super-tile: y in a span of rows against x in another. own [y super, x_padded] sums over y;
    streamed [x super, y_padded] sums over x. UPPER: pairs y < x alone, and both kinds of sums belong to the same rows.
    """
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
            tl.debug_barrier()  # no other program touches these sums, but threads of this one take turns at it
        x = tl.load(x_ptr + tl.cast(x0, tl.int64) * D + (xs[:, None] * D + d[None, :]))
        if IDS and not SAME:
            x_low, x_high = _id_range(x_ranges_ptr, x_padded, x0, X)
        # Sums over y stay apart by warp and lane until the end: adding across lanes costs more than the powers do.
        own = tl.zeros([Y // 16, 8, X], tl.float32)
        y_end = tl.minimum(y_last, x0 + X) if UPPER else y_last
        for y0 in range(y_first, y_end, Y):
            y = tl.load(y_ptr + tl.cast(y0, tl.int64) * D + (ys[:, None] * D + d[None, :]))
            touched = (x0 + X > nx) | (y0 + Y > ny)
            if UPPER:
                touched |= y0 + Y > x0
            elif SELF:
                touched |= (y0 < x0 + X) & (x0 < y0 + Y)
            if IDS:
                if SAME:
                    touched = touched | True
                else:
                    low, high = _id_range(y_ranges_ptr, y_padded, y0, Y)
                    touched |= (x_low <= high) & (low <= x_high)
            t = _dot(y, x.T, None, PRECISION) * factor
            if BIASED:
                t += tl.load(offset_ptr + y0 + ys)[:, None]
            e = tl.exp2(t)
            if touched:
                e = tl.where(_allowed(y0 + ys, x0 + xs, ny, nx, y_ids_ptr, x_ids_ptr, SELF, UPPER, IDS, SAME), e, 0.0)
            own += tl.sum(tl.reshape(e, [Y // 16, 2, 8, X]), 1)
            if BOTH:
                tl.store(streamed_ptr + y0, tl.load(streamed_ptr + y0) + tl.sum(e, 1))
        tl.store(own_ptr + tl.cast(y_super, tl.int64) * x_padded + x0 + xs, tl.sum(tl.sum(own, 0), 0))


@triton.jit
def attend(
    x_ptr, y_ptr, nx, ny, x_padded, y_padded, x_ids_ptr, y_ids_ptr, x_ranges_ptr, y_ranges_ptr, offset_ptr, scale_ptr,
    state_ptr, slots, top_ptr, total_ptr, mean_ptr, y_span,
    TWO: tl.constexpr, ALWAYS: tl.constexpr, MEAN: tl.constexpr, SELF: tl.constexpr, BIASED: tl.constexpr,
    IDS: tl.constexpr, SAME: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (x blocks, y spans). Per x: top = max_y t and total = sum_y 2^(t - top), [y span, x_padded]; with MEAN also
    sum_y 2^(t - top) y, [y span, x_padded, D]. Unless ALWAYS, only where `sums` did not serve."""
    factor, safe = _bound(scale_ptr, state_ptr, slots, TWO)
    if safe and not ALWAYS:
        return
    x0, y_first = tl.program_id(0) * X, tl.program_id(1) * y_span
    y_last = tl.minimum(y_first + y_span, y_padded)
    d, xs, ys = tl.arange(0, D), tl.arange(0, X), tl.arange(0, Y)
    x = tl.load(x_ptr + tl.cast(x0, tl.int64) * D + (xs[:, None] * D + d[None, :]))
    if IDS and not SAME:
        x_low, x_high = _id_range(x_ranges_ptr, x_padded, x0, X)
    top = tl.full([X], float("-inf"), tl.float32)
    total = tl.zeros([X], tl.float32)
    if MEAN:
        mean = tl.zeros([X, D], tl.float32)
    for y0 in range(y_first, y_last, Y):
        y = tl.load(y_ptr + tl.cast(y0, tl.int64) * D + (ys[:, None] * D + d[None, :]))
        touched = y0 + Y > ny
        if SELF:
            touched |= (y0 < x0 + X) & (x0 < y0 + Y)
        if IDS:
            if SAME:
                touched = touched | True
            else:
                low, high = _id_range(y_ranges_ptr, y_padded, y0, Y)
                touched |= (x_low <= high) & (low <= x_high)
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
            mean = _dot(_to(e, y.dtype), y, mean * fade[:, None], PRECISION)
        top = new_top
    place = tl.cast(tl.program_id(1), tl.int64) * x_padded + x0
    tl.store(top_ptr + place + xs, top)
    tl.store(total_ptr + place + xs, total)
    if MEAN:
        tl.store(mean_ptr + place * D + (xs[:, None] * D + d[None, :]), mean)


@triton.jit
def merge(
    out_ptr, rows, padded, sums_ptr, parts, top_ptr, total_ptr, mean_ptr, tops, mean_out_ptr,
    offset_ptr, scale_ptr, state_ptr, slots, dim,
    TWO: tl.constexpr, SUMS: tl.constexpr, MEAN: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of ROWS rows from the slots of `sums` or of `attend`, in order. BIASED: the bias
    belongs to these rows, and `attend` left it out. MEAN: mean_out [rows, dim] = sum_y p_xy y."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _, safe = _bound(scale_ptr, state_ptr, slots, TWO)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SUMS and safe:
        for k in range(parts):
            total += tl.load(sums_ptr + tl.cast(k, tl.int64) * padded + r, r < padded, other=0.0)
        lse = tl.log2(total)
    else:
        if MEAN:
            mean = tl.zeros([ROWS, D], tl.float32)
            d = tl.arange(0, D)
        for k in range(tops):
            place = tl.cast(k, tl.int64) * padded + r
            other_top = tl.load(top_ptr + place, r < padded, other=float("-inf"))
            new_top = tl.maximum(top, other_top)
            base = _or_zero(new_top)
            fade, share = tl.exp2(top - base), tl.exp2(other_top - base)
            total = total * fade + tl.load(total_ptr + place, r < padded, other=0.0) * share
            if MEAN:
                other = tl.load(mean_ptr + place[:, None] * D + d[None, :], (r < padded)[:, None], other=0.0)
                mean = mean * fade[:, None] + other * share[:, None]
            top = new_top
        lse = tl.log2(total) + _or_zero(top)
        if BIASED:
            lse += tl.load(offset_ptr + r, r < rows, other=0.0)
        if MEAN:
            mean = mean / tl.where(total == 0, 1.0, total)[:, None]
            place = r.to(tl.int64)[:, None] * dim + d[None, :]
            tl.store(mean_out_ptr + place, mean, (r < rows)[:, None] & (d < dim)[None, :])
    tl.store(out_ptr + r, lse * LN2, r < rows)


@triton.jit
def _upstream_unit(state_ptr, slots, TWO: tl.constexpr):
    """A power of two near the largest upstream gradient, by which they are divided on the way: tiny gradients do not
    vanish in a product with tiny probabilities, nor large ones overflow float16."""
    largest = _maximum(state_ptr, GRAD, slots, TWO)
    exponent = tl.floor(tl.log2(tl.where(largest > 0, largest, 1.0))) + 1
    return tl.exp2(tl.minimum(tl.maximum(exponent, -120.0), 120.0))


@triton.jit
def _weigh(g_ptr, g_stride, lse_ptr, rows, padded, coef_ptr, lse2_ptr, unit, safe, ROWS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + r, r < rows, other=float("-inf")) * LOG2E
    coef = tl.load(g_ptr + r.to(tl.int64) * g_stride, r < rows, other=0.0) / unit
    if safe:
        coef *= tl.exp2(-lse)
    empty = lse == float("-inf")  # no pair, no gradient
    tl.store(coef_ptr + r, tl.where(empty, 0.0, coef), r < padded)
    tl.store(lse2_ptr + r, tl.where(empty, 0.0, lse), r < padded)


@triton.jit
def weights(
    g_ptr, g_stride, row_ptr, m, a_padded, a_coef_ptr, a_lse_ptr, h_ptr, h_stride, col_ptr, n, b_padded, b_coef_ptr,
    b_lse_ptr, scale_ptr, state_ptr, slots, TWO: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of ROWS, sides). Per row, log-sum-exp in base 2 and upstream gradient over its unit; in the safe range
    times 2^-lse, so that one power serves both terms of G."""
    _, safe = _bound(scale_ptr, state_ptr, slots, TWO)
    unit = _upstream_unit(state_ptr, slots, H)
    if tl.program_id(1) == 0:
        _weigh(g_ptr, g_stride, row_ptr, m, a_padded, a_coef_ptr, a_lse_ptr, unit, safe, ROWS)
    elif H:
        _weigh(h_ptr, h_stride, col_ptr, n, b_padded, b_coef_ptr, b_lse_ptr, unit, safe, ROWS)


@triton.jit
def _walk(
    x, x_coef, x_lse, x_offset, x0, y_first, y_last, acc, total, x_low, x_high, y_ptr, y_coef_ptr, y_lse_ptr, offset_ptr,
    nx, ny, y_padded, x_ids_ptr, y_ids_ptr, y_ranges_ptr, factor,
    ONE_POWER: tl.constexpr, X_TERM: tl.constexpr, Y_TERM: tl.constexpr, X_BIASED: tl.constexpr, Y_BIASED: tl.constexpr,
    TOTAL: tl.constexpr, SELF: tl.constexpr, IDS: tl.constexpr, SAME: tl.constexpr, GAIN: tl.constexpr,
    X: tl.constexpr, Y: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + sum_y G_xy y and total + sum_y G_xy, both 2^GAIN times as large."""
    d, xs, ys = tl.arange(0, D), tl.arange(0, X), tl.arange(0, Y)
    for y0 in range(y_first, y_last, Y):
        y = tl.load(y_ptr + tl.cast(y0, tl.int64) * D + (ys[:, None] * D + d[None, :]))
        touched = (x0 + X > nx) | (y0 + Y > ny)
        if SELF:
            touched |= (y0 < x0 + X) & (x0 < y0 + Y)
        if IDS:
            if SAME:
                touched = touched | True
            else:
                low, high = _id_range(y_ranges_ptr, y_padded, y0, Y)
                touched |= (x_low <= high) & (low <= x_high)
        t = _dot(x, y.T, None, PRECISION) * factor
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
            w = tl.where(_allowed(x0 + xs, y0 + ys, nx, ny, x_ids_ptr, y_ids_ptr, SELF, False, IDS, SAME), w, 0.0)
        if TOTAL:
            total += tl.sum(w, 1)
        acc = _dot(_to(w, y.dtype), y, acc, PRECISION)
    return acc, total


@triton.jit
def grad(
    x_ptr, y_ptr, nx, ny, x_padded, y_padded, x_ids_ptr, y_ids_ptr, x_ranges_ptr, y_ranges_ptr, offset_ptr, scale_ptr,
    state_ptr, slots, x_coef_ptr, x_lse_ptr, y_coef_ptr, y_lse_ptr, dx_ptr, dscale_ptr, dbias_ptr, dim, y_span,
    TWO: tl.constexpr, H: tl.constexpr, X_TERM: tl.constexpr, Y_TERM: tl.constexpr, X_BIASED: tl.constexpr,
    Y_BIASED: tl.constexpr, DSCALE: tl.constexpr, DBIAS: tl.constexpr, SELF: tl.constexpr, IDS: tl.constexpr,
    SAME: tl.constexpr, GAIN: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (x blocks, y spans). dx [y span, nx, dim] = scale sum_y G_xy y; dscale [y span, x block] = sum <x, G y>; dbias
    [y span, nx] = sum_y G_xy."""
    factor, safe = _bound(scale_ptr, state_ptr, slots, TWO)
    x0, y_first = tl.program_id(0) * X, tl.program_id(1) * y_span
    y_last = tl.minimum(y_first + y_span, y_padded)
    d, xs = tl.arange(0, D), tl.arange(0, X)
    r = x0 + xs
    x_ptr += tl.cast(x0, tl.int64) * D
    x = tl.load(x_ptr + (xs[:, None] * D + d[None, :]))
    x_coef = tl.load(x_coef_ptr + r) if X_TERM else 0.0
    x_lse = tl.load(x_lse_ptr + r) if X_TERM else 0.0
    x_offset = tl.load(offset_ptr + r) if X_BIASED else 0.0
    x_low, x_high = 0, 0
    if IDS and not SAME:
        x_low, x_high = _id_range(x_ranges_ptr, x_padded, x0, X)
    acc, total = tl.zeros([X, D], tl.float32), tl.zeros([X], tl.float32)
    if safe:
        acc, total = _walk(
            x, x_coef, x_lse, x_offset, x0, y_first, y_last, acc, total, x_low, x_high, y_ptr, y_coef_ptr, y_lse_ptr,
            offset_ptr, nx, ny, y_padded, x_ids_ptr, y_ids_ptr, y_ranges_ptr, factor,
            True, X_TERM, Y_TERM, X_BIASED, Y_BIASED, DBIAS, SELF, IDS, SAME, GAIN, X, Y, D, PRECISION,
        )  # fmt: skip
    else:
        acc, total = _walk(
            x, x_coef, x_lse, x_offset, x0, y_first, y_last, acc, total, x_low, x_high, y_ptr, y_coef_ptr, y_lse_ptr,
            offset_ptr, nx, ny, y_padded, x_ids_ptr, y_ids_ptr, y_ranges_ptr, factor,
            False, X_TERM, Y_TERM, X_BIASED, Y_BIASED, DBIAS, SELF, IDS, SAME, GAIN, X, Y, D, PRECISION,
        )  # fmt: skip
    unit = _upstream_unit(state_ptr, slots, H) * tl.exp2(tl.full([], -GAIN, tl.float32))
    span = tl.cast(tl.program_id(1), tl.int64)
    if DSCALE:
        product = tl.load(x_ptr + (xs[:, None] * D + d[None, :])).to(tl.float32) * acc
        tl.store(dscale_ptr + span * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(product, 1), 0) * unit)
    if DBIAS:
        tl.store(dbias_ptr + span * nx + r, total * unit, r < nx)
    dx = _to(acc * (unit * tl.load(scale_ptr)), dx_ptr.dtype.element_ty)
    dx_ptr += (span * nx + x0) * dim
    tl.store(dx_ptr + (xs[:, None] * dim + d[None, :]), dx, (r < nx)[:, None] & (d < dim)[None, :])
