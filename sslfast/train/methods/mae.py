"""MAE (He et al. 2022): an encoder sees a quarter of the patches, a decoder reconstructs the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sslfast import mae_loss, random_patch_mask
from sslfast.train import augment, models, optim, reconstruction
from sslfast.train.budget import phase
from sslfast.train.config import TrainConfig
from sslfast.train.data import ImageSet
from sslfast.train.methods import Method
from sslfast.train.vit import Decoder, ViT


@dataclass(frozen=True)
class Config(TrainConfig):
    """MAE (He et al. 2022).

    The paper's: --backbone vit_base --patch-size 16 --image-size 224 --epochs 800 --warmup-epochs 40
    --learning-rate 1.5e-4 per 256 images.
    """

    batch_size: int = 32
    """Images of one update; a small model on few images wants many updates."""
    learning_rate: float | None = 1e-3
    """Peak, after the warm-up."""
    backbone: str = "vit_nano"
    """vit_nano (0.8 M parameters, for CPUs), vit_tiny, vit_small, vit_base, vit_large or vit_huge."""
    positions: Literal["learned", "fixed"] = "fixed"
    weight_decay: float = 0.05
    mask_ratio: float = 0.75
    """Share of the patches that are removed."""
    norm_pix: bool = True
    """Reconstruct pixels normalised by the mean and variance of their patch."""
    decoder_dim: int = 0
    """Width of the decoder; 0: 512, for vit_nano 64."""
    decoder_depth: int = 0
    """Its blocks; 0: 8, for vit_nano 4."""
    decoder_heads: int = 0
    """Of its attention; 0: 16, for vit_nano 4."""
    pool: Literal["mean", "class"] = "mean"
    """What the evaluation sees of the encoder: the mean of its patches, or the class token."""

    recipe = "mae"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_share("mask_ratio")
        self.check_at_least(0, "decoder_dim", "decoder_depth", "decoder_heads")


def build(cfg: Config, channels: int, size: int) -> Method:
    encoder = models.build(cfg, channels, size, pool=cfg.pool)
    if not isinstance(encoder, ViT):
        raise ValueError(f"backbone: MAE masks the patches of a ViT, got {cfg.backbone!r}")
    dim, depth, heads = (64, 4, 4) if cfg.backbone == "vit_nano" else (512, 8, 16)
    dim, depth, heads = cfg.decoder_dim or dim, cfg.decoder_depth or depth, cfg.decoder_heads or heads
    if dim % heads or dim % 4:
        raise ValueError(f"decoder_dim: expected a multiple of 4 and of {heads} heads, got {dim}")
    decoder = Decoder(encoder.dim, dim, depth, heads, encoder.grid, encoder.patch_size**2 * channels)
    return MAE(encoder, decoder, cfg.mask_ratio, cfg.norm_pix)


class MAE(Method):
    """Encoder and decoder; only the encoder is kept."""

    encoder: ViT

    def __init__(
        self, encoder: ViT, decoder: Decoder, mask_ratio: float = 0.75, norm_pix: bool = True
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.mask_ratio, self.norm_pix = mask_ratio, norm_pix
        self.apply(_initialize)
        weight = encoder.patch_embed.weight
        nn.init.xavier_uniform_(weight.view(len(weight), -1))  # as the linear layer that it is
        for token in (encoder.class_token, decoder.mask_token):
            nn.init.normal_(token, std=0.02)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        return [{**group, "betas": (0.9, 0.95)} for group in optim.parameter_groups(self, weight_decay)]

    def views(self, cfg: TrainConfig, channels: int, size: int) -> augment.Views:
        return augment.one_view(cfg.resolve_augment(), size, channels)

    def reconstruct(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(predicted pixels [B, L, p p C], mask [B, L], the encoder's tokens [B, 1 + Lk, dim])"""
        grid = self.encoder.grid_of(*images.shape[-2:])
        drawn = random_patch_mask(
            len(images), grid[0] * grid[1], self.mask_ratio, device=images.device, generator=generator
        )
        tokens = self.encoder.tokens(images, drawn.ids_keep)
        return self.decoder(tokens, drawn.ids_restore, grid), drawn.mask, tokens

    def training_step(self, views: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        (images,) = views
        pred, mask, tokens = self.reconstruct(images)
        with phase("loss"):
            loss = mae_loss(pred, images, mask, self.encoder.patch_size, self.norm_pix)
        return loss, {"embeddings": tokens.mean(1).detach()}

    def show(self, images: ImageSet, out: Path, device: torch.device) -> dict[str, dict[str, list[float]]]:
        return reconstruction.show(self.to(device).eval(), images, out, device)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
