"""Keys of MoCo: BatchNorm that does not tell them which query is theirs, and those of other processes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over each of `splits` parts of a batch alone, as on so many GPUs; running statistics are the
    parts' mean. In evaluation mode it is BatchNorm."""

    def __init__(self, num_features: int, splits: int, **options) -> None:
        super().__init__(num_features, **options)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None  # see split_batchnorm
        assert self.num_batches_tracked is not None and self.momentum is not None
        parts = x.tensor_split(min(self.splits, len(x)))
        means, variances = (s.expand(len(parts), -1).clone() for s in (self.running_mean, self.running_var))
        out = [
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            for part, mean, variance in zip(parts, means, variances, strict=True)
        ]
        with torch.no_grad():
            self.running_mean.copy_(means.mean(0))
            self.running_var.copy_(variances.mean(0))
            self.num_batches_tracked.add_(1)
        return torch.cat(out)


def split_batchnorm(module: nn.Module, splits: int) -> nn.Module:
    """The module with SplitBatchNorm2d instead of each BatchNorm2d, on the same parameters and statistics."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d and child.track_running_stats and child.momentum is not None:
            split = SplitBatchNorm2d(child.num_features, splits, eps=child.eps, momentum=child.momentum)
            split._parameters, split._buffers = child._parameters, child._buffers
            split.train(child.training)
            setattr(module, name, split)
        else:
            split_batchnorm(child, splits)
    return module


def shuffled(encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """encode(images), where each BatchNorm batch is a random mixture (ShuffleBN).

    On several processes images change places between all of them, in an order that the first one draws; on
    one process they do within the batch, which matters with SplitBatchNorm2d. All processes have as many.
    """
    batch = len(images)
    order = _permutation(batch * processes(), images.device)
    if processes() == 1:
        return encode(images[order])[order.argsort()]
    dist.broadcast(order, src=0)
    own = slice(batch * dist.get_rank(), batch * (dist.get_rank() + 1))
    encoded = encode(gathered(images)[order[own]])
    return gathered(encoded)[order.argsort()[own]]


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def elsewhere(x: Tensor) -> Tensor | None:
    """The rows that other processes have, without gradients; None where there is no other."""
    if processes() == 1:
        return None
    before = len(x) * dist.get_rank()
    everywhere = gathered(x)
    return torch.cat((everywhere[:before], everywhere[before + len(x) :]))


@torch.compiler.disable  # torch 2.13 fails to compile images[torch.randperm(n)]
def _permutation(n: int, device: torch.device) -> Tensor:
    return torch.randperm(n, device=device)


@torch.no_grad()
def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, which have as many each, in their order; without gradients."""
    if processes() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(processes())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
