"""Images as uint8, in memory or decoded by worker processes, in a training and a test part."""

import os
import signal
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sslfast.ops import PackedImages, pack_images
from sslfast.train.augment import squares
from sslfast.train.processes import rank

TEST_EVERY = 5
LEAST = 8
"""Pixels of a side: anything smaller is a spacer, or broken."""
LONGEST = 4
"""Shorter sides in a longer one: what exceeds it is cut at both ends."""
SAMPLED = 64
"""Images that stand for all others' sizes, and for a data set's fingerprint."""

Images = Tensor | PackedImages
"""uint8 [B, C, H, W], or images of any sizes"""


class Pictures(Protocol):
    """Encoded images by index: what a data set needs to give, besides labels."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a message calls the image."""

    def open(self, index: int) -> Any:
        """A PIL image."""


class Unreadable(Exception):
    """An image that cannot be decoded, and why."""


class Decoded:
    """Pictures as uint8 [3, H, W], whole. Those whose shorter side is twice 8/7 of `size` or more (512 of
    224) are reduced by a whole number to below that: most of the time here would go into a finer resize.

    A picture that cannot be read is reported once and gives its successor in its place, so that batches keep
    their size whatever turns up in the middle of a run.
    """

    def __init__(self, pictures: Pictures, size: int) -> None:
        self.pictures, self.size = pictures, size
        self.reported: set[int] = set()

    def __len__(self) -> int:
        return len(self.pictures)

    def decode(self, index: int) -> Tensor:
        """Picture `index` itself.

        Raises:
            Unreadable: it is broken, too large or too small to be meant, or has more than 16 bits per
                channel.
        """
        import numpy as np
        from PIL import Image, ImageOps

        try:
            with self.pictures.open(index) as opened:
                side = round(self.size * 8 / 7)
                opened.draft("RGB", (side, side))  # JPEG: a half, a quarter or an eighth, if that is enough
                if min(opened.size) < LEAST:
                    raise Unreadable(f"expected at least {LEAST} x {LEAST} pixels, got {opened.size}")
                image = ImageOps.exif_transpose(opened)
                if image.mode.startswith("I;16"):  # convert would clip 16 bits at 255
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                elif image.mode in ("I", "F"):
                    raise Unreadable(f"expected 8 or 16 bits per channel, got Pillow's mode {image.mode}")
                shorter = min(image.size)
                sides = [min(length, LONGEST * shorter) for length in image.size]
                left, top = ((n - m) // 2 for n, m in zip(image.size, sides, strict=True))
                box = (left, top, left + sides[0], top + sides[1])
                image = image.convert("RGB").reduce(max(1, shorter // side), box)
                return torch.from_numpy(np.array(image)).permute(2, 0, 1)
        except (Unreadable, MemoryError):
            raise
        except Exception as error:  # decoders raise all kinds of errors on broken files
            raise Unreadable(f"{type(error).__name__}: {error}") from error

    def __getitem__(self, index: int) -> tuple[Tensor, list[tuple[int, str]]]:
        """(image, what could not be read on the way to it)."""
        broken: list[tuple[int, str]] = []
        for candidate in (*range(index, len(self)), *range(index)):
            try:
                return self.decode(candidate), broken
            except Unreadable as error:
                broken.append((candidate, str(error)))
        raise ValueError(
            f"data: no readable image is left; the first: {self.pictures.name(0)}: {broken[0][1]}"
        )

    def report(self, broken: Sequence[tuple[int, str]]) -> None:
        """Each once."""
        for index, problem in broken:
            if index not in self.reported:
                self.reported.add(index)
                tell(f"skipped {self.pictures.name(index)}: {problem}")

    def tell_count(self) -> None:
        """Of those reported, once all images were looked at."""
        if self.reported:
            tell(f"{len(self.reported)} of {len(self)} images could not be read")


def tell(line: str) -> None:
    """By the first process alone, which sees all images in the end: the evaluation takes every one."""
    if rank() == 0:
        print(line.encode("utf-8", "backslashreplace").decode(), flush=True)  # names of files are any bytes


@dataclass(frozen=True)
class ImageSet:
    images: Images | Decoded
    labels: Tensor | None
    """int64 [N]"""
    size: int = 0
    """of images of any sizes: pixels of a side of the squares that they are evaluated as"""

    def __post_init__(self) -> None:
        assert isinstance(self.images, Tensor) == (not self.size), (
            "size: of images of any sizes, and only of them"
        )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        if not isinstance(self.images, Tensor):
            return 3, self.size, self.size
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def fingerprint(self) -> int:
        """A checksum of the number of images and of some of them."""
        checksum = len(self)
        for i in range(0, len(self), max(1, len(self) // SAMPLED)):
            checksum = zlib.crc32(self.image(i).cpu().contiguous().numpy().tobytes(), checksum)
        return checksum

    def image(self, index: int) -> Tensor:
        """uint8 [C, H, W]"""
        if isinstance(self.images, PackedImages):
            return image_of(self.images, index)
        return self.images[index][0] if isinstance(self.images, Decoded) else self.images[index]

    def to(self, device: torch.device) -> "ImageSet":
        """With images that are in memory moved to the device."""
        moved = self.images if isinstance(self.images, Decoded) else self.images.to(device)
        return ImageSet(moved, self.labels, self.size)

    @property
    def device(self) -> torch.device:
        """Where rows are looked up."""
        return torch.device("cpu") if isinstance(self.images, Decoded) else self.images.device

    def batches(
        self, rows: Iterable[Tensor], device: torch.device, workers: int = 0
    ) -> Generator[Images, None, None]:
        """The images of each element of `rows`, on the device. Workers decode ahead, also of what `rows` has
        not given yet when a batch is taken."""
        if not isinstance(self.images, Decoded):
            for part in rows:
                own = self.images[part.to(self.images.device)]
                if isinstance(own, PackedImages) and device != own.device:
                    own = _alone(own)  # not all images at each batch
                yield own.to(device)
            return
        loader: DataLoader = DataLoader(
            self.images,  # type: ignore[arg-type]  # a map-style data set needs no more than len and getitem
            batch_sampler=(part.tolist() for part in rows),  # type: ignore[arg-type]  # any iterable will do
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # otherwise the loader draws from the global one, which masks use
        )
        for images, broken in loader:
            self.images.report(broken)
            yield images.to(device, non_blocking=True)

    @property
    def batch_size(self) -> int:
        """Of batches without gradients; whole images take more memory than squares."""
        return 512 if isinstance(self.images, Tensor) else 128

    def squares(self, rows: Iterable[Tensor], device: torch.device, workers: int = 0) -> Iterator[Tensor]:
        """As batches, float32 [B, C, H, W] in [0, 1], all of one size: what a network is evaluated on."""
        for images in self.batches(rows, device, workers):
            yield squares(images, self.size)


@dataclass(frozen=True)
class Dataset:
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]


def in_one_copy(rows: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """The rows of all batches on the device; a copy of each when its turn comes would wait for a GPU."""
    return torch.cat(tuple(rows)).to(device).split([len(part) for part in rows]) if len(rows) else ()


def _alone(images: PackedImages) -> PackedImages:
    """The same images in data of their own, on the CPU."""
    return pack_images([image_of(images, i) for i in range(len(images))])


def image_of(images: PackedImages, index: int) -> Tensor:
    """uint8 [3, H, W]"""
    (height, width), begin = images.sizes[index].tolist(), int(images.offsets[index])
    return images.data[begin : begin + 3 * height * width].view(height, width, 3).permute(2, 0, 1)


def _collate(items: list[tuple[Tensor, list]]) -> tuple[PackedImages, list]:
    return pack_images([image for image, _ in items]), [entry for _, broken in items for entry in broken]


def _ignore_interrupts(worker: int) -> None:
    """A terminal or a job scheduler signals every process; what to do about it is the main one's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def image_set(pictures: Pictures, labels: Tensor | None, size: int, memory: int) -> ImageSet:
    """In memory if some of them suggest that all take no more than `memory` bytes, without the pictures that
    cannot be read; otherwise decoded later. Batches are the same."""
    decoded, count = Decoded(pictures, size), len(pictures)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # Pillow decodes and resizes without the GIL
        attempt = partial(_attempt, decoded)
        some = range(0, count, max(1, count // SAMPLED)) if memory else ()
        sizes = [result.numel() for result in pool.map(attempt, some) if isinstance(result, Tensor)]
        if not memory or sum(sizes) * count > memory * len(some):
            return ImageSet(decoded, labels, size)
        results = list(pool.map(attempt, range(count)))
    decoded.report([(i, result) for i, result in enumerate(results) if isinstance(result, str)])
    decoded.tell_count()
    kept = [i for i, result in enumerate(results) if isinstance(result, Tensor)]
    return ImageSet(_packed(results), None if labels is None else labels[kept], size)


def _packed(results: list[Tensor | str]) -> PackedImages:
    """The images [3, H, W] in the list, which is emptied meanwhile: memory has none of them twice."""
    left = [result for result in reversed(results) if isinstance(result, Tensor)]
    results.clear()
    sizes = torch.tensor([image.shape[1:] for image in reversed(left)], dtype=torch.int64).view(-1, 2)
    counts = 3 * sizes.prod(1)
    data = torch.empty(int(counts.sum()), dtype=torch.uint8)
    for part in data.split(counts.tolist()):
        image = left.pop().permute(1, 2, 0)
        part.view(image.shape).copy_(image)
    return PackedImages(data, counts.cumsum(0) - counts, sizes)


def _attempt(decoded: Decoded, index: int) -> Tensor | str:
    try:
        return decoded.decode(index)
    except Unreadable as error:
        return str(error)


def hold_out(labels: Sequence) -> tuple[list[int], list[int]]:
    """(training, test) indices of a data set without a split: every fifth of a class is for testing."""
    seen: dict[Any, int] = {}
    parts: tuple[list[int], list[int]] = ([], [])
    for i, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        parts[seen[label] % TEST_EVERY == 0].append(i)
    return parts
