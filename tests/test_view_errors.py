"""Arguments that augment_views, view_specs, ViewSpec, PackedImages and pack_images refuse, by name."""

import math
import re

import numpy as np
import pytest
import torch

import sslfast
from sslfast import PackedImages, ViewParams, ViewSpec, augment_views, pack_images, view_specs

NAN, INF = math.nan, math.inf


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


# Calls with one argument changed


def augment(**changes):
    return augment_views(**{"images": noise(2, 3, 8, 8), "view_specs": "mae", "size": 8, **changes})


def packed(**changes):
    fine = {"data": noise(100), "offsets": torch.tensor([0, 50]), "sizes": torch.tensor([[4, 4], [2, 8]])}
    return PackedImages(**{**fine, **changes})


def presets(**changes):
    return view_specs(**{"preset": "dino", **changes})


def pack(**changes):
    return pack_images(**{"images": [noise(3, 4, 4)], **changes})


def second_packed(images):
    return pack_images([noise(3, 4, 4), images])


def edited(column: int, number: float):
    """params of two images of 8 x 8 pixels, with a number changed for one of them."""
    table = GOOD.clone()
    table[0, 1, column] = number
    return augment(params=ViewParams(table))


GOOD = torch.tensor([0, 0, 8, 8, 0, 228, 1, 1, 1, 0, 0, 0, INF, 1, 0, 0, 0, 1, 0]).repeat(1, 2, 1)
UINT8 = noise(2, 3, 8, 8)
COLUMNS = {
    **dict.fromkeys((0, 1), (NAN, INF, -INF, -1, 0.5, 1, 9, 1e30)),  # top, left
    **dict.fromkeys((2, 3), (NAN, INF, -INF, -1, 0.5, 0, 9, 1e30)),  # height, width
    4: (NAN,), 5: (NAN, INF, -1, 0, 27 + 256, 228.5, 255), **dict.fromkeys((6, 7, 8), (NAN, INF, -INF)),
    9: (NAN, INF, -INF, 1e38), 10: (NAN,), 11: (NAN, INF, -1, 1e-4, 1e4), 12: (NAN,),
    **dict.fromkeys(range(13, 19), (NAN, INF, -INF, 2e9)),
}  # fmt: skip

# (call, name of the argument, what it is given, error)
IMAGES = [
    *((augment, "images", x, TypeError) for x in (
        UINT8.float(), UINT8.int(), UINT8 > 3, UINT8.to_sparse(), UINT8.numpy(), [UINT8[0]], None, "images",
    )),
    *((augment, "images", x, ValueError) for x in (
        UINT8[0], UINT8[0, 0], UINT8[None], noise(2, 5, 8, 8), noise(2, 0, 8, 8), noise(2, 3, 0, 8),
        noise(2, 3, 8, 0), UINT8.to("meta"), noise(1, 1, 1, 1).expand(1, 1, 1, 70_000),
        noise(1, 1, 1, 1).expand(1, 1, 20_000, 20_000),
    )),
    *((packed, "data", x, TypeError) for x in (noise(100).int(), noise(100).float(), b"0" * 100, None)),
    *((packed, "data", x, ValueError) for x in (noise(10, 10), noise(), noise(100).to("meta"))),
    *((packed, "offsets", x, TypeError) for x in (torch.tensor([0, 50]).int(), torch.rand(2), [0, 50], None)),
    *((packed, "offsets", torch.tensor(x), ValueError) for x in (
        [[0, 50]], 0, [0, 53], [53, 0], [-1, 0], [0, -(1 << 63)], [0, (1 << 63) - 1], [0, (1 << 63) - 48],
        [100, 0],
    )),
    *((packed, "sizes", x, TypeError) for x in (torch.ones(2, 2).int(), torch.rand(2, 2), [[4, 4]] * 2)),
    *((packed, "sizes", torch.tensor(x), ValueError) for x in (
        [[4, 4]], [4, 4], [[4, 4, 3]] * 2, [[4, 4], [0, 8]], [[4, 0], [2, 8]], [[4, 4], [-2, -8]],
        [[4, 4]] * 3, [[1, 70_000]] * 2, [[20_000, 20_000]] * 2, [[1 << 62, 4]] * 2, [[1 << 32, 1 << 32]] * 2,
    )),
    *((packed, "channels", x, ValueError) for x in (0, 5, -1, None, "3")),
    *((packed, "channels", x, (TypeError, ValueError)) for x in (3.0, True)),
    *((pack, "channels", x, ValueError) for x in (0, 2, 4, None, "RGB")),
    *((pack, "channels", x, (TypeError, ValueError)) for x in (3.0, True)),
    *((pack, "images", x, TypeError) for x in (
        5, None, "ab", [None], [[[1, 2]]], [b"12"], ["a.png"], UINT8.float(), [pack()],
    )),
    *((second_packed, "images[1]", x, TypeError) for x in (
        np.zeros((4, 4, 3)), np.zeros((4, 4), np.int64), np.zeros((4, 4), bool), torch.zeros(3, 4, 4),
        noise(4, 4) > 3, noise(4, 4).to_sparse(), "b.png", None, np.uint8(3), np.array("a"),
    )),
    *((second_packed, "images[1]", x, ValueError) for x in (
        np.zeros((0, 4, 3), np.uint8), np.zeros((4, 0), np.uint8), np.zeros((4, 4, 5), np.uint8),
        np.zeros((4, 4, 0), np.uint8), np.zeros((1, 4, 4, 3), np.uint8), np.zeros(4, np.uint8),
        np.zeros((), np.uint8), noise(0, 4), noise(3, 0, 4), noise(5, 4, 4), noise(1, 3, 4, 4), noise(),
        noise(3, 4, 4).to("meta"),
    )),
]  # fmt: skip
CALLS = [
    *((augment, "view_specs", x, TypeError) for x in (
        5, ["simclr"], [None], {"a": ViewSpec()}, [ViewSpec(), 1], {"size": 8},
    )),
    (augment, "view_specs", None, (TypeError, ValueError)),
    *((augment, "view_specs", x, ValueError) for x in ("simclr3", "", [], ())),
    *((augment, "size", x, TypeError) for x in (
        "224", 8.0, (8,), (8, 8, 8), None, True, (8.0, 8), (8, "8"), {8, 9}, torch.tensor(8),
    )),
    *((augment, "size", x, ValueError) for x in (0, -1, (8, 0), (0, 8), 8193, (8, 9))),
    *((augment, "generator", x, TypeError) for x in (5, "cpu", torch.tensor(3))),
    *((augment, "out_dtype", x, TypeError) for x in (
        torch.int32, torch.uint8, torch.complex64, torch.bool, "float32", int, float,
    )),
    *((augment, "ids", x, TypeError) for x in (
        torch.tensor([1, 2]).int(), torch.rand(2), [0, 1], torch.ones(2) > 0, 3,
    )),
    *((augment, "ids", torch.ones(s).long(), ValueError) for s in ((3,), (1,), (), (2, 1), (0,))),
    (augment, "ids", torch.ones(2, device="meta").long(), ValueError),
    *((augment, "params", x, TypeError) for x in (
        GOOD, {"table": GOOD}, 5, (GOOD,), ViewParams(None), ViewParams(GOOD.double()),
        ViewParams(GOOD.tolist()), ViewParams(GOOD.to_sparse()),
    )),
    *((augment, "params", ViewParams(x), ValueError) for x in (
        GOOD[:, :1], GOOD.repeat(2, 1, 1), GOOD[:0], GOOD[0], GOOD[..., :18], GOOD.repeat(1, 2, 1),
        GOOD.to("meta"),
    )),
    *((lambda params, i=i: edited(i, params), "params", x, ValueError) for i in COLUMNS for x in COLUMNS[i]),
    (lambda generator: augment(params=ViewParams(GOOD), generator=generator), "generator", torch.Generator(),
     ValueError),
    (lambda ids: augment(params=ViewParams(GOOD), ids=ids), "ids", torch.arange(2), ValueError),
    *((presets, "preset", x, ValueError) for x in ("simclr3", "", "DINO")),
    *((presets, "preset", x, (TypeError, ValueError)) for x in (None, 5, ["dino"])),
    *((presets, "size", x, TypeError) for x in ("224", 224.0, (224, 224), None, True)),
    *((presets, "size", x, ValueError) for x in (0, -5, 8193)),
    *((presets, "local_crops", x, TypeError) for x in (8.0, "8", None, True)),
    (presets, "local_crops", -1, ValueError),
    *((presets, "local_size", x, TypeError) for x in (96.0, "96", True, (96,), [96.0, 96])),
    *((presets, "local_size", x, ValueError) for x in (0, -1, 8193)),
    *((presets, "crop_area", x, TypeError) for x in ("0.4", None, (0.4, 1), True)),
    *((presets, "crop_area", x, ValueError) for x in (0, 0.04, 1.1, -0.4, NAN, INF)),
]  # fmt: skip
PROBABILITIES = [f"{name}_prob" for name in ("flip", "affine", "jitter", "gray", "blur", "solarize")]
RANGES = ("crop_scale", "crop_ratio", "affine_scale", "blur_sigma")
FIELDS = [
    *((name, x, ValueError) for name in PROBABILITIES for x in (-0.1, 1.1, NAN, INF, -1e-9)),
    *((name, x, TypeError) for name in PROBABILITIES for x in (None, "0.5", True, torch.tensor(0.5))),
    *((name, x, ValueError) for name in RANGES for x in (
        (0.9, 0.2), (0, 1), (-1, 1), (NAN, 1), (0.5, NAN), (0.5, INF), (0.5,), (0.1, 0.2, 0.3), (),
    )),
    *((name, x, TypeError) for name in RANGES for x in (
        0.5, "01", ("0.1", "1"), {0.1, 1}, (True, 1), (None, 1),
    )),
    *(("crop_scale", x, ValueError) for x in ((0.1, 1.01), (1.1, 1.2))),
    *((name, None, TypeError) for name in RANGES[1:]),
    *(("jitter", x, ValueError) for x in (
        (0.4, 0.4, 0.4, 0.51), (-0.1, 0, 0, 0), (0, 0, 0, -0.1), (0.4,) * 3, (0.4,) * 5, (NAN, 0, 0, 0),
        (11, 0, 0, 0),
    )),
    *(("jitter", x, TypeError) for x in (0.4, None, "0000", (0.4, 0.4, 0.4, "0.1"))),
    *(("blur_kernel", x, ValueError) for x in (0, 2, 22, -1, -3, 1 << 20, (1 << 20) + 1)),
    *(("blur_kernel", x, TypeError) for x in (3.0, "3", None, True, (3, 3))),
    *(("size", x, ValueError) for x in (0, -8, (8, 0), 8193, (8193, 1))),
    *(("size", x, TypeError) for x in ("224", 224.0, (224,), (2, 2, 2), True, (8, 8.0), torch.ones(2))),
    *(("channels", x, ValueError) for x in (0, 2, 4, -3, None)),
    *(("channels", x, (TypeError, ValueError)) for x in (3.0, True, "3")),
    *(("interpolation", x, ValueError) for x in ("nearest", "", "Bilinear", None, 2)),
    *((name, x, ValueError) for name in ("degrees", "shear") for x in (-1, 361, NAN, INF)),
    *((name, x, TypeError) for name in ("degrees", "shear") for x in ((1, 2), None, "20")),
    *(("translate", x, ValueError) for x in ((-0.1, 0), (0, 1.1), (0,), (NAN, 0))),
    *(("translate", x, TypeError) for x in (0.1, None, ("0", "0"))),
    *(("gray_first", x, TypeError) for x in (1, None, "no")),
    *(("solarize_threshold", x, ValueError) for x in (NAN, INF)),
    *(("solarize_threshold", x, TypeError) for x in (None, "0.5", True)),
    *((name, x, ValueError) for name in ("mean", "std") for x in (
        (0.5,), (0.5,) * 4, (), (NAN, 0.5, 0.5), (0.5, INF, 0.5), (1.1e6, 1, 1),
    )),
    *((name, x, TypeError) for name in ("mean", "std") for x in (0.5, "123", torch.ones(3), ("1", "1", "1"))),
    *(("std", x, ValueError) for x in ((0, 1, 1), (0.2, 0.2, -0.2), (1e-40, 1, 1))),
]  # fmt: skip


def assert_refused(call, name: str, value, error) -> None:
    with pytest.raises(error, match=rf"^{re.escape(name)}(\[\d+\])?: ") as caught:
        call(value)
    assert type(caught.value) in (TypeError, ValueError)


@pytest.mark.parametrize("call, name, value, error", IMAGES + CALLS)
def test_arguments_are_refused_by_name(call, name, value, error):
    by_name = call in (augment, packed, presets, pack)
    assert_refused((lambda x: call(**{name: x})) if by_name else call, name, value, error)


@pytest.mark.parametrize("name, value, error", FIELDS)
def test_fields_are_refused_by_name(name, value, error):
    assert_refused(lambda x: ViewSpec(**{name: x}), name, value, error)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("what, value", [
    ("offsets", -1), ("offsets", 53), ("offsets", (1 << 63) - 1), ("sizes", 0), ("sizes", -3),
    ("sizes", 70_000), ("sizes", 1 << 62),
])  # fmt: skip
def test_images_that_were_written_to(what, value, backend):
    """After PackedImages had checked them; by the function, and by the op on the CPU for itself."""
    images = packed()
    getattr(images, what).view(-1)[-1] = value
    with sslfast.use_backend(backend):
        assert_refused(lambda x: augment(images=x), what, images, ValueError)
    if backend == "cpu":
        with pytest.raises(ValueError, match="^images: "):
            raw(images, ViewParams(GOOD).table)


def raw(images, params):
    steps, scales = [8, 8, 3, 0, 0], [1.0] * 3 + [0.0] * 3
    return torch.ops.sslfast.augment_views(
        images.data, images.offsets, images.sizes, params, [3, 1, -1, 3], steps, scales, torch.float32, "cpu"
    )


def test_the_op_takes_params_of_its_own_alone():
    assert raw(packed(), GOOD)[0].shape == (2, 3, 8, 8)
    for params in (GOOD[..., :1], GOOD[..., :18], GOOD[:, :1], GOOD.repeat(2, 1, 1), GOOD.double()):
        with pytest.raises((TypeError, ValueError), match="^params: "):
            raw(packed(), params)


def test_mean_and_std_are_of_the_channels_of_the_view():
    one = ViewSpec(channels=1, mean=(0.5,), std=(0.2,), size=4)
    assert augment(view_specs=[one])[0].shape == (2, 1, 4, 4)
    for name in ("mean", "std"):
        assert_refused(lambda x, name=name: ViewSpec(channels=1, **{name: x}), name, (0.5,) * 3, ValueError)


def test_what_is_refused_beside_what_is_taken():
    """The base of every case above is fine, and numbers at the ends of ranges are."""
    assert len(augment(params=ViewParams(GOOD))) == 1 and len(packed()) == 2 and len(pack()) == 1
    assert len(presets(local_crops=0, crop_area=0.05)) == 2 and len(presets(crop_area=1)) == 10
    ends = {
        **dict.fromkeys(PROBABILITIES, 1), "crop_scale": (1, 1), "jitter": (10, 10, 10, 0.5),
        "blur_kernel": 1, "degrees": 360, "translate": (1, 1), "size": (1, 1), "solarize_threshold": -3.0,
        "mean": (0, 1e6, -1e6), "std": (1e-6, 1e6, 1),
    }  # fmt: skip
    assert augment(view_specs=[ViewSpec(**ends)])[0].isfinite().all()
    last = packed(offsets=torch.tensor([52, 52]))
    assert len(augment(images=last, view_specs="dino", size=14)) == 10
    for column, numbers in {0: (0,), 5: (27, 228), 11: (1e-3, 1e3), 12: (-INF, 0), 13: (1e9,)}.items():
        for number in numbers:
            assert edited(column, number)[0].isfinite().all()
