"""The plain PyTorch that benchmarks/masking.py times: masking, restoring and the loss as MAE's code computes
them (models_mae.py), and BEiT's generator of block masks (masking_generator.py)."""

import math
import random

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def mask(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """ids_keep [B, Lk], ids_restore [B, L] and mask [B, L], 1 = removed, of noise [B, L]."""
    keep = int(noise.shape[1] * (1 - ratio))
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    removed = torch.ones_like(noise)
    removed[:, :keep] = 0
    return ids_shuffle[:, :keep], ids_restore, torch.gather(removed, 1, ids_restore)


def gather(tokens: Tensor, ids: Tensor, pos: Tensor) -> Tensor:
    """The kept tokens [B, Lk, D] of all, positions [1, L, D] added."""
    tokens = tokens + pos
    return torch.gather(tokens, 1, ids.unsqueeze(-1).repeat(1, 1, tokens.shape[2]))


def restore(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
    """[B, Lk, D] to [B, L, D]; mask_token [1, 1, D]."""
    batch, kept, dim = tokens.shape
    whole = torch.cat((tokens, mask_token.repeat(batch, ids_restore.shape[1] - kept, 1)), dim=1)
    return torch.gather(whole, 1, ids_restore.unsqueeze(-1).repeat(1, 1, dim)) + pos


def embed(images: Tensor, ids: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
    """All patches by the convolution weight [D, 3, p, p], of which the kept ones are gathered."""
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[-1])
    return gather(tokens.flatten(2).transpose(1, 2), ids, pos)


def loss(
    pred: Tensor, images: Tensor, removed: Tensor, patch: int, norm_pix: bool, mean: Tensor, std: Tensor
) -> Tensor:
    """pred [B, L, p p 3]; images [B, 3, H, W], normalised, or uint8 to be normalised by mean, std [3]."""
    if images.dtype == torch.uint8:
        images = (images / 255 - mean[:, None, None]) / std[:, None, None]
    batch, channels, height, width = images.shape
    down, across = height // patch, width // patch
    target = images.reshape(batch, channels, down, patch, across, patch)
    target = torch.einsum("nchpwq->nhwpqc", target).reshape(batch, down * across, patch * patch * channels)
    if norm_pix:
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1e-6) ** 0.5
    error = ((pred - target) ** 2).mean(dim=-1)
    return (error * removed).sum() / removed.sum()


def beit_mask(height: int, width: int, count: int, least: int, aspect: tuple[float, float]) -> np.ndarray:
    """One image's mask: blocks of `least` patches or more until `count` patches are masked or ten in a row do
    not fit."""
    found, left = np.zeros((height, width), dtype=np.int64), count
    while left > 0:
        added = 0
        for _ in range(10):
            area = random.uniform(least, left)
            ratio = math.exp(random.uniform(*map(math.log, aspect)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w >= width or h >= height:
                continue
            top, across = random.randint(0, height - h), random.randint(0, width - w)
            new = h * w - found[top : top + h, across : across + w].sum()
            if 0 < new <= left:
                for i in range(top, top + h):
                    for j in range(across, across + w):
                        if found[i, j] == 0:
                            found[i, j] = 1
                            added += 1
                break
        if added == 0:
            break
        left -= added
    return found


def block_masks(
    batch: int, grid: tuple[int, int], count: int, least: int, aspect: tuple[float, float], device: str
) -> Tensor:
    """[B, H, W] on the device, one image after the other."""
    masks = [beit_mask(*grid, count, least, aspect) for _ in range(batch)]
    return torch.from_numpy(np.stack(masks)).to(device)
