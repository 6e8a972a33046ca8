"""Triton kernels of Sinkhorn's passes over logits: t_ik = scale x_ik + v_k + u_i is formed in registers.

Powers of 2 throughout: `scale`, v and u come multiplied by log2 e, and results are log2 of sums.
"""

import torch
import triton
import triton.language as tl
from sslfast.kernels import tuning

LN2 = 0.6931471805599453


@triton.jit
def over_classes(
    out_ptr, logits_ptr, v_ptr, u_ptr, stride, classes, rate, V: tl.constexpr, U: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out_i = log2 sum_k 2^t_ik; a program for each row."""
    i = tl.program_id(0).to(tl.int64)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for begin in range(0, classes, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        t = tl.load(logits_ptr + i * stride + k, k < classes, 0.0).to(tl.float32) * rate
        if V:
            t += tl.load(v_ptr + k, k < classes, 0.0)
        t = tl.where(k < classes, t, float("-inf"))
        above = tl.maximum(top, tl.max(t, 0))
        base = tl.where(tl.abs(above) == float("inf"), 0.0, above)
        total = total * tl.exp2(tl.where(top == above, 0.0, top - base)) + tl.sum(tl.exp2(t - base), 0)
        top = above
    out = tl.where(tl.abs(top) == float("inf"), top, top + tl.log2(total))
    if U:
        out += tl.load(u_ptr + i)
    tl.store(out_ptr + i, out)


@triton.jit
def over_rows(
    part_ptr, logits_ptr, v_ptr, u_ptr, stride, rows, classes, span, rate, V: tl.constexpr, U: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """part [J, K]: log2 sum_i 2^t_ik over `span` rows each; a program for each such part of some classes."""
    j = tl.program_id(1)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = j.to(tl.int64) * span
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, span, ROWS):
        i = first + begin + tl.arange(0, ROWS)
        inside = (i < rows)[:, None] & (k < classes)[None, :]
        t = tl.load(logits_ptr + i[:, None] * stride + k[None, :], inside, 0.0).to(tl.float32) * rate
        if U:
            t += tl.load(u_ptr + i, i < rows, 0.0)[:, None]
        t = tl.where(inside, t, float("-inf"))
        above = tl.maximum(top, tl.max(t, 0))
        base = tl.where(tl.abs(above) == float("inf"), 0.0, above)
        total = total * tl.exp2(tl.where(top == above, 0.0, top - base)) + tl.sum(
            tl.exp2(t - base[None, :]), 0
        )
        top = above
    out = tl.where(tl.abs(top) == float("inf"), top, top + tl.log2(total))
    if V:
        out += tl.load(v_ptr + k, k < classes, 0.0)
    tl.store(part_ptr + j.to(tl.int64) * classes + k, out, k < classes)


@triton.jit
def fill(
    out_ptr, logits_ptr, v_ptr, u_ptr, stride, classes, blocks, rate, V: tl.constexpr, U: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out_ik = 2^t_ik"""
    program = tl.program_id(0)
    i = (program // blocks).to(tl.int64)
    k = program % blocks * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(logits_ptr + i * stride + k, k < classes, 0.0).to(tl.float32) * rate
    if V:
        t += tl.load(v_ptr + k, k < classes, 0.0)
    if U:
        t += tl.load(u_ptr + i)
    tl.store(out_ptr + i * classes + k, tl.exp2(t), k < classes)


def launch(
    logits: torch.Tensor, v: torch.Tensor | None, u: torch.Tensor | None, scale: float, over: str
) -> torch.Tensor:
    """See `sslfast.ops.sinkhorn`; classes are contiguous, v and u natural logarithms."""
    rows, classes = logits.shape
    log2e = 1 / LN2
    tables = [logits if x is None else x * log2e for x in (v, u)]
    flags = {"V": v is not None, "U": u is not None}
    block = min(tuning.SINKHORN_BLOCK, triton.next_power_of_2(classes))
    if over == "none":
        out = torch.empty(rows, classes, dtype=torch.float32, device=logits.device)
        blocks = triton.cdiv(classes, block)
        fill[(rows * blocks,)](
            out, logits, *tables, logits.stride(0), classes, blocks, scale * log2e, **flags, BLOCK=block
        )
        return out
    if over == "classes":
        out = torch.empty(rows, dtype=torch.float32, device=logits.device)
        over_classes[(rows,)](
            out, logits, *tables, logits.stride(0), classes, scale * log2e, **flags, BLOCK=block
        )
        return out * LN2
    height, width = tuning.SINKHORN_TILE
    span = max(height, triton.cdiv(triton.cdiv(rows, tuning.SINKHORN_PARTS), height) * height)
    parts = triton.cdiv(rows, span)
    part = torch.empty(parts, classes, dtype=torch.float32, device=logits.device)
    over_rows[(triton.cdiv(classes, width), parts)](
        part, logits, *tables, logits.stride(0), rows, classes, span, scale * log2e, **flags, ROWS=height,
        BLOCK=width,
    )  # fmt: skip
    return part[0] * LN2 if parts == 1 else (part * LN2).logsumexp(0)
