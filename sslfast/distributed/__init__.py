"""Losses over the batch of many processes, on torch.distributed (NCCL or Gloo).

Every contrastive loss takes `group`: None, this process alone; "world", all processes where torch.distributed
runs; or a process group. Then rows of all its processes are each other's negatives, and

    after DistributedDataParallel's averaging every parameter, the temperature and the bias have exactly the
    gradient of the single-process loss on the concatenated batch, and the returned value, the same on every
    process, is that loss.

Processes may have different numbers of rows, at least one each, and have to make the same calls. Ids and
labels are compared over all of them, and further negatives [K, D], any number on each, are those of all
queries; a queue of keys is taken to be the same on all, as `KeyQueue.enqueue` with a group keeps it.

scaling: "ddp" for gradients that DistributedDataParallel averages over the group's processes: a process's
are its part of the whole gradient times their number, so everything that is trained, a temperature too, has
to be averaged. "sum" for who adds them up: without that factor. With
reduction="none" each process has the terms of its own rows, and there is no factor: their local mean,
averaged by DistributedDataParallel, is the mean of the batch where all have as many rows.

strategy: "gather" brings all rows to every process, in memory that grows with their number. "ring" passes
them from neighbour to neighbour, in pieces, while the process computes with those it holds: memory as for its
own rows alone. The numbers are the same. "auto" gathers up to 256 MiB of its first argument's rows.

Bytes that each of W processes sends in a ring, for n images of dimension D in e bytes per number (g = 4, or 8
for float64), beside scalars and the 32 bytes in which the processes agree on a call:

                       rows R     forward                       backward
    NT-Xent            2n         (W - 1) R (D e + 8)           (W - 1) R (D e + 8 + 2 g)
    InfoNCE            n          (W - 1) R (D e + 8)           (W - 1) R (D e + 8 + D g)
    symmetric, CLIP    n          (W - 1) R (D e + 8 + g)       (W - 1) R (D e + 8 + 2 g + D g)
    SigLIP             n          (W - 1) R (D e + 8 + D g)     0

Without a gradient to columns their D g is not sent. A gather's backward pass has the features and ids
already, (W - 1) R (D e + 8) less, and its log-sum-exps of columns take 3 g instead of g.

Before a call its arguments are compared, from host to host, without waiting for a device. What one process
alone finds wrong, be it a type, a dimension or an option that differs, no rows, or (on a CPU, or with
SSLFAST_CHECK=1) a number that is not finite (NonFiniteError, a ValueError), is the same error on all of them.
"""

from torch import Tensor

from sslfast.distributed import _sharded
from sslfast.distributed._join import Group, NonFiniteError, collective, join
from sslfast.distributed._ranks import bytes_sent, world

__all__ = ["NonFiniteError", "bytes_sent", "gather", "world"]


@collective
def gather(x: Tensor, *, group: Group = "world") -> Tensor:
    """The rows of all processes, [n, ...] of each, in order of their ranks, for losses of one's own.

    A row's gradient is the sum of those that all processes have for it, so that a loss of which every process
    computes a part, and they add these parts up, has its gradient. All processes have to run backward.

    Raises:
        TypeError, ValueError: on all processes alike, where dimensions other than the first differ, or one
            has no rows.
    """
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise TypeError(f"x: expected a tensor [n, ...], got {type(x).__name__}")
    return _sharded.gathered(join(group, "gather", "sum", "x", len(x)), x)
