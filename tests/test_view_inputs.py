"""What augment_views and pack_images take and give: layouts, channels, modes, arrays; dtypes, buffers, empty
batches; compilers and contexts around a call."""

import contextlib
import itertools
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from interpreter import guarded
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import sslfast
from sslfast import PackedImages, ViewParams, ViewSpec, augment_views, pack_images
from sslfast.ops._check import FLOATS

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])
EVERY = ViewSpec(
    size=24, jitter=(0.8, 0.8, 0.8, 0.2), gray_prob=0.3, blur_prob=0.6, solarize_prob=0.5, affine_prob=0.5,
    degrees=90.0, translate=(0.2, 0.2), affine_scale=(0.6, 1.4), shear=20.0, std=(0.5, 0.4, 0.3),
)  # fmt: skip
SPECS = [EVERY, replace(EVERY, size=(5, 31), interpolation="bicubic", gray_first=True)]


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed))


def views_of(images, specs=SPECS, **options) -> list[Tensor]:
    return augment_views(images, specs, generator=seeded(), **options)


def same(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


# Layouts


def every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, ::2]


def inside(x: Tensor) -> Tensor:
    wide = noise(x.shape[0] + 2, x.shape[1] + 1, x.shape[2] + 3, x.shape[3] + 5, seed=9)
    wide[1:-1, :-1, 2:-1, 1:-4] = x
    return wide[1:-1, :-1, 2:-1, 1:-4]


def packed(x: Tensor, fill: int = 7) -> PackedImages:
    """From the last image to the first, with gaps, offsets and sizes with gaps as well."""
    b, c, h, w = x.shape
    data = torch.full((b, 11 + h * w * c), fill, dtype=torch.uint8)
    data[:, 5:-6] = x.flip(0).permute(0, 2, 3, 1).reshape(b, -1)
    offsets = (5 + data.shape[1] * torch.arange(b).flip(0)).repeat_interleave(2)[::2]
    return PackedImages(data.flatten(), offsets, torch.tensor([[h], [w]]).expand(2, b).T, c)


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "columns first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every other": every_other, "inside": inside, "packed with gaps": packed,
    "packed, every other byte": lambda x: replace(
        packed(x), data=packed(x).data.repeat_interleave(2)[::2]
    ),
    "pack_images": lambda x: pack_images(list(x)),
    "packed views of arrays": lambda x: pack_images([np.asarray(y).transpose(1, 2, 0) for y in x]),
}  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_pixels_lie_changes_no_bit(backend, layout, set_threads):
    set_threads(1)
    for shape in ((4, 3, 30, 37), (2, 3, 1, 9), (3, 3, 8, 1), (1, 3, 1, 1)):
        images = noise(*shape)
        with sslfast.use_backend(backend):
            assert same(views_of(LAYOUTS[layout](images)), views_of(images))


@BACKENDS
@pytest.mark.parametrize("dims", [d for n in (1, 2, 4) for d in itertools.combinations(range(4), n)], ids=str)
def test_repeated_pixels_are_taken_as_they_are(backend, dims, set_threads):
    """Strides of 0, of rows too."""
    set_threads(1)
    shape = [4, 3, 20, 27]
    repeated = noise(*(1 if i in dims else n for i, n in enumerate(shape))).expand(shape)
    with sslfast.use_backend(backend):
        assert same(views_of(repeated), views_of(repeated.contiguous()))


@BACKENDS
def test_bytes_between_images_are_never_looked_at(backend, set_threads):
    set_threads(1)
    images = noise(5, 3, 9, 13)
    with sslfast.use_backend(backend):
        assert same(views_of(packed(images, 0)), views_of(packed(images, 255)))
        shared = PackedImages(packed(images[:1]).data, torch.tensor([5] * 4), torch.tensor([[9, 13]] * 4))
        assert same(views_of(shared), views_of(images[:1].expand(4, -1, -1, -1)))


# Channels and Pillow's modes


@BACKENDS
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_gray_is_repeated_and_alpha_is_dropped(backend, channels, set_threads):
    set_threads(1)
    images = noise(4, channels, 30, 20)
    colours = images[:, :3] if channels == 4 else images[:, :1].expand(-1, 3, -1, -1)
    one = [ViewSpec(size=16, channels=1, affine_prob=0.5, degrees=20.0)]
    with sslfast.use_backend(backend):
        expected, expected_one = views_of(colours.contiguous()), views_of(colours.contiguous(), one)
        for form in (images, LAYOUTS["channels last"](images), packed(images)):
            torch.testing.assert_close(views_of(form), expected, rtol=0, atol=2e-6)
            torch.testing.assert_close(views_of(form, one), expected_one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_pillow_images_of_any_mode_become_what_convert_makes(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    if mode == "HSV" or mode == "YCbCr" or mode == "1" or mode == "P":
        image = image.convert("RGB")
    image = image.convert(mode)
    for channels, target in ((3, "RGB"), (1, "L")):
        ours = pack_images([image, image.crop((2, 1, 3, 8))], channels)
        expected = np.asarray(image.convert(target)).reshape(-1)
        assert np.array_equal(ours.data[: expected.size].numpy(), expected)
        assert ours.sizes.tolist() == [[9, 14], [7, 1]] and ours.channels == channels and len(ours) == 2
        assert ours.offsets.tolist() == [0, 126 * channels] and len(ours.data) == 133 * channels


def test_arrays_and_tensors_of_any_layout_are_packed():
    """Without a warning, of arrays that cannot be written to either, as Pillow's are."""
    hwc = noise(6, 9, 4).numpy()
    fixed = hwc.copy()
    fixed.setflags(write=False)
    forms = [
        hwc, fixed, np.asfortranarray(hwc), hwc[::-1, ::-1][::-1, ::-1], hwc[:, :, :3],
        torch.from_numpy(hwc).permute(2, 0, 1), torch.from_numpy(hwc).permute(2, 0, 1).contiguous(),
        np.asarray(Image.fromarray(hwc[:, :, :3])), Image.fromarray(hwc[:, :, :3]),
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for channels, mode in ((3, "RGB"), (1, "L")):
            expected = np.asarray(Image.fromarray(hwc[:, :, :3]).convert(mode)).reshape(-1)
            ours = pack_images(forms, channels)
            assert np.array_equal(ours.data.view(len(forms), -1).numpy(), np.tile(expected, (len(forms), 1)))
    gray = [hwc[:, :, 0], hwc[:, :, :1], hwc[:, :, [0, 3]], torch.from_numpy(hwc)[..., 0]]
    assert (pack_images(gray).data.view(4, 6, 9, 3) == torch.from_numpy(hwc)[..., :1]).all()
    assert torch.equal(pack_images(gray, 1).data.view(4, 6, 9), torch.from_numpy(hwc)[..., 0].expand(4, 6, 9))


# Outputs


@BACKENDS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_outputs_have_the_dtype_asked_for_and_are_rounded_once(backend, dtype):
    images = noise(5, 3, 20, 33)
    with sslfast.use_backend(backend):
        full = views_of(images)
        if (backend, dtype) == ("cpu", torch.float64):
            with pytest.raises(RuntimeError, match="float64"):
                views_of(images, out_dtype=dtype)
            return
        for view, ours in zip(full, views_of(images, out_dtype=dtype), strict=True):
            assert view.dtype == torch.float32 and ours.dtype == dtype
            assert ours.shape == view.shape and ours.is_contiguous() and not ours.requires_grad
            if dtype == torch.float64:
                assert (ours - view).abs().median() < 1e-6
            else:
                assert torch.equal(ours, view.to(dtype))
    assert all(view.dtype == torch.float64 for view in views_of(images, out_dtype=torch.float64))


def test_kernels_write_every_pixel_and_no_other(isa, set_threads):
    """Buffers are NaN before and around; the reference's views, however many threads there are."""
    specs = [replace(EVERY, size=size) for size in ((1, 1), (1, 40), (33, 1), (17, 31), (64, 64))]
    specs += [replace(SPECS[1], size=(9, 50)), ViewSpec(size=15, channels=1), ViewSpec(size=(7, 3))]
    images = pack_images([noise(3, 1 + i * 11 % 40, 1 + i * 7 % 50, seed=i) for i in range(13)])
    with sslfast.use_backend("reference"):
        expected = views_of(images, specs)
    for dtype, threads in itertools.product(FLOATS[:3], (1, 3)):
        set_threads(threads)
        with guarded(), sslfast.use_backend("cpu"):
            ours = views_of(images, specs, out_dtype=dtype)
        for view, truth in zip(ours, expected, strict=True):
            error = (view.float() - truth).abs()
            allowed = 1e-4 + (truth.abs() * torch.finfo(dtype).eps if dtype != torch.float32 else 0)
            # but for what a rounding solarizes
            assert view.isfinite().all() and (error > allowed).float().mean() < 1e-3


@BACKENDS
def test_no_images_have_no_views(backend):
    with sslfast.use_backend(backend):
        for images in (noise(0, 3, 8, 9), noise(0, 1, 8, 9), pack_images([]), pack_images([], 1)):
            views, p = augment_views(images, SPECS, return_params=True, out_dtype=torch.float16)
            assert [view.shape for view in views] == [(0, 3, 24, 24), (0, 3, 5, 31)]
            assert views[0].dtype == torch.float16 and p.table.shape == (2, 0, 19) and len(images) == 0
            assert same(augment_views(images, SPECS, params=p, out_dtype=torch.float16), views)


# Ways of calling


STEPS = {
    "given": lambda images, table: augment_views(images, "byol", size=12, params=ViewParams(table)),
    "drawn": lambda images, table: augment_views(images, "mocov1", size=12),
    "numbers too": lambda images, table: augment_views(images, "mnist", size=12, return_params=True)[1].table,
}


@pytest.mark.parametrize("name", STEPS)
def test_compile(name):
    """The same numbers, also when a batch of another size comes."""
    torch.compiler.reset()
    fast = torch.compile(STEPS[name], fullgraph=True, backend="aot_eager")
    for batch in (3, 5):
        images = noise(batch, 3, 16, 16)
        _, p = augment_views(images, "byol", size=12, return_params=True)
        torch.manual_seed(batch)
        ours = fast(images, p.table)
        torch.manual_seed(batch)
        assert same(ours, STEPS[name](images, p.table))


def test_fake_tensors_have_shapes_and_leave_nothing_behind():
    specs, images = [ViewSpec(size=(7, 11)), ViewSpec(channels=1, affine_prob=0.123)], noise(2, 3, 9, 9)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(images)
        views, p = augment_views(fake, specs, size=6, out_dtype=torch.float16, return_params=True)
        assert [view.shape for view in views] == [(2, 3, 7, 11), (2, 1, 6, 6)]
        assert all(view.dtype == torch.float16 for view in views) and p.table.shape == (2, 2, 19)
        assert len(augment_views(fake, specs, size=6, params=p)) == 2
    assert all(view.isfinite().all() for view in augment_views(images, specs, size=6))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND = {
    "inference mode": torch.inference_mode, "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64), "float16": lambda: default_dtype(torch.float16),
}  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("around", AROUND)
def test_modes_and_defaults_around_a_call_change_no_bit(backend, around):
    """Nor those of later calls; with specs of which no call has kept anything."""
    images, degrees = noise(3, 3, 33, 29), 30.0 + list(AROUND).index(around) + (backend == "cpu") / 2
    specs = [replace(EVERY, degrees=degrees, interpolation=name) for name in ("bilinear", "bicubic")]
    with sslfast.use_backend(backend):
        with AROUND[around]():
            ours = views_of(images, specs)
        assert same(ours, views_of(images, specs))


def test_params_of_the_strangest_specs_are_taken_again():
    specs = [
        ViewSpec(
            size=size, crop_scale=(scale, scale), crop_ratio=(ratio, ratio), jitter=(10, 10, 10, 0.5),
            jitter_prob=1, blur_prob=1, blur_sigma=(sigma, sigma), blur_kernel=5, affine_prob=1, degrees=360,
            shear=80, translate=(1, 1), affine_scale=(factor, factor), solarize_prob=1,
            solarize_threshold=-1e30,
        )
        for size, scale, ratio, sigma, factor in (
            ((2, 8192), 1e-9, 1e-3, 1e-3, 1e-3), ((8192, 2), 1, 1e3, 1e3, 1e3), (1, 0.3, 1, 1, 1),
        )
    ]  # fmt: skip
    images = noise(40, 3, 3, 70)
    views, params = augment_views(images, specs, return_params=True)
    assert params.affine.abs().max() > 1e6 and all(view.isfinite().all() for view in views)
    assert same(augment_views(images, specs, params=params), views)


def test_images_and_params_are_compared_by_identity():
    images = pack_images([noise(3, 4, 4)])
    _, params = augment_views(images, SPECS, return_params=True)
    assert images == images and images != pack_images([noise(3, 4, 4)])
    assert params == params and params != ViewParams(params.table)


def test_some_of_the_images_share_the_data_of_all():
    images = pack_images([torch.full((3, 4 + i, 9), i, dtype=torch.uint8) for i in range(5)])
    for rows in (torch.tensor([3, 0, 3]), slice(1, 4), torch.tensor([], dtype=torch.int64)):
        some = images[rows]
        assert some.data is images.data and some.device == images.device and some.channels == 3
        (views,) = augment_views(some, (ViewSpec(4),)) if len(some) else (torch.empty(0, 3, 4, 4),)
        assert (views[:, 0, 0, 0] * 255).round().tolist() == torch.arange(5)[rows].tolist()
    for wrong in (3, torch.tensor(3), torch.ones(5, dtype=torch.bool), [1, 2]):
        with pytest.raises((TypeError, ValueError), match="rows"):
            images[wrong]
    with pytest.raises(TypeError):
        list(images)


@BACKENDS
def test_unchanged_params_only_resize(backend):
    """Whatever the spec may do, and with the crop that is written to them."""
    images = torch.randint(0, 256, (4, 3, 20, 30), dtype=torch.uint8)
    spec = ViewSpec(
        (20, 30), affine_prob=1.0, jitter=(0.4,) * 4, gray_prob=1.0, blur_prob=1.0, solarize_prob=1.0
    )
    params = ViewParams.unchanged(torch.tensor([[20, 30]]).expand(4, 2), views=2)
    params.crop[1] = torch.tensor([3.0, 4.0, 10.0, 15.0])
    with sslfast.use_backend(backend):
        whole, part = augment_views(images, (spec, replace(spec, size=(10, 15))), params=params)
    torch.testing.assert_close(whole, images / 255, rtol=0, atol=1e-6)
    torch.testing.assert_close(part, images[:, :, 3:13, 4:19] / 255, rtol=0, atol=1e-6)
    with pytest.raises(TypeError, match="sizes"):
        ViewParams.unchanged([[20, 30]])
