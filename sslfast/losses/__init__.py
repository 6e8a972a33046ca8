"""Losses, each a few lines on the primitives of `sslfast.ops`."""

from sslfast.losses.contrastive import InfoNCELoss, NTXentLoss, info_nce_loss, ntxent_loss

__all__ = ["InfoNCELoss", "NTXentLoss", "info_nce_loss", "ntxent_loss"]
