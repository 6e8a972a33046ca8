"""What the drop-ins share: rows of unit length, their products, and rows of all processes."""

import torch
from torch import Tensor, distributed
from torch.nn import functional as F


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def check_rows(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raises unless x is [N, D] of floats, as `like` is."""
    for what, y in ((like_name, like), (name, x)):
        if not isinstance(y, Tensor) or not y.is_floating_point():
            got = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"{what}: expected a floating-point tensor, got {got}")
        if y.dim() != 2:
            raise ValueError(f"{what}: expected [N, D], got {list(y.shape)}")
    if x.shape != like.shape:
        raise ValueError(f"{name}: expected {list(like.shape)}, as {like_name} has, got {list(x.shape)}")


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Rows of unit length in x's dtype, their norms in float32 or wider."""
    return F.normalize(wide(x), dim=-1, eps=eps).to(x.dtype)


def products(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i>, in float32 or wider."""
    return (wide(x) * wide(y)).sum(-1)


def softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40)


def combined(sides: list[Tensor]) -> Tensor:
    """Log-sum-exp over the sides of each row; where all are -inf, something as small, without a gradient."""
    return sides[0] if len(sides) == 1 else torch.stack(sides).clamp(min=-1e30).logsumexp(0)


def positions(x: Tensor, first: int = 0) -> Tensor:
    """first, first + 1, ... for each row of x."""
    return torch.arange(first, first + len(x), device=x.device)


def whole_numbers(name: str, *labels: Tensor) -> list[Tensor]:
    """int64 labels that are equal where the given ones, of any dtype, are.

    Raises:
        ValueError: a label is NaN.
    """
    if not any(x.is_floating_point() for x in labels):
        return [x.long() for x in labels]
    every = torch.cat(labels)
    if every.isnan().any():
        raise ValueError(f"{name}: expected no NaN, got some")
    return list(torch.unique(every, return_inverse=True)[1].split([len(x) for x in labels]))


def processes() -> tuple[int, int]:
    """(rank, how many there are)"""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return gathered_constant(x)

    @staticmethod
    def backward(ctx, g):
        rank, size = processes()
        g = g.contiguous().clone()
        distributed.all_reduce(g)
        return g.chunk(size)[rank]


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, of as many each. A row's gradient is the sum of those of all processes."""
    return _Gather.apply(x) if processes()[1] > 1 else x


@torch.no_grad()
def gathered_constant(x: Tensor) -> Tensor:
    """The same without a gradient."""
    size = processes()[1]
    if size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)
