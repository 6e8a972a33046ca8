"""gather_patches and restore_patches: rows of patches by index, with their positions added in the same pass.

    gather:   out[b, i] = tokens[b, ids[b, i]] + pos[ids[b, i]]
    restore:  out[b, i] = (ids[b, i] < Lk ? tokens[b, ids[b, i]] : mask_token) + pos[i]

Both are one kernel, `take`, and their gradients another, `put`: a row of tokens sums the gradients of the
places it went to, found by inverting the ids, so nothing is added atomically and nothing [B, L, D] is an
index.
"""

import torch
from torch import Tensor

from sslfast import _C
from sslfast.ops import _backend
from sslfast.ops._check import FLOATS, check_ids, check_tensor, working_dtype
from sslfast.ops._library import define, once_differentiable


def gather_reference(tokens: Tensor, ids: Tensor, pos: Tensor | None = None) -> Tensor:
    """Plain PyTorch: specification, test truth and benchmark baseline."""
    if pos is not None:
        tokens = tokens + pos
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


def restore_reference(tokens: Tensor, ids: Tensor, mask_token: Tensor, pos: Tensor | None = None) -> Tensor:
    """Plain PyTorch: specification, test truth and benchmark baseline."""
    batch, kept, dim = tokens.shape
    dtype = torch.promote_types(tokens.dtype, mask_token.dtype)
    missing = max(ids.shape[1] - kept, 1)
    whole = torch.cat((tokens.to(dtype), mask_token.to(dtype).expand(batch, missing, dim)), dim=1)
    out = whole.gather(1, ids.clamp(max=kept)[:, :, None].expand(-1, -1, dim))
    return out if pos is None else out + pos


# Backends. take: (source, ids [B, m], fill [D] or None, pos or None, own, dtype) -> [B, m, D], from source
# [B, n, D] or, where `own` is set, from source[b, i] itself, [B, m, D]; any strides whose last is 1. put:
# (dout [B, m, D], ids, n, dtype, what is needed) -> (dsource, dpos, dfill), empty where not needed, the last
# two in the working dtype.


def _cpu_take(
    source: Tensor, ids: Tensor, fill: Tensor | None, pos: Tensor | None, own: bool, dtype: torch.dtype
) -> Tensor:
    (batch, rows, dim), count, device = source.shape, ids.shape[1], source.device
    address, strides = _backend.strided("tokens", source, source.dtype, (batch, rows, dim), device)
    if own:
        assert rows == count and pos is not None
        rows = len(pos)
    out = source.new_empty(batch, count, dim, dtype=dtype)
    _C.take_patches(
        (batch, rows, count, dim), (address, *strides[:2]), _backend.CODES[source.dtype],
        _backend.pointer("ids", ids, torch.int64, (batch, count), device),
        _backend.pointer("mask_token", fill, dtype, (dim,), device),
        _backend.pointer("pos_embed", pos, dtype, (rows if fill is None else count, dim), device),
        own, out.data_ptr(), _backend.CODES[dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def _cpu_put(
    dout: Tensor, ids: Tensor, rows: int, dtype: torch.dtype, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, count, dim), device, threads = dout.shape, dout.device, torch.get_num_threads()
    address, strides = _backend.strided("dout", dout, dout.dtype, (batch, count, dim), device)
    dsource = dout.new_empty((batch, rows, dim) if needs[0] else 0, dtype=dtype)
    dpos = dout.new_empty((rows, dim) if needs[1] else 0, dtype=torch.float64)
    dfill = dout.new_zeros((threads, dim) if needs[2] else 0, dtype=torch.float64)
    at = [x.data_ptr() if need else 0 for x, need in zip((dsource, dpos, dfill), needs, strict=True)]
    _C.put_patches(
        (batch, rows, count, dim), (address, *strides[:2]), _backend.CODES[dout.dtype],
        _backend.pointer("ids", ids, torch.int64, (batch, count), device), at[0], _backend.CODES[dtype],
        *at[1:], threads,
    )  # fmt: skip
    work = working_dtype(dout)
    return dsource, dpos.to(work), (dfill.sum(0) if needs[2] else dfill).to(work)


def _triton_take(
    source: Tensor, ids: Tensor, fill: Tensor | None, pos: Tensor | None, own: bool, dtype: torch.dtype
) -> Tensor:
    from sslfast.kernels import patches

    out = source.new_empty(source.shape[0], ids.shape[1], source.shape[2], dtype=dtype)
    if out.numel():
        with _backend.device_of(source):
            patches.take(source, ids, fill, pos, own, out)
    return out


def _triton_put(
    dout: Tensor, ids: Tensor, rows: int, dtype: torch.dtype, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    from sslfast.kernels import patches

    with _backend.device_of(dout):
        return patches.put(dout, ids, rows, dtype, working_dtype(dout), needs)


def _triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return _backend.triton_refuses(device)


for _op in ("gather_patches", "restore_patches"):
    _backend.register(_op, "cpu", _backend.Backend(_cpu_take, _cpu_put, _backend.cpu_refuses))
    _backend.register(_op, "triton", _backend.Backend(_triton_take, _triton_put, _triton_refuses))


def _forward(source, ids, fill, pos, own, dtype, backend):
    op = "gather_patches" if fill is None else "restore_patches"
    return _backend.implementation(op, backend).forward(source, ids, fill, pos, own, dtype)


def _forward_fake(source, ids, fill, pos, own, dtype, backend):
    return source.new_empty(source.shape[0], ids.shape[1], source.shape[2], dtype=dtype)


def _backward(dout, ids, rows, dtype, need_source, need_pos, need_fill, backend):
    if dout.stride(2) != 1:
        dout = dout.contiguous()
    op = "restore_patches" if need_fill else "gather_patches"
    put = _backend.implementation(op, backend).backward
    assert put is not None
    return put(dout, ids, rows, dtype, (need_source, need_pos, need_fill))


def _backward_fake(dout, ids, rows, dtype, need_source, need_pos, need_fill, backend):
    (batch, _, dim), work = dout.shape, working_dtype(dout)
    return (
        dout.new_empty((batch, rows, dim) if need_source else 0, dtype=dtype),
        dout.new_empty((rows, dim) if need_pos else 0, dtype=work),
        dout.new_empty(dim if need_fill else 0, dtype=work),
    )


take = define(
    "take_patches(Tensor source, Tensor ids, Tensor? fill, Tensor? pos, bool own, ScalarType dtype, "
    "str backend) -> Tensor",
    _forward,
    _forward_fake,
)
put = define(
    "put_patches(Tensor dout, Tensor ids, SymInt rows, ScalarType dtype, bool need_source, bool need_pos, "
    "bool need_fill, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, ids, pos, dtype, backend):
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype, ctx.backend = tokens.shape[1], tokens.dtype, backend
        return take(tokens, ids, None, pos, False, dtype, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (ids,) = ctx.saved_tensors
        tokens, _, pos, *_ = ctx.needs_input_grad
        dtokens, dpos, _ = put(dout, ids, ctx.rows, ctx.dtype, tokens, pos, False, ctx.backend)
        return dtokens if tokens else None, None, dpos.to(dout.dtype) if pos else None, None, None


class _Restore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, ids, mask_token, pos, dtype, backend):
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype, ctx.backend = tokens.shape[1], tokens.dtype, backend
        return take(tokens, ids, mask_token, pos, False, dtype, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (ids,) = ctx.saved_tensors
        tokens, _, fill, pos, *_ = ctx.needs_input_grad
        dtokens = dfill = dpos = None
        if tokens or fill:
            dtokens, _, dfill = put(dout, ids, ctx.rows, ctx.dtype, tokens, False, fill, ctx.backend)
            dfill = dfill.to(dout.dtype) if fill else None
        if pos:
            dpos = dout.sum(0, dtype=working_dtype(dout)).to(dout.dtype)
        return dtokens if tokens else None, None, dfill, dpos, None, None


# Public functions


def _rows(x: Tensor) -> Tensor:
    """With a last stride of 1, which is all that the kernels ask for."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_pos(pos: Tensor | None, length: int, dim: int, like: Tensor) -> Tensor | None:
    """pos_embed [L, D] or [1, L, D] as [L, D]."""
    if isinstance(pos, Tensor) and pos.dim() == 3:
        check_tensor("pos_embed", pos, FLOATS, (1, length, dim), like)
        return pos[0]
    if pos is not None:
        check_tensor("pos_embed", pos, FLOATS, (length, dim), like)
    return pos


def gather_patches(tokens: Tensor, ids_keep: Tensor, pos_embed: Tensor | None = None) -> Tensor:
    """The kept tokens of each image, with their positions added in the same pass.

    The gradient of a token that is kept twice is the sum of both, in a fixed order.

    Args:
        tokens: [B, L, D], of any floating dtype and strides.
        ids_keep: int64 [B, Lk] in [0, L), for example of `random_patch_mask`.
        pos_embed: [L, D] or [1, L, D], of any floating dtype.

    Returns:
        [B, Lk, D]: tokens[b, ids_keep[b, i]] + pos_embed[ids_keep[b, i]], in the dtype to which PyTorch
        promotes their sum. Differentiable in tokens and pos_embed, once.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or (on a GPU under
            SSLFAST_CHECK=1) an id out of range; the message names it.
    """
    check_tensor("tokens", tokens, FLOATS, (None, None, None))
    batch, length, dim = tokens.shape
    check_ids("ids_keep", ids_keep, (batch, None), length, tokens)
    pos = check_pos(pos_embed, length, dim, tokens)
    backend = _backend.resolve("gather_patches", tokens.device, tokens.dtype)
    if backend == "reference":
        return gather_reference(tokens, ids_keep, pos)
    dtype = tokens.dtype if pos is None else torch.promote_types(tokens.dtype, pos.dtype)
    pos = None if pos is None else pos.to(dtype).contiguous()
    return _Gather.apply(_rows(_as(tokens, dtype)), ids_keep.contiguous(), pos, dtype, backend)


def restore_patches(
    tokens: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor | None = None
) -> Tensor:
    """Tokens back in their places, the mask token in all others, and positions added, in one pass.

    Args:
        tokens: [B, Lk, D], of any floating dtype and strides.
        ids_restore: int64 [B, L] in [0, L): the token of each place; from Lk on, the mask token.
        mask_token: [D] or [1, 1, D], of any floating dtype.
        pos_embed: [L, D] or [1, L, D], of any floating dtype.

    Returns:
        [B, L, D] in the dtype to which PyTorch promotes their sum. Differentiable in tokens, mask_token and
        pos_embed, once; the same bits on every run.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or (on a GPU under
            SSLFAST_CHECK=1) an id out of range; the message names it.
    """
    check_tensor("tokens", tokens, FLOATS, (None, None, None))
    batch, kept, dim = tokens.shape
    length = ids_restore.shape[1] if isinstance(ids_restore, Tensor) and ids_restore.dim() == 2 else 0
    check_ids("ids_restore", ids_restore, (batch, None), length, tokens)
    if kept > length:
        raise ValueError(f"ids_restore: expected places for {kept} tokens at least, got {length}")
    whole = isinstance(mask_token, Tensor) and mask_token.dim() == 3
    check_tensor("mask_token", mask_token, FLOATS, (1, 1, dim) if whole else (dim,), tokens)
    pos = check_pos(pos_embed, length, dim, tokens)
    fill = mask_token.view(dim) if whole else mask_token
    backend = _backend.resolve("restore_patches", tokens.device, tokens.dtype)
    if backend == "reference":
        return restore_reference(tokens, ids_restore, fill, pos)
    dtype = torch.promote_types(tokens.dtype, fill.dtype)
    if pos is not None:
        dtype = torch.promote_types(dtype, pos.dtype)
        pos = pos.to(dtype).contiguous()
    fill = fill.to(dtype).contiguous()
    return _Restore.apply(_rows(_as(tokens, dtype)), ids_restore.contiguous(), fill, pos, dtype, backend)


def _as(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernels widen 16-bit tokens to float32 themselves; all else is cast before."""
    return tokens if dtype in (tokens.dtype, torch.float32) else tokens.to(dtype)
