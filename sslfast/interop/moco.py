"""MoCo's queue as facebookresearch/moco keeps it, [D, K], and the loss against it; nothing to install.

loss = contrastive_loss(q, k, self.queue.queue, self.T)  # instead of logits, labels and CrossEntropyLoss
self.queue.enqueue(k)
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast.interop._rows import gathered_constant, positions, products, softplus
from sslfast.ops import similarity_lse

PACKAGE = None


def contrastive_loss(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.07) -> Tensor:
    """Cross-entropy of each query's key against a queue, in memory linear in N and K.

    The loss of MoCo's logits [l_pos, l_neg] / T and labels 0. New keys may be enqueued before the backward
    pass; the queue is not cloned.

    Args:
        query: [N, D] of unit length.
        key: [N, D] of unit length, row i of both from image i; has no gradient.
        queue: [D, K], columns of unit length; has no gradient.
        temperature: number, not 0.

    Returns:
        0-d float32 (float64 for float64 input).
    """
    scale = 1 / temperature
    negatives = similarity_lse(query, queue.detach().T.to(query.dtype), scale=scale)
    return softplus(negatives - scale * products(query, key.detach())).mean()


class MoCoQueue(nn.Module):
    """The buffers queue [dim, K] and queue_ptr [1] of MoCo's checkpoints.

    Args:
        dim: D, features of a key.
        K: keys, a multiple of the batch of all processes.
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, dim: int = 128, K: int = 65536) -> None:
        super().__init__()
        self.K = K
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replaces the oldest keys by `keys` [B, D] of all processes. No host reads the pointer.

        Raises:
            AssertionError: K is no multiple of the number of keys.
        """
        keys = gathered_constant(keys)
        assert self.K % len(keys) == 0, f"keys: expected a divisor of {self.K} of them, got {len(keys)}"
        columns = (self.queue_ptr + positions(keys)) % self.K
        self.queue.index_copy_(1, columns, keys.T.to(self.queue.dtype))
        self.queue_ptr.add_(len(keys)).remainder_(self.K)

    _dequeue_and_enqueue = enqueue
