"""The losses that benchmarks/losses.py and benchmarks/losses_gpu.py time: inputs, plain PyTorch, ours and
the truth in float64.

An implementation is a function of labels and of the tensors that `inputs_of` makes, in their order, to a
scalar; all of these tensors are trained.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

TEMPERATURE, BASE_TEMPERATURE = 0.1, 0.07  # of supcon_loss
MARGIN = 0.2
BIAS = -10.0  # of siglip_loss
IGNORED = -100
APART = 1e-6  # squared distances of which the larger is certain; float32 is good to a fraction of it


@dataclass(frozen=True)
class Case:
    """op with rows x dim (pairs of them for clip_loss and siglip_loss) of labels out of `classes`."""

    op: str
    rows: int
    dim: int
    classes: int = 0
    dtype: str = "float32"
    scale: float = 0.0
    """Of the logits of clip_loss and siglip_loss."""
    labelled: float = 1.0
    """Share of linear_cross_entropy's rows that have a label."""
    faster: float | None = None
    """Times as fast as eager PyTorch that ours is asked to be."""
    memory: float | None = None
    """Share of eager PyTorch's memory that ours is asked to take at most."""
    rounds: int = 9

    @property
    def title(self) -> str:
        if self.op == "linear_cross_entropy":
            return f"{self.op}, {self.labelled:.0%} labelled"
        return f"{self.op}, scale {self.scale:.3g}" if self.scale else self.op

    @property
    def size(self) -> str:
        classes = f" x {self.classes}" if self.op == "linear_cross_entropy" else ""
        return f"{self.rows} x {self.dim}{classes}"


def small(case: Case, rows: int) -> Case:
    """For whether it runs: nothing is asked of it."""
    classes = 1000 if case.op == "linear_cross_entropy" else min(case.classes, 10)
    return replace(case, rows=rows, dim=64, classes=classes, faster=None, memory=None)


def inputs_of(case: Case, device: str) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Labels, and what is trained."""
    n, d = case.rows, case.dim
    labels = torch.randint(case.classes, (n,), device=device) if case.classes else None
    if case.op in ("clip_loss", "siglip_loss"):
        a, b = torch.randn(2, n, d, device=device)
        b += 0.3 * a  # a cosine of about 0.3
        x = {"a": F.normalize(a, dim=1), "b": F.normalize(b, dim=1)}
    elif case.op == "linear_cross_entropy":
        unlabelled = torch.randperm(n, device=device)[int(n * case.labelled) :]
        labels = labels.index_fill(0, unlabelled, IGNORED)
        x = {"hidden": torch.randn(n, d, device=device)}
        x["weight"] = 2 * d**-0.5 * torch.randn(case.classes, d, device=device)
    else:
        centers = torch.randn(case.classes, d, device=device)
        while True:
            x = {"features": 0.5 * centers[labels] + torch.randn(n, d, device=device)}
            if case.op != "triplet_margin_loss" or _decided(labels, x["features"]):
                break
    x = {name: t.to(getattr(torch, case.dtype)) for name, t in x.items()}
    if case.scale:
        x["scale"] = torch.tensor(float(case.scale), device=device)
    if case.op == "siglip_loss":
        x["bias"] = torch.tensor(BIAS, device=device)
    return labels, {name: t.requires_grad_() for name, t in x.items()}


def _decided(labels: Tensor, features: Tensor) -> bool:
    """Whether rounding cannot change which rows are the farthest positive and the nearest negative."""
    z, gaps = F.normalize(features.double(), dim=1), []
    for rows in _chunks(len(z), len(z)):
        cosine, same = z[rows] @ z.T, labels[rows, None] == labels
        near = cosine.masked_fill(same, -torch.inf).topk(2).values
        same.diagonal(rows.start).fill_(False)
        far = (-cosine).masked_fill(~same, -torch.inf).topk(2).values
        gaps += [near, far]
    gap = 2 * (torch.cat(gaps)[:, 0] - torch.cat(gaps)[:, 1])
    return bool((gap.nan_to_num(nan=torch.inf) > APART).all())


def _chunks(rows: int, columns: int) -> list[slice]:
    """Slices of rows whose logits in float64 take a quarter of a GiB."""
    step = max(1, 2**25 // columns)
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


# Eager PyTorch, with the whole matrix.


def wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype.itemsize == 2 else logits


def clip(labels: None, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits, own = wide(scale * a @ b.T), torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def clip_in_two_products(labels: None, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """As open_clip's ClipLoss on one process."""
    of_a, of_b, own = scale * a @ b.T, scale * b @ a.T, torch.arange(len(a), device=a.device)
    return (F.cross_entropy(wide(of_a), own) + F.cross_entropy(wide(of_b), own)) / 2


def siglip(labels: None, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * a @ b.T + bias
    signs = 2 * torch.eye(len(a), device=a.device, dtype=a.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(a)


def supcon(labels: Tensor, features: Tensor) -> Tensor:
    """As SupContrast's losses.py, of one view."""
    z = F.normalize(features, dim=1)
    logits = wide(z @ z.T) / TEMPERATURE
    logits = logits - logits.max(1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z), device=z.device, dtype=logits.dtype)
    positives = (labels[:, None] == labels).to(logits.dtype) * others
    log_prob = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    means = (positives * log_prob).sum(1) / positives.sum(1).clamp(min=1)
    return -(TEMPERATURE / BASE_TEMPERATURE) * means.mean()


def _batch_hard(labels: Tensor, distances: Tensor) -> Tensor:
    same = labels[:, None] == labels
    positives = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    far = distances.masked_fill(~positives, -torch.inf).max(1).values
    near = distances.masked_fill(same, torch.inf).min(1).values
    some = positives.any(1) & ~same.all(1)
    return F.relu(far - near + MARGIN)[some].mean()


def triplet_by_cdist(labels: Tensor, features: Tensor) -> Tensor:
    x = F.normalize(features, dim=1)
    return _batch_hard(labels, torch.cdist(x, x))


def triplet_by_product(labels: Tensor, features: Tensor) -> Tensor:
    x = F.normalize(features, dim=1)
    return _batch_hard(labels, (2 - 2 * x @ x.T).clamp(min=1e-12).sqrt())


def linear(labels: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(wide(hidden @ weight.T), labels, ignore_index=IGNORED)


EAGER: dict[str, dict[str, Callable[..., Tensor]]] = {
    "clip_loss": {"eager": clip},
    "siglip_loss": {"eager": siglip},
    "supcon_loss": {"eager": supcon},
    "triplet_margin_loss": {"eager, cdist": triplet_by_cdist, "eager, product": triplet_by_product},
    "linear_cross_entropy": {"eager": linear},
}
OURS: dict[str, Callable[..., Tensor]] = {
    "clip_loss": lambda labels, *x: sslfast.clip_loss(*x),
    "siglip_loss": lambda labels, *x: sslfast.siglip_loss(*x),
    "supcon_loss": lambda labels, x: sslfast.supcon_loss(x, labels, TEMPERATURE, BASE_TEMPERATURE),
    "triplet_margin_loss": lambda labels, x: sslfast.triplet_margin_loss(x, labels, MARGIN, mining="hard"),
    "linear_cross_entropy": lambda labels, *x: sslfast.linear_cross_entropy(*x, labels, ignore_index=IGNORED),
}


def results(call: Callable[..., Tensor], labels: Tensor | None, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Loss, and gradients of what is trained."""
    loss = call(labels, *x.values())
    return (loss, *torch.autograd.grad(loss, list(x.values())))


# Truth: what a chunk of rows adds to the loss, in formulas that are not those above.


def _clip_part(labels: None, rows: slice, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    own = torch.arange(len(a), device=a.device)[rows]
    sides = (scale * (x[rows] @ y.T) for x, y in ((a, b), (b, a)))
    return sum(F.cross_entropy(s, own, reduction="sum") for s in sides) / (2 * len(a))


def _siglip_part(labels: None, rows: slice, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    s = scale * (a[rows] @ b.T) + bias
    return (F.softplus(s).sum() - s.diagonal(rows.start).sum()) / len(a)


def _supcon_part(labels: Tensor, rows: slice, features: Tensor) -> Tensor:
    z = F.normalize(features, dim=1)
    s = z[rows] @ z.T / TEMPERATURE
    itself = torch.zeros_like(s, dtype=torch.bool)
    itself.diagonal(rows.start).fill_(True)
    positives = (labels[rows, None] == labels) & ~itself
    count = positives.sum(1)
    mean = s.masked_fill(~positives, 0.0).sum(1) / count.clamp(min=1)
    terms = (s.masked_fill(itself, -torch.inf).logsumexp(1) - mean).masked_fill(count == 0, 0.0)
    return TEMPERATURE / BASE_TEMPERATURE * terms.sum() / len(z)


def _triplet_part(labels: Tensor, rows: slice, features: Tensor) -> Tensor:
    x = F.normalize(features, dim=1)
    cosine, same = (x[rows] @ x.T).detach(), labels[rows, None] == labels
    nearest = cosine.masked_fill(same, -torch.inf).argmax(1)
    same.diagonal(rows.start).fill_(False)
    farthest = cosine.masked_fill(~same, torch.inf).argmin(1)
    members = labels.bincount()[labels]
    some = (members > 1) & (members < len(x))
    far, near = ((x[rows] - x[other]).norm(dim=1) for other in (farthest, nearest))
    return F.relu(far - near + MARGIN)[some[rows]].sum() / some.sum()


def _linear_part(labels: Tensor, rows: slice, hidden: Tensor, weight: Tensor) -> Tensor:
    labelled = labels[rows] != IGNORED
    h, own = hidden[rows][labelled], labels[rows][labelled]
    s = h @ weight.T
    return (s.logsumexp(1) - s.gather(1, own[:, None])[:, 0]).sum() / (labels != IGNORED).sum()


PARTS: dict[str, Callable[..., Tensor]] = {
    "clip_loss": _clip_part, "siglip_loss": _siglip_part, "supcon_loss": _supcon_part,
    "triplet_margin_loss": _triplet_part, "linear_cross_entropy": _linear_part,
}  # fmt: skip


def truth(case: Case, labels: Tensor | None, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Loss and gradients in float64, in chunks of rows."""
    wide = [t.detach().double().requires_grad_() for t in x.values()]
    total = torch.zeros((), dtype=torch.float64, device=wide[0].device)
    columns = case.classes if case.op == "linear_cross_entropy" else case.rows
    for rows in _chunks(case.rows, columns):
        part = PARTS[case.op](labels, rows, *wide)
        part.backward()
        total += part.detach()
    return (total, *(t.grad for t in wide))


def errors_of(found: tuple[Tensor, ...], true: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative errors: of the loss, and the largest norm of an error over the norm of that gradient."""
    loss, *gradients = (
        float(torch.linalg.vector_norm(a.detach().double() - b) / torch.linalg.vector_norm(b))
        for a, b in zip(found, true, strict=True)
    )
    return {"loss_error": loss, "gradient_error": float(torch.tensor(gradients).max())}


def is_right(case: Case, row: dict) -> bool:
    """Whether the errors of a row are small. Plain PyTorch rounds 16-bit logits several times."""
    limit = 1e-4 if case.dtype == "float32" else 1e-2 if row["name"].startswith("sslfast") else 5e-2
    return row["loss_error"] <= limit and row["gradient_error"] <= limit


# Results.


def keep(path: Path | None, whole: dict) -> None:
    """At once, so that a run that is cut off loses nothing."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(whole, indent=1) + "\n")
        part.replace(path)


def json_path(given: Path | None, device: str, name: str) -> Path | None:
    """A file, or in a folder <device>/<name>."""
    return given / device / name if given and given.suffix != ".json" else given
