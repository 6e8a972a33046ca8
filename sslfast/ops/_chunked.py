"""The chunked form of `similarity_lse`, and `similarity_bce`, on a GPU: the blocked driver, cuBLAS products
and Triton epilogues.

A tile of logits is float32 and stays in the L2 cache between its product and its epilogue.
"""

import functools

import torch
from torch import Tensor

from sslfast.kernels import similarity_lse_tiles as kernels
from sslfast.kernels import tuning
from sslfast.ops import _blocked, _flash

ROWS = 128  # rows per program of the kernels that treat rows alone


class GpuTiles:
    """Tiles of one call: see `_blocked.Tiles`; arguments as `_flash.Problem`."""

    def __init__(
        self, a: Tensor, b: Tensor | None, scale: Tensor, bias: Tensor | None, a_ids: Tensor | None,
        b_ids: Tensor | None, same: bool, g: Tensor | None = None, h: Tensor | None = None,
    ) -> None:  # fmt: skip
        a, b = a.contiguous(), None if b is None else b.contiguous()
        self.problem = _flash.Problem(a, b, scale, bias, a_ids, b_ids, same, g, h, tiled=True)
        self.a, self.b = a, a if b is None else b
        (self.m, self.dim), self.n = a.shape, self.b.shape[0]
        self.is_self, self.symmetric = b is None, b is None and bias is None
        self.tile_rows, self.tile_cols = tuning.chunk(a.device)
        rows, cols = min(self.tile_rows, self.m), min(max(self.tile_rows, self.tile_cols), self.n)
        self._buffer = scale.new_empty(rows * cols)
        self._weights = a.new_empty(0 if a.dtype == torch.float32 else rows * cols)
        self._block = tuning.EPILOGUE
        row_blocks, col_blocks = -(-rows // self._block.x), -(-cols // self._block.y)
        self._row_part, self._row_slot = scale.new_empty(2 * col_blocks * rows), rows
        self._col_part, self._col_slot = scale.new_empty(2 * row_blocks * cols), cols

    def product(self, r0: int, rows: int, c0: int, cols: int) -> Tensor:
        tile = self._buffer[: rows * cols].view(rows, cols)
        left, right = self.a[r0 : r0 + rows], self.b[c0 : c0 + cols].t()
        if left.dtype == torch.float32:
            return torch.mm(left, right, out=tile)
        if not left.is_cuda:  # the interpreter's: torch.mm on a CPU would round to 16 bits
            return torch.mm(left.float(), right.float(), out=tile)
        return torch.mm(left, right, out_dtype=torch.float32, out=tile)

    def accumulate(self, total: Tensor, weights: Tensor, operand: Tensor, first: bool) -> None:
        if weights.dtype == torch.float32:
            total.addmm_(weights, operand)
        elif not total.is_cuda:
            total.addmm_(weights.float(), operand.float())
        elif _adds_to_float32(total.device):
            torch.addmm(total, weights, operand, out_dtype=torch.float32, out=total)
        else:
            total += torch.mm(weights, operand, out_dtype=torch.float32)

    def total(self, rows: int) -> Tensor:
        return self._buffer.new_zeros(rows, self.dim)

    def scaled(self, total: Tensor) -> Tensor:
        return total.mul_(self._unit[1])

    def unscaled(self, x: Tensor) -> Tensor:
        return x * self._unit[0]

    def _shared(self, r0: int, rows: int, c0: int, cols: int) -> tuple[object, ...]:
        p = self.problem
        ids = (p.a.ids, p.b.ids, p.a.ranges, p.b.ranges, p.offset)
        return (
            cols, r0, r0 + rows, c0, c0 + cols, p.a.padded, p.b.padded, *map(p.or_state, ids), p.scale,
            p.state, p.slots
        )  # fmt: skip

    def _launch(self, kernel, place: tuple[int, int, int, int], *args, **options) -> None:
        _, rows, _, cols = place
        block, p = self._block, self.problem
        kernel[(-(-cols // block.y), -(-rows // block.x))](
            *args, TWO=p.two, BIASED=p.bias is not None, R=block.x, C=block.y, num_warps=block.warps,
            **p.masks, **options
        )  # fmt: skip

    def begin_forward(self, return_cols: bool) -> None:
        def empty_sums(count: int) -> tuple[Tensor, Tensor]:
            return self._buffer.new_full((count,), -torch.inf), self._buffer.new_zeros(count)

        self._rows = empty_sums(self.m)
        self._cols = self._rows if self.symmetric else empty_sums(self.n) if return_cols else None
        self._return_cols = return_cols

    def forward(self, tile: Tensor, r0: int, rows: int, c0: int, cols: int) -> None:
        place = (r0, rows, c0, cols)
        with_cols = self._cols is not None and not (self.symmetric and r0 == c0)
        self._launch(
            kernels.tile_sums, place, tile, *self._shared(*place), self._row_part, self._row_slot,
            self._col_part, self._col_slot, COLS=with_cols,
        )  # fmt: skip
        row_top, row_total = (x[r0 : r0 + rows] for x in self._rows)
        col_top, col_total = (x[c0 : c0 + cols] for x in self._cols or self._rows)
        row_programs = -(-rows // ROWS)
        kernels.tile_merge[(row_programs + (-(-cols // ROWS) if with_cols else 0),)](
            row_top, row_total, self._row_part, self._row_slot, -(-cols // self._block.y), rows, row_programs,
            col_top, col_total, self._col_part, self._col_slot, -(-rows // self._block.x), cols, ROWS=ROWS,
        )  # fmt: skip

    def finish_forward(self) -> tuple[Tensor, Tensor]:
        def lse(sums: tuple[Tensor, Tensor]) -> Tensor:
            out = torch.empty_like(sums[0])
            kernels.tile_lse[(-(-len(out) // ROWS),)](out, *sums, len(out), ROWS=ROWS)
            return out

        columns = self._return_cols and not self.symmetric and self._cols is not None
        return lse(self._rows), lse(self._cols) if columns and self._cols else self._buffer.new_empty(0)

    def begin_backward(
        self, g: Tensor, h: Tensor | None, row: Tensor, col: Tensor | None, dbias: Tensor | None
    ) -> None:
        p = self.problem
        self._row_weights, self._col_weights = p.weights(row, col)
        if self.symmetric:  # G_ij + G_ji
            self._col_weights = self._row_weights
        self._dbias = dbias
        self._measure_upstream()

    def _measure_upstream(self) -> None:
        p = self.problem
        self._unit = self._buffer.new_empty(2)
        kernels.upstream_unit[(1,)](self._unit, p.scale, p.state, p.slots, H=p.h is not None, GAIN=p.gain)

    def backward(self, tile: Tensor, r0: int, rows: int, c0: int, cols: int) -> Tensor:
        place = (r0, rows, c0, cols)
        out = self._weights[: rows * cols].view(rows, cols) if len(self._weights) else tile
        with_cols = self._col_weights is not None
        c_weights = self._col_weights if self._col_weights is not None else self._row_weights
        self._launch(
            kernels.tile_weights, place, tile, out, *self._shared(*place), *self._row_weights, *c_weights,
            self._col_part, self._col_slot, C_TERM=with_cols, DBIAS=self._dbias is not None,
            GAIN=self.problem.gain,
        )  # fmt: skip
        if self._dbias is not None:
            blocks = -(-rows // self._block.x)
            part = self._col_part[: blocks * self._col_slot].view(blocks, self._col_slot)
            self._dbias[c0 : c0 + cols] += part[:, :cols].sum(0)
        return out

    def begin_bce(self, g: Tensor) -> None:
        self._measure_upstream()
        self._coef = g / self._unit[0]
        self._sums = self._buffer.new_zeros(3, self.m)
        blocks = -(-min(self.tile_cols, self.n) // self._block.y)
        self._part = self._buffer.new_empty(3 * blocks * self._row_slot)

    def bce(self, tile: Tensor, r0: int, rows: int, c0: int, cols: int) -> Tensor:
        place = (r0, rows, c0, cols)
        out = self._weights[: rows * cols].view(rows, cols) if len(self._weights) else tile
        shared = self._shared(*place)
        self._launch(kernels.tile_bce, place, tile, out, *shared, self._coef, self._part, self._row_slot)
        parts = self._part[: 3 * -(-cols // self._block.y) * self._row_slot].view(3, -1, self._row_slot)
        self._sums[:, r0 : r0 + rows] += parts[:, :, :rows].sum(1)
        return out

    def finish_bce(self) -> tuple[Tensor, Tensor, Tensor]:
        row, weight, moment = self._sums
        return row, weight, moment


@functools.lru_cache
def _adds_to_float32(device: torch.device) -> bool:
    """Whether this torch's addmm takes a float32 sum beside 16-bit factors; older ones do not."""
    x = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(x.float(), x, x, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def forward(
    a: Tensor, b: Tensor | None, scale: Tensor, bias: Tensor | None, a_ids: Tensor | None,
    b_ids: Tensor | None, same: bool, return_cols: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _blocked.forward(GpuTiles(a, b, scale, bias, a_ids, b_ids, same), return_cols)


def backward(
    g: Tensor, h: Tensor | None, a: Tensor, b: Tensor | None, scale: Tensor, bias: Tensor | None,
    a_ids: Tensor | None, b_ids: Tensor | None, row: Tensor, col: Tensor | None, same: bool,
    needs: tuple[bool, ...],
) -> _blocked.Gradients:  # fmt: skip
    if b is None and bias is None and h is not None:  # columns are rows again
        g, h = g + h, None
    tiles = GpuTiles(a, b, scale, bias, a_ids, b_ids, same, g, h)
    return _blocked.backward(tiles, g, h, row, col, needs)
