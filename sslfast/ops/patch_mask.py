"""random_patch_mask: which patches of each image a masked method removes.

A mask, here and in block_mask.py, is a fixed function of random numbers that are drawn on the device at
first, so that every backend makes the same mask of them, a generator's state decides it, and the host reads
nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sslfast import _C
from sslfast.kernels import tuning
from sslfast.ops import _backend
from sslfast.ops._check import FLOATS, check_integer, check_tensor, may_read, number
from sslfast.ops._library import define


class PatchMask(NamedTuple):
    """Masks of B images of L patches, as MAE has them."""

    ids_keep: Tensor
    """int64 [B, Lk]: the kept patches, in random order"""
    ids_restore: Tensor
    """int64 [B, L]: the place of each patch in that order; below Lk: kept"""
    mask: Tensor
    """float32 [B, L]: 1 = removed"""

    @classmethod
    def from_mask(cls, mask: Tensor, num_masked: int) -> "PatchMask":
        """The ids of a mask [B, L] that has `num_masked` ones and otherwise zeros in every row.

        For masks of blocks, or of any other kind; patches keep their order. `from_mask(1 - mask, ...)` has
        the masked patches as its ids_keep.

        Raises:
            TypeError, ValueError: num_masked is not within [0, L], or on the CPU not every row's sum.
        """
        check_tensor("mask", mask, FLOATS, (None, None))
        check_integer("num_masked", num_masked, 0)
        batch, length = mask.shape
        if num_masked > length:
            raise ValueError(
                f"num_masked: expected at most {length}, the number of patches, got {num_masked}"
            )
        if may_read(mask):
            ones = mask == 1
            if not bool((ones | (mask == 0)).all()) or not bool((ones.sum(1) == num_masked).all()):
                raise ValueError(f"mask: expected {num_masked} ones and otherwise zeros in every row")
        return _masked(mask.detach(), length - num_masked)


def reference(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch: specification, test truth and benchmark baseline."""
    order = _order(noise)
    restore = order.argsort(dim=1)
    return order[:, :keep].contiguous(), restore, (restore >= keep).float()


def _order(noise: Tensor) -> Tensor:
    """With every NaN last: on a GPU torch.sort has those with a sign first."""
    return torch.where(noise.isnan(), torch.nan, noise).argsort(dim=1, stable=True)


# Backends


def _cpu_random(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    if noise.element_size() == 2:
        noise = noise.float()
    noise = noise.contiguous()
    batch, length = noise.shape
    ids, restore, mask = _empty_random(noise, keep)
    _C.random_patch_mask(
        batch, length, keep, _backend.pointer("noise", noise, noise.dtype, (batch, length), noise.device),
        noise.dtype == torch.float64, ids.data_ptr(), restore.data_ptr(), mask.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return ids, restore, mask


def _empty_random(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, length = noise.shape
    return (
        noise.new_empty(batch, keep, dtype=torch.int64),
        noise.new_empty(batch, length, dtype=torch.int64),
        noise.new_empty(batch, length, dtype=torch.float32),
    )


def _sorted(noise: Tensor) -> tuple[Tensor, bool]:
    """What the GPU kernels sort themselves, as float32 they have room for; otherwise the sorted order."""
    noise = noise.float() if noise.element_size() == 2 else noise
    if noise.dtype == torch.float64 or noise.shape[1] > tuning.MASK_SORT:
        return _order(noise), True
    return noise.contiguous(), False


def _triton_random(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    from sslfast.kernels import patch_mask

    outputs = _empty_random(noise, keep)
    if noise.numel():
        with _backend.device_of(noise):
            patch_mask.launch_random(*_sorted(noise), keep, *outputs)
    return outputs


def _cuda_random(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, length = noise.shape
    ids, restore, mask = outputs = _empty_random(noise, keep)
    if noise.numel():
        with _backend.device_of(noise):
            given, is_order = _sorted(noise)
            _C.random_patch_mask_cuda(
                batch, length, keep,
                _backend.pointer("noise", given, given.dtype, (batch, length), noise.device), is_order,
                ids.data_ptr(), restore.data_ptr(), mask.data_ptr(),
                torch.cuda.current_stream(noise.device).cuda_stream,
            )  # fmt: skip
    return outputs


def triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return _backend.triton_refuses(device)


def cuda_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return _backend.cuda_refuses(device, "random_patch_mask_cuda")


for _name, _random, _refuses in (
    ("cpu", _cpu_random, _backend.cpu_refuses),
    ("triton", _triton_random, triton_refuses),
    ("cuda", _cuda_random, cuda_refuses),
):
    _backend.register("random_patch_mask", _name, _backend.Backend(_random, None, _refuses))


_random_op = define(
    "random_patch_mask(Tensor noise, SymInt keep, str backend) -> (Tensor, Tensor, Tensor)",
    lambda noise, keep, backend: _backend.implementation("random_patch_mask", backend).forward(noise, keep),
    lambda noise, keep, backend: _empty_random(noise, keep),
)
# Public functions


def _masked(noise: Tensor, keep: int) -> PatchMask:
    backend = _backend.resolve("random_patch_mask", noise.device, noise.dtype)
    if backend == "reference":
        return PatchMask(*reference(noise, keep))
    return PatchMask(*_random_op(noise, keep, backend))


def uniform(
    *shape: int, dtype: torch.dtype, device: torch.device | None, generator: torch.Generator | None
) -> Tensor:
    if generator is None:  # torch.compile traces no call with one
        return torch.rand(*shape, dtype=dtype, device=device)
    return torch.rand(*shape, dtype=dtype, device=device, generator=generator)


def device_for(device: torch.device | str | None, generator: torch.Generator | None) -> torch.device | None:
    """None: torch's default."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if device is None:
        return None if generator is None else generator.device
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: {error}") from None
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator: expected one on {device}, got one on {generator.device}")
    return device


def random_patch_mask(
    batch: int,
    num_patches: int,
    mask_ratio: float,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> PatchMask:
    """For each image a random subset of the patches to keep, as MAE draws it (He et al. 2022).

    The patches with the smallest noise are kept, in its order (stable where numbers are equal), as two
    argsorts would have it. The host reads nothing. `PatchMask.from_mask` makes the same of a given mask.

    Args:
        batch: B images.
        num_patches: L of each.
        mask_ratio: in [0, 1]; int(L * (1 - mask_ratio)) patches are kept, which may be none.
        device: of the mask; by default the generator's, or else torch's default device.
        generator: draws the noise; by default the device's own.
        noise: [B, L] of any floating dtype, instead of drawing it; on its device.

    Returns:
        PatchMask(ids_keep int64 [B, Lk], ids_restore int64 [B, L], mask float32 [B, L] with 1 = removed).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or value; the message names it.
    """
    check_integer("batch", batch, 0)
    check_integer("num_patches", num_patches, 1)
    if not 0 <= number("mask_ratio", mask_ratio) <= 1:
        raise ValueError(f"mask_ratio: expected a number in [0, 1], got {mask_ratio}")
    keep = int(num_patches * (1 - mask_ratio))
    if noise is None:
        device = device_for(device, generator)
        noise = uniform(batch, num_patches, dtype=torch.float32, device=device, generator=generator)
        return _masked(noise, keep)
    check_tensor("noise", noise, FLOATS, (batch, num_patches))
    if generator is not None:
        raise ValueError("generator: expected None with noise given, which leaves nothing to draw")
    wanted = device_for(device, None)
    if wanted is not None and wanted.type != noise.device.type:
        raise ValueError(f"noise: expected device {device}, got {noise.device}")
    return _masked(noise.detach(), keep)
