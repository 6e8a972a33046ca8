"""Triplet margin loss (Schroff et al. 2015, Hermans et al. 2017), mined in chunks of rows.

    loss of (anchor a, positive p, negative n)  =  max(0, d_ap - d_an + margin),    d_xy = |x - y|

The matrix of distances never exists as a whole. Each chunk leaves, instead of triplets, the number K_ij of
those in which a distance takes part, counted up for positives and down for negatives. These are whole
numbers, so sums over them are exact and the gradient is deterministic:

    d loss / d x_i  =  sum_j (g_i K_ij + g_j K_ji) (x_i - x_j) / d_ij
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sslfast.losses._common import check_choice, groups_of, rows_at
from sslfast.ops._check import FLOATS, check_tensor, number, working_dtype
from sslfast.ops._library import define, once_differentiable
from sslfast.ops.hardest_pairs import hardest_pairs
from sslfast.ops.pair_rows import EPS

MININGS = ("hard", "semihard", "all")
REDUCTIONS = ("mean", "mean_nonzero", "sum", "none")
CHUNK = 1 << 20  # distances at a time


def triplet_margin_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float = 0.05,
    *,
    mining: str = "hard",
    normalize: bool = True,
    reduction: str = "mean",
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
    with torch.autocast(embeddings.device.type, enabled=False):
        x = embeddings.to(working_dtype(embeddings))
        x = F.normalize(x, dim=1, eps=EPS) if normalize else x
        x = x - x.detach().mean(0)  # no distance changes, and of rows that are alike no digits cancel
        if mining == "hard":
            loss, count = _batch_hard(x, labels, float(margin))
            active = loss > 0
        else:
            loss, count, active = _Triplets.apply(x, labels, float(margin), mining == "all")
        loss = loss + 0 * x.detach().sum()  # a NaN, which comparisons would pass over
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (count if reduction == "mean" else active).sum().clamp(min=1)


def _batch_hard(x: Tensor, labels: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Loss of each anchor, and whether it has a triplet."""
    group, size = groups_of(labels)
    some = (size > 1) & (size < len(x))
    far, near = hardest_pairs(x, group)
    far, near = (_norm(x - rows_at(x, index)) for index in (far, near))
    return torch.relu(far - near + margin).masked_fill(~some, 0.0), some


def _norm(x: Tensor) -> Tensor:
    """Lengths of rows, with zero gradient at 0."""
    square = x.square().sum(1)
    zero = square == 0
    return square.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def _chunks(x: Tensor, labels: Tensor):
    """(first row, end, squared distances of these rows to all [R, N], which of them are of the same label)"""
    squares = x.square().sum(1)
    step = max(1, CHUNK // max(1, len(x)))
    for begin in range(0, len(x), step):
        rows = slice(begin, begin + step)
        square = torch.addmm(squares, x[rows], x.T, alpha=-2).add_(squares[rows, None])
        yield rows, square, labels[rows, None] == labels


def _distances(x: Tensor, labels: Tensor):
    """Of each chunk: (rows, distances, which are positives, which are negatives, the latter's distances in
    order, that order, how many they are)"""
    for rows, square, same in _chunks(x, labels):
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


def _sum_triplets(x: Tensor, labels: Tensor, margin: float, every: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of each anchor [N]: sum of losses, number of triplets, number of those with a loss above 0."""
    loss = x.new_zeros(len(x))
    triplets, active = torch.zeros_like(labels), torch.zeros_like(labels)
    with torch.autocast(x.device.type, enabled=False):
        for rows, distance, positive, negative, ordered, _, count in _distances(x, labels):
            if every:
                reach, nearer, pushed = _count(distance, positive, ordered, count, margin)
                terms = nearer * reach.double() - pushed.masked_fill_(~negative, 0) * distance.double()
                triplets[rows], active[rows] = positive.sum(1) * count[:, 0], nearer.sum(1)
            else:
                _, some, terms = _partner(distance, positive, ordered, count, margin)
                triplets[rows], active[rows] = some.sum(1), (terms > 0).sum(1)
            loss[rows] = terms.sum(1, dtype=torch.float64).to(loss.dtype)
    return loss, triplets, active


def _pull_triplets(g: Tensor, x: Tensor, labels: Tensor, margin: float, every: bool) -> Tensor:
    """Gradient to x, given those of the anchors' sums."""
    dx = torch.zeros_like(x)
    with torch.autocast(x.device.type, enabled=False):
        for rows, distance, positive, negative, ordered, order, count in _distances(x, labels):
            if every:
                _, counts, pushed = _count(distance, positive, ordered, count, margin)
                counts -= pushed.masked_fill_(~negative, 0)
            else:
                place, _, terms = _partner(distance, positive, ordered, count, margin)
                counts = (terms > 0).long()
                chosen = torch.zeros_like(counts).scatter_add_(1, place, counts)
                counts = counts - torch.zeros_like(counts).scatter_(1, order, chosen)
            weights = (counts / distance).masked_fill_((distance == 0) | (counts == 0), 0.0)
            weights *= g[rows, None]
            dx[rows] += weights.sum(1, keepdim=True) * x[rows] - weights @ x
            dx += weights.sum(0)[:, None] * x - weights.T @ x[rows]
    return dx


_sums = define(
    "triplet_sums(Tensor x, Tensor labels, float margin, bool every) -> (Tensor, Tensor, Tensor)",
    _sum_triplets,
    lambda x, labels, *_: (x.new_empty(len(x)), torch.empty_like(labels), torch.empty_like(labels)),
)
_pull = define(
    "triplet_gradient(Tensor g, Tensor x, Tensor labels, float margin, bool every) -> Tensor",
    _pull_triplets,
    lambda g, x, *_: torch.empty_like(x),
)


class _Triplets(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, labels, margin, every):
        ctx.save_for_backward(x, labels)
        ctx.options = margin, every
        found = _sums(x, labels, margin, every)
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, g, *_):
        return _pull(g, *ctx.saved_tensors, *ctx.options), None, None, None
