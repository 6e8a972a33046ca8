"""A drop-in for the random masking of Hugging Face Transformers' ViTMAE; transformers has to be installed.

sslfast.interop.patch("transformers")  # every ViTMAE in the program, those that exist already too
"""

import torch
from torch import Tensor

from sslfast.ops import gather_patches, random_patch_mask

try:
    from transformers.models.vit_mae import modeling_vit_mae
except ImportError as error:
    raise ImportError("sslfast.interop.transformers: pip install transformers") from error

PACKAGE = "transformers"
NEEDS = "transformers>=5.23"


def random_masking(self, sequence: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """ViTMAEEmbeddings.random_masking: one sort in place of two, and no index as large as the tokens.

    Gives the same as the original bit for bit, for the same noise or the same seed; where noise is equal, the
    patch that comes first is kept.

    Args:
        self: the ViTMAEEmbeddings, whose config has mask_ratio.
        sequence: [B, L, D].
        noise: [B, L]; drawn if not given.

    Returns:
        (kept tokens [B, Lk, D], mask [B, L] with 1 = removed, ids_restore [B, L])
    """
    batch, length, _ = sequence.shape
    if noise is None:
        noise = torch.rand(batch, length, device=sequence.device)
    noise = noise.to(sequence.device)
    noise = noise if noise.is_floating_point() else noise.double()
    mask = random_patch_mask(batch, length, self.config.mask_ratio, noise=noise)
    return gather_patches(sequence, mask.ids_keep), mask.mask, mask.ids_restore


class ViTMAEEmbeddings(modeling_vit_mae.ViTMAEEmbeddings):
    """transformers' ViTMAEEmbeddings with `random_masking`."""

    random_masking = random_masking


SWAPS = {"transformers.models.vit_mae.modeling_vit_mae.ViTMAEEmbeddings.random_masking": random_masking}
