"""The processes of one call: what they agree on before it, and how rows travel between them.

gather   an all-gather brings every row here, a reduce-scatter takes gradients home: O(all rows) memory
ring     each process's rows visit all others, from neighbour to neighbour, while the process computes
         with those it holds; what they collect on the way comes home with them: O(own rows) memory
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sslfast.ops._backend import device_of

# torch 2.13 gave them new names
all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(
    dist, "reduce_scatter_tensor", None
)

PIECE_BYTES = 4 << 20  # of a shard, that go round at a time

_traffic = {"sent": 0}


class Ranks:
    """The processes of a call, and how many rows each has.

    Attributes:
        rank, size: this process's place among them, and how many there are.
        rows: for each of them how many images it has.
        ring: whether rows travel round, otherwise they are gathered.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        rows: Sequence[int],
        others: Sequence[int] = (),
        ring: bool = False,
        scaling: str = "ddp",
    ) -> None:
        self.group, self.rows, self.others, self.ring = group, list(rows), list(others), ring
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = len(self.rows)
        self.factor = self.size if scaling == "ddp" else 1

    @property
    def first(self) -> int:
        """The number of this process's first image among those of all."""
        return sum(self.rows[: self.rank])

    def images(self, x: Tensor) -> Tensor:
        """The numbers of this process's images, which are the rows of x, among those of all."""
        return torch.arange(self.first, self.first + len(x), device=x.device)

    def lengths(self, own: int) -> list[int]:
        """Of each process the rows of a tensor that here has `own`, as many for each image as there."""
        return [n * (own // self.rows[self.rank]) for n in self.rows]

    def count(self, own: int) -> int:
        """The same of all processes together."""
        return sum(self.lengths(own))

    def total(self, x: Tensor) -> Tensor:
        """The sum over processes of x, as a loss that all share: see `_Total`."""
        return x if self.size == 1 else _Total.apply(x, self)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over processes of x, which each goes on to use in terms of its own."""
        return x if self.size == 1 else _Sum.apply(x, self)

    def every(self, x: Tensor) -> Tensor:
        """[size, *x.shape]: x of every process, without a gradient."""
        if self.size == 1:
            return x[None]
        x = x.detach().contiguous()
        out = x.new_empty(self.size * x.numel())
        all_gather(out, x.view(-1), group=self.group)
        _count(x, self.size - 1)
        return out.view(self.size, *x.shape)

    def gathered(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """The rows of all processes, of which each has as many as `lengths` says, in order of their ranks."""
        most = max(lengths)
        own = x.detach().contiguous()
        if len(own) < most:
            own = torch.cat((own, own.new_zeros(most - len(own), *own.shape[1:])))
        out = own.new_empty(self.size * most, *own.shape[1:])
        all_gather(out, own, group=self.group)
        _count(own, self.size - 1)
        if min(lengths) == most:
            return out
        return torch.cat([part[:n] for part, n in zip(out.split(most), lengths, strict=True)])

    def scattered(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """The adjoint: sums over processes of x [sum(lengths), ...], of which each gets its own rows."""
        most = max(lengths)
        if min(lengths) == most:
            padded = x.contiguous()
        else:
            padded = x.new_zeros(self.size * most, *x.shape[1:])
            for k, part in enumerate(x.split(list(lengths))):
                padded[k * most : k * most + len(part)] = part
        out = x.new_empty(most, *x.shape[1:])
        reduce_scatter(out, padded, group=self.group)
        _count(out, self.size - 1)
        return out[: lengths[self.rank]]

    def visit(
        self,
        shard: Sequence[Tensor],
        work: Callable[[int, Sequence[Tensor]], Sequence[Tensor]],
        lengths: Sequence[int],
        carry: Sequence[tuple[tuple[int, ...], torch.dtype]] = (),
        merge: Callable[[Tensor, Tensor], Tensor] = torch.add,
        known: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """Shows every process's shard to every process, and brings home what they make of it.

        Args:
            shard: tensors with as many rows each: this process's part.
            work: (number of the part's first row among all, its tensors) -> for each of its rows what this
                process has to add, as tensors that `carry` describes.
            lengths: rows of each process.
            carry: (shape of a row, dtype) of each tensor that work returns.
            merge: what adds two of them up, torch.add or torch.logaddexp.
            known: tensors of the shard, from the first on, that were gathered before; a gather adds the
                others.

        Returns:
            What all processes have made of this one's shard.
        """
        shard = [x.contiguous() for x in shard]
        with device_of(shard[0]):
            if self.ring:
                return self._ring(shard, work, lengths, carry, merge)
            known = [] if known is None else known
            known += [self.gathered(x, lengths) for x in shard[len(known) :]]
            return self._gather(known, work, lengths, carry, merge)

    def _gather(self, everything, work, lengths, carry, merge) -> list[Tensor]:
        begins = [sum(lengths[:k]) for k in range(self.size + 1)]
        parts, sizes = [], []
        own, end = begins[self.rank], begins[self.rank + 1]
        for begin, stop in ((0, own), (own, end), (end, begins[-1])):
            if stop > begin:
                parts.append(work(begin, [x[begin:stop] for x in everything]))
                sizes.append(stop - begin)
        made = [torch.cat(x) for x in zip(*parts, strict=True)] if carry else []
        return [self._home(x, merge, lengths) for x in made]

    def _home(self, made: Tensor, merge: Callable, lengths: Sequence[int]) -> Tensor:
        if merge is torch.add:
            return self.scattered(made, lengths)
        top = made.clone()  # logarithms of sums: add up what they are logarithms of
        dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
        _count(top, 2 * (self.size - 1) / self.size)
        share = torch.where(top == -torch.inf, 0.0, (made - top).exp())
        begin = sum(lengths[: self.rank])
        return top[begin : begin + lengths[self.rank]] + self.scattered(share, lengths).log()

    def _ring(self, shard, work, lengths, carry, merge) -> list[Tensor]:
        """Shards go round in pieces, so that what is on its way takes little memory. At stage (p, k) piece p
        of process rank - k is here, while the next one comes in, and while what was made of the one before
        goes on: to the process that makes its own of the same piece now, or home after the last."""
        size, device = self.size, shard[0].device
        row_bytes = sum(math.prod(x.shape[1:]) * x.element_size() for x in shard)
        pieces = max(1, -(-max(lengths) * row_bytes // PIECE_BYTES))
        begins = [sum(lengths[:k]) for k in range(size)]

        def place(p: int, k: int) -> slice:
            rows = lengths[(self.rank - k) % size]
            return slice(rows * p // pieces, rows * (p + 1) // pieces)

        def empty(rows: slice) -> list[Tensor]:
            count = rows.stop - rows.start
            return [torch.empty(count, *shape, dtype=dtype, device=device) for shape, dtype in carry]

        stages = [(p, k) for p in range(pieces) for k in range(1, size)]
        held: list[Tensor] = []
        made: list[Tensor] = []  # at the stage before
        own: list[Tensor] = []
        for s in range(-1, len(stages) + 1):
            before, now, after = (stages[x] if 0 <= x < len(stages) else None for x in (s - 1, s, s + 1))
            posted, coming, received = _Posted(self), [], []  # type: ignore[var-annotated]
            if after:
                rows = place(*after)
                coming = [x.new_empty(rows.stop - rows.start, *x.shape[1:]) for x in shard]
                first = after[1] == 1
                posted.swap([x[place(after[0], 0)] for x in shard] if first else held, coming)
            home = before is not None and before[1] == size - 1
            if carry and before:
                received = empty(place(before[0], 0) if home else place(*now))  # type: ignore[misc]
                posted.swap(made, received)
            posted.start()
            if s < 0:
                own = list(work(begins[self.rank], shard))
            elif now:
                rows = place(*now)
                begin = begins[(self.rank - now[1]) % size] + rows.start
                made = list(work(begin, held)) if rows.stop > rows.start else empty(rows)
            posted.wait()
            if carry and before:
                if home:
                    for x, y in zip((x[place(before[0], 0)] for x in own), received, strict=True):
                        x.copy_(merge(x, y))
                else:
                    made = [merge(x, y) for x, y in zip(received, made, strict=True)]
            held = coming
        return own


class _Posted:
    """Sends to the right neighbour and receives from the left one, under way together."""

    def __init__(self, ranks: Ranks) -> None:
        assert ranks.group is not None
        self.group = ranks.group
        right, left = ((ranks.rank + step) % ranks.size for step in (1, -1))
        self.right, self.left = (dist.get_global_rank(self.group, x) for x in (right, left))
        self.operations: list[dist.P2POp] = []
        self.under_way: list[Any] = []

    def swap(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        for x in outgoing:
            if x.numel():
                self.operations.append(dist.P2POp(dist.isend, x.contiguous(), self.right, self.group))
                _count(x, 1)
        for x in incoming:
            if x.numel():
                self.operations.append(dist.P2POp(dist.irecv, x, self.left, self.group))

    def start(self) -> None:
        self.under_way = dist.batch_isend_irecv(self.operations) if self.operations else []

    def wait(self) -> None:
        for work in self.under_way:
            work.wait()


class _Total(torch.autograd.Function):
    """sum_r x_r, one loss that every process holds. Each process's backward pass starts from it with the same
    gradient; what flows into x_r is that gradient times `factor`: 1 where the processes' gradients are added
    up, their number where DistributedDataParallel averages them."""

    @staticmethod
    def forward(ctx, x, ranks):
        ctx.factor = ranks.factor
        return _all_reduced(x, ranks)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return _all_reduced(x, ranks)

    @staticmethod
    def backward(ctx, g):
        return _all_reduced(g, ctx.ranks), None


def _all_reduced(x: Tensor, ranks: Ranks) -> Tensor:
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=ranks.group)
    _count(x, 2 * (ranks.size - 1) / ranks.size)
    return x


def _count(x: Tensor, times: float) -> None:
    _traffic["sent"] += round(x.numel() * x.element_size() * times)


def bytes_sent() -> int:
    """Bytes of tensors that this process has sent to others in losses so far, a collective counted as its
    ring algorithm sends them."""
    return _traffic["sent"]


ALONE: Ranks = Ranks(None, [1])


def world() -> dist.ProcessGroup | None:
    """All processes as a group, where torch.distributed runs more than one; otherwise None."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD
