"""Times NT-Xent over the rows of several processes beside plain PyTorch, and what a ring does with one block;
prints tables, and --json-out keeps them.

steps    forward + backward in Gloo processes of this machine, one thread each, in alternating rounds; the
         slowest process counts. A result is checked against float64 before it is timed, gradients too. Bytes:
         those that sslfast.distributed.bytes_sent counts, which have to be those of the formula, and those
         that passed the loopback device, the overhead of TCP among them.
memory   by how much one forward + backward raises the peak of resident memory, its gradients included, in
         fresh processes; the largest counts. Ratios are to the better of the two plain ones, here as above.
blocks   in one process: rows of this process against those of a visitor, forward and backward.

    python benchmarks/distributed.py --json-out benchmarks/results
    python benchmarks/distributed.py --only blocks --device cuda --json-out benchmarks/results
"""

import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from common import json_path, keep, milliseconds, status
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F

import sslfast
from sslfast.bench.run import about
from sslfast.distributed import _ranks, _sharded, bytes_sent
from sslfast.ops import _backend

SIZES = (2, 3, 4)  # processes
ROWS, DIM, TEMPERATURE = 1024, 128, 0.1  # images of each process
WIDE = (64, 1 << 15)  # images and features where 16 MiB of features outweigh all else
ROUNDS, LOOPBACK = 11, (3, 3)  # of the times; windows of steps while the loopback's bytes are counted
BLOCKS, DIMS = (1024, 2048, 4096), (128, 512)
PLAIN = "plain, all-to-all", "plain, reduce-scatter"  # how gradients come home
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of relative errors
warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather is deprecated", FutureWarning)


def main(
    json_out: Path | None = None, only: str = "", device: Literal["cpu", "cuda"] = "cpu", quick: bool = False
) -> None:
    """Measures what `only` names, all if it is empty.

    Args:
        json_out: where to write the results; a folder gets <device>/distributed.json, which keeps the
            sections that this run leaves out.
        only: sections whose name begins so: steps, memory, blocks.
        device: of the blocks; cuda runs these alone.
        quick: small sizes, two rounds, two processes: whether it runs.
    """
    gpu = device == "cuda"
    sections = [name for name in RUN if name.startswith(only) and (name == "blocks" or not gpu)]
    if not sections:
        raise SystemExit(f"--only {only}: expected a beginning of {', '.join(RUN)}, with a GPU of blocks")
    console = Console(width=120)
    head = about(torch.device(device))
    path = json_path(json_out, head["device"], "distributed.json")
    whole = json.loads(path.read_text()) if path and path.exists() else {}
    console.print(", ".join(f"{key} {value}" for key, value in head.items()))
    for section in sections:
        began = time.monotonic()
        whole[section] = head | RUN[section][0](quick, torch.device(device))
        keep(path, whole)
        RUN[section][1](whole[section], console)
        console.print(f"{section}: {time.monotonic() - began:.0f} s")
    if path:
        console.print(f"wrote {path}")


# NT-Xent of this process's rows among those of all.


def ours(strategy: str, z1: Tensor, z2: Tensor) -> Tensor:
    return sslfast.ntxent_loss(z1, z2, TEMPERATURE, group="world", strategy=strategy)


def plain(gather: Callable[[Tensor], Tensor], z1: Tensor, z2: Tensor) -> Tensor:
    """The mean over this process's 2n rows: all rows, the logits of its own against them, a cross-entropy."""
    own = F.normalize(torch.cat((z1, z2)), dim=1)
    every = torch.cat([gather(z) for z in own.chunk(2)])
    n, images = len(z1), len(every) // 2
    logits = own @ every.T / TEMPERATURE
    first = dist.get_rank() * n + torch.arange(n)
    itself, other = torch.cat((first, first + images)), torch.cat((first + images, first))
    logits[torch.arange(2 * n), itself] = -torch.inf
    return F.cross_entropy(logits, other)


class _Gather(torch.autograd.Function):
    """All rows; a reduce-scatter adds up what all processes have for a row."""

    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(dist.get_world_size() * len(x), x.shape[1])
        _ranks.all_gather(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, g):
        out = g.new_empty(len(g) // dist.get_world_size(), g.shape[1])
        _ranks.reduce_scatter(out, g.contiguous())
        return out


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    PLAIN[0]: partial(plain, lambda x: torch.cat(all_gather(x))),
    PLAIN[1]: partial(plain, _Gather.apply),
    "sslfast, gather": partial(ours, "gather"),
    "sslfast, ring": partial(ours, "ring"),
}


def views(rank: int, rows: int, dim: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rank)
    z1, z2 = torch.randn(2, rows, dim)
    return z1.requires_grad_(), (z2 + z1.detach()).requires_grad_()


def step(call: Callable[[Tensor, Tensor], Tensor], z1: Tensor, z2: Tensor) -> tuple[Tensor, ...]:
    loss = call(z1, z2)
    return loss.detach(), *torch.autograd.grad(loss, (z1, z2))


def truth(size: int, rows: int, dim: int) -> tuple[Tensor, Tensor]:
    """The loss of all processes' rows and its gradients [2, size rows, dim] in float64, by chunks of rows."""
    both = [views(rank, rows, dim) for rank in range(size)]
    x = torch.stack([torch.cat(z) for z in zip(*both, strict=True)]).detach().double().requires_grad_()
    images, total = size * rows, torch.zeros((), dtype=torch.float64)
    for part in torch.arange(2 * images).split(512):
        z = F.normalize(x.flatten(0, 1), dim=1)
        s = z[part] @ z.T / TEMPERATURE
        s = s.scatter(1, part[:, None], -torch.inf)
        positive = s.gather(1, (part[:, None] + images) % (2 * images))
        loss = (s.logsumexp(1, keepdim=True) - positive).sum() / (2 * images)
        loss.backward()
        total += loss.detach()
    assert x.grad is not None
    return total, x.grad


def in_processes(worker: Callable, size: int, *args: Any) -> list:
    """[worker(rank, *args) of each rank], in `size` processes of a Gloo group."""
    with tempfile.TemporaryDirectory() as folder, torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        arguments = worker, size, f"file://{folder}/store", results, args
        torch.multiprocessing.spawn(_process, arguments, nprocs=size)
        return [results[rank] for rank in range(size)]


def _process(rank: int, worker: Callable, size: int, store: str, results: Any, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    try:
        results[rank] = worker(rank, *args)
    finally:
        dist.destroy_process_group()


# Times and bytes.


def formula(size: int, rows: int, dim: int, name: str) -> int:
    """Bytes that a process sends for NT-Xent in float32, as sslfast.distributed says, and for the sum of the
    loss over processes."""
    forward, backward = 4 * dim + 8, 4 + 4 + (4 * dim + 8 if name.endswith("ring") else 0)
    return (size - 1) * 2 * rows * (forward + backward) + round(4 * 2 * (size - 1) / size)


def steps(quick: bool, _: torch.device) -> dict:
    rows, rounds, found = (64, 2, []) if quick else (ROWS, ROUNDS, [])
    for size in SIZES[: 1 if quick else None]:
        ranks = in_processes(_steps, size, rows, rounds, truth(size, rows, DIM))
        samples = {name: [max(times) for times in zip(*(of["samples"][name] for of in ranks), strict=True)]
                   for name in IMPLEMENTATIONS}  # fmt: skip
        median = {name: statistics.median(times) for name, times in samples.items()}
        for name, times in samples.items():
            low, high = torch.tensor(times).quantile(torch.tensor([0.2, 0.8])).tolist()
            row = {"processes": size, "rows": rows, "dim": DIM, "name": name, "ms": median[name],
                   "ms_20": low, "ms_80": high, "plain_over_it": min(median[x] for x in PLAIN) / median[name],
                   "error": max(of["error"][name] for of in ranks), "samples": times,
                   "loopback": ranks[0]["loopback"][name]}  # fmt: skip
            if name.startswith("sslfast"):
                counted, sent = {of["sent"][name] for of in ranks}, formula(size, rows, DIM, name)
                if counted != {sent}:
                    raise AssertionError(f"{name}, {size} processes: sent {counted}, the formula says {sent}")
                row |= {"sent": counted.pop(), "formula": sent, "over_formula": row["loopback"] / sent}
            found.append(row)
    return {"threads": 1, "temperature": TEMPERATURE, "results": found}


def _steps(rank: int, rows: int, rounds: int, true: tuple[Tensor, Tensor]) -> dict[str, dict]:
    z, size = views(rank, rows, DIM), dist.get_world_size()
    found: dict[str, dict] = {"error": {}, "sent": {}, "samples": {}, "loopback": {}}
    for name, call in IMPLEMENTATIONS.items():
        before = bytes_sent()
        loss, *gradients = step(call, *z)
        found["sent"][name] = bytes_sent() - before
        if name.startswith("plain"):  # its loss is that of this process's rows
            dist.all_reduce(loss)
            loss /= size
        # Either way DistributedDataParallel's mean over processes is the gradient.
        expected = size * true[1][:, rank * rows : (rank + 1) * rows]
        error = max(relative(loss, true[0]), relative(torch.stack(gradients), expected))
        found["error"][name] = error
        if not error <= LIMIT[torch.float32]:
            raise AssertionError(f"{name}, {size} processes: wrong, relative error {error:.1e}")
        found["samples"][name] = []
    for _ in range(rounds):
        for name, call in IMPLEMENTATIONS.items():
            dist.barrier()
            began = time.perf_counter()
            step(call, *z)
            found["samples"][name].append((time.perf_counter() - began) * 1e3)
    windows, count = (1, 1) if rounds <= 2 else LOOPBACK
    for name, call in IMPLEMENTATIONS.items():
        counts = []
        for _ in range(windows):
            dist.barrier()
            before = loopback()
            dist.barrier()
            for _ in range(count):
                step(call, *z)
            dist.barrier()
            counts.append((loopback() - before) / count / size)
        found["loopback"][name] = min(counts)  # others may use it too
    return found


def relative(x: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double() - expected) / torch.linalg.vector_norm(expected))


def loopback() -> int:
    """Bytes that the loopback device has transmitted."""
    (line,) = (x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def show_steps(found: dict, console: Console) -> None:
    table = Table("processes", "NT-Xent", "median ms", "20-80 %", "plain / it", "MB sent", "formula",
                  "MB on lo", "error")  # fmt: skip
    table.columns[1].no_wrap = True
    for r in found["results"]:
        sent = [f"{r[key] / 1e6:.4f}" for key in ("sent", "formula")] if "sent" in r else ["", ""]
        ratio = f" ({r['over_formula']:.3f}x)" if "sent" in r else ""
        table.add_row(
            str(r["processes"]), r["name"], f"{r['ms']:.1f}", f"{r['ms_20']:.1f}-{r['ms_80']:.1f}",
            f"{r['plain_over_it']:.2f}x", *sent, f"{r['loopback'] / 1e6:.3f}{ratio}", f"{r['error']:.0e}",
        )  # fmt: skip
    console.print(table)
    console.print(f"{r['rows']} images a process, D={r['dim']}, {os.cpu_count()} CPUs")


# Memory.


def memory(quick: bool, _: torch.device) -> dict:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is given back is given back at once
    found: list[dict] = []
    for rows, dim in ((16, 1 << 12),) if quick else ((ROWS, DIM), WIDE):
        for size in SIZES[: 1 if quick else None]:
            peaks = {name: max(in_processes(_memory, size, name, rows, dim)) for name in IMPLEMENTATIONS}
            about = {"processes": size, "rows": rows, "dim": dim, "features_mib": 8 * rows * dim / 2**20}
            better = min(peaks[name] for name in PLAIN)
            for name, peak in peaks.items():
                found.append(about | {"name": name, "mib": peak / 2**20, "plain_over_it": better / peak})
    return {"results": found}


def _memory(rank: int, name: str, rows: int, dim: int) -> int:
    """Bytes, in a process that has run a step of this size before, for what is allocated once."""
    z = views(rank, rows, dim)
    step(IMPLEMENTATIONS[name], *z)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    step(IMPLEMENTATIONS[name], *z)
    return (status("VmHWM") - before) << 10


def show_memory(found: dict, console: Console) -> None:
    table = Table("images, D", "processes", "NT-Xent", "peak MiB", "times own\nfeatures", "plain / it")
    for r in found["results"]:
        table.add_row(
            f"{r['rows']} x {r['dim']}", str(r["processes"]), r["name"], f"{r['mib']:.1f}",
            f"{r['mib'] / r['features_mib']:.1f}", f"{r['plain_over_it']:.2f}x",
        )  # fmt: skip
    console.print(table)


# Blocks.


@dataclass(frozen=True)
class Form:
    """What a loss asks of n own rows and n of a visitor, or of its own. products: how many of 2 n n D
    operations the forward and the backward pass need."""

    itself: bool
    cols: bool
    needs: tuple[bool, bool, bool, bool]
    products: tuple[float, float]


FORMS = {
    "NT-Xent, own": Form(True, False, (True, False, False, False), (0.5, 2)),
    "NT-Xent": Form(False, False, (True, False, False, False), (1, 2)),
    "InfoNCE": Form(False, False, (True, True, False, False), (1, 3)),
    "CLIP": Form(False, True, (True, True, True, False), (1, 3)),
}


def blocks(quick: bool, device: torch.device) -> dict:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = []
    for dim in DIMS[: 1 if quick else None]:
        for n in (256,) if quick else BLOCKS:
            for name, form in FORMS.items():
                for which, run in checked_block(name, form, n, dim, device, dtype).items():
                    run()
                    count = 1 if device.type == "cuda" else 3 if quick else min(41, 5 + 30 * 2**20 // n**2)
                    times = [milliseconds(run, device.type, False) for _ in range(count)]
                    ms, products = statistics.median(times), form.products[which == "backward"]
                    tflops = products * 2 * n * n * dim / ms / 1e9
                    found.append({"form": name, "pass": which, "n": n, "dim": dim, "ms": ms, "samples": times,
                                  "products": products, "tflops": tflops})  # fmt: skip
    about = {"type": device.type, "dtype": str(dtype).removeprefix("torch."), "quick": quick}
    return {**about, "threads": torch.get_num_threads(), "results": found}


def checked_block(
    name: str, form: Form, n: int, dim: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """Forward and backward, which give what plain PyTorch does in float64."""
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(n, dim, device=device), dim=1).to(dtype) for _ in range(2))
    ids = torch.arange(2 * n, device=device)
    other = (None, None) if form.itself else (b, ids[n:])
    scale, scale64 = (torch.tensor(1 / TEMPERATURE, device=device, dtype=t) for t in (None, torch.float64))
    g, h = torch.rand(2, n, device=device) / n
    row, col = torch.full((2, n), 1 / TEMPERATURE, device=device)  # of more rows than these
    # The visitor's gradients and log-sum-exps: NT-Xent's of its rows, CLIP's of its columns.
    along = (h, col) if form.cols or (name == "NT-Xent") else (None, None)

    def passes(backend: str, wide: Callable, scale: Tensor) -> dict[str, Callable[[], Any]]:
        x, y, slope, slope2, top, top2 = (
            None if t is None else wide(t) for t in (a, other[0], g, along[0], row, along[1])
        )
        args = x, y, scale, ids[:n], other[1]
        more = top, top2, False, form.needs
        return {
            "forward": lambda: _sharded._lse_block(backend, *args, False, form.cols),
            "backward": lambda: _sharded._lse_block_backward(backend, slope, slope2, *args, *more),
        }

    backend = _backend.resolve("similarity_lse", device, dtype)
    runs = passes(backend, lambda t: t, scale)
    for which, true in passes("reference", Tensor.double, scale64).items():
        for got, expected in zip(runs[which](), true(), strict=False):
            if expected is not None and not relative(got, expected) <= LIMIT[dtype]:
                error = relative(got, expected)
                raise AssertionError(f"{name}, {which}, n={n}, D={dim}: relative error {error:.1e}")
    return runs


def show_blocks(found: dict, console: Console) -> None:
    table = Table("block of", "pass", "D", "n", "ms", "products", "TFLOP/s")
    for r in found["results"]:
        numbers = f"{r['ms']:.3f}", f"{r['products']:g}", f"{r['tflops']:.3f}"
        table.add_row(r["form"], r["pass"], str(r["dim"]), str(r["n"]), *numbers)
    console.print(table)
    console.print(f"{found['device']}, {found['dtype']}, {found['threads']} threads of the host")


RUN = {"steps": (steps, show_steps), "memory": (memory, show_memory), "blocks": (blocks, show_blocks)}

if __name__ == "__main__":
    tyro.cli(main)
