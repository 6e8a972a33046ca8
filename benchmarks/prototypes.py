"""Times DINO's losses and Sinkhorn-Knopp beside their official code and, on a GPU, torch.compile of it;
--json-out keeps them.

Every implementation is checked against float64 before it is timed, gradients too, and they alternate in one
process. The floor is what an op must read and write (`traffic`) at the bandwidth of a large copy in the same
run, on a CPU that of `t.add_(s)`; where it multiplies matrices, that at the rate of a large product if it
takes longer.

    python benchmarks/prototypes.py --json-out benchmarks/results
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from device import cpu_name
from masking import _status, held, matmul_tflops, milliseconds
from torch import Tensor
from torch.nn import functional as F

import sslfast

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
SINKHORN_TEMP, ITERATIONS = 0.07, 3
SETS = {"cpu": 2, "cuda": 3}  # of inputs, used in turn


@dataclass(frozen=True)
class Case:
    """An op on `batch` images of `views` crops, of which the teacher has the first `teachers`; of
    sinkhorn_knopp on `batch` rows. Prototypes are float32 whatever the dtype, as under autocast."""

    case: str
    batch: int
    classes: int
    dtype: torch.dtype = torch.float32
    views: int = 0
    teachers: int = 0
    dim: int = 0

    @property
    def trained(self) -> tuple[str, ...]:
        return {"dino_loss": ("student",), "dino_head_loss": ("student", "prototypes")}.get(self.case, ())


DINO = {"views": 10, "teachers": 2, "dim": 256}
CASES = {  # on a GPU the one that torch.compile takes long for is last
    "cpu": [
        Case("dino_loss", 8, 65_536, **DINO),
        Case("dino_head_loss", 8, 65_536, **DINO),
        Case("sinkhorn_knopp", 16, 65_536),
        Case("sinkhorn_knopp", 3840, 8192),
    ],
    "cuda": [
        Case("dino_head_loss", 64, 65_536, torch.bfloat16, **DINO),
        Case("sinkhorn_knopp", 3840, 65_536, torch.bfloat16),
        Case("dino_loss", 64, 65_536, torch.bfloat16, **DINO),
    ],
}
# Times as fast as plain, and as torch.compile, and share of the floor that an op is to reach.
TARGETS = {
    ("cpu", "dino_loss"): (4, None, None),
    ("cuda", "dino_loss"): (4, 2, 0.7),
    ("cuda", "dino_head_loss"): (1, None, None),
    ("cuda", "sinkhorn_knopp"): (4, None, None),
}
MEMORY = {"cpu": -0.1, "cuda": -0.2}  # of plain's, that dino_head_loss is to take at most


# The official code, written from its definition.


def official_loss(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    """DINO's (main_dino.py) of logits [S, B, K], [T, B, K] and center [1, K], in training's precision."""
    views, teachers = len(student), len(teacher)
    with torch.autocast(student.device.type, torch.bfloat16, enabled=student.dtype == torch.bfloat16):
        student_out = (student.flatten(0, 1) / STUDENT_TEMP).chunk(views)
        teacher_out = F.softmax((teacher.flatten(0, 1) - center) / TEACHER_TEMP, dim=-1).detach()
        total, terms = 0, 0
        for t, q in enumerate(teacher_out.chunk(teachers)):
            for v in range(views):
                if v == t:
                    continue
                total += torch.sum(-q * F.log_softmax(student_out[v], dim=-1), dim=-1).mean()
                terms += 1
        return total / terms


def official_head(
    student: Tensor, prototypes: Tensor, teacher: Tensor, teacher_prototypes: Tensor, center: Tensor
) -> Tensor:
    """The last layer of both heads, then the loss: features [S, B, D], [T, B, D], prototypes [K, D]."""
    logits = student @ prototypes.to(student.dtype).T
    with torch.no_grad():
        targets = teacher @ teacher_prototypes.to(teacher.dtype).T
    return official_loss(logits, targets, center)


@torch.no_grad()
def official_sinkhorn(logits: Tensor) -> Tensor:
    """DINOv2's (dino_clstoken_loss.py) on one process: [R, K] -> [R, K]."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    q = torch.exp(logits / SINKHORN_TEMP).t()
    classes, rows = q.shape
    q /= torch.sum(q)
    for _ in range(ITERATIONS):
        q /= torch.sum(q, dim=1, keepdim=True)
        q /= classes
        q /= torch.sum(q, dim=0, keepdim=True)
        q /= rows
    q *= rows
    return q.t()


OFFICIAL: dict[str, Callable[..., Tensor]] = {
    "dino_loss": official_loss, "dino_head_loss": official_head, "sinkhorn_knopp": official_sinkhorn
}  # fmt: skip


def in_place(student: Tensor, *others) -> Tensor:
    """Of a view, since a leaf's numbers may not be lost. They are, and the next call takes the gradient."""
    logits = student.view_as(student)
    return sslfast.dino_loss(logits, *others, STUDENT_TEMP, TEACHER_TEMP, inplace_backward=True)


def ours(case: Case) -> dict[str, Callable[..., Tensor]]:
    """What follows the backend's name -> function."""
    if case.case == "sinkhorn_knopp":
        return {"": lambda logits: sslfast.sinkhorn_knopp(logits, SINKHORN_TEMP, ITERATIONS)}
    function = getattr(sslfast, case.case)
    found = {"": lambda *x: function(*x, STUDENT_TEMP, TEACHER_TEMP)}
    return found | ({", in place": in_place} if case.case == "dino_loss" else {})


def implementations(case: Case, device: str) -> dict[str, Callable[..., Tensor]]:
    found = {"plain": OFFICIAL[case.case]}
    if device == "cuda" and case.case == "dino_loss":
        found["torch.compile"] = torch.compile(found["plain"], dynamic=False)
    backend = "cpu" if device == "cpu" else "triton"

    def forced(function: Callable, *x: Tensor) -> Tensor:
        with sslfast.use_backend(backend):
            return function(*x)

    for variant, function in ours(case).items():
        found[f"sslfast ({backend}){variant}"] = functools.partial(forced, function)
    return found


def inputs_of(case: Case, device: str) -> dict[str, Tensor]:
    """Of the case's op, in its order; logits are spread as the cosines of a trained head are."""

    def logits(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) / 4).to(case.dtype)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(shape, device=device), dim=-1).to(case.dtype)

    s, t, b, k, d = case.views, case.teachers, case.batch, case.classes, case.dim
    center = torch.randn(1, k, device=device) / 16
    if case.case == "dino_loss":
        x = {"student": logits(s, b, k), "teacher": logits(t, b, k), "center": center}
    elif case.case == "dino_head_loss":  # prototypes that the features' dtype holds exactly
        x = {"student": unit(s, b, d), "prototypes": unit(k, d).float(), "teacher": unit(t, b, d)}
        x |= {"teacher_prototypes": unit(k, d).float(), "center": center}
    else:
        x = {"logits": logits(b, k)}
    for name in case.trained:
        x[name].requires_grad_()
    return x


def traffic(case: Case) -> tuple[int, int]:
    """Bytes that an op must read and write, forward and backward, and FLOPs of its matrix products.

    Forward reads all logits; backward reads them again, or what they are products of, and writes gradients.
    A row of Sinkhorn-Knopp's that has been normalised can join the prototypes' next sums while it is there,
    which makes one read per iteration and one before them.
    """
    e, d, k, b = case.dtype.itemsize, case.dim, case.classes, case.batch
    if case.case == "sinkhorn_knopp":
        return b * k * ((1 + ITERATIONS) * e + 4), 0
    rows, trained = (case.views + case.teachers) * b, case.views * b
    if case.case == "dino_loss":
        return e * k * (2 * rows + trained) + 2 * 4 * k, 0
    return e * d * (2 * rows + trained) + 4 * k * (5 * d + 2), 2 * k * d * (rows + 2 * trained)


# Right results.


def results(call: Callable, case: Case, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Output, and gradients of what is trained."""
    out = call(*x.values())
    trained = [x[name] for name in case.trained]
    return (out, *torch.autograd.grad(out, trained)) if trained else (out,)


def copied(x: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    new = {name: t.detach().to(dtype or t.dtype, copy=True) for name, t in x.items()}
    return {name: t.requires_grad_(x[name].requires_grad) for name, t in new.items()}


def check(name: str, found: tuple[Tensor, ...], true: tuple[Tensor, ...], tolerance: float) -> None:
    """Raises unless the norm of every difference is small."""
    for i, (a, b) in enumerate(zip(found, true, strict=True)):
        error = float(torch.linalg.vector_norm(a.detach().double() - b) / torch.linalg.vector_norm(b))
        if a.shape != b.shape or not error <= tolerance:
            what = f"gradient {i}" if i else "output"
            raise AssertionError(f"{name}: {what} is wrong, relative error {error:.1e}")


def checked(case: Case, device: str) -> tuple[dict[str, Callable], dict[str, str], float]:
    """What to time of each implementation that gives right results, why not the others, MiB of gradients."""
    sets = [inputs_of(case, device) for _ in range(SETS[device])]
    true = tuple(x.detach() for x in results(OFFICIAL[case.case], case, copied(sets[0], torch.float64)))
    runs, failed = {}, {}
    for name, call in implementations(case, device).items():
        # Official code rounds the logits of 16-bit training several times.
        tolerance = 1e-5 if case.dtype == torch.float32 else 1e-2 if name.startswith("sslfast") else 3e-2
        try:
            check(f"{case.case}, {name}", results(call, case, copied(sets[0])), true, tolerance)
        except Exception as error:
            if name != "torch.compile":
                raise
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            turn = itertools.cycle([copied(x) for x in sets] if "in place" in name else sets)
            runs[name] = lambda call=call, turn=turn: results(call, case, next(turn))
    return runs, failed, sum(sets[0][name].nbytes for name in case.trained) / 2**20


# Time and memory.


def peak_memory_here(case: Case, name: str) -> float:
    """MiB of a case at its peak beyond inputs and gradients (Linux), in a process of its own."""
    call = implementations(case, "cpu")[name]
    results(call, case, inputs_of(replace(case, classes=1024), "cpu"))
    x = inputs_of(case, "cpu")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    results(call, case, x)
    return (_status("VmHWM") - before) / 1024 - sum(x[name].nbytes for name in case.trained) / 2**20


def run_case(case: Case, device: str, rounds: int, ceilings: dict[str, float]) -> list[dict]:
    torch._dynamo.reset()
    runs, failed, gradients = checked(case, device)
    calls = dict(runs)
    if device == "cpu":
        big = [torch.randn(50_000_000) for _ in range(2)]
        calls["t.add_(s)"] = lambda: big[0].add_(big[1])
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(milliseconds(call, device, False))
    ms = {name: statistics.median(values) for name, values in samples.items()}
    gbps = 12 * 50_000_000 / ms["t.add_(s)"] / 1e6 if device == "cpu" else ceilings["copy_gbps"]
    moved, flops = traffic(case)
    floor = max(moved / gbps / 1e6, flops / ceilings["matmul_tflops"] / 1e9)
    about = {**asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}
    rows = [{**about, "name": name, "why_not_timed": reason} for name, reason in failed.items()]
    for name, run in runs.items():
        row = {
            **about, "name": name, "ms": ms[name], "samples": samples[name],
            "speedup_over_plain": ms["plain"] / ms[name], "bytes": moved, "flops": flops, "gbps": gbps,
            "floor_ms": floor, "share_of_floor": floor / ms[name],
        }  # fmt: skip
        if "torch.compile" in ms:
            row["speedup_over_compile"] = ms["torch.compile"] / ms[name]
        if device == "cuda":
            from gpu import peak_memory

            row["peak_mib"] = peak_memory(run) / 2**20
            row["beyond_gradients_mib"] = row["peak_mib"] - (0 if "in place" in name else gradients)
        rows.append(row)
    return rows


# What is printed.


def show(rows: list[dict]) -> None:
    for r in rows:
        start = f"{r['case']:15}{r['batch']:>5} x{r['classes']:>6}  {r['name']:24}"
        if "ms" not in r:
            print(start, r["why_not_timed"])
            continue
        peak = f", peak {r['peak_mib']:.0f} MiB" if "peak_mib" in r else ""
        print(
            f"{start}{r['ms']:>10.3f} ms{r['speedup_over_plain']:>7.2f} x as fast as plain, "
            f"{r['share_of_floor']:>4.0%} of a floor of {r['floor_ms']:.3f} ms ({r['bytes'] / 1e6:.0f} MB at "
            f"{r['gbps']:.0f} GB/s, {r['flops'] / 1e9:.0f} GFLOP){peak}",
            flush=True,
        )


def summary(rows: list[dict], memory: list[dict], device: str) -> None:
    """One line per implementation of ours, with what it is to reach."""
    print(f"\n{'':52}{'ms':>10}{'x plain':>24}{'x compile':>24}{'share of floor':>24}")
    for r in rows:
        if not r["name"].startswith("sslfast"):
            continue
        plain, compiled, share = TARGETS.get((device, r["case"]), (None, None, None))
        print(
            f"{r['case']:15}{r['batch']:>5} x{r['classes']:>6}  {r['name']:24}{r['ms']:>10.3f}"
            + held(r["speedup_over_plain"], plain, "{:.2f}")
            + held(r.get("speedup_over_compile"), compiled, "{:.2f}")
            + held(r["share_of_floor"], share, "{:.0%}")
        )
    of_head = [r for r in rows if r["case"] == "dino_head_loss" and "peak_mib" in r]
    memory = memory + [{**r, "mib": r["beyond_gradients_mib"]} for r in of_head]
    for m in memory:
        print(f"{m['case']}, {m['name']}: peak memory beyond inputs and gradients {m['mib']:.1f} MiB")
    if memory:
        print("of plain's:", held(memory[1]["mib"] / memory[0]["mib"], MEMORY[device], "{:.1%}").strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json-out", type=Path, help="a file, or a folder for <device>/prototypes.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, help="alternations; 21, or on a GPU 3 of many calls each")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after so many")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: whether it runs")
    parser.add_argument("--memory-of", help="(internal) one implementation's peak memory in this process")
    options = parser.parse_args()
    device, began, cases = options.device, time.monotonic(), CASES[options.device]
    if options.quick:
        cases = [replace(case, batch=min(case.batch, 60), classes=1000) for case in cases]
    if options.memory_of:
        head = next(case for case in cases if case.case == "dino_head_loss")
        print(peak_memory_here(head, options.memory_of))
        return
    torch.manual_seed(0)
    if device == "cuda":
        from gpu import rates

        name, ceilings = torch.cuda.get_device_name(), rates()
        ceilings["matmul_tflops"] = ceilings["bfloat16_tflops"]
    else:
        name, ceilings = cpu_name(), {"matmul_tflops": matmul_tflops()}
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads: {ceilings}")
    whole = {
        "device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "sslfast": sslfast.__version__, "python": platform.python_version(), "ceilings": ceilings,
        "prototypes": [], "memory": [],
    }  # fmt: skip
    path = options.json_out
    if path and path.suffix != ".json":
        path = path / re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") / "prototypes.json"

    def keep() -> None:  # at once: a run that is cut off loses nothing
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(whole, indent=1) + "\n")
            part.replace(path)

    rounds = options.rounds or (1 if options.quick else 3 if device == "cuda" else 21)
    for case in cases:
        if time.monotonic() - began > options.seconds:
            print(f"{case.case}, {case.batch} x {case.classes}: left out for lack of time")
            continue
        rows = run_case(case, device, rounds, ceilings)
        show(rows)
        whole["prototypes"] += rows
        keep()
    if device == "cpu":
        for implementation in ("plain", "sslfast (cpu)"):
            command = [sys.executable, __file__, "--memory-of", implementation, *["--quick"] * options.quick]
            mib = []
            for _ in range(1 if options.quick else 5):  # what malloc keeps of freed memory varies
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                mib.append(float(done.stdout))
            row = {"case": "dino_head_loss", "name": implementation, "mib": statistics.median(mib)}
            whole["memory"].append({**row, "samples": mib})
        keep()
    summary(whole["prototypes"], whole["memory"], device)


if __name__ == "__main__":
    main()
