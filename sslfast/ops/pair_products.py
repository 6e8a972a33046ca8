"""pair_products: the products <x_i, y_j> of a list of pairs (i, j).

An internal op in plain PyTorch: the rows of the pairs are gathered a part at a time, so that memory is linear
in their number and does not grow with D.
"""

import torch
from torch import Tensor

from sslfast.ops._check import FLOATS, check_ids, check_tensor, working_dtype
from sslfast.ops._library import define, once_differentiable

PART = 1 << 14  # pairs at a time


def _parts(rows, columns):
    return zip(rows.split(PART), columns.split(PART), strict=True)


def _forward(x, y, rows, columns):
    found = x.new_empty(len(rows))
    for part, (i, j) in zip(found.split(PART), _parts(rows, columns), strict=True):
        torch.sum(x[i] * y[j], 1, out=part)
    return found


def _backward(g, x, y, rows, columns):
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)
    for h, (i, j) in zip(g.split(PART), _parts(rows, columns), strict=True):
        for target, at, source in ((dx, i, y[j]), (dy, j, x[i])):
            if x.is_cuda:  # index_add is not deterministic there
                target.index_put_((at,), h[:, None] * source, accumulate=True)
            else:
                target.index_add_(0, at, h[:, None] * source)
    return dx, dy


_fwd = define(
    "pair_products_fwd(Tensor x, Tensor y, Tensor rows, Tensor columns) -> Tensor",
    _forward,
    lambda x, y, rows, columns: x.new_empty(len(rows)),
)
_bwd = define(
    "pair_products_bwd(Tensor g, Tensor x, Tensor y, Tensor rows, Tensor columns) -> (Tensor, Tensor)",
    _backward,
    lambda g, x, y, *_: (torch.empty_like(x), torch.empty_like(y)),
)


class _PairProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, rows, columns):
        ctx.save_for_backward(x, y, rows, columns)
        return _fwd(x, y, rows, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return *_bwd(g.contiguous(), *ctx.saved_tensors), None, None


def pair_products(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """<x_i, y_j> of pairs (i, j). Differentiable in x and y, once.

    Args:
        x, y: [M, D], [N, D] floating, of one dtype; y may be x.
        rows, columns: int64 [P], in [0, M) and [0, N).

    Returns:
        [P] float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.
    """
    check_tensor("x", x, FLOATS, (None, None))
    check_tensor("y", y, (x.dtype,), (None, x.shape[1]), x)
    check_ids("rows", rows, (None,), len(x), x)
    check_ids("columns", columns, (len(rows),), len(y), x)
    work = working_dtype(x)
    x, y = x.to(work), y.to(work)
    if torch.compiler.is_compiling():  # torch.compile takes no tensor twice
        y = y.view_as(y) if y is x else y
        columns = columns.view_as(columns) if columns is rows else columns
    return _PairProducts.apply(x, y, rows, columns)
