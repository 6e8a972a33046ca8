"""Times EMA updates of whole models beside what PyTorch offers, on the CPU or a GPU; --json-out keeps them.

Each implementation is checked before it is timed, and they alternate in one process. The floor is 12 bytes
per float32 parameter at the bandwidth of `t.add_(s)` on a large tensor in the same run: two reads, one write.

    python benchmarks/ema.py --json-out benchmarks/results
"""

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from device import cpu_name
from torch import Tensor, nn

import sslfast
from sslfast.ops import _backend

MOMENTUM = 0.996


def vit(dim: int, depth: int) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a vision transformer of 16-pixel patches at 224 pixels."""
    block = [(dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,), (dim,), (dim,)]
    block += [(4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)]
    return [(1, 1, dim), (1, 197, dim), (dim, 3, 16, 16), (dim,), *block * depth, (dim,), (dim,)]


CASES = {
    "ViT-B, 86 M parameters": vit(768, 12),
    "ViT-L, 303 M parameters": vit(1024, 24),
    "5,000 tensors of 64": [(64,)] * 5000,
}


class Model(nn.Module):
    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.parts = nn.ParameterList(tensors)


def implementations(
    targets: list[Tensor], sources: list[Tensor], device: str
) -> Iterator[tuple[str, Callable]]:
    """(name, update) of the same targets but for EMATeacher, which has its own."""

    def loop() -> None:
        for t, s in zip(targets, sources, strict=True):
            t.mul_(MOMENTUM).add_(s, alpha=1 - MOMENTUM)

    def mul_add() -> None:
        torch._foreach_mul_(targets, MOMENTUM)
        torch._foreach_add_(targets, sources, alpha=1 - MOMENTUM)

    def forced(backend: str) -> Callable:
        def update() -> None:
            with sslfast.use_backend(backend):
                sslfast.ema_update_(targets, sources, MOMENTUM)

        return update

    yield "loop of mul_, add_", loop
    yield "foreach mul_, add_", mul_add
    yield "foreach lerp_", lambda: torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)
    names = ("triton", "cuda") if device == "cuda" else ("cpu",)
    for name in names:
        if _backend.why_not("ema_update_", name, device, torch.float32) is None:
            yield f"sslfast.ema_update_ ({name})", forced(name)


def check(targets: list[Tensor], sources: list[Tensor], update: Callable) -> None:
    """Raises unless the update is right in some of the tensors."""
    some = range(0, len(targets), max(1, len(targets) // 20))
    before = [targets[i].double() for i in some]
    update()
    for i, old in zip(some, before, strict=True):
        expected = torch.lerp(old, sources[i].double(), 1 - MOMENTUM)
        torch.testing.assert_close(targets[i].double(), expected, rtol=1e-6, atol=1e-6)


def milliseconds(update: Callable, device: str, calls: int) -> float:
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            update()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / calls
    began = time.perf_counter()
    for _ in range(calls):
        update()
    return (time.perf_counter() - began) / calls * 1e3


def run_case(name: str, shapes: list[tuple[int, ...]], device: str, rounds: int) -> list[dict]:
    targets, sources = ([torch.randn(shape, device=device) for shape in shapes] for _ in range(2))
    count = sum(t.numel() for t in targets)
    big = (
        torch.randn(max(count, 50_000_000), device=device),
        torch.randn(max(count, 50_000_000), device=device),
    )
    updates = dict(implementations(targets, sources, device))
    for update in updates.values():
        check(targets, sources, update)
    student = Model(sources)
    teacher = sslfast.EMATeacher(Model(targets), MOMENTUM)
    updates["sslfast.EMATeacher"] = lambda: teacher.update(student)
    check(list(teacher.parameters()), sources, updates["sslfast.EMATeacher"])
    updates["t.add_(s)"] = lambda: big[0].add_(big[1])
    calls = 1 if device == "cpu" and count > 10**6 else 5
    samples: dict[str, list[float]] = {key: [] for key in updates}
    for update in updates.values():
        milliseconds(update, device, 3)
    for _ in range(rounds):
        for key, update in updates.items():
            samples[key].append(milliseconds(update, device, calls))
    add = statistics.median(samples.pop("t.add_(s)"))
    bandwidth = 12 * len(big[0]) / add / 1e6
    lerp = statistics.median(samples["foreach lerp_"])
    rows = []
    for key, values in samples.items():
        ms = statistics.median(values)
        rows.append({
            "case": name, "tensors": len(targets), "parameters": count, "name": key, "ms": ms,
            "samples": values, "speedup_over_foreach_lerp": lerp / ms, "add_gbps": bandwidth,
            "share_of_floor": 12 * count / bandwidth / 1e6 / ms,
        })  # fmt: skip
        print(
            f"{name:24} {key:28} {ms:8.3f} ms  {lerp / ms:5.2f} x as fast as foreach lerp_  "
            f"{rows[-1]['share_of_floor']:4.0%} of {bandwidth:.0f} GB/s",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json-out", type=Path, help="a file, or a folder that gets <device>/ema.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = options.device
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    results = []
    for case, shapes in CASES.items():
        if device == "cuda" or not case.startswith("ViT-L"):
            results += run_case(case, shapes, device, options.rounds)
    if options.json_out:
        path = options.json_out
        if path.suffix != ".json":
            path = path / re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") / "ema.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {
            "device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "sslfast": sslfast.__version__, "python": platform.python_version(), "ema": results,
        }  # fmt: skip
        path.write_text(json.dumps(whole, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
