"""`sslfast bench`: measures, prints, keeps, compares."""

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

import sslfast
from sslfast import _C
from sslfast.bench import measure, page
from sslfast.bench.case import Case, copied
from sslfast.bench.cases import chosen
from sslfast.bench.compare import slower
from sslfast.bench.peers import names

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
MISSING = "why_not"


def bench(
    op: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: tuple[Dtype, ...] = (),
    sizes: tuple[int, ...] = (),
    backends: tuple[Literal["cpu", "triton", "cuda", "reference"], ...] = (),
    peers: tuple[str, ...] = ("all",),
    compile: bool = True,
    memory: bool = True,
    memory_gib: float = 0.0,
    seconds: float = 5.0,
    minutes: float = 0.0,
    repeats: int = 0,
    json: Path | None = None,
    name: str = "bench",
    baseline: Path | None = None,
    plots: Path | None = None,
) -> None:
    """Times ops and losses beside plain PyTorch, torch.compile and installed libraries, and says how much of
    what the machine can do is used.

    Every result is checked against float64 first, and a wrong one is not timed. Implementations alternate in
    one process; the floor is made of rates that are measured in the same run.

    Args:
        op: public names, such as ntxent_loss or ema_update_; all if none is given.
        device: auto: a GPU if there is one.
        dtype: of the inputs; float32, on a GPU bfloat16 too, if none is given.
        sizes: to measure instead of each op's own, such as rows of a batch; two or more are plotted.
        backends: of sslfast's that are measured one by one; none: what a user gets.
        peers: libraries by the name that is imported, all or none.
        compile: also measure torch.compile of plain PyTorch.
        memory: also measure peak memory, beyond inputs, results and gradients; on a CPU in processes of
            their own.
        memory_gib: what an implementation may have on the CPU; 0: nine tenths of what is free. Those that
            need more are not timed.
        seconds: about how long to time each op, size, dtype and pass.
        minutes: begin no further size after so many; 0: measure all.
        repeats: whole measurements, whose spread tells noise from change; 0: three with a baseline,
            otherwise one.
        json: file to write, or a folder, for DEVICE/NAME.json there. Rows of other ops that are in it of the
            same machine, threads and torch stay.
        name: of the file in a folder.
        baseline: such a file of an earlier version: what got slower beyond noise is told, exit status 1.
        plots: folder for time and memory over the size, a roofline, and a page with both.
    """
    chosen_device = torch.device(
        device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    if chosen_device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: there is no GPU that torch can use")
    if any(size < 1 for size in sizes):
        raise ValueError(f"sizes: expected positive numbers, got {sizes}")
    if unknown := set(peers) - {"all", "none", *names()}:
        raise ValueError(f"peers: expected all, none or some of {', '.join(names())}, got {sorted(unknown)}")
    before = read(baseline) if baseline else None
    cases, console = chosen(op), Console(width=None if sys.stdout.isatty() else 140)
    dtypes = dtype or (("float32", "bfloat16") if chosen_device.type == "cuda" else ("float32",))
    torch.manual_seed(0)
    whole: dict[str, Any] = about(chosen_device)
    path = json and (json if json.suffix == ".json" else json / whole["device"] / f"{name}.json")
    for key in ("device", "threads"):
        if before and before[key] != whole[key]:
            raise ValueError(f"baseline: {baseline} has {key} {before[key]}, here it is {whole[key]}")
    whole["rows"] = others(path, whole, {case.name for case in cases}) if path else []
    earlier = len(whole["rows"])
    if path:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise ValueError(f"json: cannot write to {path}: {problem}") from problem
    measured = [getattr(torch, name) for name in dtypes]
    whole["ceilings"] = measure.ceilings(chosen_device, measured)
    console.print(header(whole))
    gib = memory_gib or 0.9 * available_gib()
    options = {"backends": backends, "peers": () if peers == ("none",) else peers, "compiled": compile}
    whole["memory_gib"] = gib
    failed: list[dict[str, Any]] = []
    end = time.monotonic() + (60 * minutes or math.inf)
    for repeat in range(repeats or (3 if baseline else 1)):
        for case in cases:
            rates: dict[str, Any] = {}
            for of in (x for x in measured if str(x).removeprefix("torch.") in case.dtypes):
                for size in case.sizes_on(chosen_device, sizes):
                    if time.monotonic() > end:
                        console.print(f"{case.name}, {size}: left out for lack of time")
                        continue
                    # anew for each case, since machines change their pace
                    rates = rates or measure.ceilings(chosen_device, measured)
                    found = rows(case, size, of, chosen_device, rates, options, memory, gib, seconds)
                    show(found, console)
                    whole["rows"] += [{**row, "repeat": repeat, "commit": whole["commit"]} for row in found]
                    failed += [row for row in found if is_failure(row, backends)]
                    if path:
                        keep(path, whole)
    if not whole["rows"]:
        raise ValueError(
            f"op: nothing of {', '.join(op)} is measured on {chosen_device} in {', '.join(dtypes)}"
        )
    if path:
        console.print(f"wrote {path}")
    if plots:
        console.print(f"wrote {page.write(whole, plots)}")
    for row in failed:
        console.print(
            f"{row['op']} {row['variant']} {row['size']} {row['dtype']}: {row[MISSING]}", style="red"
        )
    if (before and slower(before, {**whole, "rows": whole["rows"][earlier:]}, console)) or failed:
        sys.exit(1)


def is_failure(row: dict[str, Any], backends: Sequence[str]) -> bool:
    """Whether sslfast is wrong or fails, but for lack of memory or of a backend that was asked for."""
    why = row.get(MISSING)
    return (
        row["name"].startswith("sslfast")
        and why is not None
        and why != "out of memory"
        and (why == "wrong" or not backends)
    )


def rows(
    case: Case,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    rates: dict[str, Any],
    options: dict[str, Any],
    memory: bool,
    gib: float,
    seconds: float,
) -> list[dict[str, Any]]:
    """Of one case at one size: memory first, since what runs out of it cannot be timed."""
    calls = measure.implementations(case, **options)
    peaks: dict[str, dict[str, Any]] = {}
    if memory and device.type == "cpu" and not case.updated:
        peaks = measure.memory(case, size, dtype, list(calls), options["backends"], gib)
    lost = {name: peak for name, peak in peaks.items() if MISSING in peak}
    fitting = {name: call for name, call in calls.items() if name not in lost}
    plain = "eager" if case.plain else "reference"
    eager = math.inf if plain in lost else peaks.get(plain, {}).get("peak_mib", 0.0)
    fits = 8 / dtype.itemsize * eager < 1024 * gib
    found = list(measure.rows(case, size, dtype, device, fitting, rates, seconds, fits))
    if memory and device.type == "cuda":
        inputs = copied(case, case.inputs(size, dtype, device))
        for name in {row["name"] for row in found if "ms" in row}:
            try:
                peaks[name] = {"peak_mib": measure.peak_on_gpu(case, calls[name], inputs)}
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
    for row in found:
        row |= {key: value for key, value in peaks.get(row["name"], {}).items() if key not in row}
    return found + [{**measure.about(case, size, dtype), "name": name, **peak} for name, peak in lost.items()]


def about(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "isa": _C.cpu_isa(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "sslfast": sslfast.__version__,
        "commit": os.environ.get("SSLFAST_COMMIT") or commit(),
    }
    if device.type == "cuda":
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["cuda"] = torch.version.cuda
    return found


def device_name(device: torch.device) -> str:
    """As results are filed under it."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = (model.group(1) if model else platform.machine()).replace("(R)", "") + f" {os.cpu_count()}cpu"
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of the repository that the package is used from; None of an installed one."""
    folder = Path(__file__).parents[2]
    return (
        _output("git", "-C", str(folder), "describe", "--always", "--dirty")
        if (folder / ".git").exists()
        else None
    )


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def available_gib() -> float:
    match = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    return int(match.group(1)) / 2**20 if match else 8.0


def read(path: Path, argument: str = "baseline") -> dict[str, Any]:
    """Results of an earlier run.

    Raises:
        ValueError: there are none in the file.
    """
    try:
        whole = json.loads(path.read_text())
        if not isinstance(whole["rows"], list):
            raise KeyError("rows")
        return whole
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{argument}: {path} is not a file that --json wrote: {problem!r}") from problem


def others(path: Path, whole: dict[str, Any], measured: set[str]) -> list[dict[str, Any]]:
    """Rows in the file, if it is of the same machine and versions, that are not of cases of these names."""
    if not path.exists():
        return []
    old = read(path, "json")
    if any(
        old.get(key) != whole.get(key) for key in ("device", "threads", "torch", "isa", "triton", "driver")
    ):
        return []
    return [
        row for row in old["rows"] if ", ".join(filter(None, (row["op"], row["variant"]))) not in measured
    ]


def keep(path: Path, whole: dict[str, Any]) -> None:
    """At once and atomically, so that a run that is cut off loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({**whole, "rows": [rounded(row) for row in whole["rows"]]}, indent=1) + "\n")
    part.replace(path)


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


def header(whole: dict[str, Any]) -> str:
    rates = whole["ceilings"]
    products = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates["gflops"].items())
    return (
        f"{whole['device']}, {whole['threads']} threads, torch {whole['torch']}, sslfast {whole['sslfast']}: "
        f"matrix products {products} GFLOP/s, memory "
        f"{rates['gbps']:.0f} GB/s"
    )


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """A table of one case at one size."""
    first = rows[0]
    title = (
        f"{first['op']}{', ' * bool(first['variant'])}{first['variant']}: {first['shape']}, {first['dtype']}"
    )
    table = Table(
        "", "ms", "20 - 80 %", "eager is slower by", "GFLOP/s", "GB/s", "share of floor", "error", "peak MiB",
        title=title, title_justify="left",
    )  # fmt: skip
    for which in measure.PASSES:
        timed = [row for row in rows if row.get("pass") == which]
        eager = next((row["ms"] for row in timed if row["name"] in ("eager", "reference")), None)
        for row in timed:
            wrong = max(row["error"], row["gradient_error"] if which == measure.PASSES[1] else 0.0)
            table.add_row(
                f"{row['name']}, {which}", f"{row['ms']:.3f}", f"{row['ms_20']:.3f} - {row['ms_80']:.3f}",
                f"{eager / row['ms']:.2f}x" if eager else "", f"{row['gflops']:.0f}" if row["gflops"] else "",
                f"{row['gbps']:.1f}" if row["gbps"] else "", f"{row['share']:.0%}" if row["floor_ms"] else "",
                f"{wrong:.0e}", f"{row['peak_mib']:.1f}" if "peak_mib" in row else "",
            )  # fmt: skip
    for row in rows:
        if MISSING in row:
            table.add_row(row["name"], row[MISSING])
    console.print(table)
