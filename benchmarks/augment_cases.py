"""What benchmarks/augment.py times: presets, the images that they make
views of, and the steps of a preset."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import augment_plain as plain
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from sslfast import PackedImages, ViewSpec

SETS = {"cpu": 2, "cuda": 3}  # of images, used in turn
FEW = 8  # images that the reference makes views of
PHOTOGRAPHS = ((375, 500), (500, 333), (500, 375), (333, 500))


@dataclass(frozen=True)
class Case:
    name: str
    preset: str
    sizes: tuple[tuple[int, int], ...] = ((224, 224),)
    """of the images, in turn; of more than one they are packed"""
    cpu_batch: int = 64
    """on a GPU 256"""


CASES = (  # those with a target first
    Case("simclr", "simclr", cpu_batch=256),
    Case("dino", "dino"),
    Case("photographs, simclr", "simclr", PHOTOGRAPHS),
    Case("byol", "byol"),
    Case("mocov2", "mocov2"),
    Case("mae", "mae"),
)
# Of calls with the case's own batch: times as fast as another, or milliseconds on an H100.
TARGETS: dict[tuple[str, str], dict[str, float]] = {
    ("cpu", "simclr"): {"kornia": 5, "Pillow": 3},
    ("cuda", "simclr"): {"ms": 3, "kornia": 30},
    ("cuda", "dino"): {"ms": 6},
}


class Inputs(NamedTuple):
    images: Tensor | PackedImages
    """on the device"""
    packed: PackedImages
    """the same on the CPU, for Pillow"""
    floats: Tensor | None
    """the same in [0, 1], for kornia"""


def photographs(count: int, height: int, width: int, device: str) -> Tensor:
    """uint8 [count, 3, h, w]: noise of all scales, weaker the finer it is, and less of it in the colours."""
    x = 0.45 + 0.02 * torch.randn(count, 3, height, width, device=device)
    for side, weight in ((4, 0.20), (12, 0.12), (40, 0.07), (110, 0.04)):
        noise = torch.randn(count, 1, side, side, device=device)
        noise = weight * (noise + 0.5 * torch.randn(count, 3, side, side, device=device))
        x += F.interpolate(noise, (height, width), mode="bilinear")
    return x.clamp_(0, 1).mul_(255).round_().to(torch.uint8)


@functools.lru_cache(maxsize=3)
def inputs_of(sizes: tuple[tuple[int, int], ...], batch: int, device: str) -> list[Inputs]:
    """Several sets, each of other images."""
    found = []
    for _ in range(SETS[device]):
        kinds = [photographs(-(-batch // len(sizes)), *size, device) for size in sizes]
        listed = [kinds[i % len(sizes)][i // len(sizes)] for i in range(batch)]
        packed = sslfast.pack_images([image.cpu() for image in listed])
        if len(sizes) > 1:
            found.append(Inputs(packed.to(device), packed, None))
        else:
            images = kinds[0]
            found.append(Inputs(images, packed, images / 255 if plain.K else None))
    return found


def few_of(images: Tensor | PackedImages, rows: Tensor) -> Tensor | PackedImages:
    if isinstance(images, Tensor):
        return images[rows]
    return PackedImages(images.data, images.offsets[rows], images.sizes[rows], images.channels)


def own_batch(case: Case, device: str) -> int:
    return case.cpu_batch if device == "cpu" else 256


def with_more_steps(specs: list[ViewSpec]) -> dict[str, list[ViewSpec]]:
    """The specs with the crop alone, and with one step after the other besides; those without effect are left
    out."""
    steps: dict[str, Callable[[ViewSpec], dict]] = {
        "flip": lambda s: {"flip_prob": s.flip_prob},
        "jitter but hue": lambda s: {"jitter_prob": s.jitter_prob, "jitter": (*s.jitter[:3], 0.0)},
        "hue": lambda s: {"jitter": s.jitter},
        "gray": lambda s: {"gray_prob": s.gray_prob},
        "blur": lambda s: {"blur_prob": s.blur_prob},
        "solarize": lambda s: {"solarize_prob": s.solarize_prob},
        "normalise": lambda s: {"mean": s.mean, "std": s.std},
    }
    none: dict = {f"{step}_prob": 0.0 for step in ("flip", "jitter", "gray", "blur", "solarize")}
    now = [replace(s, mean=None, std=None, jitter=(0.0,) * 4, **none) for s in specs]
    found = {"crop": now}
    for name, fields in steps.items():
        more = [replace(s, **fields(whole)) for s, whole in zip(now, specs, strict=True)]
        if more != now:
            found[f"+ {name}"] = now = more
    return found
