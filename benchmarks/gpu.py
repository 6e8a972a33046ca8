"""Times the losses on a GPU, forward + backward, beside eager PyTorch, torch.compile, chunked cuBLAS and
installed peers.

A result is checked against float64 before it is timed; a wrong one is not timed. Implementations alternate in
one process, on the same random rows; the floor is the number of M N D matrix products that exactness needs
(NT-Xent 2.5, CLIP 4, MoCo 2) at the rate of a large torch.mm in the same run. Peak memory is beyond the
inputs.

    python benchmarks/gpu.py --json-out results.json [--quick]
"""

import argparse
import json
import os
import platform
import re
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from gpu_losses import TEMPERATURE, Case, forced, implementations
from sslfast.kernels import tuning
from torch import Tensor
from torch.nn import functional as F

import sslfast

PASSES = {"ntxent": 2.5, "clip": 4.0, "moco": 2.0}
ROUNDS = 3
DEVICE = "cuda"


CASES = (  # those with a target first
    Case("ntxent", 32768, 32768, 128),
    Case("clip", 65536, 65536, 512),
    Case("moco", 4096, 65536, 128),
    Case("ntxent", 32768, 32768, 256),
    Case("ntxent", 256, 256, 128),
    Case("ntxent", 4096, 4096, 128),
    Case("ntxent", 4096, 4096, 128, "float32"),
    Case("clip", 8192, 8192, 512),
)
# Every kernel: symmetric and not, either form, and at temperature 0.01 the running maximum.
SMALL = (
    Case("ntxent", 200, 200, 128),
    Case("clip", 300, 300, 128),
    Case("clip", 300, 300, 512),
    Case("moco", 200, 500, 128),
    Case("ntxent", 100, 100, 48, "float32"),
)


def inputs_of(case: Case) -> list[Tensor]:
    """Unit rows: [m, D] twice, and for moco [n, D]; the last does not require a gradient there."""
    sizes = {"ntxent": (case.m, case.m), "clip": (case.m, case.n), "moco": (case.m, case.m, case.n)}[
        case.loss
    ]
    rows = [torch.randn(size, case.d, device=DEVICE) for size in sizes]
    rows[1] = 0.5 * rows[0] + rows[1]  # positives: a cosine of about 0.45
    return [F.normalize(x, dim=1).to(getattr(torch, case.dtype)) for x in rows]


def leaves(case: Case, rows: list[Tensor]) -> list[Tensor]:
    trained = {"ntxent": 2, "clip": 2, "moco": 1}[case.loss]
    return [x.detach().clone().requires_grad_(i < trained) for i, x in enumerate(rows)]


# Truth.


def truth(case: Case, rows: list[Tensor]) -> tuple[float, list[Tensor]]:
    """Loss and gradients of the trained rows in float64, in chunks of rows."""
    x, t = [r.double() for r in rows], TEMPERATURE[case.loss]
    if case.loss == "ntxent":
        a = b = torch.cat(x)
        positive = torch.cat((x[1], x[0]))
    elif case.loss == "clip":
        (a, b), positive = x, x[1]
    else:
        a, positive, b = x
    m, chunk = len(a), 1024
    extra = (a * positive).sum(1) / t if case.loss == "moco" else None

    def logits(i: int) -> Tensor:
        s = a[i : i + chunk] @ b.T / t
        if case.loss == "ntxent":
            s.diagonal(i).fill_(-torch.inf)
        return s if extra is None else torch.cat((extra[i : i + chunk, None], s), 1)

    row, col = a.new_empty(m), a.new_full((len(b),), -torch.inf)
    for i in range(0, m, chunk):
        s = logits(i)
        row[i : i + chunk] = s.logsumexp(1)
        col = torch.logaddexp(col, s.logsumexp(0)) if case.loss == "clip" else col
    terms = (row + col) / 2 if case.loss == "clip" else row
    loss = (terms - (a * positive).sum(1) / t).mean().item()
    da, db = -positive / (m * t), -a / (m * t) if case.loss == "clip" else torch.zeros_like(b)
    for i in range(0, m, chunk):
        s, part = logits(i), slice(i, i + chunk)
        w = torch.exp(s - row[part, None])
        w = (w + torch.exp(s - col)) / 2 if case.loss == "clip" else w
        if extra is not None:
            da[part] += w[:, :1] * positive[part] / (m * t)
            w = w[:, 1:]
        da[part] += w @ b / (m * t)
        if case.loss != "moco":
            db += w.T @ a[part] / (m * t)
    if case.loss == "ntxent":  # d/dz of both roles, and of the positives' other side
        return loss, list((da + db - positive / (m * t)).chunk(2))
    return loss, [da] if case.loss == "moco" else [da, db]


def value_and_gradients(call: Callable, case: Case, rows: list[Tensor]) -> tuple[float, list[Tensor]]:
    x = leaves(case, rows)
    with forced(call):
        value = call(case.loss, x)
        value.backward()
    return value.item(), [r.grad for r in x if r.requires_grad]


def check(
    call: Callable, case: Case, rows: list[Tensor], true: tuple[float, list[Tensor]]
) -> dict[str, float]:
    value, gradients = value_and_gradients(call, case, rows)
    ours, theirs = (torch.cat([g.double().flatten() for g in side]) for side in (gradients, true[1]))
    cosine = F.cosine_similarity(ours, theirs, dim=0).item()
    ratio = (ours.norm() / theirs.norm()).item()
    return {"loss_error": abs(value - true[0]), "one_minus_cosine": 1 - cosine, "norm_ratio": ratio}


def is_right(errors: dict[str, float], mine: bool) -> bool:
    loss, angle, norm = (1e-4, 1e-4, 5e-3) if mine else (2e-2, 1e-2, 5e-2)
    return (
        errors["loss_error"] < loss
        and errors["one_minus_cosine"] < angle
        and abs(errors["norm_ratio"] - 1) < norm
    )


# Time and memory.


def rates() -> dict[str, float]:
    """Ceilings of this card: a large bfloat16 matrix product, and a large copy counting both ways."""
    x, y = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    mm = triton.testing.do_bench(lambda: x @ y, rep=200, return_mode="median")
    f, g = (torch.randn(4096, 8192, device=DEVICE) for _ in range(2))
    fp32 = triton.testing.do_bench(lambda: f @ g.T, rep=100, return_mode="median")
    big = torch.empty(2**30, device=DEVICE, dtype=torch.uint8).random_()
    other = torch.empty_like(big)
    copy = triton.testing.do_bench(lambda: other.copy_(big), rep=100, return_mode="median")
    return {
        "bfloat16_tflops": 2 * 8192**3 / mm / 1e9, "float32_tflops": 2 * 4096**2 * 8192 / fp32 / 1e9,
        "copy_gbps": 2 * 2**30 / copy / 1e6,
    }  # fmt: skip


def peak_memory(run: Callable) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def run_case(case: Case, ceilings: dict[str, float], only_ours: bool = False) -> list[dict]:
    """Results of every implementation; only_ours: of ours, checked and not timed."""
    torch._dynamo.reset()
    rows = inputs_of(case)
    true = truth(case, rows)
    results, runs = [], {}
    for name, call in implementations(case).items():
        if only_ours and not name.startswith("sslfast"):
            continue
        result = {**asdict(case), "name": name}
        results.append(result)
        try:
            result.update(check(call, case, rows, true))
        except torch.cuda.OutOfMemoryError:
            result["why_not_timed"] = "out of memory"
            torch.cuda.empty_cache()
            continue
        except Exception as error:  # a peer that does not run here
            if name.startswith("sslfast"):
                raise
            result["why_not_timed"] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        if not is_right(result, name.startswith("sslfast")):
            if name.startswith("sslfast"):
                raise AssertionError(f"{name} is wrong at {case}: {result}")
            result["why_not_timed"] = "wrong result"
            continue
        x = leaves(case, rows)

        def run(call: Callable = call, x: list[Tensor] = x) -> None:
            for r in x:
                r.grad = None
            with forced(call):
                call(case.loss, x).backward()

        runs[name] = run
    if only_ours:
        return results
    del true
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            samples[name].append(triton.testing.do_bench(run, warmup=20, rep=60, return_mode="median"))
    m, n = case.shape
    rate = ceilings["bfloat16_tflops" if case.dtype == "bfloat16" else "float32_tflops"]
    floor = PASSES[case.loss] * 2 * m * n * case.d / rate / 1e9
    mine = statistics.median(samples["sslfast"])
    for result in results:
        if result["name"] in runs:
            ms = statistics.median(samples[result["name"]])
            result.update(ms=ms, samples=samples[result["name"]], floor_ms=floor, times_floor=ms / floor,
                          speedup=ms / mine, peak_mib=peak_memory(runs[result["name"]]) / 2**20)  # fmt: skip
    return results


def show(results: list[dict]) -> None:
    """One line per implementation."""
    for r in results:
        start = f"{r['loss']:7}{r['m']:>6} x{r['n']:>6} {r['d']:>4} {r['dtype']:9}{r['name']:18}"
        if "ms" in r:
            print(
                f"{start}{r['ms']:>10.3f} ms {r['speedup']:>7.2f} x sslfast {r['times_floor']:>6.2f} x floor "
                f"{r['peak_mib']:>8.0f} MiB, loss error {r['loss_error']:.1e}, "
                f"1-cos {r['one_minus_cosine']:.1e}"
            )
        else:
            print(start, r.get("why_not_timed", f"checked, 1-cos {r['one_minus_cosine']:.1e}"))


def summary(results: list[dict]) -> None:
    """One line per case: ours, and how many times longer the others take."""
    cases = {(r["loss"], r["m"], r["n"], r["d"], r["dtype"]): {} for r in results}
    for r in results:
        if "ms" in r:
            cases[r["loss"], r["m"], r["n"], r["d"], r["dtype"]][r["name"]] = r
    for (loss, m, n, d, dtype), by_name in cases.items():
        if "sslfast" not in by_name:
            continue
        mine = by_name["sslfast"]
        others = ", ".join(f"{k} {r['speedup']:.2f}x" for k, r in by_name.items() if k != "sslfast")
        print(
            f"{loss} {m} x {n}, D={d}, {dtype}: {mine['ms']:.3f} ms, {mine['times_floor']:.2f} x floor; "
            + others
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json-out", type=Path, help="a file, or a folder that gets <device>/gpu.json")
    parser.add_argument(
        "--quick", action="store_true", help="small cases of ours, checked: every kernel once"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.quick:
        tuning.SMALL = 0
        for temperature in (None, 0.01):
            TEMPERATURE.update(dict.fromkeys(TEMPERATURE, temperature) if temperature else {})
            for case in SMALL:
                show(run_case(case, {}, only_ours=True))
        return
    device = torch.cuda.get_device_name()
    ceilings = rates()
    print(
        f"{device}: bfloat16 product {ceilings['bfloat16_tflops']:.0f} TFLOP/s, float32 "
        f"{ceilings['float32_tflops']:.0f} TFLOP/s, copy {ceilings['copy_gbps']:.0f} GB/s"
    )
    whole = {
        "device": device, "torch": torch.__version__, "triton": triton.__version__,
        "sslfast": sslfast.__version__, "python": platform.python_version(), "temperature": TEMPERATURE,
        "ceilings": ceilings, "results": [],
    }  # fmt: skip
    path = options.json_out
    if path and path.suffix != ".json":
        path = path / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") / "gpu.json"
    for case in CASES:
        results = run_case(case, ceilings)
        show(results)  # at once, and kept at once: a run that is cut off loses nothing
        whole["results"] += results
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(whole, indent=1) + "\n")
            part.replace(path)
        torch.cuda.empty_cache()
    print()
    summary(whole["results"])


if __name__ == "__main__":
    main()
