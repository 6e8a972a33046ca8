"""Cases of `augment_views`, and what a comparison needs to know of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sslfast.ops import _backend
from sslfast.ops import augment_views as public
from sslfast.ops.packed_images import PackedImages
from sslfast.ops.view_params import ViewParams, draw
from sslfast.ops.view_specs import ViewSpec, checked, view_specs
from sslfast.testing._op import Inputs, Op


@dataclass(frozen=True)
class ViewsCase:
    """One kind of images and views.

    Attributes:
        sizes: height and width of each image; with a layout other than "packed" all are the same.
        specs: a preset's name, or what the views are.
        size: of a preset's views.
        layout: of the images: contiguous, channels next to each other, every other pixel of a wider tensor,
            the same image repeated by a stride of 0, or packed.
    """

    name: str
    sizes: tuple[tuple[int, int], ...]
    specs: str | tuple[ViewSpec, ...]
    size: int = 24
    channels: int = 3
    layout: Literal["nchw", "nhwc", "strided", "expanded", "packed"] = "nchw"
    smooth: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Whole numbers up to 255 as "a", of the views' dtype."""
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.tensor(self.sizes, dtype=torch.int64).view(-1, 2)
        pixels = int(sizes.prod(1).sum()) * self.channels
        a = torch.randint(0, 256, (pixels,), generator=generator)
        if self.smooth:
            a = a // 32 + torch.arange(pixels) // 7 % 200
        if self.layout != "packed":
            height, width = self.sizes[0] if self.sizes else (5, 5)
            a = a.view(-1, self.channels, height, width)
        specs = tuple(view_specs(self.specs, self.size)) if isinstance(self.specs, str) else self.specs
        specs = checked(specs, self.size)
        number = torch.randint(0, 1 << 40, (1,), generator=generator)
        params = draw(specs, sizes, number, torch.arange(len(sizes)))
        return {
            "a": a.to(dtype).to(device), "sizes": sizes.to(device), "specs": specs,
            "params": params.to(device), "layout": self.layout,
        }  # fmt: skip


def every_step(**changes: Any) -> ViewSpec:
    """A view with each of the steps, all likely."""
    spec = ViewSpec(
        jitter=(0.8, 0.8, 0.8, 0.2), jitter_prob=0.9, gray_prob=0.3, blur_prob=0.7, blur_kernel=9,
        solarize_prob=0.5, affine_prob=0.7, degrees=90.0, translate=(0.3, 0.2), affine_scale=(0.5, 1.5),
        shear=20.0, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3),
    )  # fmt: skip
    return replace(spec, **changes)


_V = ViewsCase
_MANY = ((31, 40), (1, 1), (7, 90), (64, 3), (1, 30), (25, 1))
_BICUBIC: dict[str, Any] = {"interpolation": "bicubic"}
_WHOLE: dict[str, Any] = {"crop_scale": None}

CASES: list[ViewsCase] = [
    _V("SimCLR", ((40, 50),) * 6, "simclr", 48),
    _V("SimCLR, small images", ((32, 32),) * 4, "simclr", 32),
    _V("MoCo v1", ((30, 33),) * 4, "mocov1"),
    _V("MoCo v2, packed", _MANY, "mocov2", 40, layout="packed"),
    _V("MoCo v3", ((50, 40),) * 4, "mocov3", 40, layout="nhwc"),
    _V("BYOL, packed", _MANY, "byol", 40, layout="packed"),
    _V("DINO", ((60, 60),) * 2, "dino", 33),
    _V("MAE", ((37, 41),) * 4, "mae"),
    _V("MNIST", ((28, 28),) * 6, "mnist", 28, channels=1),
    _V("every step", ((40, 30),) * 8, (every_step(), every_step(size=(9, 31), interpolation="bicubic"))),
    _V("grey first", ((20, 20),) * 8, (every_step(gray_first=True, gray_prob=0.5, solarize_prob=0.0),)),
    _V("grey images, views in colour", ((20, 25),) * 6, (every_step(),), channels=1),
    _V("colour images, grey views", ((20, 25),) * 6, (every_step(channels=1, mean=None, std=None),)),
    _V("grey and alpha", ((9, 8),) * 3, (every_step(),), channels=2, layout="nhwc"),
    _V("RGB and alpha", ((9, 8),) * 3, (every_step(),), channels=4),
    _V("strided", ((21, 22),) * 3, "byol", layout="strided"),
    _V("the same image", ((21, 22),) * 3, (every_step(),), layout="expanded"),
    _V("no image", (), "simclr"),
    _V("one pixel", ((1, 1),), "byol"),
    _V("one pixel of many", ((70, 50),) * 2, (every_step(size=1), every_step(size=1, **_BICUBIC))),
    _V("a line", ((1, 200),), (every_step(size=(3, 17)),)),
    _V("shrunk", ((300, 211),), (every_step(size=7, **_WHOLE), every_step(size=9, **_WHOLE, **_BICUBIC))),
    _V("wide blur", ((30, 30),) * 3, (every_step(blur_kernel=41, blur_sigma=(1.0, 9.0), blur_prob=1.0),)),
    _V("smooth", ((64, 64),) * 4, "byol", 48, smooth=True),
]  # fmt: skip


def _images(a: Tensor, sizes: Tensor, layout: str) -> Tensor | PackedImages:
    x = a.to(torch.uint8)
    if layout == "packed":
        channels = len(x) // max(1, int(sizes.prod(1).sum()))
        counts = sizes.prod(1) * channels
        return PackedImages(x, counts.cumsum(0) - counts, sizes, channels)
    if layout == "nhwc":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        wide = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        wide[..., ::2, 1::2] = x
        return wide[..., ::2, 1::2]
    return x[:1].expand_as(x) if layout == "expanded" else x


def _run(
    a: Tensor, sizes: Tensor, specs: Sequence[ViewSpec], params: ViewParams, layout: str
) -> tuple[Tensor, ...]:
    images = _images(a, sizes, layout)
    return tuple(public(images, specs, params=params, out_dtype=a.dtype))


def _reference(**inputs: Any) -> tuple[Tensor, ...]:
    with _backend.use_backend("reference"):
        return _run(**inputs)


def _no_terms(inputs: Inputs, upstream: Sequence[Tensor | None]) -> tuple[float, dict]:
    return 0.0, {}


OP = Op(_run, _reference, dict, _no_terms, gradients=())
