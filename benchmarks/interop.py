"""Times the drop-ins of sslfast.interop beside the installed originals, forward + backward; prints a table.

A result is checked before it is timed, loss and gradients, against the original in float64. Both alternate in
one process. Memory is the peak of one forward + backward in a fresh process beyond what was there before, the
inputs among it, and beyond the gradients (resident memory, or on a GPU what torch allocates). At the larger
batch the original runs in a process that may have 16 GiB, or the whole GPU. Libraries that are not installed
are left out and said so.

    make bench-interop
"""

import ctypes
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import tyro
from common import json_path, keep, milliseconds, status
from interop_cases import CASES, Case, Leaves
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sslfast.bench.run import about

ROOM = 16 << 30  # bytes that an original may have
LIMIT = 1e-4  # relative error of a loss and of a gradient
PROCESSES = 3  # what malloc keeps of freed memory varies
SIDES = ("original", "sslfast")


def main(
    json_out: Path | None = None,
    device: str = "cpu",
    only: str = "",
    rounds: int = 0,
    seconds: float = 0,
    memory_of: str = "",
    rows: int = 0,
    limited: bool = False,
) -> None:
    """Times each drop-in beside what it replaces.

    Args:
        json_out: where to write the results; a folder gets <device>/interop.json.
        device: "cpu" or "cuda".
        only: cases whose name begins so; in the file they replace earlier ones of theirs.
        rounds: alternations, each of which times both once; 0: the case's own.
        seconds: begin no case after as many; 0: no limit.
        memory_of: (internal) measure the memory of one side of the first case in this process and print it.
        rows: (internal) its batch.
        limited: (internal) in at most 16 GiB.
    """
    cases = [case for case in CASES if case.name.startswith(only)]
    if not cases:
        raise SystemExit(f"--only {only}: expected a beginning of {', '.join(case.name for case in CASES)}")
    torch.manual_seed(0)
    if memory_of:
        print(json.dumps(memory_here(cases[0], memory_of, rows, device, limited)))
        return
    console = Console(width=140)
    whole: dict = {**about(torch.device(device)), "libraries": {}, "cases": []}
    path = json_path(json_out, whole["device"], "interop.json")
    kept = json.loads(path.read_text()) if only and path and path.exists() else {"cases": [], "libraries": {}}
    whole["libraries"].update(kept["libraries"])
    began = time.perf_counter()
    for case in cases:
        try:
            case.modules()
        except ImportError as error:
            console.print(f"{case.name}: left out: {str(error).splitlines()[0]}")
            continue
        if seconds and time.perf_counter() - began > seconds:
            console.print(f"{case.name}: left out: no time")
            continue
        whole["libraries"][case.library] = version_of(case.library)
        found = run_case(case, device, rounds or case.rounds)
        whole["cases"].append({**found, "commit": whole["commit"]})
        new = {row["name"]: row for row in whole["cases"]}
        old = [new.pop(row["name"], row) for row in kept["cases"]]
        keep(path, {**whole, "cases": [*old, *new.values()]})
    show(whole["cases"], console)
    if path:
        console.print(f"wrote {path}")


def version_of(library: str) -> str:
    packages = metadata.packages_distributions().get(library, [library])
    return metadata.version(packages[0])


def results(call: Callable[..., Tensor | None], leaves: Leaves) -> tuple[Tensor, ...]:
    """Loss, and gradients of the leaves; without leaves what it worked on."""
    fresh = {k: x.detach().requires_grad_() for k, x in leaves.items()}
    loss = call(**fresh)
    if loss is None:
        return tuple(call.tensors)  # type: ignore[attr-defined]
    return (loss.detach(), *torch.autograd.grad(loss, list(fresh.values())))


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def run_case(case: Case, device: str, rounds: int) -> dict:
    leaves, side = case.make(case.rows, device)
    calls = {name: side(module) for name, module in case.modules().items()}
    row: dict = {
        "name": case.name, "library": case.library, "size": case.size(case.rows), "rows": case.rows,
        "asked_faster": case.faster, "asked_memory": case.memory,
    }  # fmt: skip
    check(case, row, calls, leaves)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():

            def run(call: Callable[..., Tensor | None] = call) -> None:
                results(call, leaves)
                wait(device)

            samples[name].append(milliseconds(run, device, True))
    for name, times in samples.items():
        row[name] = {"ms": statistics.median(times), "samples": times}
    row["faster"] = row["original"]["ms"] / row["sslfast"]["ms"]
    if leaves:
        for name in SIDES:
            found = [child(case, name, case.rows, device) for _ in range(PROCESSES)]
            row[name]["mib"] = statistics.median(one["mib"] for one in found)
        row["memory"] = row["sslfast"]["mib"] / row["original"]["mib"]
    if case.beyond:
        row["beyond"] = {"rows": case.beyond, "size": case.size(case.beyond)}
        for name in SIDES:
            row["beyond"][name] = child(case, name, case.beyond, device, limited=True)
    return row


def check(case: Case, row: dict, calls: dict[str, Callable], leaves: Leaves) -> None:
    """Raises where relative errors are large: against the original in float64, in place against itself."""
    if leaves:
        true = results(calls["original"], {k: x.double() for k, x in leaves.items()})
    else:
        true = results(calls["original"], leaves)
    for name, call in calls.items():
        found = true if not leaves and name == "original" else results(call, leaves)
        errors = [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, true, strict=True)]
        row[f"{name}_error"] = max(errors)
        if not max(errors) <= LIMIT:
            raise AssertionError(f"{case.name}, {name}: relative errors {errors} of the loss and gradients")


def child(case: Case, name: str, rows: int, device: str, limited: bool = False) -> dict:
    """Time and memory in a fresh process, or on a GPU, whose memory torch counts, in this one."""
    if device == "cuda":
        return memory_here(case, name, rows, device, limited)
    command = [sys.executable, __file__, "--only", case.name, "--memory-of", name, "--rows", str(rows)]
    command += ["--device", device, *(["--limited"] if limited else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case.name}, {name}, {rows} rows: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_here(case: Case, name: str, rows: int, device: str, limited: bool) -> dict:
    """MiB beyond inputs and gradients, and ms, of one forward + backward; or that there was no memory."""
    small, side = case.make(min(rows, 64), device)
    results(side(case.modules()[name]), small)  # loads what is loaded once
    leaves, side = case.make(rows, device)
    call = side(case.modules()[name])
    if limited and device == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (ROOM, ROOM))
    before = memory_before(device)
    try:

        def run() -> None:
            results(call, leaves)
            wait(device)

        ms = milliseconds(run, device, True)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        return {"out_of_memory": str(error).splitlines()[0][:200]}
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * status("VmHWM")
    gradients = sum(x.nbytes for x in leaves.values())
    return {"ms": ms, "mib": max(0.0, (peak - before - gradients) / 2**20)}


def memory_before(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    return 1024 * status("VmRSS")


def show(rows: list[dict], console: Console) -> None:
    table = Table(
        "drop-in", "size", "original ms", "sslfast ms", "faster by", "asked", "original MiB", "sslfast MiB",
        "share", "asked",
    )  # fmt: skip
    for row in rows:
        times = [f"{row[name]['ms']:.1f}" for name in SIDES]
        wanted = f">= {row['asked_faster']:g}x" if row["asked_faster"] else ""
        wanted += ", MISSED" if row["asked_faster"] and row["faster"] < row["asked_faster"] else ""
        sizes = [f"{row[name]['mib']:.0f}" if "mib" in row[name] else "" for name in SIDES]
        most = f"<= {row['asked_memory']:.0%}" if row["asked_memory"] else ""
        most += ", MISSED" if row["asked_memory"] and row["memory"] > row["asked_memory"] else ""
        share = f"{row['memory']:.1%}" if "memory" in row else ""
        table.add_row(row["name"], row["size"], *times, f"{row['faster']:.2f}x", wanted, *sizes, share, most)
        if "beyond" in row:
            both = [row["beyond"][name] for name in SIDES]
            cells = [f"{x['ms']:.0f}" if "ms" in x else "out of memory" for x in both]
            mib = [f"{x['mib']:.0f}" if "mib" in x else "" for x in both]
            table.add_row("", row["beyond"]["size"], *cells, "", "", *mib)
    console.print(table)


if __name__ == "__main__":
    tyro.cli(main)
