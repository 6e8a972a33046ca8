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
from sslfast.ops import available_backends, ema_update_, similarity_lse, use_backend
from sslfast.teacher import EMATeacher, cosine_momentum

__all__ = [
    "BYOLLoss",
    "EMATeacher",
    "InfoNCELoss",
    "KeyQueue",
    "MoCoLoss",
    "NTXentLoss",
    "__version__",
    "available_backends",
    "byol_loss",
    "cosine_momentum",
    "ema_update_",
    "info_nce_loss",
    "moco_loss",
    "ntxent_loss",
    "similarity_lse",
    "use_backend",
]
