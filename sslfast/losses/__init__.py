"""Losses, each a few lines on the primitives of `sslfast.ops`."""

from sslfast.losses.contrastive import InfoNCELoss, NTXentLoss, info_nce_loss, ntxent_loss
from sslfast.losses.koleo import KoLeoLoss, koleo_loss
from sslfast.losses.masked import MAELoss, mae_loss
from sslfast.losses.momentum import BYOLLoss, KeyQueue, MoCoLoss, byol_loss, moco_loss
from sslfast.losses.prototypes import (
    DINOLoss,
    IBOTLoss,
    dino_head_loss,
    dino_loss,
    ibot_head_loss,
    ibot_loss,
    update_center_,
)
from sslfast.losses.sinkhorn import sinkhorn_center, sinkhorn_knopp

__all__ = [
    "BYOLLoss",
    "DINOLoss",
    "IBOTLoss",
    "InfoNCELoss",
    "KeyQueue",
    "KoLeoLoss",
    "MAELoss",
    "MoCoLoss",
    "NTXentLoss",
    "byol_loss",
    "dino_head_loss",
    "dino_loss",
    "ibot_head_loss",
    "ibot_loss",
    "info_nce_loss",
    "koleo_loss",
    "mae_loss",
    "moco_loss",
    "ntxent_loss",
    "sinkhorn_center",
    "sinkhorn_knopp",
    "update_center_",
]
