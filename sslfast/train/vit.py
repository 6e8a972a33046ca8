"""Vision transformer (Dosovitskiy et al. 2021) with a class token, for any image size."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast import embed_visible_patches, restore_patches

SIZES: dict[str, dict[str, int]] = {
    "vit_nano": {"dim": 128, "depth": 4, "heads": 4},
    "vit_tiny": {"dim": 192, "depth": 12, "heads": 3},
    "vit_small": {"dim": 384, "depth": 12, "heads": 6},
    "vit_base": {"dim": 768, "depth": 12, "heads": 12},
    "vit_large": {"dim": 1024, "depth": 24, "heads": 16},
    "vit_huge": {"dim": 1280, "depth": 32, "heads": 16},
}


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, L, dim / heads]
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.scaled_dot_product_attention(*self._split(x)).transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """softmax(q k / sqrt(dim / heads)): [B, heads, L, L]."""
        q, k, _ = self._split(x)
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a shortcut.

    drop_path: probability that a sample skips a branch in training; the others are scaled by 1 / (1 -
    drop_path).
    """

    def __init__(self, dim: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop_path = drop_path

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        return branch * (branch.new_empty(len(branch), 1, 1).bernoulli_(keep) / keep)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self.attention(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """[B, C, H, W] -> class token, or mean of the patches, after the last LayerNorm [B, dim].

    Args:
        channels, image_size: of the training images; at other sizes the positions are interpolated.
        patch_size: side in pixels; divides the sides of every image.
        dim, depth, heads: see SIZES.
        positions: "learned", or "fixed": sine and cosine of the two coordinates.
        drop_path: of the last block; it grows linearly from 0 at the first.
        pool: "class" or "mean".

    Raises:
        ValueError: a patch that does not divide the image, unknown positions or pool.
    """

    def __init__(
        self,
        channels: int,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        *,
        positions: str = "learned",
        drop_path: float = 0.0,
        pool: str = "class",
    ) -> None:
        super().__init__()
        if pool not in ("class", "mean"):
            raise ValueError(f"pool: expected class or mean, got {pool!r}")
        if positions not in ("learned", "fixed"):
            raise ValueError(f"positions: expected learned or fixed, got {positions!r}")
        self.dim, self.patch_size, self.pool = dim, patch_size, pool
        self.grid = self.grid_of(image_size, image_size)
        self.patch_embed = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = torch.zeros(1, math.prod(self.grid), dim)  # [1, L, dim]
        class_position = torch.zeros(1, 1, dim)
        if positions == "learned":
            self.positions = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
            self.class_position = nn.Parameter(nn.init.trunc_normal_(class_position, std=0.02))
        else:
            self.register_buffer("positions", sine_cosine_positions(dim, self.grid)[None])
            self.register_buffer("class_position", class_position)
        self.blocks = nn.ModuleList(
            Block(dim, heads, drop_path * i / max(1, depth - 1)) for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        return tokens[:, 0] if self.pool == "class" else tokens[:, 1:].mean(1)

    def tokens(
        self, x: Tensor, ids_keep: Tensor | None = None, hidden: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """All tokens after the last LayerNorm, the class token first: [B, 1 + L, dim].

        With ids_keep [B, Lk] those of the kept patches alone, [B, 1 + Lk, dim]: the others are not embedded.
        hidden: (mask [B, L], 1 where a patch is replaced, and the token [dim] in its place).
        """
        x = self.embed(x, hidden) if ids_keep is None else self._embed_visible(x, ids_keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def last_attention(self, x: Tensor) -> Tensor:
        """Attention weights of the last block, queries in rows: [B, heads, 1 + L, 1 + L]."""
        x = self.embed(x)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        assert isinstance(last, Block)
        return last.attention.weights(last.norm1(x))

    def embed(self, x: Tensor, hidden: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Patches with positions behind the class token: [B, 1 + L, dim]."""
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        if hidden is not None:
            mask, token = hidden
            patches = torch.where(mask.bool()[:, :, None], token.to(patches.dtype), patches)
        return self._behind_class_token(patches + self._positions_for(self.grid_of(*x.shape[-2:])))

    def _embed_visible(self, x: Tensor, ids_keep: Tensor) -> Tensor:
        weight, bias = self.patch_embed.weight, self.patch_embed.bias
        positions = self._positions_for(self.grid_of(*x.shape[-2:]))
        patches = embed_visible_patches(x, ids_keep, weight, bias, positions, patch_size=self.patch_size)
        return self._behind_class_token(patches)

    def _behind_class_token(self, patches: Tensor) -> Tensor:
        class_token = (self.class_token + self.class_position).expand(len(patches), -1, -1)
        return torch.cat([class_token.to(patches.dtype), patches], dim=1)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of such an image."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"patch_size: expected a divisor of {height} and {width}, got {self.patch_size}")
        return height // self.patch_size, width // self.patch_size

    def _positions_for(self, grid: tuple[int, int]) -> Tensor:
        return resized_positions(self.positions, self.grid, grid)


def set_drop_path(encoder: nn.Module, rate: float) -> None:
    """Of a ViT's last block; it grows linearly from 0 at the first."""
    blocks = [block for block in encoder.modules() if isinstance(block, Block)]
    for i, block in enumerate(blocks):
        block.drop_path = rate * i / max(1, len(blocks) - 1)


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


def resized_positions(table: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Positions [1, H * W, dim] of one grid interpolated to those of another."""
    if wanted == grid:
        return table
    table = table.unflatten(1, grid).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=wanted, mode="bicubic", align_corners=False)
    return table.flatten(2).transpose(1, 2)


def sine_cosine_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed positions as MAE has them: [H * W, dim].

    The first half of the channels is for the column, the second for the row; each half is sines, then
    cosines, of the coordinate times 10000^(-i / (dim / 4)).

    Raises:
        ValueError: dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim: expected a multiple of 4 for fixed positions, got {dim}")
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid)
    frequency = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    angles = [coordinate.flatten()[:, None] * frequency for coordinate in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()
