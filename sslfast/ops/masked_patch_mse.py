"""masked_patch_mse: MAE's loss straight from images, without the patchified target.

    t_l = the pixels of patch l in (row, column, channel) order, with norm_pix (t - mean) / sqrt(var + 1e-6)
    loss = sum_l w_l mean_k e(pred_lk - t_lk) / sum_l w_l,  e(d) = d^2 (or |d|),  w the mask
    dpred_lk = w_l / sum(w) / K e'(pred_lk - t_lk), left by the forward pass where pred needs a gradient

A float16 dpred could not hold such small numbers before an upstream gradient (a loss scale) makes them
larger, so for float16 the backward pass computes it, with the upstream gradient in it.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sslfast import _C
from sslfast.ops import _backend
from sslfast.ops._check import FLOATS, check_tensor, may_read, number, traced, working_dtype
from sslfast.ops._library import define, once_differentiable
from sslfast.ops.embed_visible_patches import patches_in

EPS = 1e-6  # of norm_pix, as MAE has it
MASKS = (*FLOATS, torch.bool, torch.uint8, torch.int32, torch.int64)


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, L, p p C] in MAE's order: row, column, channel within a patch."""
    batch, channels, height, width = images.shape
    down, across = height // patch, width // patch
    cut = images.reshape(batch, channels, down, patch, across, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, down * across, patch * patch * channels)


def unpatchify(patches: Tensor, patch: int, shape: tuple[int, int, int]) -> Tensor:
    """[B, L, p p C] -> [B, C, H, W], the inverse of `patchify`; shape is (C, H, W)."""
    channels, height, width = shape
    down, across = height // patch, width // patch
    cut = patches.reshape(len(patches), down, across, patch, patch, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), channels, height, width)


def reference(
    pred: Tensor,
    images: Tensor,
    weight: Tensor,
    patch: int,
    norm_pix: bool,
    scale: Tensor | None,
    shift: Tensor | None,
    absolute: bool = False,
) -> Tensor:
    """Plain PyTorch: specification, test truth and benchmark baseline. scale and shift [C]; weight [B, L]."""
    work = working_dtype(pred)
    images = images.to(work)
    if scale is not None and shift is not None:
        images = images * scale.to(work)[:, None, None] + shift.to(work)[:, None, None]
    target = patchify(images, patch)
    if norm_pix:
        mean, var = target.mean(2, keepdim=True), target.var(2, keepdim=True)
        target = (target - mean) / (var + EPS).sqrt()
    weight = weight.to(work)
    total = weight.sum()
    difference = torch.where(weight[..., None] != 0, pred.to(work) - target, 0.0)  # NaN does not count there
    error = (difference.abs() if absolute else difference**2).mean(2)
    return torch.where(total == 0, 0.0, (error * weight).sum() / torch.where(total == 0, 1.0, total))


# Backends: (loss, dpred times upstream, or an empty tensor)


def _cpu_forward(pred, images, weight, patch, norm_pix, scale, shift, absolute, needed, upstream):
    (batch, channels, height, width), device = images.shape, images.device
    length, dim = pred.shape[1:]
    work = working_dtype(pred)
    at, strides = _backend.strided("images", images, images.dtype, (batch, channels, height, width), device)
    pred_at, pred_strides = _backend.strided("pred", pred, pred.dtype, (batch, length, dim), device)
    dpred = pred.new_empty(pred.shape if needed else 0)
    loss = _C.masked_patch_mse(
        (batch, channels, height, width, patch), at, strides, _backend.CODES.get(images.dtype, -1),
        [1.0] * channels if scale is None else scale.tolist(),
        [0.0] * channels if shift is None else shift.tolist(),
        (pred_at, *pred_strides[:2]), _backend.CODES[pred.dtype],
        _backend.pointer("mask", weight, work, (batch, length), device), norm_pix, absolute,
        dpred.data_ptr() if needed else 0, 1.0 if upstream is None else float(upstream),
        torch.get_num_threads(),
    )  # fmt: skip
    return torch.tensor(loss, dtype=work, device=device), dpred


def _triton_forward(pred, images, weight, patch, norm_pix, scale, shift, absolute, needed, upstream):
    from sslfast.kernels import masked_patch_mse

    dpred = pred.new_empty(pred.shape if needed else 0)
    if not pred.numel():
        return pred.new_zeros((), dtype=working_dtype(pred)), dpred
    with _backend.device_of(pred):
        loss = masked_patch_mse.forward(
            pred, images, weight, patch, norm_pix, scale, shift, absolute, dpred if needed else None, upstream
        )
    return loss, dpred


def _cpu_scale(dpred: Tensor, upstream: Tensor) -> Tensor:
    return dpred if upstream == 1 else dpred.mul_(upstream)


def _triton_scale(dpred: Tensor, upstream: Tensor) -> Tensor:
    from sslfast.kernels import masked_patch_mse

    with _backend.device_of(dpred):
        masked_patch_mse.scale_(dpred, upstream)
    return dpred


def _triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return _backend.triton_refuses(device)


_backend.register("masked_patch_mse", "cpu", _backend.Backend(_cpu_forward, None, _backend.cpu_refuses))
_backend.register("masked_patch_mse", "triton", _backend.Backend(_triton_forward, None, _triton_refuses))
_SCALE = {"cpu": _cpu_scale, "triton": _triton_scale}

_fwd = define(
    "masked_patch_mse(Tensor pred, Tensor images, Tensor weight, SymInt patch, bool norm_pix, Tensor? scale, "
    "Tensor? shift, bool absolute, bool needed, Tensor? upstream, str backend) -> (Tensor, Tensor)",
    lambda *args: _backend.implementation("masked_patch_mse", args[-1]).forward(*args[:-1]),
    lambda pred, images, weight, patch, norm_pix, scale, shift, absolute, needed, upstream, backend: (
        pred.new_empty((), dtype=working_dtype(pred)),
        pred.new_empty(pred.shape if needed else 0),
    ),
)


def _kept_for_another_backward() -> bool:
    """Whether the graph that is running backward now stays (retain_graph), so that it may run again."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is None or keeps()


class _MaskedPatchMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, images, weight, patch, norm_pix, scale, shift, absolute, needed, backend, cause):
        later = pred.dtype == torch.float16
        needed = needed and not later
        options = patch, norm_pix, scale, shift, absolute
        loss, dpred = _fwd(pred, images, weight, *options, needed, None, backend)
        ctx.save_for_backward(*((pred, images, weight) if later else (dpred, cause)))
        ctx.options, ctx.backend = options, backend
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if len(ctx.saved_tensors) == 3:
            _, dpred = _fwd(*ctx.saved_tensors, *ctx.options, True, upstream, ctx.backend)
            return dpred, *(None,) * 10
        dpred, _ = ctx.saved_tensors
        if traced() or _kept_for_another_backward():
            dpred = (dpred * upstream).to(dpred.dtype)
        elif dpred.numel():
            dpred = _SCALE[ctx.backend](dpred, upstream)
        return dpred, *(None,) * 10


def statistics(
    images: Tensor,
    mean: Sequence[float] | Tensor | None,
    std: Sequence[float] | Tensor | None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor | None, Tensor | None]:
    """(scale, shift), each [C], by which a pixel becomes (pixel - mean) / std; uint8 ones are of 255."""
    if (mean is None) != (std is None):
        raise ValueError(f"{'std' if std is None else 'mean'}: expected both mean and std, or neither")
    full = 255.0 if images.dtype == torch.uint8 else 1.0
    if mean is None or std is None:
        if images.dtype == torch.uint8:
            raise ValueError("mean: expected mean and std for uint8 images, got None")
        return None, None
    mean, std = (_per_channel(name, x, images) for name, x in (("mean", mean), ("std", std)))
    if isinstance(mean, tuple) and isinstance(std, tuple):
        scale = tuple(1 / (full * s) for s in std)
        shift = tuple(-m / s for m, s in zip(mean, std, strict=True))
        make = _constant.__wrapped__ if traced() else _constant
        return make(scale, dtype, images.device), make(shift, dtype, images.device)
    m, s = (torch.as_tensor(x, dtype=torch.float64, device=images.device) for x in (mean, std))
    return (1 / (full * s)).to(dtype), (-m / s).to(dtype)


def _per_channel(name: str, given: Sequence[float] | Tensor, images: Tensor) -> Tensor | tuple[float, ...]:
    channels = images.shape[1]
    if isinstance(given, Tensor):
        given = given.flatten() if given.numel() == channels else given
        check_tensor(name, given, FLOATS, (channels,), images)
        if may_read(given):
            _per_channel(name, given.tolist(), images)
        return given.detach()
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != channels:
        raise ValueError(f"{name}: expected {channels} numbers, one per channel, got {given!r}")
    values = tuple(float(number(name, x)) for x in given)
    if name == "std" and not all(values):
        raise ValueError(f"std: expected numbers other than 0, got {given!r}")
    return values


@functools.lru_cache(64)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied to the device once: a copy in every call would have the host wait for it."""
    return torch.tensor(values, dtype=dtype, device=device)


def masked_patch_mse(
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    *,
    patch_size: int,
    norm_pix: bool = False,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Mean squared error between predicted and true pixels of the masked patches (MAE, He et al. 2022).

    The target is read from the images patch by patch and never stored; the gradient is made in the same pass.

    Args:
        pred: [B, L, p p C] in MAE's order (row, column, channel), any floating dtype and batch and row
            strides.
        images: [B, C, H, W], L = H W / p^2, of any floating dtype, or uint8, which count as 0 to 1; any
            strides.
        mask: [B, L], 1 = masked, 0 = not; of any dtype. Other numbers weight their patches. What is not
            masked is neither read nor counted.
        patch_size: p in pixels; divides H and W.
        norm_pix: normalise each patch of the images by its own mean and (unbiased) variance, with eps 1e-6.
        mean, std: of each channel, C numbers or [C]: images are (pixel - mean) / std. Needed for uint8.

    Returns:
        The sum over patches of mask * mean squared error, divided by the mask's sum; 0 where that is 0.
        float32, or float64 for float64 pred. Differentiable in pred, once.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, or a patch that
            does not divide the image; the message names it.
    """
    return _error(pred, images, mask, patch_size, norm_pix, mean, std, absolute=False)


def masked_patch_l1(
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    *,
    patch_size: int,
    norm_pix: bool = False,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Mean absolute error of the masked patches (SimMIM, Xie et al. 2022); all else as `masked_patch_mse`."""
    return _error(pred, images, mask, patch_size, norm_pix, mean, std, absolute=True)


def _error(pred, images, mask, patch_size, norm_pix, mean, std, absolute):
    check_tensor("images", images, (*FLOATS, torch.uint8), (None, None, None, None))
    batch, channels, *_ = images.shape
    length, dim = patches_in(images, patch_size), patch_size**2 * channels
    check_tensor("pred", pred, FLOATS, (batch, length, dim), images)
    check_tensor("mask", mask, MASKS, (batch, length), images)
    if norm_pix and dim < 2:
        raise ValueError("norm_pix: expected patches of two numbers or more, whose variance it divides by")
    scale, shift = statistics(images, mean, std, working_dtype(pred))
    weight = mask.detach().to(working_dtype(pred)).contiguous()
    images = images.detach()
    backend = _backend.resolve("masked_patch_mse", pred.device, pred.dtype)
    if backend == "reference":
        return reference(pred, images, weight, patch_size, bool(norm_pix), scale, shift, absolute)
    pred = pred if pred.stride(2) == 1 else pred.contiguous()
    needed = pred.requires_grad and torch.is_grad_enabled()
    # Of no numbers and no memory: what a second derivative is asked by, so that it raises.
    cause = pred[:0].clone() if needed else None
    return _MaskedPatchMSE.apply(
        pred, images, weight, patch_size, bool(norm_pix), scale, shift, absolute, needed, backend, cause
    )
