"""What the drop-ins compute, row by row in plain PyTorch, from the formulas."""

from pathlib import Path

import torch
from torch import Tensor, nn


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def supcontrast(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 0.07,
    contrast_mode: str = "all",
    base_temperature: float = 0.07,
) -> Tensor:
    """Mean over the anchors of the negative log-probability, weighed by the mask, of all other rows."""
    batch, views = features.shape[:2]
    z = features.reshape(batch * views, -1)
    image = torch.arange(batch).repeat_interleave(views)
    if mask is None:
        names = list(range(batch)) if labels is None else labels.flatten().tolist()
        mask = torch.tensor([[float(x == y) for y in names] for x in names])
    terms = []
    for a in range(0, len(z), 1 if contrast_mode == "all" else views):
        others = [b for b in range(len(z)) if b != a]
        weights = mask[image[a], image[others]].to(z.dtype)
        log_prob = (z[others] @ z[a] / temperature).log_softmax(0)
        some = weights.sum() >= 1e-6
        terms.append(-(weights * log_prob).sum() / weights.sum() if some else 0 * log_prob.sum())
    return temperature / base_temperature * torch.stack(terms).mean()


def simclr(z: Tensor, indexes: Tensor, temperature: float = 0.1, rows: range | None = None) -> Tensor:
    """-log(sum of the positives / sum of all but the row itself), mean over `rows`; 0 without a positive."""
    z, terms = unit(z), []
    for i in rows or range(len(z)):
        s, same = z @ z[i] / temperature, indexes == indexes[i]
        other = torch.arange(len(z)) != i
        some = (same & other).any()
        terms.append(s[other].logsumexp(0) - s[same & other].logsumexp(0) if some else 0 * s.sum())
    return torch.stack(terms).mean()


def first_of(logits: Tensor, at: int = 0) -> Tensor:
    """Cross-entropy of one row."""
    return logits.logsumexp(0) - logits[at]


def queue_loss(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """The row's key, then the columns of the queue."""
    rows = [torch.cat([(q @ k)[None], q @ queue]) for q, k in zip(query, key, strict=True)]
    return torch.stack([first_of(row / temperature) for row in rows]).mean()


def nnclr(z: Tensor, p: Tensor, temperature: float = 0.1, first: int = 0) -> Tensor:
    """Row i of z against all rows of p, of which first + i is its positive."""
    rows = unit(z) @ unit(p).T / temperature
    return torch.stack([first_of(row, first + i) for i, row in enumerate(rows)]).mean()


def mocov3(query: Tensor, key: Tensor, temperature: float = 0.2, first: int = 0) -> Tensor:
    return 2 * temperature * nnclr(query, key.detach(), temperature, first)


def byol(p: Tensor, z: Tensor) -> Tensor:
    return 2 - 2 * (unit(p) * unit(z.detach())).sum(1).mean()


def dino(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    teacher_temp: float,
    student_temp: float = 0.1,
    views: int = 2,
) -> Tensor:
    """Mean over pairs of different views, of which the teacher has two, of their mean cross-entropy."""
    size, pairs = len(teacher) // 2, []
    assert len(student) == views * size
    for t in range(2):
        p = ((teacher[t * size : (t + 1) * size].detach() - center) / teacher_temp).softmax(1)
        for s in range(views):
            if s != t:
                q = (student[s * size : (s + 1) * size] / student_temp).log_softmax(1)
                pairs.append(-(p * q).sum(1).mean())
    return torch.stack(pairs).mean()


def moved_center(center: Tensor, teacher: Tensor, momentum: float = 0.9) -> Tensor:
    return momentum * center + (1 - momentum) * teacher.mean(0, keepdim=True)


class Queue:
    """A list of columns, the oldest of which are overwritten first."""

    def __init__(self, queue: Tensor, pointer: int = 0):
        self.columns, self.pointer = list(queue.clone().unbind(1)), pointer

    def enqueue(self, keys: Tensor) -> None:
        for key in keys.detach():
            self.columns[self.pointer] = key.to(self.columns[0].dtype)
            self.pointer = (self.pointer + 1) % len(self.columns)

    @property
    def queue(self) -> Tensor:
        return torch.stack(self.columns, 1)


def averaged(average: Tensor, value: Tensor, decay: float) -> Tensor:
    """In float64 or complex128."""
    wide = torch.promote_types(average.dtype, torch.float64)
    return decay * average.to(wide) + (1 - decay) * value.to(wide)


def masking(sequence: Tensor, noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """(patches of the lowest noise in its order, mask with 1 for the others, rank of each patch)."""
    batch, length, _ = sequence.shape
    kept, mask, ranks = [], torch.ones(batch, length), torch.zeros(batch, length, dtype=torch.int64)
    for i in range(batch):
        order = sorted(range(length), key=lambda j, i=i: (noise[i, j].item(), j))
        few = order[: int(length * (1 - ratio))]
        kept.append(sequence[i, few])
        mask[i, few] = 0
        ranks[i, order] = torch.arange(length)
    return torch.stack(kept), mask, ranks


# Models with state of every kind


class Odd(nn.Module):
    """Buffers of several kinds, and parameters that are empty, of no dimension, or strided."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.randn(0, 3))
        self.turned = nn.Parameter(torch.randn(5, 3).T)
        self.frozen = nn.Parameter(torch.randn(9), requires_grad=False)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.register_buffer("count", torch.tensor([3, -7, 100]))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("center", torch.randn(1, 5))
        self.register_buffer("scratch", torch.randn(4), persistent=False)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 4, bias=False), nn.Linear(6, 4)
        self.head.weight = self.embed.weight


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.real, self.wave = nn.Linear(3, 3), nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))


def train(model):
    """Everything that moves in training, in place."""
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            if x.is_floating_point() or x.is_complex():
                x.add_(torch.randn(x.shape, dtype=x.dtype), alpha=0.3)
            elif x.dtype == torch.bool:
                x.logical_not_()
            else:
                x.add_(7)


# What solo-learn looks like when it is imported


SOLO = {
    "simclr": "def simclr_loss_func(z, indexes, temperature=0.1): ...",
    "mocov2plus": "def mocov2plus_loss_func(query, key, queue, temperature=0.1): ...",
    "mocov3": "def mocov3_loss_func(query, key, temperature=0.2): ...",
    "nnclr": "def nnclr_loss_func(nn, p, temperature=0.1): ...",
    "byol": "def byol_loss_func(p, z, simplified=True): ...",
    "dino": """import torch
class DINOLoss(torch.nn.Module):
    def __init__(self, *arguments):
        super().__init__()
        self.epoch = 0
    def forward(self, student_output, teacher_output): ...""",
}
OLD_SOLO = {
    "simclr": "def simclr_loss_func(z1, z2, temperature=0.1, extra_pos_mask=None): return 'theirs'",
    "moco": "def moco_loss_func(query, key, queue, temperature=0.1): ...",
    "nnclr": SOLO["nnclr"],
}


def install_solo(folder: Path, files: dict[str, str]) -> dict[str, str]:
    """A package solo with these files as solo/losses/*.py; what each defines."""
    losses = folder / "solo" / "losses"
    losses.mkdir(parents=True)
    names = {name: text.split("(")[0].split()[-1] for name, text in files.items()}
    (losses.parent / "__init__.py").write_text("from solo import losses\n")
    lines = [f"from solo.losses.{name} import {what}\n" for name, what in names.items()]
    (losses / "__init__.py").write_text("".join(lines))
    for name, text in files.items():
        (losses / f"{name}.py").write_text(text + "\n")
    return names
