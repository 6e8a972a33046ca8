"""Losses of a matrix of similarities, and the ops below them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from sslfast.bench.case import Case, Inputs, Work, wide
from sslfast.bench.contrastive_plain import (
    plain_bce,
    plain_byol,
    plain_clip,
    plain_dcl,
    plain_hard_negatives,
    plain_info_nce,
    plain_koleo,
    plain_lse,
    plain_lse_both,
    plain_moco,
    plain_multiview,
    plain_nnclr,
    plain_siglip,
    plain_supcon,
    plain_triplet,
)
from sslfast.bench.peers import FIXED
from sslfast.losses.contrastive import ntxent_reference
from sslfast.ops import guided_lse, pair_products, similarity_bce, similarity_lse

DIM, CLASSES, QUEUE = 128, 100, 65_536
SIZES, GPU_SIZES = (512, 4096), (4096, 32_768)


def rows(count: int, dtype: torch.dtype, device: torch.device, dim: int = DIM) -> Tensor:
    return torch.randn(count, dim, device=device).to(dtype)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=1).to(x.dtype)


def near(x: Tensor) -> Tensor:
    """Another view of each row: a cosine of about 0.45."""
    return (0.5 * x.float() + torch.randn_like(x, dtype=torch.float32)).to(x.dtype)


def two_views(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    z = rows(size, dtype, device)
    return {"z1": z, "z2": near(z)}


def products(m: int, n: int, dim: int, itemsize: int, forward: float, both: float, backward: bool) -> Work:
    """`forward` or `both` products of [m, dim] and [n, dim], rows read, again, and gradients written."""
    passes = both if backward else forward
    return Work(passes * 2 * m * n * dim, itemsize * dim * (m + n) * (3 if backward else 1))


def symmetric(size: int, itemsize: int, backward: bool) -> Work:
    """NT-Xent on 2 N rows: half of the matrix, then half of it again and the gradient."""
    m = 2 * size
    return Work((2.0 if backward else 0.5) * 2 * m * m * DIM, itemsize * DIM * m * (3 if backward else 1))


def nearest(size: int, itemsize: int, backward: bool) -> Work:
    """Which rows are nearest or farthest: half of the matrix; the rest is rows."""
    return Work(size * size * DIM, itemsize * DIM * size * (3 if backward else 1))


def mined(mining: str) -> Case:
    """Triplets of all pairs of a class: as many products, then sorting or choosing."""
    return Case(
        "triplet_margin_loss",
        f"{{}} x {DIM}, {CLASSES} classes",
        (512,),
        (512,),
        labelled("embeddings"),
        ours=lambda embeddings, labels: sslfast.triplet_margin_loss(embeddings, labels, 0.2, mining=mining),
        trained=("embeddings",),
        variant=mining,
        dtypes=("float32",),
        work=nearest,
    )


def queue_of(size: int, itemsize: int, backward: bool) -> Work:
    """MoCo: one product, and one of the weights and the queue, while it is there."""
    return Work((1 + backward) * 2 * size * QUEUE * DIM, itemsize * DIM * (QUEUE + size * (2 + backward)))


def pairs_of(forward: float, both: float, dim: int = DIM):
    return lambda size, itemsize, backward: products(size, size, dim, itemsize, forward, both, backward)


# Inputs.


def labelled(name: str):
    def inputs(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        labels = torch.arange(size, device=device) % min(CLASSES, max(2, size // 4))
        return {
            name: (rows(size, torch.float32, device) + rows(size, torch.float32, device)[labels]).to(dtype),
            "labels": labels,
        }

    return inputs


def towers(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    a = rows(size, dtype, device)
    return {"a": unit(a), "b": unit(near(a)), "scale": torch.tensor(14.0, device=device)}


def queued(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    q = rows(size, dtype, device)
    return {"query": q, "key": near(q), "queue": unit(rows(QUEUE, dtype, device))}


def keyed(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    q = rows(size, dtype, device)
    return {"query": q, "key": near(q)}


def guided(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    a, guide = unit(rows(size, dtype, device)), unit(rows(size, dtype, device))
    return {
        "a": a,
        "b": unit(near(a)),
        "guide_a": guide,
        "guide_b": unit(near(guide)),
        "limit": torch.full((size,), 0.4, device=device, dtype=dtype),
    }


def some_pairs(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    index = torch.randint(size, (2, 4 * size), device=device)
    return {
        "x": rows(size, dtype, device),
        "y": rows(size, dtype, device),
        "rows": index[0],
        "columns": index[1],
    }


def unit_rows(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    a = unit(rows(size, dtype, device))
    return {"a": a, "b": unit(near(a))}


def of_byol(size: int, itemsize: int, backward: bool) -> Work:
    return Work(bytes=size * 256 * itemsize * (2 + backward))


def of_pairs(size: int, itemsize: int, backward: bool) -> Work:
    """Both sides read, again, and gradients written; the indices each time."""
    return Work(bytes=size * (2 * DIM * itemsize * (1 + 2 * backward) + 64 * (1 + backward)))


_SIMILARITY: dict[str, Any] = dict(shape=f"{{}} x {DIM}", sizes=SIZES, gpu_sizes=GPU_SIZES)
_VIEWS: dict[str, Any] = dict(**_SIMILARITY, inputs=two_views, trained=("z1", "z2"))
_16: dict[str, Any] = dict(tolerance=3.0)  # 16-bit logits of hand-written losses are rounded once more

CASES = (
    Case(
        "ntxent_loss",
        **_VIEWS,
        work=symmetric,
        ours=lambda z1, z2: sslfast.ntxent_loss(z1, z2, 0.1),
        plain=lambda z1, z2: ntxent_reference(z1, z2, 0.1),
    ),
    Case(
        "multiview_ntxent_loss",
        "4 x {} x 128",
        SIZES[:1],
        GPU_SIZES[:1],
        lambda n, dtype, device: {"views": torch.randn(4, n, DIM, device=device).to(dtype)},
        ours=lambda views: sslfast.multiview_ntxent_loss(views, 0.1),
        plain=plain_multiview,
        trained=("views",),
        work=lambda size, itemsize, backward: symmetric(2 * size, itemsize, backward),
    ),
    Case(
        "info_nce_loss",
        **_SIMILARITY,
        inputs=keyed,
        trained=("query", "key"),
        work=pairs_of(1, 4),
        ours=lambda query, key: sslfast.info_nce_loss(query, key),
        plain=plain_info_nce,
    ),
    Case(
        "moco_loss",
        "{} x 128, queue of 65,536",
        (256,),
        (4096,),
        queued,
        trained=("query",),
        ours=lambda query, key, queue: sslfast.moco_loss(query, key, queue),
        plain=plain_moco,
        work=queue_of,
    ),
    Case(
        "nnclr_loss",
        **_SIMILARITY,
        trained=("prediction",),
        work=pairs_of(1, 3),
        inputs=lambda n, dtype, device: dict(
            zip(("nearest", "prediction"), keyed(n, dtype, device).values(), strict=True)
        ),
        ours=lambda nearest, prediction: sslfast.nnclr_loss(nearest, prediction),
        plain=plain_nnclr,
    ),
    Case(
        "clip_loss",
        **_SIMILARITY,
        inputs=towers,
        trained=("a", "b", "scale"),
        work=pairs_of(1, 4),
        ours=lambda a, b, scale: sslfast.clip_loss(a, b, scale),
        plain=plain_clip,
    ),
    Case(
        "clip_loss",
        **_SIMILARITY,
        inputs=unit_rows,
        ours=lambda a, b: sslfast.clip_loss(a, b, FIXED),
        plain=lambda a, b: plain_clip(a, b, FIXED),
        trained=("a", "b"),
        work=pairs_of(1, 4),
        variant="fixed scale",
    ),
    Case(
        "siglip_loss",
        **_SIMILARITY,
        trained=("a", "b", "scale", "bias"),
        work=pairs_of(1, 3),
        inputs=lambda n, dtype, device: (
            towers(n, dtype, device) | {"bias": torch.tensor(-10.0, device=device)}
        ),
        ours=lambda a, b, scale, bias: sslfast.siglip_loss(a, b, scale, bias),
        plain=plain_siglip,
    ),
    Case(
        "supcon_loss",
        f"{{}} x {DIM}, {CLASSES} classes",
        SIZES,
        GPU_SIZES,
        labelled("features"),
        ours=lambda features, labels: sslfast.supcon_loss(features, labels, 0.1, 0.07),
        plain=plain_supcon,
        trained=("features",),
        work=lambda size, itemsize, backward: symmetric(size // 2, itemsize, backward),
    ),
    Case(
        "supcon_loss",
        f"{{}} x {DIM}, {CLASSES} classes",
        SIZES,
        GPU_SIZES,
        labelled("features"),
        ours=lambda features, labels: sslfast.supcon_loss(features, labels, 0.1, 0.07, form="inside"),
        trained=("features",),
        work=lambda size, itemsize, backward: symmetric(size // 2, itemsize, backward),
        variant="the sum inside",
    ),
    Case("dcl_loss", **_VIEWS, work=symmetric, ours=lambda z1, z2: sslfast.dcl_loss(z1, z2), plain=plain_dcl),
    Case(
        "dcl_loss",
        **_VIEWS,
        work=symmetric,
        ours=lambda z1, z2: sslfast.dcl_loss(z1, z2, weight_sigma=0.5),
        variant="weighted",
    ),
    Case(
        "hard_negative_ntxent_loss",
        **_VIEWS,
        work=symmetric,
        ours=lambda z1, z2: sslfast.hard_negative_ntxent_loss(z1, z2),
        plain=plain_hard_negatives,
    ),
    Case(
        "triplet_margin_loss",
        f"{{}} x {DIM}, {CLASSES} classes",
        SIZES,
        GPU_SIZES[:1],
        labelled("embeddings"),
        ours=lambda embeddings, labels: sslfast.triplet_margin_loss(embeddings, labels, 0.2),
        plain=plain_triplet,
        trained=("embeddings",),
        variant="hard",
        dtypes=("float32",),
        work=nearest,
    ),
    *(mined(mining) for mining in ("semihard", "all")),
    Case(
        "koleo_loss",
        **_SIMILARITY,
        plain=plain_koleo,
        trained=("features",),
        dtypes=("float32",),
        inputs=lambda n, dtype, device: {"features": rows(n, dtype, device)},
        ours=lambda features: sslfast.koleo_loss(features),
        work=nearest,
    ),
    Case(
        "byol_loss",
        "{} x 256",
        (4096,),
        (4096,),
        plain=plain_byol,
        trained=("prediction",),
        inputs=lambda n, dtype, device: {
            "prediction": rows(n, dtype, device, 256),
            "target": rows(n, dtype, device, 256),
        },
        ours=lambda prediction, target: sslfast.byol_loss(prediction, target),
        work=of_byol,
    ),
    Case(
        "similarity_lse",
        **_SIMILARITY,
        inputs=unit_rows,
        trained=("a", "b"),
        work=pairs_of(1, 4),
        ours=lambda a, b: similarity_lse(a, b, scale=10.0),
        plain=plain_lse,
    ),
    Case(
        "similarity_lse",
        **_SIMILARITY,
        inputs=unit_rows,
        trained=("a", "b"),
        work=pairs_of(1, 4),
        ours=lambda a, b: similarity_lse(a, b, scale=10.0, return_cols=True),
        plain=plain_lse_both,
        variant="rows and columns",
    ),
    Case(
        "similarity_bce",
        **_SIMILARITY,
        inputs=unit_rows,
        trained=("a", "b"),
        work=pairs_of(1, 3),
        ours=lambda a, b: similarity_bce(a, b, scale=10.0, bias=-10.0, total=True),
        plain=plain_bce,
    ),
    Case(
        "guided_lse",
        **_SIMILARITY,
        inputs=guided,
        trained=("a", "b"),
        ours=lambda **x: guided_lse(**x, scale=20.0),
        plain=lambda a, b, guide_a, guide_b, limit: (
            (20.0 * wide(a @ b.T)).masked_fill(guide_a @ guide_b.T > limit[:, None], -torch.inf).logsumexp(1)
        ),
        dtypes=("float32",),
        work=lambda size, itemsize, backward: products(size, size, DIM, itemsize, 2, 5, backward),
    ),
    Case(
        "pair_products",
        "4 pairs of each of {} x 128",
        (16_384,),
        (262_144,),
        some_pairs,
        trained=("x", "y"),
        ours=lambda x, y, rows, columns: pair_products(x, y, rows, columns),
        **_16,
        plain=lambda x, y, rows, columns: (wide(x)[rows] * wide(y)[columns]).sum(1),
        work=of_pairs,
    ),
)
