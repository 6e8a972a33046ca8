"""Times the ops of masked image modelling beside plain PyTorch and, on a GPU, torch.compile of it; --json-out
keeps them.

Every implementation is checked before it is timed, gradients too, and they alternate in one process. The
floor is what an op must read and write once (`traffic`) at the bandwidth of a large copy in the same run, on
a CPU that of `t.add_(s)`; where it multiplies matrices, that at the rate of a large product if it takes
longer.

    python benchmarks/masking.py --json-out benchmarks/results
"""

import argparse
import ctypes
import functools
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import masking_plain as plain
import torch
from device import cpu_name
from masking_cases import CASES, WIDE, Case, Size, inputs_of, ours, traffic
from torch import Tensor

import sslfast
from sslfast.ops import _backend

BEIT = {"count": 75, "least": 16, "aspect": (0.3, 1 / 0.3)}  # of 14 x 14 patches
# Times as fast as plain, and as torch.compile, that an op is to be.
TARGETS = {
    ("cpu", "mask + gather"): (3, None),
    ("cpu", "loss, norm_pix"): (4, None),
    ("cpu", "loss"): (4, None),
    ("cuda", "all together"): (3, 2),
}
SETS = {"cpu": 2, "cuda": 3}  # of inputs, used in turn


def implementations(case: Case, device: str) -> dict[str, Callable[[dict], tuple[Tensor, ...]]]:
    function = case.run
    found: dict[str, Callable] = {"plain": lambda x: function(plain, x)}
    if device == "cuda":
        found["torch.compile"] = torch.compile(lambda x: function(plain, x), dynamic=False)

    def forced(backend: str, x: dict) -> tuple[Tensor, ...]:
        with sslfast.use_backend(backend):
            return function(ours, x)

    for name in backends("random_patch_mask" if case.name == "mask" else "gather_patches", device):
        found[f"sslfast ({name})"] = functools.partial(forced, name)
    return found


def backends(op: str, device: str) -> list[str]:
    names = ("cpu",) if device == "cpu" else ("triton", "cuda")
    return [name for name in names if _backend.why_not(op, name, device, torch.float32) is None]


# Right results.


def results(call: Callable, case: Case, x: dict) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs, and gradients of what is trained."""
    outputs = call(x)
    if not case.trained:
        return outputs, ()
    outs = [out for out in outputs if out.requires_grad]
    return outputs, torch.autograd.grad(outs, [x[name] for name in case.trained], x["upstream"])


def truth(case: Case, x: dict, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The plain results of inputs in a wider dtype."""

    def widen(value):
        if isinstance(value, list):
            return [widen(v) for v in value]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype).requires_grad_(value.requires_grad)

    return results(lambda x: case.run(plain, x), case, {name: widen(value) for name, value in x.items()})


def check(name: str, found: tuple, true: tuple, tolerance: float) -> None:
    """Raises unless ids and masks are equal, and the norm of every other difference is small."""
    for kind, got, expected in zip(("output", "gradient"), found, true, strict=True):
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            if kind == "output" and not b.requires_grad:
                error = 0.0 if torch.equal(a.to(b.dtype), b) else torch.inf
            else:
                difference = torch.linalg.vector_norm(a.detach().double() - b.detach().double())
                error = float(difference / torch.linalg.vector_norm(b.detach().double()))
            if not error <= tolerance:
                raise AssertionError(f"{name}: {kind} {i} is wrong, relative error {error:.1e}")


def checked(case: Case, size: Size, device: str) -> tuple[dict[str, Callable], dict[str, str], float]:
    """What to time of each implementation that gives right results, why not the others, MiB of gradients."""
    sets = [inputs_of(case, size, device) for _ in range(SETS[device])]
    single = size.dtype == torch.float32
    true = truth(case, sets[0], torch.float64 if single else torch.float32)
    tolerance, runs, failed = 1e-5 if single else 1e-2, {}, {}
    for name, call in implementations(case, device).items():
        try:
            check(f"{case.name}, {name}", results(call, case, sets[0]), true, tolerance)
        except Exception as error:
            if name != "torch.compile":
                raise
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            runs[name] = functools.partial(once, call, case, itertools.cycle(sets))
    return runs, failed, sum(sets[0][name].nbytes for name in case.trained) / 2**20


def once(call: Callable, case: Case, sets: Iterator[dict]) -> None:
    """Forward and backward on the next inputs, with noise drawn as `random_patch_mask` does."""
    x = next(sets)
    if "noise" in x:
        x = {**x, "noise": torch.rand_like(x["noise"])}
    results(call, case, x)


def checked_blocks(size: Size, device: str) -> dict[str, Callable]:
    """The same of block masks: a generator in the same state makes the same masks on every backend."""
    grid, length = (size.image // size.patch,) * 2, size.length
    share = (BEIT["least"] / length, BEIT["count"] / length)

    def ours(backend: str, seed: int | None = None) -> Tensor:
        with sslfast.use_backend(backend):
            return sslfast.block_patch_mask(
                size.batch, grid, ratio_range=share, aspect_range=BEIT["aspect"], num_masked=BEIT["count"],
                generator=None if seed is None else torch.Generator(device).manual_seed(seed), device=device,
            )  # fmt: skip

    runs = {"plain": lambda: plain.block_masks(size.batch, grid, **BEIT, device=device)}
    most = runs["plain"]().sum((1, 2)).max()
    true = ours("reference", 1)
    if most > BEIT["count"] or not bool((true.sum(1) == BEIT["count"]).all()):
        raise AssertionError("block masks: a mask of the wrong size")
    for backend in backends("block_patch_mask", device):
        name = f"sslfast ({backend})"
        check(f"block masks, {name}", ((ours(backend, 1),), ()), ((true,), ()), 0.0)
        runs[name] = functools.partial(ours, backend)
    return runs


# Time and memory.


def milliseconds(run: Callable, device: str, host: bool) -> float:
    """host: what waits for the device itself, and is too slow for many calls."""
    if device == "cuda" and not host:
        import triton

        return triton.testing.do_bench(run, warmup=20, rep=60, return_mode="median")
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3


def peak_memory_here(name: str, size: Size) -> dict:
    """Peak resident memory of the loss with norm_pix beyond its inputs and the gradient of pred (Linux), in a
    process of its own."""
    case = CASES["loss, norm_pix"]
    call = implementations(case, "cpu")[name]
    results(call, case, inputs_of(case, replace(size, batch=8), "cpu"))
    x = inputs_of(case, size, "cpu")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    results(call, case, x)
    gradient = x["pred"].nbytes / 2**20
    return {"name": name, "mib": (_status("VmHWM") - before) / 1024 - gradient}


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, field
    return int(found.group(1))


def matmul_tflops() -> float:
    a, b, c = (torch.randn(2048, 2048) for _ in range(3))
    times = [milliseconds(lambda: torch.mm(a, b, out=c), "cpu", True) for _ in range(12)]
    return 2 * 2048**3 / statistics.median(times[3:]) / 1e9


def run_case(case: Case, size: Size, device: str, rounds: int, ceilings: dict[str, float]) -> list[dict]:
    torch._dynamo.reset()
    blocks = case.ops == ("blocks",)
    runs, failed, gradients = (checked_blocks(size, device), {}, 0) if blocks else checked(case, size, device)
    calls = dict(runs)
    if device == "cpu":
        big = [torch.randn(50_000_000) for _ in range(2)]
        calls["t.add_(s)"] = lambda: big[0].add_(big[1])
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(milliseconds(call, device, blocks and name == "plain"))
    ms = {name: statistics.median(values) for name, values in samples.items()}
    gbps = 12 * 50_000_000 / ms["t.add_(s)"] / 1e6 if device == "cpu" else ceilings["copy_gbps"]
    moved, flops = traffic(case, size)
    floor = max(moved / gbps / 1e6, flops / ceilings["matmul_tflops"] / 1e9)
    about = {"case": case.name, **asdict(size), "dtype": str(size.dtype).removeprefix("torch.")}
    rows = [{**about, "name": name, "why_not_timed": reason} for name, reason in failed.items()]
    for name, run in runs.items():
        row = {
            **about, "name": name, "ms": ms[name], "samples": samples[name],
            "speedup_over_plain": ms["plain"] / ms[name], "bytes": moved, "flops": flops, "gbps": gbps,
            "floor_ms": floor, "share_of_floor": floor / ms[name],
        }  # fmt: skip
        if "torch.compile" in ms:
            row["speedup_over_compile"] = ms["torch.compile"] / ms[name]
        if device == "cuda" and not blocks:
            from gpu import peak_memory

            row["peak_mib"] = peak_memory(run) / 2**20
            row["beyond_gradients_mib"] = row["peak_mib"] - gradients
        rows.append(row)
    return rows


# What is printed.


def show(rows: list[dict]) -> None:
    for r in rows:
        start = f"{r['case']:24}{r['batch']:>5}{r['dim']:>6}  {r['name']:17}"
        if "ms" not in r:
            print(start, r["why_not_timed"])
            continue
        peak = f", peak {r['peak_mib']:.0f} MiB" if "peak_mib" in r else ""
        print(
            f"{start}{r['ms']:>10.3f} ms{r['speedup_over_plain']:>7.2f} x as fast as plain, "
            f"{r['share_of_floor']:>4.0%} of {r['gbps']:.0f} GB/s for {r['bytes'] / 1e6:.0f} MB{peak}",
            flush=True,
        )


def summary(rows: list[dict], memory: list[dict], device: str) -> None:
    """One line per implementation of ours, with what it is to reach."""
    print(f"\n{'':51}{'ms':>10}{'x plain':>24}{'x compile':>24}{'share of floor':>24}")
    for r in rows:
        if not r["name"].startswith("sslfast"):
            continue
        plain, compiled = TARGETS.get((device, r["case"]), (None, None))
        share = 0.7 if device == "cuda" and r["bytes"] > 2**26 else None  # less is as fast as its launches
        print(
            f"{r['case']:24}{r['dim']:>6}  {r['name']:19}{r['ms']:>10.3f}"
            + held(r["speedup_over_plain"], plain, "{:.2f}")
            + held(r.get("speedup_over_compile"), compiled, "{:.2f}")
            + held(r["share_of_floor"], share, "{:.0%}")
        )
    for m in memory:
        print(f"loss, norm_pix, {m['name']}: peak memory beyond inputs and gradient {m['mib']:.1f} MiB")
    if memory:
        print("of plain's:", held(memory[1]["mib"] / memory[0]["mib"], -0.1, "{:.1%}").strip())


def held(value: float | None, target: float | None, form: str) -> str:
    """A figure beside its target, at most that if negative."""
    if value is None:
        return f"{'-':>24}"
    if target is None:
        return f"{form.format(value):>24}"
    good = value >= target if target > 0 else value <= -target
    text = f"{form.format(value)} ({'>=' if target > 0 else '<='} {form.format(abs(target))})"
    return f"{text if good else text[:-1] + ', MISSED)':>24}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json-out", type=Path, help="a file, or a folder that gets <device>/masking.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, help="alternations; 21, or on a GPU 3 of many calls each")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after so many")
    parser.add_argument("--memory-of", help="(internal) one implementation's peak memory in this process")
    options = parser.parse_args()
    device, began = options.device, time.monotonic()
    sizes = [Size(256, 768, torch.float32)]
    if options.memory_of:
        print(json.dumps(peak_memory_here(options.memory_of, sizes[0])))
        return
    torch.manual_seed(0)
    if device == "cuda":
        from gpu import rates

        sizes = [Size(1024, dim, torch.bfloat16) for dim in (768, 1024)]
        name, ceilings = torch.cuda.get_device_name(), rates()
        ceilings["matmul_tflops"] = ceilings["bfloat16_tflops"]
    else:
        name, ceilings = cpu_name(), {"matmul_tflops": matmul_tflops()}
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads: {ceilings}")
    whole = {
        "device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "sslfast": sslfast.__version__, "python": platform.python_version(), "ceilings": ceilings,
        "masking": [], "memory": [],
    }  # fmt: skip
    path = options.json_out
    if path and path.suffix != ".json":
        path = path / re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") / "masking.json"

    def keep() -> None:  # at once: a run that is cut off loses nothing
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(whole, indent=1) + "\n")
            part.replace(path)

    for case in CASES.values():  # those with a target first
        for size in sizes:
            if size != sizes[0] and case.name not in WIDE:
                continue
            if time.monotonic() - began > options.seconds:
                print(f"{case.name}, D={size.dim}: left out for lack of time")
                continue
            rows = run_case(case, size, device, options.rounds or (3 if device == "cuda" else 21), ceilings)
            show(rows)
            whole["masking"] += rows
            keep()
    if device == "cpu":
        for implementation in ("plain", "sslfast (cpu)"):
            command = [sys.executable, __file__, "--memory-of", implementation]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            whole["memory"].append(json.loads(done.stdout))
        keep()
    summary(whole["masking"], whole["memory"], device)


if __name__ == "__main__":
    main()
