"""Supervised contrastive learning (Khosla et al. 2020): every row of the same class is a positive.

    outside  -1/|P(i)| sum_{p in P(i)} log( exp s_ip / sum_{a != i} exp s_ia )  =  lse_i - mean_p s_ip
    inside   -log( sum_{p in P(i)} exp s_ip / sum_{a != i} exp s_ia )           =  softplus(lse_n - lse_p)

mean_p s_ip is one product of a row with the sum of its class, so no second matrix is needed; lse_n and lse_p
are those of the negatives and of the positives.
"""

import torch
from torch import Tensor, nn

from sslfast.distributed import _sharded as sharded
from sslfast.distributed._join import Group, across, collective, join
from sslfast.distributed._ranks import ALONE, Ranks
from sslfast.losses._common import (
    check_reduction,
    compare_dtype,
    normalized,
    reduced,
    softplus,
    sums_by_id,
)
from sslfast.ops._check import (
    FLOATS,
    check_choice,
    check_temperature,
    check_tensor,
    inverse_temperature,
    number,
    working_dtype,
)

FORMS = ("outside", "inside")


@collective
def supcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    temperature: Tensor | float = 0.07,
    base_temperature: float = 0.07,
    *,
    normalize: bool = True,
    form: str = "outside",
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    scaling: str = "ddp",
) -> Tensor:
    """Supervised contrastive loss, times temperature / base_temperature.

    Args:
        features: [M, D] floating, or [B, V, D]: V views of B images.
        labels: int64 [M] or [B], any numbers; None (for [B, V, D] only): each image is a class of its own.
        temperature: number or 0-d tensor, of either sign, not 0.
        base_temperature: number, not 0.
        normalize: compare by cosine (norms in float32), otherwise by dot product.
        form: "outside": the mean over the positives is outside of the logarithm, L_out of the paper.
            "inside": their sum is inside, as in solo-learn's SimCLR; L_in of the paper, which has the mean
            there, is larger by log |P(i)|.
        reduction: "mean" over all rows, "sum", or "none": [M] or [B, V].
        group, strategy, scaling: processes whose rows are each other's negatives; see `sslfast.distributed`.

    Returns:
        float32 (float64 for float64 input). A row without positives has loss 0 and counts in the mean; so one
        row alone gives 0, and an empty batch a mean of NaN.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.
    """
    viewed = isinstance(features, Tensor) and features.dim() == 3
    check_tensor("features", features, FLOATS, (None,) * (2 + viewed))
    images, views = len(features), features.shape[1] if viewed else 1
    scale = inverse_temperature("temperature", temperature, features)
    check_temperature("base_temperature", number("base_temperature", base_temperature))
    check_reduction(reduction)
    check_choice("form", form, FORMS)
    if labels is not None:
        check_tensor("labels", labels, (torch.int64,), (images,), features)
    elif not viewed:
        raise ValueError("labels: expected a tensor for features of [M, D], got None")

    ranks = join(group, strategy, scaling, "features", len(features))
    dtype = compare_dtype(features)
    z = normalized(features, dtype) if normalize else features.to(dtype)
    alone = labels is None  # no other image is of an image's class
    labels = ranks.images(features) if labels is None else labels
    z, labels = z.reshape(images * views, z.shape[-1]), labels.repeat_interleave(views)
    if form == "inside":
        terms = _inside(z, labels, scale, ranks)
    else:
        terms = _outside(z, labels, scale, alone and views == 2, ranks, ALONE if alone else ranks)
    return reduced(terms.view(features.shape[:-1]) / (scale * base_temperature), reduction, ranks=ranks)


def _outside(
    z: Tensor, labels: Tensor, scale: Tensor | float, pairs: bool, ranks: Ranks, classes: Ranks
) -> Tensor:
    """pairs: every row has one positive; then the form of NT-Xent, see contrastive.py, keeps more digits.
    classes: processes on which a row's positives are."""
    wide = z.to(working_dtype(z))
    same, size = sums_by_id(labels, wide, classes)
    mean = (wide * (same - wide)).sum(1) / (size - 1).clamp(min=1)
    if pairs:
        return softplus(sharded.similarity_lse(ranks, z, scale=scale, a_ids=labels) - scale * mean)
    return torch.where(size > 1, sharded.similarity_lse(ranks, z, scale=scale) - scale * mean, 0.0)


def _inside(z: Tensor, labels: Tensor, scale: Tensor | float, ranks: Ranks) -> Tensor:
    negatives = sharded.similarity_lse(ranks, z, scale=scale, a_ids=labels)
    positives = sharded.similarity_lse(ranks, z, scale=scale, a_ids=labels, pairs="same")
    alone = positives == -torch.inf
    return softplus(negatives - positives.masked_fill(alone, 0.0)).masked_fill(alone, 0.0)


class SupConLoss(nn.Module):
    """`supcon_loss` as a module; a temperature given as nn.Parameter is trained with the rest."""

    def __init__(
        self,
        temperature: Tensor | float = 0.07,
        base_temperature: float = 0.07,
        *,
        normalize: bool = True,
        form: str = "outside",
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        scaling: str = "ddp",
    ) -> None:
        super().__init__()
        check_temperature("temperature", temperature)
        check_temperature("base_temperature", number("base_temperature", base_temperature))
        check_reduction(reduction)
        check_choice("form", form, FORMS)
        self.temperature, self.base_temperature, self.normalize = temperature, base_temperature, normalize
        self.form, self.reduction = form, reduction
        self.across = across(group, strategy, scaling)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        return supcon_loss(
            features, labels, self.temperature, self.base_temperature, normalize=self.normalize,
            form=self.form, reduction=self.reduction, **self.across,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, base_temperature={self.base_temperature}, "
            f"normalize={self.normalize}, form={self.form!r}, reduction={self.reduction!r}"
        )
