"""One file per method: what it trains, and its loss on the views of a batch.

A method's module has `Config`, the options of its runs, and `build(cfg, channels, size)`, its Method for
images [channels, size, size]. NAMES lists the modules.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from sslfast.train import augment, optim
from sslfast.train.config import TrainConfig
from sslfast.train.data import ImageSet

NAMES = ("simclr", "byol", "moco", "mocov3", "dino", "mae")


def module(name: str) -> ModuleType:
    """The module of the method called `name`; raises ValueError for an unknown one."""
    if name not in NAMES:
        raise ValueError(f"method: expected one of {', '.join(NAMES)}, got {name!r}")
    return importlib.import_module(f"sslfast.train.methods.{name}")


def unit_rows(x: Tensor) -> Tensor:
    """[N, D] -> rows of unit length, in float32 or wider whatever autocast left."""
    return nn.functional.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


@dataclass(frozen=True)
class Now:
    """Where a run stands."""

    step: int
    """updates made so far"""
    total: int
    """updates of the whole run"""
    steps_per_epoch: int

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch


class Method(nn.Module):
    """What the loop needs of a method. For each update it calls, in this order,

    1. `schedule(now, groups)` and `before_step()`;
    2. `training_step(views)` and backward, once for each of the batches that are accumulated;
    3. `clip(max_norm)` if gradients are clipped, the optimizer's step over `parameter_groups`,
    `after_step()`.

    What belongs to a batch (a queue, a centre) changes in `training_step`, what follows the weights (a
    teacher) in `before_step` or `after_step`. All state is in parameters and buffers, so that checkpoints
    have it; numbers that a schedule sets are 0-d buffers that `schedule` fills, so that a captured step sees
    them. Nothing here reads from the device.
    """

    encoder: nn.Module
    """The network that is evaluated: images [B, C, H, W] -> features [B, dim]."""

    def training_step(self, views: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Views [B, C, H, W] of the same images -> (loss, metrics).

        Metrics are 0-d tensors to log, and what the collapse monitor watches: "embeddings" [B, D] and, where
        there is a teacher, "targets" [B, D], the teacher's of the same images, which they are to match.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a training_step")

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Groups for the optimizer; may set its options and `lr_scale`, a factor of the learning rate."""
        return optim.parameter_groups(self, weight_decay)

    def views(self, cfg: TrainConfig, channels: int, size: int) -> augment.Views:
        """What makes the views: uint8 images [B, C, H, W] -> tensors [B, C, h, w] in [0, 1], of any sizes."""
        return augment.two_views(cfg.resolve_augment(), size, channels)

    def schedule(self, now: Now, groups: list[dict]) -> None:
        """Sets what changes over a run, other than the learning rate; `groups` are the optimizer's."""

    def before_step(self) -> None:
        """Precedes each update's first batch."""

    def clip(self, max_norm: float) -> Tensor:
        """Scales the gradients down to a norm of at most max_norm, all as one vector; returns what it was."""
        return torch.nn.utils.clip_grad_norm_(self.parameters(), max_norm)

    def after_step(self) -> None:
        """Follows each update of the weights."""

    def show(self, images: ImageSet, out: Path, device: torch.device) -> dict[str, dict[str, list[float]]]:
        """After training, what only this method has to show: draws pictures into the folder `out`, and
        returns {measurement: {of what: [number]}}."""
        return {}
