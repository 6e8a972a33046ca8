"""Fused kernels for self-supervised learning: similarity-softmax losses on one primitive."""

from sslfast._version import __version__
from sslfast.losses import InfoNCELoss, NTXentLoss, info_nce_loss, ntxent_loss
from sslfast.ops import available_backends, similarity_lse, use_backend

__all__ = [
    "InfoNCELoss",
    "NTXentLoss",
    "__version__",
    "available_backends",
    "info_nce_loss",
    "ntxent_loss",
    "similarity_lse",
    "use_backend",
]
