"""Losses between distributions over prototypes (DINO, iBOT), on `soft_cross_entropy`."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn

from sslfast.ops._check import FLOATS, check_integer, check_temperature, check_tensor, number
from sslfast.ops.head_cross_entropy import head_cross_entropy
from sslfast.ops.soft_cross_entropy import soft_cross_entropy, view_cross_entropy

Views = Tensor | Sequence[Tensor]


def dino_loss(
    student_logits: Views,
    teacher_logits: Views,
    center: Tensor,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    *,
    inplace_backward: bool = False,
) -> Tensor:
    """DINO's loss (Caron et al. 2021): each view of the student against the teacher's other views.

    The mean over all pairs (t, v) of different views, and over images, of
    -sum_k softmax((teacher_t - center) / teacher_temp)_k log softmax(student_v / student_temp)_k.

    Args:
        student_logits: [S, B, K], or S tensors [B, K], which are copied into one. The first T views are the
            teacher's.
        teacher_logits: [T, B, K], or T tensors [B, K]. They carry no gradient.
        center: [K], also behind dimensions of 1; copied, so that `update_center_` may be called before the
            backward pass.
        student_temp, teacher_temp: numbers other than 0.
        inplace_backward: the backward pass writes the gradient over the student's logits; see
            `soft_cross_entropy`.

    Returns:
        0-d float32 (float64 for float64 logits). Differentiable in student_logits, once.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, or views of which
            no two differ; the message names it.
    """
    student, teacher = _stacked("student_logits", student_logits), _stacked("teacher_logits", teacher_logits)
    _, batch, classes = student.shape
    check_tensor("teacher_logits", teacher, FLOATS, (None, batch, classes), student)
    pairs = _pairs("student_logits", student, teacher)
    _check_center(center, classes, student)
    scale, target_scale = _inverse("student_temp", student_temp), _inverse("teacher_temp", teacher_temp)
    if inplace_backward and student.requires_grad and student.is_leaf:
        raise ValueError("inplace_backward: expected computed logits, got a leaf, which would be lost")
    losses = view_cross_entropy(
        student,
        teacher,
        scale,
        center=center.detach().flatten().clone(),
        target_scale=target_scale,
        skip=True,
        in_place=inplace_backward,
    )
    return losses.sum() / (pairs * batch)


def dino_head_loss(
    student_features: Views,
    student_prototypes: Tensor,
    teacher_features: Views,
    teacher_prototypes: Tensor,
    center: Tensor,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
) -> Tensor:
    """`dino_loss` of the logits features @ prototypes.T, which never exist as a whole unless they are few.

    Args:
        student_features: [S, B, D], or S tensors [B, D]: what goes into the head's last layer. The first T
            views are the teacher's. Under autocast cast as torch.mm would cast them.
        student_prototypes: [K, D], the weight of that layer.
        teacher_features: [T, B, E], or T tensors [B, E], of the student's dtype; teacher_prototypes: [K, E].
            They carry no gradient.
        center, student_temp, teacher_temp: as in `dino_loss`.

    Returns:
        0-d float32 (float64 for float64 features). Differentiable in student_features and
        student_prototypes, once.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, or views of which
            no two differ; the message names it.
    """
    student = _stacked("student_features", student_features)
    teacher = _stacked("teacher_features", teacher_features)
    batch = student.shape[1]
    check_tensor("teacher_features", teacher, (student.dtype,), (None, batch, None), student)
    pairs = _pairs("student_features", student, teacher)
    losses = _head_losses(
        student,
        student_prototypes,
        teacher,
        teacher_prototypes,
        center,
        student_temp,
        teacher_temp,
        skip=True,
    )
    return losses.sum() / (pairs * batch)


def _head_losses(
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    skip: bool,
) -> Tensor:
    """[S, B] of features [S, B, D] and [T, B, E]."""
    check_tensor("student_prototypes", student_prototypes, FLOATS, (None, student.shape[2]), student)
    classes = len(student_prototypes)
    if not classes:
        raise ValueError("student_prototypes: expected at least one, got none")
    check_tensor("teacher_prototypes", teacher_prototypes, FLOATS, (classes, teacher.shape[2]), student)
    _check_center(center, classes, student)
    return head_cross_entropy(
        student,
        student_prototypes,
        teacher,
        teacher_prototypes,
        _inverse("student_temp", student_temp),
        _inverse("teacher_temp", teacher_temp),
        center=center.detach().flatten().clone(),
        skip=skip,
    )


def _pairs(name: str, student: Tensor, teacher: Tensor) -> int:
    """How many views of the student meet another view of the teacher."""
    pairs = len(student) * len(teacher) - min(len(student), len(teacher))
    if not pairs:
        raise ValueError(
            f"{name}: expected two views that differ, got {len(student)} of the student and {len(teacher)} "
            "of the teacher"
        )
    return pairs


def _stacked(name: str, views: Views) -> Tensor:
    if not isinstance(views, Tensor):
        if not isinstance(views, Sequence):
            raise TypeError(f"{name}: expected a tensor or a sequence of tensors, got {type(views).__name__}")
        if not views:
            raise ValueError(f"{name}: expected at least one view, got none")
        for i, view in enumerate(views):
            check_tensor(f"{name}[{i}]", view, FLOATS, (None, None))
            check_tensor(f"{name}[{i}]", view, (views[0].dtype,), tuple(views[0].shape), views[0])
        views = torch.stack(list(views))
    check_tensor(name, views, FLOATS, (None, None, None))
    if not views.shape[1]:
        raise ValueError(f"{name}: expected at least one image, got shape {list(views.shape)}")
    if not views.shape[2]:
        raise ValueError(f"{name}: expected a last dimension of at least 1, got shape {list(views.shape)}")
    return views


def _check_center(center: Tensor, classes: int, like: Tensor) -> None:
    before = center.dim() - 1 if isinstance(center, Tensor) else 0
    check_tensor("center", center, FLOATS, (*(1,) * before, classes), like)


def _inverse(name: str, temperature: float) -> float:
    check_temperature(name, number(name, temperature))
    return 1.0 / temperature


@torch.no_grad()
def update_center_(
    center: Tensor,
    teacher_logits: Tensor,
    momentum: float = 0.9,
    *,
    prototypes: Tensor | None = None,
    group: distributed.ProcessGroup | None = None,
) -> Tensor:
    """Moves DINO's centre towards the mean of the teacher's logits, in place, and returns it.

    center <- momentum center + (1 - momentum) mean, over the rows of all processes where torch.distributed
    runs. To be called after the loss has used the centre.

    Args:
        center: [K], also behind dimensions of 1.
        teacher_logits: [..., K], of all the teacher's views; where there is no row the centre stays.
        momentum: in [0, 1].
        prototypes: [K, D]; with them teacher_logits are features [..., D], whose logits are never made: the
            mean of products is the product of the mean.
        group: processes to average over; None: all.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
    """
    if not isinstance(teacher_logits, Tensor) or teacher_logits.dim() < 1:
        raise TypeError("teacher_logits: expected a tensor [..., K]")
    if prototypes is not None:
        check_tensor("prototypes", prototypes, FLOATS, (None, teacher_logits.shape[-1]), teacher_logits)
    _check_center(
        center, (teacher_logits.shape[-1] if prototypes is None else len(prototypes)), teacher_logits
    )
    if not 0 <= number("momentum", momentum) <= 1:
        raise ValueError(f"momentum: expected a number in [0, 1], got {momentum}")
    work = torch.promote_types(center.dtype, torch.float32)
    rows = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])
    mean = rows.sum(0, dtype=work)
    count: Tensor = mean.new_full((1,), len(rows))
    if distributed.is_available() and distributed.is_initialized():
        both = torch.cat([mean, count])
        distributed.all_reduce(both, group=group)
        mean, count = both[:-1], both[-1:]
    if prototypes is not None:
        with torch.autocast(center.device.type, enabled=False):
            mean = prototypes.detach().to(work) @ mean
    moved = momentum * center.to(work) + (1 - momentum) * mean / count
    return center.copy_(torch.where(count > 0, moved, center))


class DINOLoss(nn.Module):
    """`dino_loss` with its centre: loss(student_logits, teacher_logits, teacher_temp=None).

    In training mode the centre follows the teacher's logits after each loss, over all processes.

    Args:
        num_prototypes: K.
        student_temp, teacher_temp: a teacher_temp of the call comes first.
        center_momentum: of `update_center_`.
    """

    center: Tensor

    def __init__(
        self,
        num_prototypes: int,
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        center_momentum: float = 0.9,
        *,
        inplace_backward: bool = False,
        group: distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_integer("num_prototypes", num_prototypes, 1)
        for name, x in (("student_temp", student_temp), ("teacher_temp", teacher_temp)):
            check_temperature(name, number(name, x))
        if not 0 <= number("center_momentum", center_momentum) <= 1:
            raise ValueError(f"center_momentum: expected a number in [0, 1], got {center_momentum}")
        self.student_temp, self.teacher_temp = student_temp, teacher_temp
        self.center_momentum, self.inplace_backward, self.group = center_momentum, inplace_backward, group
        self.register_buffer("center", torch.zeros(num_prototypes))

    def forward(
        self, student_logits: Views, teacher_logits: Views, teacher_temp: float | None = None
    ) -> Tensor:
        teacher = _stacked("teacher_logits", teacher_logits).detach()
        loss = dino_loss(
            student_logits,
            teacher,
            self.center,
            self.student_temp,
            self.teacher_temp if teacher_temp is None else teacher_temp,
            inplace_backward=self.inplace_backward,
        )
        if self.training:
            update_center_(self.center, teacher, self.center_momentum, group=self.group)
        return loss

    def extra_repr(self) -> str:
        return (
            f"num_prototypes={len(self.center)}, student_temp={self.student_temp}, "
            f"teacher_temp={self.teacher_temp}, center_momentum={self.center_momentum}"
        )


def ibot_loss(
    student_logits: Tensor,
    teacher_probs: Tensor,
    weights: Tensor,
    num_images: int,
    student_temp: float = 0.1,
    *,
    inplace_backward: bool = False,
) -> Tensor:
    """iBOT's loss on masked patches (Zhou et al. 2022), as DINOv2 weights it.

    sum_r weights_r CE(teacher_probs_r, softmax(student_r / student_temp)) / num_images

    Args:
        student_logits: [R, K], rows of masked patches only.
        teacher_probs: [R, K]. They carry no gradient.
        weights: [R], 1 / masked patches of that row's image; 0 for rows that only fill up.
        num_images: images of the batch, those without a masked patch too.
        student_temp: a number other than 0.
        inplace_backward: see `soft_cross_entropy`.

    Returns:
        0-d float32 (float64 for float64 logits). Differentiable in student_logits, once.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
    """
    check_tensor("student_logits", student_logits, FLOATS, (None, None))
    check_tensor("teacher_probs", teacher_probs, FLOATS, tuple(student_logits.shape), student_logits)
    check_tensor("weights", weights, FLOATS, (len(student_logits),), student_logits)
    check_integer("num_images", num_images, 1)
    scale = _inverse("student_temp", student_temp)
    losses = soft_cross_entropy(student_logits, teacher_probs, scale=scale, inplace_backward=inplace_backward)
    return (losses * weights.detach().to(losses.dtype)).sum() / num_images


def ibot_head_loss(
    student_features: Tensor,
    student_prototypes: Tensor,
    teacher_features: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor,
    weights: Tensor,
    num_images: int,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
) -> Tensor:
    """`ibot_loss` from features of masked patches [R, D] and [R, E], as `dino_head_loss` is `dino_loss`.

    The teacher's probabilities are softmax((features @ prototypes.T - center) / teacher_temp), Sinkhorn's
    with the centre of `sinkhorn_center`. Other arguments, result and errors: as those two have them.
    """
    check_tensor("student_features", student_features, FLOATS, (None, None))
    rows, dim = student_features.shape
    check_tensor(
        "teacher_features", teacher_features, (student_features.dtype,), (rows, None), student_features
    )
    check_tensor("weights", weights, FLOATS, (rows,), student_features)
    check_integer("num_images", num_images, 1)
    losses = _head_losses(
        student_features[None], student_prototypes, teacher_features[None], teacher_prototypes, center,
        student_temp, teacher_temp, skip=False,
    )  # fmt: skip
    return (losses[0] * weights.detach().to(losses.dtype)).sum() / num_images


class IBOTLoss(nn.Module):
    """`ibot_loss` as a module: loss(student_logits, teacher_probs, weights, num_images)."""

    def __init__(self, student_temp: float = 0.1, *, inplace_backward: bool = False) -> None:
        super().__init__()
        self.student_temp, self.inplace_backward = student_temp, inplace_backward

    def forward(
        self, student_logits: Tensor, teacher_probs: Tensor, weights: Tensor, num_images: int
    ) -> Tensor:
        return ibot_loss(
            student_logits, teacher_probs, weights, num_images, self.student_temp,
            inplace_backward=self.inplace_backward,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"student_temp={self.student_temp}"
