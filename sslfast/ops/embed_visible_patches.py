"""embed_visible_patches: the patch embedding of a ViT for the kept patches alone.

    out[b, i] = W x[b, ids[b, i]] + bias + pos[ids[b, i]],  x[b, l] the pixels of patch l

The kept patches are cut out of the image and multiplied as one matrix; the backward pass cuts them out again
instead of keeping them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sslfast import _C
from sslfast.ops import _backend
from sslfast.ops._check import FLOATS, autocast, check_ids, check_integer, check_tensor, working_dtype
from sslfast.ops._library import define, once_differentiable
from sslfast.ops.patches import check_pos, gather_reference, put, take


def reference(
    images: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos: Tensor | None = None,
    *,
    patch_size: int,
) -> Tensor:
    """Plain PyTorch: specification, test truth and benchmark baseline."""
    weight = weight.view(weight.shape[0], images.shape[1], patch_size, patch_size)
    tokens = F.conv2d(images, weight, bias, stride=patch_size).flatten(2).transpose(1, 2)
    return gather_reference(tokens, ids, pos)


def _cpu_cut(images: Tensor, ids: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    batch, channels, height, width = shape = tuple(images.shape)
    count, device = ids.shape[1], images.device
    at, strides = _backend.strided("images", images, images.dtype, shape, device)
    cols = images.new_empty(batch, count, channels * patch * patch, dtype=dtype)
    _C.cut_patches(
        (batch, channels, height, width, patch, count), at, strides, _backend.CODES[images.dtype],
        _backend.pointer("ids", ids, torch.int64, (batch, count), device), cols.data_ptr(),
        _backend.CODES[dtype], torch.get_num_threads(),
    )  # fmt: skip
    return cols


def _triton_cut(images: Tensor, ids: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    from sslfast.kernels import patches

    cols = images.new_empty(len(images), ids.shape[1], images.shape[1] * patch * patch, dtype=dtype)
    if cols.numel():
        with _backend.device_of(images):
            patches.cut(images, ids, patch, cols)
    return cols


def _triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return _backend.triton_refuses(device)


_backend.register("embed_visible_patches", "cpu", _backend.Backend(_cpu_cut, None, _backend.cpu_refuses))
_backend.register("embed_visible_patches", "triton", _backend.Backend(_triton_cut, None, _triton_refuses))

_cut = define(
    "cut_patches(Tensor images, Tensor ids, SymInt patch, ScalarType dtype, str backend) -> Tensor",
    lambda images, ids, patch, dtype, backend: _backend.implementation(
        "embed_visible_patches", backend
    ).forward(images, ids, patch, dtype),
    lambda images, ids, patch, dtype, backend: images.new_empty(
        images.shape[0], ids.shape[1], images.shape[1] * patch * patch, dtype=dtype
    ),
)


class _Embed(torch.autograd.Function):
    """images [B, C, H, W], ids [B, Lk], weight [D, C p p], bias [D], pos [L, D] of `dtype`, the result's."""

    @staticmethod
    def forward(ctx, images, ids, weight, bias, pos, patch, dtype, backend):
        ctx.save_for_backward(images, ids, weight)
        ctx.patch, ctx.backend = patch, backend
        tokens = F.linear(_cut(images, ids, patch, weight.dtype, backend), weight, bias)
        if pos is None:
            return tokens
        ctx.length = pos.shape[0]
        return take(tokens, ids, None, pos, True, dtype, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        images, ids, weight = ctx.saved_tensors
        dweight = dbias = dpos = None
        _, _, need_weight, need_bias, need_pos, *_ = ctx.needs_input_grad
        if need_weight:
            cols = _cut(images, ids, ctx.patch, weight.dtype, ctx.backend)
            dweight = dout.to(weight.dtype).flatten(0, 1).T @ cols.flatten(0, 1)
            del cols
        if need_bias:
            dbias = dout.sum((0, 1), dtype=working_dtype(dout)).to(weight.dtype)
        if need_pos:
            _, dpos, _ = put(dout, ids, ctx.length, dout.dtype, False, True, False, ctx.backend)
            dpos = dpos.to(dout.dtype)
        return None, None, dweight, dbias, dpos, None, None, None


def embed_visible_patches(
    images: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    patch_size: int,
) -> Tensor:
    """The patch embedding of a ViT for the kept patches only, with positions: removed ones are never
    embedded.

    The same as a convolution with stride patch_size over the whole image, then `gather_patches`. Under
    autocast the product is made in autocast's dtype, as the convolution would be.

    Args:
        images: [B, C, H, W] of weight's dtype (any floating one under autocast), any strides. A gradient to
            the images is the plain convolution's.
        ids_keep: int64 [B, Lk] in [0, L), L = H W / patch_size^2, row by row.
        weight: [D, C, p, p] as of torch.nn.Conv2d, or [D, C p p].
        bias: [D] of weight's dtype.
        pos_embed: [L, D] or [1, L, D], of any floating dtype.
        patch_size: p in pixels; divides H and W.

    Returns:
        [B, Lk, D] in the dtype to which PyTorch promotes tokens and positions. Differentiable in weight, bias
        and pos_embed, once; the same bits on every run.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, a patch that does not
            divide the image, or (on a GPU under SSLFAST_CHECK=1) an id out of range; the message names it.
    """
    check_tensor("images", images, FLOATS, (None, None, None, None))
    batch, channels, *_ = images.shape
    length = patches_in(images, patch_size)
    check_ids("ids_keep", ids_keep, (batch, None), length, images)
    whole = isinstance(weight, Tensor) and weight.dim() == 4
    shape = (channels, patch_size, patch_size) if whole else (channels * patch_size**2,)
    cast = torch.is_autocast_enabled(images.device.type)
    check_tensor("weight", weight, FLOATS if cast else (images.dtype,), (None, *shape), images)
    if bias is not None:
        check_tensor("bias", bias, FLOATS if cast else (weight.dtype,), (weight.shape[0],), images)
    pos = check_pos(pos_embed, length, weight.shape[0], images)
    backend = _backend.resolve("embed_visible_patches", images.device, images.dtype)
    if backend == "reference" or (images.requires_grad and torch.is_grad_enabled()):
        return reference(images, ids_keep, weight, bias, pos, patch_size=patch_size)
    weight, bias = autocast(weight, bias)
    dtype = weight.dtype if pos is None else torch.promote_types(weight.dtype, pos.dtype)
    pos = None if pos is None else pos.to(dtype).contiguous()
    images = images if _has_kernel(images.dtype, weight.dtype) else images.to(weight.dtype)
    weight, bias = weight.flatten(1), bias
    with torch.autocast(images.device.type, enabled=False):
        return _Embed.apply(images, ids_keep.contiguous(), weight, bias, pos, patch_size, dtype, backend)


def _has_kernel(images: torch.dtype, weight: torch.dtype) -> bool:
    return images == weight or (images == torch.float32 and weight.itemsize == 2)


def patches_in(images: Tensor, patch_size: int) -> int:
    """How many patches an image [.., H, W] has."""
    check_integer("patch_size", patch_size, 1)
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(
            f"patch_size: expected a divisor of the images' {height} x {width} pixels, got {patch_size}"
        )
    return (height // patch_size) * (width // patch_size)
