"""Training in several processes, in a module that they can import by name."""

import copy
import math
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import nn

from sslfast import random_patch_mask
from sslfast.train import loop, methods, models, optim, processes
from sslfast.train.batchnorm import synchronize
from sslfast.train.data import ImageSet
from sslfast.train.methods import Now, mae
from sslfast.train.methods import byol as byol_module
from sslfast.train.monitor import CollapseMonitor
from sslfast.train.vit import SIZES

BATCH, STEPS, SIDE = 8, 20, 12
SMALL = {"vit_tiny": {"dim": 12, "depth": 1, "heads": 2}}
SGD, ADAMW = dict(optimizer="sgd", learning_rate=0.003), dict(optimizer="adamw", learning_rate=1e-4)
DINO = dict(prototypes=48, hidden_dim=24, bottleneck_dim=12, momentum=0.9, clip_norm=0.3, freeze_epochs=1.0)
# name: (method, options, side of a third view); 5 updates are an epoch
CASES: dict[str, tuple[str, dict, int]] = {
    "simclr": ("simclr", SGD, 0),
    "byol": ("byol", SGD | dict(hidden_dim=24, projection_dim=12), 0),
    "moco": (
        "moco",
        SGD | dict(queue_size=21, projection_dim=12, bn_splits=1, sync_batchnorm=True, clip_norm=0.5),
        0,
    ),
    "mocov3": ("mocov3", SGD | dict(hidden_dim=24, projection_dim=12), 0),
    "dino-center": ("dino", SGD | DINO | dict(centering="center"), 8),
    "dino-sinkhorn-koleo": (
        "dino",
        ADAMW | DINO | dict(koleo_weight=0.1, backbone="vit_tiny", patch_size=4, fixed_norm=False),
        8,
    ),
    "mae": (
        "mae",
        ADAMW | dict(backbone="vit_tiny", patch_size=4, decoder_dim=12, decoder_heads=2, accumulate=2),
        0,
    ),
}


def everything(rank: int, folder, images: str, labelled) -> None:
    """All that needs two processes, at once, since it is to start them that takes time; into RANK.pt."""
    norms = {case: normalized(rank, *case) for case in NORMS}
    found = {"trained": all_trained(folder), "norms": norms, "monitor": monitored()}
    torch.save({**found, **runs(folder, images, labelled)}, folder / f"{rank}.pt")


def all_trained(folder) -> dict[str, dict[str, tuple]]:
    kinds = ("float64", "float32")
    return {kind: {name: trained(name, getattr(torch, kind), folder) for name in CASES} for kind in kinds}


def trained(name: str, dtype: torch.dtype, folder) -> tuple[dict, dict, list[float]]:
    """(state at first, state at last, losses) of 20 updates by the loop's Update, on this process's rows of
    batches that are the same however many processes there are."""
    method, options, third = CASES[name]
    rank, parts = processes.rank(), processes.processes()
    own = slice(BATCH // parts * rank, BATCH // parts * (rank + 1))

    def mask(batch, num_patches, ratio, **_):
        noise = torch.rand(BATCH, num_patches, generator=drawn)
        return random_patch_mask(batch, num_patches, ratio, noise=noise[own])

    with ExitStack() as patches:
        patches.enter_context(mock.patch.dict(SIZES, SMALL))
        if "backbone" not in options and method != "mae":
            patches.enter_context(mock.patch.object(models, "build", small_resnet))
        patches.enter_context(mock.patch.object(mae, "random_patch_mask", mask))
        values = dict(out=folder, device="cpu", precision="float32", batch_size=BATCH, **options)
        cfg = methods.module(method).Config(**values)
        model = loop.build(method, cfg, 1, SIDE).to(dtype).train()
        for value in model.state_dict().values():
            if value.dim() == 1 and value.is_floating_point():  # no scale, shift or statistic at 0 or 1
                value.add_(0.3 * torch.rand(value.shape, generator=torch.Generator().manual_seed(1)))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        update, drawn, losses = (
            loop.Update(model, cfg, torch.device("cpu")),
            torch.Generator().manual_seed(3),
            [],
        )
        for step in range(STEPS):
            optim.set_rate(update.optimizer, cfg.learning_rate * (step + 1) / STEPS)
            model.schedule(Now(step, STEPS, 5), update.optimizer.param_groups)
            model.before_step()
            for _ in range(cfg.accumulate):
                sides = [SIDE, SIDE, *[third] * (third > 0)][: 1 if method == "mae" else None]
                views = [torch.rand(BATCH, 1, side, side, generator=drawn)[own].to(dtype) for side in sides]
                losses.append(update.backward(tuple(views))[0].item())
            update.step()
    return before, {key: value.clone() for key, value in model.state_dict().items()}, losses


def small_resnet(cfg, channels, size):
    return models.ResNet(channels, (8, 16), (1, 1), (1, 2), stem_stride=2)


# BatchNorm.

NORMS = [
    (kind, affine, rows)
    for kind in ("BatchNorm1d", "BatchNorm2d")
    for affine in (True, False)
    for rows in ((3, 5), (6, 0))
]


def normalized(rank: int, kind: str, affine: bool, rows: tuple[int, int]) -> dict:
    """What SyncBatchNorm makes of this process's rows, and what it keeps after two steps of training."""
    net, x, dy = normalization(kind, affine, sum(rows))
    synchronize(net)
    own = torch.arange(sum(rows)).split(rows)[rank]
    return passed(net, x[:, own], dy[:, own])


def normalization(kind: str, affine: bool, rows: int):
    """(a net of one BatchNorm, two inputs whose means are far from 0, gradients of what comes out)"""
    drawn = torch.Generator().manual_seed(2)
    net = nn.Sequential(getattr(nn, kind)(5, affine=affine, momentum=None if kind == "BatchNorm1d" else 0.1))
    for p in net.parameters():
        nn.init.normal_(p, generator=drawn)
    shape = (2, rows, 5) if kind == "BatchNorm1d" else (2, rows, 5, 3, 4)
    x, dy = (torch.randn(shape, generator=drawn, dtype=torch.float64) for _ in range(2))
    return net.double(), x + 100, dy


def passed(net, x, dy) -> dict:
    found = {}
    for step in range(2):
        leaf = x[step].clone().requires_grad_()
        y = net(leaf)
        y.backward(dy[step])
        found |= {f"y {step}": y.detach(), f"dx {step}": leaf.grad}
    found |= {f"d{name}": p.grad for name, p in net.named_parameters()}
    return found | {"kept": net.state_dict(), "evaluated": net.eval()(x[0]).detach()}


# The monitor.


def monitored() -> tuple[dict, str | None, dict]:
    """(numbers, warning, numbers after a restart) of rows of which each process has its own."""
    z, t = torch.randn(2, 24, 6, generator=torch.Generator().manual_seed(4))
    own = torch.arange(24).chunk(processes.processes())[processes.rank()].chunk(2)
    monitor, other = CollapseMonitor(), CollapseMonitor()
    monitor.update(z[own[0]], t[own[0]])
    other.load_state_dict(copy.deepcopy(monitor.state_dict()))
    for one in (monitor, other):
        one.update(z[own[1]], t[own[1]])
    return monitor.read(), monitor.warning(), other.read()


# Runs.

KNN = dict(image_size=16, knn_every=1, epochs=1, augment="byol")


def small(method: str, out, data: str, **changes):
    values = dict(
        out=out, data=data, epochs=2, batch_size=8, warmup_epochs=0.5, device="cpu", augment="mnist"
    )
    return methods.module(method).Config(**{**values, **changes})


def runs(folder, images: str, labelled) -> dict:
    moco = dict(queue_size=21, projection_dim=12)
    byol = dict(hidden_dim=24, projection_dim=12, checkpoint_minutes=0)
    loop.train("moco", small("moco", folder / "whole", images, **moco))
    found = {}
    with at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        found["interrupted"] = error_of("moco", small("moco", folder / "cut", images, **moco))
    loop.train("moco", small("moco", folder / "cut", images, **moco, resume=True))
    found["indivisible"] = error_of("moco", small("moco", folder / "no", images, batch_size=7))
    with mock.patch.object(loop.sources, "load", unreadable if processes.rank() else loop.sources.load):
        found["unreadable"] = error_of("moco", small("moco", folder / "no", images))
    with mock.patch.object(byol_module.BYOL, "training_step", breaking(6)):
        found["broken"] = error_of("byol", small("byol", folder / "broken", images, **byol))
    seen, batches = [], ImageSet.batches

    def noting(self, rows, *rest):
        seen.append(list(rows))
        return batches(self, seen[-1], *rest)

    with mock.patch.object(ImageSet, "batches", noting):
        with noted_views() as found["views"]:
            loop.train("byol", small("byol", folder / "knn", f"folder:{labelled}", **KNN, **byol))
    found["rows"] = seen[0]  # the first is for training
    return found


@contextmanager
def noted_views() -> Iterator[list]:
    """A list that gets the views [V, B, C, H, W] of each batch that is trained on."""
    noted, backward = [], loop.Update.backward

    def noting(self, views):
        noted.append(torch.stack(tuple(views)))
        return backward(self, views)

    with mock.patch.object(loop.Update, "backward", noting):
        yield noted


def moco_runs(rank: int, folder, images: str) -> None:
    """One that is left alone, and one that is interrupted and goes on, of 3 or more processes."""
    moco = dict(queue_size=21, projection_dim=12, batch_size=12)
    loop.train("moco", small("moco", folder / "whole", images, **moco))
    with at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert error_of("moco", small("moco", folder / "cut", images, **moco))[0] == "KeyboardInterrupt"
    loop.train("moco", small("moco", folder / "cut", images, **moco, resume=True))


def error_of(method: str, cfg) -> tuple[str, str, int | None]:
    try:
        loop.train(method, cfg)
    except BaseException as error:
        return type(error).__name__, str(error), vars(error).get("process")
    return "", "", None


def unreadable(*_):
    raise ValueError("data: not here")


def at_step(number: int, act):
    """Within that update of the second process."""
    step, seen = loop.Update.step, []

    def counted(self):
        seen.append(None)
        if len(seen) == number and processes.rank() == 1:
            act()
        return step(self)

    return mock.patch.object(loop.Update, "step", counted)


def breaking(number: int):
    """A training_step whose loss is not a number in that batch of the second process."""
    step, seen = byol_module.BYOL.training_step, []

    def broken(self, views):
        seen.append(None)
        loss, metrics = step(self, views)
        return loss * (math.nan if len(seen) == number and processes.rank() == 1 else 1), metrics

    return broken
