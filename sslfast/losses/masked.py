"""Losses of masked patches, on the ops of patches."""

from collections.abc import Sequence

from torch import Tensor, nn

from sslfast.ops.masked_patch_mse import masked_patch_mse


def mae_loss(
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    patch_size: int,
    norm_pix: bool = True,
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """MAE's loss (He et al. 2022): the mean squared error of the masked patches' pixels.

    Args:
        pred: [B, L, p p C] in the order row, column, channel of a patch.
        images: [B, C, H, W] float, or uint8 with mean and std.
        mask: [B, L], 1 = masked, for example of `random_patch_mask`.
        patch_size: p in pixels.
        norm_pix: compare with pixels normalised by the mean and variance of their patch.
        mean, std: of each channel, for images that are not normalised yet.

    Returns:
        0-d float32 (float64 for float64 pred); 0 where nothing is masked.

    Raises:
        TypeError, ValueError: as `sslfast.masked_patch_mse`.
    """
    return masked_patch_mse(pred, images, mask, patch_size=patch_size, norm_pix=norm_pix, mean=mean, std=std)


class MAELoss(nn.Module):
    """`mae_loss` as a module: loss(pred, images, mask)."""

    def __init__(
        self,
        patch_size: int,
        norm_pix: bool = True,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.patch_size, self.norm_pix, self.mean, self.std = patch_size, norm_pix, mean, std

    def forward(self, pred: Tensor, images: Tensor, mask: Tensor) -> Tensor:
        return mae_loss(pred, images, mask, self.patch_size, self.norm_pix, mean=self.mean, std=self.std)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, norm_pix={self.norm_pix}"
