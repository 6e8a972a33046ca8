"""Losses, each a few lines on the primitives of `sslfast.ops`."""

from sslfast.losses.clip import CLIPLoss, SigLIPLoss, clip_loss, siglip_loss
from sslfast.losses.contrastive import (
    InfoNCELoss,
    NTXentLoss,
    info_nce_loss,
    multiview_ntxent_loss,
    ntxent_loss,
)
from sslfast.losses.koleo import KoLeoLoss, koleo_loss
from sslfast.losses.linear import linear_cross_entropy
from sslfast.losses.masked import MAELoss, mae_loss
from sslfast.losses.momentum import BYOLLoss, KeyQueue, MoCoLoss, byol_loss, moco_loss, nnclr_loss
from sslfast.losses.negatives import (
    DCLLoss,
    HardNegativeNTXentLoss,
    dcl_loss,
    hard_negative_ntxent_loss,
)
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
from sslfast.losses.supcon import SupConLoss, supcon_loss
from sslfast.losses.triplet import triplet_margin_loss

__all__ = [
    "BYOLLoss",
    "CLIPLoss",
    "DCLLoss",
    "DINOLoss",
    "HardNegativeNTXentLoss",
    "IBOTLoss",
    "InfoNCELoss",
    "KeyQueue",
    "KoLeoLoss",
    "MAELoss",
    "MoCoLoss",
    "NTXentLoss",
    "SigLIPLoss",
    "SupConLoss",
    "byol_loss",
    "clip_loss",
    "dcl_loss",
    "dino_head_loss",
    "dino_loss",
    "hard_negative_ntxent_loss",
    "ibot_head_loss",
    "ibot_loss",
    "info_nce_loss",
    "koleo_loss",
    "linear_cross_entropy",
    "mae_loss",
    "moco_loss",
    "multiview_ntxent_loss",
    "nnclr_loss",
    "ntxent_loss",
    "siglip_loss",
    "sinkhorn_center",
    "sinkhorn_knopp",
    "supcon_loss",
    "triplet_margin_loss",
    "update_center_",
]
