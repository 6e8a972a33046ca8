"""The flash driver of `similarity_lse`: sizes, buffers and launches of kernels/similarity_lse.py."""

from typing import Any

import torch
from torch import Tensor

from sslfast.kernels import similarity_lse as kernels
from sslfast.kernels import similarity_lse_rows as row_kernels
from sslfast.kernels import tuning
from sslfast.ops import _backend

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

SLOTS, GROUP = row_kernels.SLOTS.value, row_kernels.GROUP.value
MERGE_ROWS = 128
MAX_SPANS = 32  # partial sums per row at most


class Side:
    """Rows of one side; `packed` as the flash kernels read them: [padded, width], zeros around [rows,
    dim]."""

    def __init__(self, x: Tensor, ids: Tensor | None, width: int | None) -> None:
        self.x, self.rows = x, x.shape[0]
        self.padded = -(-self.rows // tuning.PADDING) * tuning.PADDING
        self.ids = None if ids is None else ids.contiguous()
        self.ranges = None if ids is None else ids.new_empty(2, self.padded // GROUP)
        self.copy = width is not None and (
            x.shape != (self.padded, width) or not x.is_contiguous() or x.is_neg()
        )
        if not self.copy and width is not None:
            self.copy = _backend.pointer("x", x, x.dtype, (self.padded, width), x.device) % 16 != 0
        self.packed = x.new_empty(self.padded, width or 0) if self.copy else x


class Problem:
    """One call, measured: bound of the logits, ranges of ids, upstream gradients; and packed, unless `tiled`.

    Args:
        a, b: [m, D], [n, D] of one 16-bit or 32-bit floating dtype; b None for self-similarity.
        scale: 0-d float32, bias: [n] or None; a_ids [m], b_ids [n] int64 or None; same: keep equal ids only.
        g, h: [m], [n] float32 upstream gradients or None.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor | None,
        scale: Tensor,
        bias: Tensor | None,
        a_ids: Tensor | None,
        b_ids: Tensor | None,
        same: bool,
        g: Tensor | None = None,
        h: Tensor | None = None,
        tiled: bool = False,
    ) -> None:
        self.dim, self.width = a.shape[1], a.shape[1] if tiled else tuning.padded_dim(a.shape[1])
        packed_width = None if tiled else self.width
        self.two = b is not None or bias is not None  # S is not symmetric
        self.a = Side(a, a_ids, packed_width)
        self.b = (
            Side(a if b is None else b, a_ids if b is None else b_ids, packed_width) if self.two else self.a
        )
        self.scale, self.bias, self.g, self.h = scale, bias, g, h
        self.device, self.sms = a.device, tuning.multiprocessors(a.device)
        self.slots = min(SLOTS, max(self.a.padded, self.b.padded) // GROUP)
        self.state = scale.new_empty(6, SLOTS)
        self.offset = None if bias is None else scale.new_empty(self.b.padded)
        self.gain = 14 if a.dtype == torch.float16 else 0  # log2 of what keeps small weights normal numbers
        self.masks = {"SELF": b is None, "IDS": a_ids is not None, "SAME": same}
        self.common = {
            "D": self.width, "PRECISION": tuning.precision(a.dtype), "BIASED": bias is not None,
            "TWO": self.two
        }  # fmt: skip
        self._pack()

    def or_state(self, x: Tensor | None) -> Tensor:
        return self.state if x is None else x  # an address that is never used

    def _pack(self) -> None:
        sides: list[Any] = []
        for side, g in ((self.a, self.g), (self.b, self.h)):
            sides += [
                side.x, *side.x.stride(), side.packed, side.rows, side.padded, self.or_state(side.ids),
                self.or_state(side.ranges), self.or_state(g), 0 if g is None else g.stride(0),
            ]  # fmt: skip
        bias = self.or_state(self.bias)
        row_kernels.pack[(self.slots, 1 + self.two)](
            *sides, bias, 0 if self.bias is None else bias.stride(0), self.or_state(self.offset), self.state,
            self.dim, self.width, A_COPY=self.a.copy, B_COPY=self.b.copy, IDS=self.masks["IDS"],
            G=self.g is not None, H=self.h is not None, BIASED=self.bias is not None,
            D=min(tuning.padded_dim(self.dim), 64), num_warps=8,
        )  # fmt: skip

    def _pair(self, x: Side, y: Side) -> tuple[Any, ...]:
        """The arguments with which every kernel of tiles begins."""
        return (
            x.packed, y.packed, x.rows, y.rows, x.padded, y.padded, *map(self.or_state, (x.ids, y.ids)),
            *map(self.or_state, (x.ranges, y.ranges)), self.or_state(self.offset), self.scale, self.state,
            self.slots,
        )  # fmt: skip

    def _tile(self, variant: str) -> tuple[tuning.Tile, dict[str, Any]]:
        tile = tuning.tile(variant, self.width, self.a.x.dtype, self.device)
        shape = {"X": tile.x, "Y": tile.y, "num_warps": tile.warps, "num_stages": tile.stages}
        return tile, {**shape, "AHEAD": tile.ahead} if variant == "grad" else shape

    def forward(self, return_cols: bool, expect: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Row log-sum-exps [m], column log-sum-exps [n] (or [0]), sum_j p_ij b_j [m, D] (or [0]), float32."""
        mirrored = return_cols and not self.two
        both = return_cols and self.two
        small = self.a.rows * self.b.rows <= tuning.SMALL
        sums: tuple[Any, ...] = (None, None) if small or expect else self._sums(both)
        row, mean = self._merge(
            self.a, sums[0], self._attend(self.a, self.b, small or expect, expect), expect
        )
        col = row.new_empty(0)
        if both:
            col, _ = self._merge(self.b, sums[1], self._attend(self.b, self.a, small, False), False)
        return row, row.clone() if mirrored else col, mean

    def _sums(self, both: bool) -> tuple[Tensor, Tensor | None]:
        """Partial sums of the safe range, [slots, padded], for rows and for columns."""
        tile, shape = self._tile("sums")
        a, b = self.a, self.b
        a_span, a_spans = _spans(a.padded, MAX_SPANS)
        b_span, b_spans = _spans(b.padded, MAX_SPANS)
        if self.two:
            programs = a_spans * b_spans
            own = self.state.new_empty(b_spans, a.padded)
            streamed = self.state.new_empty(a_spans, b.padded) if both else None
        else:  # super-block k: own sums with super-blocks 0 .. k, streamed ones with k .. end, a slot later
            programs = a_spans * (a_spans + 1) // 2
            own = self.state.new_empty(a_spans + 1, a.padded)
            streamed = own[1:]
        kernels.sums[(programs,)](
            *self._pair(a, b), own, self.or_state(streamed), a_span, b_span, a_spans, UPPER=not self.two,
            BOTH=streamed is not None, **self.masks, **self.common, **shape,
        )  # fmt: skip
        return own, streamed

    def _attend(self, x: Side, y: Side, always: bool, expect: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        tile, shape = self._tile("expect" if expect else "attend")
        blocks = x.padded // tile.x
        span, spans = _spans(y.padded, -(-2 * self.sms // blocks))
        top, total = self.state.new_empty(2, spans, x.padded)
        mean = self.state.new_empty(spans, x.padded, self.width) if expect else None
        common = {**self.common, "BIASED": self.bias is not None and y is self.b}
        kernels.attend[(blocks, spans)](
            *self._pair(x, y), top, total, self.or_state(mean), span, ALWAYS=always, MEAN=expect,
            GAIN=self.gain, **self.masks, **common, **shape,
        )  # fmt: skip
        return top, total, mean

    def _merge(
        self, x: Side, sums: Tensor | None, attended: tuple[Tensor, Tensor, Tensor | None], expect: bool
    ) -> tuple[Tensor, Tensor]:
        top, total, mean = attended
        out = self.state.new_empty(x.rows)
        mean_out = self.state.new_empty((x.rows, self.dim) if expect else 0)
        rows = 16 if expect else MERGE_ROWS
        row_kernels.merge[(-(-x.rows // rows),)](
            out, x.rows, x.padded, self.or_state(sums), 0 if sums is None else len(sums), top, total,
            self.or_state(mean), len(top), mean_out, self.or_state(self.offset), self.scale, self.state,
            self.slots, self.dim, TWO=self.two, SUMS=sums is not None, MEAN=expect,
            BIASED=self.bias is not None and x is self.b and self.b is not self.a, ROWS=rows, D=self.width,
        )  # fmt: skip
        return out, mean_out

    def weights(self, row: Tensor, col: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Coefficients and log-sum-exps of rows and columns, [2, padded], that make up G; None without h."""
        row = row.contiguous()
        col = row if col is None else col.contiguous()
        a_weights = self.state.new_empty(2, self.a.padded)
        b_weights = self.state.new_empty(2, self.b.padded) if self.h is not None else a_weights
        g, h = self.or_state(self.g), self.or_state(self.h)
        row_kernels.weights[(max(self.a.padded, self.b.padded) // MERGE_ROWS, 1 + self.two)](
            g, g.stride(0), row, self.a.rows, self.a.padded, *a_weights, h, h.stride(0), col, self.b.rows,
            self.b.padded, *b_weights, self.scale, self.state, self.slots, TWO=self.two, H=self.h is not None,
            ROWS=MERGE_ROWS,
        )  # fmt: skip
        return a_weights, None if self.h is None else b_weights

    def backward(self, row: Tensor, col: Tensor | None, needs: tuple[bool, ...]) -> Gradients:
        """Gradients to (a, b, scale, bias), those that `needs` asks for."""
        need_a, need_b, need_scale, need_bias = needs
        a_weights, b_weights = self.weights(row, col)
        da: Tensor | None = None
        db: Tensor | None = None
        dscale: Tensor | None = None
        dbias: Tensor | None = None
        if not self.two:
            da, dscale, _ = self._grad(self.a, self.a, a_weights, a_weights, need_scale, False)
            return da if need_a else None, None, None if dscale is None else dscale / 2, None
        by_bias = self.masks["SELF"]  # a meets itself under a bias: both of its gradients add up
        if need_a or need_scale:
            da, dscale, _ = self._grad(self.a, self.b, a_weights, b_weights, need_scale, False)
        if need_b or need_bias or (by_bias and need_a):
            db, _, dbias = self._grad(self.b, self.a, b_weights, a_weights, False, need_bias)
        if by_bias:
            da, db = None if da is None or db is None else da + db, None
        return da if need_a else None, db if need_b else None, dscale, dbias

    def _grad(
        self, x: Side, y: Side, x_weights: Tensor | None, y_weights: Tensor | None, scale: bool, bias: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients to x's rows, to the scale and to the bias (of x's rows)."""
        tile, shape = self._tile("grad")
        blocks = x.padded // tile.x
        span, spans = _spans(y.padded, -(-2 * self.sms // blocks))
        adds_up = self.two and self.masks["SELF"]  # with the gradient of the other side
        dtype = x.x.dtype if spans == 1 and not adds_up else torch.float32
        dx = self.state.new_empty(spans, x.rows, self.dim, dtype=dtype)
        dscale = self.state.new_empty(spans, x.rows) if scale else None
        dbias = self.state.new_empty(spans, x.rows) if bias else None
        common = {k: v for k, v in self.common.items() if k != "BIASED"}
        biased = self.bias is not None
        kernels.grad[(blocks, spans)](
            *self._pair(x, y), *self._weights(x_weights), *self._weights(y_weights), dx,
            self.or_state(dscale), self.or_state(dbias), self.dim, span, H=self.h is not None,
            X_TERM=x_weights is not None, Y_TERM=y_weights is not None, X_BIASED=biased and x is self.b,
            Y_BIASED=biased and y is self.b, DSCALE=scale, DBIAS=bias,
            GAIN=self.gain, **self.masks, **common, **shape,
        )  # fmt: skip
        return (
            dx[0] if spans == 1 else dx.sum(0),
            None if dscale is None else dscale.sum(dtype=torch.float64).float(),
            None if dbias is None else dbias.sum(0),
        )

    def _weights(self, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        return (self.state, self.state) if weights is None else (weights[0], weights[1])


def _spans(padded: int, most: int) -> tuple[int, int]:
    """Rows per span, a multiple of the padding, and the number of spans, at most `most` and MAX_SPANS."""
    blocks = padded // tuning.PADDING
    span = -(-blocks // max(1, min(most, MAX_SPANS, blocks)))
    return span * tuning.PADDING, -(-blocks // span)


def forward(
    a: Tensor, b: Tensor | None, scale: Tensor, bias: Tensor | None, a_ids: Tensor | None,
    b_ids: Tensor | None, same: bool, return_cols: bool, expect: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return Problem(a, b, scale, bias, a_ids, b_ids, same).forward(return_cols, expect)


def backward(
    g: Tensor, h: Tensor | None, a: Tensor, b: Tensor | None, scale: Tensor, bias: Tensor | None,
    a_ids: Tensor | None, b_ids: Tensor | None, row: Tensor, col: Tensor | None, same: bool,
    needs: tuple[bool, ...],
) -> Gradients:  # fmt: skip
    if b is None and bias is None and h is not None:  # columns are rows again
        g, h = g + h, None
    return Problem(a, b, scale, bias, a_ids, b_ids, same, g, h).backward(row, col, needs)
