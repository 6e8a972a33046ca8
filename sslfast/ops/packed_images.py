"""PackedImages: images of different sizes in one buffer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslfast.ops._check import check_count, check_tensor, may_read

LARGEST_SIDE, LARGEST_IMAGE = 65535, 1 << 28  # pixels


@dataclass(frozen=True, eq=False)
class PackedImages:
    """uint8 images, each [H, W, channels] in one piece of `data`, in any order and with any gaps.

    Attributes:
        data: uint8 [bytes].
        offsets: int64 [B], where each image begins.
        sizes: int64 [B, 2], its height and width.
        channels: 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha), of all.

    Raises:
        TypeError, ValueError: of the wrong type, shape or device; on the CPU also an image without pixels or
            not within data.
    """

    data: Tensor
    offsets: Tensor
    sizes: Tensor
    channels: int = 3

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises what is named above: a view of an image begins with it, since tensors can be written to."""
        check_tensor("data", self.data, (torch.uint8,), (None,))
        check_tensor("offsets", self.offsets, (torch.int64,), (None,), self.data)
        check_tensor("sizes", self.sizes, (torch.int64,), (len(self.offsets), 2), self.data)
        check_count("channels", self.channels, (1, 2, 3, 4))
        if may_read(self.data) and len(self.offsets):
            height, width = self.sizes.unbind(1)
            if bool((self.sizes < 1).any()):
                image = int((self.sizes < 1).any(1).nonzero()[0, 0])
                raise ValueError(f"sizes: expected at least one pixel, got {self.sizes[image].tolist()}")
            large = (self.sizes > LARGEST_SIDE).any(1) | (height * width > LARGEST_IMAGE)
            if bool(large.any()):
                raise ValueError(
                    f"sizes: expected at most {LARGEST_SIDE} pixels a side and {LARGEST_IMAGE} in all, "
                    f"got {self.sizes[int(large.nonzero()[0, 0])].tolist()}"
                )
            last = len(self.data) - height * width * self.channels
            wrong = (self.offsets < 0) | (self.offsets > last)
            if bool(wrong.any()):
                image = int(wrong.nonzero()[0, 0])
                raise ValueError(
                    f"offsets: expected images within the {len(self.data)} bytes of data, got one of "
                    f"{self.sizes[image].tolist()} pixels from {int(self.offsets[image])} on"
                )

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def device(self) -> torch.device:
        return self.data.device

    __iter__ = None  # type: ignore[assignment]  # otherwise Python would try rows 0, 1, ...

    def __getitem__(self, rows: Tensor | slice) -> "PackedImages":
        """Some of the images, in the same data; rows: int64 [R], or a slice."""
        if not isinstance(rows, slice):
            check_tensor("rows", rows, (torch.int64,), (None,))
        return PackedImages(self.data, self.offsets[rows], self.sizes[rows], self.channels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedImages":
        data, offsets, sizes = (
            x.to(device, non_blocking=non_blocking) for x in (self.data, self.offsets, self.sizes)
        )
        return PackedImages(data, offsets, sizes, self.channels)

    def pin_memory(self) -> "PackedImages":
        """In page-locked memory, from where copies to a GPU need not be waited for; a DataLoader calls it."""
        return PackedImages(
            self.data.pin_memory(), self.offsets.pin_memory(), self.sizes.pin_memory(), self.channels
        )


def pack_images(images: Sequence[Any], channels: int = 3) -> PackedImages:
    """Copies images of any sizes into one buffer; the collate_fn of a DataLoader, or part of it.

    Args:
        images: Pillow images, uint8 arrays [H, W] or [H, W, C], or uint8 tensors [H, W] or [C, H, W]. Grey
            becomes RGB, alpha is dropped.
        channels: 3, or 1: grey, RGB being mixed as Pillow does.

    Returns:
        PackedImages on the CPU.

    Raises:
        TypeError, ValueError: an image of another dtype or shape, or without pixels; the message has its
            index.
    """
    check_count("channels", channels, (1, 3))
    if isinstance(images, Tensor | str) or not isinstance(images, Sequence):
        raise TypeError(f"images: expected a list of images, got {type(images).__name__}")
    pixels = [_pixels(f"images[{i}]", image, channels) for i, image in enumerate(images)]
    sizes = torch.tensor([x.shape[:2] for x in pixels], dtype=torch.int64, device="cpu").view(-1, 2)
    counts = sizes.prod(1) * channels
    data = torch.empty(int(counts.sum()), dtype=torch.uint8, device="cpu")
    for part, x in zip(data.split(counts.tolist()), pixels, strict=True):
        part.view(x.shape).copy_(x)
    return PackedImages(data, counts.cumsum(0) - counts, sizes, channels)


def _pixels(name: str, image: Any, channels: int) -> Tensor:
    """uint8 [H, W, channels]"""
    if hasattr(image, "convert") and hasattr(image, "mode"):  # Pillow's, which is not imported for this
        image = np.array(image.convert("RGB" if channels == 3 else "L"))
    if isinstance(image, Tensor):
        x = image if image.dim() != 3 else image.permute(1, 2, 0)
    elif isinstance(image, np.ndarray):
        if str(image.dtype) != "uint8":
            raise TypeError(f"{name}: expected uint8, got {image.dtype}")
        plain = image.flags.writeable and all(stride >= 0 for stride in image.strides)
        x = torch.from_numpy(image if plain else image.copy())
    else:
        raise TypeError(f"{name}: expected a Pillow image, an array or a tensor, got {type(image).__name__}")
    x = x.unsqueeze(2) if x.dim() == 2 else x
    check_tensor(name, x, (torch.uint8,), (None, None, None))
    height, width, found = x.shape
    if found not in (1, 2, 3, 4) or not height or not width:
        raise ValueError(
            f"{name}: expected at least one pixel of 1 to 4 channels, got shape {list(image.shape)}"
        )
    if found < 3:
        return x[..., :1].expand(-1, -1, channels)
    if channels == 3:
        return x[..., :3]
    weights = x.new_tensor([19595, 38470, 7471], dtype=torch.int32)  # Pillow's, of 2^16
    return ((x[..., :3].int() * weights).sum(2, keepdim=True) + (1 << 15) >> 16).to(torch.uint8)
