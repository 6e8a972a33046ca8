"""ViewSpec: how one view of an image is made; view_specs: the recipes of published methods."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from sslfast.ops._check import check_choice, check_count, check_integer, number

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGEST = 8192  # side of a view, and radius of a blur

Pair = tuple[float, float]


@dataclass(frozen=True)
class ViewSpec:
    """A random view: crop and resize, flip, affine map, colours, blur, solarize, normalise, in this order.

    Every step but the resize is left out where its probability is 0, the default of most. Lengths are in
    pixels of the view, angles in degrees, and colours in [0, 1]. All steps but the affine map, whose shifts
    are not rounded to pixels, are those of torchvision's transforms.

    Attributes:
        size: height and width of the view, or the side of a square; None: that of the call.
        channels: 3, grey images being repeated, or 1, colours being mixed to grey as Pillow does. An alpha
            channel is dropped.
        crop_scale: least and greatest share of the image's area that the crop covers, in (0, 1], uniform;
            None: the whole image.
        crop_ratio: least and greatest width / height of the crop, log-uniform.
        interpolation: "bilinear" or "bicubic", antialiased: Pillow's filters.
        flip_prob: of a horizontal flip.
        affine_prob: of a random affine map about the centre: a rotation of up to +-degrees, shears of up to
            +-shear along x and along y, a factor from affine_scale, a shift of up to translate times width
            and height. Bilinear; what was outside the view is 0.
        jitter: strengths of brightness, contrast, saturation (factors are in [max(0, 1 - s), 1 + s]) and hue
            (a shift in [-s, s] turns, s <= 0.5), in an order that is random for each image.
        jitter_prob: of all four.
        gray_prob: of dropping the colours.
        gray_first: before the jitter, instead of after it.
        blur_prob: of a Gaussian blur.
        blur_kernel: its width, odd; the view is reflected at its edges.
        blur_sigma: least and greatest standard deviation, uniform.
        solarize_prob: of inverting all values of at least solarize_threshold.
        mean, std: of each channel: views are (value - mean) / std. At most 1e6, std at least 1e-6. None: 0
            and 1.

    Raises:
        TypeError, ValueError: a field of the wrong type or value; the message names it.
    """

    size: int | tuple[int, int] | None = None
    channels: int = 3
    crop_scale: Pair | None = (0.08, 1.0)
    crop_ratio: Pair = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip_prob: float = 0.5
    affine_prob: float = 0.0
    degrees: float = 0.0
    translate: Pair = (0.0, 0.0)
    affine_scale: Pair = (1.0, 1.0)
    shear: float = 0.0
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_prob: float = 0.8
    gray_prob: float = 0.0
    gray_first: bool = False
    blur_prob: float = 0.0
    blur_kernel: int = 23
    blur_sigma: Pair = (0.1, 2.0)
    solarize_prob: float = 0.0
    solarize_threshold: float = 0.5
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):  # lists, as files of options have them, become tuples: specs are hashable
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        if self.size is not None:
            object.__setattr__(self, "size", pair_of_sizes("size", self.size))
        check_count("channels", self.channels, (1, 3))
        for name in ("flip_prob", "affine_prob", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob"):
            if not 0 <= number(name, getattr(self, name)) <= 1:
                raise ValueError(f"{name}: expected a probability, got {getattr(self, name)}")
        check_choice("interpolation", self.interpolation, ("bilinear", "bicubic"))
        if self.crop_scale is not None:
            low, high = _numbers("crop_scale", self.crop_scale, 2)
            if not 0 < low <= high <= 1:
                raise ValueError(
                    f"crop_scale: expected a lowest and a highest share in (0, 1], got {self.crop_scale}"
                )
        self._check_positive("crop_ratio", 1e-3, 1e3)
        self._check_positive("affine_scale", 1e-3, 1e3)
        self._check_positive("blur_sigma", 1e-3, 1e3)
        for name, most in (("degrees", 360.0), ("shear", 80.0)):
            if not 0 <= number(name, getattr(self, name)) <= most:
                raise ValueError(f"{name}: expected a number in [0, {most:.0f}], got {getattr(self, name)}")
        if not all(0 <= x <= 1 for x in _numbers("translate", self.translate, 2)):
            raise ValueError(f"translate: expected two numbers in [0, 1], got {self.translate}")
        jitter = _numbers("jitter", self.jitter, 4)
        if not all(0 <= x <= 10 for x in jitter) or jitter[3] > 0.5:
            raise ValueError(
                "jitter: expected brightness, contrast and saturation in [0, 10], hue in [0, 0.5], "
                f"got {jitter}"
            )
        if not isinstance(self.gray_first, bool):
            raise TypeError(f"gray_first: expected a bool, got {type(self.gray_first).__name__}")
        check_integer("blur_kernel", self.blur_kernel, 1)
        if self.blur_kernel % 2 == 0 or self.blur_kernel > 2 * LARGEST:
            raise ValueError(
                f"blur_kernel: expected an odd number up to {2 * LARGEST}, got {self.blur_kernel}"
            )
        number("solarize_threshold", self.solarize_threshold)
        for name in ("mean", "std"):
            if getattr(self, name) is not None:
                if max(map(abs, _numbers(name, getattr(self, name), self.channels))) > 1e6:
                    raise ValueError(f"{name}: expected numbers of at most 1e6, got {getattr(self, name)}")
        if self.std is not None and min(self.std) < 1e-6:
            raise ValueError(f"std: expected numbers of at least 1e-6, got {self.std}")

    def _check_positive(self, name: str, least: float, most: float) -> None:
        low, high = _numbers(name, getattr(self, name), 2)
        if not least <= low <= high <= most:
            raise ValueError(
                f"{name}: expected a lowest and a highest number in [{least:g}, {most:g}], "
                f"got {getattr(self, name)}"
            )


def _numbers(name: str, given: Sequence[float], count: int) -> tuple[float, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{name}: expected {count} numbers, got {given!r}")
    if len(given) != count:
        raise ValueError(f"{name}: expected {count} numbers, got {len(given)}")
    return tuple(float(number(name, x)) for x in given)


def pair_of_sizes(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, Sequence) or isinstance(sides, str) or len(sides) != 2:
        raise TypeError(f"{name}: expected a side in pixels, or (height, width), got {size!r}")
    for side in sides:
        check_integer(name, side, 1)
        if side > LARGEST:
            raise ValueError(f"{name}: expected at most {LARGEST} pixels, got {side}")
    return sides[0], sides[1]


def _preset(views: int = 2, **fields_of_spec: object) -> tuple[ViewSpec, ...]:
    return (ViewSpec(mean=IMAGENET_MEAN, std=IMAGENET_STD, **fields_of_spec),) * views  # type: ignore[arg-type]


def _asymmetric(crop_scale: Pair, interpolation: Literal["bilinear", "bicubic"]) -> tuple[ViewSpec, ...]:
    """One view always blurred, one seldom, but at times solarized (BYOL, Grill et al. 2020)."""
    (first,) = _preset(
        1, crop_scale=crop_scale, interpolation=interpolation, jitter=(0.4, 0.4, 0.2, 0.1), gray_prob=0.2,
        blur_prob=1.0,
    )  # fmt: skip
    return first, replace(first, blur_prob=0.1, solarize_prob=0.2)


# At 224 pixels. Published numbers; each step as torchvision has it.
_PRESETS: dict[str, tuple[ViewSpec, ...]] = {
    # Chen et al. 2020: no mean and standard deviation; the kernel is a tenth of the side
    "simclr": (ViewSpec(jitter=(0.8, 0.8, 0.8, 0.2), gray_prob=0.2, blur_prob=0.5),) * 2,
    # He et al. 2020
    "mocov1": _preset(
        crop_scale=(0.2, 1.0), jitter=(0.4,) * 4, jitter_prob=1.0, gray_prob=0.2, gray_first=True
    ),
    # Chen et al. 2020 (MoCo v2)
    "mocov2": _preset(crop_scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), gray_prob=0.2, blur_prob=0.5),
    # Chen et al. 2021
    "mocov3": _asymmetric((0.2, 1.0), "bilinear"),
    "byol": _asymmetric((0.08, 1.0), "bicubic"),
    # He et al. 2022: crops and flips alone
    "mae": _preset(1, crop_scale=(0.2, 1.0), interpolation="bicubic"),
    # Digits are neither mirrored nor coloured: half of the views are the digit as it is, which suits an
    # evaluation with few labels best, and the others a small affine map of it.
    "mnist": (
        ViewSpec(
            channels=1, crop_scale=None, flip_prob=0.0, affine_prob=0.5, degrees=20.0, translate=(0.1, 0.1),
            affine_scale=(0.7, 1.2), shear=15.0,
        ),
    ) * 2,
}  # fmt: skip
PRESETS = (*_PRESETS, "dino")


def view_specs(
    preset: str,
    size: int = 224,
    *,
    local_crops: int = 8,
    local_size: int | None = None,
    crop_area: float = 0.4,
) -> list[ViewSpec]:
    """The views of a published method, for `augment_views`; `dataclasses.replace` changes one.

        simclr (2), mocov1 (2), mocov2 (2), mocov3 (2), byol (2): two views; of the last two the second
            differs from the first
        dino: two global views, `local_crops` small ones
        mae: one view, cropped and flipped alone
        mnist: two views [B, 1, h, w], half of them the digit as it is, half a small affine map of it

    All but simclr's and mnist's are normalised by ImageNet's mean and standard deviation. Small views, up to
    32 pixels (CIFAR), are not blurred, and SimCLR's colours are then half as strong, as published.

    Args:
        preset: one of these names.
        size: side of the views in pixels.
        local_crops, local_size: DINO's small crops and their side; None: three sevenths of size, 96 of 224.
        crop_area: share of an image that DINO's global views have at least and its small ones at most;
            DINOv2 has 0.32.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value; the message names it.
    """
    check_choice("preset", preset, PRESETS)
    pair_of_sizes("size", size)
    if not isinstance(size, int):
        raise TypeError(f"size: expected the side of a square, got {size!r}")
    check_integer("local_crops", local_crops, 0)
    if local_size is not None:
        pair_of_sizes("local_size", local_size)
        if not isinstance(local_size, int):
            raise TypeError(f"local_size: expected the side of a square, got {local_size!r}")
    if not 0.05 <= number("crop_area", crop_area) <= 1:
        raise ValueError(f"crop_area: expected a number in [0.05, 1], got {crop_area}")
    if preset == "dino":  # Caron et al. 2021
        views = _asymmetric((crop_area, 1.0), "bicubic")
        local = replace(views[0], crop_scale=(0.05, crop_area), blur_prob=0.5)
        side = max(1, round(size * 3 / 7)) if local_size is None else local_size
        return [_of_side(view, size) for view in views] + [_of_side(local, side)] * local_crops
    views = tuple(_of_side(view, size) for view in _PRESETS[preset])
    if preset == "simclr":
        views = tuple(replace(view, blur_kernel=2 * (size // 20) + 1) for view in views)
        if size <= 32:
            views = tuple(replace(view, jitter=(0.4, 0.4, 0.4, 0.1)) for view in views)
    return list(views)


def _of_side(view: ViewSpec, side: int) -> ViewSpec:
    return replace(view, size=side, blur_prob=0.0 if side <= 32 else view.blur_prob)


def checked(specs: str | Sequence[ViewSpec], size: int | tuple[int, int]) -> tuple[ViewSpec, ...]:
    """The specs of a call, each with a size."""
    sides = pair_of_sizes("size", size)
    if isinstance(specs, str):
        check_choice("view_specs", specs, PRESETS)
        if sides[0] != sides[1]:
            raise ValueError(f"size: expected the side of a square for a preset, got {size!r}")
        return tuple(view_specs(specs, sides[0]))
    found = []
    for spec in specs if isinstance(specs, Sequence) else (specs,):
        if not isinstance(spec, ViewSpec):
            raise TypeError(f"view_specs: expected a preset's name or a list of ViewSpec, got {specs!r}")
        found.append(spec if spec.size is not None else replace(spec, size=sides))
    if not found:
        raise ValueError("view_specs: expected at least one ViewSpec, got none")
    return tuple(found)


def affine(spec: ViewSpec) -> tuple[float, ...]:
    """Half-widths and ranges of the affine map, angles in radians, shifts in pixels."""
    assert isinstance(spec.size, tuple)
    shifts = spec.translate[0] * spec.size[1], spec.translate[1] * spec.size[0]
    return math.radians(spec.degrees), math.radians(spec.shear), *shifts, *spec.affine_scale
