"""hardest_pairs: each row's farthest row of its own group and nearest of another, without the distances.

    |x_i - x_j|^2 = |x_i|^2 - 2 (<x_i, x_j> - |x_j|^2 / 2)

so for a row the order of the distances is that of the scores in parentheses, reversed. An internal op. C++
serves float32 and float64 on the CPU, tile by tile of a matrix product; PyTorch serves the rest in chunks.
"""

import torch
from torch import Tensor

from sslfast import _C
from sslfast.kernels.tuning import cpu_tile
from sslfast.ops import _backend
from sslfast.ops._library import define

CHUNK = 1 << 20  # scores at a time

_KERNELS = {torch.float32: _C.hardest_pairs_f32, torch.float64: _C.hardest_pairs_f64}


def reference(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, in chunks of rows."""
    far, near = torch.empty_like(groups), torch.empty_like(groups)
    offset, step = -0.5 * x.square().sum(1), max(1, CHUNK // max(1, len(x)))
    for begin in range(0, len(x), step):
        rows = slice(begin, begin + step)
        score = torch.addmm(offset, x[rows], x.T)
        same = groups[rows, None] == groups
        near[rows] = score.masked_fill(same, -torch.inf).argmax(1)
        same.diagonal(begin).fill_(False)
        far[rows] = score.masked_fill_(~same, torch.inf).argmin(1)
    return far, near


def _cpu(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    x, (n, _) = x.contiguous(), x.shape
    offset = x.square().sum(1).mul_(-0.5)
    scores = x.new_empty(2, n)
    scores[0], scores[1] = torch.inf, -torch.inf
    found = x.new_zeros(2, n, dtype=torch.int32)
    narrow = groups.to(torch.int32)
    rows, cols = (min(size, n) for size in cpu_tile(x.shape[1]))
    buffer = x.new_empty(rows * cols)
    for r0 in range(0, n, rows):
        for c0 in range(0, n, cols):
            left, right = x[r0 : r0 + rows], x[c0 : c0 + cols]
            tile = buffer[: len(left) * len(right)].view(len(left), len(right))
            torch.mm(left, right.t(), out=tile)
            _KERNELS[x.dtype](
                n, len(left), len(right), r0, c0,
                _backend.pointer("tile", tile, x.dtype, (len(left), len(right)), x.device),
                _backend.pointer("offset", offset, x.dtype, (n,), x.device),
                _backend.pointer("groups", narrow, torch.int32, (n,), x.device),
                _backend.pointer("scores", scores, x.dtype, (2, n), x.device),
                _backend.pointer("found", found, torch.int32, (2, n), x.device), torch.get_num_threads(),
            )  # fmt: skip
    return found[0].long(), found[1].long()


def _serve(x: Tensor, groups: Tensor, forced: str) -> tuple[Tensor, Tensor]:
    served = x.device.type == "cpu" and x.dtype in _KERNELS and forced in ("", "cpu") and len(x)
    return _cpu(x, groups) if served else reference(x, groups)


_op = define(
    "hardest_pairs(Tensor x, Tensor groups, str forced) -> (Tensor, Tensor)",
    _serve,
    lambda x, groups, forced: (torch.empty_like(groups), torch.empty_like(groups)),
)


def hardest_pairs(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the indices (farthest of its group, nearest of another), without gradient.

    Of equal ones any. Where there is no such row, or a distance is NaN, it is some number in [0, N).

    Args:
        x: [N, D] float32 or float64, groups: int64 [N] in [0, N); the caller has checked them.
    """
    return _op(x.detach(), groups, _backend.forced() or "")
