"""similarity_lse: log-sum-exp over the rows (and columns) of a similarity matrix that is never materialised.

S_ij  = scale <a_i, b_j> + bias_j              over the allowed pairs
row_i = log sum_j exp S_ij                     col_j = log sum_i exp S_ij
G_ij  = g_i exp(S_ij - row_i) + h_j exp(S_ij - col_j)         g, h: gradients of row, col
da    = scale G b     db = scale G^T a     dscale = sum_ij G_ij <a_i, b_j>     dbias_j = sum_i G_ij
"""

from typing import Literal, overload

import torch
from torch import Tensor

from sslfast.kernels import tuning
from sslfast.ops import _backend
from sslfast.ops._check import FLOATS, autocast, check_tensor, scalar, working_dtype
from sslfast.ops._library import define, once_differentiable


def reference(
    a: Tensor,
    b: Tensor | None,
    scale: Tensor | float,
    bias: Tensor | None,
    a_ids: Tensor | None,
    b_ids: Tensor | None,
    same: bool,
    return_cols: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain PyTorch, differentiable to any order: specification, test truth and benchmark baseline."""
    is_self = b is None
    work = working_dtype(a)
    a = a.to(work)
    b, b_ids = (a, a_ids) if b is None else (b.to(work), b_ids)
    with torch.autocast(a.device.type, enabled=False):
        logits = scale * (a @ b.T)
    if bias is not None:
        logits = logits + bias.to(work)
    if a_ids is not None and b_ids is not None:
        equal = a_ids[:, None] == b_ids[None, :]
        logits = logits.masked_fill(~equal if same else equal, -torch.inf)
    if is_self:
        logits = logits.masked_fill(torch.eye(len(a), dtype=torch.bool, device=a.device), -torch.inf)
    row = _logsumexp(logits, 1)
    return (row, _logsumexp(logits, 0)) if return_cols else row


def _logsumexp(logits: Tensor, dim: int) -> Tensor:
    """torch.logsumexp with zero gradient, not NaN, where every logit is -inf or there is none."""
    if logits.shape[dim] == 0:
        return logits.sum(dim) - torch.inf
    empty = (logits == -torch.inf).all(dim, keepdim=True)
    lse = logits.masked_fill(empty, 0.0).logsumexp(dim)
    return lse.masked_fill(empty.squeeze(dim), -torch.inf)


_A_ALONE = (True, False, False, False)  # the inputs whose gradient is asked for

# The registered ops. Unused outputs and gradients not asked for are empty tensors: a schema has no optional
# results.


def _forward(a, b, scale, bias, a_ids, b_ids, same, return_cols, expect, backend):
    return _backend.implementation("similarity_lse", backend).forward(
        a, b, scale, bias, a_ids, b_ids, same, return_cols, expect
    )


def _forward_fake(a, b, scale, bias, a_ids, b_ids, same, return_cols, expect, backend):
    work, n = working_dtype(a), (a if b is None else b).shape[0]
    return (
        a.new_empty(a.shape[0], dtype=work),
        a.new_empty(n if return_cols else 0, dtype=work),
        a.new_empty(a.shape if expect else 0, dtype=work),
    )


def _backward(g, h, a, b, scale, bias, a_ids, b_ids, row, col, same, needs, backend):
    serve = _backend.implementation("similarity_lse", backend).backward
    assert serve is not None
    gradients = serve(g, h, a, b, scale, bias, a_ids, b_ids, row, col, same, needs)
    inputs = (a, b, scale, bias)
    return tuple(
        a.new_empty(0) if d is None else d.to(x.dtype) for d, x in zip(gradients, inputs, strict=True)
    )


def _backward_fake(g, h, a, b, scale, bias, a_ids, b_ids, row, col, same, needs, backend):
    inputs = (a, b, scale, bias)
    return tuple(
        x.new_empty(x.shape) if need and x is not None else a.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


_fwd = define(
    "similarity_lse_fwd(Tensor a, Tensor? b, Tensor scale, Tensor? bias, Tensor? a_ids, Tensor? b_ids, "
    "bool same, bool return_cols, bool expect, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_bwd = define(
    "similarity_lse_bwd(Tensor g, Tensor? h, Tensor a, Tensor? b, Tensor scale, Tensor? bias, Tensor? a_ids, "
    "Tensor? b_ids, Tensor row, Tensor? col, bool same, bool[] needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _cpu_forward(a, b, scale, bias, a_ids, b_ids, same, return_cols, expect):
    from sslfast.ops import _blocked

    row, col = _blocked.forward(_blocked.CpuTiles(a, b, scale, bias, a_ids, b_ids, same), return_cols)
    mean = _by_backward(_cpu_backward, a, b, scale, bias, a_ids, b_ids, row, same) if expect else None
    return row, col, row.new_empty(0) if mean is None else mean


def _by_backward(backward, a, b, scale, bias, a_ids, b_ids, row, same):
    """mean_i = sum_j p_ij b_j, from the backward pass of sum_i row_i, run at once: da_i = scale mean_i."""
    if scale.device.type == "cpu" and scale == 0:  # no logit depends on a
        a, scale = torch.zeros_like(a), torch.ones_like(scale)
    da = backward(torch.ones_like(row), None, a, b, scale, bias, a_ids, b_ids, row, None, same, _A_ALONE)[0]
    return torch.where(scale == 0, 0.0, da.to(row.dtype) / scale)


def _cpu_backward(g, h, a, b, scale, bias, a_ids, b_ids, row, col, same, needs):
    from sslfast.ops import _blocked

    tiles = _blocked.CpuTiles(a, b, scale, bias, a_ids, b_ids, same)
    return _blocked.backward(tiles, g, h, row, col, needs)


_backend.register(
    "similarity_lse", "cpu", _backend.Backend(_cpu_forward, _cpu_backward, _backend.cpu_refuses)
)


def _triton_form(a, b):
    return tuning.form("self" if b is None else "pair", a.shape[1], a.dtype, a.device)


def _triton_forward(a, b, scale, bias, a_ids, b_ids, same, return_cols, expect):
    from sslfast.ops import _chunked, _flash

    m, n = a.shape[0], (a if b is None else b).shape[0]
    if m == 0 or n == 0:
        row, col = (scale.new_full((size,), -torch.inf) for size in (m, n if return_cols else 0))
        return row, col, scale.new_zeros(a.shape if expect else 0)
    with _backend.device_of(a):
        flash = tuning.fits(a.shape[1], a.element_size()) if expect else _triton_form(a, b) == "flash"
        if flash:
            return _flash.forward(a, b, scale, bias, a_ids, b_ids, same, return_cols, expect)
        row, col = _chunked.forward(a, b, scale, bias, a_ids, b_ids, same, return_cols)
        mean = _by_backward(_chunked.backward, a, b, scale, bias, a_ids, b_ids, row, same) if expect else None
        return row, col, row.new_empty(0) if mean is None else mean


def _triton_backward(g, h, a, b, scale, bias, a_ids, b_ids, row, col, same, needs):
    from sslfast.ops import _chunked, _flash

    if a.shape[0] == 0 or (a if b is None else b).shape[0] == 0:
        inputs = zip((a, b, scale, bias), needs, strict=True)
        return tuple(torch.zeros_like(x) if need and x is not None else None for x, need in inputs)
    with _backend.device_of(a):
        form = _flash if _triton_form(a, b) == "flash" else _chunked
        return form.backward(g, h, a, b, scale, bias, a_ids, b_ids, row, col, same, needs)


def _triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return _backend.triton_refuses(device) or (
        None if dtype in FLOATS and dtype != torch.float64 else f"it has no kernel for {dtype}"
    )


_backend.register(
    "similarity_lse", "triton", _backend.Backend(_triton_forward, _triton_backward, _triton_refuses)
)


class _SimilarityLSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, scale, bias, a_ids, b_ids, same, return_cols, expect, backend):
        row, col, mean = _fwd(a, b, scale, bias, a_ids, b_ids, same, return_cols, expect, backend)
        ctx.set_materialize_grads(False)
        ctx.expect = expect
        if expect:
            ctx.save_for_backward(a, scale, mean)
            return row
        ctx.save_for_backward(a, b, scale, bias, a_ids, b_ids, row, col)
        ctx.same, ctx.return_cols, ctx.backend = same, return_cols, backend
        return (row, col) if return_cols else row

    @staticmethod
    @once_differentiable
    def backward(ctx, g, h=None):
        if g is None and h is None:
            return (None,) * 10
        if ctx.expect:
            a, scale, mean = ctx.saved_tensors
            return _from_expectation(g, a, scale, mean, ctx.needs_input_grad)
        a, b, scale, bias, a_ids, b_ids, row, col = ctx.saved_tensors
        g = torch.zeros_like(row) if g is None else g
        needs = ctx.needs_input_grad[:4]
        gradients = _bwd(g, h, a, b, scale, bias, a_ids, b_ids, row, col, ctx.same, needs, ctx.backend)
        kept = (d if need else None for d, need in zip(gradients, needs, strict=True))
        return *kept, None, None, None, None, None, None


def _from_expectation(g, a, scale, mean, needs):
    """Gradients by d row_i / d a_i = scale sum_j p_ij b_j, which the forward pass has left in mean_i."""
    da = ((scale * g)[:, None] * mean).to(a.dtype) if needs[0] else None
    dscale = (g * (a * mean).sum(1)).sum() if needs[2] else None
    return da, None, dscale, *(None,) * 7


@overload
def similarity_lse(
    a: Tensor,
    b: Tensor | None = ...,
    *,
    scale: Tensor | float = ...,
    bias: Tensor | None = ...,
    a_ids: Tensor | None = ...,
    b_ids: Tensor | None = ...,
    pairs: Literal["different", "same"] = ...,
    return_cols: Literal[False] = ...,
) -> Tensor: ...


@overload
def similarity_lse(
    a: Tensor,
    b: Tensor | None = ...,
    *,
    scale: Tensor | float = ...,
    bias: Tensor | None = ...,
    a_ids: Tensor | None = ...,
    b_ids: Tensor | None = ...,
    pairs: Literal["different", "same"] = ...,
    return_cols: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def similarity_lse(
    a: Tensor,
    b: Tensor | None = None,
    *,
    scale: Tensor | float = 1.0,
    bias: Tensor | None = None,
    a_ids: Tensor | None = None,
    b_ids: Tensor | None = None,
    pairs: Literal["different", "same"] = "different",
    return_cols: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-sum-exp over each row (and column) of `scale * a @ b.T + bias`, in memory linear in M and N.

    Differentiable in a, b, scale and bias, once. Sums and the result are float32 or wider, whatever the
    input; under autocast a and b are cast as torch.mm would cast them.

    Args:
        a: [M, D] float32, bfloat16, float16 or float64, any strides.
        b: [N, D] of a's dtype and device; None compares a with itself, and a row never meets itself.
        scale: number or 0-d tensor: the inverse temperature, of either sign.
        bias: [N], added to each column's logits; -inf leaves a column out.
        a_ids, b_ids: int64 [M], [N]: groups of rows and columns. For b=None a_ids serves both sides.
        pairs: "different" leaves out pairs with equal ids, "same" keeps only those.
        return_cols: also reduce over the rows, for each column.

    Returns:
        row_lse [M], or (row_lse [M], col_lse [N]); float32, or float64 for float64 input. A row without any
        pair gives -inf and has no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value; the message names
        it.
    """
    check_tensor("a", a, FLOATS, (None, None))
    a, b = autocast(a, b)
    scale = _check(a, b, scale, bias, a_ids, b_ids, pairs)
    same = pairs == "same"
    backend = _backend.resolve("similarity_lse", a.device, a.dtype)
    if backend == "reference":
        if b is not None and not b.requires_grad and torch.is_grad_enabled():
            b = b.clone()  # which may change before the backward pass, as with the other backends
        return reference(a, b, scale, bias, a_ids, b_ids, same, return_cols)
    if torch.compiler.is_compiling():  # torch.compile takes no tensor twice
        b = b.view_as(b) if b is a else b
        b_ids = b_ids.view_as(b_ids) if b_ids is not None and b_ids is a_ids else b_ids
    expect = not return_cols and _queries_alone(backend, a, b, scale, bias)
    return _SimilarityLSE.apply(a, b, scale, bias, a_ids, b_ids, same, return_cols, expect, backend)


def _queries_alone(backend: str, a: Tensor, b: Tensor | None, scale: Tensor, bias: Tensor | None) -> bool:
    """Whether b and bias need no gradient, as a queue of keys does not. Then the forward pass leaves what a's
    and scale's gradients need, and b may change before the backward pass; where a Triton kernel has room for
    it, that is also a pass less. The host does not know whether a scale on a GPU is 0."""
    if b is None or b.requires_grad or not (a.requires_grad or scale.requires_grad):
        return False
    constant = bias is None or not bias.requires_grad
    fits = backend == "cpu" or tuning.fits(a.shape[1], a.element_size())
    return constant and torch.is_grad_enabled() and (fits or not scale.requires_grad)


def _check(a, b, scale, bias, a_ids, b_ids, pairs) -> Tensor:
    """Raises unless the call is valid; returns scale as a 0-d tensor of the working dtype."""
    if b is not None:
        check_tensor("b", b, (a.dtype,), (None, a.shape[1]), a)
    elif b_ids is not None:
        raise ValueError("b_ids: expected None when b is None (a_ids serves both sides), got a tensor")
    n = (a if b is None else b).shape[0]
    if bias is not None:
        check_tensor("bias", bias, FLOATS, (n,), a)
    if a_ids is not None:
        check_tensor("a_ids", a_ids, (torch.int64,), (a.shape[0],), a)
    if b_ids is not None:
        check_tensor("b_ids", b_ids, (torch.int64,), (n,), a)
    if b is not None and (a_ids is None) != (b_ids is None):
        raise ValueError(f"{'b' if b_ids is None else 'a'}_ids: expected ids for both sides, got None")
    if pairs not in ("different", "same"):
        raise ValueError(f"pairs: expected 'different' or 'same', got {pairs!r}")
    if pairs == "same" and a_ids is None:
        raise ValueError("pairs: 'same' expects a_ids (and b_ids when b is given), got None")
    return scalar("scale", scale, a)
