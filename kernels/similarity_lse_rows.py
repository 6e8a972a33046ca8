"""Triton kernels of `similarity_lse` that treat rows alone, and what its kernels of tiles share.

    pack      measures the rows, and copies them to where no load needs a mask
    merge     partial sums of several programs, in fixed order, to log-sum-exps
    weights   upstream gradients and log-sum-exps to the coefficients of G

Logits are in base 2 inside: t = factor <a, b> + offset with factor = scale log2 e and offset = bias log2 e.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SAFE = tl.constexpr(64.0)  # |logit| below: e^64 times 2^32 rows is a float32, and e^-64 is a normal one
GROUP = tl.constexpr(64)  # rows that share a range of ids
SLOTS = tl.constexpr(256)  # programs of `pack` per side at most; each leaves its maxima in a slot of `state`
NORM, BIAS, GRAD = (
    tl.constexpr(0),
    tl.constexpr(2),
    tl.constexpr(4),
)  # rows of `state` [6, SLOTS], one per side


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
def _or_zero(x):
    """x, 0 where it is infinite or NaN: a maximum as a shift, so that +inf gives inf, as torch.logsumexp
    does."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


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
    norms = _maximum(state_ptr, NORM, slots, False) * _maximum(
        state_ptr, NORM + (1 if TWO else 0), slots, False
    )
    bound = tl.abs(scale) * norms + _maximum(state_ptr, BIAS, slots, TWO)
    return scale * LOG2E, bound < SAFE  # false for NaN


@triton.jit
def _id_range(ranges_ptr, padded, first, BLOCK: tl.constexpr):
    low = tl.load(ranges_ptr + first // GROUP)
    high = tl.load(ranges_ptr + (padded + first) // GROUP)
    for k in tl.static_range(1, BLOCK // GROUP):
        low = tl.minimum(low, tl.load(ranges_ptr + first // GROUP + k))
        high = tl.maximum(high, tl.load(ranges_ptr + (padded + first) // GROUP + k))
    return low, high


@triton.jit
def _own_ids(ranges_ptr, padded, first, IDS: tl.constexpr, SAME: tl.constexpr, BLOCK: tl.constexpr):
    """Lowest and highest id of a tile's own rows, for `_touched`."""
    low, high = 0, 0
    if IDS and not SAME:
        low, high = _id_range(ranges_ptr, padded, first, BLOCK)
    return low, high


@triton.jit
def _touched(
    x0, y0, nx, ny, x_low, x_high, y_ranges_ptr, y_padded, SELF: tl.constexpr, UPPER: tl.constexpr,
    IDS: tl.constexpr, SAME: tl.constexpr, X: tl.constexpr, Y: tl.constexpr,
):  # fmt: skip
    """Whether a tile may hold pairs that do not count: at an edge, on the diagonal, of equal ids. y0 is a
    multiple of GROUP or within one."""
    touched = (x0 + X > nx) | (y0 + Y > ny)
    if UPPER:  # pairs y < x count
        touched |= y0 + Y > x0
    elif SELF:
        touched |= (y0 < x0 + X) & (x0 < y0 + Y)
    if IDS:
        if SAME:
            touched = touched | True
        else:
            low, high = _id_range(y_ranges_ptr, y_padded, y0, Y)
            touched |= (x_low <= high) & (low <= x_high)
    return touched


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
def _upstream_unit(state_ptr, slots, TWO: tl.constexpr):
    """A power of two near the largest upstream gradient, by which they are divided on the way: tiny gradients
    do not vanish in a product with tiny probabilities, nor large ones overflow float16."""
    largest = _maximum(state_ptr, GRAD, slots, TWO)
    exponent = tl.floor(tl.log2(tl.where(largest > 0, largest, 1.0))) + 1
    return tl.exp2(tl.minimum(tl.maximum(exponent, -120.0), 120.0))


@triton.jit
def _pack(
    side, x_ptr, x_row_stride, x_col_stride, packed_ptr, rows, padded, ids_ptr, ranges_ptr, g_ptr, g_stride,
    bias_ptr, bias_stride, offset_ptr, state_ptr, dim, width, COPY: tl.constexpr, IDS: tl.constexpr,
    GRADS: tl.constexpr, BIASED: tl.constexpr, D: tl.constexpr,
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
            x = tl.load(
                row_ptr + d.to(tl.int64)[None, :] * x_col_stride,
                inside[:, None] & (d < dim)[None, :],
                other=0.0,
            )
            largest = tl.maximum(largest, tl.max(tl.abs(x.to(tl.float32)), 1))
        unit = tl.where(largest > 0, largest, 1.0)
        squares = tl.zeros([GROUP], tl.float32)
        for k in range(0, width, D):
            d = k + tl.arange(0, D)
            x = tl.load(
                row_ptr + d.to(tl.int64)[None, :] * x_col_stride,
                inside[:, None] & (d < dim)[None, :],
                other=0.0,
            )
            if COPY:
                tl.store(packed_ptr + r.to(tl.int64)[:, None] * width + d[None, :], x)
            y = x.to(tl.float32) / unit[:, None]
            squares += tl.sum(y * y, 1)
        norms = largest * tl.sqrt(squares)
        norm = tl.maximum(norm, tl.max(tl.where(norms == norms, norms, float("inf")), 0))
        if IDS:
            ids = tl.load(ids_ptr + r, inside, other=0)
            tl.store(ranges_ptr + first // GROUP, tl.min(tl.where(inside, ids, 0x7FFFFFFFFFFFFFFF), 0))
            tl.store(
                ranges_ptr + (padded + first) // GROUP, tl.max(tl.where(inside, ids, -0x7FFFFFFFFFFFFFFF), 0)
            )
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


@triton.jit(do_not_specialize=("m", "n", "g_stride", "h_stride", "bias_stride"))
def pack(
    a_ptr, a_row_stride, a_col_stride, a_packed_ptr, m, a_padded, a_ids_ptr, a_ranges_ptr, g_ptr, g_stride,
    b_ptr, b_row_stride, b_col_stride, b_packed_ptr, n, b_padded, b_ids_ptr, b_ranges_ptr, h_ptr, h_stride,
    bias_ptr, bias_stride, offset_ptr, state_ptr, dim, width,
    A_COPY: tl.constexpr, B_COPY: tl.constexpr, IDS: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
    BIASED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Grid (programs <= SLOTS, sides). Copies rows to [padded, width], zeros around them, and per side leaves
    the range of ids of every GROUP of rows and the maxima of norms, |bias| and |upstream gradient|."""
    if tl.program_id(1) == 0:
        _pack(
            0, a_ptr, a_row_stride, a_col_stride, a_packed_ptr, m, a_padded, a_ids_ptr, a_ranges_ptr, g_ptr,
            g_stride, bias_ptr, bias_stride, offset_ptr, state_ptr, dim, width, A_COPY, IDS, G, False, D,
        )  # fmt: skip
    else:
        _pack(
            1, b_ptr, b_row_stride, b_col_stride, b_packed_ptr, n, b_padded, b_ids_ptr, b_ranges_ptr, h_ptr,
            h_stride, bias_ptr, bias_stride, offset_ptr, state_ptr, dim, width, B_COPY, IDS, H, BIASED, D,
        )  # fmt: skip


@triton.jit(do_not_specialize=("rows", "parts", "tops", "slots"))
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
def _weigh(g_ptr, g_stride, lse_ptr, rows, padded, coef_ptr, lse2_ptr, unit, safe, ROWS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + r, r < rows, other=float("-inf")) * LOG2E
    coef = tl.load(g_ptr + r.to(tl.int64) * g_stride, r < rows, other=0.0) / unit
    if safe:
        coef *= tl.exp2(-lse)
    empty = lse == float("-inf")  # no pair, no gradient
    tl.store(coef_ptr + r, tl.where(empty, 0.0, coef), r < padded)
    tl.store(lse2_ptr + r, tl.where(empty, 0.0, lse), r < padded)


@triton.jit(do_not_specialize=("m", "n", "slots", "g_stride", "h_stride"))
def weights(
    g_ptr, g_stride, row_ptr, m, a_padded, a_coef_ptr, a_lse_ptr, h_ptr, h_stride, col_ptr, n, b_padded,
    b_coef_ptr, b_lse_ptr, scale_ptr, state_ptr, slots, TWO: tl.constexpr, H: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of ROWS, sides). Per row, log-sum-exp in base 2 and upstream gradient over its unit; in
    the safe range times 2^-lse, so that one power serves both terms of G."""
    _, safe = _bound(scale_ptr, state_ptr, slots, TWO)
    unit = _upstream_unit(state_ptr, slots, H)
    if tl.program_id(1) == 0:
        _weigh(g_ptr, g_stride, row_ptr, m, a_padded, a_coef_ptr, a_lse_ptr, unit, safe, ROWS)
    elif H:
        _weigh(h_ptr, h_stride, col_ptr, n, b_padded, b_coef_ptr, b_lse_ptr, unit, safe, ROWS)
