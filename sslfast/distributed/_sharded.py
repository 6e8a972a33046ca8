"""Sums over the rows of all processes, of which each has a part: the primitives of losses with a group.

For one process alone each function is the op it is named after. Row i of `a` belongs to this process, and so
do its result and its gradient; columns are those of all processes. The log-sum-exps of blocks of columns add
up, and with the whole row's in its place the backward pass of a block is that of the op:

    row = logaddexp over blocks of row_block        G_block = g exp(S_block - row)

What a block's columns get, gradients to b or log-sum-exps of columns, goes home with them. Where b is a
nothing has to: with the log-sum-exps and gradients of its rows a block gives G and its mirror image at once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sslfast.distributed._ranks import Ranks
from sslfast.ops import _backend
from sslfast.ops._check import autocast, scalar, working_dtype
from sslfast.ops._library import once_differentiable
from sslfast.ops.similarity_bce import reference as bce_reference
from sslfast.ops.similarity_bce import similarity_bce as local_bce
from sslfast.ops.similarity_lse import reference as lse_reference
from sslfast.ops.similarity_lse import similarity_lse as local_lse

Gradients = Sequence[Tensor | None]


def similarity_lse(
    ranks: Ranks,
    a: Tensor,
    b: Tensor | None = None,
    *,
    scale: Tensor | float,
    a_ids: Tensor | None = None,
    b_ids: Tensor | None = None,
    pairs: Any = "different",
    return_cols: bool = False,
    lengths: Sequence[int] | None = None,
) -> Any:
    """`sslfast.similarity_lse` of this process's rows a [m, D] and the columns b [n, D] of all processes.

    With return_cols, and a b, also [n]: of this process's columns over the rows of all. b=None: every row
    meets all rows of all processes but itself. lengths: rows of b on each process, where they are not the
    images.
    """
    if ranks.size == 1:
        return local_lse(a, b, scale=scale, a_ids=a_ids, b_ids=b_ids, pairs=pairs, return_cols=return_cols)
    a, b = autocast(a, b)
    backend = _backend.resolve("similarity_lse", a.device, a.dtype)
    ids = a_ids, a_ids if b is None else b_ids
    options = pairs == "same", return_cols, ranks, lengths, backend
    return _lse(a, b, scalar("scale", scale, a), *ids, *options)


@torch._disable_dynamo
def _lse(*args):
    return _SimilarityLSE.apply(*args)


class _SimilarityLSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, scale, a_ids, b_ids, same, return_cols, ranks, lengths, backend):
        columns = a if b is None else b
        lengths = ranks.lengths(len(columns)) if lengths is None else lengths
        own = sum(lengths[: ranks.rank])
        row = scale.new_full((len(a),), -torch.inf)

        def work(begin: int, block: Sequence[Tensor]) -> Sequence[Tensor]:
            nonlocal row
            alone = b is None and begin == own
            other, other_ids = (None, None) if alone else (block[0], block[1] if len(block) > 1 else None)
            part, col = _lse_block(backend, a, other, scale, a_ids, other_ids, same, return_cols)
            row = torch.logaddexp(row, part)
            return (col,) if return_cols else ()

        shard = [x for x in (columns, b_ids) if x is not None]
        carry = [((), scale.dtype)] if return_cols else []
        known: list[Tensor] = []
        with torch.autocast(a.device.type, enabled=False):
            col = next(iter(ranks.visit(shard, work, lengths, carry, torch.logaddexp, known)), None)
        ctx.save_for_backward(a, b, scale, a_ids, b_ids, row, col, *known)
        ctx.set_materialize_grads(False)
        ctx.same, ctx.ranks, ctx.lengths, ctx.own, ctx.backend = same, ranks, lengths, own, backend
        return (row, col) if return_cols else row

    @staticmethod
    @once_differentiable
    def backward(ctx, g, h=None):
        if g is None and h is None:
            return (None,) * 10
        a, b, scale, a_ids, b_ids, row, col, *known = ctx.saved_tensors
        need_a, need_b, need_scale = ctx.needs_input_grad[:3]
        g = torch.zeros_like(row) if g is None else g.contiguous()
        alike = b is None  # S is symmetric: with its row's log-sum-exp and gradient a column is a row again
        columns, own = (a, ctx.own) if alike else (b, None)
        h = torch.zeros_like(col) if h is None and col is not None else h
        ids, top, slope = (a_ids, row, g) if alike else (b_ids, col, h)
        along = [ids, None if top is None or slope is None else torch.stack((top, slope), 1)]
        da = torch.zeros_like(a, dtype=scale.dtype) if need_a else None
        dscale = torch.zeros_like(scale) if need_scale else None

        def work(begin: int, block: Sequence[Tensor]) -> Sequence[Tensor]:
            rest = iter(block[1:])
            ids, pair = (None if x is None else next(rest) for x in along)
            top, slope = (None, None) if pair is None else pair.unbind(1)
            other: Tensor | None = block[0]
            if begin == own:  # G + G^T all the same
                other = ids = top = slope = None
            found = _lse_block_backward(
                ctx.backend, g, slope, a, other, scale, a_ids, ids, row, top, ctx.same,
                (need_a, need_b, need_scale, False),
            )  # fmt: skip
            _add(da, found[0])
            # Of two processes' rows both have the sum over (G + G^T) S; of its own each has the one over G S.
            _add(dscale, found[2], 0.5 if alike and other is not None else 1.0)
            return [_wide(found[1], block[0], scale.dtype)] if need_b else ()

        shard = [x for x in (columns, *along) if x is not None]
        carry = [(tuple(a.shape[1:]), scale.dtype)] if need_b else []
        with torch.autocast(a.device.type, enabled=False):
            db = next(iter(ctx.ranks.visit(shard, work, ctx.lengths, carry, known=known)), None)
        cast = (None if x is None else x.to(columns.dtype) for x in (da, db))
        return *cast, dscale, *(None,) * 7


def _lse_block(backend: str, a, b, scale, a_ids, b_ids, same: bool, return_cols: bool):
    if backend == "reference":
        found = lse_reference(a, b, scale, None, a_ids, b_ids, same, return_cols)
        return found if isinstance(found, tuple) else (found, None)
    serve = _backend.implementation("similarity_lse", backend).forward
    return serve(a, b, scale, None, a_ids, b_ids, same, return_cols, False)[:2]


def _lse_block_backward(backend: str, g, h, a, b, scale, a_ids, b_ids, row, col, same, needs) -> Gradients:
    """Gradients to (a, b, scale, bias) of a block of rows and columns that reach beyond it, as their
    log-sum-exps `row` and `col` do."""
    if backend != "reference":
        serve = _backend.implementation("similarity_lse", backend).backward
        assert serve is not None
        return serve(g, h, a, b, scale, None, a_ids, b_ids, row, col, same, needs)
    return _by_autograd(
        lambda a, b, scale: lse_reference(a, b, scale, None, a_ids, b_ids, same, h is not None),
        (a, b, scale),
        lambda part: [_share(g, part[0], row)] + ([_share(h, part[1], col)] if h is not None else []),
        needs,
    )


def _share(g: Tensor, part: Tensor, whole: Tensor) -> Tensor:
    """g exp(part - whole): a block's log-sum-exp gets that much of the whole one's gradient."""
    return torch.where(part == -torch.inf, 0.0, g * (part - whole).exp())


def similarity_bce(
    ranks: Ranks,
    a: Tensor,
    b: Tensor,
    *,
    scale: Tensor,
    bias: Tensor,
    a_ids: Tensor | None = None,
    b_ids: Tensor | None = None,
    total: bool = False,
) -> Tensor:
    """`similarity_bce` of this process's rows a [n, D] and the columns b [n, D] of all processes.

    With total the gradients of the columns go home in the forward pass already; every process has to use the
    sum in the same way then, as `Ranks.total` does.
    """
    if ranks.size == 1:
        return local_bce(a, b, scale=scale, bias=bias, a_ids=a_ids, b_ids=b_ids, total=total)
    a, b = autocast(a, b)  # type: ignore[assignment]
    if a_ids is None or b_ids is None:
        a_ids = b_ids = ranks.images(a)
    backend = _backend.resolve("similarity_bce", a.device, a.dtype)
    return _bce(a, b, scale, bias, a_ids, b_ids, total, torch.is_grad_enabled(), ranks, backend)


@torch._disable_dynamo
def _bce(*args):
    return _SimilarityBCE.apply(*args)


class _SimilarityBCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, scale, bias, a_ids, b_ids, total, trains, ranks, backend):
        ctx.total, ctx.ranks, ctx.backend = total, ranks, backend
        inputs = a, b, scale, bias, a_ids, b_ids
        needs = ctx.needs_input_grad[:4] if total and trains else (False,) * 4
        row, gradients = _bce_pass(scale.new_ones(len(a)), *inputs, needs, ranks, backend)
        ctx.kept = [d is not None for d in gradients]
        ctx.save_for_backward(*inputs, *(d for d in gradients if d is not None))
        return row.sum() if total else row

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        needs, inputs = ctx.needs_input_grad[:4], ctx.saved_tensors[:6]
        if ctx.total:
            kept = iter(ctx.saved_tensors[6:])
            found: Gradients = [next(kept) * g if there else None for there in ctx.kept]
        else:
            a, b, scale, bias, a_ids, b_ids = inputs
            own = g.contiguous(), a, b, scale, bias, a_ids, b_ids
            _, found = _bce_pass(*own, needs, ctx.ranks, ctx.backend)
        cast = (None if d is None else d.to(x.dtype) for d, x in zip(found, inputs, strict=False))
        return *cast, *(None,) * 6


def _bce_pass(
    g, a, b, scale, bias, a_ids, b_ids, needs, ranks: Ranks, backend: str
) -> tuple[Tensor, Gradients]:
    """Row sums and gradients to (a, b, scale, bias), of one walk over the columns of all processes."""
    row = torch.zeros_like(g)
    sums = [
        torch.zeros_like(x, dtype=scale.dtype) if need else None
        for x, need in zip((a, None, scale, bias), (needs[0], False, *needs[2:]), strict=True)
    ]  # fmt: skip

    def work(begin: int, block: Sequence[Tensor]) -> Sequence[Tensor]:
        other, ids = block
        if backend == "reference":
            part = bce_reference(a, other, scale, bias, a_ids, ids)
            found = _by_autograd(
                lambda a, b, scale, bias: bce_reference(a, b, scale, bias, a_ids, ids),
                (a, other, scale, bias), lambda _: [g], needs,
            )  # fmt: skip
        else:
            serve = _backend.implementation("similarity_bce", backend).forward
            with _backend.device_of(a):
                part, found = serve(g, a, other, scale, bias, a_ids, ids, needs)
        row.add_(part)
        for total, d in zip(sums, found, strict=True):
            _add(total, d)
        return [_wide(found[1], other, scale.dtype)] if needs[1] else ()

    carry = [(tuple(b.shape[1:]), scale.dtype)] if needs[1] else []
    with torch.autocast(a.device.type, enabled=False):
        sums[1] = next(iter(ranks.visit([b, b_ids], work, ranks.lengths(len(b)), carry)), None)
    return row, sums


def sums_by_id(ranks: Ranks, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of x [n, D], the sum of the rows of its id on all processes [n, D] in the working dtype,
    and how many they are [n]."""
    return _SumsById.apply(x, ids, ranks)


class _SumsById(torch.autograd.Function):
    @staticmethod
    @torch._disable_dynamo
    def forward(ctx, x, ids, ranks):
        ordered = ids.sort().values  # where equal ids stand in it, the first place serves them all
        sums = torch.zeros(x.shape, dtype=working_dtype(x), device=x.device)
        size = torch.zeros_like(ids)

        def work(begin: int, block: Sequence[Tensor]) -> Sequence[Tensor]:
            place, known = _places(ordered, block[1])
            _scatter_add(sums, place, block[0].to(sums.dtype).masked_fill(~known[:, None], 0.0))
            size.index_add_(0, place, known.long())
            return ()

        lengths = ranks.lengths(len(x))
        ranks.visit([x, ids], work, lengths)
        ctx.save_for_backward(x, ids, ordered)
        ctx.ranks, ctx.lengths = ranks, lengths
        group = torch.searchsorted(ordered, ids)
        ctx.mark_non_differentiable(size)
        return sums[group], size[group]

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        x, ids, ordered = ctx.saved_tensors
        slope = _scatter_add(torch.zeros_like(g), torch.searchsorted(ordered, ids), g)

        def work(begin: int, block: Sequence[Tensor]) -> Sequence[Tensor]:
            place, known = _places(ordered, block[0])
            return [slope[place].masked_fill(~known[:, None], 0.0)]

        (dx,) = ctx.ranks.visit([ids], work, ctx.lengths, [(tuple(g.shape[1:]), g.dtype)])
        return dx.to(x.dtype), None, None


def _places(ordered: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of each id its first place in `ordered`, and whether it is there at all."""
    place = torch.searchsorted(ordered, ids).clamp_(max=len(ordered) - 1)
    return place, ordered[place] == ids


def _scatter_add(total: Tensor, place: Tensor, x: Tensor) -> Tensor:
    """total[place] += x, deterministic on a GPU too."""
    return total.index_put_((place,), x, accumulate=True) if x.is_cuda else total.index_add_(0, place, x)


Choose = Callable[[int, Sequence[Tensor]], Sequence[tuple[Tensor, Tensor]]]


def best_rows(ranks: Ranks, x: Tensor, others: Sequence[Tensor], choose: Choose, count: int) -> list[Tensor]:
    """The rows of all processes that suit each of this process's best.

    Args:
        x: [n, D] floating; others: further tensors of n rows, which travel with it.
        choose: (number of the block's first row among all, (x, *others) of the block) -> `count` times
            (score [n], index of the block's row that has it [n]), without a gradient.

    Returns:
        `count` times the rows [n, D] with the highest scores, differentiable in x, then the scores [n].
    """
    return list(_BestRows.apply(x, list(others), choose, count, ranks))


class _BestRows(torch.autograd.Function):
    @staticmethod
    @torch._disable_dynamo
    def forward(ctx, x, others, choose, count, ranks):
        lengths = ranks.lengths(len(x))
        best = [torch.zeros_like(x) for _ in range(count)]
        scores = [x.new_full((len(x),), -torch.inf) for _ in range(count)]
        places = [torch.zeros(len(x), dtype=torch.int64, device=x.device) for _ in range(count)]

        def work(begin: int, block: Sequence[Tensor]) -> Sequence[Tensor]:
            for k, (score, index) in enumerate(choose(begin, block)):
                index = begin + index
                better = (score > scores[k]) | ((score == scores[k]) & (index < places[k]))
                scores[k] = torch.where(better, score, scores[k])
                places[k] = torch.where(better, index, places[k])
                best[k] = torch.where(better[:, None], block[0][index - begin], best[k])
            return ()

        ranks.visit([x, *others], work, lengths)
        ctx.save_for_backward(x, *places)
        ctx.ranks, ctx.lengths = ranks, lengths
        ctx.mark_non_differentiable(*scores)
        return *best, *scores

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        x, *places = ctx.saved_tensors

        def work(begin: int, block: Sequence[Tensor]) -> Sequence[Tensor]:
            out = x.new_zeros(len(block[0]), x.shape[1])
            for place, g in zip(places, gradients, strict=False):
                inside = (place >= begin) & (place < begin + len(out))
                place = (place - begin).clamp(0, len(out) - 1)
                _scatter_add(out, place, g.masked_fill(~inside[:, None], 0.0))
            return [out]

        token = x.new_empty(len(x), 1)
        (dx,) = ctx.ranks.visit([token], work, ctx.lengths, [(tuple(x.shape[1:]), x.dtype)])
        return dx, *(None,) * 4


def gathered(ranks: Ranks, x: Tensor) -> Tensor:
    """The rows of all processes in order of their ranks; a row's gradient is the sum of all processes'."""
    return x if ranks.size == 1 else _Gathered.apply(x, ranks)


class _Gathered(torch.autograd.Function):
    @staticmethod
    @torch._disable_dynamo
    def forward(ctx, x, ranks):
        ctx.ranks, ctx.lengths = ranks, ranks.lengths(len(x))
        return ranks.gathered(x, ctx.lengths)

    @staticmethod
    def backward(ctx, g):
        return ctx.ranks.scattered(g, ctx.lengths), None


def _by_autograd(function: Callable, inputs: Sequence[Tensor | None], slopes: Callable, needs) -> Gradients:
    """Gradients of plain PyTorch to `inputs` in the working dtype; slopes: of results, given these."""
    if not any(needs):
        return [None] * len(needs)
    with torch.enable_grad():
        wide = [None if x is None else x.detach().to(working_dtype(x)).requires_grad_() for x in inputs]
        out = function(*wide)
        out = out if isinstance(out, tuple) else (out,)
        asked = [x for x, need in zip(wide, needs, strict=False) if need and x is not None]
        found = iter(torch.autograd.grad(out, asked, slopes(out), allow_unused=True))
    both = zip(wide, needs, strict=False)
    gradients = [next(found) if need and x is not None else None for x, need in both]
    return [*gradients, None][: len(needs)]


def _add(total: Tensor | None, x: Tensor | None, times: float = 1.0) -> None:
    if total is not None and x is not None:
        total.add_(x, alpha=times)


def _wide(x: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(like, dtype=dtype) if x is None else x.to(dtype)
