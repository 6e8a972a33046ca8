"""Times NT-Xent, forward + backward, beside eager PyTorch and torch.compile, and prints a table; --json keeps
it.

A result is checked against float64 before it is timed. The implementations alternate in one process; the
floor is made
of rates measured in the same run: two passes of the matrix product (2 M N D FLOPs each) and one exponential
per pair of rows in each direction. Peak memory is that of a fresh process, beyond what it held before the
call.
"""

import ctypes
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from device import cpu_name
from rich.console import Console
from rich.table import Table

import sslfast
from sslfast import _C
from sslfast.losses.contrastive import ntxent_reference

TEMPERATURE = 0.1
IMPLEMENTATIONS = ("eager", "compile", "sslfast")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    pairs: int
    dim: int
    dtype: str
    rounds: int
    """Alternations; each times every implementation once."""
    calls: int = 1
    """Calls per timing, so that a small case is not all clock."""


CASES = (
    Case(32, 128, "float32", 60, 10),
    Case(512, 128, "float32", 30),
    Case(4096, 128, "float32", 9),
    Case(4096, 128, "bfloat16", 5),
)
MEMORY_PAIRS = (4096, 32768)


def main(
    json_out: Path | None = None, memory_of: str | None = None, pairs: int = 4096, large: bool = True
) -> None:
    """
    Args:
        json_out: where to write the results; a folder gets <device>/ntxent.json.
        memory_of: (internal) measure the peak memory of one implementation in this process and print it.
        pairs: with --memory-of: N.
        large: also measure the memory of 32,768 pairs, which takes a while.
    """
    if memory_of:
        print(json.dumps(peak_memory_here(memory_of, pairs)))
        return
    torch.manual_seed(0)
    console = Console(width=120)
    device = cpu_name()
    rates = measure_rates()
    console.print(
        f"{device}, {torch.get_num_threads()} threads, {_C.cpu_isa()}, torch {torch.__version__}: "
        f"matrix product {rates['gemm_gflops']:.0f} GFLOP/s, exponentials {rates['exp_gps']:.2f} G/s"
    )
    rows = [row for case in CASES for row in run_case(case, rates)]
    show(rows, console)
    memory = [
        measure_memory(name, n)
        for n in MEMORY_PAIRS[: 1 + large]
        for name in (IMPLEMENTATIONS if n == 4096 else ("sslfast",))
    ]
    for m in memory:
        console.print(
            f"peak extra memory, N={m['pairs']} pairs, float32, {m['name']}: {m['peak_mib']:.0f} MiB"
        )
    if json_out:
        path = json_out if json_out.suffix == ".json" else json_out / device / "ntxent.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        results = {
            "device": device, "threads": torch.get_num_threads(), "isa": _C.cpu_isa(),
            "torch": torch.__version__, "sslfast": sslfast.__version__, "python": platform.python_version(),
            "temperature": TEMPERATURE, "rates": rates, "ntxent": rows, "memory": memory,
        }  # fmt: skip
        path.write_text(json.dumps(results, indent=1) + "\n")
        console.print(f"wrote {path}")


def measure_rates() -> dict[str, float]:
    """What the floor is made of: large float32 matrix products and exponentials of cached numbers."""
    a, b, c = (torch.randn(2048, 2048) for _ in range(3))
    x = torch.randn(512, 512)
    y = torch.empty_like(x)
    gemm = _median(lambda: torch.mm(a, b, out=c), 15)
    exp = _median(lambda: torch.exp(x, out=y), 200)
    return {"gemm_gflops": 2 * 2048**3 / gemm / 1e9, "exp_gps": x.numel() / exp / 1e9}


def floor_ms(case: Case, rates: dict[str, float]) -> float:
    m = 2 * case.pairs
    passes = 2 * 2 * m * m * case.dim / (rates["gemm_gflops"] * 1e9)
    exponentials = m * m / (rates["exp_gps"] * 1e9)
    return 1e3 * (passes + exponentials)


def run_case(case: Case, rates: dict[str, float]) -> list[dict]:
    dtype = DTYPES[case.dtype]
    calls = {name: forward_backward(name, case.pairs, case.dim, dtype) for name in IMPLEMENTATIONS}
    errors = check(case, dtype)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(), call()
    for _ in range(case.rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(case.calls):
                call()
            times[name].append((time.perf_counter() - began) / case.calls * 1e3)
    floor = floor_ms(case, rates)
    rows = []
    for name, samples in times.items():
        q = torch.tensor(samples).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        rows.append(
            {
                **asdict(case),
                "name": name,
                "ms_20": q[0],
                "ms": q[1],
                "ms_80": q[2],
                "floor_ms": floor,
                **errors[name],
            }
        )
    ours = next(row for row in rows if row["name"] == "sslfast")
    for row in rows:
        row["speedup"] = row["ms"] / ours["ms"]
        row["share_of_floor"] = floor / row["ms"]
    return rows


def forward_backward(name: str, pairs: int, dim: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    z = [torch.randn(pairs, dim, dtype=dtype, requires_grad=True) for _ in range(2)]
    loss = _loss(name)

    def call() -> torch.Tensor:
        for x in z:
            x.grad = None
        value = loss(z[0], z[1], TEMPERATURE)
        value.backward()
        return value

    return call


def _loss(name: str) -> Callable:
    if name == "eager":
        return ntxent_reference
    return torch.compile(ntxent_reference) if name == "compile" else sslfast.ntxent_loss


def check(case: Case, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Errors against float64 on the same inputs; a wrong result stops the benchmark."""
    z = [torch.randn(case.pairs, case.dim, dtype=dtype) for _ in range(2)]
    truth = _value_and_gradient(ntxent_reference, [x.double() for x in z])
    errors = {}
    for name in IMPLEMENTATIONS:
        value, gradient = _value_and_gradient(_loss(name), z)
        cosine = torch.nn.functional.cosine_similarity(gradient.double(), truth[1], dim=0).item()
        errors[name] = {"loss_error": abs(value - truth[0]), "gradient_angle_error": 1 - cosine}
        limit = 1e-6 if dtype == torch.float32 else 1e-3
        if name == "sslfast" and (errors[name]["loss_error"] > 10 * limit or 1 - cosine > limit):
            raise AssertionError(f"{name} is wrong at {case}: {errors[name]}")
    return errors


def _value_and_gradient(loss: Callable, z: list[torch.Tensor]) -> tuple[float, torch.Tensor]:
    z = [x.detach().requires_grad_() for x in z]
    value = loss(z[0], z[1], TEMPERATURE)
    gradients = torch.autograd.grad(value, z)
    return value.item(), torch.cat([g.flatten() for g in gradients])


def show(rows: list[dict], console: Console) -> None:
    table = Table(
        "N pairs", "dtype", "implementation", "median ms", "20-80 %", "sslfast is faster by",
        "share of floor", "loss error", "gradient 1 - cos",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            str(row["pairs"]), row["dtype"], row["name"], f"{row['ms']:.2f}",
            f"{row['ms_20']:.2f}-{row['ms_80']:.2f}",
            f"{row['speedup']:.2f}x", f"{row['share_of_floor']:.0%}", f"{row['loss_error']:.1e}",
            f"{row['gradient_angle_error']:.1e}",
        )  # fmt: skip
    console.print(table)


def measure_memory(name: str, pairs: int) -> dict:
    command = [sys.executable, __file__, "--memory-of", name, "--pairs", str(pairs)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_memory_here(name: str, pairs: int) -> dict:
    """Peak resident memory of one forward + backward beyond what was resident before it (Linux)."""
    warm = forward_backward(name, pairs if name == "compile" else 256, 128, torch.float32)
    warm()
    del warm
    call = forward_backward(name, pairs, 128, torch.float32)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    call()
    return {"name": name, "pairs": pairs, "peak_mib": (_status("VmHWM") - before) / 1024}


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    assert found, field
    return int(found.group(1))


def _median(call: Callable, rounds: int) -> float:
    samples = []
    for _ in range(rounds + 3):
        began = time.perf_counter()
        call()
        samples.append(time.perf_counter() - began)
    return sorted(samples[3:])[rounds // 2]


if __name__ == "__main__":
    tyro.cli(main)
