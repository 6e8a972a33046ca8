"""sinkhorn_pass: sums along the rows or columns of a matrix of scaled exponentials that is never stored.

t_ik = scale x_ik + v_k + u_i;  over "classes": log sum_k exp t_ik,  over "rows": log sum_i exp t_ik,
over "none": exp t_ik
"""

import torch
from torch import Tensor

from sslfast import _C
from sslfast.ops import _backend
from sslfast.ops._check import working_dtype
from sslfast.ops._library import define


def reference(logits: Tensor, v: Tensor | None, u: Tensor | None, scale: float, over: str) -> Tensor:
    """Plain PyTorch."""
    t = logits.to(working_dtype(logits)) * scale
    t = t if v is None else t + v
    t = t if u is None else t + u[:, None]
    return t.exp() if over == "none" else t.logsumexp(1 if over == "classes" else 0)


def _shape(logits: Tensor, over: str) -> tuple[int, ...]:
    rows, classes = logits.shape
    return {"classes": (rows,), "rows": (classes,), "none": (rows, classes)}[over]


def _cpu(logits: Tensor, v: Tensor | None, u: Tensor | None, scale: float, over: str) -> Tensor:
    (rows, classes), work, device = logits.shape, working_dtype(logits), logits.device
    out = logits.new_empty(_shape(logits, over), dtype=work)
    at, strides = _backend.strided("logits", logits, logits.dtype, (rows, classes), device)
    _C.sinkhorn(
        over, rows, classes, (at, strides[0], 1 if classes == 1 else strides[1]),
        _backend.CODES[logits.dtype], scale,
        _backend.pointer("v", v, work, (classes,), device), _backend.pointer("u", u, work, (rows,), device),
        _backend.pointer("out", out, work, out.shape, device), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _triton(logits: Tensor, v: Tensor | None, u: Tensor | None, scale: float, over: str) -> Tensor:
    from sslfast.kernels import sinkhorn as kernels

    (rows, classes), work, device = logits.shape, working_dtype(logits), logits.device
    _backend.pointer("v", v, work, (classes,), device)
    _backend.pointer("u", u, work, (rows,), device)
    with _backend.device_of(logits):
        return kernels.launch(logits, v, u, scale, over)


def _triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "it has no kernel for torch.float64"
    return _backend.triton_refuses(device)


_backend.register("sinkhorn_pass", "cpu", _backend.Backend(_cpu, None, _backend.cpu_refuses))
_backend.register("sinkhorn_pass", "triton", _backend.Backend(_triton, None, _triton_refuses))


def _serve(logits, v, u, scale, over, backend):
    return _backend.implementation("sinkhorn_pass", backend).forward(logits, v, u, scale, over)


_op = define(
    "sinkhorn_pass(Tensor logits, Tensor? v, Tensor? u, float scale, str over, str backend) -> Tensor",
    _serve,
    lambda logits, v, u, scale, over, backend: logits.new_empty(
        _shape(logits, over), dtype=working_dtype(logits)
    ),
)


@torch.no_grad()
def sinkhorn_pass(logits: Tensor, v: Tensor | None, u: Tensor | None, scale: float, over: str) -> Tensor:
    """One pass over the logits.

    Args:
        logits: [R, K] of any floating dtype.
        v, u: [K], [R] of the working dtype, natural logarithms of what classes and rows are scaled by.
        scale: factor of the logits.
        over: "classes", "rows" or "none": what is summed over.

    Returns:
        [R], [K] or [R, K] of the working dtype; it carries no gradient. An empty sum is -inf.
    """
    backend = _backend.resolve("sinkhorn_pass", logits.device, logits.dtype)
    if backend == "reference":
        return reference(logits, v, u, scale, over)
    if not len(logits):
        return logits.new_full(_shape(logits, over), -torch.inf, dtype=working_dtype(logits))
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    return _op(logits, v, u, float(scale), over, backend)
