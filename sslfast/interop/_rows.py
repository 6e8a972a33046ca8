"""What the drop-ins share: rows of unit length, their products, and rows of all processes."""

import torch
from torch import Tensor, distributed
from torch.nn import functional as F


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


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


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, of as many each. A row's gradient is the sum of those of all processes."""
    if processes()[1] == 1:
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x.contiguous()))


@torch.no_grad()
def gathered_constant(x: Tensor) -> Tensor:
    """The same without a gradient."""
    size = processes()[1]
    if size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)
