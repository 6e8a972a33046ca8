"""augment_views: random views of uint8 images, all views of an image in one call.

What is random is drawn first (view_params.py), on the device, so that every backend makes the same views of
it. The reference below, with view_steps.py, is the definition.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from sslfast import _C
from sslfast.ops import _backend
from sslfast.ops._check import FLOATS, check_tensor, traced
from sslfast.ops._library import define
from sslfast.ops.packed_images import LARGEST_IMAGE, LARGEST_SIDE, PackedImages
from sslfast.ops.patch_mask import device_for
from sslfast.ops.view_params import WIDTH, ViewParams, draw
from sslfast.ops.view_specs import ViewSpec, checked
from sslfast.ops.view_steps import ADJUST, blur, resize, to_gray, warp

BICUBIC, JITTER, GRAY_OUT, GRAY_FIRST, BLUR, SOLARIZE, AFFINE = (1 << i for i in range(7))  # View.steps


class Source(NamedTuple):
    """Where the pixels of B images are."""

    data: Tensor
    """uint8, of any shape"""
    offsets: Tensor
    """int64 [B]: of each image's corner, from the first number of data"""
    sizes: Tensor
    """int64 [B, 2]: height, width"""
    layout: tuple[int, int, int, int]
    """channels, and strides of channel, row and column; -1: rows follow each other"""


class View(NamedTuple):
    """What the backends need of a spec, besides what was drawn."""

    height: int
    width: int
    channels: int
    steps: int
    """of those named above: what the spec does at all"""
    radius: int
    """the blur's, at most"""
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    """of each channel: a view is value * scale + shift"""


def _view(spec: ViewSpec) -> View:
    height, width = spec.size  # type: ignore[misc]
    steps = BICUBIC * (spec.interpolation == "bicubic") + GRAY_FIRST * spec.gray_first
    steps += JITTER * (any(spec.jitter) and spec.jitter_prob > 0) + GRAY_OUT * (spec.gray_prob > 0)
    steps += (
        BLUR * (spec.blur_prob > 0) + SOLARIZE * (spec.solarize_prob > 0) + AFFINE * (spec.affine_prob > 0)
    )
    mean, std = spec.mean or (0.0,) * spec.channels, spec.std or (1.0,) * spec.channels
    scale = tuple(1 / s for s in std)
    shift = tuple(-m / s for m, s in zip(mean, std, strict=True))
    return View(height, width, spec.channels, steps, spec.blur_kernel // 2, scale, shift)


# The reference: plain PyTorch, an image at a time; specification, test truth and benchmark baseline.


def reference(source: Source, params: Tensor, views: Sequence[View], dtype: torch.dtype) -> list[Tensor]:
    """float64 arithmetic for float64 views, otherwise float32."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    made: list[list[Tensor]] = [[] for _ in views]
    for b, (offset, (height, width)) in enumerate(
        zip(source.offsets.tolist(), source.sizes.tolist(), strict=True)
    ):
        channels, *strides = source.layout
        strides[1] = width * strides[2] if strides[1] < 0 else strides[1]
        offset += source.data.storage_offset()
        image = source.data.as_strided((channels, height, width), strides, offset).to(work)
        for view, row, out in zip(views, params[:, b].tolist(), made, strict=True):
            with torch.autocast(image.device.type, enabled=False):
                out.append(reference_view(image / 255, view, row).to(dtype))
    empty = [(0, view.channels, view.height, view.width) for view in views]
    data = source.data
    return [
        torch.stack(out) if out else data.new_empty(shape, dtype=dtype)
        for out, shape in zip(made, empty, strict=True)
    ]


def reference_view(image: Tensor, view: View, row: list[float]) -> Tensor:
    """[C, H, W] in [0, 1] and a row of ViewParams.table -> [channels, h, w]"""
    top, left, height, width = (int(x) for x in row[:4])
    flip, order, *factors, gray, sigma, threshold = row[4:13]
    x = image[: 1 if len(image) < 3 else 3]
    if view.channels == 1:
        x = to_gray(x)
    x = x[:, top : top + height, left : left + width].expand(view.channels, -1, -1)
    x = resize(x, (view.height, view.width), view.steps & BICUBIC > 0)
    x = x.flip(2) if flip else x
    if view.steps & AFFINE:
        x = warp(x, row[13:19])
    if view.steps & GRAY_FIRST and view.steps & GRAY_OUT and gray:
        x = to_gray(x).expand_as(x)
    if view.steps & JITTER:
        for i in range(4):
            step = int(order) >> 2 * i & 3
            x = ADJUST[step](x, factors[step])
    if not view.steps & GRAY_FIRST and view.steps & GRAY_OUT and gray:
        x = to_gray(x).expand_as(x)
    if view.steps & BLUR and sigma:
        x = blur(x, sigma, view.radius)
    x = x.clamp(0, 1)  # weights add up to 1 but for rounding
    if view.steps & SOLARIZE:
        x = torch.where(x >= threshold, 1 - x, x)
    scale, shift = (x.new_tensor(numbers).view(-1, 1, 1) for numbers in (view.scale, view.shift))
    return x * scale + shift


# Backends


def _outputs(source: Source, views: Sequence[View], dtype: torch.dtype) -> list[Tensor]:
    batch = source.offsets.shape[0]
    return [source.data.new_empty(batch, v.channels, v.height, v.width, dtype=dtype) for v in views]


def _cpu(source: Source, params: Tensor, views: Sequence[View], dtype: torch.dtype) -> list[Tensor]:
    outputs, batch, device = _outputs(source, views, dtype), len(source.offsets), source.data.device
    data = source.data
    extent = 1 + sum((n - 1) * stride for n, stride in zip(data.shape, data.stride(), strict=True))
    _C.augment_views(
        _backend.address("images", data), extent if data.numel() else 0, source.layout,
        _backend.pointer("offsets", source.offsets, torch.int64, (batch,), device),
        _backend.pointer("sizes", source.sizes, torch.int64, (batch, 2), device),
        _backend.pointer("params", params, torch.float32, (len(views), batch, WIDTH), device),
        [(v.height, v.width, v.channels, v.steps, v.radius) for v in views],
        [(*v.scale, *v.shift) for v in views],
        [_backend.pointer("view", x, dtype, tuple(x.shape), device) for x in outputs],
        _backend.CODES[dtype], batch, torch.get_num_threads(),
    )  # fmt: skip
    return outputs


def _triton(source: Source, params: Tensor, views: Sequence[View], dtype: torch.dtype) -> list[Tensor]:
    from sslfast.kernels import augment_views

    outputs, batch = _outputs(source, views, dtype), len(source.offsets)
    check_tensor("params", params, (torch.float32,), (len(views), batch, WIDTH), source.data)
    check_tensor("offsets", source.offsets, (torch.int64,), (batch,), source.data)
    check_tensor("sizes", source.sizes, (torch.int64,), (batch, 2), source.data)
    if batch:
        with _backend.device_of(source.data):
            augment_views.launch(*source, params, views, outputs)
    return outputs


def _no_double(refuses: Callable[[torch.device, torch.dtype], str | None]) -> Callable:
    def also(device: torch.device, dtype: torch.dtype) -> str | None:
        return "it has no kernel for torch.float64" if dtype == torch.float64 else refuses(device, dtype)

    return also


for _name, _function, _refuses in (
    ("cpu", _cpu, _no_double(_backend.cpu_refuses)),
    ("triton", _triton, _no_double(lambda device, dtype: _backend.triton_refuses(device))),
    ("reference", reference, lambda device, dtype: None),
):
    _backend.register("augment_views", _name, _backend.Backend(_function, None, _refuses))


def _of_flat(layout: list[int], shapes: list[int], scales: list[float]) -> list[View]:
    views, at = [], 0
    for i in range(0, len(shapes), 5):
        height, width, channels, steps, radius = shapes[i : i + 5]
        numbers = scales[at : at + 2 * channels]
        at += 2 * channels
        views.append(
            View(height, width, channels, steps, radius, tuple(numbers[:channels]), tuple(numbers[channels:]))
        )
    return views


def _implementation(data, offsets, sizes, params, layout, shapes, scales, dtype, backend):
    views = _of_flat(layout, shapes, scales)
    function = _backend.implementation("augment_views", backend).forward
    return function(Source(data, offsets, sizes, tuple(layout)), params, views, dtype)


_op = define(
    "augment_views(Tensor data, Tensor offsets, Tensor sizes, Tensor params, int[] layout, int[] shapes, "
    "float[] scales, ScalarType dtype, str backend) -> Tensor[]",
    _implementation,
    lambda data, offsets, sizes, params, layout, shapes, scales, dtype, backend: _outputs(
        Source(data, offsets, sizes, tuple(layout)), _of_flat(layout, shapes, scales), dtype
    ),
)


# Public function


def _number(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """int64 [1]"""
    most = (1 << 63) - 1
    if generator is None:  # torch.compile traces no call with one
        return torch.randint(most, (1,), device=device)
    return torch.randint(most, (1,), device=device, generator=generator)


def _source(images: Tensor | PackedImages) -> Source:
    if isinstance(images, PackedImages):
        images.check()
        layout = images.channels, 1, -1, images.channels
        data, offsets, sizes = (x.contiguous() for x in (images.data, images.offsets, images.sizes))
        return Source(data, offsets, sizes, layout)
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor or PackedImages, got {type(images).__name__}")
    check_tensor("images", images, (torch.uint8,), (None, None, None, None))
    batch, channels, height, width = images.shape
    if channels not in (1, 2, 3, 4):
        raise ValueError(f"images: expected [B, C, H, W] with 1 to 4 channels, got {list(images.shape)}")
    if height < 1 or width < 1:
        raise ValueError(f"images: expected at least one pixel, got {list(images.shape)}")
    if max(height, width) > LARGEST_SIDE or height * width > LARGEST_IMAGE:
        raise ValueError(
            f"images: expected at most {LARGEST_SIDE} pixels a side and {LARGEST_IMAGE} in all, "
            f"got {height} x {width}"
        )
    strides = images.stride()
    offsets = torch.arange(batch, device=images.device) * strides[0]
    sizes = torch.empty(batch, 2, dtype=torch.int64, device=images.device)
    sizes[:, 0], sizes[:, 1] = height, width
    return Source(images, offsets, sizes, (channels, strides[1], strides[2], strides[3]))


@overload
def augment_views(
    images: Tensor | PackedImages,
    view_specs: str | Sequence[ViewSpec],
    *,
    size: int | tuple[int, int] = 224,
    generator: torch.Generator | None = None,
    out_dtype: torch.dtype | None = None,
    params: ViewParams | None = None,
    return_params: Literal[False] = False,
    ids: Tensor | None = None,
) -> list[Tensor]: ...
@overload
def augment_views(
    images: Tensor | PackedImages,
    view_specs: str | Sequence[ViewSpec],
    *,
    size: int | tuple[int, int] = 224,
    generator: torch.Generator | None = None,
    out_dtype: torch.dtype | None = None,
    params: ViewParams | None = None,
    return_params: Literal[True],
    ids: Tensor | None = None,
) -> tuple[list[Tensor], ViewParams]: ...


def augment_views(
    images: Tensor | PackedImages,
    view_specs: str | Sequence[ViewSpec],
    *,
    size: int | tuple[int, int] = 224,
    generator: torch.Generator | None = None,
    out_dtype: torch.dtype | None = None,
    params: ViewParams | None = None,
    return_params: bool = False,
    ids: Tensor | None = None,
) -> list[Tensor] | tuple[list[Tensor], ViewParams]:
    """Random views of each image: crop, flip, colours, blur, solarize and normalise, on the images' device.

        v1, v2 = augment_views(images, "simclr")

    Each call draws one number from the generator; an image's views depend on that number, its id, its size
    and its pixels, and on no other image, the number of threads or the backend (up to rounding). Resized
    pixels are those of Pillow 13 within 1/255 (bilinear) and 2/255 (bicubic); earlier versions never resize
    along columns first, which changes what is clipped of a bicubic's overshoots. ViewSpec has the steps.

    Args:
        images: uint8 [B, C, H, W] of any strides with 1 to 4 channels (grey, grey and alpha, RGB, RGB and
            alpha), or PackedImages of different sizes.
        view_specs: "simclr", "mocov1", "mocov2", "mocov3", "byol", "dino", "mae" or "mnist", see
            `view_specs`; or a list of ViewSpec.
        size: of views whose spec has none, in pixels: the side of a square, or (height, width).
        generator: on the images' device; by default the device's own.
        out_dtype: of the views, floating; float32 by default. float64 has the reference alone, which on a
            GPU waits for numbers.
        params: what to do instead of drawing it, as an earlier call has returned it.
        return_params: return (views, params).
        ids: int64 [B], what to draw each image's numbers by, such as its index in the data set; by default
            its place in the batch. Processes that share a generator's state, and each train on their part of
            a batch, want the index: places are the same in all of them.

    Returns:
        For each spec a contiguous tensor [B, channels, h, w]; values before normalisation are in [0, 1].

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or value; the message names it.
    """
    specs, source = checked(view_specs, size), _source(images)
    device, batch = source.data.device, source.offsets.shape[0]
    dtype = torch.float32 if out_dtype is None else out_dtype
    if dtype not in FLOATS:
        raise TypeError(f"out_dtype: expected {' or '.join(map(str, FLOATS))}, got {dtype}")
    if params is not None:
        if not isinstance(params, ViewParams):
            raise TypeError(f"params: expected ViewParams, got {type(params).__name__}")
        if generator is not None or ids is not None:
            given = "ids" if generator is None else "generator"
            raise ValueError(f"{given}: expected None with params given, which leaves nothing to draw")
        params.check(specs, source.sizes)
    else:
        device_for(device, generator)
        if generator is not None and generator.device.index not in (None, device.index):
            raise ValueError(f"generator: expected one on {device}, got one on {generator.device}")
        seed = _number(device, generator)
        if ids is None:
            ids = torch.arange(batch, device=device)
        check_tensor("ids", ids, (torch.int64,), (batch,), source.data)
        params = draw(specs, source.sizes, seed, ids)
    views = [_view(spec) for spec in specs]
    backend, table = _backend.resolve("augment_views", device, dtype), params.table.detach().contiguous()
    if backend == "reference" and not traced():
        made = reference(source, table, views, dtype)
    else:  # tracing has the reference inside the op too, since it reads numbers
        made = _op(
            source.data, source.offsets, source.sizes, table, list(source.layout),
            [x for v in views for x in v[:5]], [x for v in views for x in (*v.scale, *v.shift)],
            dtype, backend,
        )  # fmt: skip
    return (made, params) if return_params else made
