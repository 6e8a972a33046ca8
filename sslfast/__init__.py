"""Fused kernels for self-supervised learning: similarity-softmax losses on one primitive."""

from sslfast._version import __version__
from sslfast.losses import (
    BYOLLoss,
    InfoNCELoss,
    KeyQueue,
    MoCoLoss,
    NTXentLoss,
    byol_loss,
    info_nce_loss,
    moco_loss,
    ntxent_loss,
)
from sslfast.ops import (
    PatchMask,
    available_backends,
    block_patch_mask,
    ema_update_,
    embed_visible_patches,
    gather_patches,
    masked_patch_l1,
    masked_patch_mse,
    random_patch_mask,
    restore_patches,
    similarity_lse,
    use_backend,
)
from sslfast.teacher import EMATeacher, cosine_momentum

__all__ = [
    "BYOLLoss",
    "EMATeacher",
    "InfoNCELoss",
    "KeyQueue",
    "MoCoLoss",
    "NTXentLoss",
    "PatchMask",
    "__version__",
    "available_backends",
    "block_patch_mask",
    "byol_loss",
    "cosine_momentum",
    "ema_update_",
    "embed_visible_patches",
    "gather_patches",
    "info_nce_loss",
    "masked_patch_l1",
    "masked_patch_mse",
    "moco_loss",
    "ntxent_loss",
    "random_patch_mask",
    "restore_patches",
    "similarity_lse",
    "use_backend",
]
