"""What augment_views draws: distributions, the published numbers of the presets, and on what the numbers and
the views of an image depend: seed, id and place among the views, and on nothing around them."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import sslfast
from sslfast import ViewSpec, augment_views, pack_images, view_specs
from sslfast.ops.view_params import draw, uniform
from sslfast.ops.view_specs import checked

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])
MANY = 20_000
RATIO = math.log(4 / 3)
AFFINE = ViewSpec(crop_scale=None, affine_prob=1.0)
# Each view of each preset: crop_scale, bicubic, jitter, probabilities of jitter, gray, blur, solarize, flip
STRONG, WEAK = (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.2, 0.1)
PUBLISHED = {
    "simclr": [((0.08, 1), False, STRONG, 0.8, 0.2, 0.5, 0, 0.5)] * 2,
    "mocov1": [((0.2, 1), False, (0.4,) * 4, 1, 0.2, 0, 0, 0.5)] * 2,
    "mocov2": [((0.2, 1), False, (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5, 0, 0.5)] * 2,
    "mocov3": [((0.2, 1), False, WEAK, 0.8, 0.2, *rest, 0.5) for rest in ((1, 0), (0.1, 0.2))],
    "byol": [((0.08, 1), True, WEAK, 0.8, 0.2, *rest, 0.5) for rest in ((1, 0), (0.1, 0.2))],
    "dino": [((0.4, 1), True, WEAK, 0.8, 0.2, *rest, 0.5) for rest in ((1, 0), (0.1, 0.2))]
    + [((0.05, 0.4), True, WEAK, 0.8, 0.2, 0.5, 0, 0.5)] * 8,
    "mae": [((0.2, 1), True, (0,) * 4, 0, 0, 0, 0, 0.5)],
    "mnist": [(None, False, (0,) * 4, 0, 0, 0, 0, 0)] * 2,
}
PRESETS = pytest.mark.parametrize("preset", PUBLISHED)


def drawn(specs, count: int = MANY, height: int = 4000, width: int = 4000, seed: int = 1, size=224):
    sizes = torch.tensor([[height, width]]).expand(count, 2)
    return draw(checked(specs, size), sizes, torch.tensor([seed]), torch.arange(count))


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed))


def same(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


# Distributions


def assert_uniform(x, low: float, high: float) -> None:
    """Kolmogorov's and Smirnov's test, which chance fails once in 10^5."""
    u = np.sort((x.double().flatten().numpy() - low) / (high - low))
    n = len(u)
    assert n >= 1000 and -1e-3 <= u[0] and u[-1] <= 1 + 1e-3  # areas are of whole pixels
    at = np.arange(n) / n
    assert max((u - at).max(), (at + 1 / n - u).max()) < math.sqrt(math.log(2e5) / 2 / n)


def assert_equally_likely(counts, chance=None) -> None:
    """Counts of disjoint cases, within five standard deviations of chi-square."""
    counts = np.asarray(counts, np.float64)
    expected = counts.sum() * (1 / counts.size if chance is None else np.asarray(chance))
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), counts.size - 1
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def assert_happens(x: Tensor, probability: float) -> None:
    within = 5 * math.sqrt(probability * (1 - probability) / x.numel())
    assert abs(x.double().mean().item() - probability) <= within


def test_crops_have_uniform_area_log_uniform_ratio_and_any_place():
    p = drawn([ViewSpec(crop_scale=(0.1, 0.7))])
    top, left, height, width = p.crop[0].double().unbind(1)
    assert_uniform(height * width / 4000**2, 0.1, 0.7)
    assert_uniform((width / height).log(), -RATIO, RATIO)
    for start, side in ((top, height), (left, width)):
        assert_uniform((start + 0.5) / (4001 - side), 0, 1)


def torchvision_s(rng, height: int, width: int, scale) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params with ratios from 3/4 to 4/3."""
    for _ in range(10):
        area, ratio = height * width * rng.uniform(*scale), math.exp(rng.uniform(-RATIO, RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(
    "height, width, scale",
    [(375, 500, (0.08, 1)), (500, 300, (0.6, 1)), (64, 30, (0.2, 1)), (9, 7, (0.08, 1)), (2, 3, (0.05, 0.4))],
)
def test_crops_that_do_not_fit_are_drawn_again_as_torchvision_s(height, width, scale):
    """Smirnov's test of two samples, of each number and of sums and differences of them."""
    rng = np.random.default_rng(0)
    theirs = np.array([torchvision_s(rng, height, width, scale) for _ in range(MANY)], np.float64)
    ours = drawn([ViewSpec(crop_scale=scale)], MANY, height, width).crop[0].double().numpy()
    mixed = np.eye(4).tolist() + [
        [1, 0, 1, 0],
        [0, 1, 0, 1],
        [0, 0, 1, 1],
        [0, 0, 1, -1],
        [2, 0, 1, 0],
        [1, 3, 5, 7],
    ]
    for weights in mixed:
        a, b = np.sort(ours @ weights), np.sort(theirs @ weights)
        at = np.union1d(a, b)
        distance = np.abs(np.searchsorted(a, at, "right") - np.searchsorted(b, at, "right")).max() / MANY
        assert distance < math.sqrt(math.log(2e5) / MANY), weights


@pytest.mark.parametrize(
    "height, width, crop",
    [
        (1000, 10, (493, 0, 13, 10)), (10, 1000, (0, 493, 10, 13)), (3, 40, (0, 18, 3, 4)),
        (40, 3, (18, 0, 4, 3)), (1, 50, (0, 24, 1, 1)), (51, 1, (25, 0, 1, 1)), (1, 1, (0, 0, 1, 1)),
        (1, 65535, (0, 32767, 1, 1)),
    ],
)  # fmt: skip
def test_where_no_crop_fits_the_middle_is_taken(height, width, crop):
    p = drawn([ViewSpec(crop_scale=(0.5, 1.0)), ViewSpec(crop_scale=None)], 300, height, width)
    assert (p.crop[0] == torch.tensor(crop)).all()
    assert (p.crop[1] == torch.tensor((0, 0, height, width))).all()


def test_small_crops_are_equally_often_at_each_place():
    p = drawn([ViewSpec(crop_scale=(8 / 35, 8 / 35), crop_ratio=(0.5, 0.5))], MANY, 7, 5)
    assert (p.crop[0, :, 2:] == torch.tensor([4, 2])).all()
    assert_equally_likely(torch.bincount((p.crop[0, :, 0] * 4 + p.crop[0, :, 1]).long(), minlength=16))


@PRESETS
def test_presets_draw_what_was_published(preset):
    p = drawn(preset)
    for v, (scale, _, jitter, jittered, gray, blur, solarize, flip) in enumerate(PUBLISHED[preset]):
        change = (p.jitter[v] != torch.tensor([1.0, 1, 1, 0])).any(1)
        for happened, probability in (
            (p.flip[v] == 1, flip), (change, jittered), (p.gray[v] == 1, gray), (p.blur_sigma[v] > 0, blur),
            (p.solarize_threshold[v].isfinite(), solarize),
        ):  # fmt: skip
            assert_happens(happened, probability)
        assert set(torch.cat((p.flip[v], p.gray[v])).tolist()) <= {0.0, 1.0}
        assert (p.solarize_threshold[v][p.solarize_threshold[v].isfinite()] == 0.5).all()
        for i, strength in enumerate(jitter if jittered else ()):
            middle = 0 if i == 3 else 1
            assert_uniform(p.jitter[v, change, i], middle - strength, middle + strength)
        if blur:
            assert_uniform(p.blur_sigma[v][p.blur_sigma[v] > 0], 0.1, 2)
        orders = itertools.permutations(range(4))
        codes = torch.tensor([sum(step << 2 * i for i, step in enumerate(order)) for order in orders])
        counts = torch.bincount(p.order[v].long(), minlength=256)
        assert counts[codes].sum() == MANY
        assert_equally_likely(counts[codes])
        area = p.crop[v, :, 2] * p.crop[v, :, 3] / 4000**2
        assert (area > 0.999 * (scale or (1, 1))[0]).all() and (area < 1.001 * (scale or (1, 1))[1]).all()


def test_factors_are_never_negative():
    p = drawn([ViewSpec(jitter=(1.5, 1.0, 3.0, 0.0), jitter_prob=1.0)])
    for i, high in enumerate((2.5, 2.0, 4.0)):
        assert_uniform(p.jitter[0, :, i], 0, high)
    assert (p.jitter[..., 3] == 0).all()


def test_affine_maps_are_shift_rotation_shear_and_factor():
    """Rotation, shears, factor and shift taken out of their matrices."""
    specs = [
        replace(AFFINE, degrees=40.0), replace(AFFINE, shear=30.0), replace(AFFINE, translate=(0.3, 0.1)),
        replace(AFFINE, affine_scale=(0.7, 1.2), degrees=180.0, shear=15.0, translate=(0.1, 0.2)),
    ]  # fmt: skip
    m = drawn(specs, size=(40, 100)).affine.double().view(4, MANY, 2, 3)
    forward = torch.linalg.inv(m[..., :2])  # from the image to the view
    shift = -(forward @ m[..., 2:]).squeeze(3)
    turn, shears = forward[0], forward[1]
    assert_uniform(torch.rad2deg(torch.atan2(turn[:, 1, 0], turn[:, 0, 0])), -40, 40)
    assert (turn @ turn.mT - torch.eye(2)).abs().max() < 1e-5 and (turn.det() - 1).abs().max() < 1e-5
    assert (shears[:, 0, 0] - 1).abs().max() < 1e-5 and (shears.det() - 1).abs().max() < 1e-5
    for tangent in (shears[:, 0, 1], shears[:, 1, 0]):
        assert_uniform(torch.rad2deg(torch.atan(tangent)), -30, 30)
    assert (m[2, :, :, :2] - torch.eye(2)).abs().max() == 0 and m[:2, :, :, 2].abs().max() == 0
    for v, spec in enumerate(specs[2:], 2):  # translate is of width and of height
        assert_uniform(shift[v, :, 0] / 100, -spec.translate[0], spec.translate[0])
        assert_uniform(shift[v, :, 1] / 40, -spec.translate[1], spec.translate[1])
    assert_uniform(forward[3].det().sqrt(), 0.7, 1.2)
    p, nothing = drawn("mnist", size=28), torch.tensor([1.0, 0, 0, 0, 1, 0])
    moved = (p.affine != nothing).any(2)
    for v in range(2):
        assert_happens(moved[v], 0.5)
        forward = torch.linalg.inv(p.affine[v, moved[v]].double().view(-1, 2, 3)[..., :2])
        assert_uniform(forward.det().sqrt(), 0.7, 1.2)


@pytest.mark.parametrize("preset", ["byol", "dino", "mnist"])
def test_views_columns_and_neighbours_are_independent(preset):
    """Correlations, and those of an image with the next, are within five standard deviations of 0."""
    p = drawn([replace(spec, affine_scale=(1.0, 1.0)) for spec in view_specs(preset, local_crops=2)])
    top, left, height, width = p.crop.double().unbind(2)
    columns = [
        (height * width).log(), (width / height).log(), (top + 0.5) / (4001 - height),
        (left + 0.5) / (4001 - width), p.flip, p.order, *p.jitter.unbind(2), p.gray, p.blur_sigma,
        p.solarize_threshold.isfinite(), p.affine[..., 2], p.affine[..., 5], p.jitter[..., 0] != 1,
    ]  # fmt: skip
    x = torch.cat([column.double() for column in columns])
    x = x[x.std(1) > 0]
    within = 5 / math.sqrt(MANY)
    assert len(x) > 3 and (torch.corrcoef(x) - torch.eye(len(x))).abs().max() < within
    normal = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    assert (normal[:, 1:] @ normal[:, :-1].T / MANY).abs().max() < within


# The uniform numbers


def test_uniform_numbers_are_uniform_to_the_last_bit_and_never_equal():
    u = uniform(torch.tensor([5]), torch.arange(1000), 1000)
    assert u.dtype == torch.float64 and u.shape == (1000, 1000) and u.min() >= 0 and u.max() < 1
    assert_uniform(u, 0, 1)
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12e6) and abs(u.var() * 12 - 1) < 5 * math.sqrt(0.8e-6)
    assert len(u.unique()) == u.numel()
    bits = (u * 2.0**53).long()
    for i in range(53):
        assert_happens(bits >> i & 1, 0.5)
    for shift in (0, 20, 45):  # neighbours in a stream, by their high and their low bits
        pairs = (bits[:, 1:] >> shift & 15) * 16 + (bits[:, :-1] >> shift & 15)
        assert_equally_likely(torch.bincount(pairs.flatten(), minlength=256))


IDS = {
    "counted": torch.arange(400), "negative": torch.arange(400) - 399, "high bits": torch.arange(400) << 40,
    "steps": torch.arange(400) * (0x9E3779B97F4A7C15 - (1 << 64)), "powers": 1 << torch.arange(63),
}  # fmt: skip


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_streams_of_ids_are_unrelated(ids):
    """Of 2500 numbers: no number twice, no correlation, none at another place either."""
    u = uniform(torch.tensor([9]), ids, 2500)
    assert len(u.unique()) == u.numel()
    x = (u - 0.5) * math.sqrt(12)
    assert (x @ x.T / 2500 - torch.eye(len(x))).fill_diagonal_(0).abs().max() < 5.5 / math.sqrt(2500)
    for lag in (1, 2, 60, 61):
        assert abs((x[1:, lag:] * x[:-1, :-lag]).mean()) < 5 / math.sqrt(x[1:, lag:].numel())


def test_streams_of_seeds_are_unrelated_and_a_seed_is_no_id():
    seeds = [0, 1, 2, -1, 1 << 40, (1 << 63) - 1, -(1 << 63)]
    u = torch.stack([uniform(torch.tensor([s]), torch.tensor([0, 1, 2, 1 << 40]), 500) for s in seeds])
    assert len(u.unique()) == u.numel()


# Specs


@PRESETS
def test_specs_have_the_published_numbers(preset):
    specs = view_specs(preset)
    assert len(specs) == len(PUBLISHED[preset])
    for v, spec in enumerate(specs):
        scale, bicubic, jitter, jittered, *others = PUBLISHED[preset][v]
        assert spec.size == ((96, 96) if preset == "dino" and v > 1 else (224, 224))
        assert spec.crop_scale == scale and spec.crop_ratio == (3 / 4, 4 / 3)
        assert spec.interpolation == ("bicubic" if bicubic else "bilinear") and spec.jitter == jitter
        ours = [spec.gray_prob, spec.blur_prob, spec.solarize_prob, spec.flip_prob]
        assert ours == others and (spec.jitter_prob == jittered or not any(jitter))
        assert spec.blur_kernel == 23 and spec.blur_sigma == (0.1, 2.0) and spec.solarize_threshold == 0.5
        assert spec.gray_first == (preset == "mocov1") and spec.channels == (1 if preset == "mnist" else 3)
        plain = preset in ("simclr", "mnist")
        assert spec.mean == (None if plain else (0.485, 0.456, 0.406))
        assert spec.std == (None if plain else (0.229, 0.224, 0.225))


def test_specs_of_other_sizes_are_the_published_ones():
    for size, kernel in ((48, 5), (96, 9), (160, 17), (200, 21), (224, 23), (320, 33), (40, 5), (64, 7)):
        assert view_specs("simclr", size)[0].blur_kernel == kernel
    for preset in ("simclr", "mocov2", "byol", "dino"):
        assert all(spec.blur_prob == 0 for spec in view_specs(preset, 32))
    small = view_specs("simclr", 32)
    assert all(spec.jitter == (0.4, 0.4, 0.4, 0.1) and spec.jitter_prob == 0.8 for spec in small)
    dino = view_specs("dino", 98, local_crops=2, crop_area=0.32)
    assert [spec.size for spec in dino] == [(98, 98)] * 2 + [(42, 42)] * 2
    assert [spec.crop_scale for spec in dino] == [(0.32, 1.0)] * 2 + [(0.05, 0.32)] * 2
    assert view_specs("dino", local_crops=1, local_size=80)[2].size == (80, 80)
    assert [spec.blur_prob for spec in view_specs("dino", 64, local_crops=1)] == [1.0, 0.1, 0.0]  # 27 pixels


def test_a_replaced_field_is_all_that_changes():
    (spec,) = view_specs("mae", 20)
    other = replace(spec, flip_prob=1.0, size=(9, 11))
    assert other.size == (9, 11) and replace(other, flip_prob=0.5, size=20) == spec
    listed = ViewSpec(crop_scale=[0.2, 1.0], jitter=[0.4] * 4, size=[9, 11])
    assert hash(listed) == hash(ViewSpec(crop_scale=(0.2, 1.0), jitter=(0.4,) * 4, size=(9, 11)))
    (view,) = augment_views(noise(2, 3, 8, 8), [other])
    assert view.shape == (2, 3, 9, 11)
    assert (drawn([other], 100).flip == 1).all()


# On what views depend

IMAGES = [noise(3, *size) for size in ((31, 40), (64, 23), (9, 9), (1, 17), (50, 50))]
IDS_OF = torch.tensor([7, 3, 1 << 40, -5, 0])


@BACKENDS
@pytest.mark.parametrize("preset", ["byol", "mocov1", "mnist"])
def test_views_do_not_depend_on_what_else_is_in_the_batch(backend, preset, set_threads):
    def views(images, ids):
        return augment_views(images, preset, size=40, ids=ids, generator=seeded())

    with sslfast.use_backend(backend):
        set_threads(1)
        together = views(pack_images(IMAGES), IDS_OF)
        for threads in (1, 2, 3) if backend == "cpu" else (1,):  # PyTorch's products depend on them
            set_threads(threads)
            assert same(views(pack_images(IMAGES), IDS_OF), together)
            more = views(pack_images(IMAGES[::-1] + IMAGES), torch.cat((IDS_OF.flip(0), IDS_OF)))
            assert same([x[:5].flip(0) for x in more], together) and same([x[5:] for x in more], together)
            for i, image in enumerate(IMAGES):
                assert same(views(image[None], IDS_OF[i : i + 1]), [x[i : i + 1] for x in together])
    assert len(torch.cat(together).flatten(1).unique(dim=0)) > 5  # mnist has the same image twice


@BACKENDS
def test_other_ids_seeds_and_views_have_other_numbers(backend):
    images = noise(1, 3, 40, 40).expand(4, -1, -1, -1)
    with sslfast.use_backend(backend):
        (first, second), p = augment_views(images, "simclr", size=8, generator=seeded(), return_params=True)
        others = augment_views(images, "simclr", size=8, generator=seeded(4))
        placed = augment_views(images, "simclr", size=8, generator=seeded(), ids=torch.arange(4))
        equal = augment_views(images, "simclr", size=8, generator=seeded(), ids=torch.zeros(4).long())
    rows = torch.cat((first, second, *others)).flatten(1)
    assert len(rows.unique(dim=0)) == 16 and len(p.crop.flatten(0, 1).unique(dim=0)) == 8
    assert same(placed, (first, second))  # an image's id is its place
    assert all((x == x[:1]).all() for x in equal) and torch.equal(equal[0][0], first[0])


@BACKENDS
@pytest.mark.parametrize("preset", PUBLISHED)
def test_replay_is_exact_and_of_any_images(backend, preset):
    images, rows = noise(6, 3, 30, 36), torch.tensor([4, 0, 3])
    with sslfast.use_backend(backend):
        views, p = augment_views(images, preset, size=33, return_params=True)
        assert p.table.shape == (len(views), 6, 19) and p.table.dtype == torch.float32
        again, q = augment_views(images, preset, size=33, params=p, return_params=True)
        assert same(again, views) and torch.equal(p.table, q.table)
        for part in (slice(2, 5), rows, torch.arange(6) % 2 == 1, slice(0, 0)):
            ours = augment_views(images[part], preset, size=33, params=p[part])
            assert same(ours, [view[part] for view in views])
        assert same(augment_views(images, preset, size=33, params=p.to("cpu")), views)


@BACKENDS
def test_edited_numbers_are_followed(backend):
    images = noise(8, 3, 20, 20)
    with sslfast.use_backend(backend):
        (view,), p = augment_views(images, "mae", size=16, return_params=True, generator=seeded())
        flipped = p.flip[0] == 1
        p.flip[...] = 0
        (plain,) = augment_views(images, "mae", size=16, params=p)
        p.crop[0] = torch.tensor([2, 1, 16, 16])
        (cropped,) = augment_views(images, "mae", size=16, params=p)
    assert 0 < flipped.sum() < 8
    assert torch.equal(torch.where(flipped.view(8, 1, 1, 1), plain.flip(3), plain), view)
    pixels = images[:, :, 2:18, 1:17] / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(cropped, (pixels - mean) / std, rtol=0, atol=1e-5)


def test_a_call_draws_one_number_whatever_it_is_given():
    states, before = [], torch.get_rng_state()
    for batch, preset in ((1, "mae"), (7, "mae"), (2, "dino"), (0, "simclr")):
        generator = seeded()
        augment_views(noise(batch, 3, 9, 9), preset, size=14, generator=generator)
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)
    assert torch.equal(torch.get_rng_state(), before) and not torch.equal(states[0], seeded().get_state())
    images, generator = noise(3, 3, 9, 9), seeded()
    first, second = (augment_views(images, "mae", size=14, generator=generator) for _ in range(2))
    torch.manual_seed(3)
    assert same(augment_views(images, "mae", size=14), first)
    ours, p = augment_views(images, "mae", size=14, return_params=True)
    assert same(ours, second) and not same(first, second)
    before = torch.get_rng_state()
    augment_views(images, "mae", size=14, params=p)
    assert torch.equal(torch.get_rng_state(), before)
