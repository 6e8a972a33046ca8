"""NT-Xent and InfoNCE: one positive per row against every other row, without the matrix of similarities.

With s_p the logit of the positive and lse_n the log-sum-exp over the negatives,

    -log( exp s_p / (exp s_p + sum exp s_n) )  =  softplus(lse_n - s_p)

which keeps its digits where `lse_all - s_p` cancels: on aligned pairs at a low temperature the loss is far
below the rounding error of its logits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast.distributed import _sharded as sharded
from sslfast.distributed._join import Group, across, collective, join
from sslfast.distributed._ranks import ALONE, Ranks
from sslfast.losses._common import (
    check_reduction,
    check_share,
    check_sides,
    compare_dtype,
    halves,
    like_dtypes,
    minus,
    normalized,
    reduced,
    softplus,
    sums_by_id,
    view_stack,
)
from sslfast.ops._check import (
    FLOATS,
    check_temperature,
    check_tensor,
    inverse_temperature,
    may_read,
    number,
    working_dtype,
)
from sslfast.ops.pair_rows import pair_rows


def ntxent_reference(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent as most code has it: the full matrix and a cross-entropy. Test truth and benchmark baseline."""
    n = z1.shape[0]
    z = F.normalize(torch.cat((z1, z2)), dim=1)
    logits = z @ z.T / temperature
    logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


@collective
def ntxent_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor | float = 0.5,
    *,
    normalize: bool = True,
    ids: Tensor | None = None,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    scaling: str = "ddp",
) -> Tensor:
    """Normalised-temperature cross-entropy of SimCLR (Chen et al. 2020): two views of N images.

    Each of the 2N rows has its other view as the positive and the 2N - 2 remaining rows as negatives. The
    official code adds the means of both directions, which is twice this value.

    Args:
        z1, z2: [N, D] floating, row i of both from image i.
        temperature: number or 0-d tensor, of either sign, not 0.
        normalize: compare by cosine (norms in float32), otherwise by dot product.
        ids: int64 [N]: images of the same id are not each other's negatives; the other view stays the
        positive.
        reduction: "mean" over the 2N rows, "sum", or "none": [2N], the rows of z1 first.
        group, strategy, scaling: processes whose rows are each other's negatives; see `sslfast.distributed`.

    Returns:
        float32 (float64 for float64 input). A row without negatives has loss 0; an empty batch a mean of NaN.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.
    """
    n = check_sides("z1", z1, "z2", z2)
    scale = inverse_temperature("temperature", temperature, z1)
    check_reduction(reduction)
    if ids is not None:
        check_tensor("ids", ids, (torch.int64,), (n,), z1)
    ranks = join(group, strategy, scaling, "z1", len(z1))
    ids = torch.cat((ranks.images(z1) if ids is None else ids,) * 2)
    z, positive = pair_rows(z1, z2, normalize, compare_dtype(z1))
    negatives = sharded.similarity_lse(ranks, z, scale=scale, a_ids=ids)
    terms = softplus(minus(negatives.view(2, n), positive, scale))
    return reduced(terms.view(-1), reduction, ranks=ranks)


@collective
def info_nce_loss(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Tensor | None = None,
    temperature: Tensor | float = 0.07,
    normalize: bool = True,
    symmetric: bool = False,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    scaling: str = "ddp",
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018): query i against key i as its positive and every other key.

    Args:
        query, key: [N, D] floating.
        negatives: further negatives beside the batch's own keys: [K, D] for all queries or [N, H, D] per
        query.
        temperature: number or 0-d tensor, of either sign, not 0.
        normalize: compare by cosine (norms in float32), otherwise by dot product.
        symmetric: average with the loss of key i against all queries; goes without `negatives`.
        ids: int64 [N]: pairs of the same id are not each other's negatives.
        weights: [N] floating, non-negative weights of the terms.
        label_smoothing: share of the target, in [0, 1), spread evenly over the positive and all negatives.
        margin: taken off the positive's similarity before the temperature (additive margin softmax).
        reduction: "mean" (weighted where weights are given; NaN where they add up to 0), "sum", or "none":
        [N].
        group, strategy, scaling: processes whose rows are each other's negatives; see `sslfast.distributed`.

    Returns:
        float32 (float64 for float64 input). A query without negatives has loss 0; an empty batch a mean of
        NaN.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.
    """
    n = check_sides("query", query, "key", key)
    scale = inverse_temperature("temperature", temperature, query)
    check_reduction(reduction)
    check_share("label_smoothing", label_smoothing)
    number("margin", margin)
    if weights is not None:
        check_tensor("weights", weights, FLOATS, (n,), query)
        if may_read(weights) and not (weights >= 0).all():
            raise ValueError("weights: expected no negative and no NaN, got some")
    if ids is not None:
        check_tensor("ids", ids, (torch.int64,), (n,), query)
    if negatives is not None:
        if symmetric:
            raise ValueError("negatives: expected None when symmetric=True, got a tensor")
        per_query = isinstance(negatives, Tensor) and negatives.dim() == 3
        shape = (n, None, query.shape[1]) if per_query else (None, query.shape[1])
        check_tensor("negatives", negatives, like_dtypes(query), shape, query)
    ranks = join(group, strategy, scaling, "query", n, 0 if negatives is None else len(negatives))

    own_ids = ids is None
    ids = ranks.images(query) if ids is None else ids
    dtype = compare_dtype(query)
    z, positive = pair_rows(query, key, normalize, dtype)
    q, k = halves(z, query, key)
    positive = scale * (positive - margin)
    lse = sharded.similarity_lse(ranks, q, k, scale=scale, a_ids=ids, b_ids=ids, return_cols=symmetric)
    if isinstance(lse, tuple):
        sides = [(q, k, lse[0]), (k, q, lse[1])]
    elif negatives is None:
        sides = [(q, k, lse)]
    else:
        negatives = normalized(negatives, dtype) if normalize else negatives.to(dtype)
        sides = [(q, k, _logaddexp(lse, _extra_lse(q, negatives, scale, ranks)))]

    terms = torch.stack([softplus(side_lse - positive) for _, _, side_lse in sides]).mean(0)
    if label_smoothing:
        means = [
            _mean_logit(own, other, positive, None if own_ids else ids, negatives, scale, ranks)
            for own, other, _ in sides
        ]
        terms = terms + label_smoothing * (positive - torch.stack(means).mean(0))
    return reduced(terms, reduction, weights, ranks)


@collective
def multiview_ntxent_loss(
    views: Tensor | Sequence[Tensor],
    temperature: Tensor | float = 0.5,
    *,
    normalize: bool = True,
    ids: Tensor | None = None,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    scaling: str = "ddp",
) -> Tensor:
    """NT-Xent of V views of N images: the mean of its terms over each row's V - 1 positives.

    A positive competes with the rows of other images alone: the other views of its own image are left out of
    the denominator, where `supcon_loss` of [N, V, D] has them. Two views: `ntxent_loss`.

    Args:
        views: [V, N, D] stacked or a sequence of [N, D], V at least 2; row i of each from image i.
        temperature: number or 0-d tensor, of either sign, not 0.
        normalize: compare by cosine (norms in float32), otherwise by dot product.
        ids: int64 [N]: images of the same id are not each other's negatives.
        reduction: "mean" over the V N rows, "sum", or "none": [V, N].
        group, strategy, scaling: processes whose rows are each other's negatives; see `sslfast.distributed`.

    Returns:
        float32 (float64 for float64 input). A row without negatives has loss 0; an empty batch a mean of NaN.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.
    """
    z = view_stack("views", views, 2)
    scale = inverse_temperature("temperature", temperature, z)
    check_reduction(reduction)
    count, n, _ = z.shape
    if ids is not None:
        check_tensor("ids", ids, (torch.int64,), (n,), z)
    ranks = join(group, strategy, scaling, "views", n, features=z.unbind(0))
    ids = ranks.images(z[0]) if ids is None else ids
    z = normalized(z, compare_dtype(z)) if normalize else z.to(compare_dtype(z))
    negatives = sharded.similarity_lse(ranks, z.flatten(0, 1), scale=scale, a_ids=ids.repeat(count))
    negatives = negatives.view(count, n)
    wide = z.to(working_dtype(z))
    positives = {(v, w): (wide[v] * wide[w]).sum(1) for v in range(count) for w in range(v)}
    terms = [
        softplus(minus(negatives[v], positives[max(v, w), min(v, w)], scale))
        for v in range(count)
        for w in range(count)
        if v != w
    ]
    return reduced(torch.stack(terms).view(count, count - 1, n).mean(1), reduction, ranks=ranks)


class NTXentLoss(nn.Module):
    """`ntxent_loss` as a module; a temperature given as nn.Parameter is trained with the rest."""

    def __init__(
        self,
        temperature: Tensor | float = 0.5,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        scaling: str = "ddp",
    ) -> None:
        super().__init__()
        check_temperature("temperature", temperature)
        check_reduction(reduction)
        self.temperature, self.normalize, self.reduction = temperature, normalize, reduction
        self.across = across(group, strategy, scaling)

    def forward(self, z1: Tensor, z2: Tensor, ids: Tensor | None = None) -> Tensor:
        return ntxent_loss(
            z1,
            z2,
            self.temperature,
            normalize=self.normalize,
            ids=ids,
            reduction=self.reduction,
            **self.across,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, normalize={self.normalize}, reduction={self.reduction!r}"


class InfoNCELoss(nn.Module):
    """`info_nce_loss` as a module; a temperature given as nn.Parameter is trained with the rest."""

    def __init__(
        self,
        temperature: Tensor | float = 0.07,
        *,
        normalize: bool = True,
        symmetric: bool = False,
        label_smoothing: float = 0.0,
        margin: float = 0.0,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        scaling: str = "ddp",
    ) -> None:
        super().__init__()
        check_temperature("temperature", temperature)
        check_share("label_smoothing", label_smoothing)
        number("margin", margin)
        check_reduction(reduction)
        self.temperature, self.normalize, self.symmetric = temperature, normalize, symmetric
        self.label_smoothing, self.margin, self.reduction = label_smoothing, margin, reduction
        self.across = across(group, strategy, scaling)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        negatives: Tensor | None = None,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        return info_nce_loss(
            query, key, negatives=negatives, temperature=self.temperature, normalize=self.normalize,
            symmetric=self.symmetric, ids=ids, weights=weights, label_smoothing=self.label_smoothing,
            margin=self.margin, reduction=self.reduction, **self.across,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, normalize={self.normalize}, symmetric={self.symmetric}, "
            f"label_smoothing={self.label_smoothing}, margin={self.margin}, reduction={self.reduction!r}"
        )


def _extra_lse(q: Tensor, negatives: Tensor, scale: Tensor | float, ranks: Ranks) -> Tensor:
    """Log-sum-exp over further negatives: [K, D] by the primitive, [N, H, D] directly in N H D."""
    if negatives.dim() == 2:
        return sharded.similarity_lse(ranks, q, negatives, scale=scale, lengths=ranks.others)
    work = working_dtype(q)
    logits = scale * (q.to(work)[:, None, :] * negatives.to(work)).sum(2)
    return logits.logsumexp(1) if logits.shape[1] else logits.sum(1) - torch.inf


def _logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """torch.logaddexp with zero gradient, not NaN, where both are -inf."""
    empty = (x == -torch.inf) & (y == -torch.inf)
    return torch.logaddexp(x.masked_fill(empty, 0.0), y.masked_fill(empty, 0.0)).masked_fill(
        empty, -torch.inf
    )


def _mean_logit(
    own: Tensor,
    other: Tensor,
    positive: Tensor,
    ids: Tensor | None,
    negatives: Tensor | None,
    scale: Tensor | float,
    ranks: Ranks,
) -> Tensor:
    """Mean logit of each row of `own` over its positive and its negatives, through sums of rows per id.

    sum_j s_ij over the j of other ids = scale <own_i, sum of all rows - sum of the rows of i's id>.
    """
    work = working_dtype(own)
    own, other = own.to(work), other.to(work)
    same, size = (other, 1) if ids is None else sums_by_id(ids, other, ranks)
    total = positive + scale * (own * (ranks.sum(other.sum(0)) - same)).sum(1)
    count = 1 + ranks.count(len(own)) - size
    if negatives is not None:
        negatives = negatives.to(work)
        shared = negatives.dim() == 2
        summed = ranks.sum(negatives.sum(0)) if shared else negatives.sum(1)
        total = total + scale * (own * summed).sum(1)
        count = count + (sum(ranks.others) if shared and ranks is not ALONE else negatives.shape[-2])
    return total / count
