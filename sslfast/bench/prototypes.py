"""Losses over prototypes or classes."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from sslfast.bench.case import Case, Inputs, Work, wide
from sslfast.kernels import tuning

STUDENT, TEACHER, SINKHORN = 0.1, 0.04, 0.07  # temperatures
VIEWS, TEACHERS, FEATURES, PROTOTYPES = 10, 2, 256, 65_536
HIDDEN, VOCABULARY, IGNORED = 512, 50_257, -100


def logits(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    """Spread as the cosines of a trained head are."""
    return (torch.randn(shape, device=device) / 4).to(dtype)


def unit(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    return F.normalize(torch.randn(shape, device=device), dim=-1).to(dtype)


def crops(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    return {
        "student": logits(dtype, device, VIEWS, size, PROTOTYPES),
        "teacher": logits(dtype, device, TEACHERS, size, PROTOTYPES),
        "center": torch.randn(1, PROTOTYPES, device=device) / 16,
    }


def heads(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Prototypes are float32 whatever the dtype, as under autocast."""
    return {
        "student": unit(dtype, device, VIEWS, size, FEATURES),
        "prototypes": unit(torch.float32, device, PROTOTYPES, FEATURES),
        "teacher": unit(dtype, device, TEACHERS, size, FEATURES),
        "teacher_prototypes": unit(torch.float32, device, PROTOTYPES, FEATURES),
        "center": torch.randn(1, PROTOTYPES, device=device) / 16,
    }


def masked(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    return {
        "student": logits(dtype, device, size, 8192),
        "teacher": logits(torch.float32, device, size, 8192).softmax(1),
        "weights": torch.full((size,), 1 / 64, device=device),
    }


def masked_heads(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    return {
        "student": unit(dtype, device, size, FEATURES),
        "prototypes": unit(torch.float32, device, 8192, FEATURES),
        "teacher": unit(dtype, device, size, FEATURES),
        "teacher_prototypes": unit(torch.float32, device, 8192, FEATURES),
        "center": torch.randn(1, 8192, device=device) / 16,
        "weights": torch.full((size,), 1 / 64, device=device),
    }


def language(labelled: float):
    def inputs(size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        labels = torch.randint(VOCABULARY, (size,), device=device)
        labels[torch.randperm(size, device=device)[int(size * labelled) :]] = IGNORED
        weight = 2 * HIDDEN**-0.5 * torch.randn(VOCABULARY, HIDDEN, device=device)
        return {
            "hidden": torch.randn(size, HIDDEN, device=device).to(dtype),
            "weight": weight.to(dtype),
            "labels": labels,
            "num_labelled": int(size * labelled),  # as a caller who masks knows it
        }

    return inputs


# Plain PyTorch, as official code has it.


def plain_dino(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    """main_dino.py's DINOLoss of [S, B, K], [T, B, K], [1, K]."""
    targets = F.softmax((wide(teacher) - center) / TEACHER, dim=-1).detach()
    total, terms = torch.zeros((), dtype=targets.dtype, device=student.device), 0
    for t, q in enumerate(targets):
        for v, row in enumerate(student):
            if v == t:
                continue
            total = total + torch.sum(-q * F.log_softmax(wide(row) / STUDENT, dim=-1), dim=-1).mean()
            terms += 1
    return total / terms


def plain_dino_head(
    student: Tensor, prototypes: Tensor, teacher: Tensor, teacher_prototypes: Tensor, center: Tensor
) -> Tensor:
    """The last layer of both heads, then the loss."""
    logits = student @ prototypes.to(student.dtype).T
    with torch.no_grad():
        targets = teacher @ teacher_prototypes.to(teacher.dtype).T
    return plain_dino(logits, targets, center)


def plain_ibot(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """iBOT's loss of the rows of masked patches, 64 of each of 64 images."""
    rows = (-teacher * F.log_softmax(wide(student) / STUDENT, dim=-1)).sum(-1)
    return (rows * weights).sum() / 64


def plain_ibot_head(
    student: Tensor, prototypes: Tensor, teacher: Tensor, teacher_prototypes: Tensor, center: Tensor,
    weights: Tensor,
) -> Tensor:  # fmt: skip
    logits = student @ prototypes.to(student.dtype).T
    with torch.no_grad():
        targets = F.softmax(
            (wide(teacher @ teacher_prototypes.to(teacher.dtype).T) - center) / TEACHER, dim=-1
        )
    return plain_ibot(logits, targets, weights)


def our_dino_head(**inputs: Tensor) -> Tensor:
    return sslfast.dino_head_loss(*inputs.values(), STUDENT, TEACHER)  # type: ignore[arg-type, call-arg]


def our_ibot_head(weights: Tensor, **inputs: Tensor) -> Tensor:
    return sslfast.ibot_head_loss(*inputs.values(), weights, 64, STUDENT, TEACHER)  # type: ignore[arg-type, call-arg]


@torch.no_grad()
def plain_sinkhorn(logits: Tensor) -> Tensor:
    """dino_clstoken_loss.py of DINOv2 on one process: [R, K] -> [R, K]."""
    q = torch.exp(wide(logits) / SINKHORN).t()
    classes, rows = q.shape
    q /= torch.sum(q)
    for _ in range(3):
        q /= torch.sum(q, dim=1, keepdim=True)
        q /= classes
        q /= torch.sum(q, dim=0, keepdim=True)
        q /= rows
    q *= rows
    return q.t()


@torch.no_grad()
def plain_sinkhorn_center(logits: Tensor) -> Tensor:
    """Cuturi 2013: the matrix of exponentials stays, its factors change: [R, K] -> [K]."""
    kernel = torch.exp(wide(logits) / SINKHORN)
    rows = kernel.new_ones(len(kernel))
    for _ in range(3):
        classes = 1 / (kernel.T @ rows)
        rows = 1 / (kernel @ classes)
    return -SINKHORN * classes.log()


def plain_soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * F.log_softmax(wide(logits) * 10, dim=-1)).sum(-1)


def plain_linear(hidden: Tensor, weight: Tensor, labels: Tensor, num_labelled: int) -> Tensor:
    return F.cross_entropy(wide(hidden @ weight.T), labels, ignore_index=IGNORED)


# Floors. What follows is read once forward, once more backward, and gradients are written.


def of_logits(student: int, teacher: int, classes: int, teacher_bytes: int = 0):
    """Rows of logits of both sides for each of the size; a gradient for the student's. teacher_bytes: of a
    number of the teacher's, 0: as the student's."""

    def work(size: int, itemsize: int, backward: bool) -> Work:
        read = student * itemsize + teacher * (teacher_bytes or itemsize)
        return Work(bytes=classes * size * (read * (1 + backward) + student * itemsize * backward))

    return work


def of_heads(student: int, teacher: int, classes: int):
    """The same, the logits being products of rows of features and prototypes."""

    def work(size: int, itemsize: int, backward: bool) -> Work:
        rows, pulled = (student + teacher) * size, student * size * backward
        features = itemsize * FEATURES * (rows * (1 + backward) + pulled)
        weights = 4 * FEATURES * classes * (2 + 3 * backward)
        again = rows * backward * (rows * classes > tuning.KEPT["cpu"])  # logits that are too many to be kept
        flops = 2 * classes * FEATURES * (rows + again + 2 * pulled)  # and both gradients
        return Work(flops, features + weights)

    return work


def of_language(labelled: float):
    def work(size: int, itemsize: int, backward: bool) -> Work:
        rows = int(size * labelled)
        flops = 2 * rows * HIDDEN * VOCABULARY * (4 if backward else 1)
        return Work(flops, itemsize * HIDDEN * (rows + VOCABULARY) * (3 if backward else 1))

    return work


def _language_case(labelled: float, variant: str) -> Case:
    return Case(
        "linear_cross_entropy",
        f"{{}} x {HIDDEN} x {VOCABULARY:,}",
        (2048,),
        (8192,),
        language(labelled),
        ours=sslfast.linear_cross_entropy,
        plain=plain_linear,
        trained=("hidden", "weight"),
        work=of_language(labelled),
        variant=variant,
    )


_HEADS: dict[str, Any] = dict(trained=("student", "prototypes"), tolerance=3.0)

CASES = (
    Case(
        "soft_cross_entropy",
        "{} x 8,192",
        (4096,),
        (16_384,),
        lambda n, dtype, device: {
            "logits": logits(dtype, device, n, 8192),
            "targets": (4 * logits(torch.float32, device, n, 8192)).softmax(1).to(dtype),
        },
        ours=lambda logits, targets: sslfast.soft_cross_entropy(logits, targets, scale=10.0),
        plain=plain_soft_cross_entropy,
        trained=("logits",),
        work=of_logits(1, 1, 8192),
    ),
    Case(
        "dino_loss",
        "{} x (2 + 10) x 65,536",
        (8,),
        (64,),
        crops,
        trained=("student",),
        ours=lambda student, teacher, center: sslfast.dino_loss(student, teacher, center, STUDENT, TEACHER),
        plain=plain_dino,
        work=of_logits(VIEWS, TEACHERS, PROTOTYPES),
    ),
    Case(
        "dino_head_loss",
        "{} x (2 + 10) x 256 x 65,536",
        (8,),
        (64,),
        heads,
        **_HEADS,
        ours=our_dino_head,
        plain=plain_dino_head,
        work=of_heads(VIEWS, TEACHERS, PROTOTYPES),
    ),
    Case(
        "ibot_loss",
        "{} x 8,192",
        (4096,),
        (4096,),
        masked,
        trained=("student",),
        ours=lambda student, teacher, weights: sslfast.ibot_loss(student, teacher, weights, 64, STUDENT),
        plain=plain_ibot,
        work=of_logits(1, 1, 8192, 4),
    ),
    Case(
        "ibot_head_loss",
        "{} x 256 x 8,192",
        (4096,),
        (4096,),
        masked_heads,
        **_HEADS,
        ours=our_ibot_head,
        plain=plain_ibot_head,
        work=of_heads(1, 1, 8192),
    ),
    Case(
        "sinkhorn_knopp",
        "{} x 8,192",
        (3840,),
        (3840,),
        lambda n, dtype, device: {"logits": logits(dtype, device, n, 8192)},
        ours=lambda logits: sslfast.sinkhorn_knopp(logits, SINKHORN, 3),
        plain=plain_sinkhorn,
        work=lambda size, itemsize, backward: Work(bytes=size * 8192 * (4 * itemsize + 4)),
    ),
    Case(
        "sinkhorn_center",
        "{} x 8,192",
        (3840,),
        (3840,),
        lambda n, dtype, device: {"logits": logits(dtype, device, n, 8192)},
        ours=lambda logits: sslfast.sinkhorn_center(logits, SINKHORN),
        plain=plain_sinkhorn_center,
        work=lambda size, itemsize, backward: Work(bytes=size * 8192 * 3 * itemsize),
    ),
    _language_case(0.15, "15% labelled"),
    _language_case(1.0, "all labelled"),
)
