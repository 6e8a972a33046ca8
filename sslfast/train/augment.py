"""Batched augmentations on the training device, by kornia. Images are float in [0, 1], [B, C, H, W]."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """How a view is made: a crop of at least `area` of the image and at most `most`, then what has a
    probability, then a flip.

    jitter: strengths of brightness, contrast, saturation and hue, in random order. colours: whether a view
    may have other ones, or none.
    """

    area: float = 0.08
    most: float = 1.0
    bicubic: bool = False
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_probability: float = 0.8
    gray_first: bool = False
    colours: bool = True
    blur: float = 0.5
    solarize: float = 0.0


_V3 = (0.4, 0.4, 0.2, 0.1)
# For each preset the recipes of the two views, as the official code has them.
RECIPES: dict[str, tuple[Recipe, Recipe]] = {
    "simclr": (Recipe(), Recipe()),  # its colour strength for small images, 0.5
    "mocov1": (Recipe(0.2, jitter=(0.4,) * 4, jitter_probability=1.0, gray_first=True, blur=0.0),) * 2,
    "mocov2": (Recipe(0.2), Recipe(0.2)),
    "mocov3": (Recipe(0.2, jitter=_V3, blur=1.0), Recipe(0.2, jitter=_V3, blur=0.1, solarize=0.2)),
    "byol": (
        Recipe(bicubic=True, jitter=_V3, blur=1.0),
        Recipe(bicubic=True, jitter=_V3, blur=0.1, solarize=0.2),
    ),
    "dino": (
        Recipe(0.4, bicubic=True, jitter=_V3, blur=1.0),
        Recipe(0.4, bicubic=True, jitter=_V3, blur=0.1, solarize=0.2),
    ),
    "mae": (Recipe(0.2, bicubic=True, colours=False, blur=0.0),) * 2,
}


def two_views(preset: str, image_size: int, channels: int) -> nn.Module:
    """A module that maps [B, C, H, W] to two such tensors: two random views of each image.

    Args:
        preset: a key of RECIPES, without blur up to 32 pixels and without colours for grey images; or
            "mnist": small affine maps, since digits are neither mirrored nor coloured.

    Raises:
        ValueError: an unknown preset.
    """
    kinds = [_mnist()] if preset == "mnist" else _views(preset, image_size, channels)
    return _Views(kinds, copies=2 // len(kinds))


def one_view(preset: str, image_size: int, channels: int) -> nn.Module:
    """A module that maps [B, C, H, W] to one view of each image, the first of the preset's two, as a
    1-tuple."""
    return _Views([_mnist()] if preset == "mnist" else _views(preset, image_size, channels)[:1], copies=1)


def multi_crop(
    preset: str, image_size: int, channels: int, crops: int, crop_size: int, area: float
) -> nn.Module:
    """A module that maps [B, C, H, W] to two global views and `crops` local ones, as DINO (Caron et al. 2021)
    has them.

    Args:
        preset: as in `two_views`; a local view is blurred half of the time and never solarized.
        image_size, crop_size: sides of global and local views in pixels.
        area: share of an image that global views have at least, and local ones, of at least 0.05, at most.
    """
    if not 0.1 <= area <= 1:
        raise ValueError(f"crop_area: expected a number in [0.1, 1], got {area}")
    if preset == "mnist":
        local: nn.Module = nn.Sequential(_mnist(), _crop((area / 2, area), crop_size, bicubic=False))
        globals_: list[nn.Module] = [_mnist()]
    else:
        recipe, second = (replace(r, area=area) for r in _recipes(preset))
        globals_ = [_view(r, image_size, channels) for r in dict.fromkeys((recipe, second))]
        blur = 0.5 if recipe.blur else 0.0
        small = replace(recipe, area=0.05, most=area, blur=blur, solarize=0.0)
        local = _view(small, crop_size, channels)
    return _MultiCrop(_Views(globals_, copies=2 // len(globals_)), _Views([local], crops))


def local_size(image_size: int, patch: int | None, wanted: int) -> int:
    """Side of a small crop: `wanted`, or for 0 three sevenths of the image's, 96 of 224, in whole patches."""
    if wanted % (patch or 1):
        raise ValueError(f"local_size: expected a multiple of the patch, {patch}, got {wanted}")
    return wanted or max(1, round(image_size * 3 / 7 / (patch or 4))) * (patch or 4)


class _MultiCrop(nn.Module):
    def __init__(self, globals_: nn.Module, locals_: "_Views") -> None:
        super().__init__()
        self.globals, self.locals = globals_, locals_

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return *self.globals(images), *(self.locals(images) if self.locals.copies else ())


def _recipes(preset: str) -> tuple[Recipe, Recipe]:
    if preset not in RECIPES:
        raise ValueError(f"augment: expected mnist or one of {', '.join(RECIPES)}, got {preset!r}")
    return RECIPES[preset]


def _views(preset: str, image_size: int, channels: int) -> list[nn.Module]:
    """Those of a preset's views that differ."""
    return [_view(recipe, image_size, channels) for recipe in dict.fromkeys(_recipes(preset))]


class _Views(nn.Module):
    """`copies` views of each kind, made at once."""

    def __init__(self, kinds: list[nn.Module], copies: int) -> None:
        super().__init__()
        self.kinds, self.copies = nn.ModuleList(kinds), copies

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        images = images.repeat(self.copies, 1, 1, 1) if self.copies > 1 else images
        views = [view for kind in self.kinds for view in kind(images).chunk(self.copies)]
        return tuple(v.clamp(0, 1).contiguous(memory_format=torch.channels_last) for v in views)


def _view(recipe: Recipe, size: int, channels: int) -> nn.Module:
    import kornia.augmentation as K

    crop = _crop((recipe.area, recipe.most), size, recipe.bicubic)
    colours: list[nn.Module] = []
    if channels == 3 and recipe.colours:
        colours = [K.ColorJitter(*recipe.jitter, p=recipe.jitter_probability), K.RandomGrayscale(p=0.2)]
    steps: list[nn.Module] = [crop, *(reversed(colours) if recipe.gray_first else colours)]
    if size > 32 and recipe.blur:
        kernel = size // 10 // 2 * 2 + 1
        steps.append(K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=recipe.blur))
    if recipe.solarize:
        steps.append(K.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=recipe.solarize))
    return nn.Sequential(*steps, K.RandomHorizontalFlip())


def _crop(area: tuple[float, float], size: int, bicubic: bool) -> nn.Module:
    import kornia.augmentation as K

    resample = "bicubic" if bicubic else "bilinear"
    return K.RandomResizedCrop((size, size), area, (3 / 4, 4 / 3), resample=resample)


def _mnist() -> nn.Module:
    import kornia.augmentation as K

    return K.RandomAffine(
        degrees=20.0,
        translate=(0.1, 0.1),
        scale=(0.7, 1.2),
        shear=(-15.0, 15.0, -15.0, 15.0),  # type: ignore[arg-type]  # x and y, which kornia's annotation leaves out
        p=0.5,  # half of the views are the digit as it is, which suits the few labels of the evaluation best
    )
