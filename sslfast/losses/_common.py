"""What the losses share: checks of their arguments, and the steps between an op and a reduction."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sslfast.distributed import _sharded as sharded
from sslfast.distributed._ranks import ALONE, Ranks
from sslfast.ops._check import FLOATS, check_choice, check_tensor, number, working_dtype
from sslfast.ops.pair_rows import EPS

REDUCTIONS = ("mean", "sum", "none")


def check_sides(name1: str, x: Tensor, name2: str, y: Tensor) -> int:
    check_tensor(name1, x, FLOATS, (None, None))
    check_tensor(name2, y, like_dtypes(x), tuple(x.shape), x)
    return x.shape[0]


def like_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """Dtypes of what is compared with x: its own, and under autocast those that it casts."""
    casts = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return tuple(dtype for dtype in FLOATS if dtype != torch.float64) if casts else (x.dtype,)


def view_stack(name: str, views: Tensor | Sequence[Tensor], fewest: int) -> Tensor:
    """[V, N, D] of at least `fewest` views, from such a tensor or a sequence of [N, D]."""
    if isinstance(views, Tensor):
        check_tensor(name, views, FLOATS, (None, None, None))
    elif isinstance(views, Sequence):
        for i, x in enumerate(views):
            check_tensor(f"{name}[{i}]", x, FLOATS, (None, None))
            check_tensor(f"{name}[{i}]", x, (views[0].dtype,), tuple(views[0].shape), views[0])
    else:
        raise TypeError(f"{name}: expected a tensor or a sequence of tensors, got {type(views).__name__}")
    if len(views) < fewest:
        raise ValueError(f"{name}: expected at least {fewest} views, got {len(views)}")
    return views if isinstance(views, Tensor) else torch.stack(tuple(views))


def check_reduction(reduction: str) -> None:
    check_choice("reduction", reduction, REDUCTIONS)


def check_share(name: str, value: float) -> None:
    if not 0 <= number(name, value) < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")


def compare_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which rows are compared: autocast's for what it would cast, otherwise the input's."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40)  # beyond it log(1 + e^x) is x to the last bit of a float64


def minus(x: Tensor, y: Tensor, scale: Tensor | float) -> Tensor:
    return x - scale * y if isinstance(scale, Tensor) else torch.sub(x, y, alpha=scale)


def halves(z: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of z that were made of x, and those of y; constants where x or y asks for no gradient."""
    one, other = z[: len(x)], z[len(x) :]
    return one if x.requires_grad else one.detach(), other if y.requires_grad else other.detach()


def normalized(x: Tensor, dtype: torch.dtype) -> Tensor:
    return F.normalize(x.to(working_dtype(x)), dim=-1, eps=EPS).to(dtype)


def reduced(terms: Tensor, reduction: str, weights: Tensor | None = None, ranks: Ranks = ALONE) -> Tensor:
    """The terms of this process, or their sum or mean over those of all processes."""
    if weights is not None:
        weights = weights.to(terms.dtype)
        terms = terms * weights
    if reduction == "none":
        return terms
    if reduction == "mean" and weights is None and ranks is ALONE:
        return terms.mean()
    total = ranks.total(terms.sum())
    if reduction == "sum":
        return total
    return total / (ranks.count(terms.numel()) if weights is None else ranks.total(weights.sum()))


def groups_of(ids: Tensor) -> tuple[Tensor, Tensor]:
    """For each row a number in [0, N) that its id alone has, and how many rows are of that id: int64 [N]
    each."""
    ids = ids.contiguous()
    group = torch.searchsorted(ids.sort().values, ids)
    return group, torch.zeros_like(ids).index_add(0, group, torch.ones_like(ids))[group]


def sums_by_id(ids: Tensor, x: Tensor, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    """For each row of x [N, D], the sum of all rows of its id [N, D], on all processes, and how many they are
    [N].

    Deterministic, and so is its gradient: on a GPU index_put sorts before it adds, index_add does not.
    """
    if ranks is not ALONE:
        return sharded.sums_by_id(ranks, ids, x)
    group, size = groups_of(ids)
    zeros = torch.zeros_like(x)
    sums = zeros.index_put((group,), x, accumulate=True) if x.is_cuda else zeros.index_add(0, group, x)
    return rows_at(sums, group), size


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """x[index], whose gradient is deterministic on a GPU and not slow on a CPU."""
    return x[index] if x.is_cuda else x.index_select(0, index)
