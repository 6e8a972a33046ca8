"""Time, memory and errors of the implementations of a case, and what the machine can do."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

import sslfast
from sslfast.bench.case import Case, Work, copied, forward, gradients, mapped, upstream_of
from sslfast.bench.peers import installed

PASSES = ("forward", "forward + backward")
SAMPLES, FEWEST = (5, 50), 3
"""Fewest and most of each implementation, and of one that takes most of the time alone."""
SHORTEST = 2e-3
"""Seconds of a sample: faster calls are timed several at a time."""
PATIENCE = 120.0
"""Seconds of one call, above which an implementation is only told to take as long."""
SCALE = 4096.0
"""Of the gradient of float16 losses, as gradient scalers have one: others vanish."""
SETS = 2
"""Of inputs, used in turn: not all of them are in a cache."""
# Norm of an error over the norm of the truth: of ours and float32 or wider, and of others that round 16-bit
# logits.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
LENIENT = 5.0


# What the machine can do.


def ceilings(device: torch.device, dtypes: Sequence[torch.dtype]) -> dict[str, Any]:
    """Rates of large matrix products of each dtype (GFLOP/s; of float32 on a GPU also a third of tf32's, of
    which three make one), and of `t.add_(s)` on tensors that no cache holds (GB/s)."""
    products = {}
    for dtype in dtypes:
        n = 4096 if device.type == "cuda" else 1024 if dtype.itemsize == 2 else 2048
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rate = 2 * n**3 / _fastest(lambda a=a, b=b: a @ b, device) / 1e9
        if device.type == "cuda" and dtype == torch.float32:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high")
            rate = max(rate, 2 * n**3 / _fastest(lambda a=a, b=b: a @ b, device) / 3e9)
            torch.set_float32_matmul_precision(before)
        products[str(dtype).removeprefix("torch.")] = rate
    count = 1 << (28 if device.type == "cuda" else 26)
    t, s = (torch.zeros(count, device=device) for _ in range(2))
    return {"gflops": products, "gbps": 12 * count / _fastest(lambda: t.add_(s), device) / 1e9}


def _fastest(call: Callable, device: torch.device) -> float:
    """Seconds of the fastest of 15 calls, or of as many as a second has."""
    end = time.monotonic() + 1
    found: list[float] = []
    while not found or (len(found) < 15 and time.monotonic() < end):
        found.append(seconds(call, device))
    return min(found)


def floor(work: Work, rates: dict[str, Any], dtype: torch.dtype) -> float:
    """Seconds that no implementation can save that stores no matrix."""
    per_second = rates["gflops"][str(dtype).removeprefix("torch.")] * 1e9
    return max(work.flops / per_second, work.bytes / (rates["gbps"] * 1e9))


def seconds(call: Callable, device: torch.device, calls: int = 1) -> float:
    """Of one call, by the device's own clock."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


# Implementations.


def implementations(
    case: Case, backends: Sequence[str], peers: Sequence[str], compiled: bool = True
) -> dict[str, Callable[..., Any]]:
    """Ours, once for each of `backends` if there are any; plain PyTorch, also compiled; installed peers."""

    def forced(backend: str) -> Callable[..., Any]:
        def call(**inputs: Any) -> Any:
            with sslfast.use_backend(backend):
                return case.ours(**inputs)

        return call

    found: dict[str, Callable[..., Any]] = {f"sslfast, {name}": forced(name) for name in backends}
    found = found or {"sslfast": case.ours}
    found["eager" if case.plain else "reference"] = case.eager
    if compiled and case.compiles and case.plain:
        found["compile"] = torch.compile(case.plain, dynamic=False)
    found.update(installed(case.name, tuple(peers)))
    return found


# Right results.


def results(
    case: Case, call: Callable, inputs: dict, upstream: list[Tensor] | None = None, scale: float = 1.0
) -> tuple[list, list]:
    """(outputs, gradients)"""
    if not case.trained:
        with torch.no_grad():
            return forward(case, call, inputs), []
    out = forward(case, call, inputs)
    return out, gradients(case, out, inputs, upstream_of(out, scale) if upstream is None else upstream)


def truth(case: Case, inputs: dict, fits: bool = True, scale: float = 1.0) -> tuple[list, list]:
    """In float64, from plain PyTorch; where its matrix does not fit from the C++ kernels, on the CPU, that
    tests hold against it."""
    if fits:
        return results(case, case.eager, copied(case, inputs, torch.float64), scale=scale)
    host = {name: mapped(Tensor.cpu, value) for name, value in inputs.items()}
    return results(case, case.ours, copied(case, host, torch.float64), scale=scale)


def error(found: list, true: list) -> float:
    """The largest norm of a difference over the norm of the truth; infinite where integers differ."""
    worst = 0.0
    flat: list[Tensor] = []
    others: list[Tensor] = []
    mapped(flat.append, found)
    mapped(others.append, true)
    if len(flat) != len(others):
        return math.inf
    for x, t in zip(flat, others, strict=True):
        if x.shape != t.shape:
            return math.inf
        if not t.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(x.to(t), t) else math.inf)
            continue
        size = float(torch.linalg.vector_norm(t.detach()))
        difference = float(torch.linalg.vector_norm(x.detach().to(t.device).double() - t.detach().double()))
        worst = max(worst, difference / (size or 1.0)) if math.isfinite(difference) else math.inf
    return worst


def limit(case: Case, name: str, dtype: torch.dtype) -> float:
    return LIMITS[dtype] * case.tolerance * (1.0 if name.startswith("sslfast") else LENIENT)


# Time.


def rows(
    case: Case,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    calls: dict[str, Callable[..., Any]],
    rates: dict[str, Any],
    budget: float,
    fits: bool = True,
) -> Iterator[dict[str, Any]]:
    """One of each implementation and pass: those that are wrong are told, and not timed.

    budget: seconds for each pass. fits: whether plain PyTorch in float64 does.
    """
    torch._dynamo.reset()
    sets = [copied(case, case.inputs(size, dtype, device)) for _ in range(SETS)]
    scale = SCALE if dtype == torch.float16 else 1.0
    try:
        true = truth(case, sets[0], fits, scale)
    except Exception as problem:
        if not fits or why_not(problem) != "out of memory":
            raise
        fits, true = False, truth(case, sets[0], False, scale)
    upstream = [x.to(device) for x in upstream_of(true[0], scale)]
    start = {**about(case, size, dtype), "truth": "plain PyTorch" if fits else "sslfast in float64"}
    right: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        row = {**start, "name": name}
        try:
            out, pulled = results(case, call, copied(case, sets[0]), upstream)
        except Exception as problem:  # peers raise all kinds of errors
            yield {**row, "why_not": why_not(problem)}
            continue
        errors = error(out, true[0]), error(pulled, true[1])
        row |= {"error": errors[0], "gradient_error": errors[1]}
        if max(errors) <= limit(case, name, dtype):
            right[name] = row
        else:
            yield {**row, "why_not": "wrong"}
    del true
    for which in PASSES[: 1 + bool(case.trained)]:
        backward = which == PASSES[1]
        work = case.work(size, dtype.itemsize, backward)
        least = floor(work, rates, dtype)
        runs = {name: _runner(case, calls[name], sets, upstream if backward else None) for name in right}
        for name, samples in _alternated(runs, device, budget).items():
            low, middle, high = torch.tensor(samples).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
            yield {
                **right[name],
                "pass": which,
                "ms_20": 1e3 * low,
                "ms": 1e3 * middle,
                "ms_80": 1e3 * high,
                "samples": len(samples),
                "gflops": work.flops / middle / 1e9,
                "gbps": work.bytes / middle / 1e9,
                "floor_ms": 1e3 * least,
                "share": least / middle,
            }


def about(case: Case, size: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "op": case.op,
        "variant": case.variant,
        "shape": case.shape.format(f"{size:,}"),
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
    }


def why_not(problem: Exception) -> str:
    text = f"{type(problem).__name__}: {problem}"
    lacks = ("out of memory", "not enough memory", "allocate memory", "bad_alloc", "MemoryError")
    if any(word in text for word in lacks):
        return "out of memory"
    return str(problem) if isinstance(problem, TimeoutError) else text.splitlines()[0][:200]


def _runner(case: Case, call: Callable, sets: list[dict], upstream: list[Tensor] | None) -> Callable[[], Any]:
    turn = cycle(sets)

    def both() -> None:
        results(case, call, next(turn), upstream)

    @torch.no_grad()
    def one() -> None:
        call(**next(turn))

    return one if upstream is None else both


def _alternated(runs: dict[str, Callable], device: torch.device, budget: float) -> dict[str, list[float]]:
    """Seconds of calls of each in turn, for about `budget` seconds in all. One that takes most of that alone
    is called less often than the others."""
    if not runs:
        return {}
    for run in runs.values():
        run()  # what is compiled for a pass is not counted
    first = {name: seconds(run, device) for name, run in runs.items()}
    calls = {name: max(1, math.ceil(SHORTEST / t)) for name, t in first.items()}
    spent = {name: calls[name] * t for name, t in first.items()}
    fast = [t for t in spent.values() if t < budget / SAMPLES[0]] or [min(spent.values())]
    rounds = min(SAMPLES[1], max(SAMPLES[0], int(budget / sum(fast))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            if i < max(FEWEST, budget / spent[name]):
                samples[name].append(seconds(run, device, calls[name]))
    return samples


# Memory.


def memory(
    case: Case, size: int, dtype: torch.dtype, names: Sequence[str], backends: Sequence[str], gib: float
) -> dict[str, dict[str, Any]]:
    """{name: {"peak_mib"} or {"why_not"}} on the CPU, in processes of their own that may have `gib` GiB."""
    found: dict[str, dict[str, Any]] = {}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back at once
    while left := [name for name in names if name not in found]:
        asked = {
            "case": case.name,
            "size": size,
            "dtype": str(dtype),
            "names": left,
            "backends": list(backends),
            "gib": gib,
        }
        command = [sys.executable, "-m", "sslfast.bench.memory", json.dumps(asked)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        found.update({line.pop("name"): line for line in lines})
        if missing := [name for name in left if name not in found]:
            ended = (done.stderr.strip().splitlines() or ["no message"])[-1]
            killed = done.returncode in (-9, 137)  # the kernel takes who asks for too much
            found[missing[0]] = {
                "why_not": "out of memory" if killed else f"exit {done.returncode}: {ended[:200]}"
            }
    return found


def peak_on_gpu(case: Case, call: Callable, inputs: dict) -> float:
    """MiB beyond what was held before, and beyond results and gradients."""
    upstream = upstream_of(results(case, call, inputs)[0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = results(case, call, inputs, upstream)
    torch.cuda.synchronize()
    return max(0.0, (torch.cuda.max_memory_allocated() - before - size_of(kept, inputs)) / 2**20)


def size_of(kept: tuple[list, list], inputs: dict) -> int:
    """Bytes of results that are not inputs."""
    found: list[int] = []
    known: set[int] = set()
    mapped(lambda x: known.add(x.data_ptr()), list(inputs.values()))
    mapped(lambda x: found.append(0 if x.data_ptr() in known else x.nbytes), [*kept[0], *kept[1]])
    return sum(found)
