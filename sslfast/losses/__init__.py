"""Losses, each a few lines on the primitives of `sslfast.ops`."""

from sslfast.losses.contrastive import InfoNCELoss, NTXentLoss, info_nce_loss, ntxent_loss
from sslfast.losses.masked import MAELoss, mae_loss
from sslfast.losses.momentum import BYOLLoss, KeyQueue, MoCoLoss, byol_loss, moco_loss

__all__ = [
    "BYOLLoss",
    "InfoNCELoss",
    "KeyQueue",
    "MAELoss",
    "MoCoLoss",
    "NTXentLoss",
    "byol_loss",
    "info_nce_loss",
    "mae_loss",
    "moco_loss",
    "ntxent_loss",
]
