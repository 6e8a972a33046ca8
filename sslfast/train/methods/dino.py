"""DINO (Caron et al. 2021): crops are assigned to prototypes as a slow follower assigns whole images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sslfast import EMATeacher, cosine_momentum
from sslfast.train import attention, augment, models, optim
from sslfast.train.config import TrainConfig
from sslfast.train.data import ImageSet
from sslfast.train.distillation import Distillation, rising
from sslfast.train.heads import Network, network
from sslfast.train.methods import Method, Now
from sslfast.train.vit import set_drop_path


@dataclass(frozen=True)
class Config(TrainConfig):
    """DINO (Caron et al. 2021), for small runs. DINOv2: --ibot-weight 1 --koleo-weight 0.1.

    The paper's ViT-S: --backbone vit_small --patch-size 16 --image-size 224 --local-crops 8 --hidden-dim 2048
    --prototypes 65536 --momentum 0.996 --centering center --teacher-temp 0.04 --drop-path 0.1.
    """

    batch_size: int = 64
    local_crops: int = 2  # small crops per image, beside two global views
    local_size: int = 0  # their side in pixels; 0: three sevenths of an image's, in whole patches
    crop_area: float = 0.4
    """Share of an image that a global view has at least, and a small crop at most; DINOv2 has 0.32."""
    prototypes: int = 1024
    hidden_dim: int = 512
    bottleneck_dim: int = 256
    head_layers: int = 3
    fixed_norm: bool = True  # of the prototypes, 1
    freeze_epochs: float = 1.0  # of the prototypes
    student_temp: float = 0.1
    teacher_temp: float = 0.02  # in the end; the paper has 0.04, in longer runs 0.07, to which it rises
    teacher_temp_epochs: int = 0  # epochs of that rise, linear from 0.04; the longer runs have 30
    momentum: float = 0.95  # of the teacher at first; it rises to 1 on a cosine
    center_momentum: float = 0.9
    centering: Literal["center", "sinkhorn"] = "sinkhorn"
    """What spreads the teacher's assignments: the paper's moving average, or Sinkhorn-Knopp on each batch."""
    ibot_weight: float = 0.0  # of iBOT's loss on masked patches of a ViT
    ibot_head: Literal["shared", "separate"] = "shared"
    koleo_weight: float = 0.0
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4  # on a cosine
    clip_norm: float = 3.0  # greatest norm of the gradient of each parameter; 0: not clipped
    drop_path: float = 0.0  # of the last block of a student that is a ViT
    recipe = "dino"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("student_temp", "teacher_temp")
        self.check_share("momentum", "center_momentum", "drop_path")
        self.check_at_least(
            0, "local_crops", "local_size", "freeze_epochs", "teacher_temp_epochs", "ibot_weight",
            "koleo_weight", "final_weight_decay",
        )  # fmt: skip
        self.check_at_least(1, "hidden_dim", "bottleneck_dim", "head_layers")
        self.check_at_least(2, "prototypes")


def build(cfg: Config, channels: int, size: int) -> Method:
    encoder = models.build(cfg, channels, size)
    sizes = encoder.dim, cfg.prototypes, cfg.hidden_dim, cfg.bottleneck_dim, cfg.head_layers, cfg.fixed_norm
    return DINO(network(encoder, sizes, cfg.ibot_head if cfg.ibot_weight else "none"), cfg)


class DINO(Method):
    """The student, and the teacher, which follows it after each update and is what is evaluated."""

    momentum: Tensor
    teacher_temp: Tensor

    def __init__(self, student: Network, cfg: Config) -> None:
        super().__init__()
        self.student, self.cfg = student, cfg
        self.teacher = EMATeacher(student, cfg.momentum, buffers="keep")
        set_drop_path(student.encoder, cfg.drop_path)
        own = cfg.prototypes, cfg.student_temp, cfg.centering, cfg.center_momentum
        self.losses = Distillation(*own, cfg.ibot_weight, cfg.koleo_weight)
        self.register_buffer("momentum", torch.tensor(cfg.momentum, dtype=torch.float64))
        self.register_buffer("teacher_temp", torch.tensor(cfg.teacher_temp))

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        return self.teacher.model.encoder  # type: ignore[return-value]

    def views(self, cfg: TrainConfig, channels: int, size: int) -> augment.Views:
        ours = self.cfg
        local = augment.local_size(size, getattr(self.encoder, "patch_size", None), ours.local_size)
        sizes = size, channels, ours.local_crops, local
        return augment.multi_crop(cfg.resolve_augment(), *sizes, ours.crop_area)

    def schedule(self, now: Now, groups: list[dict]) -> None:
        cfg = self.cfg
        self.momentum.fill_(cosine_momentum(now.step, now.total, cfg.momentum))
        self.teacher_temp.fill_(rising(0.04, cfg.teacher_temp, int(now.epoch), cfg.teacher_temp_epochs))
        decay = optim.cosine(cfg.weight_decay, cfg.final_weight_decay, now.step, now.total)
        for group in groups:
            group["weight_decay"] = decay if group["trust"] else 0.0
        self.student.train_prototypes(now.epoch >= cfg.freeze_epochs)

    def training_step(self, views: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.losses(self.student, self.teacher.model, views, self.teacher_temp)

    def clip(self, max_norm: float) -> Tensor:
        return optim.clip_each(self.student.parameters(), max_norm)

    def after_step(self) -> None:
        self.teacher.update(self.student, self.momentum)

    def show(self, images: ImageSet, out: Path, device: torch.device) -> dict[str, dict[str, list[float]]]:
        return attention.show(self.encoder.to(device).eval(), images, out, device)
