"""Peak memory of implementations on the CPU, in a process of its own: python -m sslfast.bench.memory."""

import ctypes
import json
import re
import resource
import sys
import time
from pathlib import Path

import torch

from sslfast.bench import measure
from sslfast.bench.case import Inputs, copied, upstream_of
from sslfast.bench.cases import BY_NAME


def main() -> None:
    """Prints a line of JSON for each: {"name", "peak_mib"}, beyond inputs and gradients, or {"name",
    "why_not"}."""
    asked = json.loads(sys.argv[1])
    case, dtype = BY_NAME[asked["case"]], getattr(torch, asked["dtype"].removeprefix("torch."))
    torch.manual_seed(0)
    calls = measure.implementations(case, asked["backends"], ("all",))
    most = int(asked["gib"] * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    inputs: Inputs = {}
    for name in asked["names"]:
        try:
            inputs = inputs or case.inputs(asked["size"], dtype, torch.device("cpu"))
            own, began = copied(case, inputs), time.perf_counter()
            upstream = upstream_of(measure.results(case, calls[name], own)[0])  # and what is made once
            if (took := time.perf_counter() - began) > measure.PATIENCE and name != "compile":
                raise TimeoutError(f"one call takes {took:.0f} s")
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = status("VmRSS")
            kept = measure.results(case, calls[name], own, upstream)
            peak = status("VmHWM") - before - measure.size_of(kept, own)
            print(json.dumps({"name": name, "peak_mib": max(0.0, peak / 2**20)}), flush=True)
            del kept, own, upstream
        except Exception as problem:
            print(json.dumps({"name": name, "why_not": measure.why_not(problem)}), flush=True)


def status(field: str) -> int:
    """Bytes (Linux)."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match, field
    return 1024 * int(match.group(1))


if __name__ == "__main__":
    main()
