"""What benchmarks/augment.py times beside sslfast: kornia's modules for a batch on the device, and Pillow an
image at a time, in threads or in processes as a DataLoader has them. Both do what a ViewSpec with a crop and
without an affine map says."""

import math
import multiprocessing
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import torch
import torch.multiprocessing  # tensors of processes go through shared memory
from torch import Tensor, nn

from sslfast import PackedImages, ViewSpec

try:
    import kornia.augmentation as K
except ImportError:
    K = None  # type: ignore[assignment]
try:
    from PIL import Image, ImageEnhance, ImageFilter, ImageOps
except ImportError:
    Image = None  # type: ignore[assignment]

KORNIA_CROPS = ("slice", "resample")  # one image after the other, or all by one warp; neither antialiases

# kornia


def kornia_view(spec: ViewSpec, crop: str) -> nn.Module:
    """[B, 3, H, W] in [0, 1] -> [B, 3, h, w]"""
    steps: list[nn.Module] = [
        K.RandomResizedCrop(
            spec.size,  # type: ignore[arg-type]
            spec.crop_scale,  # type: ignore[arg-type]
            spec.crop_ratio,
            resample=spec.interpolation,
            cropping_mode=crop,
        )
    ]
    if spec.flip_prob:
        steps.append(K.RandomHorizontalFlip(p=spec.flip_prob))
    colours: list[nn.Module] = []
    if any(spec.jitter):
        colours.append(K.ColorJitter(*spec.jitter, p=spec.jitter_prob))
    if spec.gray_prob:
        colours.append(K.RandomGrayscale(p=spec.gray_prob))
    steps += reversed(colours) if spec.gray_first else colours
    if spec.blur_prob:
        steps.append(K.RandomGaussianBlur((spec.blur_kernel,) * 2, spec.blur_sigma, p=spec.blur_prob))
    if spec.solarize_prob:
        steps.append(K.RandomSolarize((spec.solarize_threshold,) * 2, (0.0, 0.0), p=spec.solarize_prob))
    if spec.mean and spec.std:
        steps.append(K.Normalize(spec.mean, spec.std))
    return nn.Sequential(*steps)


def kornia_views(
    specs: Sequence[ViewSpec], crop: str, dtype: torch.dtype, device: str
) -> Callable[[Tensor], list[Tensor]]:
    """A function of float images [B, 3, H, W]; views of the same spec are made at once."""
    kinds = [(spec, kornia_view(spec, crop).to(device)) for spec in dict.fromkeys(specs)]

    @torch.no_grad()
    def views(images: Tensor) -> list[Tensor]:
        made = {}
        for spec, module in kinds:
            copies = specs.count(spec)
            whole = module(images.repeat(copies, 1, 1, 1) if copies > 1 else images).to(dtype)
            made[spec] = list(whole.chunk(copies))
        return [made[spec].pop() for spec in specs]

    return views


# Pillow: the steps as torchvision's transforms have them for its images.


def crop_box(width: int, height: int, spec: ViewSpec) -> tuple[int, int, int, int]:
    """Left, top, right and bottom, as RandomResizedCrop.get_params."""
    low, high = math.log(spec.crop_ratio[0]), math.log(spec.crop_ratio[1])
    for _ in range(10):
        area = width * height * random.uniform(*spec.crop_scale)  # type: ignore[misc]
        ratio = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = width, height
    if width < height * spec.crop_ratio[0]:
        h = round(width / spec.crop_ratio[0])
    elif width > height * spec.crop_ratio[1]:
        w = round(height * spec.crop_ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def jittered(image, strengths: tuple[float, float, float, float]):
    for step in random.sample(range(4), 4):
        strength = strengths[step]
        if not strength:
            continue
        if step == 3:
            hue, saturation, value = image.convert("HSV").split()
            shift = int(random.uniform(-strength, strength) * 255)
            hue = hue.point([(x + shift) & 255 for x in range(256)])
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        else:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step]
            image = enhance(image).enhance(random.uniform(max(0.0, 1 - strength), 1 + strength))
    return image


def grayscale(image, spec: ViewSpec):
    return image.convert("L").convert("RGB") if random.random() < spec.gray_prob else image


def pillow_view(image, spec: ViewSpec, scale: np.ndarray, shift: np.ndarray) -> Tensor:
    """float32 [3, h, w]; scale and shift [3, 1, 1] are of bytes."""
    height, width = spec.size  # type: ignore[misc]
    filter_ = Image.Resampling.BICUBIC if spec.interpolation == "bicubic" else Image.Resampling.BILINEAR
    box = crop_box(image.width, image.height, spec)
    image = image.resize((width, height), filter_, box=box)
    if random.random() < spec.flip_prob:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if spec.gray_first:
        image = grayscale(image, spec)
    if any(spec.jitter) and random.random() < spec.jitter_prob:
        image = jittered(image, spec.jitter)
    if not spec.gray_first:
        image = grayscale(image, spec)
    if random.random() < spec.blur_prob:
        image = image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*spec.blur_sigma)))
    if random.random() < spec.solarize_prob:
        image = ImageOps.solarize(image, round(255 * spec.solarize_threshold))
    # numpy's, since torch's arithmetic would start threads in each thread
    x = np.multiply(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)), scale)
    x += shift
    return torch.from_numpy(x)


def pillow_views(images: PackedImages, specs: Sequence[ViewSpec], rows: range, shared: bool) -> list[Tensor]:
    """For each spec [len(rows), 3, h, w]; shared: where another process can read it."""
    numbers = []
    for spec in specs:
        mean, std = (
            np.array(x, np.float32).reshape(3, 1, 1) for x in (spec.mean or [0] * 3, spec.std or [1] * 3)
        )
        numbers.append((spec, 1 / (255 * std), -mean / std))
    data, made = images.data.numpy(), [[] for _ in specs]  # type: ignore[var-annotated]
    offsets, sizes = images.offsets.tolist(), images.sizes.tolist()
    for row in rows:
        height, width = sizes[row]
        pixels = data[offsets[row] : offsets[row] + height * width * 3].reshape(height, width, 3)
        image = Image.fromarray(pixels)
        for out, (spec, scale, shift) in zip(made, numbers, strict=True):
            out.append(pillow_view(image, spec, scale, shift))
    return [stacked(out, shared) for out in made]


def stacked(views: list[Tensor], shared: bool) -> Tensor:
    """As DataLoader's default_collate: straight into shared memory."""
    if not shared:
        return torch.stack(views)
    storage = views[0]._typed_storage()._new_shared(len(views) * views[0].numel(), device=views[0].device)
    out = views[0].new(storage).resize_(len(views), *views[0].shape)
    return torch.stack(views, out=out)


_sets: list[PackedImages] = []  # of this worker
_specs: list[ViewSpec] = []


def _start(sets: list[PackedImages], specs: list[ViewSpec]) -> None:
    torch.set_num_threads(1)  # as a DataLoader's worker
    random.seed()
    _sets[:], _specs[:] = sets, specs


def _of_worker(which: int, rows: range) -> list[Tensor]:
    return pillow_views(_sets[which], _specs, rows, shared=True)


class PillowPool:
    """Workers that live as long as this and have the images, as a DataLoader's have the data set. Each makes
    its share of a batch; the shares are not put together, since a DataLoader's workers make whole batches."""

    def __init__(
        self, sets: list[PackedImages], specs: list[ViewSpec], workers: int, processes: bool
    ) -> None:
        self.sets, self.specs, self.workers, self.processes = sets, specs, workers, processes
        self.pool: Executor = ThreadPoolExecutor(workers)
        if processes:
            self.pool = ProcessPoolExecutor(
                workers, multiprocessing.get_context("fork"), initializer=_start, initargs=(sets, specs)
            )

    def __call__(self, which: int) -> list[list[Tensor]]:
        """For each spec the shares of its view."""
        batch = len(self.sets[which])
        ends = [batch * i // self.workers for i in range(self.workers + 1)]
        jobs = [
            self.pool.submit(_of_worker, which, range(begin, end))
            if self.processes
            else self.pool.submit(pillow_views, self.sets[which], self.specs, range(begin, end), False)
            for begin, end in zip(ends, ends[1:], strict=False)
        ]
        return [list(shares) for shares in zip(*(job.result() for job in jobs), strict=True)]

    def close(self) -> None:
        self.pool.shutdown()
