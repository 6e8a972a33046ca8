"""Triton epilogues of `similarity_lse`'s chunked form: a library's matrix product leaves a tile of <a_i, b_j>
in float32 in the L2 cache, and these reduce it to sums (forward) or turn it into gradient weights (backward);
`tile_bce`, that of `similarity_bce`, does both.

Base-2 logits, range and upstream unit as in kernels/similarity_lse.py, whose `pack` and `weights` come first.
"""

import triton
import triton.language as tl
from sslfast.kernels.similarity_lse_rows import (
    LN2,
    _allowed,
    _bound,
    _or_zero,
    _own_ids,
    _to,
    _touched,
    _upstream_unit,
)


@triton.jit(do_not_specialize=("r_first", "r_end", "c_first", "c_end", "slots"))
def tile_sums(
    tile_ptr, tile_stride, r_first, r_end, c_first, c_end, m_padded, n_padded, a_ids_ptr, b_ids_ptr,
    a_ranges_ptr, b_ranges_ptr, offset_ptr, scale_ptr, state_ptr, slots, row_ptr, row_slot, col_ptr, col_slot,
    TWO: tl.constexpr, COLS: tl.constexpr, SELF: tl.constexpr, BIASED: tl.constexpr, IDS: tl.constexpr,
    SAME: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, row blocks) of the tile. Each leaves (max, sum) per row in row [3, column block,
    row_slot] and per column in col [2, row block, col_slot]; in the safe range every maximum is 0."""
    factor, safe = _bound(scale_ptr, state_ptr, slots, TWO)
    ri, ci = tl.program_id(1) * R + tl.arange(0, R), tl.program_id(0) * C + tl.arange(0, C)
    r0, c0 = r_first + tl.program_id(1) * R, c_first + tl.program_id(0) * C
    r, c = r_first + ri, c_first + ci
    inside = (r < r_end)[:, None] & (c < c_end)[None, :]
    t = tl.load(tile_ptr + ri[:, None] * tile_stride + ci[None, :], inside, other=0.0) * factor
    if BIASED:
        t += tl.load(offset_ptr + c, c < c_end, other=0.0)[None, :]
    low, high = _own_ids(a_ranges_ptr, m_padded, r0, IDS, SAME, R)
    if _touched(r0, c0, r_end, c_end, low, high, b_ranges_ptr, n_padded, SELF, False, IDS, SAME, R, C):
        ok = _allowed(r, c, r_end, c_end, a_ids_ptr, b_ids_ptr, SELF, False, IDS, SAME)
        t = tl.where(ok, t, float("-inf"))
    row_place = row_ptr + tl.program_id(0) * row_slot + ri
    row_plane = tl.num_programs(0) * row_slot
    col_place = col_ptr + tl.program_id(1) * col_slot + ci
    col_plane = tl.num_programs(1) * col_slot
    if safe:
        e = tl.exp2(t)
        tl.store(row_place, tl.zeros([R], tl.float32), r < r_end)
        tl.store(row_place + row_plane, tl.sum(e, 1), r < r_end)
        if COLS:
            tl.store(col_place, tl.zeros([C], tl.float32), c < c_end)
            tl.store(col_place + col_plane, tl.sum(e, 0), c < c_end)
    else:
        top = tl.max(t, 1)
        tl.store(row_place, top, r < r_end)
        tl.store(row_place + row_plane, tl.sum(tl.exp2(t - _or_zero(top)[:, None]), 1), r < r_end)
        if COLS:
            top = tl.max(t, 0)
            tl.store(col_place, top, c < c_end)
            tl.store(col_place + col_plane, tl.sum(tl.exp2(t - _or_zero(top)[None, :]), 0), c < c_end)


@triton.jit
def _fold(top_ptr, total_ptr, part_ptr, part_slot, parts, i, count):
    """(top, total) of `count` rows with those of `parts` blocks, in order."""
    inside = i < count
    top = tl.load(top_ptr + i, inside, other=float("-inf"))
    total = tl.load(total_ptr + i, inside, other=0.0)
    for k in range(parts):
        place = part_ptr + k * part_slot + i
        other_top = tl.load(place, inside, other=float("-inf"))
        other = tl.load(place + parts * part_slot, inside, other=0.0)
        new_top = tl.maximum(top, other_top)
        base = _or_zero(new_top)
        total = total * tl.exp2(top - base) + other * tl.exp2(other_top - base)
        top = new_top
    tl.store(top_ptr + i, top, inside)
    tl.store(total_ptr + i, total, inside)


@triton.jit(do_not_specialize=("rows", "cols", "row_parts", "col_parts", "row_programs"))
def tile_merge(
    row_top_ptr, row_total_ptr, row_ptr, row_slot, row_parts, rows, row_programs, col_top_ptr, col_total_ptr,
    col_ptr, col_slot, col_parts, cols, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds a tile's sums to those of the rows (the first row_programs programs) and of the columns (the
    others)."""
    p = tl.program_id(0)
    i = tl.arange(0, ROWS)
    if p < row_programs:
        _fold(row_top_ptr, row_total_ptr, row_ptr, row_slot, row_parts, p * ROWS + i, rows)
    else:
        _fold(col_top_ptr, col_total_ptr, col_ptr, col_slot, col_parts, (p - row_programs) * ROWS + i, cols)


@triton.jit(do_not_specialize=("rows",))
def tile_lse(out_ptr, top_ptr, total_ptr, rows, ROWS: tl.constexpr):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    top = tl.load(top_ptr + i, i < rows, other=0.0)
    total = tl.load(total_ptr + i, i < rows, other=1.0)
    tl.store(out_ptr + i, (tl.log2(total) + _or_zero(top)) * LN2, i < rows)


@triton.jit(do_not_specialize=("r_first", "r_end", "c_first", "c_end", "slots"))
def tile_weights(
    tile_ptr, out_ptr, tile_stride, r_first, r_end, c_first, c_end, m_padded, n_padded, a_ids_ptr, b_ids_ptr,
    a_ranges_ptr, b_ranges_ptr, offset_ptr, scale_ptr, state_ptr, slots, r_coef_ptr, r_lse_ptr, c_coef_ptr,
    c_lse_ptr, dbias_ptr, col_slot, TWO: tl.constexpr, C_TERM: tl.constexpr, DBIAS: tl.constexpr,
    SELF: tl.constexpr, BIASED: tl.constexpr, IDS: tl.constexpr, SAME: tl.constexpr, GAIN: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid as `tile_sums`. out (may be the tile) = G = coef_r 2^(t - lse_r) + coef_c 2^(t - lse_c), 2^GAIN
    times as large; dbias [row block, col_slot]: its sums over rows."""
    factor, safe = _bound(scale_ptr, state_ptr, slots, TWO)
    ri, ci = tl.program_id(1) * R + tl.arange(0, R), tl.program_id(0) * C + tl.arange(0, C)
    r0, c0 = r_first + tl.program_id(1) * R, c_first + tl.program_id(0) * C
    r, c = r_first + ri, c_first + ci
    inside = (r < r_end)[:, None] & (c < c_end)[None, :]
    place = ri[:, None] * tile_stride + ci[None, :]
    t = tl.load(tile_ptr + place, inside, other=0.0) * factor + GAIN
    if BIASED:
        t += tl.load(offset_ptr + c, c < c_end, other=0.0)[None, :]
    r_coef = tl.load(r_coef_ptr + r, r < r_end, other=0.0)[:, None]
    c_coef = tl.load(c_coef_ptr + c, c < c_end, other=0.0)[None, :] if C_TERM else 0.0
    if safe:
        w = tl.exp2(t) * (r_coef + c_coef)
    else:
        w = tl.exp2(t - tl.load(r_lse_ptr + r, r < r_end, other=0.0)[:, None]) * r_coef
        if C_TERM:
            w += tl.exp2(t - tl.load(c_lse_ptr + c, c < c_end, other=0.0)[None, :]) * c_coef
    low, high = _own_ids(a_ranges_ptr, m_padded, r0, IDS, SAME, R)
    if _touched(r0, c0, r_end, c_end, low, high, b_ranges_ptr, n_padded, SELF, False, IDS, SAME, R, C):
        w = tl.where(_allowed(r, c, r_end, c_end, a_ids_ptr, b_ids_ptr, SELF, False, IDS, SAME), w, 0.0)
    tl.store(out_ptr + place, _to(w, out_ptr.dtype.element_ty), inside)
    if DBIAS:
        tl.store(dbias_ptr + tl.program_id(1) * col_slot + ci, tl.sum(w, 0), c < c_end)


@triton.jit(do_not_specialize=("slots",))
def upstream_unit(out_ptr, scale_ptr, state_ptr, slots, H: tl.constexpr, GAIN: tl.constexpr):
    """out = (unit of the upstream gradients / 2^GAIN, that times scale): what G's products lack."""
    unit = _upstream_unit(state_ptr, slots, H) * tl.exp2(tl.full([], -GAIN, tl.float32))
    tl.store(out_ptr, unit)
    tl.store(out_ptr + 1, unit * tl.load(scale_ptr))


@triton.jit
def _log1p(u):
    """log(1 + u) for 0 <= u <= 1: 2 atanh(q), q = u / (2 + u), by a polynomial of relative error 4e-9."""
    q = u / (2.0 + u)
    x = q * q
    p = 0.14078889181554540 * x + 0.13982578872598634
    p = p * x + 0.20012297615351874
    p = p * x + 0.33333160820688887
    return 2.0 * q * (p * x + 1.0)


@triton.jit(do_not_specialize=("r_first", "r_end", "c_first", "c_end", "slots"))
def tile_bce(
    tile_ptr, out_ptr, tile_stride, r_first, r_end, c_first, c_end, m_padded, n_padded, a_ids_ptr, b_ids_ptr,
    a_ranges_ptr, b_ranges_ptr, offset_ptr, scale_ptr, state_ptr, slots, coef_ptr, row_ptr, row_slot,
    TWO: tl.constexpr, SELF: tl.constexpr, BIASED: tl.constexpr, IDS: tl.constexpr, SAME: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid as `tile_sums`. With t_ij the logit, negated where the ids are equal: row [2, column block,
    row_slot] = per row the sums of log(1 + e^t), of the weights +-1 / (1 + e^-t) and of these times products;
    out (may be the tile) = G = coef_r times the weights."""
    factor, _ = _bound(scale_ptr, state_ptr, slots, TWO)
    ri, ci = tl.program_id(1) * R + tl.arange(0, R), tl.program_id(0) * C + tl.arange(0, C)
    r0, c0 = r_first + tl.program_id(1) * R, c_first + tl.program_id(0) * C
    r, c = r_first + ri, c_first + ci
    inside = (r < r_end)[:, None] & (c < c_end)[None, :]
    place = ri[:, None] * tile_stride + ci[None, :]
    product = tl.load(tile_ptr + place, inside, other=0.0)
    t = product * factor
    if BIASED:
        t += tl.load(offset_ptr + c, c < c_end, other=0.0)[None, :]
    sign = tl.full([R, C], 1.0, tl.float32)
    low, high = _own_ids(a_ranges_ptr, m_padded, r0, IDS, SAME, R)
    if _touched(r0, c0, r_end, c_end, low, high, b_ranges_ptr, n_padded, SELF, False, IDS, SAME, R, C):
        ok = _allowed(r, c, r_end, c_end, a_ids_ptr, b_ids_ptr, SELF, False, IDS, SAME)
        sign = tl.where(ok, 1.0, -1.0)
    t *= sign
    u = tl.exp2(-tl.abs(t))
    rest = u / (1.0 + u)  # the smaller of the two probabilities
    terms = tl.maximum(t, 0.0, propagate_nan=tl.PropagateNan.ALL) * LN2 + _log1p(u)
    weights = tl.where(t > 0, 1.0 - rest, rest) * sign
    row_place = row_ptr + tl.program_id(0) * row_slot + ri
    tl.store(row_place, tl.sum(tl.where(inside, terms, 0.0), 1), r < r_end)
    row_plane = tl.num_programs(0) * row_slot
    tl.store(row_place + row_plane, tl.sum(tl.where(inside, weights, 0.0), 1), r < r_end)
    tl.store(row_place + 2 * row_plane, tl.sum(tl.where(inside, weights * product, 0.0), 1), r < r_end)
    coef = tl.load(coef_ptr + r, r < r_end, other=0.0)[:, None]
    tl.store(out_ptr + place, _to(weights * coef, out_ptr.dtype.element_ty), inside)
