"""The blocked driver of `similarity_lse`: tiles of logits that stay in cache, so the matrix never exists.

For each tile: one matrix product by the platform's library, then one epilogue of ours. In the forward pass
the epilogue reduces the tile to row and column sums; in the backward pass it turns the tile, in place, into
the weights G of

    da = scale G b        db = scale G^T a        dscale = <a, G b>        dbias = column sums of G

which two more matrix products accumulate in float32. Self-similarity without a bias is symmetric: only tiles
on or above the diagonal are computed, and an off-diagonal tile serves both of its sides (its G is G_ij +
G_ji).

A backend supplies an object with the members of `Tiles`; the driver knows nothing of devices.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from sslfast import _C
from sslfast.kernels.tuning import cpu_tile
from sslfast.ops._backend import pointer

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Tiles(Protocol):
    """Tiles of one call: a [m, D], b [n, D], products of their rows, and the epilogues of `similarity_lse`
    (forward, backward) and of `similarity_bce` (bce).

    symmetric: S is; is_self: b is a. tile_rows, tile_cols: size of a tile.
    """

    a: Tensor
    b: Tensor
    m: int
    n: int
    is_self: bool
    symmetric: bool
    tile_rows: int
    tile_cols: int

    def product(self, r0: int, rows: int, c0: int, cols: int) -> Tensor:
        """a[r0 : r0 + rows] b[c0 : c0 + cols]^T, in the one tile buffer."""

    def accumulate(self, total: Tensor, weights: Tensor, operand: Tensor, first: bool) -> None:
        """total += weights operand; first: nothing has been added yet."""

    def begin_forward(self, return_cols: bool) -> None: ...
    def forward(self, tile: Tensor, r0: int, rows: int, c0: int, cols: int) -> None: ...
    def finish_forward(self) -> tuple[Tensor, Tensor]: ...

    def begin_backward(
        self, g: Tensor, h: Tensor | None, row: Tensor, col: Tensor | None, dbias: Tensor | None
    ) -> None: ...

    def backward(self, tile: Tensor, r0: int, rows: int, c0: int, cols: int) -> Tensor:
        """The tile's G, perhaps in its place, and perhaps all G of a call times one constant."""

    def begin_bce(self, g: Tensor) -> None: ...
    def bce(self, tile: Tensor, r0: int, rows: int, c0: int, cols: int) -> Tensor:
        """The tile's G of `similarity_bce`, as `backward`."""

    def finish_bce(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each row the sums of its terms, of its weights, and of its weights times products."""

    def total(self, rows: int) -> Tensor:
        """[rows, D] to accumulate in."""

    def scaled(self, total: Tensor) -> Tensor:
        """total times the scale, perhaps in its place, without G's constant."""

    def unscaled(self, x: Tensor) -> Tensor:
        """x without G's constant."""


def forward(tiles: Tiles, return_cols: bool) -> tuple[Tensor, Tensor]:
    """Row log-sum-exps [m], and column log-sum-exps [n] (or [0]), in the working dtype."""
    mirrored = tiles.symmetric and return_cols  # columns are rows again
    tiles.begin_forward(return_cols and not mirrored)
    for place in _walk(tiles):
        tiles.forward(tiles.product(*place), *place)
    row, col = tiles.finish_forward()
    return row, row.clone() if mirrored else col


def backward(
    tiles: Tiles, g: Tensor, h: Tensor | None, row: Tensor, col: Tensor | None, needs: tuple[bool, ...]
) -> Gradients:
    """Gradients to (a, b, scale, bias) in the working dtype, those that `needs` asks for.

    g [m] and h [n] are the gradients of row and col; h is None where columns have no gradient.
    """
    if tiles.symmetric and h is not None:
        g, h = g + h, None
    dbias = g.new_zeros(tiles.n) if needs[3] else None
    tiles.begin_backward(g, h, row, col, dbias)
    return *_products(tiles, tiles.backward, needs), None if dbias is None else tiles.unscaled(dbias)


def bce(tiles: Tiles, g: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor, Gradients]:
    """Of `similarity_bce`: row sums [m], and gradients to (a, b, scale, bias), those that `needs` asks for.

    g [m] are the gradients of the row sums. Everything comes of one walk over the tiles.
    """
    tiles.begin_bce(g)
    da, db, _ = _products(tiles, tiles.bce, (*needs[:2], False, False))
    row, weight, moment = tiles.finish_bce()
    dscale, dbias = ((g * x).sum(dtype=torch.float64) for x in (moment, weight))
    return row, (da, db, dscale if needs[2] else None, dbias if needs[3] else None)


def _products(
    tiles: Tiles, weigh: Callable[..., Tensor], needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to (a, b, scale) by the products of each tile's G, which `weigh` makes of it."""
    need_a, need_b, need_scale, _ = needs
    need_ga = need_b or (tiles.is_self and need_a) or (tiles.symmetric and need_scale)  # G^T a
    need_gb = need_a or tiles.symmetric and need_scale or need_scale and not need_ga  # G b
    # Symmetric tiles give (G + G^T) a in gb alone.
    gb = tiles.total(tiles.m) if need_gb else None
    ga = gb if tiles.symmetric else tiles.total(tiles.n) if need_ga else None
    for r0, rows, c0, cols in _walk(tiles):
        weights = weigh(tiles.product(r0, rows, c0, cols), r0, rows, c0, cols)
        if gb is not None:
            tiles.accumulate(gb[r0 : r0 + rows], weights, tiles.b[c0 : c0 + cols], c0 == 0)
        if ga is not None and not (tiles.symmetric and r0 == c0):
            tiles.accumulate(ga[c0 : c0 + cols], weights.t(), tiles.a[r0 : r0 + rows], r0 == 0)

    da = db = dscale = None
    if need_scale:  # <a, G b> = <b, G^T a>
        left, right = (tiles.a, gb) if gb is not None else (tiles.b, ga)
        assert right is not None
        dscale = tiles.unscaled((left * right).sum(dtype=torch.float64)) * (0.5 if tiles.symmetric else 1.0)
    if gb is not None and need_a:
        if ga is not None and tiles.is_self and not tiles.symmetric:
            gb += ga
        da = tiles.scaled(gb)
    if ga is not None and need_b:
        db = tiles.scaled(ga)
    return da, db, dscale


def _walk(tiles: Tiles) -> Iterator[tuple[int, int, int, int]]:
    """(first row, rows, first column, columns) of each tile, in a fixed order.

    Symmetric: a square on the diagonal, which is its own mirror image, then wide tiles to its right. Half of
    the square is work done twice, so it is kept small. Otherwise the smaller side is walked for each tile of
    the larger one, whose rows and gradients so come into the cache once.
    """
    if not tiles.symmetric and tiles.n > tiles.m:
        for c0 in range(0, tiles.n, tiles.tile_cols):
            cols = min(tiles.tile_cols, tiles.n - c0)
            for r0 in range(0, tiles.m, tiles.tile_rows):
                yield r0, min(tiles.tile_rows, tiles.m - r0), c0, cols
        return
    for r0 in range(0, tiles.m, tiles.tile_rows):
        rows = min(tiles.tile_rows, tiles.m - r0)
        first = 0
        if tiles.symmetric:
            yield r0, rows, r0, rows
            first = r0 + rows
        for c0 in range(first, tiles.n, tiles.tile_cols):
            yield r0, rows, c0, min(tiles.tile_cols, tiles.n - c0)


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    return (x if x.dtype == dtype else x.to(dtype)).contiguous()


class CpuTiles:
    """Tiles of one call on the CPU: matrix products by PyTorch, epilogues by sslfast._C.

    Args:
        a, b: [m, D], [n, D] of the same dtype; b None for self-similarity.
        scale: 0-d, bias: [n] or None; a_ids [m], b_ids [n] int64 or None; same: keep equal ids only.
    """

    tile_rows: int
    tile_cols: int

    def __init__(
        self,
        a: Tensor,
        b: Tensor | None,
        scale: Tensor,
        bias: Tensor | None,
        a_ids: Tensor | None,
        b_ids: Tensor | None,
        same: bool,
    ) -> None:
        work = torch.float64 if a.dtype == torch.float64 else torch.float32
        self.is_self = b is None
        self.symmetric = b is None and bias is None
        # Products of bfloat16 numbers are exact in float32, so a float32 GEMM keeps float32 logits.
        self.a = _as(work, a)
        self.b = self.a if b is None else _as(work, b)
        self.m, d = self.a.shape
        self.tile_rows, self.tile_cols = cpu_tile(d)
        self.n = self.b.shape[0]
        self.scale = _as(work, scale)
        self._bias = None if bias is None else _as(work, bias)
        self._a_ids = None if a_ids is None else a_ids.contiguous()
        self._b_ids = self._a_ids if b is None else None if b_ids is None else b_ids.contiguous()
        max_cols = max(1, min(max(self.tile_rows, self.tile_cols), self.n))
        self._tile = torch.empty(min(self.tile_rows, self.m), max_cols, dtype=work, device=a.device)
        self._buffer = self._tile.view(-1)
        self._kernels = (_C.SimilarityLseF64 if work == torch.float64 else _C.SimilarityLseF32)(
            self.m,
            self.n,
            d,
            self._pointer("a", self.a, self.m, d),
            self._pointer("b", self.b, self.n, d),
            self._pointer("scale", self.scale),
            self._pointer("bias", self._bias, self.n),
            pointer("a_ids", self._a_ids, torch.int64, (self.m,), a.device),
            pointer("b_ids", self._b_ids, torch.int64, (self.n,), a.device),
            same,
            self.is_self,
            self.symmetric,
            max_cols,
            torch.get_num_threads(),
        )

    def _pointer(self, name: str, tensor: Tensor | None, *shape: int) -> int:
        return pointer(name, tensor, self.a.dtype, shape, self.a.device)

    def product(self, r0: int, rows: int, c0: int, cols: int) -> Tensor:
        if self._tile.shape != (rows, cols):
            self._tile = self._buffer[: rows * cols].view(rows, cols)
        return torch.mm(self.a[r0 : r0 + rows], self.b[c0 : c0 + cols].t(), out=self._tile)

    def accumulate(self, total: Tensor, weights: Tensor, operand: Tensor, first: bool) -> None:
        total.addmm_(weights, operand, beta=0 if first and not self.symmetric else 1)

    def total(self, rows: int) -> Tensor:
        shape, reached = (rows, self.a.shape[1]), not self.symmetric and self.m and self.n
        return self.a.new_empty(shape) if reached else self.a.new_zeros(shape)

    def scaled(self, total: Tensor) -> Tensor:
        return total.mul_(self.scale)

    def unscaled(self, x: Tensor) -> Tensor:
        return x

    def begin_forward(self, return_cols: bool) -> None:
        self._row_state = self.a.new_empty(2, self.m)
        self._col_state = self.a.new_empty(2, self.n) if return_cols else None
        self._kernels.begin_forward(
            self._pointer("row_state", self._row_state, 2, self.m),
            self._pointer("col_state", self._col_state, 2, self.n),
        )

    def forward(self, tile: Tensor, r0: int, rows: int, c0: int, cols: int) -> None:
        self._kernels.forward(self._pointer("tile", tile, rows, cols), r0, rows, c0, cols)

    def finish_forward(self) -> tuple[Tensor, Tensor]:
        row = self.a.new_empty(self.m)
        col = self.a.new_empty(0 if self._col_state is None else self.n)
        self._kernels.finish_forward(
            self._pointer("row_lse", row, self.m),
            self._pointer("col_lse", None if self._col_state is None else col, self.n),
        )
        return row, col

    def begin_backward(
        self, g: Tensor, h: Tensor | None, row: Tensor, col: Tensor | None, dbias: Tensor | None
    ) -> None:
        # Kept on self: the kernels hold addresses.
        g, row = g.contiguous(), row.contiguous()
        h, col = (None, None) if h is None or col is None else (h.contiguous(), col.contiguous())
        row_work = self.a.new_empty(2, self.m)
        col_work = None if h is None else self.a.new_empty(2, self.n)
        self._held = (row_work, col_work, dbias)
        self._kernels.begin_backward(
            self._pointer("g", g, self.m),
            self._pointer("row_lse", row, self.m),
            self._pointer("row_work", row_work, 2, self.m),
            self._pointer("h", h, self.n),
            self._pointer("col_lse", col, self.n),
            self._pointer("col_work", col_work, 2, self.n),
            self._pointer("dbias", dbias, self.n),
        )

    def backward(self, tile: Tensor, r0: int, rows: int, c0: int, cols: int) -> Tensor:
        self._kernels.backward(self._pointer("tile", tile, rows, cols), r0, rows, c0, cols)
        return tile

    def begin_bce(self, g: Tensor) -> None:
        self._g, self._sums = g.contiguous(), self.a.new_empty(3, self.m)
        self._kernels.begin_bce(
            self._pointer("g", self._g, self.m), self._pointer("sums", self._sums, 3, self.m)
        )

    def bce(self, tile: Tensor, r0: int, rows: int, c0: int, cols: int) -> Tensor:
        self._kernels.bce(self._pointer("tile", tile, rows, cols), r0, rows, c0, cols)
        return tile

    def finish_bce(self) -> tuple[Tensor, Tensor, Tensor]:
        row, weight, moment = self._sums
        return row, weight, moment
