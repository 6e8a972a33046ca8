"""What several of these scripts need."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sslfast.bench import memory


def json_path(given: Path | None, device: str, name: str) -> Path | None:
    """A file, or in a folder <device>/<name>; device: as `about` has it."""
    return given / device / name if given and given.suffix != ".json" else given


def keep(path: Path | None, whole: dict) -> None:
    """At once, so that a run that is cut off loses nothing."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(whole, indent=1) + "\n")
        part.replace(path)


def milliseconds(run: Callable, device: str, host: bool) -> float:
    """host: what waits for the device itself, and is too slow for many calls."""
    if device == "cuda" and not host:
        import triton

        return triton.testing.do_bench(run, warmup=20, rep=60, return_mode="median")
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3


def status(field: str) -> int:
    """KiB (Linux)."""
    return memory.status(field) // 1024


def peak_memory(run: Callable) -> int:
    """Bytes that torch allocates on the GPU beyond what is held before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def held(value: float | None, target: float | None, form: str) -> str:
    """A figure beside its target, at most that if negative."""
    if value is None:
        return f"{'-':>24}"
    if target is None:
        return f"{form.format(value):>24}"
    good = value >= target if target > 0 else value <= -target
    text = f"{form.format(value)} ({'>=' if target > 0 else '<='} {form.format(abs(target))})"
    return f"{text if good else text[:-1] + ', MISSED)':>24}"
