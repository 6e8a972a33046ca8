"""What benchmarks/gpu.py times: each loss in eager PyTorch, torch.compile, sslfast's forms, chunked PyTorch
and the peers that are installed."""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from sslfast.kernels import tuning
from torch import Tensor
from torch.nn import functional as F

import sslfast

TEMPERATURE = {"ntxent": 0.1, "clip": 0.05, "moco": 0.2}


@dataclass(frozen=True)
class Case:
    """ntxent: m pairs; clip: m x m; moco: m queries, n keys in the queue."""

    loss: str
    m: int
    n: int
    d: int
    dtype: str = "bfloat16"

    @property
    def shape(self) -> tuple[int, int]:
        return (2 * self.m, 2 * self.m) if self.loss == "ntxent" else (self.m, self.n)


# Implementations: (loss, rows) to a value. Rows are of unit length, and none normalises them again.


def eager(loss: str, rows: list[Tensor]) -> Tensor:
    t = TEMPERATURE[loss]
    if loss == "ntxent":
        z = torch.cat(rows)
        logits = z @ z.T / t
        logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
        return F.cross_entropy(logits.float(), torch.arange(len(z), device=z.device).roll(len(z) // 2))
    if loss == "clip":
        a, b = rows
        logits, labels = (a @ b.T / t).float(), torch.arange(len(a), device=a.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    q, k, queue = rows
    logits = torch.cat(((q * k).sum(1, keepdim=True), q @ queue.T), 1) / t
    return F.cross_entropy(logits.float(), torch.zeros(len(q), dtype=torch.int64, device=q.device))


compiled = torch.compile(eager, dynamic=False)


def ours(loss: str, rows: list[Tensor], form: str | None = None) -> Tensor:
    """`form` is forced by `forced`, for the backward pass too."""
    t = TEMPERATURE[loss]
    if loss == "ntxent":
        return sslfast.ntxent_loss(*rows, t, normalize=False)
    if loss == "clip":
        return sslfast.info_nce_loss(*rows, temperature=t, normalize=False, symmetric=True)
    q, k, queue = rows
    lse = sslfast.similarity_lse(q, queue, scale=1 / t)
    return F.softplus(lse - (q.float() * k.float()).sum(1) / t).mean()


@contextlib.contextmanager
def forced(call: Callable) -> Iterator[None]:
    """The form that an implementation names, forward and backward."""
    form, choose = getattr(call, "keywords", {}).get("form"), tuning.form
    if form:
        tuning.form = lambda *args: form
    try:
        yield
    finally:
        tuning.form = choose


class _ChunkedClip(torch.autograd.Function):
    """CLIP in row chunks in plain PyTorch: 1 product forward, 3 backward, elementwise passes over chunks."""

    @staticmethod
    def forward(ctx, a, b, t, rows):
        m = len(a)
        row, col = a.new_empty(m, dtype=torch.float32), a.new_full((m,), -torch.inf, dtype=torch.float32)
        positive = (a.float() * b.float()).sum(1) / t
        for i in range(0, m, rows):
            s = _mm(a[i : i + rows], b.T).div_(t)
            row[i : i + rows] = s.logsumexp(1)
            col = torch.logaddexp(col, s.logsumexp(0))
        ctx.save_for_backward(a, b, row, col)
        ctx.t, ctx.rows = t, rows
        return ((row + col) / 2 - positive).mean()

    @staticmethod
    def backward(ctx, g):
        a, b, row, col = ctx.saved_tensors
        m, t, rows = len(a), ctx.t, ctx.rows
        da, db = torch.empty_like(a), torch.zeros(b.shape, device=b.device)
        for i in range(0, m, rows):
            s = _mm(a[i : i + rows], b.T).div_(t)
            w = torch.exp(s - row[i : i + rows, None]).add_(torch.exp(s - col)).mul_(0.5)
            w.diagonal(i).sub_(1.0)
            w = w.mul_(g / (m * t)).to(a.dtype)
            da[i : i + rows] = w @ b
            db += _mm(w.T, a[i : i + rows])
        return da, db.to(b.dtype), None, None


def _mm(x: Tensor, y: Tensor) -> Tensor:
    if not x.is_cuda:
        return x.float() @ y.float()
    return x @ y if x.dtype == torch.float32 else torch.mm(x, y, out_dtype=torch.float32)


def chunked_torch(loss: str, rows: list[Tensor]) -> Tensor:
    return _ChunkedClip.apply(*rows, TEMPERATURE[loss], 2048)


def memeff(loss: str, rows: list[Tensor]) -> Tensor:
    from memeff import MemoryEfficientCLIPLoss

    module = MemoryEfficientCLIPLoss(temperature=TEMPERATURE[loss], normalized_inputs=True, stable=False)
    return module(*rows)


def inf_cl(loss: str, rows: list[Tensor]) -> Tensor:
    from inf_cl import cal_flash_loss

    a, b = rows
    scale = torch.tensor(1 / TEMPERATURE[loss], device=a.device)
    width = 1 << (a.shape[1] - 1).bit_length()
    return (
        sum(cal_flash_loss(x, y, scale=scale, head_dim=min(256, width)).mean() for x, y in ((a, b), (b, a)))
        / 2
    )


def cce_exact(loss: str, rows: list[Tensor]) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    a, b = rows
    labels, t = torch.arange(len(a), device=a.device), TEMPERATURE[loss]
    pairs = ((a / t, b), (b / t, a))
    return sum(linear_cross_entropy(x, y, labels, impl="cce_exact") for x, y in pairs) / 2


def implementations(case: Case) -> dict[str, Callable]:
    found: dict[str, Callable] = {"sslfast": ours, "eager": eager, "compile": compiled}
    if tuning.fits(case.d, getattr(torch, case.dtype).itemsize):
        found["sslfast flash"] = functools.partial(ours, form="flash")
    if case.loss != "moco":
        found["sslfast chunked"] = functools.partial(ours, form="chunked")
    if case.loss == "clip":
        found["chunked torch"] = chunked_torch
        for name, peer in (("memeff", memeff), ("inf_cl", inf_cl), ("cut_cross_entropy", cce_exact)):
            if importlib.util.find_spec(name):
                found[name] = peer
    return found
