"""Losses of a student against a momentum teacher: BYOL, MoCo and its queue of keys."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast.distributed import _sharded as sharded
from sslfast.distributed._join import Group, across, collective, join
from sslfast.losses._common import (
    check_reduction,
    check_sides,
    compare_dtype,
    minus,
    normalized,
    reduced,
    softplus,
)
from sslfast.losses.contrastive import info_nce_loss
from sslfast.ops import similarity_lse
from sslfast.ops._check import FLOATS, check_temperature, check_tensor, inverse_temperature, working_dtype
from sslfast.ops.pair_rows import pair_rows

NEAREST_CHUNK = 1 << 22  # products at a time


def byol_loss(prediction: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """BYOL's regression (Grill et al. 2020): the squared distance of unit vectors, 2 - 2 cos, from 0 to 4.

    The paper adds both directions: byol_loss(p1, z2) + byol_loss(p2, z1).

    Args:
        prediction, target: [N, D] floating, row i of both from image i. The target gets no gradient.
        reduction: "mean", "sum", or "none": [N].

    Returns:
        float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.
    """
    check_sides("prediction", prediction, "target", target)
    check_reduction(reduction)
    _, cosine = pair_rows(prediction, target.detach(), True, working_dtype(prediction))
    return reduced(2 - 2 * cosine, reduction)


@collective
def moco_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: Tensor | float = 0.2,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    scaling: str = "ddp",
) -> Tensor:
    """MoCo's InfoNCE (He et al. 2020): query i against key i as its positive and a queue of older keys.

    The query alone gets a gradient. It does not look at the queue again in its backward pass, so that new
    keys may be enqueued right after the loss.

    Args:
        query, key: [N, D] floating, row i of both from image i.
        queue: [K, D] floating: the negatives of all queries, such as `KeyQueue.keys`.
        temperature: number or 0-d tensor, of either sign, not 0; a tensor gets a gradient.
        normalize: compare by cosine (norms in float32), otherwise by dot product; with rows that are of unit
            length already, False saves a pass over the queue.
        reduction: "mean", "sum", or "none": [N].
        group, scaling: processes over whose queries the sum or mean goes, as in `sslfast.distributed`; the
            negatives are those of the queue, which `KeyQueue.enqueue` fills from all processes. Nothing else
            travels, whatever the strategy.

    Returns:
        float32 (float64 for float64 input). With an empty queue the loss is 0.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.
    """
    check_sides("query", query, "key", key)
    check_tensor("queue", queue, FLOATS, (None, query.shape[1]), query)
    scale = inverse_temperature("temperature", temperature, query)
    check_reduction(reduction)
    ranks = join(group, strategy, scaling, "query", len(query))
    dtype = compare_dtype(query)
    z, positive = pair_rows(query, key.detach(), normalize, dtype)
    queue = queue.detach()
    negatives = similarity_lse(
        z[: len(query)], normalized(queue, dtype) if normalize else queue.to(dtype), scale=scale
    )
    return reduced(softplus(minus(negatives, positive, scale)), reduction, ranks=ranks)


@collective
def nnclr_loss(
    nearest: Tensor,
    prediction: Tensor,
    temperature: Tensor | float = 0.1,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    scaling: str = "ddp",
) -> Tensor:
    """NNCLR's InfoNCE (Dwibedi et al. 2021): the nearest neighbour of image i's one view against predictions.

    The prediction of image i's other view is the positive, those of the other images are the negatives. The
    paper averages both directions. `KeyQueue.nearest` finds neighbours.

    Args:
        nearest, prediction: [N, D] floating, row i of both from image i.
        temperature: number or 0-d tensor, of either sign, not 0.
        normalize: compare by cosine (norms in float32), otherwise by dot product.
        reduction: "mean", "sum", or "none": [N].
        group, strategy, scaling: processes whose rows are each other's negatives; see `sslfast.distributed`.

    Returns:
        float32 (float64 for float64 input). One image alone has loss 0; an empty batch a mean of NaN.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.
    """
    check_sides("nearest", nearest, "prediction", prediction)
    return info_nce_loss(
        nearest, prediction, temperature=temperature, normalize=normalize, reduction=reduction, group=group,
        strategy=strategy, scaling=scaling,
    )  # fmt: skip


class KeyQueue(nn.Module):
    """The most recent keys, the negatives of MoCo (He et al. 2020), of NNCLR and of a memory bank.

    It begins with random directions. Nothing is read by the host, and all state is in buffers.

    Args:
        size: K, how many keys it holds; need not be a multiple of the batch.
        dim: D, their features.
        normalize: bring keys to unit length (in float32) as they come.

    Attributes:
        keys: [K, D] float32, in no order that matters.
        pointer: 0-d int64, the row of the oldest key.

    Raises:
        ValueError: a size or dim below 1.
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, *, normalize: bool = True) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        self.normalize = normalize
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    @collective
    def enqueue(self, keys: Tensor, *, group: Group = None) -> None:
        """Replaces the oldest keys by `keys` [B, D] floating; of more than K, the last K stay.

        group: processes whose keys enter every one's queue, in order of their ranks.

        Raises:
            TypeError, ValueError: not such a tensor, or on another device; the message names it.
        """
        size, dim = self.keys.shape
        check_tensor("keys", keys, FLOATS, (None, dim), self.keys)
        ranks = join(group, "gather", "sum", "keys", len(keys))
        keys = sharded.gathered(ranks, keys)
        batch, kept = len(keys), keys[-size:]
        if self.normalize:
            kept = normalized(kept, self.keys.dtype)
        rows = (self.pointer + torch.arange(batch - len(kept), batch, device=keys.device)) % size
        self.keys.index_copy_(0, rows, kept.to(self.keys.dtype))
        self.pointer.add_(batch).remainder_(size)

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """The key with the largest product with each row of x [B, D] floating, in its dtype: NNCLR's
        neighbours [B, D].

        Raises:
            TypeError, ValueError: not such a tensor, or on another device; the message names it.
        """
        size, dim = self.keys.shape
        check_tensor("x", x, FLOATS, (None, dim), self.keys)
        with torch.autocast(x.device.type, enabled=False):
            found = [
                (rows @ self.keys.T).argmax(1)
                for rows in x.to(self.keys.dtype).split(max(1, NEAREST_CHUNK // size))
            ]
        return self.keys[torch.cat(found)].to(x.dtype)

    def extra_repr(self) -> str:
        return f"size={self.keys.shape[0]}, dim={self.keys.shape[1]}, normalize={self.normalize}"


class BYOLLoss(nn.Module):
    """`byol_loss` as a module."""

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return byol_loss(prediction, target, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class MoCoLoss(nn.Module):
    """`moco_loss` as a module; a temperature given as nn.Parameter is trained with the rest."""

    def __init__(
        self,
        temperature: Tensor | float = 0.2,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        scaling: str = "ddp",
    ) -> None:
        super().__init__()
        check_temperature("temperature", temperature)
        check_reduction(reduction)
        self.temperature, self.normalize, self.reduction = temperature, normalize, reduction
        self.across = across(group, strategy, scaling)

    def forward(self, query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        return moco_loss(
            query, key, queue, self.temperature, normalize=self.normalize, reduction=self.reduction,
            **self.across,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, normalize={self.normalize}, reduction={self.reduction!r}"
