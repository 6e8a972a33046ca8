"""NT-Xent with its negatives treated otherwise: decoupled from the positive, or the hard ones weighed up.

s_p is the logit of a row's positive, s_j those of its N = 2B - 2 negatives.

    DCL   lse_j(s_j) - w s_p,    w = 1, or 2 - B softmax_images(<z_1, z_2> / sigma)
    HCL   softplus(log Ng - s_p),    Ng = N max( (R - tau_plus e^s_p) / (1 - tau_plus), e^(-1/|temperature|) )
          R = sum_j e^(beta s_j) e^s_j / sum_j e^(beta s_j) = exp( lse_j((1 + beta) s_j) - lse_j(beta s_j) )
"""

import math

import torch
from torch import Tensor, nn

from sslfast.distributed import _sharded as sharded
from sslfast.distributed._join import Group, across, collective, join
from sslfast.distributed._ranks import Ranks
from sslfast.losses._common import check_reduction, check_share, check_sides, compare_dtype, reduced, softplus
from sslfast.ops._check import check_temperature, inverse_temperature, number
from sslfast.ops.pair_rows import pair_rows


@collective
def dcl_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor | float = 0.1,
    *,
    weight_sigma: float | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    scaling: str = "ddp",
) -> Tensor:
    """Decoupled contrastive loss (Yeh et al. 2022): NT-Xent without the positive in the denominator.

    Args:
        z1, z2: [B, D] floating, row i of both from image i.
        temperature: number or 0-d tensor, of either sign, not 0.
        weight_sigma: number, not 0: weighs the positive terms by the negative von Mises-Fisher function
            (DCLW), which has no gradient.
        normalize: compare by cosine (norms in float32), otherwise by dot product.
        reduction: "mean" over the 2B rows, "sum", or "none": [2B], the rows of z1 first.
        group, strategy, scaling: processes whose rows are each other's negatives; see `sslfast.distributed`.

    Returns:
        float32 (float64 for float64 input). Without negatives (B = 1) the log of an empty sum is left out and
        the positive term stays; an empty batch has a mean of NaN.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.
    """
    n = check_sides("z1", z1, "z2", z2)
    scale = inverse_temperature("temperature", temperature, z1)
    if weight_sigma is not None:
        check_temperature("weight_sigma", number("weight_sigma", weight_sigma))
    check_reduction(reduction)
    ranks = join(group, strategy, scaling, "z1", len(z1))
    z, positive, ids = _rows(z1, z2, normalize, ranks)
    attraction, n = scale * positive, ranks.count(n)
    if weight_sigma is not None:
        similarity = positive.detach() / weight_sigma
        every = ranks.every(similarity.logsumexp(0)).logsumexp(0)
        attraction = attraction * (2 - n * (similarity - every).exp())
    if n > 1:
        repulsion = sharded.similarity_lse(ranks, z, scale=scale, a_ids=ids)
    else:
        repulsion = torch.zeros_like(positive).repeat(2)
    return reduced(repulsion - attraction.repeat(2), reduction, ranks=ranks)


@collective
def hard_negative_ntxent_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor | float = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    scaling: str = "ddp",
) -> Tensor:
    """NT-Xent with hard negatives weighed up and false ones estimated away (Robinson et al. 2021, HCL).

    Args:
        z1, z2: [B, D] floating, row i of both from image i.
        temperature: number or 0-d tensor, of either sign, not 0.
        beta: concentration: a negative of logit s weighs e^(beta s). 0: all alike.
        tau_plus: share of a negative's class among the negatives, in [0, 1). 0: none is false. With beta = 0
            both give the debiased loss of Chuang et al. 2020 and NT-Xent.
        normalize: compare by cosine (norms in float32), otherwise by dot product.
        reduction: "mean" over the 2B rows, "sum", or "none": [2B], the rows of z1 first.
        group, strategy, scaling: processes whose rows are each other's negatives; see `sslfast.distributed`.

    Returns:
        float32 (float64 for float64 input). Without negatives (B = 1) the loss is 0; an empty batch has a
        mean of NaN.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.
    """
    n = check_sides("z1", z1, "z2", z2)
    scale = inverse_temperature("temperature", temperature, z1)
    number("beta", beta)
    check_share("tau_plus", tau_plus)
    check_reduction(reduction)
    ranks = join(group, strategy, scaling, "z1", len(z1))
    z, positive, ids = _rows(z1, z2, normalize, ranks)
    positive, n = (scale * positive).repeat(2), ranks.count(n)
    if n < 2:
        return reduced(0 * positive, reduction)
    log_count = math.log(2 * n - 2)
    log_mean = sharded.similarity_lse(ranks, z, scale=scale * (1 + beta), a_ids=ids)
    log_total = sharded.similarity_lse(ranks, z, scale=scale * beta, a_ids=ids) if beta else log_count
    log_mean = log_mean - log_total
    least = -scale.abs() if isinstance(scale, Tensor) else -abs(scale)
    if tau_plus:
        # log(R - tau_plus e^s_p) = log R + log(1 - e^u); no u so near 0 that a gradient would overflow
        u = positive - log_mean + math.log(tau_plus)
        some = ~(u >= -1e-30)  # a NaN stays one
        left = torch.log(-torch.expm1(u.masked_fill(~some, -1.0)))
        debiased = log_mean + left - math.log1p(-tau_plus)
        log_mean = torch.where(~some | (debiased <= least), least, debiased)
    else:
        log_mean = torch.where(log_mean <= least, least, log_mean)
    return reduced(softplus(log_count + log_mean - positive), reduction, ranks=ranks)


def _rows(z1: Tensor, z2: Tensor, normalize: bool, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of both views [2B, D], products of the pairs [B], images of the rows [2B]."""
    z, positive = pair_rows(z1, z2, normalize, compare_dtype(z1))
    return z, positive, torch.cat((ranks.images(z1),) * 2)


class DCLLoss(nn.Module):
    """`dcl_loss` as a module; a temperature given as nn.Parameter is trained with the rest."""

    def __init__(
        self,
        temperature: Tensor | float = 0.1,
        *,
        weight_sigma: float | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        scaling: str = "ddp",
    ) -> None:
        super().__init__()
        check_temperature("temperature", temperature)
        if weight_sigma is not None:
            check_temperature("weight_sigma", number("weight_sigma", weight_sigma))
        check_reduction(reduction)
        self.temperature, self.weight_sigma = temperature, weight_sigma
        self.normalize, self.reduction = normalize, reduction
        self.across = across(group, strategy, scaling)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return dcl_loss(
            z1, z2, self.temperature, weight_sigma=self.weight_sigma, normalize=self.normalize,
            reduction=self.reduction, **self.across,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, weight_sigma={self.weight_sigma}, "
            f"normalize={self.normalize}, reduction={self.reduction!r}"
        )


class HardNegativeNTXentLoss(nn.Module):
    """`hard_negative_ntxent_loss` as a module; a temperature given as nn.Parameter is trained too."""

    def __init__(
        self,
        temperature: Tensor | float = 0.5,
        beta: float = 1.0,
        tau_plus: float = 0.1,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        scaling: str = "ddp",
    ) -> None:
        super().__init__()
        check_temperature("temperature", temperature)
        number("beta", beta)
        check_share("tau_plus", tau_plus)
        check_reduction(reduction)
        self.temperature, self.beta, self.tau_plus = temperature, beta, tau_plus
        self.normalize, self.reduction = normalize, reduction
        self.across = across(group, strategy, scaling)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return hard_negative_ntxent_loss(
            z1, z2, self.temperature, self.beta, self.tau_plus, normalize=self.normalize,
            reduction=self.reduction, **self.across,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, beta={self.beta}, tau_plus={self.tau_plus}, "
            f"normalize={self.normalize}, reduction={self.reduction!r}"
        )
