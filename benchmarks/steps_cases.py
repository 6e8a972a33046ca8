"""What benchmarks/steps.py times: methods, networks and sizes, and one implementation's training step."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from steps_plain import NAMES, NOW
from torch import Tensor

from sslfast import EMATeacher
from sslfast.train import loop, methods, optim
from sslfast.train.budget import phase
from sslfast.train.config import TrainConfig
from sslfast.train.distillation import PrototypeLoss

RATE = 1e-4  # of learning
SEED = 1


@dataclass(frozen=True)
class Case:
    """options: of the method's config, where they are not the defaults."""

    title: str
    method: str
    size: int  # pixels a side
    batch: int
    backbone: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"  # "bfloat16": autocast

    def config(self, device: str, dtype: str, batch: int) -> TrainConfig:
        return methods.module(self.method).Config(
            out=Path("unused"), data="photos", device=device, image_size=self.size, backbone=self.backbone,
            batch_size=batch, precision=dtype, **self.options,
        )  # fmt: skip


SGD, SMALL = {"optimizer": "sgd"}, {"optimizer": "sgd", "stem": "imagenet"}
PAPER_DINO = {"prototypes": 65_536, "centering": "center", "teacher_temp": 0.04, "momentum": 0.996}
LARGE_DINO = PAPER_DINO | {"local_crops": 8, "local_size": 96, "patch_size": 16, "hidden_dim": 2048}
SMALL_DINO = PAPER_DINO | {"local_crops": 4, "local_size": 32, "patch_size": 8}
SMALL_MAE = {"patch_size": 8, "decoder_dim": 192, "decoder_depth": 4, "decoder_heads": 6}
QUICK_DINO = {"prototypes": 256, "hidden_dim": 64, "bottleneck_dim": 32, "patch_size": 8, "local_size": 16}
QUICK_MAE = {"patch_size": 8, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
MOCO = {"queue_size": 65_536, "momentum": 0.999}
CASES = {
    "cuda": [
        Case("SimCLR", "simclr", 224, 256, "resnet50", SGD, "bfloat16"),
        Case("MoCo v2", "moco", 224, 256, "resnet50", SGD | MOCO, "bfloat16"),
        Case("BYOL", "byol", 224, 256, "resnet50", SGD, "bfloat16"),
        Case("DINO", "dino", 224, 64, "vit_small", LARGE_DINO, "bfloat16"),
        Case("MAE", "mae", 224, 256, "vit_base", {"patch_size": 16}, "bfloat16"),
    ],
    "cpu": [
        Case("SimCLR", "simclr", 64, 64, "resnet18", SMALL),
        Case("SimCLR, batch 1024", "simclr", 32, 1024, "compact", SGD),
        Case("SimCLR, batch 4096", "simclr", 16, 4096, "compact", SGD),
        Case("MoCo v2", "moco", 64, 64, "resnet18", SMALL | MOCO),
        Case("BYOL", "byol", 64, 64, "resnet18", SMALL),
        Case("DINO", "dino", 64, 16, "vit_tiny", SMALL_DINO),
        Case("MAE", "mae", 96, 32, "vit_tiny", SMALL_MAE),
    ],
    "quick": [
        Case("SimCLR", "simclr", 16, 16, "compact", SGD),
        Case("MoCo v2", "moco", 16, 16, "compact", SGD | {"queue_size": 64}),
        Case("BYOL", "byol", 16, 16, "compact", SGD | {"hidden_dim": 64}),
        Case("DINO", "dino", 32, 4, "vit_nano", {"centering": "center"} | QUICK_DINO),
        Case("MAE", "mae", 32, 8, "vit_nano", QUICK_MAE),
    ],
}


class Step:
    """One implementation's model and its update, as the loop makes it. All begin with the same weights, a
    teacher with others than its student's, a centre with some.

    Attributes:
        views: of images that are the same for all.
        fresh: makes them anew.
    """

    def __init__(self, name: str, case: Case, device: str, dtype: str = "", batch: int = 0) -> None:
        cfg = case.config(device, dtype or case.dtype, batch or case.batch)
        self.model: Any = loop.build(case.method, cfg, 3, case.size)
        for module in self.model.modules():
            if isinstance(module, EMATeacher):
                move_apart(module)
            elif isinstance(module, PrototypeLoss):
                module.center.normal_(0, 0.01)
        self.model.to(device).to(memory_format=torch.channels_last).train()
        self.cfg, self.update = cfg, loop.Update(self.model, cfg, torch.device(device))
        self._changes = NAMES[name]().changes(case.method, self.model)
        side = -(-case.size * 8 // 7)
        torch.manual_seed(SEED)
        images = torch.randint(256, (cfg.batch_size, 3, side, side), dtype=torch.uint8).to(device)
        ids, make = torch.arange(len(images), device=device), self.model.views(cfg, 3, case.size)
        self.fresh: Callable[[], tuple[Tensor, ...]] = lambda: make(images, ids, SEED)
        self.views = self.fresh()

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Within it the model is the implementation's own; entering it is not to be timed."""
        with ExitStack() as stack:
            for owner, attribute, value in self._changes:
                stack.enter_context(patch.object(owner, attribute, value))
            yield

    def backward(self, views: Sequence[Tensor]) -> Tensor:
        """To the gradients; returns the loss."""
        optim.set_rate(self.update.optimizer, RATE)
        self.model.schedule(NOW, self.update.optimizer.param_groups)
        with phase("ema"):
            self.model.before_step()
        return self.update.backward(views)[0]

    def __call__(self, views: Sequence[Tensor]) -> Tensor:
        loss = self.backward(views)
        self.update.step()
        return loss


@torch.no_grad()
def move_apart(teacher: EMATeacher) -> None:
    for p in teacher.parameters():
        p.add_((0.3 * p.std(correction=0) + 0.1 * (p.dim() == 1)) * torch.randn_like(p))


# Right results.


class Outcome:
    """What the first step of an implementation finds: loss, gradients, and how it moves what is not trained
    (teacher, queue, centre, statistics)."""

    def __init__(self, name: str, case: Case, device: str, dtype: str, batch: int) -> None:
        step = Step(name, case, device, dtype, batch)
        model: Any = step.model
        torch.manual_seed(SEED)  # masks and shuffles
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        state = {n: x for n, x in model.state_dict().items() if x.is_floating_point() and n not in trained}
        before = {n: x.clone() for n, x in state.items()}
        with step.changed():
            self.loss = step.backward(step.views).double().cpu()
            self.gradients = gradients_of(trained)
            self.moved, self.lengths = {}, {}
            if step.cfg.clip_norm:
                model.clip(step.cfg.clip_norm)
                self.moved = {f"clipped {n}": x for n, x in gradients_of(trained).items()}
            step.update.step()
        after = model.state_dict()
        for n, x in before.items():
            self.moved[n] = (after[n].flatten().double() - x.flatten().double()).cpu()
            self.lengths[n] = float(x.double().norm())

    def errors(self, true: "Outcome") -> dict[str, float]:
        """Relative ones: of the loss, and the largest of a gradient and of a change of state."""
        whole = sum(float(g.norm()) ** 2 for g in true.gradients.values()) ** 0.5
        # gradients that are 0 but for rounding, as of a bias before BatchNorm, are held against the others
        least = dict.fromkeys(true.gradients, 1e-2 * whole / len(true.gradients) ** 0.5)
        rounding = {n: 1e-5 * length for n, length in true.lengths.items()}
        return {
            "loss_error": float((self.loss - true.loss).abs() / true.loss.abs()),
            "gradient_error": largest(self.gradients, true.gradients, least),
            "state_error": largest(self.moved, true.moved, rounding),
        }


def gradients_of(parameters: dict[str, Any]) -> dict[str, Tensor]:
    return {n: p.grad.flatten().double().cpu() for n, p in parameters.items() if p.grad is not None}


def largest(found: dict[str, Tensor], true: dict[str, Tensor], least: dict[str, float]) -> float:
    """Norm of an error over that of the truth or, where it is larger, `least`; infinite where one lacks."""
    if found.keys() != true.keys():
        return float("inf")
    pairs = ((n, float((found[n] - t).norm()), float(t.norm())) for n, t in true.items())
    errors = [error / max(length, least.get(n, 0.0), 1e-30) for n, error, length in pairs]
    return max((e if e == e else float("inf") for e in errors), default=0.0)


# Memory.


def out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in text or "not enough memory" in text)
    )


def collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
