"""Views that the methods train on."""

import itertools

import pytest
import torch

from sslfast.ops.view_specs import PRESETS
from sslfast.train import augment


def noise(count, channels, size):
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channels, size", [(3, 48), (1, 28)])
def test_views_of_every_recipe(preset, channels, size):
    images = noise(100, channels, size)
    views = augment.two_views(preset, size, channels)
    torch.manual_seed(3)
    first = views(images)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, views(images), strict=True))
    for view in first:
        assert view.shape == images.shape and view.min() >= 0 and view.max() <= 1
        assert view.dtype == torch.float32 and view.is_contiguous(memory_format=torch.channels_last)
    assert (first[0] != first[1]).flatten(1).any(1).float().mean() > 0.6
    (one,) = augment.one_view(preset, size, channels)(images)
    assert one.shape == images.shape
    assert ((one - images / 255).abs().flatten(1).amax(1) > 1e-4).float().mean() > 0.3


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("value", [0, 255])
def test_views_stay_between_0_and_1(preset, channels, value):
    """Where blurred and bicubic weights that do not quite add up to 1 would show."""
    for view in augment.two_views(preset, 48, channels)(torch.full((40, channels, 48, 48), value).byte()):
        assert view.min() >= 0 and view.max() <= 1


@pytest.mark.parametrize("preset", PRESETS)
def test_an_images_views_depend_on_its_id_and_the_seed_alone(preset):
    images, ids = noise(12, 3, 36), torch.randperm(60_000)[:12]
    views = augment.multi_crop(preset, 36, 3, 2, 14, 0.4)
    whole = views(images, ids, 5)
    for batches in ([slice(0, 6), slice(6, 12)], [slice(0, 1), slice(1, 12)]):  # of the processes, say
        parts = [views(images[part], ids[part], 5) for part in batches]
        assert all(torch.equal(torch.cat(v), w) for v, w in zip(zip(*parts, strict=True), whole, strict=True))
    order = torch.randperm(12)
    shuffled = views(images[order], ids[order], 5)
    assert all(torch.equal(v, w[order]) for v, w in zip(shuffled, whole, strict=True))
    for others in (views(images, ids, 6), views(images, ids + 1, 5)):
        changed = [(v != w).flatten(1).any(1) for v, w in zip(others, whole, strict=True)]
        assert torch.stack(changed).any(0).float().mean() > 0.6


def test_each_epoch_of_each_run_has_a_seed_of_its_own():
    seeds = (0, 1, 2, (1 << 32) - 1)
    keys = list(itertools.product(seeds, range(50), (augment.PRETRAINING, augment.FINETUNING)))
    drawn = {augment.epoch_seed(*key) for key in keys}
    assert len(drawn) == len({seed % (1 << 32) for seed in drawn}) == len(keys)  # a CPU's has 32 bits
    assert augment.epoch_seed(3, 7) == augment.epoch_seed(3, 7)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channels", [1, 3])
def test_specs_suit_the_data(preset, channels):
    """Not normalised, since encoders are evaluated on images / 255; of grey images no colours."""
    for size in (32, 64):
        specs = augment.multi_crop(preset, size, channels, 2, 28, 0.3).specs
        assert [spec.size for spec in specs] == [(size, size)] * 2 + [(28, 28)] * 2
        assert all(spec.mean is None and spec.std is None and spec.channels == channels for spec in specs)
        assert channels == 3 or not any(any(spec.jitter) or spec.gray_prob for spec in specs)
        assert not any(spec.blur_prob or spec.solarize_prob for spec in specs[2:])
        areas = (None, (0.15, 0.3)) if preset == "mnist" else ((0.3, 1.0), (0.05, 0.3))
        assert tuple(spec.crop_scale for spec in specs[1:3]) == areas
    blurred = {"simclr": 0.5, "mocov2": 0.5, "mocov3": 1.0, "byol": 1.0, "dino": 1.0}
    first, _, local = augment.multi_crop(preset, 96, channels, 1, 48, 0.3).specs
    assert not first.blur_prob or preset != "simclr" or (first.blur_kernel, local.blur_kernel) == (9, 5)
    assert (first.blur_prob, local.blur_prob) == (blurred.get(preset, 0), 0.5 * (preset in blurred))
    assert augment.one_view(preset, 64, channels).specs == augment.two_views(preset, 64, channels).specs[:1]
