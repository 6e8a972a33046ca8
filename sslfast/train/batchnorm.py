"""BatchNorm over the batches of all processes, and over parts of one: that of MoCo's keys does not tell them
which query is theirs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sslfast.train.processes import gathered, processes, rank


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


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the rows of all processes, of which each may have any number; torch's own does the same
    for GPUs alone. In evaluation mode it is BatchNorm, and nothing is sent."""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"x: expected [N, C, ...], got shape {list(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, variance, rows = _normalized(x, self.weight, self.bias, self.eps)
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                unbiased = variance * (rows / (rows - 1))
                for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
                    running.copy_((1 - share) * running + share * batch)
        return y


@torch.compiler.disable  # what waits for other processes is not compiled
def _normalized(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    """(y, mean [C], variance [C] over n, rows n) of all processes."""
    return _Normalize.apply(x, weight, bias, eps)


class _Normalize(torch.autograd.Function):
    """y = z weight + bias with z = (x - mean) / sqrt(variance + eps), for x [N, C, ...].

    dx = weight / sqrt(variance + eps) (dy - sum(dy) / n - z sum(z dy) / n), with sums over the n rows of all
    processes; dweight = sum(z dy) and dbias = sum(dy) are of this one's, as gradients are averaged later.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dims, own = [d for d in range(x.dim()) if d != 1], x.numel() // x.shape[1]
        mean = wide.sum(dims) / max(own, 1)
        squares = (wide - _by_channel(mean, x)).square().sum(dims)
        parts = gathered(torch.cat((mean, squares, mean.new_full((1,), own)))[None])  # of every process
        means, squares, counts = parts.split((len(mean), len(mean), 1), dim=1)
        rows = counts.sum()
        mean = (counts * means).sum(0) / rows
        # squared deviations from the mean of all are those from each one's own, and those of the own ones
        variance = (squares + counts * (means - mean).square()).sum(0) / rows
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, rows)
        z = (wide - _by_channel(mean, x)) * _by_channel(scale, x)
        ctx.mark_non_differentiable(mean, variance, rows)
        y = z if weight is None else z * _by_channel(weight, x) + _by_channel(bias, x)
        return y.to(x.dtype), mean, variance, rows

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        x, weight, mean, scale, rows = ctx.saved_tensors
        dims, kind = [d for d in range(x.dim()) if d != 1], dy.dtype
        z, dy = (x.to(mean.dtype) - _by_channel(mean, x)) * _by_channel(scale, x), dy.to(mean.dtype)
        dbias, dweight = dy.sum(dims), (z * dy).sum(dims)
        sums = torch.stack((dbias, dweight))
        if processes() > 1:
            dist.all_reduce(sums)
        sums = sums / rows
        dx = dy - _by_channel(sums[0], x) - z * _by_channel(sums[1], x)
        dx = (dx * _by_channel(scale if weight is None else scale * weight, x)).to(kind)
        return (dx, None, None, None) if weight is None else (dx, dweight.to(weight), dbias.to(weight), None)


def _by_channel(x: Tensor, like: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ...]"""
    return x.view(1, -1, *[1] * (like.dim() - 2))


def synchronize(module: nn.Module, kind: type = SyncBatchNorm) -> nn.Module:
    """The module with `kind`, or torch.nn.SyncBatchNorm, instead of each BatchNorm, on the same parameters
    and statistics.

    Raises:
        ValueError: a BatchNorm of another library, which may do more than normalise.
    """
    for name, child in module.named_children():
        if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            options = child.eps, child.momentum, child.affine, child.track_running_stats
            sync = kind(child.num_features, *options)
            sync._parameters, sync._buffers = child._parameters, child._buffers
            setattr(module, name, sync.train(child.training))
        elif isinstance(child, nn.modules.batchnorm._BatchNorm) and type(child) is not kind:
            raise ValueError(
                f"sync_batchnorm: expected a BatchNorm of torch, got {type(child).__name__}; "
                f"--no-sync-batchnorm leaves it to each process alone"
            )
        else:
            synchronize(child, kind)
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
    own = slice(batch * rank(), batch * (rank() + 1))
    encoded = encode(gathered(images)[order[own]])
    return gathered(encoded)[order.argsort()[own]]


@torch.compiler.disable  # torch 2.13 fails to compile images[torch.randperm(n)]
def _permutation(n: int, device: torch.device) -> Tensor:
    return torch.randperm(n, device=device)
