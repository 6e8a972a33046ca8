"""Triplet margin loss (Schroff et al. 2015, Hermans et al. 2017), mined in chunks of rows.

    loss of (anchor a, positive p, negative n)  =  max(0, d_ap - d_an + margin),    d_xy = |x - y|

The matrix of distances never exists as a whole. Each chunk leaves, instead of triplets, the number K_ij of
those in which a distance takes part, counted up for positives and down for negatives. These are whole
numbers, so sums over them are exact and the gradient is deterministic:

    d loss / d x_i  =  sum_j (g_i K_ij + g_j K_ji) (x_i - x_j) / d_ij
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sslfast.distributed import _sharded as sharded
from sslfast.distributed._join import Group, collective, join
from sslfast.distributed._ranks import ALONE, Ranks
from sslfast.losses._common import groups_of, rows_at
from sslfast.ops._check import FLOATS, check_choice, check_tensor, number, working_dtype
from sslfast.ops._library import define, once_differentiable
from sslfast.ops.hardest_pairs import hardest_pairs
from sslfast.ops.pair_rows import EPS

MININGS = ("hard", "semihard", "all")
REDUCTIONS = ("mean", "mean_nonzero", "sum", "none")
CHUNK = 1 << 20  # distances at a time


@collective
def triplet_margin_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float = 0.05,
    *,
    mining: str = "hard",
    normalize: bool = True,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    scaling: str = "ddp",
) -> Tensor:
    """Triplet margin loss on Euclidean distances, in memory linear in the batch.

    Args:
        embeddings: [N, D] floating.
        labels: int64 [N], any numbers.
        margin: number.
        mining: "hard": for each anchor its farthest positive and its nearest negative (batch hard).
            "semihard": for each anchor and positive the nearest of the negatives farther away than it.
            "all": every triplet.
        normalize: rows are brought to unit length (norms in float32).
        reduction: "mean" over the triplets, "mean_nonzero" over those with a loss above 0, "sum", or "none":
            [N], the sum of each anchor's triplets.
        group, strategy, scaling: processes from whose rows triplets are made; see `sslfast.distributed`. Only
            "hard" can go round in a ring; the others sort the distances of a row to all at once.

    Returns:
        float32 (float64 for float64 input). 0 where there is no triplet, be it that all labels are the same,
        or all distinct. No gradient where a distance is 0.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.
    """
    check_tensor("embeddings", embeddings, FLOATS, (None, None))
    check_tensor("labels", labels, (torch.int64,), (len(embeddings),), embeddings)
    number("margin", margin)
    check_choice("mining", mining, MININGS)
    check_choice("reduction", reduction, REDUCTIONS)
    if strategy == "ring" and mining != "hard":
        raise ValueError(f"strategy: expected 'auto' or 'gather' for mining={mining!r}, got 'ring'")
    ranks = join(group, strategy, scaling, "embeddings", len(embeddings))
    with torch.autocast(embeddings.device.type, enabled=False):
        x = embeddings.to(working_dtype(embeddings))
        x = F.normalize(x, dim=1, eps=EPS) if normalize else x
        # no distance changes by it, and of rows that are alike no digits cancel
        x = x - (x.detach().mean(0) if ranks is ALONE else ranks.sum(x.detach().sum(0)) / ranks.count(len(x)))
        if mining == "hard":
            loss, count = _batch_hard(x, labels, float(margin), ranks)
            active = loss > 0
        else:
            everything = sharded.gathered(ranks, x), sharded.gathered(ranks, labels)
            anchors = ranks.first, ranks.first + len(x)
            loss, count, active = _Triplets.apply(*everything, *anchors, float(margin), mining == "all")
        loss = loss + 0 * x.detach().sum()  # a NaN, which comparisons would pass over
    if reduction == "none":
        return loss
    total = ranks.total(loss.sum())
    if reduction == "sum":
        return total
    return total / ranks.sum((count if reduction == "mean" else active).sum()).clamp(min=1)


def _batch_hard(x: Tensor, labels: Tensor, margin: float, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Loss of each anchor, and whether it has a triplet."""
    if ranks is not ALONE:
        return _hard_of_all(x, labels, margin, ranks)
    group, size = groups_of(labels)
    some = (size > 1) & (size < len(x))
    far, near = hardest_pairs(x, group)
    far, near = (_norm(x - rows_at(x, index)) for index in (far, near))
    return torch.relu(far - near + margin).masked_fill(~some, 0.0), some


def _hard_of_all(x: Tensor, labels: Tensor, margin: float, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The same with the rows of all processes."""
    own = x.detach()

    def choose(begin: int, block: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        others, classes = block
        offset, found = -0.5 * others.square().sum(1), []
        step = max(1, CHUNK // len(others))
        for i, rows in enumerate(own.split(step)):
            score = torch.addmm(offset, rows, others.T)  # the larger, the nearer
            same = labels[i * step : i * step + len(rows), None] == classes
            near = score.masked_fill(same, -torch.inf).max(1)
            if begin == ranks.first:
                same.diagonal(i * step).fill_(False)
            far = score.neg_().masked_fill_(~same, -torch.inf).max(1)
            found.append((*far, *near))
        joined = [torch.cat(parts) for parts in zip(*found, strict=True)]
        return [(joined[0], joined[1]), (joined[2], joined[3])]

    far, near, far_score, near_score = sharded.best_rows(ranks, x, [labels], choose, 2)
    some = (far_score > -torch.inf) & (near_score > -torch.inf)
    return torch.relu(_norm(x - far) - _norm(x - near) + margin).masked_fill(~some, 0.0), some


def _norm(x: Tensor) -> Tensor:
    """Lengths of rows, with zero gradient at 0."""
    square = x.square().sum(1)
    zero = square == 0
    return square.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def _chunks(x: Tensor, labels: Tensor, first: int, end: int):
    """(rows of first to end, their squared distances to all rows [R, N], which of them are of the same
    label)"""
    squares = x.square().sum(1)
    step = max(1, CHUNK // max(1, len(x)))
    for begin in range(first, end, step):
        rows = slice(begin, min(begin + step, end))
        square = torch.addmm(squares, x[rows], x.T, alpha=-2).add_(squares[rows, None])
        yield rows, square, labels[rows, None] == labels


def _distances(x: Tensor, labels: Tensor, first: int, end: int):
    """Of each chunk: (rows, distances, which are positives, which are negatives, the latter's distances in
    order, that order, how many they are)"""
    for rows, square, same in _chunks(x, labels, first, end):
        distance = square.clamp_(min=0).sqrt_()
        ordered, order = distance.masked_fill(same, torch.inf).sort(1)
        negative = ~same
        same.diagonal(rows.start).fill_(False)
        yield rows, distance, same, negative, ordered, order, negative.sum(1, keepdim=True)


def _partner(distance: Tensor, positive: Tensor, ordered: Tensor, count: Tensor, margin: float):
    """For each positive the place in `ordered` of its semi-hard negative, whether there is one, the loss."""
    place = torch.searchsorted(ordered, distance, right=True)
    some = positive & (place < count)
    place = place.clamp_(max=ordered.shape[1] - 1)
    return place, some, torch.relu(distance - ordered.gather(1, place) + margin).masked_fill_(~some, 0.0)


def _count(distance: Tensor, positive: Tensor, ordered: Tensor, count: Tensor, margin: float):
    """Of all triplets those with a loss, counted: for each positive its negatives, for each row the positives
    that lose against it. And the positives' distances plus the margin."""
    reach = distance + margin
    nearer = torch.searchsorted(ordered, reach).minimum(count).masked_fill_(~positive, 0)
    farthest = reach.masked_fill(~positive, -torch.inf).sort(1).values
    return reach, nearer, distance.shape[1] - torch.searchsorted(farthest, distance, right=True)


def _sum_triplets(
    x: Tensor, labels: Tensor, first: int, end: int, margin: float, every: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each anchor from first to end: sum of losses, number of triplets, of those with a loss above 0."""
    loss = x.new_zeros(end - first)
    triplets, active = labels.new_zeros(end - first), labels.new_zeros(end - first)
    with torch.autocast(x.device.type, enabled=False):
        for rows, distance, positive, negative, ordered, _, count in _distances(x, labels, first, end):
            own = slice(rows.start - first, rows.stop - first)
            if every:
                reach, nearer, pushed = _count(distance, positive, ordered, count, margin)
                terms = nearer * reach.double() - pushed.masked_fill_(~negative, 0) * distance.double()
                triplets[own], active[own] = positive.sum(1) * count[:, 0], nearer.sum(1)
            else:
                _, some, terms = _partner(distance, positive, ordered, count, margin)
                triplets[own], active[own] = some.sum(1), (terms > 0).sum(1)
            loss[own] = terms.sum(1, dtype=torch.float64).to(loss.dtype)
    return loss, triplets, active


def _pull_triplets(
    g: Tensor, x: Tensor, labels: Tensor, first: int, end: int, margin: float, every: bool
) -> Tensor:
    """Gradient to x, given those of the anchors' sums."""
    dx = torch.zeros_like(x)
    with torch.autocast(x.device.type, enabled=False):
        for rows, distance, positive, negative, ordered, order, count in _distances(x, labels, first, end):
            if every:
                _, counts, pushed = _count(distance, positive, ordered, count, margin)
                counts -= pushed.masked_fill_(~negative, 0)
            else:
                place, _, terms = _partner(distance, positive, ordered, count, margin)
                counts = (terms > 0).long()
                chosen = torch.zeros_like(counts).scatter_add_(1, place, counts)
                counts = counts - torch.zeros_like(counts).scatter_(1, order, chosen)
            weights = (counts / distance).masked_fill_((distance == 0) | (counts == 0), 0.0)
            weights *= g[rows.start - first : rows.stop - first, None]
            dx[rows] += weights.sum(1, keepdim=True) * x[rows] - weights @ x
            dx += weights.sum(0)[:, None] * x - weights.T @ x[rows]
    return dx


_sums = define(
    "triplet_sums(Tensor x, Tensor labels, SymInt first, SymInt end, float margin, bool every) "
    "-> (Tensor, Tensor, Tensor)",
    _sum_triplets,
    lambda x, labels, first, end, *_: (x.new_empty(end - first), *labels.new_empty(2, end - first)),
)
_pull = define(
    "triplet_gradient(Tensor g, Tensor x, Tensor labels, SymInt first, SymInt end, float margin, bool every) "
    "-> Tensor",
    _pull_triplets,
    lambda g, x, *_: torch.empty_like(x),
)


class _Triplets(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, labels, first, end, margin, every):
        ctx.save_for_backward(x, labels)
        ctx.options = first, end, margin, every
        found = _sums(x, labels, *ctx.options)
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, g, *_):
        return _pull(g, *ctx.saved_tensors, *ctx.options), *(None,) * 5
