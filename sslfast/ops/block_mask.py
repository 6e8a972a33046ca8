"""block_patch_mask: random rectangular blocks of patches to remove, for a whole batch on the device."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sslfast import _C
from sslfast.ops import _backend
from sslfast.ops._check import check_integer, check_tensor, may_read, number
from sslfast.ops._library import define
from sslfast.ops.patch_mask import cuda_refuses, device_for, triton_refuses, uniform

TRIES = 64  # blocks drawn for an image; BEiT gives up after ten in a row that do not fit
MOST_PATCHES = 1 << 20  # of a grid


class BlockRule(NamedTuple):
    """Where the blocks of a mask are drawn from, in patches."""

    height: int
    width: int
    least: float
    """area of a block"""
    most: float

    @property
    def areas(self) -> tuple[int, int]:
        """The whole numbers in that range, which a product like 0.1 * 40 may miss by its rounding."""
        return math.ceil(self.least - 1e-6), math.floor(self.most + 1e-6)


def block_reference(draws: Tensor, noise: Tensor, counts: Tensor | None, rule: BlockRule) -> Tensor:
    """Plain PyTorch, all images at a time: specification, test truth and benchmark baseline.

    draws [B, T, 4] float64: of each block uniform numbers in [0, 1) for area, top and left, and, in column 1,
    the root of the aspect ratio. noise [B, H * W]. counts [B]: how many patches to mask; None: one block.
    """
    height, width, least, most = rule
    batch, tries, _ = draws.shape
    mask = noise.new_zeros(batch, height, width, dtype=torch.bool)
    y = torch.arange(height, device=noise.device)[:, None]
    x = torch.arange(width, device=noise.device)
    if counts is None:
        left = torch.ones(batch, dtype=torch.int64, device=noise.device)  # blocks
    else:
        left = counts.clamp(0, height * width)  # patches
    for t in range(tries):
        area, root, u, v = draws[:, t].unbind(1)
        high = torch.full_like(area, most) if counts is None else left.double().clamp(max=most)
        side = (least + area * (high - least)).sqrt()
        h, w = (torch.floor(s + 0.5) for s in (side * root, side / root))
        if counts is None and t == tries - 1:
            h, w = h.clamp(1, height), w.clamp(1, width)
        top, across = torch.floor(u * (height - h + 1)), torch.floor(v * (width - w + 1))
        good = (h > 0) & (w > 0) & (h <= height) & (w <= width)
        h, w, top, across = (s[:, None, None] for s in (h, w, top, across))
        block = (y >= top) & (y < top + h) & (x >= across) & (x < across + w)
        more = (block & ~mask).sum((1, 2))
        if counts is None:
            size = (h * w).flatten()
            fits = (size >= rule.areas[0]) & (size <= rule.areas[1])
            good, more = good & (fits | (t == tries - 1)), torch.ones_like(more)
        good = good & (more > 0) & (more <= left)
        mask = mask | (block & good[:, None, None])
        left = left - more * good
    mask = mask.flatten(1)
    if counts is not None:
        rank = noise.masked_fill(mask, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
        mask = mask | (rank < left[:, None])
    return mask.float()


# Backends


def _block_arguments(
    draws: Tensor, noise: Tensor, counts: Tensor | None, rule: BlockRule, mask: Tensor
) -> tuple:
    batch, tries, _ = draws.shape
    height, width, least, most = rule
    sizes = (height, width, *rule.areas)
    return (
        batch, tries, sizes, least, most,
        _backend.pointer("draws", draws, torch.float64, (batch, tries, 4), draws.device),
        _backend.pointer("noise", noise, torch.float32, (batch, height * width), draws.device),
        _backend.pointer("counts", counts, torch.int64, (batch,), draws.device), mask.data_ptr(),
    )  # fmt: skip


def _cpu_block(draws: Tensor, noise: Tensor, counts: Tensor | None, rule: BlockRule) -> Tensor:
    mask = torch.empty_like(noise)
    _C.block_patch_mask(*_block_arguments(draws, noise, counts, rule, mask), torch.get_num_threads())
    return mask


def _triton_block(draws: Tensor, noise: Tensor, counts: Tensor | None, rule: BlockRule) -> Tensor:
    from sslfast.kernels import patch_mask

    mask = torch.empty_like(noise)
    if len(mask):
        with _backend.device_of(noise):
            height, width, least, most = rule
            patch_mask.launch_block(draws, noise, counts, (height, width, *rule.areas), least, most, mask)
    return mask


def _cuda_block(draws: Tensor, noise: Tensor, counts: Tensor | None, rule: BlockRule) -> Tensor:
    mask = torch.empty_like(noise)
    with _backend.device_of(noise):
        _C.block_patch_mask_cuda(
            *_block_arguments(draws, noise, counts, rule, mask),
            torch.cuda.current_stream(noise.device).cuda_stream,
        )
    return mask


for _name, _block, _refuses in (
    ("cpu", _cpu_block, _backend.cpu_refuses),
    ("triton", _triton_block, triton_refuses),
    ("cuda", _cuda_block, cuda_refuses),
):
    _backend.register("block_patch_mask", _name, _backend.Backend(_block, None, _refuses))


_block_op = define(
    "block_patch_mask(Tensor draws, Tensor noise, Tensor? counts, int height, int width, float least, "
    "float most, str backend) -> Tensor",
    lambda draws, noise, counts, height, width, least, most, backend: _backend.implementation(
        "block_patch_mask", backend
    ).forward(draws, noise, counts, BlockRule(height, width, least, most)),
    lambda draws, noise, *_: torch.empty_like(noise),
)


# Public function


def _range(name: str, given: Sequence[float]) -> tuple[float, float]:
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != 2:
        raise TypeError(f"{name}: expected two numbers (lowest, highest), got {given!r}")
    low, high = (float(number(name, x)) for x in given)
    if not low <= high:
        raise ValueError(f"{name}: expected the lowest number first, got {given!r}")
    return low, high


def block_patch_mask(
    batch: int,
    grid: tuple[int, int],
    *,
    ratio_range: tuple[float, float],
    aspect_range: tuple[float, float],
    num_masked: int | Tensor | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """For each image a mask of random rectangular blocks, drawn for the whole batch on the device.

    With num_masked blocks are added, none larger than what is still to be masked, until exactly so many
    patches are masked (BEiT, Bao et al. 2022; iBOT; DINOv2); should 64 blocks not do it, single patches in
    random places are added. Without it each mask is one block (I-JEPA, Assran et al. 2023). The area of a
    block is uniform, its aspect ratio log-uniform.

        BEiT:    ratio_range=(16 / 196, 75 / 196), aspect_range=(0.3, 1 / 0.3), num_masked=75
        DINOv2:  ratio_range=(4 / 256, 0.5), aspect_range=(0.3, 1 / 0.3), num_masked=[B], half of it zeros
        I-JEPA:  ratio_range=(0.15, 0.2), aspect_range=(0.75, 1.5)

    Args:
        batch: B images.
        grid: patches per column and row, (H, W).
        ratio_range: smallest and largest share of the patches that one block covers, in [0, 1].
        aspect_range: smallest and largest height / width of a block, positive.
        num_masked: patches to mask in each image, an integer or int64 [B] on the device; None: one block,
            whose area is in the range wherever a rectangle of an allowed shape has such an area.
        device: of the mask; by default that of num_masked, the generator's, or torch's default device.
        generator: draws the blocks; by default the device's own.

    Returns:
        float32 [B, H * W], 1 = masked.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or value; the message names it.
    """
    check_integer("batch", batch, 0)
    if not isinstance(grid, Sequence) or len(grid) != 2:
        raise TypeError(f"grid: expected (H, W), got {grid!r}")
    height, width = grid
    for size in grid:
        check_integer("grid", size, 1)
    length = height * width
    if length > MOST_PATCHES:
        raise ValueError(f"grid: expected at most {MOST_PATCHES} patches, got {length}")
    low, high = _range("ratio_range", ratio_range)
    if low < 0 or high > 1:
        raise ValueError(f"ratio_range: expected numbers in [0, 1], got {ratio_range!r}")
    flat, tall = _range("aspect_range", aspect_range)
    if not 1e-6 <= flat <= tall <= 1e6:
        raise ValueError(f"aspect_range: expected numbers between 1e-6 and 1e6, got {aspect_range!r}")
    if isinstance(num_masked, Tensor) and device is None and generator is None:
        device = num_masked.device
    device = device_for(device, generator)
    counts = _counts(num_masked, batch, length, device)
    draws = uniform(batch, TRIES, 4, dtype=torch.float64, device=device, generator=generator)
    draws[:, :, 1].mul_(0.5 * math.log(tall / flat)).add_(0.5 * math.log(flat)).exp_()
    noise = uniform(batch, length, dtype=torch.float32, device=device, generator=generator)
    return blocks(draws, noise, counts, BlockRule(height, width, low * length, high * length))


def _counts(
    num_masked: int | Tensor | None, batch: int, length: int, device: torch.device | None
) -> Tensor | None:
    if num_masked is None:
        return None
    if not isinstance(num_masked, Tensor):
        check_integer("num_masked", num_masked, 0)
        if num_masked > length:
            raise ValueError(
                f"num_masked: expected at most {length}, the number of patches, got {num_masked}"
            )
        return torch.full((batch,), num_masked, dtype=torch.int64, device=device)
    check_tensor("num_masked", num_masked, (torch.int64,), (batch,))
    if device is not None and num_masked.device.type != device.type:
        raise ValueError(f"num_masked: expected device {device}, got {num_masked.device}")
    if may_read(num_masked) and bool(((num_masked < 0) | (num_masked > length)).any()):
        raise ValueError(f"num_masked: expected numbers in [0, {length}]")
    return num_masked.contiguous()


def blocks(draws: Tensor, noise: Tensor, counts: Tensor | None, rule: BlockRule) -> Tensor:
    backend = _backend.resolve("block_patch_mask", noise.device, noise.dtype)
    if backend == "reference":
        return block_reference(draws, noise, counts, rule)
    return _block_op(draws, noise, counts, *rule, backend)
