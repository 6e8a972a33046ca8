"""guided_lse: log-sum-exp of the similarities that a second pair of embeddings, the guide's, lets through.

    lse_i = log sum over j with <u_i, v_j> <= limit_i of exp(scale <a_i, b_j>)

Two tiles of products at a time, of which none is kept: memory is linear in M and N. Plain PyTorch on every
device.
"""

import torch
from torch import Tensor

from sslfast.ops._check import FLOATS, check_tensor, number, working_dtype
from sslfast.ops._library import define, once_differentiable

CHUNK = 1 << 20  # products at a time


def _chunks(a, b, u, v, limit, scale, a_ids, b_ids):
    """(rows, logits [R, N]), -inf where a pair is left out."""
    step = max(1, CHUNK // max(1, len(b)))
    for begin in range(0, len(a), step):
        rows = slice(begin, begin + step)
        out = _exact_product(u[rows], v) > limit[rows, None]
        if a_ids is not None:
            out |= a_ids[rows, None] == b_ids
        yield rows, (scale * (a[rows] @ b.T)).masked_fill_(out, -torch.inf)


def _exact_product(u: Tensor, v: Tensor) -> Tensor:
    """Without TF32, whatever is set: limits are compared to the last digits."""
    if not u.is_cuda:
        return u @ v.T
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return u @ v.T
    finally:
        torch.set_float32_matmul_precision(before)


def _forward(a, b, u, v, limit, scale, a_ids, b_ids):
    row = a.new_empty(len(a))
    with torch.autocast(a.device.type, enabled=False):
        for rows, logits in _chunks(a, b, u, v, limit, scale, a_ids, b_ids):
            row[rows] = logits.logsumexp(1) if len(b) else -torch.inf
    return row


def _backward(g, row, a, b, u, v, limit, scale, a_ids, b_ids):
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    shift = row.masked_fill(row == -torch.inf, 0.0)
    with torch.autocast(a.device.type, enabled=False):
        for rows, logits in _chunks(a, b, u, v, limit, scale, a_ids, b_ids):
            weights = logits.sub_(shift[rows, None]).exp_().mul_(scale * g[rows, None])
            da[rows] = weights @ b
            db += weights.T @ a[rows]
    return da, db


_ARGUMENTS = "Tensor a, Tensor b, Tensor u, Tensor v, Tensor limit, float scale, Tensor? a_ids, Tensor? b_ids"
_fwd = define(f"guided_lse_fwd({_ARGUMENTS}) -> Tensor", _forward, lambda a, *_: a.new_empty(len(a)))
_bwd = define(
    f"guided_lse_bwd(Tensor g, Tensor row, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _backward,
    lambda g, row, a, b, *_: (torch.empty_like(a), torch.empty_like(b)),
)


class _GuidedLSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, u, v, limit, scale, a_ids, b_ids):
        row = _fwd(a, b, u, v, limit, scale, a_ids, b_ids)
        ctx.save_for_backward(row, a, b, u, v, limit, a_ids, b_ids)
        ctx.scale = scale
        return row

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        row, a, b, u, v, limit, a_ids, b_ids = ctx.saved_tensors
        return *_bwd(g.contiguous(), row, a, b, u, v, limit, ctx.scale, a_ids, b_ids), *(None,) * 6


def guided_lse(
    a: Tensor,
    b: Tensor,
    guide_a: Tensor,
    guide_b: Tensor,
    limit: Tensor,
    *,
    scale: float = 1.0,
    a_ids: Tensor | None = None,
    b_ids: Tensor | None = None,
) -> Tensor:
    """Log-sum-exp over the columns that the guide does not find too similar to a row (GISTEmbed).

    Differentiable in a and b, once.

    Args:
        a, b: [M, D], [N, D] floating, of one dtype; b may be a.
        guide_a, guide_b: [M, E], [N, E] floating; without a gradient.
        limit: [M]: pairs whose product of guides is above it are left out.
        scale: number.
        a_ids, b_ids: int64 [M], [N]: pairs of equal ids are left out too.

    Returns:
        [M] float32 (float64 for float64 input); a row without any pair gives -inf and has no gradient.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.
    """
    check_tensor("a", a, FLOATS, (None, None))
    check_tensor("b", b, (a.dtype,), (None, a.shape[1]), a)
    check_tensor("guide_a", guide_a, FLOATS, (len(a), None), a)
    check_tensor("guide_b", guide_b, (guide_a.dtype,), (len(b), guide_a.shape[1]), a)
    check_tensor("limit", limit, FLOATS, (len(a),), a)
    number("scale", scale)
    if (a_ids is None) != (b_ids is None):
        raise ValueError(f"{'b' if b_ids is None else 'a'}_ids: expected ids for both sides, got None")
    if a_ids is not None and b_ids is not None:
        check_tensor("a_ids", a_ids, (torch.int64,), (len(a),), a)
        check_tensor("b_ids", b_ids, (torch.int64,), (len(b),), a)
    work, guide = working_dtype(a), working_dtype(guide_a)
    a, b, u, v = a.to(work), b.to(work), guide_a.detach().to(guide), guide_b.detach().to(guide)
    if torch.compiler.is_compiling():  # torch.compile takes no tensor twice
        b, v = (y.view_as(y) if y is x else y for x, y in ((a, b), (u, v)))
    return _GuidedLSE.apply(a, b, u, v, limit.detach().to(guide), float(scale), a_ids, b_ids)
