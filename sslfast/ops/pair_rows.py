"""pair_rows: how a loss over positive pairs starts: both sides' rows, normalised, and each pair's similarity.

    z_s = x_s / max(|x_s|, eps)          positive_i = <z_0i, z_1i>
    g_s = dz_s + dpositive z_(1-s)       dx_s = (g_s - z_s <g_s, z_s>) / |x_s|

An internal op: a few memory passes and autograd nodes fewer for every loss. C++ serves float32 and float64 on
the CPU; PyTorch serves the rest.
"""

import torch
from torch import Tensor

from sslfast import _C
from sslfast.ops import _backend
from sslfast.ops._check import working_dtype
from sslfast.ops._library import define, once_differentiable

EPS = 1e-12  # as torch.nn.functional.normalize; float16 could not hold it, hence norms in float32

_KERNELS = {
    torch.float32: (_C.pair_rows_fwd_f32, _C.pair_rows_bwd_f32),
    torch.float64: (_C.pair_rows_fwd_f64, _C.pair_rows_bwd_f64),
}


def reference(x: Tensor, y: Tensor, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, differentiable to any order: specification, test truth and benchmark baseline."""
    work = working_dtype(x)
    z = torch.cat((x, y))
    if normalize:
        z = torch.nn.functional.normalize(z.to(work), dim=1, eps=EPS)
    z = z.to(dtype)
    left, right = z.to(work).chunk(2)
    return z, (left * right).sum(1)


def _forward(x, y, normalize):
    n, d = x.shape
    x, y = x.contiguous(), y.contiguous()
    z, norm, positive = x.new_empty(2 * n, d), x.new_empty(2 * n if normalize else 0), x.new_empty(n)

    def at(name: str, t: Tensor, *shape: int) -> int:
        return _backend.pointer(name, t, x.dtype, shape, x.device)

    _KERNELS[x.dtype][0](
        n, d, at("x", x, n, d), at("y", y, n, d), at("z", z, 2 * n, d),
        at("norm", norm, 2 * n) if normalize else 0, at("positive", positive, n),
        EPS, torch.get_num_threads(),
    )  # fmt: skip
    return z, positive, norm


def _forward_fake(x, y, normalize):
    n, d = x.shape
    return x.new_empty(2 * n, d), x.new_empty(n), x.new_empty(2 * n if normalize else 0)


def _backward(dz, dpositive, z, norm):
    n, d = z.shape[0] // 2, z.shape[1]
    dz, dpositive, z = dz.contiguous(), dpositive.contiguous(), z.contiguous()
    dx, dy = z.new_empty(n, d), z.new_empty(n, d)

    def at(name: str, t: Tensor, *shape: int) -> int:
        return _backend.pointer(name, t, z.dtype, shape, z.device)

    _KERNELS[z.dtype][1](
        n, d, at("dz", dz, 2 * n, d), at("dpositive", dpositive, n), at("z", z, 2 * n, d),
        at("norm", norm, 2 * n) if len(norm) else 0,
        at("dx", dx, n, d), at("dy", dy, n, d), EPS, torch.get_num_threads(),
    )  # fmt: skip
    return dx, dy


def _backward_fake(dz, dpositive, z, norm):
    n, d = z.shape[0] // 2, z.shape[1]
    return z.new_empty(n, d), z.new_empty(n, d)


_fwd = define(
    "pair_rows_fwd(Tensor x, Tensor y, bool normalize) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    devices=("CPU",),
)
_bwd = define(
    "pair_rows_bwd(Tensor dz, Tensor dpositive, Tensor z, Tensor norm) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    devices=("CPU",),
)


class _PairRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, normalize):
        z, positive, norm = _fwd(x, y, normalize)
        ctx.save_for_backward(z, norm)
        return z, positive

    @staticmethod
    @once_differentiable
    def backward(ctx, dz, dpositive):
        return *_bwd(dz, dpositive, *ctx.saved_tensors), None


def pair_rows(x: Tensor, y: Tensor, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of both sides as one tensor, and the similarity of each positive pair. The caller has checked x
    and y.

    Args:
        x, y: [N, D] of one floating dtype and device.
        normalize: divide each row by its L2 norm, computed in float32 (float64 for float64).
        dtype: of z.

    Returns:
        z [2N, D], x above y, rounded to `dtype`, and positive [N], float32 (float64 for float64).
    """
    served = x.device.type == "cpu" and x.dtype in _KERNELS and x.dtype == dtype
    if served and _backend.forced() in (None, "cpu"):
        if y is x and torch.compiler.is_compiling():  # torch.compile takes no tensor twice
            y = y.view_as(y)
        return _PairRows.apply(x, y, normalize)
    return reference(x, y, normalize, dtype)
