"""Other libraries' forms of the same losses, where they are installed.

A peer takes a case's inputs by name and returns what the case's `ours` returns, so that it is held against
the same truth.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

Peer = Callable[..., Tensor]
FIXED = 14.0
"""Scale of CLIP's logits where it is not trained."""


@cache
def _lightly(name: str, *options: Any) -> Any:
    from lightly import loss

    return getattr(loss, name)(*options)


@cache
def _open_clip(name: str) -> Any:
    from open_clip import loss

    return getattr(loss, name)()


@cache
def _metric_learning(name: str, **options: Any) -> Any:
    from pytorch_metric_learning import losses

    return getattr(losses, name)(**options)


def _triplets(embeddings: Tensor, labels: Tensor, hard: bool) -> Tensor:
    from pytorch_metric_learning import losses, miners, reducers

    some = miners.BatchHardMiner()(embeddings, labels) if hard else None
    return losses.TripletMarginLoss(0.2, reducer=reducers.MeanReducer())(embeddings, labels, some)


def _class_of_each(rows: Tensor) -> Tensor:
    return torch.arange(len(rows), device=rows.device)


def _lightly_dino(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    loss = _lightly("DINOLoss", student.shape[-1]).to(student.device)
    # the call moves the centre afterwards
    buffer = loss.center if isinstance(loss.center, Tensor) else loss.center.center
    buffer.copy_(center.view(buffer.shape))
    return loss(list(teacher), list(student), teacher_temp=0.04)


@cache
def _ranking() -> Any:
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    return MultipleNegativesRankingLoss(nn.Identity(), scale=1 / 0.07)


def _memeff(a: Tensor, b: Tensor) -> Tensor:
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=1 / FIXED, normalized_inputs=True, stable=False)(a, b)


def _inf_cl(a: Tensor, b: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    scale = torch.tensor(FIXED, device=a.device)
    width = min(256, 1 << (a.shape[1] - 1).bit_length())
    return sum(cal_flash_loss(x, y, scale=scale, head_dim=width).mean() for x, y in ((a, b), (b, a))) / 2


def _cut_clip(a: Tensor, b: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    own = _class_of_each(a)
    return sum(linear_cross_entropy(FIXED * x, y, own, impl="cce_exact") for x, y in ((a, b), (b, a))) / 2


def _cut_linear(hidden: Tensor, weight: Tensor, labels: Tensor, **_: Any) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels, impl="cce_exact")


def _siglip_kernel(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss(a, b, scale.log(), bias)


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor, **_: Any) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


class _ChunkedClip(torch.autograd.Function):
    """CLIP in chunks of rows in plain PyTorch: one product forward, three backward."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, rows: int) -> Tensor:
        row, col = [], a.new_full((len(b),), -torch.inf, dtype=torch.float32)
        cosines = (a.float() * b.float()).sum(1)
        for part in a.split(rows):
            s = _product(part, b.T).mul_(scale)
            row.append(s.logsumexp(1))
            col = torch.logaddexp(col, s.logsumexp(0))
        ctx.save_for_backward(a, b, scale, torch.cat(row), col)
        ctx.rows = rows
        return ((torch.cat(row) + col) / 2 - scale * cosines).mean()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        a, b, scale, row, col = ctx.saved_tensors
        m, rows = len(a), ctx.rows
        da, db, dscale = torch.empty_like(a), torch.zeros(b.shape, device=b.device), torch.zeros_like(g)
        for i in range(0, m, rows):
            cosines = _product(a[i : i + rows], b.T)
            s = cosines * scale
            w = torch.exp(s - row[i : i + rows, None]).add_(torch.exp(s - col)).mul_(0.5)
            w.diagonal(i).sub_(1.0)
            dscale += (w * cosines).sum() * (g / m)
            w = w.mul_(g * scale / m).to(a.dtype)
            da[i : i + rows] = w @ b
            db += _product(w.T, a[i : i + rows])
        return da, db.to(b.dtype), dscale, None


def _product(x: Tensor, y: Tensor) -> Tensor:
    if not x.is_cuda:
        return x.float() @ y.float()
    return x @ y if x.dtype == torch.float32 else torch.mm(x, y, out_dtype=torch.float32)


_LINEAR: dict[str, Peer] = {"cut_cross_entropy": _cut_linear, "liger_kernel": _liger}
PEERS: dict[str, dict[str, Peer]] = {
    "ntxent_loss": {
        "lightly": lambda z1, z2: _lightly("NTXentLoss", 0.1)(z1, z2),
        "pytorch_metric_learning": lambda z1, z2: _metric_learning("NTXentLoss", temperature=0.1)(
            torch.cat((z1, z2)), _class_of_each(z1).repeat(2)
        ),
    },
    "dcl_loss": {"lightly": lambda z1, z2: _lightly("DCLLoss")(z1, z2)},
    "byol_loss": {
        "lightly": lambda prediction, target: 2 + 2 * _lightly("NegativeCosineSimilarity")(prediction, target)
    },
    "koleo_loss": {"lightly": lambda features: _lightly("KoLeoLoss")(features)},
    "dino_loss": {"lightly": _lightly_dino},
    "clip_loss": {
        "open_clip": lambda a, b, scale: _open_clip("ClipLoss")(a, b, scale),
        "torch, chunked": lambda a, b, scale: _ChunkedClip.apply(a, b, scale, 2048),
    },
    "clip_loss, fixed scale": {
        "open_clip": lambda a, b: _open_clip("ClipLoss")(a, b, FIXED),
        "memeff": _memeff,
        "inf_cl": _inf_cl,
        "cut_cross_entropy": _cut_clip,
    },
    "siglip_loss": {
        "open_clip": lambda a, b, scale, bias: _open_clip("SigLipLoss")(a, b, scale, bias),
        "siglip_kernel": _siglip_kernel,
    },
    "supcon_loss": {
        "pytorch_metric_learning": lambda features, labels: (
            0.1 / 0.07 * _metric_learning("SupConLoss", temperature=0.1)(features, labels)
        ),
    },
    "triplet_margin_loss, hard": {"pytorch_metric_learning": lambda **rows: _triplets(**rows, hard=True)},
    "triplet_margin_loss, all": {"pytorch_metric_learning": lambda **rows: _triplets(**rows, hard=False)},
    "info_nce_loss": {
        "sentence_transformers": lambda query, key: _ranking().compute_loss_from_embeddings(
            [query, key], None
        ),
    },
    "linear_cross_entropy, 15% labelled": _LINEAR,
    "linear_cross_entropy, all labelled": _LINEAR,
}


def installed(case: str, only: tuple[str, ...] = ("all",)) -> dict[str, Peer]:
    """Those of a case that can be imported, or of these the named ones."""
    wanted = PEERS.get(case, {})
    return {
        name: peer
        for name, peer in wanted.items()
        if importlib.util.find_spec(name.partition(",")[0]) and ("all" in only or name in only)
    }


def names() -> tuple[str, ...]:
    return tuple(sorted({name for peers in PEERS.values() for name in peers}))
