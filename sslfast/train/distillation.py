"""Self-distillation: losses of a student and a teacher by DINO (Caron et al. 2021) and DINOv2 (Oquab et al.
2023)."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sslfast import (
    block_patch_mask,
    dino_head_loss,
    ibot_head_loss,
    koleo_loss,
    sinkhorn_center,
    update_center_,
)
from sslfast.distributed import world
from sslfast.train.budget import phase
from sslfast.train.heads import Network
from sslfast.train.vit import ViT


class PrototypeLoss(nn.Module):
    """DINO's loss of images, or with weights iBOT's of patches, and the centre that it keeps.

    In training mode the centre follows the teacher after each loss; with "sinkhorn" the assignments of each
    batch give one instead.
    """

    center: Tensor

    def __init__(self, prototypes: int, student_temp: float, centering: str, momentum: float) -> None:
        super().__init__()
        self.student_temp, self.centering, self.momentum = student_temp, centering, momentum
        self.register_buffer("center", torch.zeros(prototypes))

    def forward(
        self,
        student: Tensor,
        student_prototypes: Tensor,
        teacher: Tensor,
        teacher_prototypes: Tensor,
        teacher_temp: Tensor,
        weights: Tensor | None = None,
        images: int = 1,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and, of images, metrics: entropy of the teacher's assignments relative to ln K and their
        divergence from the student's, both of some of the rows where there are many logits, and the centre's
        norm.

        Args:
            student, teacher: features [S, B, D] and [T, B, D]; with weights [R], of patches [R, D].
            teacher_temp: 0-d. The teacher's features and centre are divided by it, so that who captures a
                step may change it.
            images: of iBOT's loss.
        """
        rows = teacher.flatten(0, -2) / teacher_temp
        if self.centering == "sinkhorn":
            center = sinkhorn_center(rows, 1.0, prototypes=teacher_prototypes)
        else:
            center = self.center / teacher_temp
        both = student, student_prototypes, teacher / teacher_temp, teacher_prototypes, center
        if weights is None:
            loss = dino_head_loss(*both, self.student_temp, 1.0)
        else:
            loss = ibot_head_loss(*both, weights, images, self.student_temp, 1.0)
        metrics = {}
        if weights is None:
            entropy = _entropy(rows, teacher_prototypes, center)
            metrics["teacher_entropy"] = entropy / math.log(len(center))
            metrics["kl"] = loss.detach() - entropy
            metrics["center_norm"] = center.norm() * teacher_temp
        if self.training and self.centering == "center":
            update_center_(self.center, teacher, self.momentum, prototypes=teacher_prototypes)
        return loss, metrics


@torch.no_grad()
def _entropy(rows: Tensor, prototypes: Tensor, center: Tensor, logits: int = 1 << 20) -> Tensor:
    """Mean entropy of softmax(rows @ prototypes.T - center), over as many rows as have so many logits."""
    step = -(-len(rows) * len(prototypes) // logits)
    with torch.autocast(rows.device.type, enabled=False):
        log_p = (rows[::step].to(center.dtype) @ prototypes.T.to(center.dtype) - center).log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


class Distillation(nn.Module):
    """What the student loses against the teacher: DINO's term, and iBOT's and KoLeo's where they have weight.

    Args:
        prototypes, student_temp, centering, center_momentum: as in PrototypeLoss, for both losses.
    """

    def __init__(
        self, prototypes: int, student_temp: float, centering: str, center_momentum: float,
        ibot_weight: float, koleo_weight: float,
    ) -> None:  # fmt: skip
        super().__init__()
        own = prototypes, student_temp, centering, center_momentum
        self.images, self.patches = PrototypeLoss(*own), PrototypeLoss(*own)
        self.ibot_weight, self.koleo_weight = ibot_weight, koleo_weight

    def forward(
        self, student: Network, teacher: Network, views: Sequence[Tensor], teacher_temp: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of views [B, C, H, W], of which the first two are global."""
        batch, masked = len(views[0]), None
        if self.ibot_weight:
            assert isinstance(student.encoder, ViT)
            grid = student.encoder.grid_of(*views[0].shape[-2:])
            masked = draw_masks(2 * batch, grid, views[0].device)
        features, patches = student(views, None if masked is None else masked[0])
        embedded = student.head(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        with torch.no_grad():
            others, other_patches = teacher(views[:2])
            target = teacher.head(others.flatten(0, 1)).unflatten(0, (2, batch))
        prototypes = student.head.weight(), teacher.head.weight()
        with phase("loss"):
            loss, metrics = self.images(embedded, prototypes[0], target, prototypes[1], teacher_temp)
        metrics |= {"embeddings": embedded[0], "targets": target[1]}
        if masked is not None:
            assert student.patch_head is not None and teacher.patch_head is not None
            _, places, weights = masked
            with torch.no_grad():
                hidden = teacher.patch_head(other_patches[places])
            seen = student.patch_head(patches[places])
            prototypes = student.patch_head.weight(), teacher.patch_head.weight()
            with phase("loss"):
                metrics["ibot_loss"], _ = self.patches(
                    seen, prototypes[0], hidden, prototypes[1], teacher_temp, weights, 2 * batch
                )
            loss = loss + self.ibot_weight * metrics["ibot_loss"]
        if self.koleo_weight:
            with phase("loss"):
                first, second = (koleo_loss(x, group=world()) for x in features[:2])
                metrics["koleo_loss"] = first + second
            loss = loss + self.koleo_weight * metrics["koleo_loss"]
        return loss, {name: x.detach() for name, x in metrics.items()}


def rising(start: float, end: float, epoch: int, epochs: int) -> float:
    """From start in epoch 0 to end in the last of `epochs`, in equal steps."""
    if not epochs:
        return end
    return start + (end - start) * min(1.0, epoch / max(1, epochs - 1))


def draw_masks(images: int, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Which patches the student does not see, as DINOv2 draws them: blocks in half of the images.

    The shares that are masked are spread evenly over 0.1 to 0.5, so that their sum is the same for every
    batch and no one has to wait for it; which image gets which is random.

    Returns:
        mask [N, L], places of its R ones in it, and for each 1 / ones of that image [R].
    """
    length = grid[0] * grid[1]
    counts, total = _counts(images, length, device)
    counts = counts[torch.randperm(images, device=device)]
    mask = block_patch_mask(
        images, grid, ratio_range=(min(0.5, 4 / length), 0.5), aspect_range=(0.3, 1 / 0.3), num_masked=counts
    )
    places = mask.flatten().argsort(descending=True, stable=True)[:total]
    return mask, places, counts[places // length].double().reciprocal()


@functools.lru_cache(8)
def _counts(images: int, length: int, device: torch.device) -> tuple[Tensor, int]:
    """Masked patches of each image, and of all; copied to the device once."""
    some = max(1, images // 2)
    shares = [0.1 + 0.4 * (i + 0.5) / some for i in range(some)]
    numbers = [max(1, round(length * share)) for share in shares] + [0] * (images - some)
    return torch.tensor(numbers, device=device), sum(numbers)
