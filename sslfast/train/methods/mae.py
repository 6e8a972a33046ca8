"""MAE (He et al. 2022): an encoder sees a quarter of the patches, a decoder reconstructs the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sslfast import mae_loss, random_patch_mask, restore_patches
from sslfast.ops import patchify, unpatchify
from sslfast.train import augment, models, optim, report
from sslfast.train.config import TrainConfig
from sslfast.train.data import ImageSet
from sslfast.train.methods import Method
from sslfast.train.run import RECONSTRUCTION
from sslfast.train.vit import Block, ViT, resized_positions, sine_cosine_positions


@dataclass(frozen=True)
class Config(TrainConfig):
    """MAE (He et al. 2022).

    The paper's: --backbone vit_base --patch-size 16 --image-size 224 --epochs 800 --warmup-epochs 40
    --learning-rate 1.5e-4 per 256 images.
    """

    backbone: str = "vit_nano"
    """vit_nano (1.2 M parameters, for CPUs), vit_tiny, vit_small, vit_base, vit_large or vit_huge."""
    positions: Literal["learned", "fixed"] = "fixed"
    weight_decay: float = 0.05
    mask_ratio: float = 0.75
    """Share of the patches that are removed."""
    norm_pix: bool = True
    """Reconstruct pixels normalised by the mean and variance of their patch."""
    decoder_dim: int = 0
    """Width of the decoder; 0: 512, for vit_nano 64."""
    decoder_depth: int = 0
    """Its blocks; 0: 8, for vit_nano 2."""
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
    dim, depth, heads = (64, 2, 4) if cfg.backbone == "vit_nano" else (512, 8, 16)
    dim, depth, heads = cfg.decoder_dim or dim, cfg.decoder_depth or depth, cfg.decoder_heads or heads
    if dim % heads or dim % 4:
        raise ValueError(f"decoder_dim: expected a multiple of 4 and of {heads} heads, got {dim}")
    decoder = Decoder(encoder.dim, dim, depth, heads, encoder.grid, encoder.patch_size**2 * channels)
    return MAE(encoder, decoder, cfg.mask_ratio, cfg.norm_pix)


class Decoder(nn.Module):
    """Tokens of the visible patches [B, 1 + Lk, encoder_dim] -> pixels of all patches [B, L, pixels].

    Args:
        encoder_dim, dim, depth, heads: widths, blocks and heads per block.
        grid: rows and columns of patches of the training images; at others the positions are interpolated.
        pixels: numbers per patch.
    """

    positions: Tensor

    def __init__(
        self, encoder_dim: int, dim: int, depth: int, heads: int, grid: tuple[int, int], pixels: int
    ) -> None:
        super().__init__()
        self.grid = grid
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sine_cosine_positions(dim, grid)[None])
        self.blocks = nn.ModuleList(Block(dim, heads, drop_path=0.0) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pixels = nn.Linear(dim, pixels)

    def forward(self, x: Tensor, ids_restore: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.embed(x)
        positions = resized_positions(self.positions, self.grid, grid)
        patches = restore_patches(x[:, 1:], ids_restore, self.mask_token, positions)
        x = torch.cat([x[:, :1].to(patches.dtype), patches], dim=1)  # the class token's position is 0
        for block in self.blocks:
            x = block(x)
        return self.pixels(self.norm(x[:, 1:]))


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

    def views(self, cfg: TrainConfig, channels: int, size: int) -> nn.Module:
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
        loss = mae_loss(pred, images, mask, self.encoder.patch_size, self.norm_pix)
        return loss, {"embeddings": tokens.mean(1).detach()}

    @torch.no_grad()
    def show(self, images: ImageSet, out: Path, device: torch.device) -> dict[str, dict[str, list[float]]]:
        """reconstruction.png, and the squared error of the masked patches beside that of the mean of each
        image's visible pixels. A prediction of normalised pixels is put back to the true mean and
        variance."""
        self.to(device).eval()
        generator = torch.Generator(device).manual_seed(0)
        patch, sums, shown = self.encoder.patch_size, torch.zeros(3, device=device), None
        for batch in images.batches(torch.arange(min(len(images), 2000)).split(250), device):
            pixels = batch.float() / 255
            pred, mask, _ = self.reconstruct(pixels, generator)
            target, pred = patchify(pixels, patch), pred.float()
            if self.norm_pix:
                pred = pred * (target.var(2, keepdim=True) + 1e-6).sqrt() + target.mean(2, keepdim=True)
            visible = 1 - mask
            mean = (target.mean(2) * visible).sum(1) / visible.sum(1).clamp(min=1)
            errors = [((guess - target) ** 2).mean(2) for guess in (pred, mean[:, None, None])]
            sums += torch.stack([*((error * mask).sum() for error in errors), mask.sum()])
            shown = shown or (target[:10], mask[:10], pred[:10])
        if shown is None or not sums[2]:
            return {}
        target, mask, pred = shown
        hidden = mask.bool()[:, :, None]
        rows = [torch.where(hidden, other, target) for other in (torch.full_like(target, 0.5), pred)]
        pictures = [unpatchify(x, patch, images.shape) for x in (*rows, target)]
        report.pictures(("masked", "reconstructed", "original"), pictures, out / RECONSTRUCTION)
        ours, theirs = (sums[:2] / sums[2]).tolist()
        return {"squared error of masked patches": {"reconstruction": [ours], "visible mean": [theirs]}}


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
