"""Losses between two modalities: CLIP's softmax in both directions, SigLIP's sigmoid per pair."""

import torch
from torch import Tensor, nn

from sslfast.distributed import _sharded as sharded
from sslfast.distributed._join import Group, across, collective, join
from sslfast.losses._common import check_reduction, check_sides, compare_dtype, halves, reduced, softplus
from sslfast.ops._check import check_tensor, scalar
from sslfast.ops.pair_rows import pair_rows


@collective
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    scaling: str = "ddp",
) -> Tensor:
    """CLIP's symmetric cross-entropy (Radford et al. 2021): the mean of image-to-text and text-to-image.

    Both directions come from one pass over the similarities. Nothing is normalised here.

    Args:
        image_features, text_features: [N, D] floating, row i of both belong together.
        logit_scale: number or 0-d tensor that multiplies the similarities (an exponential already taken).
        logit_bias: number or 0-d tensor, added to every logit, which no softmax notices: its gradient is 0.
        reduction: "mean" over the N pairs, "sum", or "none": [N].
        group, strategy, scaling: processes whose rows are each other's negatives; see `sslfast.distributed`.

    Returns:
        float32 (float64 for float64 input). One pair alone has loss 0; an empty batch a mean of NaN.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.
    """
    check_sides("image_features", image_features, "text_features", text_features)
    scale = scalar("logit_scale", logit_scale, image_features)
    bias = None if logit_bias is None else scalar("logit_bias", logit_bias, image_features)
    check_reduction(reduction)
    ranks = join(group, strategy, scaling, "image_features", len(image_features))
    z, positive = pair_rows(image_features, text_features, False, compare_dtype(image_features))
    ids = ranks.images(image_features)
    sides = halves(z, image_features, text_features)
    lse = sharded.similarity_lse(ranks, *sides, scale=scale, a_ids=ids, b_ids=ids, return_cols=True)
    loss = reduced(softplus(torch.stack(tuple(lse)) - scale * positive).mean(0), reduction, ranks=ranks)
    return loss if bias is None else loss + 0 * bias


@collective
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    ids: Tensor | None = None,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    scaling: str = "ddp",
) -> Tensor:
    """SigLIP's sigmoid loss (Zhai et al. 2023): each of the N^2 pairs is a binary classification.

    Unless reduction is "none", the loss and all gradients come of one pass over the similarities, three
    matrix products in all. Nothing is normalised here.

    Args:
        image_features, text_features: [N, D] floating, row i of both belong together.
        logit_scale: number or 0-d tensor that multiplies the similarities (an exponential already taken).
        logit_bias: number or 0-d tensor, added to every logit.
        ids: int64 [N]: all pairs of the same id belong together.
        reduction: "mean" over the N images of the sums over the texts, "sum", or "none": [N].
        group, strategy, scaling: processes whose rows are each other's negatives; see `sslfast.distributed`.

    Returns:
        float32 (float64 for float64 input). An empty batch has a mean of NaN.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.
    """
    n = check_sides("image_features", image_features, "text_features", text_features)
    scale, bias = (
        scalar(name, x, image_features)
        for name, x in (("logit_scale", logit_scale), ("logit_bias", logit_bias))
    )
    check_reduction(reduction)
    if ids is not None:
        check_tensor("ids", ids, (torch.int64,), (n,), image_features)
    ranks = join(group, strategy, scaling, "image_features", len(image_features))
    loss = sharded.similarity_bce(
        ranks, image_features, text_features, scale=scale, bias=bias, a_ids=ids, b_ids=ids,
        total=reduction != "none",
    )  # fmt: skip
    if reduction == "none":
        return loss
    loss = ranks.total(loss)
    return loss if reduction == "sum" else loss / ranks.count(n) if n else loss * torch.nan


class CLIPLoss(nn.Module):
    """`clip_loss` as a module: loss(image_features, text_features, logit_scale, logit_bias=None)."""

    def __init__(
        self,
        *,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        scaling: str = "ddp",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction
        self.across = across(group, strategy, scaling)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        return clip_loss(
            image_features, text_features, logit_scale, logit_bias, reduction=self.reduction, **self.across
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class SigLIPLoss(CLIPLoss):
    """`siglip_loss` as a module: loss(image_features, text_features, logit_scale, logit_bias, ids=None)."""

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
        ids: Tensor | None = None,
    ) -> Tensor:
        return siglip_loss(
            image_features, text_features, logit_scale, logit_bias, ids=ids, reduction=self.reduction,
            **self.across,
        )  # fmt: skip
