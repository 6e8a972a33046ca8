"""Losses, each a few lines on the primitives of `sslfast.ops`."""

from sslfast.losses.contrastive import InfoNCELoss, NTXentLoss, info_nce_loss, ntxent_loss
from sslfast.losses.masked import MAELoss, mae_loss
from sslfast.losses.momentum import BYOLLoss, KeyQueue, MoCoLoss, byol_loss, moco_loss
from sslfast.losses.prototypes import DINOLoss, IBOTLoss, dino_loss, ibot_loss, update_center_

__all__ = [
    "BYOLLoss",
    "DINOLoss",
    "IBOTLoss",
    "InfoNCELoss",
    "KeyQueue",
    "MAELoss",
    "MoCoLoss",
    "NTXentLoss",
    "byol_loss",
    "dino_loss",
    "ibot_loss",
    "info_nce_loss",
    "mae_loss",
    "moco_loss",
    "ntxent_loss",
    "update_center_",
]
