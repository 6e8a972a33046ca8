"""What augment_views makes of given numbers: each step against Pillow, colorsys or NumPy, whole presets
against a float64 pipeline of one image at a time."""

import colorsys
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

import sslfast
from sslfast import ViewParams, ViewSpec, augment_views, pack_images, view_specs

DRAWN = settings(max_examples=120, deadline=None, derandomize=True, database=None)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
WITHIN = {"bilinear": 1 / 255 + 1e-5, "bicubic": 2 / 255 + 1e-5}  # rounded between the passes, and after
LUMA = np.array([0.299, 0.587, 0.114])
NOTHING = [0, 0, 0, 0, 0, 228, 1, 1, 1, 0, 0, 0, math.inf, 1, 0, 0, 0, 1, 0]  # but the crop; order 0, 1, 2, 3
# Every step may happen: which do is left to the numbers given.
EVERY = ViewSpec(
    crop_scale=None, affine_prob=1.0, jitter=(1.0, 1.0, 1.0, 0.5), gray_prob=1.0, blur_prob=1.0,
    solarize_prob=1.0,
)  # fmt: skip


def pixels(kind: str, height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 [H, W, C]"""
    if kind == "checkers":
        board = (np.add.outer(np.arange(height), np.arange(width)) % 2 * 255).astype(np.uint8)
        return np.repeat(board[:, :, None], channels, 2)
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return np.where(noise > 127, 255, 0).astype(np.uint8) if kind == "extremes" else noise


def numbers(sizes, views: int = 1, **given) -> ViewParams:
    """Those that do nothing, but for what is given."""
    table = torch.tensor(NOTHING).repeat(views, len(sizes), 1)
    table[:, :, 2:4] = torch.tensor(sizes)
    params = ViewParams(table)
    for name, value in given.items():
        getattr(params, name)[...] = torch.as_tensor(value, dtype=torch.float32)
    return params


def made(image: np.ndarray, backend: str, spec: ViewSpec = EVERY, size=None, **given):
    """The view of one image [H, W, C], as float64 [h, w, channels]."""
    params = numbers([image.shape[:2]], **given)
    with sslfast.use_backend(backend):
        (view,) = augment_views(
            torch.from_numpy(image.transpose(2, 0, 1).copy())[None], [spec], size=size or image.shape[:2],
            params=params,
        )  # fmt: skip
    return view[0].permute(1, 2, 0).double().numpy()


def largest(ours: np.ndarray, theirs) -> float:
    assert ours.shape == np.shape(theirs)
    return float(np.abs(ours - np.asarray(theirs, np.float64)).max())


# Crop, resize, flip


def assert_pillow_resizes_so(backend, image, crop, size, interpolation, flip=0):
    top, left, height, width = crop
    spec = ViewSpec(interpolation=interpolation)
    part = Image.fromarray(image).crop((left, top, left + width, top + height))
    theirs = np.asarray(part.resize(size[::-1], PILLOW[interpolation]))
    ours = made(image, backend, spec, size, crop=crop, flip=flip)
    assert largest(ours, (theirs[:, ::-1] if flip else theirs) / 255) <= WITHIN[interpolation]
    assert ours.min() >= 0 and ours.max() <= 1


@st.composite
def crops(draw):
    """(image's size, crop, view's size), of each kind: of one pixel, of one row, of all; up to 3000 x 4000
    pixels, small images as likely as large ones."""
    inside = []
    for most in (3000, 4000):
        whole = round(most ** draw(st.floats(0, 1)))
        part = draw(st.sampled_from([1, whole]) | st.integers(1, whole))
        inside.append((whole, draw(st.integers(0, whole - part)), part))
    (height, top, h), (width, left, w) = inside
    size = st.integers(1, 40) | st.sampled_from([1, 150])
    return (height, width), (top, left, h, w), (draw(size), draw(size))


@BACKENDS
@DRAWN
@given(
    crops(), st.sampled_from(["noise", "checkers", "extremes"]), st.sampled_from(list(PILLOW)), st.booleans()
)
@example(((1, 1), (0, 0, 1, 1), (30, 30)), "noise", "bicubic", True)
@example(((8, 8), (0, 0, 8, 8), (24, 20)), "checkers", "bicubic", False)
def test_crops_of_any_size_are_resized_as_pillow_s(backend, sizes, kind, interpolation, flip):
    (height, width), crop, size = sizes
    assert_pillow_resizes_so(backend, pixels(kind, height, width), crop, size, interpolation, flip)


@BACKENDS
@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize(
    "kind, image, crop, size",
    [
        ("noise", (3000, 4000), (0, 0, 3000, 4000), (224, 224)),
        ("extremes", (3000, 4000), (17, 5, 2983, 3995), (1, 2)),
        ("checkers", (500, 375), (0, 0, 500, 375), (96, 96)),
        ("checkers", (40, 40), (3, 4, 31, 29), (224, 200)),  # overshoots, in both directions
        ("extremes", (333, 500), (100, 50, 90, 110), (224, 224)),
        ("extremes", (1, 4000), (0, 0, 1, 4000), (31, 7)),
        ("extremes", (3000, 1), (0, 0, 3000, 1), (7, 31)),
        ("noise", (480, 640), (479, 639, 1, 1), (64, 64)),
        ("noise", (224, 224), (0, 0, 224, 224), (224, 224)),
        ("noise", (225, 223), (0, 0, 225, 223), (224, 224)),
    ],
)  # fmt: skip
def test_photographs_and_strips_are_resized_as_pillow_s(backend, interpolation, kind, image, crop, size):
    assert_pillow_resizes_so(backend, pixels(kind, *image), crop, size, interpolation)


@BACKENDS
def test_what_was_not_drawn_changes_no_bit(backend):
    image = pixels("noise", 20, 31)
    plain = made(image, backend, ViewSpec(crop_scale=None))
    assert largest(plain, image / 255) < 1e-7 and np.array_equal(made(image, backend), plain)
    assert np.array_equal(made(image, backend, flip=1), plain[:, ::-1])


# Colours, each against the definition (float32 has errors of 1e-7), and Pillow, which truncates to 8 bits


def gray_of(x):
    return (x * LUMA).sum(2, keepdims=True)


def turned(x, turns):
    changed = [colorsys.rgb_to_hsv(*p) for p in x.reshape(-1, 3)]
    return np.array([colorsys.hsv_to_rgb((h + turns) % 1, s, v) for h, s, v in changed]).reshape(x.shape)


ADJUSTED = (
    lambda x, f: np.clip(f * x, 0, 1),
    lambda x, f: np.clip(f * x + (1 - f) * gray_of(x).mean(), 0, 1),
    lambda x, f: np.clip(f * x + (1 - f) * gray_of(x), 0, 1),
    turned,
)
# 1 for what is truncated, and what rounding does to the grey that an image is mixed with: half a level a
# pixel, and half a level more for contrast's mean of rounded pixels
ENHANCED = ((ImageEnhance.Brightness, 0.0), (ImageEnhance.Contrast, 1.0), (ImageEnhance.Color, 0.5))


@BACKENDS
@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("factor", [0.0, 0.2, 0.6, 1.0, 1.4, 1.8, 5.0])
def test_brightness_contrast_and_saturation_are_pillow_s(backend, step, factor):
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[step] = factor
    enhancer, rounding = ENHANCED[step]
    for kind, height, width in (("noise", 40, 33), ("extremes", 9, 9), ("checkers", 7, 5), ("noise", 1, 1)):
        image = pixels(kind, height, width) // (2 if kind == "noise" else 1) + 3 * (kind == "noise")
        image = image.astype(np.uint8)
        ours = made(image, backend, jitter=factors)
        theirs = np.asarray(enhancer(Image.fromarray(image)).enhance(factor))
        assert largest(ours, ADJUSTED[step](image / 255, factor)) < 2e-6
        assert largest(ours * 255, theirs) <= 1 + rounding * abs(1 - factor) + 1e-3


@BACKENDS
@pytest.mark.parametrize("turns", [-0.5, -0.4, -1 / 6, -0.01, 0.0, 1e-3, 0.1, 1 / 3, 0.5])
def test_hue_is_colorsys_s(backend, turns):
    levels = [0, 1, 127, 128, 254, 255]  # all kinds of equal, nearly equal and extreme channels
    few = np.array(list(itertools.product(levels, repeat=3)), np.uint8).reshape(12, 18, 3)
    for image in (few, pixels("noise", 30, 30)):
        ours = made(image, backend, jitter=[1, 1, 1, turns])
        assert largest(ours, turned(image / 255, turns)) < 3e-6


@BACKENDS
def test_the_jitter_s_steps_come_in_each_of_the_24_orders(backend):
    image, factors = pixels("noise", 12, 15), (1.5, 0.4, 1.7, 0.2)
    orders = list(itertools.permutations(range(4)))
    params = numbers([(12, 15)] * 24, jitter=factors)
    params.order[0] = torch.tensor([sum(step << 2 * i for i, step in enumerate(o)) for o in orders])
    with sslfast.use_backend(backend):
        batch = torch.from_numpy(image).permute(2, 0, 1).expand(24, -1, -1, -1)
        (views,) = augment_views(batch, [EVERY], size=(12, 15), params=params)
    expected = []
    for order in orders:
        x = image / 255
        for step in order:
            x = ADJUSTED[step](x, factors[step])
        expected.append(x)
    assert largest(views.permute(0, 2, 3, 1).double().numpy(), expected) < 1e-5
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.combinations(expected, 2))


@BACKENDS
def test_gray_is_pillow_s_after_the_jitter_or_before_it(backend):
    image, factors = pixels("noise", 40, 50), [1.4, 0.7, 1.6, 0.3]
    theirs = np.asarray(Image.fromarray(image).convert("L"))[:, :, None] / 255
    ours, one = made(image, backend, gray=1), made(image, backend, ViewSpec(crop_scale=None, channels=1))
    assert largest(ours[:, :, :1], theirs) < 1 / 255 and np.ptp(ours, axis=2).max() == 0
    assert largest(ours, np.repeat(gray_of(image / 255), 3, 2)) < 1e-6 and largest(one, ours[:, :, :1]) < 1e-6
    x = image / 255
    for first in (True, False):
        expected = np.repeat(gray_of(x), 3, 2) if first else x
        for adjust, factor in zip(ADJUSTED, factors, strict=True):
            expected = adjust(expected, factor)
        expected = expected if first else np.repeat(gray_of(expected), 3, 2)
        spec = replace(EVERY, gray_first=first)
        assert largest(made(image, backend, spec, jitter=factors, gray=1), expected) < 1e-5


@BACKENDS
def test_solarize_is_pillow_s(backend):
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    theirs = np.asarray(ImageOps.solarize(Image.fromarray(image), 128)) / 255
    assert largest(made(image, backend, solarize_threshold=0.5), theirs) < 1e-6
    for threshold, expected in (
        (0.0, 1 - image / 255),
        (1.0, image / 255 * (image < 255)),
        (1.1, image / 255),
    ):
        assert largest(made(image, backend, solarize_threshold=threshold), expected) < 1e-6


# Blur, normalisation, affine maps


def blurred(x, sigma, radius):
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (0, 1):
        n = x.shape[axis]
        at, period = np.arange(-radius, n + radius), max(1, 2 * n - 2)
        at = np.abs((at + period // 2) % period - period // 2)  # to and fro between the edges
        long = x.take(at, axis)
        if radius < n:
            assert np.array_equal(long, np.pad(x, [(radius * (a == axis),) * 2 for a in range(3)], "reflect"))
        x = sum(k * long.take(np.arange(i, i + n), axis) for i, k in enumerate(kernel))
    return x


@BACKENDS
@DRAWN
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 11),
    st.floats(0.1, 2) | st.sampled_from([0.001, 2.0, 30.0, 1000.0]), st.sampled_from(["noise", "extremes"]),
)  # fmt: skip
@example(1, 1, 11, 2.0, "noise")
@example(2, 12, 11, 2.0, "extremes")
def test_blur_is_a_convolution_with_reflected_edges(backend, height, width, radius, sigma, kind):
    image, sigma = pixels(kind, height, width), float(np.float32(sigma))
    ours = made(image, backend, replace(EVERY, blur_kernel=2 * radius + 1), blur_sigma=sigma)
    assert largest(ours, blurred(image / 255, sigma, radius)) < 2e-6


@BACKENDS
def test_views_are_normalised_by_mean_and_standard_deviation(backend):
    image, mean, std = pixels("noise", 9, 7), (0.5, -2.0, 0.1), (0.2, 3.0, 1e-2)
    ours = made(image, backend, replace(EVERY, mean=mean, std=std))
    assert np.abs((ours - (image / 255 - mean) / std) * std).max() < 1e-6
    assert largest(made(image, backend, replace(EVERY, mean=mean)), image / 255 - mean) < 1e-6
    one = made(image, backend, replace(EVERY, channels=1, std=(0.25,)))
    assert largest(one, 4 * gray_of(image / 255)) < 4e-6


def warped(x, matrix):
    """Bilinear, 0 outside, a pixel at a time; a place is turned about the centre."""
    height, width = x.shape[:2]
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    padded, out = np.pad(x, ((1, 1), (1, 1), (0, 0))), np.zeros_like(x)
    a = np.array(matrix, np.float32).astype(np.float64).reshape(2, 3)
    for i, j in itertools.product(range(height), range(width)):
        at = a[:, :2] @ (np.array([j, i]) - middle) + a[:, 2] + middle
        if (at <= -1).any() or (at >= (width, height)).any():
            continue
        (c, r), (u, v) = (np.floor(at) + 1).astype(int), at - np.floor(at)
        for p, q, weight in ((r, c, (1 - v) * (1 - u)), (r, c + 1, (1 - v) * u), (r + 1, c, v * (1 - u)),
                             (r + 1, c + 1, v * u)):  # fmt: skip
            out[i, j] += weight * padded[p, q] if weight else 0
    return out


MAPS = [
    [0.9, 0.2, 1.5, -0.3, 1.1, -2.25], [1.4, 0, 0, 0, 1.4, 0], [0.3, -0.5, 0.5, 0.5, 0.3, 0],
    [1, 0.27, 0, 0, 1, 0], [-1, 0, 0, 0, -1, 0], [1, 0, 100, 0, 1, 0], [1, 0, 0.5, 0, 1, 0], [0.0] * 6,
]  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("matrix", MAPS, ids=str)
@pytest.mark.parametrize("height, width", [(28, 28), (9, 14), (1, 1), (1, 6)])
def test_affine_maps_are_bilinear_about_the_centre(backend, matrix, height, width):
    image = pixels("noise", height, width)
    ours = made(image, backend, affine=matrix)
    assert largest(ours, warped(image / 255, matrix)) < 2e-5
    mirrored = made(image, backend, affine=matrix, flip=1)
    assert largest(mirrored, warped(image[:, ::-1] / 255, matrix)) < 2e-5
    a, b, c, d, e, f = matrix  # Pillow has the corner of a pixel where this has its centre
    data = (a, b, c + (width - a * width - b * height) / 2, d, e, f + (height - d * width - e * height) / 2)
    theirs = Image.fromarray(image).transform((width, height), Image.AFFINE, data, Image.BILINEAR)
    y, x = np.mgrid[:height, :width] + 0.5
    column, row = (k * x + m * y + n for k, m, n in (data[:3], data[3:]))
    inside = (column > 1) & (column < width - 1) & (row > 1) & (row < height - 1)
    assert np.abs(ours * 255 - np.asarray(theirs))[inside].max(initial=0) <= 1 + 1e-2


@BACKENDS
def test_quarter_turns_and_shifts_by_whole_pixels_move_pixels_as_they_are(backend):
    image = pixels("noise", 12, 12)
    x = image / 255
    assert largest(made(image, backend, affine=[0, -1, 0, 1, 0, 0]), np.rot90(x)) < 1e-6
    assert largest(made(image, backend, affine=[0, 1, 0, -1, 0, 0]), np.rot90(x, -1)) < 1e-6
    shifted = np.zeros_like(x)
    shifted[2:, :-3] = x[:-2, 3:]
    assert largest(made(image, backend, affine=[1, 0, 3, 0, 1, -2]), shifted) < 1e-6


# Whole presets


def filtered(x, count, cubic):
    """Rows [n, ...] -> [count, ...], as Pillow computes them: a triangle, or Keys' cubic with a = -0.5."""
    n, out = len(x), []
    scale = n / count
    wide = max(scale, 1.0)
    for i in range(count):
        middle, reach = (i + 0.5) * scale, wide * (2 if cubic else 1)
        at = np.arange(max(0, math.floor(middle - reach)), min(n, math.ceil(middle + reach)))
        t = np.abs(at + 0.5 - middle) / wide
        near, far = 1.5 * t**3 - 2.5 * t**2 + 1, 2.5 * t**2 - t**3 / 2 - 4 * t + 2
        w = np.where(t < 1, near, np.where(t < 2, far, 0)) if cubic else np.maximum(1 - t, 0)
        out.append(np.tensordot(w / w.sum(), x[at], 1))
    return np.clip(out, 0, 1)


# of 48 pixels: bicubic, radius of the blur, gray before the jitter, normalised
RECIPES = {
    "simclr": (False, 2, False, False), "mocov1": (False, 0, True, True), "mocov2": (False, 11, False, True),
    "mocov3": (False, 11, False, True), "byol": (True, 11, False, True), "dino": (True, 11, False, True),
    "mae": (True, 0, False, True), "mnist": (False, 0, False, False),
}  # fmt: skip


def by_hand(image, row, size, recipe, channels):
    """(view, where a rounding decides whether it is solarized)"""
    cubic, radius, gray_first, normalized = recipe
    top, left, height, width = row[:4].astype(int)
    x = gray_of(image / 255) if channels == 1 else image / 255
    x = x[top : top + height, left : left + width]
    columns_first = height - size[0] > 2 * max(0, width - size[1])  # as Pillow 13 decides
    for columns in (columns_first, not columns_first):
        x = (
            filtered(x, size[0], cubic)
            if columns
            else filtered(x.swapaxes(0, 1), size[1], cubic).swapaxes(0, 1)
        )
    x = x[:, ::-1] if row[4] else x
    x = warped(x, row[13:]) if row[13:].tolist() != [1, 0, 0, 0, 1, 0] else x
    x = np.repeat(gray_of(x), 3, 2) if gray_first and row[10] else x
    for i in range(4 if row[6:10].tolist() != [1, 1, 1, 0] else 0):
        step = int(row[5]) >> 2 * i & 3
        x = ADJUSTED[step](x, row[6 + step])
    x = np.repeat(gray_of(x), 3, 2) if row[10] else x
    x = blurred(x, row[11], radius) if row[11] else x
    unsure = np.abs(x - row[12]) < 1e-5
    x = np.where(x >= row[12], 1 - x, x)
    return ((x - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225) if normalized else x), unsure


@pytest.mark.parametrize(
    "backend, dtype, within",
    [("reference", torch.float64, 1e-9), ("reference", torch.float32, 1e-4), ("cpu", torch.float32, 1e-4)],
)
@pytest.mark.parametrize("preset", RECIPES)
def test_presets_are_the_published_pipelines(preset, backend, dtype, within):
    """float32: a dozen steps of 1e-7 each, which factors of up to 1.8^3, a cubic's lobes and a standard
    deviation of 0.224 enlarge."""
    images = [pixels("noise", 40 + 9 * i, 130 - 10 * i, seed=i) // (1 + i % 3) for i in range(10)]
    with sslfast.use_backend(backend):
        views, params = augment_views(
            pack_images(images), preset, size=48, return_params=True, out_dtype=dtype
        )
    rows = params.table.double().numpy()
    for spec, view, given_rows in zip(view_specs(preset, 48), views, rows, strict=True):
        view = view.permute(0, 2, 3, 1).double().numpy()
        for image, ours, row in zip(images, view, given_rows, strict=True):
            expected, unsure = by_hand(image, row, spec.size, RECIPES[preset], spec.channels)
            assert largest(np.where(unsure, 0, ours), np.where(unsure, 0, expected)) < within
            assert unsure.mean() < 0.01
