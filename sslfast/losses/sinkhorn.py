"""Sinkhorn-Knopp: assignments of images to prototypes that use every prototype equally (SwAV, DINOv2)."""

import torch
from torch import Tensor, distributed

from sslfast.ops._check import (
    FLOATS,
    check_integer,
    check_temperature,
    check_tensor,
    number,
    working_dtype,
)
from sslfast.ops.similarity_lse import similarity_lse
from sslfast.ops.sinkhorn import sinkhorn_pass


@torch.no_grad()
def sinkhorn_center(
    teacher_logits: Tensor,
    temperature: float,
    iterations: int = 3,
    *,
    prototypes: Tensor | None = None,
    group: distributed.ProcessGroup | None = None,
) -> Tensor:
    """The centre with which a softmax is Sinkhorn-Knopp's assignment.

    The last step of an iteration makes each row sum to 1, so the result is a softmax of what the steps
    before have added to each prototype: sinkhorn_knopp(x, t) = softmax((x - sinkhorn_center(x, t)) / t).
    `dino_loss` and `dino_head_loss` take it as `center`, and no matrix of assignments is ever stored.

    Args, errors: as `sinkhorn_knopp`.
        prototypes: [K, D]; with them teacher_logits are features [R, D], whose logits are never made.

    Returns:
        [K], float32 (float64 for float64 logits).
    """
    v, _ = _balance(teacher_logits, temperature, iterations, prototypes, group)
    return v * -float(temperature)


@torch.no_grad()
def sinkhorn_knopp(
    teacher_logits: Tensor,
    temperature: float,
    iterations: int = 3,
    *,
    group: distributed.ProcessGroup | None = None,
) -> Tensor:
    """Sinkhorn-Knopp's assignments, as DINOv2 (Oquab et al. 2023) takes its targets.

    exp(logits / temperature), scaled in turns so that all prototypes have equal sums over the rows, of all
    processes where torch.distributed runs, and each row sums to 1. Scaling factors are kept as logarithms, so
    no temperature overflows; logits with contiguous classes are read twice per iteration and never copied.

    Args:
        teacher_logits: [R, K] of any floating dtype. They carry no gradient. Processes may have different R.
        temperature: a number other than 0.
        iterations: at least 1.
        group: processes whose rows are balanced together; None: all.

    Returns:
        [R, K], float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
    """
    v, u = _balance(teacher_logits, temperature, iterations, None, group)
    return sinkhorn_pass(teacher_logits, v, u, 1.0 / temperature, "none")


def _balance(
    logits: Tensor,
    temperature: float,
    iterations: int,
    prototypes: Tensor | None,
    group: distributed.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """(v [K], u [R]): logarithms of what prototypes and rows are scaled by."""
    check_tensor("teacher_logits", logits, FLOATS, (None, None))
    check_temperature("temperature", number("temperature", temperature))
    check_integer("iterations", iterations, 1)
    if prototypes is None:
        classes = logits.shape[1]
    else:
        check_tensor("prototypes", prototypes, FLOATS, (None, logits.shape[1]), logits)
        prototypes, classes = prototypes.to(logits.dtype), len(prototypes)
    if not classes:
        raise ValueError(f"teacher_logits: expected at least one prototype, got shape {list(logits.shape)}")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    scale = 1.0 / temperature
    v, u = logits.new_zeros(classes, dtype=working_dtype(logits)), None
    for _ in range(iterations):
        if prototypes is None:
            v = -_all_processes(sinkhorn_pass(logits, None, u, scale, "rows"), group)
            u = -sinkhorn_pass(logits, v, None, scale, "classes")
        else:
            v = -_all_processes(similarity_lse(prototypes, logits, scale=scale, bias=u), group)
            u = -similarity_lse(logits, prototypes, scale=scale, bias=v)
    assert u is not None
    return v, u


def _all_processes(lse: Tensor, group: distributed.ProcessGroup | None) -> Tensor:
    """Log-sum-exps [K] of each process's rows -> of all rows."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return lse
    top = lse.clone()
    distributed.all_reduce(top, distributed.ReduceOp.MAX, group=group)
    total = torch.where(top == -torch.inf, 1.0, (lse - top).exp())
    distributed.all_reduce(total, group=group)
    return top + total.log()
