"""The kernels of views of Triton, in their interpreter against float64: presets, layouts, orders, steps and
dtypes, programs out of order, buffers of NaN, and where they read."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from interpreter import INTERPRETED, grid_order, guarded, launches
from sslfast.kernels import tuning

from sslfast import PackedImages, ViewSpec, view_specs
from sslfast.ops import view_params
from sslfast.ops.view_specs import PRESETS

op = importlib.import_module("sslfast.ops.augment_views")
pytestmark = INTERPRETED
EVERY = ViewSpec(
    jitter=(0.8, 0.8, 0.8, 0.2), jitter_prob=0.9, gray_prob=0.3, blur_prob=0.7, blur_kernel=9,
    solarize_prob=0.5, affine_prob=0.7, degrees=90.0, translate=(0.3, 0.2), affine_scale=(0.5, 1.5),
    shear=20.0, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3),
)  # fmt: skip
GREY = {"channels": 1, "mean": (0.3,), "std": (0.2,)}
ORDERS = [float(x) for x in view_params._ORDERS]
SHIPPED = {name: getattr(tuning, name) for name in dir(tuning) if name.startswith("VIEW_")}
NEAR = 1e-4  # of the threshold: rounding decides whether a value is inverted


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """Fewer programs for the interpreter, which takes milliseconds for each."""
    monkeypatch.setattr(tuning, "VIEW_TILE", (32, 64))
    monkeypatch.setattr(tuning, "VIEW_AT_A_TIME", {False: (16, 1), True: (16, 4)})
    monkeypatch.setattr(tuning, "VIEW_COLOURS", 2048)
    monkeypatch.setattr(tuning, "VIEW_NEIGHBOURS", 2048)


def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def packed(*sizes, channels=3):
    sizes = torch.tensor(sizes)
    counts = sizes.prod(1) * channels
    return PackedImages(noise(int(counts.sum())), counts.cumsum(0) - counts, sizes, channels)


def problem(images, specs, size=24, seed=5):
    """(source, table, views)"""
    specs, source = op.checked(specs, size), op._source(images)
    drawn = view_params.draw(specs, source.sizes, torch.tensor([seed]), torch.arange(len(source.offsets)))
    return source, drawn.table, [op._view(spec) for spec in specs]


def made(source, table, views, dtype=torch.float32, reverse=True):
    with grid_order(reverse), guarded():
        return op._triton(source, table, views, dtype)


def assert_close(source, table, views, dtype=torch.float32):
    """Off by at most twice what the float32 reference is, and a floor."""
    found = made(source, table, views, dtype)
    true, plain = (op.reference(source, table, views, work) for work in (torch.float64, torch.float32))
    views = [
        v._replace(steps=v.steps & ~op.SOLARIZE, scale=(1.0,) * v.channels, shift=(0.0,) * v.channels)
        for v in views
    ]
    before = op.reference(source, table, views, torch.float64)
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0)
    for v, (x, y, z, values) in enumerate(zip(found, true, plain, before, strict=True)):
        assert x.dtype == dtype and x.shape == y.shape and bool(x.isfinite().all())
        threshold = table[v, :, 12].double().view(-1, 1, 1, 1)
        counts = ((values - threshold).abs() > NEAR).double()
        error, plain_error = ((a.double() - y).abs() * counts for a in (x, z))
        floor = 8 * 2**-23 * max(1.0, float(y.abs().max()))  # the jitter multiplies a rounding error
        allowed = 2 * plain_error.amax((1, 2, 3), keepdim=True) + floor + unit * y.abs()
        assert bool((error <= allowed).all()), (v, float((error - allowed).max()), float(plain_error.max()))
        assert float(counts.mean()) > 0.98


MANY = (31, 40), (1, 1), (7, 60), (64, 3)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset(preset):
    """Of packed images of all sizes."""
    specs = view_specs(preset, 36, **({"local_crops": 1} if preset == "dino" else {}))
    assert_close(*problem(packed(*MANY, channels=1 if preset == "mnist" else 3), specs))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_whole_images_to_few_pixels_and_to_many(interpolation):
    specs = [
        ViewSpec(crop_scale=None, interpolation=interpolation, size=size)
        for size in (1, (7, 60), (31, 40), (40, 33))
    ]
    images = packed((45, 40), (1, 1), (90, 20))  # columns come first in some, rows in others
    images.data[:] = 255 * (images.data > 127)
    assert_close(*problem(images, specs))


def layouts(channels):
    wide = noise(2, 2 * channels, 18, 32)
    return {
        "nchw": noise(2, channels, 9, 16),
        "nhwc": noise(2, channels, 9, 16).contiguous(memory_format=torch.channels_last),
        "strided": wide[:, ::2, 1::2, ::2],
        "the same image": noise(1, channels, 9, 16).expand(3, -1, -1, -1),
        "the same channel": noise(2, 1, 9, 16).expand(-1, channels, -1, -1),
        "the same row": noise(2, channels, 1, 16).expand(-1, -1, 9, -1),
        "the same pixel": noise(2, channels, 1, 1).expand(-1, -1, 9, 16),
        "transposed": noise(2, channels, 16, 9).mT,
        "images last": noise(channels, 9, 16, 2).permute(3, 0, 1, 2),
    }


@pytest.mark.parametrize(
    "name, channels",
    [(name, 3) for name in layouts(1)] + [(name, c) for name in ("nchw", "nhwc") for c in (1, 2, 4)],
)
def test_layout(name, channels):
    """Views in colours and grey ones of each."""
    specs = [replace(EVERY, size=(13, 11)), replace(EVERY, size=(5, 20), interpolation="bicubic", **GREY)]
    assert_close(*problem(layouts(channels)[name], specs))


@pytest.mark.parametrize("channels", [1, 3])
def test_orders_of_the_jitter(channels):
    spec = ViewSpec(channels=channels, jitter=(0.8, 0.8, 0.8, 0.4), jitter_prob=1.0, size=(3, 4))
    source, table, views = problem(noise(1, 3, 9, 9).expand(24, -1, -1, -1), [spec])
    table[:, :, 5] = torch.tensor(ORDERS)
    table[:, :, 6:9] = torch.tensor([1.4, 0.7, 1.3])
    assert_close(source, table, views)
    table[:, :, 7] = 1  # contrast as it is: no kernel waits for the mean
    assert_close(source, table, views)


def test_steps():
    """All sets of them, as views of one call, which share buffers; an image with none, and with each."""
    source, table, (view,) = problem(noise(2, 3, 8, 10), [replace(EVERY, size=(7, 9), blur_kernel=5)])
    views = [view._replace(steps=steps) for steps in range(0, 128, 2)]
    table = table.repeat(len(views), 1, 1)
    table[:, 0, 4:] = torch.tensor([0, 228, 1, 1, 1, 0, 0, 0, torch.inf, 1, 0, 0, 0, 1, 0])
    table[:, 1, 6:13] = torch.tensor([1.2, 0.6, 1.4, 0.1, 1, 1.5, 0.5])
    assert_close(source, table, views)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtype(dtype):
    assert_close(
        *problem(noise(3, 3, 30, 33), [EVERY, *view_specs("byol", 36), *view_specs("mae", 20)]), dtype
    )


@pytest.mark.parametrize("size, radius", [((1, 1), 3), ((1, 9), 3), ((9, 1), 30), ((4, 3), 3), ((4, 3), 50)])
def test_blur_reflects_as_often_as_it_takes(size, radius):
    spec = ViewSpec(blur_prob=1.0, blur_kernel=2 * radius + 1, blur_sigma=(0.3, 12.0), size=size)
    source, table, views = problem(noise(4, 3, 10, 10), [spec])
    table[0, :, 11] = torch.tensor([1e-3, 0.7, 2.5, 1e3])
    assert_close(source, table, views)


def test_white_stays_within_1():
    specs = [
        replace(EVERY, size=(5, 7), affine_prob=p, solarize_prob=0.0, mean=None, std=None) for p in (0.0, 0.9)
    ]
    source, table, views = problem(noise(8, 3, 9, 8) | 255, specs)
    table[:, :, 11] = torch.linspace(0.3, 2, 8)
    assert all(0 <= float(x.min()) and float(x.max()) <= 1 for x in made(source, table, views))


@pytest.mark.parametrize("channels, columns_first", [(3, False), (1, False), (3, True)])
def test_strides_beyond_32_bits(channels, columns_first):
    """Of channels, of which twice the stride is too; of rows; of images."""
    height, width, stride = 12 if columns_first else 3, 3, 2**30 + 7
    storage = torch.empty(2 * stride + 20 * height, dtype=torch.uint8)  # of addresses; few pages are used
    images = storage.as_strided((2, 3, height, width), (4 * height, stride, 4, 1))
    images.copy_(noise(*images.shape))
    assert_close(*problem(images, [ViewSpec(channels=channels, crop_scale=None, interpolation="bicubic")], 2))
    (rows,) = (storage.as_strided((1, 3, 3, 4), (1, 6, stride, 1)),)
    rows.copy_(noise(*rows.shape))
    assert_close(*problem(rows, [ViewSpec(crop_scale=None)], 2))


def test_tiles_as_shipped(monkeypatch):
    for name, value in SHIPPED.items():
        monkeypatch.setattr(tuning, name, value)
    assert_close(*problem(noise(1, 3, 30, 40), [replace(EVERY, size=(18, 65), interpolation="bicubic")]))


def test_blocks_of_some_rows(monkeypatch):
    """Of colours and blur; the mean is one of many sums."""
    monkeypatch.setattr(tuning, "VIEW_TILE", (4, 16))
    monkeypatch.setattr(tuning, "VIEW_AT_A_TIME", {False: (2, 1), True: (1, 4)})
    monkeypatch.setattr(tuning, "VIEW_COLOURS", 32)
    monkeypatch.setattr(tuning, "VIEW_NEIGHBOURS", 64)
    spec = replace(EVERY, size=(11, 19))
    assert_close(*problem(noise(1, 3, 12, 15), [spec, replace(spec, affine_prob=0.0)]))


def test_same_bits_in_any_order_and_in_rounds(monkeypatch):
    """Programs out of order; the buffers hold all images, or two."""
    given = problem(
        packed(*MANY),
        [replace(EVERY, size=9), replace(EVERY, size=(5, 12), affine_prob=0.0), ViewSpec(size=9)],
    )
    expected = made(*given, reverse=False)
    found = [made(*given)]
    monkeypatch.setattr(tuning, "VIEW_BUFFER", 2 * 3 * 9 * 9)
    found.append(made(*given))
    assert all(torch.equal(x, y) for views in found for x, y in zip(views, expected, strict=True))


def test_launches(monkeypatch):
    names = launches(monkeypatch)
    colours, blurs, bicubic = ["resample", "colour"], ["blur", "blur"], ["resample", "resample"]
    for preset, expected in {
        "mae": bicubic, "mocov1": 2 * colours, "simclr": 2 * [*colours, *blurs],
        "byol": 2 * [*bicubic, "colour", *blurs], "mnist": 2 * ["resample", "warp"],
    }.items():  # fmt: skip
        names.clear()
        op._triton(*problem(noise(1, 3, 9, 9), view_specs(preset, 33)), torch.float32)
        assert names == expected


# Where the kernels read


@pytest.fixture
def reads(monkeypatch):
    """Addresses of all bytes that are loaded from now on: a list of [lowest, highest]."""
    from triton.runtime import interpreter

    builder, found = type(interpreter.interpreter_builder), []
    load = builder.create_masked_load

    def recorded(self, pointers, mask, *rest):
        if pointers.get_element_ty().primitive_bitwidth == 8 and mask.data.any():
            at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
            found.append((int(at.min()), int(at.max())))
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", recorded)
    return found


def surrounded(fill):
    """Images 5 x 7 and 8 x 3, between bytes of `fill`, and where they are."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (3 * (35 + 24),), generator=generator, dtype=torch.uint8)
    buffer = torch.full((1000,), fill, dtype=torch.uint8)
    buffer[200:305], buffer[500:572] = pixels[:105], pixels[105:]
    data = buffer[100:900]
    return PackedImages(data, torch.tensor([100, 400]), torch.tensor([[5, 7], [8, 3]]))


NONSENSE = [torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 3e9, -5.0, 0.0, 0.7, 6.5]


def test_nothing_outside_the_images_is_read(reads):
    """Whatever is in params: each kind of nonsense in each column, and in all. Numbers that a kernel on a GPU
    is given are looked at by no one."""
    specs = [replace(EVERY, size=(4, 5), interpolation="bicubic", blur_kernel=3)]
    results = []
    for fill in (0, 255):
        images = surrounded(fill)
        source, table, views = problem(images, specs)
        results.append(made(source, table, views))
        start = images.data.data_ptr() + images.offsets
        spans = [(int(at), int(at) + 3 * int(n)) for at, n in zip(start, images.sizes.prod(1), strict=True)]
        for number in NONSENSE if fill else NONSENSE[:1]:
            for column in (0, 1, slice(0, 4), slice(0, 19)):
                changed = table.clone()
                changed[:, :, 2:4] = 1
                changed[:, :, column] = number
                with np.errstate(all="ignore"):
                    op._triton(source, changed, views, torch.float32)
        for low, high in reads:
            assert any(a <= low and high < b for a, b in spans), (low, high, spans)
        assert len(reads) > 50
        reads.clear()
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_numbers_shared_with_the_op_are_equal():
    """The kernels' modules import nothing of sslfast.ops."""
    import sslfast.kernels.view_steps as kernels

    from sslfast.ops import view_params, view_steps

    names = ("BICUBIC", "JITTER", "GRAY_OUT", "GRAY_FIRST", "BLUR", "SOLARIZE", "AFFINE")
    assert [getattr(kernels, name) for name in names] == [getattr(op, name) for name in names]
    assert view_steps.GRAY == kernels.GRAY and kernels.ROW.value == view_params.WIDTH
    table = torch.arange(19.0).view(1, 1, 19)
    params = view_params.ViewParams(table)
    for name, column in (
        ("FLIP", params.flip), ("ORDER", params.order), ("FACTORS", params.jitter[..., 0]),
        ("CONTRAST", params.jitter[..., 1]), ("GRAY", params.gray), ("SIGMA", params.blur_sigma),
        ("THRESHOLD", params.solarize_threshold), ("MATRIX", params.affine[..., 0]),
    ):  # fmt: skip
        assert getattr(kernels, f"AT_{name}").value == column.item()
