"""Triton kernel of `ema_update_`: t <- m t + (1 - m) s over a table of addresses, one program per segment."""

import torch
import triton
import triton.language as tl
from sslfast.kernels import tuning
from sslfast.kernels.similarity_lse_rows import _to

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


@triton.jit
def _block(target, source, at, mask, keep, take, WORK: tl.constexpr):
    t_at = target + at
    t = tl.load(t_at, mask).to(WORK)
    s = tl.load(source + at, mask).to(WORK)
    new = tl.where(take < 0.5, t + take * (s - t), s - keep * (s - t))  # exact for m = 1 and m = 0
    narrow: tl.constexpr = target.dtype.element_ty
    if narrow != WORK and WORK == tl.float64:
        new = new.to(tl.float32)
    tl.store(t_at, _to(new, narrow) if narrow != WORK else new, mask)


@triton.jit
def ema_update(
    table_ptr,
    momentum_ptr,
    momentum_bits,
    TARGET: tl.constexpr,
    SOURCE: tl.constexpr,
    WORK: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of the table [segments, 3] int64 are addresses of target and source, and how many elements."""
    if ON_DEVICE:
        momentum = tl.load(momentum_ptr).to(tl.float64)
    else:
        momentum = momentum_bits.to(tl.int64).to(tl.float64, bitcast=True)
    keep, take = momentum.to(WORK), (1.0 - momentum).to(WORK)
    row = table_ptr + 3 * tl.program_id(0).to(tl.int64)
    target_at, source_at, count = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    target, source = target_at.to(tl.pointer_type(TARGET)), source_at.to(tl.pointer_type(SOURCE))
    k = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    if (target_at | source_at) % 16 == 0:
        aligned_target, aligned_source = tl.multiple_of(target, 16), tl.multiple_of(source, 16)
        for first in range(0, whole, BLOCK):
            _block(aligned_target, aligned_source, first + k, None, keep, take, WORK)
    else:
        for first in range(0, whole, BLOCK):
            _block(target, source, first + k, None, keep, take, WORK)
    if whole < count:
        _block(target, source, whole + k, whole + k < count, keep, take, WORK)


def launch(
    table: torch.Tensor,
    target: torch.dtype,
    source: torch.dtype,
    momentum_bits: int,
    momentum: torch.Tensor | None,
) -> None:
    """table: [segments, 3] int64. The momentum is a float64's bits or, where given, a 0-d device tensor."""
    work = tl.float64 if torch.float64 in (target, source) else tl.float32
    ema_update[(len(table),)](
        table, momentum if momentum is not None else table, momentum_bits,
        DTYPES[target], DTYPES[source], work, momentum is not None, tuning.EMA_BLOCK, num_warps=4,
    )  # fmt: skip
