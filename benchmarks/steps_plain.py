"""The training steps that benchmarks/steps.py times beside ours: the method's own, but what it calls of
sslfast is plain PyTorch as most code has it, or lightly's losses and helpers where it has some."""

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast.bench import patches
from sslfast.train import vit
from sslfast.train.methods import Now, byol, dino, mae, moco, simclr

NOW = Now(step=200, total=1000, steps_per_epoch=100)  # when all parameters are trained

Change = tuple[Any, str, Callable]  # owner, name of its attribute, what is there instead


# Plain PyTorch.


def ntxent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """SimCLR's: [N, D], [N, D] -> scalar; the matrix of all similarities, a masked diagonal."""
    n = len(z1)
    z = F.normalize(torch.cat((z1, z2)), dim=1)
    logits = z @ z.T / temperature
    logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def queue_loss(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """MoCo's (moco/builder.py): unit rows [N, D], [N, D], [K, D] -> scalar."""
    positive = torch.einsum("nc,nc->n", query, key).unsqueeze(-1)
    negative = torch.einsum("nc,kc->nk", query, queue.clone().detach())
    logits = torch.cat((positive, negative), dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


@torch.no_grad()
def enqueue(queue: nn.Module, keys: Tensor) -> None:
    """Of a queue whose size is a multiple of the batch, whose pointer the host reads."""
    size, batch, start = len(queue.keys), len(keys), int(queue.pointer)
    queue.keys[start : start + batch] = keys
    queue.pointer.fill_((start + batch) % size)


def regression(prediction: Tensor, target: Tensor) -> Tensor:
    """BYOL's: [N, D], [N, D] -> scalar."""
    x, y = F.normalize(prediction, dim=-1), F.normalize(target.detach(), dim=-1)
    return (2 - 2 * (x * y).sum(dim=-1)).mean()


def self_distillation(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float, views: int
) -> Tensor:
    """DINO's (main_dino.py): logits [V B, K] and [2 B, K], center [K] -> scalar."""
    student_out = (student / student_temp).chunk(views)
    teacher_out = F.softmax((teacher - center) / teacher_temp, dim=-1).detach().chunk(2)
    total, terms = 0.0, 0
    for t, q in enumerate(teacher_out):
        for v in range(views):
            if v == t:
                continue
            total += torch.sum(-q * F.log_softmax(student_out[v], dim=-1), dim=-1).mean()
            terms += 1
    return total / terms


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.mul_(momentum).add_(s, alpha=1 - momentum)


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """DINO's clip_gradients (utils.py), which reads each norm."""
    norms = []
    for p in parameters:
        if p.grad is not None:
            norm = p.grad.norm(2)
            norms.append(norm.item())
            factor = max_norm / (norm + 1e-6)
            if factor < 1:
                p.grad.mul_(factor)
    return torch.tensor(norms).norm()


def risen(momentum: float) -> float:
    """On a cosine to 1, NOW."""
    return 1 - (1 - momentum) * (1 + math.cos(math.pi * NOW.step / NOW.total)) / 2


class Plain:
    """For each method what is to be changed in it, or in modules that it calls."""

    def changes(self, method: str, model: Any) -> list[Change]:
        return getattr(self, f"of_{method}")(model)

    def follow(self, teacher: nn.Module, student: nn.Module, momentum: float) -> None:
        follow(teacher, student, momentum)

    def of_simclr(self, model: simclr.SimCLR) -> list[Change]:
        return [(model.loss, "forward", lambda z1, z2: ntxent(z1, z2, model.loss.temperature))]

    def of_moco(self, model: moco.MoCo) -> list[Change]:
        keys, momentum = model.keys.model, model.keys.momentum
        return [
            (moco, "moco_loss", lambda query, key, queue, temperature, **_: queue_loss(
                query, key, queue, temperature)),
            (model.queue, "enqueue", lambda new, group: enqueue(model.queue, new)),
            (model.keys, "update", lambda student: self.follow(keys, student, momentum)),
        ]  # fmt: skip

    def of_byol(self, model: byol.BYOL) -> list[Change]:
        target, momentum = model.target.model, risen(model.first_momentum)
        return [
            (byol, "byol_loss", lambda prediction, key: regression(prediction, key)),
            (model.target, "update", lambda student, _: self.follow(target, student, momentum)),
        ]

    def of_dino(self, model: dino.DINO) -> list[Change]:
        teacher, momentum = model.teacher.model, risen(model.cfg.momentum)
        return [
            (model.losses.images, "forward", self.assignments(model)),
            (model.teacher, "update", lambda student, _: self.follow(teacher, student, momentum)),
            (model, "clip", lambda max_norm: clip_each(model.student.parameters(), max_norm)),
        ]

    def assignments(self, model: dino.DINO) -> Callable:
        images, teacher_temp = model.losses.images, model.cfg.teacher_temp

        def loss(student: Tensor, weight: Tensor, teacher: Tensor, other: Tensor, _: Tensor) -> tuple:
            logits = F.linear(student.flatten(0, 1), weight)
            with torch.no_grad():
                targets = F.linear(teacher.flatten(0, 1), other)
            temps = images.student_temp, teacher_temp
            found = self_distillation(logits, targets, images.center, *temps, len(student))
            with torch.no_grad():
                mean = targets.sum(dim=0) / len(targets)
                images.center.copy_(images.center * images.momentum + mean * (1 - images.momentum))
            return found, {}

        return loss

    def of_mae(self, model: mae.MAE) -> list[Change]:
        def draw(batch: int, length: int, ratio: float, *, device: torch.device, generator: None) -> Any:
            found = patches.plain_mask(torch.rand(batch, length, device=device), ratio)
            return SimpleNamespace(**dict(zip(("ids_keep", "ids_restore", "mask"), found, strict=True)))

        def embed(images, ids, weight, bias, positions, *, patch_size: int) -> Tensor:
            return patches.plain_embed(images, ids, weight, bias, positions)

        def loss(pred: Tensor, images: Tensor, mask: Tensor, patch: int, norm_pix: bool) -> Tensor:
            return patches.plain_error(pred, images, mask, norm_pix, patch=patch)

        return [
            (mae, "random_patch_mask", draw),
            (mae, "mae_loss", loss),
            (vit, "embed_visible_patches", embed),
            (vit, "restore_patches", patches.plain_restore),
        ]


class Lightly(Plain):
    """lightly's where it has something, otherwise plain PyTorch, as in its examples."""

    def __init__(self) -> None:
        self.loss = importlib.import_module("lightly.loss")
        self.utils = importlib.import_module("lightly.models.utils")

    def follow(self, teacher: nn.Module, student: nn.Module, momentum: float) -> None:
        self.utils.update_momentum(student, teacher, momentum)

    def of_simclr(self, model: simclr.SimCLR) -> list[Change]:
        criterion = self.loss.NTXentLoss(model.loss.temperature)
        return [(model.loss, "forward", lambda z1, z2: criterion(z1, z2))]  # a module would become a part

    def of_moco(self, model: moco.MoCo) -> list[Change]:
        size = tuple(model.queue.keys.shape)
        criterion = self.loss.NTXentLoss(model.temperature, memory_bank_size=size)
        criterion.to(model.queue.keys.device)
        criterion.memory_bank.bank = model.queue.keys  # in which it writes
        return [
            *super().of_moco(model)[2:],
            (moco, "moco_loss", lambda query, key, queue, temperature, **_: criterion(query, key)),
            (model.queue, "enqueue", lambda new, group: None),
        ]

    def of_byol(self, model: byol.BYOL) -> list[Change]:
        criterion = self.loss.NegativeCosineSimilarity()
        change = byol, "byol_loss", lambda prediction, key: 2 + 2 * criterion(prediction, key)
        return [change, *super().of_byol(model)[1:]]

    def assignments(self, model: dino.DINO) -> Callable:
        images = model.losses.images
        criterion = self.loss.DINOLoss(
            len(images.center), student_temp=images.student_temp, center_momentum=images.momentum
        ).to(images.center.device)
        criterion.center.copy_(images.center)  # [1, 1, K] of [K]
        images.center = criterion.center
        teacher_temp = model.cfg.teacher_temp

        def loss(student: Tensor, weight: Tensor, teacher: Tensor, other: Tensor, _: Tensor) -> tuple:
            logits = F.linear(student, weight)
            with torch.no_grad():
                targets = F.linear(teacher, other)
            return criterion(list(targets), list(logits), teacher_temp=teacher_temp), {}

        return loss

    def of_mae(self, model: mae.MAE) -> list[Change]:
        """Of the masked patches alone the pixels are predicted."""
        utils, encoder, decoder, mse = self.utils, model.encoder, model.decoder, nn.MSELoss()

        def reconstruct(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            grid = encoder.grid_of(*images.shape[-2:])
            size = len(images), grid[0] * grid[1]
            kept, masked = utils.random_token_mask(
                size, model.mask_ratio, mask_class_token=True, device=images.device
            )
            x = encoder.patch_embed(images).flatten(2).transpose(1, 2) + encoder._positions_for(grid)
            x = through(encoder.blocks, encoder._behind_class_token(utils.get_at_index(x, kept)))
            tokens = encoder.norm(x)
            x = decoder.embed(tokens)
            patches = utils.repeat_token(decoder.mask_token, size)
            patches = utils.set_at_index(patches, kept, x[:, 1:].type_as(patches))
            patches = patches + vit.resized_positions(decoder.positions, decoder.grid, grid)
            x = through(decoder.blocks, torch.cat([x[:, :1].type_as(patches), patches], dim=1))
            x = utils.get_at_index(x[:, 1:], masked)
            return decoder.pixels(decoder.norm(x)), masked, tokens

        def loss(pred: Tensor, images: Tensor, masked: Tensor, patch: int, norm_pix: bool) -> Tensor:
            target = utils.get_at_index(utils.patchify(images, patch), masked)
            return mse(pred, utils.normalize_mean_var(target) if norm_pix else target)

        return [(model, "reconstruct", reconstruct), (mae, "mae_loss", loss)]


def through(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


class Ours:
    def changes(self, method: str, model: Any) -> list[Change]:
        return []


NAMES = {"plain": Plain, "lightly": Lightly, "sslfast": Ours}


def installed() -> list[str]:
    """Those of NAMES that can be timed here, the one that the others are held against first."""
    return [name for name in NAMES if name != "lightly" or importlib.util.find_spec("lightly")]
