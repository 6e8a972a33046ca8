"""What a ViT looks at, and what its patches have in common, as pictures."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast.train import report
from sslfast.train.data import ImageSet
from sslfast.train.run import ATTENTION, COMPONENTS
from sslfast.train.vit import ViT

IMAGES = 8


@torch.no_grad()
def show(encoder: nn.Module, images: ImageSet, out: Path, device: torch.device) -> dict:
    """Draws attention.png, of the class token to the patches by each head of the last block, and
    components.png, the first three principal components of all patches' features as red, green and blue.

    Nothing for other networks than a ViT. Returns {}, as no number comes of it.
    """
    if not isinstance(encoder, ViT) or not len(images):
        return {}
    rows = torch.linspace(0, len(images) - 1, min(IMAGES, len(images))).long()
    (pixels,) = images.squares((rows,), device)
    grid, patch = encoder.grid_of(*pixels.shape[-2:]), encoder.patch_size

    maps = encoder.last_attention(pixels)[:, :, 0, 1:].unflatten(2, grid)  # [N, heads, h, w]
    heads = [_spread(x[:, None], (2, 3)).repeat(1, 3, 1, 1) for x in maps.unbind(1)]
    titles = ["image", *(f"head {i + 1}" for i in range(len(heads)))]
    report.pictures(titles, [pixels, *(_large(x, patch) for x in heads)], out / ATTENTION)

    tokens = encoder.tokens(pixels)[:, 1:]  # [N, L, dim]
    colours = components(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
    colours = colours.transpose(1, 2).unflatten(2, grid)
    report.pictures(["image", "components"], [pixels, _large(colours, patch)], out / COMPONENTS)
    return {}


def components(x: Tensor) -> Tensor:
    """[N, D] -> its first three principal components, each from 0 to 1: [N, 3]. Missing ones are 0."""
    x = x.double() - x.double().mean(0)
    _, _, directions = torch.linalg.svd(x, full_matrices=False)
    found = x @ directions[:3].T
    return F.pad(_spread(found, (0,)), (0, 3 - found.shape[1])).float()


def _spread(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """From 0 to 1 along dims."""
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    return (x - low) / (high - low).clamp(min=1e-12)


def _large(x: Tensor, patch: int) -> Tensor:
    """A square of pixels for each patch."""
    return x.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
