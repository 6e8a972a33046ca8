"""Views of a batch of images to train on, made on its device by `sslfast.augment_views`."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslfast.ops import PackedImages, ViewParams, ViewSpec, augment_views, view_specs
from sslfast.ops.view_specs import PRESETS

PRETRAINING, FINETUNING = 0, 1  # each has views of its own


@dataclass(frozen=True)
class Views:
    """Maps B images to a float32 view of each spec, [B, C, h, w] in channels_last."""

    specs: tuple[ViewSpec, ...]

    def __call__(
        self, images: Tensor | PackedImages, ids: Tensor | None = None, seed: int | None = None
    ) -> tuple[Tensor, ...]:
        """An image's views depend on its id, int64 [B], by default its place in the batch, and on the seed,
        by default a number that the device's generator gives."""
        generator = None if seed is None else torch.Generator(images.device).manual_seed(seed)
        views = augment_views(images, self.specs, ids=ids, generator=generator)
        return tuple(view.contiguous(memory_format=torch.channels_last) for view in views)


def squares(images: Tensor | PackedImages, size: int) -> Tensor:
    """Images as they are: float32 [B, C, H, W] in [0, 1]; of packed ones the square in the middle, scaled to
    `size` pixels a side (bicubic)."""
    if isinstance(images, Tensor):
        return images.float() / 255
    side = images.sizes.amin(1, keepdim=True)
    params = ViewParams.unchanged(images.sizes)
    params.crop.copy_(torch.cat([(images.sizes - side) // 2, side, side], dim=1))
    spec = ViewSpec(size, crop_scale=None, flip_prob=0.0, interpolation="bicubic")
    (views,) = augment_views(images, (spec,), params=params)
    return views


def epoch_seed(seed: int, epoch: int, stream: int = PRETRAINING) -> int:
    """The seed of all views of an epoch.

    It is the same for each batch, so that an image's views depend on it and on the image's id alone: not on
    the batch, the number of processes, or what was drawn before, which a run that goes on would have to draw
    again. Batches differ nevertheless, since an image comes once in an epoch.
    """
    numbers = np.random.SeedSequence(seed, spawn_key=(stream, epoch))
    return int(numbers.generate_state(1, np.uint64)[0])


def two_views(preset: str, image_size: int, channels: int) -> Views:
    """Two views of each image.

    Args:
        preset: one of `sslfast.view_specs`; of grey images without its changes of colour.

    Raises:
        ValueError: an unknown preset.
    """
    return Views(_specs(preset, image_size, channels))


def one_view(preset: str, image_size: int, channels: int) -> Views:
    """One view of each image, the first of the preset's two."""
    return Views(_specs(preset, image_size, channels)[:1])


def multi_crop(preset: str, image_size: int, channels: int, crops: int, crop_size: int, area: float) -> Views:
    """Two global views of each image and `crops` local ones, as DINO (Caron et al. 2021) has them.

    Args:
        preset: as in `two_views`; a local view is blurred half of the time and never solarized.
        image_size, crop_size: sides of global and local views in pixels.
        area: share of an image that global views have at least, and local ones, of at least 0.05, at most;
            of "mnist", whose global views are whole, local ones have at least half of it.
    """
    if not 0.1 <= area <= 1:
        raise ValueError(f"crop_area: expected a number in [0.1, 1], got {area}")
    whole = _specs(preset, image_size, channels)
    local = replace(_specs(preset, crop_size, channels)[0], jitter=whole[0].jitter)
    if preset == "mnist":
        local = replace(local, crop_scale=(area / 2, area))
    else:
        whole = tuple(replace(spec, crop_scale=(area, 1.0)) for spec in whole)
        blur = 0.5 if local.blur_prob else 0.0
        local = replace(local, crop_scale=(0.05, area), blur_prob=blur, solarize_prob=0.0)
    return Views((*whole, *(local,) * crops))


def local_size(image_size: int, patch: int | None, wanted: int) -> int:
    """Side of a small crop: `wanted`, or for 0 three sevenths of the image's, 96 of 224, in whole patches."""
    if wanted % (patch or 1):
        raise ValueError(f"local_size: expected a multiple of the patch, {patch}, got {wanted}")
    return wanted or max(1, round(image_size * 3 / 7 / (patch or 4))) * (patch or 4)


def _specs(preset: str, size: int, channels: int) -> tuple[ViewSpec, ...]:
    """The two of a preset."""
    if preset not in PRESETS:
        names = ", ".join(name for name in PRESETS if name != "mnist")
        raise ValueError(f"augment: expected mnist or one of {names}, got {preset!r}")
    # no mean and standard deviation: encoders are evaluated on images / 255
    ours: dict[str, Any] = {"channels": channels, "mean": None, "std": None}
    if channels == 1:
        ours |= {"jitter": (0.0,) * 4, "gray_prob": 0.0}
    specs = tuple(replace(spec, **ours) for spec in view_specs(preset, size, local_crops=0))
    return (specs * 2)[:2]
