"""A drop-in for SupContrast's losses.SupConLoss, which is a file and not a package: nothing to install.

from sslfast.interop.supcontrast import SupConLoss  # instead of: from losses import SupConLoss
"""

import torch
from torch import Tensor, nn

from sslfast.interop._rows import products, whole_numbers, wide
from sslfast.losses import supcon_loss
from sslfast.ops import similarity_lse

PACKAGE = None


class SupConLoss(nn.Module):
    """Supervised contrastive loss (Khosla et al. 2020), times temperature / base_temperature.

    In memory linear in the batch, but for a mask that is given. Nothing is normalised. An anchor without a
    positive gives 0 and counts in the mean, as in the repository's newest version; older ones give NaN.

    Args:
        temperature: number, not 0.
        contrast_mode: "all": every view is an anchor; "one": the first view of each image.
        base_temperature: number, not 0.
    """

    def __init__(
        self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07
    ) -> None:
        super().__init__()
        self.temperature, self.contrast_mode = temperature, contrast_mode
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            features: [B, V, ...]; dimensions behind the second are flattened.
            labels: [B], or [B, 1], of any dtype; None: each image is a class of its own.
            mask: [B, B] in place of labels: how much sample j is of sample i's class; may be asymmetric.

        Returns:
            0-d float32 (float64 for float64 features).

        Raises:
            ValueError: fewer than three dimensions, labels and a mask, labels of another number, or an
                unknown contrast_mode.
        """
        if features.dim() < 3:
            raise ValueError(f"features: expected [B, V, ...], got {list(features.shape)}")
        features = features.flatten(2)
        batch, views, _ = features.shape
        if labels is not None and mask is not None:
            raise ValueError("mask: expected None with labels given, got both")
        if self.contrast_mode not in ("all", "one"):
            raise ValueError(f"contrast_mode: expected 'all' or 'one', got {self.contrast_mode!r}")
        if labels is not None:
            labels = labels.reshape(-1)
            if len(labels) != batch:
                raise ValueError(f"labels: expected {batch}, one for each image, got {len(labels)}")
            labels = whole_numbers("labels", labels)[0].to(features.device)
        if mask is None and self.contrast_mode == "all":
            return supcon_loss(features, labels, self.temperature, self.base_temperature, normalize=False)
        return self._anchored(features, labels, mask)

    def _anchored(self, features: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
        """Anchors of the first view, or a mask: lse_i - sum_j mask_ij s_ij / sum_j mask_ij."""
        batch, views, _ = features.shape
        rows = wide(features).transpose(0, 1)  # [V, B, D]
        images = rows.sum(0)  # <x, images_j> is the sum over image j's views
        if mask is not None:
            mask = mask.to(features.device, images.dtype)
            own = mask.diagonal()
            others = mask - torch.diag(own)
            with torch.autocast(rows.device.type, enabled=False):
                sums, weight = others @ images, others.sum(1) * views
        else:
            ids = torch.arange(batch, device=rows.device) if labels is None else labels
            ordered = ids.sort().values
            group = torch.searchsorted(ordered, ids)
            count = torch.searchsorted(ordered, ids, right=True) - group
            classes = torch.zeros_like(images).index_put((group,), images, accumulate=True)
            sums, weight = classes[group] - images, (count - 1).to(images.dtype) * views
            own = torch.ones_like(weight)
        scale, every = 1 / self.temperature, features.transpose(0, 1).flatten(0, 1)
        if self.contrast_mode == "one":
            positions = torch.arange(len(every), device=every.device)
            lse = similarity_lse(every[:batch], every, scale=scale, a_ids=positions[:batch], b_ids=positions)
            rows = rows[:1]
        else:
            lse = similarity_lse(every, scale=scale)
        # Of its own image an anchor has the other views as positives.
        weight = weight + own * (views - 1)
        sums = sums + own[:, None] * (images - rows) if views > 1 else sums
        positive = scale * products(rows, sums)
        some = weight.abs() >= 1e-6
        mean = positive / weight.masked_fill(~some, 1.0)
        terms = (lse.view_as(mean) - mean).masked_fill(~some, 0.0)
        return terms.mean() * (self.temperature / self.base_temperature)
