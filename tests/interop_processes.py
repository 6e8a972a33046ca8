"""Workers of tests/processes.py: the drop-ins beside the originals in several processes of one group.

Each returns what differs in its process, as text. The processes draw different inputs and weigh their losses
differently, so that a gradient tells from which of them it came. One start of the processes serves groups of
several sizes, since the imports take most of the time.
"""

import importlib
import importlib.util
import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

ROWS, WIDTH = 5, 7
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def squared_distance(out0: Tensor, out1: Tensor) -> Tensor:
    return (out0 - out1).square().sum(1)


class Differences(list[str]):
    """What differs, as lines of text; the size of the group goes before each."""

    def append(self, line: str) -> None:
        super().append(f"{dist.get_world_size()} processes: {line}")

    def compare(self, what: str, mine: Tensor, its: Tensor) -> None:
        if mine.shape != its.shape or mine.dtype != its.dtype:
            kinds = [f"{tuple(x.shape)} {x.dtype}" for x in (mine, its)]
            self.append(f"{what}: {kinds[0]}, expected {kinds[1]}")
            return
        off, size = (mine - its).abs().max(), its.abs().max()
        if not off <= TOLERANCE.get(its.dtype, 0) * size.clamp(min=1e-2):
            self.append(f"{what}: off by {off:.3g} of {size:.3g}")

    def calls(self, what: str, calls: Sequence[Callable[..., Tensor]], leaves: dict[str, Tensor]) -> None:
        """(ours, the original's): their values, and gradients of the leaves that are to have one."""
        outcomes = []
        for call in calls:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                outcomes.append(_outcome(call, leaves))
            if call is calls[0]:
                for message in dict.fromkeys(str(x.message) for x in seen):
                    self.append(f"{what} warns: {message}")
        if outcomes[0].keys() != outcomes[1].keys():
            self.append(f"{what}: {list(outcomes[0])}, expected {list(outcomes[1])}")
        for name in (x for x in outcomes[1] if x in outcomes[0]):
            self.compare(f"{what} {name}", outcomes[0][name], outcomes[1][name])


def _outcome(call: Callable[..., Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    fresh = {k: x.detach().clone().requires_grad_(x.requires_grad) for k, x in leaves.items()}
    wanted = {k: x for k, x in fresh.items() if x.requires_grad}
    value = call(**fresh)
    slopes = torch.autograd.grad(value * (dist.get_rank() + 1), list(wanted.values()), allow_unused=True)
    with torch.no_grad():
        again = call(**fresh)
    gradients = {f"gradient of {k}": x for k, x in zip(wanted, slopes, strict=True) if x is not None}
    return {"value": value.detach(), "value without gradients": again} | gradients


def in_groups(rank: int, check: Callable[[Differences], None], splits: Sequence[Sequence[int]], folder: Path):
    """What differs in the group of all processes, and in groups of those many consecutive processes."""
    warnings.simplefilter("ignore")  # the originals' own
    found = Differences()
    check(found)
    for i, sizes in enumerate(splits):
        dist.barrier()
        dist.destroy_process_group()
        group = next(g for g in range(len(sizes)) if rank < sum(sizes[: g + 1]))
        store = f"file://{folder / f'store-{i}-{group}'}"
        dist.init_process_group(
            "gloo", init_method=store, rank=rank - sum(sizes[:group]), world_size=sizes[group]
        )
        check(found)
    return list(found)


def rows(*names: str, count: int = ROWS, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: torch.randn(count, WIDTH, dtype=dtype, requires_grad=True) for name in names}


def lightly_losses(found: Differences) -> None:
    from lightly import loss as peer

    from sslfast.interop import lightly as ours

    modules = ours, peer
    cases: list[tuple[str, dict[str, Any]]] = [
        ("NTXentLoss", {"temperature": 0.2}),
        ("NTXentLoss", {"temperature": -0.5}),
        ("DCLLoss", {"temperature": 0.2}),
        ("DCLLoss", {"weight_fn": squared_distance}),
        ("DCLWLoss", {"sigma": 0.3}),
    ]
    for (name, options), gather in itertools.product(cases, (True, False)):
        calls = [getattr(m, name)(gather_distributed=gather, **options) for m in modules]
        for count in (ROWS, 1):
            if count * dist.get_world_size() > 1 and (gather or count > 1):
                found.calls(f"{name} {options} {gather=} {count=}", calls, rows("out0", "out1", count=count))
        one = rows("out0", "out1")
        found.calls(f"{name} {options} {gather=} out0 only", calls, one | {"out1": one["out1"].detach()})
        single = rows("out0", "out1", dtype=torch.float32)
        found.calls(f"{name} {options} {gather=} float32", calls, single)
    for size, gather in itertools.product(
        (16 * dist.get_world_size() + 3, 10 * dist.get_world_size(), 4), (0, 1)
    ):
        _bank(found, modules, f"bank of {size} {gather=}", (size, WIDTH), bool(gather))
    _centre(found, modules)


def _bank(found: Differences, modules: Sequence[Any], what: str, size: tuple[int, int], gather: bool) -> None:
    losses = [m.NTXentLoss(0.3, memory_bank_size=size, gather_distributed=gather).double() for m in modules]
    losses[0].memory_bank.bank.copy_(losses[1].memory_bank.bank)
    for step in range(5):
        found.calls(f"{what} step {step}", losses, rows("out0", "out1"))
        for name in ("bank", "bank_ptr"):
            found.compare(f"{what} step {step} {name}", *(getattr(x.memory_bank, name) for x in losses))


def _centre(found: Differences, modules: Sequence[Any]) -> None:
    losses = [m.DINOLoss(WIDTH, center_momentum=0.5).double() for m in modules]

    def call(loss: Callable, **views: Tensor) -> Tensor:
        return loss([views["t0"], views["t1"]], [views["s0"], views["s1"], views["s2"]], teacher_temp=0.125)

    for step in range(3):
        calls = [lambda loss=loss, **views: call(loss, **views) for loss in losses]
        found.calls(f"DINO step {step}", calls, rows("t0", "t1", "s0", "s1", "s2"))
        found.compare(f"DINO step {step} center", *(loss.center for loss in losses))


def open_clip_losses(found: Differences) -> None:
    from sslfast.interop import open_clip as ours

    modules = ours, _open_clip_loss()
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("ClipLoss", {"local_loss": local, "gather_with_grad": grad, "cache_labels": local})
        for local, grad in itertools.product((True, False), repeat=2)
    ] + [("SigLipLoss", {"dist_impl": kind}) for kind in ("bidir", "shift", "reduce", "gather", None)]
    for name, options in cases:
        losses = [getattr(m, name)(**options, **place) for m in modules]
        for what, numbers in _numbers(name).items():
            for count in (ROWS, 1) if what == "0-d" else (ROWS,):
                found.calls(
                    f"{name} {options} {what} {count=}",
                    [_call(x, numbers) for x in losses],
                    rows("image_features", "text_features", count=count)
                    | {k: x for k, x in numbers.items() if isinstance(x, Tensor)},
                )
        single = {"logit_scale": torch.tensor(9.0, requires_grad=True)}
        calls = [_call(x, {"logit_bias": -2.0, "output_dict": True}) for x in losses]
        single |= rows("image_features", "text_features", dtype=torch.float32)
        found.calls(f"{name} {options} float32", calls, single)
        with torch.no_grad():
            features = rows("image_features", "text_features")
            mine, its = (x.get_logits(**features, logit_scale=3.0) for x in losses)
        for x, y in zip(mine, its, strict=True):
            found.compare(f"{name} {options} logits", x, y)


def _open_clip_loss() -> ModuleType:
    """open_clip.loss without the rest of its package, whose import takes seconds.

    The collectives that it calls keep the group of their own import as a default.
    """
    from torch.distributed import nn

    for module in (nn.functional, nn):
        importlib.reload(module)
    package = importlib.util.find_spec("open_clip")
    path = Path(package.origin).with_name("loss.py")
    spec = importlib.util.spec_from_file_location("original_open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _call(loss: Callable, numbers: dict[str, Any]) -> Callable[..., Tensor]:
    """The loss from leaves alone."""

    def call(**leaves: Tensor) -> Tensor:
        value = loss(**{**numbers, **leaves})
        return value["contrastive_loss"] if isinstance(value, dict) else value

    return call


def _numbers(name: str) -> dict[str, dict[str, Any]]:
    """logit_scale and logit_bias in each form."""

    def leaf(value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=torch.float64, requires_grad=True)

    return {
        "0-d": {"logit_scale": leaf(8.0), "logit_bias": leaf(-3.0)},
        "[1]": {"logit_scale": leaf(8.0, 1), "logit_bias": leaf(-3.0, 1)},
        "numbers": {"logit_scale": 8.0, "logit_bias": -3.0},
        "no bias": {"logit_scale": leaf(8.0), "logit_bias": None},
    }
