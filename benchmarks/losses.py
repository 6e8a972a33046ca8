"""Times CLIP's, SigLIP's, SupCon's and the triplet loss and linear_cross_entropy, forward + backward, beside
eager PyTorch and torch.compile, and prints tables; --json-out keeps them.

A result is checked against float64 before it is timed, gradients too. The implementations alternate in one
process. Memory is the peak resident memory of one forward + backward in a fresh process, less what was
resident before it, the inputs among it, and less the size of the gradients of the inputs.

    python benchmarks/losses.py --json-out benchmarks/results
"""

import ctypes
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import tyro
from device import cpu_name
from losses_plain import (
    EAGER,
    OURS,
    Case,
    errors_of,
    inputs_of,
    is_right,
    json_path,
    keep,
    results,
    small,
    truth,
)
from masking import _status, milliseconds
from rich.console import Console
from rich.table import Table
from torch import Tensor

import sslfast
from sslfast import _C

CASES = (
    Case("clip_loss", 4096, 128, scale=1 / 0.07, faster=2, memory=0.1),
    Case("clip_loss", 4096, 128, scale=100, faster=2, memory=0.1),
    Case("siglip_loss", 4096, 128, scale=10, faster=2, memory=0.1),
    Case("supcon_loss", 4096, 128, 100, faster=5),
    Case("triplet_margin_loss", 4096, 128, 100, faster=5),
    Case("linear_cross_entropy", 2048, 512, 50257, labelled=0.15, faster=4, memory=0.1, rounds=5),
    Case("linear_cross_entropy", 2048, 512, 50257, faster=1, memory=0.1, rounds=5),
)
COMPILED = ("clip_loss", "siglip_loss", "supcon_loss")
PROCESSES = 3  # what malloc keeps of freed memory varies


def main(
    json_out: Path | None = None,
    only: str = "",
    rounds: int = 0,
    memory: bool = True,
    quick: bool = False,
    memory_of: str = "",
) -> None:
    """
    Args:
        json_out: where to write the results; a folder gets <device>/losses.json.
        only: cases whose name begins so, as the tables have it: a loss, or "clip_loss, scale 100".
        rounds: alternations, each of which times every implementation once; 0: 9, or 5 of the linear layer.
        memory: also measure memory, in three processes for each implementation.
        quick: small sizes, two rounds, one process: whether it runs.
        memory_of: (internal) measure the memory of one implementation of a case in this process and print it.
    """
    cases = [case for case in CASES if case.title.startswith(only)]
    if not cases:
        raise SystemExit(f"--only {only}: expected a beginning of {', '.join(case.title for case in CASES)}")
    if quick:
        cases = [small(case, 300) for case in cases]
    torch.manual_seed(0)
    if memory_of:
        print(json.dumps(peak_memory_here(cases[0], memory_of)))
        return
    console = Console(width=120)
    device = cpu_name()
    console.print(f"{device}, {torch.get_num_threads()} threads, {_C.cpu_isa()}, torch {torch.__version__}")
    whole: dict = {
        "device": device, "threads": torch.get_num_threads(), "isa": _C.cpu_isa(),
        "torch": torch.__version__, "sslfast": sslfast.__version__, "python": platform.python_version(),
        "losses": [], "memory": [],
    }  # fmt: skip
    path = json_path(json_out, device, "losses.json")
    for case in cases:
        whole["losses"] += run_case(case, rounds or (2 if quick else case.rounds))
        keep(path, whole)
    show_times(whole["losses"], console)
    if memory:
        for case in cases:
            whole["memory"] += measure_memory(case, quick)
            keep(path, whole)
        show_memory(whole["memory"], console)
    if path:
        console.print(f"wrote {path}")


def implementations(case: Case) -> dict[str, Callable[..., Tensor]]:
    found = dict(EAGER[case.op])
    if case.op in COMPILED:
        found["compile"] = torch.compile(found["eager"], dynamic=False)
    return found | {"sslfast": OURS[case.op]}


def about(case: Case, name: str) -> dict:
    """asked_faster, asked_memory: what ours is asked to reach beside this implementation."""
    eager = name in EAGER[case.op]
    fields = {key: value for key, value in asdict(case).items() if key not in ("faster", "memory", "rounds")}
    asked = {"asked_faster": case.faster, "asked_memory": case.memory}
    return {"title": case.title, "size": case.size, **fields, "name": name, **(asked if eager else {})}


def run_case(case: Case, rounds: int) -> list[dict]:
    torch._dynamo.reset()
    labels, x = inputs_of(case, "cpu")
    true = truth(case, labels, x)
    calls, rows = {}, []
    for name, call in implementations(case).items():
        row = about(case, name)
        rows.append(row)
        try:
            row.update(errors_of(results(call, labels, x), true))
        except Exception as error:  # where there is no compiler
            if name != "compile":
                raise
            row["why_not_timed"] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        if not is_right(case, row):
            raise AssertionError(f"{name} is wrong at {case}: {row}")
        calls[name] = call
    del true
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        results(call, labels, x)
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(milliseconds(lambda call=call: results(call, labels, x), "cpu", True))
    ours = statistics.median(samples["sslfast"])
    for row in rows:
        if row["name"] in samples:
            times = torch.tensor(samples[row["name"]])
            row["ms_20"], row["ms"], row["ms_80"] = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
            row.update(samples=samples[row["name"]], speedup=row["ms"] / ours)
    return rows


# Memory.


def measure_memory(case: Case, quick: bool) -> list[dict]:
    """Medians over fresh processes."""
    rows = []
    for name in implementations(case):
        command = [sys.executable, __file__, "--only", case.title, "--memory-of", name]
        runs = range(1 if quick else PROCESSES)
        command += ["--quick"] * quick
        done = [subprocess.run(command, capture_output=True, text=True) for _ in runs]
        if any(process.returncode for process in done):
            if name != "compile":
                raise RuntimeError(f"{case.title}, {name}: {done[0].stderr[-2000:]}")
            continue
        found = [json.loads(process.stdout) for process in done]
        gradients = found[0]["gradients_mib"]
        mib = [one["peak_mib"] - gradients for one in found]
        rows.append({**about(case, name), "mib": statistics.median(mib), "samples": mib,
                     "gradients_mib": gradients})  # fmt: skip
    ours = next(row for row in rows if row["name"] == "sslfast")
    for row in rows:
        row["share"] = ours["mib"] / row["mib"]
    return rows


def peak_memory_here(case: Case, name: str) -> dict[str, float]:
    """MiB of one forward + backward at its peak (Linux), and of its gradients, which are part of that."""
    call = implementations(case)[name]
    results(call, *inputs_of(case if name == "compile" else small(case, 128), "cpu"))
    labels, x = inputs_of(case, "cpu")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    results(call, labels, x)
    peak = (_status("VmHWM") - before) / 1024
    return {"peak_mib": peak, "gradients_mib": sum(t.nbytes for t in x.values()) / 2**20}


# What is printed.


def asked(found: float, wanted: float | None, form: str, most: bool = False) -> str:
    if wanted is None:
        return ""
    text = f"{'<=' if most else '>='} {form.format(wanted)}"
    return text if (found <= wanted if most else found >= wanted) else text + ", MISSED"


def show_times(rows: list[dict], console: Console) -> None:
    table = Table(
        "case", "implementation", "median ms", "20-80 %", "sslfast is\nfaster by", "asked", "loss error",
        "gradient\nerror",
    )  # fmt: skip
    for column in table.columns[:2]:
        column.no_wrap = True
    for row in rows:
        case = f"{row['title']}\n{row['size']}".replace(", ", "\n")
        start = case if row["name"] == first(rows, row) else "", row["name"]
        if "ms" not in row:
            table.add_row(*start, row["why_not_timed"])
            continue
        table.add_row(
            *start, f"{row['ms']:.1f}", f"{row['ms_20']:.1f}-{row['ms_80']:.1f}", f"{row['speedup']:.2f}x",
            asked(row["speedup"], row.get("asked_faster"), "{:g}x"), f"{row['loss_error']:.1e}",
            f"{row['gradient_error']:.1e}",
        )  # fmt: skip
    console.print(table)


def show_memory(rows: list[dict], console: Console) -> None:
    table = Table(
        "case", "implementation", "peak MiB beyond\ninputs and gradients", "sslfast's share", "asked"
    )
    for row in rows:
        table.add_row(
            row["title"] if row["name"] == first(rows, row) else "", row["name"], f"{row['mib']:.1f}",
            f"{row['share']:.1%}", asked(row["share"], row.get("asked_memory"), "{:.0%}", most=True),
        )  # fmt: skip
    console.print(table)


def first(rows: list[dict], row: dict) -> str:
    """Name of the first implementation of a row's case."""
    return next(other["name"] for other in rows if other["title"] == row["title"])


if __name__ == "__main__":
    tyro.cli(main)
