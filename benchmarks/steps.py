"""Times whole training steps, from views to the teacher's update, beside the same steps in plain PyTorch and,
where it is installed, with lightly's losses and helpers; --json-out keeps them.

All have the same networks, optimizer and views. Before anything is timed, each takes its first step from the
same weights in float32: a loss, a gradient, a teacher, queue or centre unlike plain PyTorch's is refused.
Implementations alternate in one process, in another order in each round. Views exist already, but for
sslfast's share of each phase, which is measured with them. Memory is the peak of one step beyond what is held
before it: weights, the optimizer's state, views; on a CPU it is resident memory in a fresh process.

    python benchmarks/steps.py --json-out benchmarks/results
    python benchmarks/steps.py --device cuda --json-out benchmarks/results
"""

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from common import json_path, keep, status
from rich.console import Console
from rich.table import Table
from steps_cases import CASES, SEED, Case, Outcome, Step, collect, out_of_memory
from steps_plain import installed
from torch import Tensor

from sslfast.bench.run import about
from sslfast.train.budget import Budget, phase, running

LIMITS = {"loss_error": 1e-4, "gradient_error": 1e-3, "state_error": 1e-2}  # in float32
SAME_LOSS = 2e-2  # of the whole batch, whatever the dtype
CHECKED = 64  # images of a GPU's batch that are checked in float32
VIEWS = "with views"
FULL = "out of memory"


class Wrong(Exception):
    """A result that is not to be timed."""


def main(
    methods: tuple[Literal["simclr", "moco", "byol", "dino", "mae"], ...] = (),
    device: Literal["cpu", "cuda"] = "cpu",
    rounds: int = 0,
    json_out: Path | None = None,
    memory: bool = True,
    quick: bool = False,
    memory_of: str = "",
) -> None:
    """Times the steps of these methods.

    Args:
        methods: which; none: all.
        rounds: alternations, each of which times every implementation once; 0: 11 on a CPU, 20 on a GPU.
        json_out: where to write the results; a folder gets <device>/steps.json.
        memory: also measure memory, on a CPU in a process for each implementation.
        quick: tiny networks, two rounds, memory of the first method alone: whether it runs.
        memory_of: (internal) "title|name": measure the memory of a step in this process and print it.
    """
    cases = [c for c in CASES["quick" if quick else device] if not methods or c.method in methods]
    if memory_of:
        title, name = memory_of.split("|")
        print(json.dumps(peak_here(next(c for c in cases if c.title == title), name)))
        return
    console = Console(width=130)
    whole = header(device, quick)
    console.print(f"{whole['device']}, {whole['threads']} threads, torch {whole['torch']}")
    path = json_path(json_out, whole["device"], "steps.json")
    rounds = rounds or (2 if quick else 11 if device == "cpu" else 20)
    refused, others = [], earlier(path, whole)
    for i, case in enumerate(cases):
        try:
            rows = run_case(case, device, rounds, memory and not (quick and i), quick)
        except Wrong as error:
            refused.append(str(error))
            rows = [{**titled(case, "plain"), "why_not_timed": str(error)}]
        whole["steps"] += [{**row, "commit": whole["commit"]} for row in rows]
        keep(path, whole | {"steps": merged(others, whole["steps"])})
        show(rows, console)
    show_budget(whole["steps"], console)
    if path:
        console.print(f"wrote {path}")
    if refused:
        raise SystemExit("not timed: " + "; ".join(refused))


def header(device: str, quick: bool) -> dict[str, Any]:
    lightly = importlib.metadata.version("lightly") if importlib.util.find_spec("lightly") else None
    return {**about(torch.device(device)), "lightly": lightly, "quick": quick, "steps": []}


def earlier(path: Path | None, whole: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that a run of the same versions left in the file."""
    found: dict[str, Any] = {}
    if path and path.exists():
        with suppress(ValueError):
            found = json.loads(path.read_text())
    same = {key: value for key, value in whole.items() if key not in ("commit", "steps")}
    return found["steps"] if found | same == found else []


def merged(others: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    titles = {row["title"] for row in rows}
    return [row for row in others if row["title"] not in titles] + rows


def titled(case: Case, name: str) -> dict[str, Any]:
    keys = ("title", "method", "backbone", "size", "batch", "dtype")
    return {**{key: getattr(case, key) for key in keys}, "name": name}


def run_case(
    case: Case, device: str, rounds: int, memory: bool = True, quick: bool = False
) -> list[dict[str, Any]]:
    """A row for each implementation; raises Wrong where ours and plain PyTorch's are not the same."""
    rows = {name: titled(case, name) for name in installed()}
    batch = case.batch if device == "cpu" else min(case.batch, CHECKED)
    for name, found in checked(case, device, batch, list(rows)).items():
        rows[name].update(found)
    names = [name for name, row in rows.items() if "why_not_timed" not in row]
    found = timed(case, device, rounds, names)
    for name in names:
        rows[name].update(found[name])
    views = found.get(VIEWS, {})
    if "ms" in rows["sslfast"] and "ms" in views:
        speeds = {f"{key}_{VIEWS.replace(' ', '_')}": views[key] for key in ("ms", "images_per_second")}
        rows["sslfast"].update(speeds, budget=views["budget"])
    for name in names if memory and device == "cpu" else ():
        rows[name]["peak_mib"] = peak_elsewhere(case, name, quick)
    for row in rows.values():
        if "ms" in row and "ms" in rows["plain"]:
            row["speedup"] = rows["plain"]["ms"] / row["ms"]
    return list(rows.values())


def checked(case: Case, device: str, batch: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """Errors of each implementation in the dtype that is timed, beside plain PyTorch in float32; where it is
    wrong in float32, why it is not timed."""
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    found: dict[str, dict[str, Any]] = {}
    true: Outcome | None = None
    try:
        for name in names:
            collect()
            try:
                outcome = Outcome(name, case, device, "float32", batch)
                true = true or outcome
                errors = outcome.errors(true)
                if wrong := [f"{key} {errors[key]:.1e}" for key in LIMITS if not errors[key] <= LIMITS[key]]:
                    raise Wrong(f"{case.title}, {name} differs from plain PyTorch: {', '.join(wrong)}")
                if case.dtype != "float32":
                    errors = Outcome(name, case, device, case.dtype, batch).errors(true)
                found[name] = errors
            except (Wrong, RuntimeError, MemoryError) as error:
                full = out_of_memory(error)
                if not (full or isinstance(error, Wrong)):
                    raise
                if name != "lightly":  # without both, or if they differ, no one knows what is right
                    raise Wrong(f"{case.title}, check of {name}: {FULL}" if full else str(error)) from error
                found[name] = {"why_not_timed": FULL if full else str(error)}
        return found
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        collect()


# Time.


def timed(case: Case, device: str, rounds: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """Of each name, and of ours VIEWS: times, or why there are none; on a GPU memory as well."""
    found: dict[str, dict[str, Any]] = {name: {} for name in (*names, VIEWS)}
    steps: dict[str, Step] = {}
    budget = Budget(torch.device(device))
    losses: dict[str, float] = {}

    def attempt(name: str, do: Callable[[], Any]) -> Any:
        """None, and no more attempts, where memory is not enough."""
        try:
            return do()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        found[name] = {"why_not_timed": FULL}
        steps.pop(name, None)
        collect()
        return None

    for name in names:  # with the first step's loss, of the whole batch
        step = attempt(name, partial(Step, name, case, device))
        if step is None:
            continue
        steps[name] = step
        torch.manual_seed(SEED)
        loss = attempt(name, partial(once, step, step.views))
        if loss is not None:
            losses[name] = float(loss)
    first = next(iter(losses.values()), 0.0)
    if any(not abs(loss - first) <= SAME_LOSS * abs(first) for loss in losses.values()):
        raise Wrong(f"{case.title}: losses differ, {losses}")
    if "sslfast" in steps:
        steps[VIEWS] = steps["sslfast"]
    samples: dict[str, list[float]] = {name: [] for name in steps}
    warm = 1 if device == "cpu" else 2  # beside the first step
    order, shares = random.Random(SEED), {}
    for i in range(warm + rounds):
        if i == warm:
            budget.reset()
        for name, step in order.sample(list(steps.items()), len(steps)):
            run = partial(with_views, step, budget) if name == VIEWS else partial(step, step.views)
            with step.changed():
                ms = attempt(name, partial(milliseconds, run, device))
            if name == VIEWS:
                shares = budget.shares()  # now, since what other steps take would be its "other"
            if ms is not None and i >= warm:
                samples[name].append(ms)
    for name, step in list(steps.items()):
        ms_20, ms, ms_80 = torch.tensor(samples[name]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        found[name] = {
            "ms_20": ms_20, "ms": ms, "ms_80": ms_80, "images_per_second": case.batch / ms * 1e3,
            "samples": samples[name],
        }  # fmt: skip
        if name == VIEWS:
            found[name]["budget"] = shares
        elif device == "cuda":
            peak = attempt(name, partial(peak_on_gpu, step))
            if peak is not None:
                found[name]["peak_mib"] = peak
    return found


def once(step: Step, views: tuple[Tensor, ...]) -> Tensor:
    with step.changed():
        return step(views)


def with_views(step: Step, budget: Budget) -> None:
    budget.restart()
    with running(budget):
        with phase("augment"):
            views = step.fresh()
        step(views)


def milliseconds(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3


# Memory.


def peak_on_gpu(step: Step) -> float:
    """MiB beyond what is held before a step."""
    collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once(step, step.views)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_here(case: Case, name: str) -> float:
    """MiB that the second step adds to resident memory at its peak (Linux)."""
    step = Step(name, case, "cpu")
    once(step, step.views)
    collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    once(step, step.views)
    return (status("VmHWM") - before) / 1024


def peak_elsewhere(case: Case, name: str, quick: bool) -> float | str:
    """In a process of its own, whose malloc gives back what is freed."""
    command = [sys.executable, __file__, "--methods", case.method, "--memory-of", f"{case.title}|{name}"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command + ["--quick"] * quick, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return float(done.stdout.splitlines()[-1])
    if done.returncode == -9 or out_of_memory(RuntimeError(done.stderr)):
        return FULL
    raise RuntimeError(f"{case.title}, {name}: {done.stderr[-2000:]}")


# What is printed.


def show(rows: list[dict[str, Any]], console: Console) -> None:
    row = rows[0]
    sizes = f"{row['backbone']}, {row['size']} pixels, batch {row['batch']}, {row['dtype']}"
    table = Table(
        "implementation", "median ms", "20-80 %", "images/s", "as fast\nas plain", "peak MiB", "loss\nerror",
        "gradient\nerror", title=f"{row['title']}: {sizes}", title_justify="left",
    )  # fmt: skip
    for row in rows:
        if "ms" not in row:
            table.add_row(row["name"], row["why_not_timed"])
            continue
        peak, speedup = row.get("peak_mib", ""), row.get("speedup")
        table.add_row(
            row["name"], f"{row['ms']:.1f}", f"{row['ms_20']:.1f}-{row['ms_80']:.1f}",
            f"{row['images_per_second']:.1f}", f"{speedup:.2f}x" if speedup else "",
            peak if isinstance(peak, str) else f"{peak:.0f}", f"{row['loss_error']:.1e}",
            f"{row['gradient_error']:.1e}",
        )  # fmt: skip
    console.print(table)


def show_budget(rows: list[dict[str, Any]], console: Console) -> None:
    rows = [row for row in rows if "budget" in row]
    if not rows:
        return
    phases = list(rows[0]["budget"])
    table = Table("sslfast, with views", "images/s", *phases, title="Shares of a step", title_justify="left")
    for row in rows:
        shares = [f"{row['budget'][name]:.1%}" for name in phases]
        table.add_row(row["title"], f"{row['images_per_second_with_views']:.1f}", *shares)
    console.print(table)


if __name__ == "__main__":
    tyro.cli(main)
