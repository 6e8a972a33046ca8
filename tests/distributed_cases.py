"""Losses with a group: what each is given, cut into the processes' rows, and what a process makes of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch import distributed as dist

import sslfast
from sslfast.distributed import _ranks

SIZES = {1: [7], 2: [5, 2], 3: [3, 1, 4], 4: [2, 3, 1, 2]}  # rows of each process: uneven
DIM = 6


@dataclass
class Case:
    """call(rows, whole, **across) -> loss; rows: [n, ...] that are cut, whole: what all processes have."""

    call: Callable
    rows: dict[str, tuple[int, ...]]
    ids: dict[str, int] = field(default_factory=dict)  # names of int64 [n], and of how many different
    whole: dict[str, tuple[int, ...]] = field(default_factory=dict)
    positive: tuple[str, ...] = ()  # those of rows that are shares, without a gradient
    strategies: tuple[str, ...] = ("gather", "ring")
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)  # rows of another number on each process


PAIR = {"a": (DIM,), "b": (DIM,)}
T = {"t": ()}


def _ntxent(r, w, **o):
    t = w["t"] * (1 if o.get("normalize", True) else 5)  # logits of a size that float32 can hold to 1e-6
    return sslfast.ntxent_loss(r["a"], r["b"], t, ids=r.get("ids"), **o)


def _info(r, w, negatives=None, **o):
    extra = None if negatives is None else r[negatives]
    return sslfast.info_nce_loss(
        r["a"], r["b"], temperature=w["t"], ids=r.get("ids"), negatives=extra, weights=r.get("w"), **o
    )


def _stacked(r, w, **o):
    return sslfast.multiview_ntxent_loss(r["v"].transpose(0, 1), w["t"], **o)


def _views(r, w, **o):
    return sslfast.multiview_ntxent_loss(list(r["v"].unbind(1)), w["t"], ids=r.get("ids"), **o)


def _supcon(r, w, **o):
    return sslfast.supcon_loss(r["v"], r.get("ids"), w["t"], **o)


def _triplet(r, w, **o):
    return sslfast.triplet_margin_loss(r["a"], r["ids"], 0.3, **o)


def _two(loss, r, w, **o):
    return loss(r["a"], r["b"], w["t"], **o)


def _clip(r, w, **o):
    return sslfast.clip_loss(r["a"], r["b"], w["t"], w["bias"], **o)


def _siglip(r, w, **o):
    return sslfast.siglip_loss(r["a"], r["b"], w["t"], w["bias"], ids=r.get("ids"), **o)


def _moco(r, w, **o):
    return sslfast.moco_loss(r["a"], r["b"], w["queue"], w["t"], **o)


def _koleo(r, w, **o):
    return sslfast.koleo_loss(r["a"], **o)


_SHARED = partial(_info, negatives="negatives")
_OWN = partial(_info, negatives="v")
_BOTH = {"t": (), "bias": ()}

CASES = {
    "ntxent": Case(_ntxent, PAIR, whole=T),
    "ntxent_ids": Case(_ntxent, PAIR, {"ids": 5}, T),
    "ntxent_dot_sum": Case(partial(_ntxent, normalize=False, reduction="sum"), PAIR, whole=T),
    "info_nce": Case(_info, PAIR, whole=T),
    "info_nce_symmetric": Case(partial(_info, symmetric=True, margin=0.1), PAIR, {"ids": 4}, T),
    "info_nce_negatives": Case(_SHARED, PAIR, whole=T, extra={"negatives": (DIM,)}),
    "info_nce_own_negatives": Case(_OWN, {**PAIR, "v": (3, DIM)}, whole=T),
    "info_nce_smooth": Case(partial(_info, label_smoothing=0.1, symmetric=True), PAIR, whole=T),
    "info_nce_smooth_ids": Case(
        partial(_SHARED, label_smoothing=0.2), PAIR, {"ids": 3}, T, extra={"negatives": (DIM,)}
    ),
    "info_nce_weights": Case(_info, {**PAIR, "w": ()}, whole=T, positive=("w",)),
    "multiview": Case(_views, {"v": (3, DIM)}, whole=T),
    "multiview_stacked": Case(_stacked, {"v": (3, DIM)}, whole=T),
    "multiview_ids": Case(_views, {"v": (3, DIM)}, {"ids": 4}, T),
    "clip": Case(_clip, PAIR, whole=_BOTH),
    "siglip": Case(_siglip, PAIR, whole=_BOTH),
    "siglip_ids": Case(_siglip, PAIR, {"ids": 4}, _BOTH),
    "supcon_labels": Case(_supcon, {"v": (DIM,)}, {"ids": 3}, T),
    "supcon_views": Case(_supcon, {"v": (3, DIM)}, {"ids": 3}, T),
    "supcon_pairs": Case(_supcon, {"v": (2, DIM)}, whole=T),
    "supcon_images": Case(_supcon, {"v": (3, DIM)}, whole=T),
    "supcon_inside": Case(partial(_supcon, form="inside"), {"v": (2, DIM)}, {"ids": 3}, T),
    "dcl": Case(partial(_two, sslfast.dcl_loss), PAIR, whole=T),
    "dcl_weighted": Case(partial(_two, partial(sslfast.dcl_loss, weight_sigma=0.5)), PAIR, whole=T),
    "hcl": Case(partial(_two, sslfast.hard_negative_ntxent_loss), PAIR, whole=T),
    "hcl_plain": Case(
        partial(_two, partial(sslfast.hard_negative_ntxent_loss, beta=0.0, tau_plus=0.0)), PAIR, whole=T
    ),
    "moco": Case(_moco, PAIR, whole={**T, "queue": (5, DIM)}),
    "nnclr": Case(partial(_two, sslfast.nnclr_loss), PAIR, whole=T),
    "koleo": Case(_koleo, {"a": (DIM,)}),
    "triplet_hard": Case(_triplet, {"a": (DIM,)}, {"ids": 3}),
    "triplet_nonzero": Case(partial(_triplet, reduction="mean_nonzero"), {"a": (DIM,)}, {"ids": 3}),
    "triplet_semihard": Case(
        partial(_triplet, mining="semihard"), {"a": (DIM,)}, {"ids": 3}, strategies=("gather",)
    ),
    "triplet_all": Case(partial(_triplet, mining="all"), {"a": (DIM,)}, {"ids": 3}, strategies=("gather",)),
}


def inputs(name: str, sizes: list[int], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(rows of all processes, what all have) of a case, the same everywhere; leaves that want gradients."""
    case, generator = CASES[name], torch.Generator().manual_seed(sum(map(ord, name)))
    count = sum(sizes)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = {key: draw(count, *shape) for key, shape in case.rows.items()}
    rows |= {key: draw(sum(others(sizes)), *shape) for key, shape in case.extra.items()}
    whole = {key: draw(*shape) for key, shape in case.whole.items()}
    if "t" in whole:  # a temperature, or for CLIP and SigLIP a scale
        whole["t"] = torch.tensor(1.7 if "bias" in whole else 0.3, dtype=dtype)
    for x in (*rows.values(), *whole.values()):
        x.requires_grad_()
    for key in case.positive:
        rows[key] = rows[key].detach().abs()
    for key, kinds in case.ids.items():
        rows[key] = torch.randint(kinds, (count,), generator=generator) * 1_000_003
    return rows, whole


def others(sizes: list[int]) -> list[int]:
    """Rows of further negatives on each process: the first has none where there are several."""
    return [2 * k for k in range(len(sizes))] if len(sizes) > 1 else [4]


def gradients(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: torch.zeros_like(x) if x.grad is None else x.grad
        for key, x in tensors.items()
        if x.requires_grad
    }


def evaluate(name: str, rows: dict[str, Tensor], whole: dict[str, Tensor], **across):
    """(loss, gradients to rows, gradients to whole)"""
    loss = CASES[name].call(rows, whole, **across)
    (loss if loss.dim() == 0 else loss.square().sum()).backward()
    return loss.detach(), gradients(rows), gradients(whole)


def own_rows(name: str, rows: dict[str, Tensor], sizes: list[int], rank: int) -> dict[str, Tensor]:
    """This process's part as leaves of its own."""
    parts = {}
    for key, x in rows.items():
        lengths = others(sizes) if key in CASES[name].extra else sizes
        parts[key] = x.detach().split(lengths)[rank].clone().requires_grad_(x.requires_grad)
    return parts


def every_case(rank: int, size: int, dtypes: tuple[torch.dtype, ...]) -> dict:
    """{(case, dtype, strategy, ...): (loss, gradients to rows, to whole)} of this process, by each strategy.

    "pieces": a ring in which shards travel row by row.
    """
    results = {}
    for name, case in CASES.items():
        fixed = name == "koleo" or "reduction" in getattr(case.call, "keywords", {})
        for dtype in dtypes:
            exact = dtype == torch.float64
            for strategy in (*case.strategies, *("pieces",) * ("ring" in case.strategies and exact)):
                more = [{"scaling": "sum"}, {"reduction": "none"}] if exact and strategy != "pieces" else []
                for options in ({}, *more[: 1 if fixed else 2]):
                    rows, whole = inputs(name, SIZES[size], dtype)
                    own = own_rows(name, rows, SIZES[size], rank)
                    across = {"group": dist.group.WORLD, "strategy": strategy, **options}
                    whole_piece = _ranks.PIECE_BYTES
                    if strategy == "pieces":
                        across["strategy"], _ranks.PIECE_BYTES = "ring", 1
                    results[(name, dtype, strategy, *options.values())] = evaluate(name, own, whole, **across)
                    _ranks.PIECE_BYTES = whole_piece
    return results
