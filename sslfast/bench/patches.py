"""Teachers, masks, patches and views."""

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from sslfast.bench.case import Case, Inputs, Work

LENGTH, WIDTH, DECODER, PATCH, PIXELS, KEEP = 196, 768, 512, 16, 768, 49  # MAE's of ViT-B
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COUNT, LEAST, ASPECT = 75, 16, (0.3, 1 / 0.3)  # BEiT's block masks of 14 x 14 patches
MOMENTUM = 0.996
BATCHES: dict[str, Any] = dict(sizes=(64,), gpu_sizes=(1024,))


# The teacher.


def vit(dim: int, depth: int) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a vision transformer of 16-pixel patches at 224 pixels."""
    block: list[tuple[int, ...]] = [
        (dim,),
        (dim,),
        (3 * dim, dim),
        (3 * dim,),
        (dim, dim),
        (dim,),
        (dim,),
        (dim,),
    ]
    block += [(4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)]
    return [(1, 1, dim), (1, 197, dim), (dim, 3, 16, 16), (dim,), *block * depth, (dim,), (dim,)]


def weights_of(shapes: list[tuple[int, ...]] | None):
    """Of a model; None: as many tensors of 64 numbers as the size says."""

    def inputs(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        of = shapes or [(64,)] * size
        return {
            name: [torch.randn(shape, device=device).to(dtype) for shape in of]
            for name in ("targets", "sources")
        }

    return inputs


@torch.no_grad()
def plain_ema(targets: list[Tensor], sources: list[Tensor]) -> None:
    for t, s in zip(targets, sources, strict=True):
        t.mul_(MOMENTUM).add_(s, alpha=1 - MOMENTUM)


def _ema(
    shape: str,
    shapes: list[tuple[int, ...]] | None,
    variant: str,
    sizes: tuple[int, ...],
    gpu_sizes: tuple[int, ...] = (),
) -> Case:
    def work(size: int, itemsize: int, backward: bool) -> Work:
        return Work(bytes=3 * itemsize * sum(math.prod(s) for s in shapes or [(64,)] * size))

    return Case(
        "ema_update_",
        shape,
        sizes,
        gpu_sizes or sizes,
        weights_of(shapes),
        ours=lambda targets, sources: sslfast.ema_update_(targets, sources, MOMENTUM),
        plain=plain_ema,
        work=work,
        compiles=False,
        updated="targets",
        variant=variant,
    )


# Masks.


def noise(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """No two alike, as rows of few numbers nearly always are."""
    return {"noise": torch.rand(size, LENGTH, device=device).argsort(1).float() / LENGTH}


def plain_mask(noise: Tensor, ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
    """models_mae.py: ids_keep [B, Lk], ids_restore [B, L], mask [B, L] with 1 = removed."""
    keep = int(noise.shape[1] * (1 - ratio))
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    removed = torch.ones_like(noise)
    removed[:, :keep] = 0
    return ids_shuffle[:, :keep], ids_restore, torch.gather(removed, 1, ids_restore)


def _beit_mask() -> np.ndarray:
    """masking_generator.py: blocks of `least` patches or more until `count` are masked or ten in a row do not
    fit."""
    found, left = np.zeros((14, 14), dtype=np.int64), COUNT
    while left > 0:
        added = 0
        for _ in range(10):
            area = random.uniform(LEAST, left)
            ratio = math.exp(random.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w >= 14 or h >= 14:
                continue
            top, across = random.randint(0, 14 - h), random.randint(0, 14 - w)
            block = found[top : top + h, across : across + w]
            if 0 < h * w - block.sum() <= left:
                added = int(h * w - block.sum())
                block[:] = 1
                break
        if added == 0:
            break
        left -= added
    return found


def plain_blocks(batch: int, device: torch.device) -> Tensor:
    """An image after the other. Masks are random: only that none is too large can be compared."""
    masks = torch.from_numpy(np.stack([_beit_mask() for _ in range(batch)])).to(device)
    return masks.sum((1, 2)) <= COUNT


def our_blocks(batch: int, device: torch.device) -> Tensor:
    share = (LEAST / LENGTH, COUNT / LENGTH)
    mask = sslfast.block_patch_mask(
        batch, (14, 14), ratio_range=share, aspect_range=ASPECT, num_masked=COUNT, device=device
    )
    return mask.sum(1) == COUNT


# Patches.


def normal(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def kept(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    ids, restore, removed = plain_mask(torch.rand(size, LENGTH, device=device))
    return ids.contiguous(), restore, removed


def tokens(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    return {
        "tokens": normal(dtype, device, size, LENGTH, WIDTH),
        "ids_keep": kept(size, device)[0],
        "pos_embed": normal(dtype, device, 1, LENGTH, WIDTH),
    }


def latent(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    return {
        "tokens": normal(dtype, device, size, KEEP, DECODER),
        "ids_restore": kept(size, device)[1],
        "mask_token": normal(dtype, device, 1, 1, DECODER),
        "pos_embed": normal(dtype, device, 1, LENGTH, DECODER),
    }


def images(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    return {
        "images": normal(dtype, device, size, 3, 224, 224),
        "ids_keep": kept(size, device)[0],
        "weight": normal(dtype, device, WIDTH, 3, PATCH, PATCH) * PIXELS**-0.5,
        "bias": normal(dtype, device, WIDTH),
        "pos_embed": normal(dtype, device, 1, LENGTH, WIDTH),
    }


def predictions(kind: str):
    def inputs(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        shape = (size, 3, 224, 224)
        made = (
            torch.randint(256, shape, device=device, dtype=torch.uint8)
            if kind == "uint8"
            else torch.randn(shape, device=device)
        )
        return {
            "pred": normal(dtype, device, size, LENGTH, PIXELS),
            "images": made,
            "mask": kept(size, device)[2],
        }

    return inputs


def plain_gather(tokens: Tensor, ids_keep: Tensor, pos_embed: Tensor) -> Tensor:
    tokens = tokens + pos_embed
    return torch.gather(tokens, 1, ids_keep.unsqueeze(-1).repeat(1, 1, tokens.shape[2]))


def plain_restore(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    batch, found, dim = tokens.shape
    whole = torch.cat((tokens, mask_token.repeat(batch, ids_restore.shape[1] - found, 1)), dim=1)
    return torch.gather(whole, 1, ids_restore.unsqueeze(-1).repeat(1, 1, dim)) + pos_embed


def plain_embed(images: Tensor, ids_keep: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor) -> Tensor:
    """All patches by a convolution, of which the kept ones are gathered."""
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    return plain_gather(tokens, ids_keep, pos_embed)


def plain_error(
    pred: Tensor, images: Tensor, mask: Tensor, norm_pix: bool, power: int = 2, patch: int = PATCH
) -> Tensor:
    """models_mae.py: the target is patchified, and normalised patch by patch."""
    work = torch.promote_types(pred.dtype, torch.float32)
    if images.dtype == torch.uint8:
        mean, std = (torch.tensor(x, device=images.device, dtype=work)[:, None, None] for x in (MEAN, STD))
        images = (images / 255 - mean) / std
    batch, channels, height, width = images.shape
    down, across = height // patch, width // patch
    target = images.reshape(batch, channels, down, patch, across, patch)
    target = torch.einsum("nchpwq->nhwpqc", target).reshape(batch, down * across, -1)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    error = (pred - target).abs() if power == 1 else (pred - target) ** 2
    return (error.mean(-1) * mask).sum() / mask.sum()


def of_gathering(size: int, itemsize: int, backward: bool) -> Work:
    """Kept rows read and written, positions; backward kept rows read and all written, most of them zeros."""
    rows = size * 2 * KEEP + LENGTH + backward * size * (KEEP + LENGTH)
    return Work(bytes=itemsize * WIDTH * rows + 8 * size * KEEP * (1 + backward))


def of_restoring(size: int, itemsize: int, backward: bool) -> Work:
    """Kept rows read, all written, positions; backward the other way round."""
    rows = size * (KEEP + LENGTH) * (1 + backward) + LENGTH + 1 + backward
    return Work(bytes=itemsize * DECODER * rows + 8 * size * LENGTH * (1 + backward))


def of_embedding(size: int, itemsize: int, backward: bool) -> Work:
    rows = size * KEEP
    passes = 2 if backward else 1  # images have no gradient
    numbers = passes * (rows * (PIXELS + WIDTH) + WIDTH * PIXELS) + LENGTH * WIDTH
    return Work(2 * rows * PIXELS * WIDTH * passes, itemsize * numbers + 8 * rows)


def of_error(pixel_bytes: int):
    def work(size: int, itemsize: int, backward: bool) -> Work:
        missing, whole = size * (LENGTH - KEEP), size * LENGTH
        return Work(
            bytes=missing * PIXELS * (itemsize + pixel_bytes)
            + itemsize * whole * PIXELS * backward
            + 4 * whole
        )

    return work


def _error(op: str, variant: str, kind: str, ours: Callable[..., Any], plain: Callable[..., Any]) -> Case:
    return Case(
        op,
        "{} x 224 x 224",
        **BATCHES,
        inputs=predictions(kind),
        ours=ours,
        plain=plain,
        trained=("pred",),
        work=of_error(1 if kind == "uint8" else 4),
        variant=variant,
    )


# Views.


def pictures(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Pixels of which neighbours are alike, and what was drawn for their views."""
    small = torch.randint(256, (size, 3, 28, 28), device=device, dtype=torch.uint8)
    images = small.repeat_interleave(8, 2).repeat_interleave(8, 3)
    generator = torch.Generator(device).manual_seed(0)
    specs = sslfast.view_specs("simclr", 224)
    _, params = sslfast.augment_views(images, specs, generator=generator, return_params=True)
    return {"images": images, "params": params, "out_dtype": dtype if dtype.itemsize < 8 else torch.float32}


CASES = (
    _ema("86 M parameters", vit(768, 12), "ViT-B", (86,)),
    _ema("303 M parameters", vit(1024, 24), "ViT-L", (), (303,)),
    _ema("{} tensors of 64", None, "small tensors", (5000,)),
    Case(
        "random_patch_mask",
        "{} x 196",
        **BATCHES,
        inputs=noise,
        plain=plain_mask,
        dtypes=("float32",),
        ours=lambda noise: tuple(sslfast.random_patch_mask(len(noise), LENGTH, 0.75, noise=noise)),
        work=lambda size, itemsize, backward: Work(bytes=size * (LENGTH * 16 + 8 * KEEP)),
    ),
    Case(
        "block_patch_mask",
        "{} x 14 x 14",
        **BATCHES,
        plain=plain_blocks,
        compiles=False,
        dtypes=("float32",),
        inputs=lambda n, dtype, device: {"batch": n, "device": device},
        ours=our_blocks,
        work=lambda size, itemsize, backward: Work(bytes=4 * size * LENGTH),
    ),
    Case(
        "gather_patches",
        "{} x 196 x 768",
        **BATCHES,
        inputs=tokens,
        ours=sslfast.gather_patches,
        plain=plain_gather,
        trained=("tokens",),
        work=of_gathering,
    ),
    Case(
        "restore_patches",
        "{} x 49 x 512",
        **BATCHES,
        inputs=latent,
        ours=sslfast.restore_patches,
        plain=plain_restore,
        trained=("tokens", "mask_token"),
        work=of_restoring,
    ),
    Case(
        "embed_visible_patches",
        "{} x 224 x 224",
        **BATCHES,
        inputs=images,
        plain=plain_embed,
        ours=partial(sslfast.embed_visible_patches, patch_size=PATCH),
        trained=("weight", "bias"),
        work=of_embedding,
    ),
    _error(
        "mae_loss",
        "norm_pix",
        "float",
        partial(sslfast.mae_loss, patch_size=PATCH),
        partial(plain_error, norm_pix=True),
    ),
    _error(
        "masked_patch_mse",
        "",
        "float",
        partial(sslfast.masked_patch_mse, patch_size=PATCH),
        partial(plain_error, norm_pix=False),
    ),
    _error(
        "masked_patch_mse",
        "norm_pix, uint8 images",
        "uint8",
        partial(sslfast.masked_patch_mse, patch_size=PATCH, norm_pix=True, mean=MEAN, std=STD),
        partial(plain_error, norm_pix=True),
    ),
    _error(
        "masked_patch_l1",
        "",
        "float",
        partial(sslfast.masked_patch_l1, patch_size=PATCH),
        partial(plain_error, norm_pix=False, power=1),
    ),
    Case(
        "augment_views",
        "{} x 224 x 224, 2 views",
        (16,),
        (256,),
        pictures,
        compiles=False,
        ours=lambda images, params, out_dtype: sslfast.augment_views(
            images, "simclr", params=params, out_dtype=out_dtype
        ),
        work=lambda size, itemsize, backward: Work(bytes=size * 3 * 224**2 * (1 + 2 * itemsize)),
    ),
)
