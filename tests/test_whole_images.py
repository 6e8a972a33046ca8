"""Images of any sizes: what is kept of each, in memory and decoded later, and the squares of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sslfast.ops import PackedImages, ViewSpec
from sslfast.train import augment, data, sources

CPU = torch.device("cpu")
SIZES = [(20, 24), (30, 21), (9, 70), (200, 90), (301, 17), (8, 8), (64, 64), (37, 36), (50, 400), (31, 33)]


def smooth(height, width, seed):
    """Photographs are smooth; noise would not survive the JPEG."""
    corners = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    for i, (height, width) in enumerate(SIZES * 2):
        suffix = "png" if i < len(SIZES) else "jpg"
        smooth(height, width, i).save(tmp_path / f"{i:02}.{suffix}", quality=95)
    return tmp_path


@pytest.mark.parametrize("size", [14, 28, 112])
def test_images_keep_their_shape_and_are_no_larger_than_needed(folder, size):
    dataset = sources.load(f"folder:{folder}", size, 0)
    decoded, side = dataset.train.images, round(size * 8 / 7)
    for i in range(len(decoded)):
        name = Path(decoded.pictures.name(i))
        height, width = SIZES[int(name.stem) % len(SIZES)]
        short, long = min(height, width), min(max(height, width), 4 * min(height, width))
        found = decoded.decode(i).shape[1:]
        assert (side <= min(found) < 2 * side) if short >= side else (min(found) == short)
        assert abs(max(found) / min(found) - long / short) < 0.1
        assert short >= 2 * side or tuple(found) == tuple(min(n, 4 * short) for n in (height, width))
        assert (found[0] < found[1]) == (height < width)


def test_a_panorama_is_cut_at_both_ends(tmp_path):
    pixels = np.zeros((10, 100, 3), np.uint8)
    pixels[:, 31:69] = 200
    for i in range(3):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    image = sources.load(f"folder:{tmp_path}", 16).train.image(0)
    assert image.shape == (3, 10, 40)
    assert image[:, :, 2:-2].min() == 200 and image[:, :, 0].max() == 0 == image[:, :, -1].max()


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_changes_nothing(folder, workers):
    """Nor does a batch's company: offsets and sizes are those of its images."""
    kept, later = (sources.load(f"folder:{folder}", 28, memory) for memory in (1 << 30, 0))
    assert isinstance(kept.train.images, PackedImages) and isinstance(later.train.images, data.Decoded)
    assert kept.train.fingerprint() == later.train.fingerprint() != kept.test.fingerprint()
    assert kept.train.shape == later.train.shape == (3, 28, 28)
    rows = torch.randperm(len(kept.train)).split(5)
    views = augment.two_views("simclr", 28, 3)
    for part, first, second in zip(
        rows, kept.train.batches(rows, CPU), later.train.batches(rows, CPU, workers), strict=True
    ):
        assert torch.equal(first.sizes, second.sizes) and len(first) == len(part)
        for a, b in zip(views(first, part, 3), views(second, part, 3), strict=True):
            assert a.shape == (len(part), 3, 28, 28) and torch.equal(a, b)
    squares = zip(kept.train.squares(rows, CPU), later.train.squares(rows, CPU, workers), strict=True)
    assert all(torch.equal(a, b) for a, b in squares)


def test_memory_is_that_of_the_images_not_of_their_squares(folder):
    """64 of them tell, or all if there are fewer."""
    images = sources.load(f"folder:{folder}", 28, 0).train.images
    total = sum(images.decode(i).numel() for i in range(len(images)))
    for memory, kind in ((total, PackedImages), (total - 1, data.Decoded)):
        assert isinstance(sources.load(f"folder:{folder}", 28, memory).train.images, kind)


@pytest.mark.parametrize("size", [14, 28, 112])
def test_squares_are_those_of_pillow(folder, size):
    """Of an image that was not scaled before; Pillow rounds between the two directions."""
    images = sources.load(f"folder:{folder}", 400).train
    found = torch.cat(list(images.squares(torch.arange(len(images)).split(7), CPU)))
    assert found.shape == (len(images), 3, 400, 400)
    found = augment.squares(images.images, size)
    assert found.dtype == torch.float32 and found.min() >= 0 and found.max() <= 1
    for i, square in enumerate(found):
        image = Image.fromarray(images.image(i).permute(1, 2, 0).numpy())
        side = min(image.size)
        left, top = ((n - side) // 2 for n in image.size)
        image = image.crop((left, top, left + side, top + side))
        expected = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
        assert (square.permute(1, 2, 0) * 255 - torch.tensor(expected)).abs().max() < 2


def test_views_see_what_is_beside_the_square(tmp_path):
    """The left and right thirds of a wide image are in no square of it."""
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, :32], pixels[:, 64:] = 255, 255
    for i in range(6):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    train = sources.load(f"folder:{tmp_path}", 28).train
    assert not augment.squares(train.images, 28).any()
    spec = ViewSpec(28, crop_scale=(0.05, 0.2), flip_prob=0.0)
    (views,) = augment.Views((spec,))(train.images, seed=0)
    assert (views.flatten(1).max(1).values > 0.99).any()
