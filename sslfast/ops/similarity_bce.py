"""similarity_bce: sigmoid cross-entropies of every pair of rows, summed over rows without the matrix.

S_ij  = scale <a_i, b_j> + bias          y_ij = 1 where a_ids_i = b_ids_j, otherwise -1
row_i = sum_j log(1 + exp(-y_ij S_ij))   G_ij = -g_i y_ij / (1 + exp(y_ij S_ij)),    g: gradient of row
da    = scale G b     db = scale G^T a     dscale = sum_ij G_ij <a_i, b_j>     dbias = sum_ij G_ij

A G needs nothing but its own logit. So where the sum of the rows is all that is asked for, and every g_i is
the same, losses and gradients come of one walk over the tiles, three matrix products in all.
"""

import torch
from torch import Tensor

from sslfast.ops import _backend
from sslfast.ops._check import FLOATS, autocast, check_tensor, scalar, working_dtype
from sslfast.ops._library import define, once_differentiable


def reference(
    a: Tensor, b: Tensor, scale: Tensor | float, bias: Tensor | float, a_ids: Tensor, b_ids: Tensor
) -> Tensor:
    """Plain PyTorch, differentiable to any order: specification, test truth and benchmark baseline."""
    work = working_dtype(a)
    with torch.autocast(a.device.type, enabled=False):
        logits = scale * (a.to(work) @ b.to(work).T) + bias
    sign = torch.where(a_ids[:, None] == b_ids, 1.0, -1.0).to(work)
    return -torch.nn.functional.logsigmoid(sign * logits).sum(1)


# The registered op: row sums [M], and gradients to a, b, scale and bias where asked for (empty where not).


def _pass(g, a, b, scale, bias, a_ids, b_ids, needs, backend):
    gradients: tuple[Tensor | None, ...]
    serve = _backend.implementation("similarity_bce", backend).forward
    if len(a) and len(b):
        with torch.autocast(a.device.type, enabled=False), _backend.device_of(a):
            row, gradients = serve(g, a, b, scale, bias, a_ids, b_ids, needs)
    else:
        row, inputs = torch.zeros_like(g), zip((a, b, scale, bias), needs, strict=True)
        gradients = tuple(torch.zeros_like(x) if need else None for x, need in inputs)
    work = scale.dtype
    return row, *(a.new_empty(0, dtype=work) if d is None else d.to(work) for d in gradients)


def _pass_fake(g, a, b, scale, bias, a_ids, b_ids, needs, backend):
    inputs = zip((a, b, scale, bias), needs, strict=True)
    return torch.empty_like(g), *(x.new_empty(x.shape if need else 0, dtype=g.dtype) for x, need in inputs)


_op = define(
    "similarity_bce_pass(Tensor g, Tensor a, Tensor b, Tensor scale, Tensor bias, Tensor a_ids, "
    "Tensor b_ids, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pass,
    _pass_fake,
)


def _cpu(g, a, b, scale, bias, a_ids, b_ids, needs):
    from sslfast.ops import _blocked

    column = bias.expand(len(b)).contiguous()
    return _blocked.bce(_blocked.CpuTiles(a, b, scale, column, a_ids, b_ids, False), g, needs)


def _triton(g, a, b, scale, bias, a_ids, b_ids, needs):
    from sslfast.ops import _blocked, _chunked

    column = bias.expand(len(b)).contiguous()
    return _blocked.bce(_chunked.GpuTiles(a, b, scale, column, a_ids, b_ids, False, g), g, needs)


def _triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return _backend.triton_refuses(device) or (
        None if dtype in FLOATS and dtype != torch.float64 else f"it has no kernel for {dtype}"
    )


_backend.register("similarity_bce", "cpu", _backend.Backend(_cpu, None, _backend.cpu_refuses))
_backend.register("similarity_bce", "triton", _backend.Backend(_triton, None, _triton_refuses))

_NONE = (False,) * 4


class _SimilarityBCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, scale, bias, a_ids, b_ids, total, trains, backend):
        ctx.total, ctx.dtypes, ctx.backend = total, (a.dtype, b.dtype, scale.dtype, bias.dtype), backend
        g = torch.ones(len(a), dtype=scale.dtype, device=a.device)
        inputs = a, b, scale, bias, a_ids, b_ids
        row, *gradients = _op(g, *inputs, ctx.needs_input_grad[:4] if total and trains else _NONE, backend)
        ctx.save_for_backward(*inputs, *(gradients if total else ()))
        return row.sum() if total else row

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        needs = ctx.needs_input_grad[:4]
        if ctx.total:
            found = [d * g if need else None for d, need in zip(ctx.saved_tensors[6:], needs, strict=True)]
        else:
            found = _op(g.contiguous(), *ctx.saved_tensors, needs, ctx.backend)[1:]
        kept = zip(found, needs, ctx.dtypes, strict=True)
        return *(d.to(dtype) if need and d is not None else None for d, need, dtype in kept), *(None,) * 5


def similarity_bce(
    a: Tensor,
    b: Tensor,
    *,
    scale: Tensor | float = 1.0,
    bias: Tensor | float = 0.0,
    a_ids: Tensor | None = None,
    b_ids: Tensor | None = None,
    total: bool = False,
) -> Tensor:
    """Sums over each row of -log sigmoid(y (scale <a_i, b_j> + bias)), y = 1 for equal ids and -1 for others.

    In memory linear in M and N. Differentiable in a, b, scale and bias, once. Sums and the result are float32
    or wider; under autocast a and b are cast as torch.mm would cast them.

    Args:
        a, b: [M, D], [N, D] floating, of one dtype and device.
        scale, bias: numbers or 0-d tensors.
        a_ids, b_ids: int64 [M], [N]; None: row i and column i have the same id, no others.
        total: the sum over the rows instead, whose gradients are computed in the same pass.

    Returns:
        [M], or 0-d; float32, or float64 for float64 input.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.
    """
    check_tensor("a", a, FLOATS, (None, None))
    a, b = autocast(a, b)  # type: ignore[assignment]
    check_tensor("b", b, (a.dtype,), (None, a.shape[1]), a)
    if (a_ids is None) != (b_ids is None):
        raise ValueError(f"{'b' if b_ids is None else 'a'}_ids: expected ids for both sides, got None")
    scale, bias = scalar("scale", scale, a), scalar("bias", bias, a)
    if a_ids is None or b_ids is None:
        a_ids, b_ids = (torch.arange(len(x), device=a.device) for x in (a, b))
    else:
        check_tensor("a_ids", a_ids, (torch.int64,), (len(a),), a)
        check_tensor("b_ids", b_ids, (torch.int64,), (len(b),), a)
    backend = _backend.resolve("similarity_bce", a.device, a.dtype)
    if backend == "reference":
        row = reference(a, b, scale, bias, a_ids, b_ids)
        return row.sum() if total else row
    if torch.compiler.is_compiling():  # torch.compile takes no tensor twice
        b = b.view_as(b) if b is a else b
        b_ids = b_ids.view_as(b_ids) if b_ids is a_ids else b_ids
        bias = bias.view_as(bias) if bias is scale else bias
    trains = torch.is_grad_enabled()  # inside of a Function it never is
    return _SimilarityBCE.apply(a, b, scale, bias, a_ids, b_ids, total, trains, backend)
