"""What the tests of losses with a group run in each process."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import distributed_cases as cases
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import sslfast
from sslfast.distributed import NonFiniteError, bytes_sent


def pair(rank: int, rows: int = 3, dim: int = 4, **options: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rank)
    return tuple(torch.randn(2, rows, dim, **options))  # type: ignore[return-value]


def _ntxent(rank: int, *pair_args: Any, **options: Any) -> Tensor:
    return sslfast.ntxent_loss(*pair(rank, *pair_args), group="world", **options)


def _spoiled(rank: int, value: float) -> Tensor:
    z1, z2 = pair(rank)
    z2[1, 1] = value if rank == 1 else 0.0
    return sslfast.ntxent_loss(z1, z2, group="world")


def _frozen(rank: int) -> Tensor:
    z1, z2 = pair(rank)
    return sslfast.ntxent_loss(z1.requires_grad_(rank == 0), z2, group="world")


def _uneven_views(rank: int) -> Tensor:
    z1, z2 = pair(rank)
    return sslfast.ntxent_loss(z1, z2[: 3 - (rank == 1)], group="world")


def _enqueue(rank: int) -> None:
    sslfast.KeyQueue(8, 4).enqueue(torch.randn(2, 4 + rank), group=dist.group.WORLD)


def _dtypes(rank: int) -> Tensor:
    return sslfast.ntxent_loss(*pair(rank, dtype=(torch.float32, torch.float64)[rank]), group="world")


def _losses(rank: int) -> Tensor:
    return (sslfast.dcl_loss if rank else sslfast.ntxent_loss)(*pair(rank), 0.1, group="world")


def _scale(rank: int) -> Tensor:
    return sslfast.clip_loss(*pair(rank), [1.0, "x"][rank], group="world")  # type: ignore[arg-type]


def _nested(rank: int) -> Tensor:
    return sslfast.nnclr_loss(*pair(rank), 1.0 - rank, group="world")


def _view_count(rank: int) -> Tensor:
    return sslfast.multiview_ntxent_loss(torch.randn(2 + rank, 3, 4), group="world")


def _autocast(rank: int) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=rank == 1):
        return sslfast.siglip_loss(*pair(rank), 1.0, 0.0, group="world", strategy="ring")


def _mining(rank: int) -> Tensor:
    labels = torch.arange(3)
    return sslfast.triplet_margin_loss(pair(rank)[0], labels, mining="all", group="world", strategy="ring")


def _differ(name: str, *values: Any) -> Callable:
    return lambda rank: _ntxent(rank, **{name: values[rank]})


MISTAKES: dict[str, tuple[Callable, type, str]] = {
    "NaN": (partial(_spoiled, value=float("nan")), NonFiniteError, r"z2: .*finite.*rank 1"),
    "infinity": (partial(_spoiled, value=float("inf")), NonFiniteError, r"z2: .*finite.*rank 1"),
    "no rows": (lambda rank: _ntxent(rank, 3 * (rank == 0)), ValueError, r"z1: .*one row.*none.*rank 1"),
    "dimensions": (
        lambda rank: _ntxent(rank, 3, 4 + rank),
        ValueError,
        r"z1: .*, 4\].*rank 0.*, 5\].*rank 1",
    ),
    "views": (_uneven_views, ValueError, r"z2: expected shape \[3, 4\], got \[2, 4\] \(on rank 1\)"),
    "dtypes": (_dtypes, ValueError, r"z1: .*float32 .*rank 0.*float64 .*rank 1"),
    "type": (_scale, TypeError, r"logit_scale: .*str.*rank 1"),
    "temperature": (_differ("temperature", 0.1, 1.1), ValueError, r"temperature: .*0\.1.*1\.1"),
    "temperature of 0": (_differ("temperature", 1.0, 0.0), ValueError, r"temperature: .*rank 1"),
    "reduction": (_differ("reduction", "mean", "sum"), ValueError, r"reduction: .*mean.*sum"),
    "strategy": (_differ("strategy", "ring", "gather"), ValueError, r"strategy: .*ring.*gather"),
    "strategy's name": (_differ("strategy", "star", "star"), ValueError, r"strategy: .*'star'"),
    "scaling": (_differ("scaling", "mean", "mean"), ValueError, r"scaling: .*'mean'"),
    "ids": (_differ("ids", torch.arange(3), None), ValueError, r"ids: .*int64.*None"),
    "gradients": (_frozen, ValueError, r"z1: .*with a gradient on rank 0"),
    "losses": (_losses, ValueError, r"function: .*ntxent_loss.*dcl_loss"),
    "a loss within a loss": (_nested, ValueError, r"temperature: [^(]*\(on rank 1\)$"),
    "number of views": (_view_count, ValueError, r"views: .*rank 0.*rank 1"),
    "autocast": (_autocast, ValueError, r"autocast: .*None.*bfloat16"),
    "mining": (_mining, ValueError, r"strategy: .*mining='all'"),
    "keys": (_enqueue, ValueError, r"keys: .*4.*5.*rank 1"),
    "argument": (lambda rank: _ntxent(rank, **{"no": 1} if rank else {}), TypeError, r"'no'.*rank 1"),
}


def mistakes(rank: int) -> dict[str, tuple[type, str] | Tensor]:
    """Of each mistake what was raised here; after all of them the loss of a call without one."""
    found: dict[str, tuple[type, str] | Tensor] = {}
    for name, (call, _, _) in MISTAKES.items():
        try:
            call(rank)
            found[name] = (type(None), "nothing was raised")
        except Exception as error:
            found[name] = (type(error), str(error))
    given = {"temperature": 1} if rank else {"temperature": 1.0, "scaling": "ddp"}
    found["none"] = _ntxent(rank, **given)
    return found


class Contrast(nn.Module):
    """Two towers, and a loss with a scale and a bias that are trained."""

    def __init__(self, loss: Callable) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.towers = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 4)])
        self.log_scale, self.bias = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-2.0))
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        z1, z2 = (tower(x) for tower in self.towers)
        return self.loss(z1, z2, self.log_scale.exp(), self.bias)


def data_parallel(rank: int, sizes: list[int], strategy: str) -> list[tuple[Tensor, list[Tensor]]]:
    """(value, gradients of all parameters) of CLIP's and SigLIP's loss under DistributedDataParallel."""
    x = batch(sum(sizes)).split(sizes)[rank]
    found = []
    for loss in (sslfast.clip_loss, sslfast.siglip_loss):
        model = DistributedDataParallel(Contrast(partial(loss, group="world", strategy=strategy)).double())
        value = model(x)
        value.backward()
        found.append((value.detach(), [p.grad for p in model.parameters()]))
    return found


def batch(rows: int) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def queues(rank: int, sizes: list[int]) -> list[Tensor]:
    """The queue after keys of all processes, of uneven rows, have entered three times."""
    torch.manual_seed(7)
    queue, found = sslfast.KeyQueue(10, 5), []
    for k in range(3):
        queue.enqueue((batch(sum(sizes)) + k).split(sizes)[rank], group="world")
        found.append(queue.keys.clone())
    return found


SERVED = ("ntxent", "clip", "siglip_ids", "supcon_labels", "supcon_inside", "info_nce_smooth_ids")


def by_backend(rank: int, sizes: list[int], backend: str, dtype: torch.dtype) -> dict[str, tuple]:
    """What `distributed_cases.evaluate` finds with another backend, in a ring."""
    found = {}
    for name in SERVED:
        rows, whole = cases.inputs(name, sizes, dtype)
        own = cases.own_rows(name, rows, sizes, rank)
        with sslfast.use_backend(backend):
            found[name] = cases.evaluate(name, own, whole, group=dist.group.WORLD, strategy="ring")
    return found


def low_precision(rank: int, sizes: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """(loss, gradient to this process's rows) of bfloat16 rows, and of float32 ones under autocast."""
    found = {}
    for strategy in ("gather", "ring"):
        for dtype in (torch.bfloat16, torch.float32):
            x = wide_rows(sizes, dtype).split(sizes)[rank].clone().requires_grad_()
            found[f"{strategy} {dtype}"] = low_precision_loss(x, group="world", strategy=strategy), x.grad
    return found


def wide_rows(sizes: list[int], dtype: torch.dtype) -> Tensor:
    return torch.randn(sum(sizes), 2, 32, generator=torch.Generator().manual_seed(3)).to(dtype)


def low_precision_loss(x: Tensor, **across: Any) -> Tensor:
    """NT-Xent and InfoNCE of rows [n, 2, D], after their backward pass."""
    z1, z2 = x.unbind(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
        loss = sslfast.ntxent_loss(z1, z2, **across) + sslfast.info_nce_loss(z1, z2, **across)
    loss.backward()
    return loss.detach()


def compiled(rank: int, sizes: list[int]) -> tuple[Tensor, Tensor]:
    x = wide_rows(sizes, torch.float32).split(sizes)[rank].clone().requires_grad_()
    loss = torch.compile(sslfast.ntxent_loss, backend="eager")
    value = loss(*(2 * x).unbind(1), group=dist.group.WORLD)
    value.backward()
    return value.detach(), x.grad


def own_loss(rank: int, sizes: list[int]) -> Tensor:
    """The gradient to this process's rows of |sum of all rows|^2, of which each process has a part."""
    x = batch(sum(sizes)).split(sizes)[rank].clone().requires_grad_()
    everything = sslfast.distributed.gather(x)
    (everything.sum(0).square().sum() / len(sizes)).backward()
    return x.grad


def centres(rank: int, sizes: list[int]) -> list[Tensor]:
    """DINO's centre and Sinkhorn's, of the rows of all processes."""
    rows = batch(sum(sizes)).split(sizes)[rank]
    center = sslfast.update_center_(torch.zeros(5, dtype=torch.float64), rows, 0.7)
    return [center, sslfast.sinkhorn_center(rows, 0.3)]


def three(rank: int, sizes: list[int]) -> dict[str, Any]:
    return {
        **{name: data_parallel(rank, sizes, name) for name in ("gather", "ring")},
        "queues": queues(rank, sizes),
        "reference": by_backend(rank, sizes, "reference", torch.float64),
        "low": low_precision(rank, sizes),
        "compiled": compiled(rank, sizes),
        "centres": centres(rank, sizes),
        "own": own_loss(rank, sizes),
    }


def costs(rank: int, rows: int, dim: int, strategies: tuple[str, ...]) -> dict[str, tuple[int, int, int]]:
    return {strategy: _cost(rank, rows, dim, strategy) for strategy in strategies}


def _cost(rank: int, rows: int, dim: int, strategy: str) -> tuple[int, int, int]:
    """(bytes by which NT-Xent, forward and backward, raises the peak of resident memory, bytes it sent in the
    forward pass, in both)"""
    torch.manual_seed(rank)
    z1, z2 = (torch.randn(rows, dim).requires_grad_() for _ in range(2))

    def step() -> tuple[int, int]:
        before = bytes_sent()
        loss = sslfast.ntxent_loss(z1, z2, group="world", strategy=strategy)
        between = bytes_sent()
        loss.backward()
        z1.grad = z2.grad = None
        return between - before, bytes_sent() - before

    step()  # what is allocated once
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    sent = step()
    return _status("VmHWM") - before, *sent


def _status(name: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) << 10
