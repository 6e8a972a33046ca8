"""Triton kernels that move rows of patches: taken by index, put back, cut out of images."""

import torch
import triton
import triton.language as tl
from sslfast.kernels import tuning
from sslfast.kernels.similarity_lse_rows import _to


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """Rounded to dtype once."""
    if x.dtype == dtype:
        return x
    if x.dtype == tl.float64:
        x = x.to(tl.float32)
    return _to(x, dtype)


@triton.jit
def take_rows(
    source_ptr,
    ids_ptr,
    fill_ptr,
    pos_ptr,
    out_ptr,
    batch_stride,
    row_stride,
    total,
    count,
    rows,
    dim,
    FILL: tl.constexpr,
    POS: tl.constexpr,
    OWN: tl.constexpr,
    WORK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[b, i] = source[b, ids[b, i]] + pos[ids[b, i]]; FILL: fill where the id is no row, + pos[i]; OWN:
    source[b, i] + pos[ids[b, i]]. `total` counts the rows of out, `rows` those that an id may name."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid, wide = at < total, d < dim
    image, i = at // count, at % count
    id = tl.load(ids_ptr + at, valid, -1)
    known = (id >= 0) & (id < rows)
    row = i if OWN else id
    from_source = (valid & known)[:, None] & wide[None, :]
    x = tl.load(
        source_ptr + (image * batch_stride + row * row_stride)[:, None] + d[None, :],
        from_source,
        float("nan"),
    ).to(WORK)
    if FILL:
        fill = tl.load(fill_ptr + d, wide, 0.0).to(WORK)
        x = tl.where((id >= rows)[:, None], fill[None, :], x)
    if POS:
        if FILL:
            has_pos, place = valid, i
        else:
            has_pos, place = valid & known, id
        x += tl.load(pos_ptr + (place * dim)[:, None] + d[None, :], has_pos[:, None] & wide[None, :], 0.0).to(
            WORK
        )
    out = _narrow(x, out_ptr.dtype.element_ty)
    tl.store(out_ptr + (at * dim)[:, None] + d[None, :], out, valid[:, None] & wide[None, :])


@triton.jit
def places(ids_ptr, table_ptr, rows, count, QUERIES: tl.constexpr, BLOCK: tl.constexpr):
    """table [B, rows + count] int32: of each row the first place with its id, of each place the next with its
    own id; -1: none."""
    image = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    is_place = query >= rows
    own = tl.load(ids_ptr + image * count + query - rows, is_place & (query < rows + count), -1)
    value = tl.where(is_place, own, query)
    after = tl.where(is_place, query - rows, -1)
    found = tl.full([QUERIES], 0x7FFFFFFF, tl.int32)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        id = tl.load(ids_ptr + image * count + place, place < count, -1)
        hit = (id[None, :] == value[:, None]) & (place[None, :] > after[:, None]) & (id >= 0)[None, :]
        found = tl.minimum(found, tl.min(tl.where(hit, place[None, :], 0x7FFFFFFF), 1))
    found = tl.where(found == 0x7FFFFFFF, -1, found)
    tl.store(table_ptr + image * (rows + count) + query, found, query < rows + count)


@triton.jit
def _row_sums(
    dout_ptr, table_ptr, image, k, valid, batch_stride, row_stride, rows, d, wide, WORK: tl.constexpr
):
    """The sum over the places of each row k of an image: one, unless ids are repeated."""
    place = tl.load(table_ptr + k, valid, -1).to(tl.int64)
    at = (dout_ptr + image * batch_stride + place * row_stride)[:, None] + d[None, :]
    total = tl.load(at, (place >= 0)[:, None] & wide[None, :], 0.0).to(WORK)
    place = tl.load(table_ptr + rows + place, place >= 0, -1).to(tl.int64)
    while tl.max(place, 0) >= 0:
        at = (dout_ptr + image * batch_stride + place * row_stride)[:, None] + d[None, :]
        total += tl.load(at, (place >= 0)[:, None] & wide[None, :], 0.0).to(WORK)
        place = tl.load(table_ptr + rows + place, place >= 0, -1).to(tl.int64)
    return total


@triton.jit
def put_rows(
    dout_ptr,
    table_ptr,
    dsource_ptr,
    batch_stride,
    row_stride,
    rows,
    count,
    dim,
    WORK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dsource[b, k] = sum of dout[b, i] over the places i of row k"""
    image = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    valid, wide = k < rows, d < dim
    table = table_ptr + image * (rows + count)
    x = _row_sums(dout_ptr, table, image, k, valid, batch_stride, row_stride, rows, d, wide, WORK)
    to = dsource_ptr + ((image * rows + k) * dim)[:, None] + d[None, :]
    tl.store(to, _narrow(x, dsource_ptr.dtype.element_ty), valid[:, None] & wide[None, :])


@triton.jit
def sum_rows(
    dout_ptr,
    table_ptr,
    part_ptr,
    batch_stride,
    row_stride,
    batch,
    span,
    rows,
    count,
    dim,
    WORK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """part[s, k] = the same sum over `span` images"""
    part = tl.program_id(0)
    k = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    valid, wide = k < rows, d < dim
    total = tl.zeros([ROWS, BLOCK], WORK)
    for j in range(span):
        image = part.to(tl.int64) * span + j
        table, here = table_ptr + image * (rows + count), valid & (image < batch)
        total += _row_sums(dout_ptr, table, image, k, here, batch_stride, row_stride, rows, d, wide, WORK)
    to = part_ptr + ((part.to(tl.int64) * rows + k) * dim)[:, None] + d[None, :]
    tl.store(to, total, valid[:, None] & wide[None, :])


@triton.jit
def sum_fill(
    dout_ptr,
    ids_ptr,
    part_ptr,
    batch_stride,
    row_stride,
    total,
    count,
    rows,
    dim,
    TILES: tl.constexpr,
    WORK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """part[s] = sum of dout[b, i] over those of TILES * ROWS places whose id is no row"""
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide = d < dim
    sums = tl.zeros([ROWS, BLOCK], WORK)
    first = tl.program_id(0).to(tl.int64) * (TILES * ROWS)
    for tile in range(TILES):
        at = first + tile * ROWS + tl.arange(0, ROWS)
        missing = tl.load(ids_ptr + at, at < total, -1) >= rows
        x = dout_ptr + (at // count * batch_stride + at % count * row_stride)[:, None] + d[None, :]
        sums += tl.load(x, missing[:, None] & wide[None, :], 0.0).to(WORK)
    tl.store(part_ptr + tl.program_id(0).to(tl.int64) * dim + d, tl.sum(sums, 0), wide)


@triton.jit
def cut_rows(
    images_ptr,
    ids_ptr,
    cols_ptr,
    batch_stride,
    channel_stride,
    y_stride,
    x_stride,
    total,
    count,
    patches,
    across,
    dim,
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """cols[b, i, (c, y, x)] = the pixels of patch ids[b, i]"""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid, wide = at < total, d < dim
    id = tl.load(ids_ptr + at, valid, -1)
    known = (id >= 0) & (id < patches)
    corner = at // count * batch_stride + id // across * PATCH * y_stride + id % across * PATCH * x_stride
    channel, y, x = d // (PATCH * PATCH), d // PATCH % PATCH, d % PATCH
    inner = channel.to(tl.int64) * channel_stride + y * y_stride + x * x_stride
    pixels = tl.load(
        images_ptr + corner[:, None] + inner[None, :], known[:, None] & wide[None, :], float("nan")
    )
    narrow: tl.constexpr = cols_ptr.dtype.element_ty
    tl.store(
        cols_ptr + (at * dim)[:, None] + d[None, :],
        _to(pixels, narrow) if pixels.dtype != narrow else pixels,
        valid[:, None] & wide[None, :],
    )


def _work(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _tile(dim: int) -> tuple[int, int]:
    """Rows and columns that a program moves at a time."""
    block = min(tuning.PATCH_BLOCK, triton.next_power_of_2(dim))
    return max(1, tuning.PATCH_TILE // block), block


def take(
    source: torch.Tensor,
    ids: torch.Tensor,
    fill: torch.Tensor | None,
    pos: torch.Tensor | None,
    own: bool,
    out: torch.Tensor,
) -> None:
    batch, count, dim = out.shape
    tile = rows, block = _tile(dim)
    named = pos.shape[0] if own and pos is not None else source.shape[1]
    grid = (triton.cdiv(batch * count, rows), triton.cdiv(dim, block))
    take_rows[grid](
        source, ids, out if fill is None else fill, out if pos is None else pos, out, *source.stride()[:2],
        batch * count, count, named, dim, fill is not None, pos is not None, own, _work(out.dtype), *tile,
        num_warps=4,
    )  # fmt: skip


def put(
    dout: torch.Tensor,
    ids: torch.Tensor,
    rows: int,
    dtype: torch.dtype,
    work: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dsource [B, rows, D] of `dtype`, dpos [rows, D], dfill [D]), the last two of `work`; empty if not
    needed."""
    (batch, count, dim), strides = dout.shape, dout.stride()[:2]
    need_source, need_pos, need_fill = needs
    dsource = dout.new_empty((batch, rows, dim) if need_source else 0, dtype=dtype)
    dpos = dout.new_zeros((rows, dim) if need_pos else 0, dtype=work)
    dfill = dout.new_zeros(dim if need_fill else 0, dtype=work)
    if not batch or not dim:
        return dsource, dpos, dfill
    tile = height, block = _tile(dim)
    columns = triton.cdiv(dim, block)
    if (need_source or need_pos) and rows:
        table = dout.new_empty(batch, rows + count, dtype=torch.int32)
        side = tuning.PLACES
        places[batch, triton.cdiv(rows + count, side)](ids, table, rows, count, side, side, num_warps=4)
    if need_source and rows:
        grid = (batch, triton.cdiv(rows, height), columns)
        put_rows[grid](
            dout, table, dsource, *strides, rows, count, dim, _work(dout.dtype), *tile, num_warps=8
        )
    if need_pos and rows:
        span = max(8, triton.cdiv(batch, 32))
        parts = triton.cdiv(batch, span)
        part = dout.new_empty(parts, rows, dim, dtype=work)
        few = max(1, height // 2)  # the sums stay in registers from image to image
        sum_rows[parts, triton.cdiv(rows, few), columns](
            dout, table, part, *strides, batch, span, rows, count, dim, _work(dout.dtype), few, block,
            num_warps=4,
        )  # fmt: skip
        dpos = part.sum(0)
    if need_fill and count:
        tiles = 16
        parts = triton.cdiv(batch * count, tiles * height)
        part = dout.new_empty(parts, dim, dtype=work)
        sum_fill[parts, columns](
            dout, ids, part, *strides, batch * count, count, rows, dim, tiles, _work(dout.dtype), *tile,
            num_warps=4,
        )  # fmt: skip
        dfill = part.sum(0)
    return dsource, dpos, dfill


def cut(images: torch.Tensor, ids: torch.Tensor, patch: int, cols: torch.Tensor) -> None:
    batch, count, dim = cols.shape
    across = images.shape[3] // patch
    tile = rows, block = _tile(dim)
    grid = (triton.cdiv(batch * count, rows), triton.cdiv(dim, block))
    cut_rows[grid](
        images, ids, cols, *images.stride(), batch * count, count, images.shape[2] // patch * across, across,
        dim, patch, *tile, num_warps=4,
    )  # fmt: skip
