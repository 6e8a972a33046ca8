"""Times augment_views beside kornia and Pillow, on the CPU or a GPU; --json-out keeps what was found.

Views are checked before they are timed: ours against the reference backend with the same parameters, the
others, which draw numbers of their own, by the mean and the deviation of their pixels. Implementations
alternate in one process, on fresh images in turn; times are medians of whole calls, drawing included. kornia
begins with float images, whose conversion is not counted, and takes the fastest of its ways: two of cropping,
on the CPU each with the whole batch and with a few images at a time, which spares it fresh memory. Pillow
begins with decoded images and takes the faster of threads and processes, as many as torch has threads. The
floor is the bytes of the images once and those of the views, at the bandwidth of a large copy in the same
run.

    python benchmarks/augment.py --json-out benchmarks/results
    python benchmarks/augment.py --profile --only simclr
"""

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import augment_plain as plain
import torch
from augment_cases import CASES, FEW, TARGETS, Case, Inputs, few_of, inputs_of, own_batch, with_more_steps
from common import held, json_path, keep, milliseconds
from torch import Tensor

import sslfast
from sslfast import PackedImages, ViewSpec
from sslfast.bench.run import about
from sslfast.ops import _backend
from sslfast.ops.view_params import draw

AT_A_TIME = 8  # images, for kornia
SLOW = 20e3  # milliseconds in all after which three rounds are enough

# Implementations, each a function of the number of a set.


def ours(
    specs: list[ViewSpec], sets: list[Inputs], dtype: torch.dtype, backend: str, which: int
) -> list[Tensor]:
    with sslfast.use_backend(backend):
        return sslfast.augment_views(sets[which].images, specs, out_dtype=dtype)  # type: ignore[return-value]


def backends(device: str, dtype: torch.dtype) -> list[str]:
    names = _backend.PREFERENCE["augment_views"][device]
    return [name for name in names if _backend.why_not("augment_views", name, device, dtype) is None]


def drawing(specs: tuple[ViewSpec, ...], sizes: Tensor) -> None:
    """What a call draws."""
    seed = torch.empty(1, dtype=torch.int64, device=sizes.device).random_()
    draw(specs, sizes, seed, torch.arange(len(sizes), device=sizes.device))


def on_next(call: Callable[[int], list], sets: Iterator[int]) -> None:
    call(next(sets))


def peers(
    specs: list[ViewSpec], sets: list[Inputs], device: str, dtype: torch.dtype, stack: contextlib.ExitStack
) -> dict[str, dict[str, Callable[[int], list]] | str]:
    """Each other implementation's ways to do it, or why it is not there; stack: closes workers."""
    found: dict[str, dict[str, Callable] | str] = {}
    if plain.K is None:
        found["kornia"] = "kornia is not installed"
    elif sets[0].floats is not None:
        ways = {}
        for crop in plain.KORNIA_CROPS:
            views = plain.kornia_views(specs, crop, dtype, device)
            ways[f"by {crop}"] = lambda which, views=views: views(sets[which].floats)
            if device == "cpu":
                ways[f"by {crop}, {AT_A_TIME} at a time"] = lambda which, views=views: [
                    list(x) for x in zip(*map(views, sets[which].floats.split(AT_A_TIME)), strict=True)
                ]
        found["kornia"] = ways
    if plain.Image is None:
        found["Pillow"] = "Pillow is not installed"
    elif dtype == torch.float32:
        packed, ways = [x.packed for x in sets], {}
        workers = min(torch.get_num_threads(), len(packed[0]))
        for kind in ("processes", "threads"):  # in this order: no thread is running when processes fork
            pool = plain.PillowPool(packed, specs, workers, kind == "processes")
            stack.callback(pool.close)

            def on_device(which: int, pool: plain.PillowPool = pool) -> list[list[Tensor]]:
                return [[share.to(device) for share in shares] for shares in pool(which)]

            ways[f"{workers} {kind}"] = on_device
        found["Pillow"] = ways
    return found


# Right results.


def check(
    case: Case, specs: list[ViewSpec], images: Tensor | PackedImages, dtype: torch.dtype, backend: str
) -> None:
    """Raises unless the backend's views of a few of the images are those of the reference."""
    with sslfast.use_backend(backend):
        views, params = sslfast.augment_views(images, specs, out_dtype=dtype, return_params=True)
    rows = torch.linspace(0, len(images) - 1, min(FEW, len(images)), device=views[0].device).long()
    same: Any = params[rows]
    with sslfast.use_backend("reference"):
        true = sslfast.augment_views(few_of(images, rows), specs, params=same, out_dtype=torch.float64)
    tolerance = 1e-3 if dtype == torch.float32 else 4e-3  # a quarter of a step of 8 bits
    for i, (view, expected) in enumerate(zip(views, true, strict=True)):
        error = torch.linalg.vector_norm(view[rows].double() - expected) / torch.linalg.vector_norm(expected)
        if not error <= tolerance:
            raise AssertionError(
                f"{case.name}, {backend}: view {i} is wrong, relative error {float(error):.1e}"
            )


def pixels_of(views: list, specs: list[ViewSpec]) -> tuple[Tensor, Tensor]:
    """Of each image the mean and the standard deviation of the pixels of its views, before normalisation."""
    means, deviations = [], []
    for view, spec in zip(views, specs, strict=True):
        x = (torch.cat(view) if isinstance(view, list) else view).float()
        if spec.mean and spec.std:
            mean, std = (x.new_tensor(numbers).view(-1, 1, 1) for numbers in (spec.mean, spec.std))
            x = x * std + mean
        means.append(x.mean((1, 2, 3)))
        deviations.append(x.std((2, 3)).mean(1))
    return torch.stack(means).mean(0), torch.stack(deviations).mean(0)


def check_alike(found: tuple[Tensor, Tensor], true: tuple[Tensor, Tensor]) -> None:
    """Raises unless both are of the same mean and, since kornia does not antialias, about the same deviation;
    three standard errors of what was drawn are allowed besides."""
    for what, share, a, b in zip(("mean", "deviation"), (0.03, 0.12), found, true, strict=True):
        noise = 3 * (a - b).std() / len(a) ** 0.5 if len(a) > 1 else torch.inf
        if not (a.mean() - b.mean()).abs() <= share * b.mean() + noise:
            raise AssertionError(f"other views: {what} {float(a.mean()):.4f} for {float(b.mean()):.4f}")


def fastest(
    ways: dict[str, Callable], specs: list[ViewSpec], true: tuple[Tensor, Tensor], device: str
) -> tuple[str, dict]:
    """(the fastest right one, or "", and the time of each, or what is wrong with it)"""
    ms: dict[str, float] = {}
    about: dict = {"ways_ms": ms}
    for way, call in ways.items():
        try:
            check_alike(pixels_of(call(0), specs), true)
            taken: list[float] = []
            while sum(taken) < 1 and len(taken) < 3:
                began = synchronized(device)
                call(1)
                taken.append(synchronized(device) - began)
        except Exception as error:
            about["why_not_timed"] = f"{way}: {type(error).__name__}: {str(error)[:200]}"
        else:
            ms[way] = min(taken) * 1e3
    about["way"] = min(ms, key=lambda way: ms[way], default="")
    return about["way"], about


def synchronized(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# Time.


def copy_of(device: str) -> tuple[Callable, int]:
    """(a large copy, its bytes, read and written)"""
    big = torch.ones(2**28 if device == "cuda" else 50_000_000, device=device)
    other = torch.empty_like(big)
    return lambda: other.copy_(big), 2 * big.nbytes


def alternated(
    calls: dict[str, Callable], device: str, rounds: int, host: str = ""
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round; host: what runs on the host."""
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if len(samples[name]) < 3 or sum(samples[name]) < SLOW:
                samples[name].append(milliseconds(call, device, name == host))
    return samples


def checked(
    case: Case, sets: list[Inputs], device: str, dtype: torch.dtype, stack: contextlib.ExitStack
) -> tuple[dict[str, Callable[[int], list]], dict[str, dict]]:
    """(what to time of each implementation that is right, what else to say of each)"""
    specs = sslfast.view_specs(case.preset)
    calls: dict[str, Callable[[int], list]] = {}
    for backend in backends(device, dtype):
        check(case, specs, sets[0].images, dtype, backend)
        calls[f"sslfast ({backend})"] = functools.partial(ours, specs, sets, dtype, backend)
    true = pixels_of(next(iter(calls.values()))(0), specs)
    about: dict[str, dict] = {}
    for name, ways in peers(specs, sets, device, dtype, stack).items():
        if isinstance(ways, str):
            about[name] = {"why_not_timed": ways}
            continue
        way, about[name] = fastest(ways, specs, true, device)
        if way:
            calls[name] = ways[way]
    rows = torch.arange(min(FEW, len(sets[0].images)), device=device)
    few = [x._replace(images=few_of(x.images, rows)) for x in sets]
    calls["reference"] = functools.partial(ours, specs, few, dtype, "reference")
    about["reference"] = {"images_timed": len(rows)}
    return calls, about


def run_case(case: Case, batch: int, device: str, dtype: torch.dtype, rounds: int) -> list[dict]:
    specs, sets = sslfast.view_specs(case.preset), inputs_of(case.sizes, batch, device)
    with contextlib.ExitStack() as stack:
        calls, about = checked(case, sets, device, dtype, stack)
        timed: dict[str, Callable] = {
            name: functools.partial(on_next, call, itertools.cycle(range(len(sets))))
            for name, call in calls.items()
        }
        timed["drawing"] = functools.partial(drawing, tuple(specs), sets[0].packed.sizes.to(device))
        timed["copy"], copied = copy_of(device)
        samples = alternated(timed, device, rounds, host="Pillow")
    samples["reference"] = [x * batch / about["reference"]["images_timed"] for x in samples["reference"]]
    ms = {name: statistics.median(values) for name, values in samples.items()}
    gbps = copied / ms["copy"] / 1e6
    pixels = sum(spec.size[0] * spec.size[1] for spec in specs)  # type: ignore[index, misc]
    moved = sets[0].packed.data.nbytes + batch * 3 * pixels * dtype.itemsize
    floor = moved / gbps / 1e6
    rows = []
    for name in {**calls, **about}:
        row = {
            "case": case.name, "batch": batch, "views": len(specs), "dtype": str(dtype)[6:], "name": name,
            **about.get(name, {}),
        }  # fmt: skip
        rows.append(row)
        if name not in calls:
            continue
        row |= {
            "ms": ms[name], "samples": samples[name], "images_per_second": 1e3 * batch / ms[name],
            "views_per_second": 1e3 * batch * len(specs) / ms[name], "bytes": moved, "gbps": gbps,
            "floor_ms": floor, "share_of_floor": floor / ms[name],
        }  # fmt: skip
        if name.startswith("sslfast"):
            row |= {"drawing_ms": ms["drawing"], "share_of_drawing": ms["drawing"] / ms[name]}
            row["speedup_over"] = {peer: ms[peer] / ms[name] for peer in ("kornia", "Pillow") if peer in ms}
        if device == "cuda" and name not in ("Pillow", "reference"):
            from common import peak_memory

            row["peak_mib"] = peak_memory(lambda name=name: calls[name](0)) / 2**20
    return rows


# The steps of ours.


def seeded(call: Callable) -> None:
    """With the same crops as all other calls."""
    torch.manual_seed(0)
    call()


def profile(case: Case, batch: int, device: str, dtype: torch.dtype, rounds: int) -> list[dict]:
    sets, rows = inputs_of(case.sizes, batch, device), []
    stages = with_more_steps(sslfast.view_specs(case.preset))
    for backend in backends(device, dtype):
        calls: dict[str, Callable] = {
            "drawing": functools.partial(drawing, tuple(stages["crop"]), sets[0].packed.sizes.to(device))
        }
        for name, specs in stages.items():
            check(case, specs, sets[0].images, dtype, backend)
            calls[name] = functools.partial(seeded, functools.partial(ours, specs, sets, dtype, backend, 0))
        ms = {name: statistics.median(x) for name, x in alternated(calls, device, rounds).items()}
        whole, before = list(ms.values())[-1], 0.0
        print(f"\n{case.name}, {batch} images, {str(dtype)[6:]}, {backend}{'ms':>14}{'more':>10}")
        for name, value in ms.items():
            more = value - before
            print(f"{name:30}{value:>10.3f}{more:>+10.3f}{more / whole:>7.0%}", flush=True)
            rows.append({
                "case": case.name, "batch": batch, "dtype": str(dtype)[6:], "name": f"sslfast ({backend})",
                "step": name, "ms": value, "more_ms": more,
            })  # fmt: skip
            before = value
    return rows


# What is printed.


def show(rows: list[dict]) -> None:
    for r in rows:
        start = f"{r['case']:20}{r['batch']:>5} x{r['views']:>3} {r['dtype']:9} {r['name']:17}"
        if "ms" not in r:
            print(start, r["why_not_timed"])
            continue
        notes = [f"{r['share_of_floor']:.0%} of {r['gbps']:.0f} GB/s for {r['bytes'] / 1e6:.0f} MB"]
        if "share_of_drawing" in r:
            notes.append(f"drawing {r['drawing_ms']:.2f} ms, {r['share_of_drawing']:.1%}")
        if "ways_ms" in r:
            notes.append(", ".join(f"{way}: {ms:.0f} ms" for way, ms in r["ways_ms"].items()))
        if "why_not_timed" in r:
            notes.append(r["why_not_timed"])
        if "images_timed" in r:
            notes.append(f"from {r['images_timed']} images")
        if "peak_mib" in r:
            notes.append(f"peak {r['peak_mib']:.0f} MiB")
        print(
            f"{start}{r['ms']:>11.3f} ms{r['images_per_second']:>9.0f} images/s"
            f"{r['views_per_second']:>9.0f} views/s, {'; '.join(notes)}",
            flush=True,
        )


def summary(rows: list[dict], device: str) -> None:
    """One line per result of ours, with what it is to reach."""
    names = {case.name: case for case in CASES}
    print(f"\n{'':54}{'ms':>24}{'x kornia':>24}{'x Pillow':>24}{'share of floor':>16}")
    for r in rows:
        if not r["name"].startswith("sslfast") or "ms" not in r:
            continue
        own = r["batch"] == own_batch(names[r["case"]], device)
        targets = TARGETS.get((device, r["case"]), {}) if own else {}
        print(
            f"{r['case']:20}{r['batch']:>5} x{r['views']:>3} {r['dtype']:9} {r['name']:14}"
            + held(r["ms"], -targets["ms"] if "ms" in targets else None, "{:.3f}")
            + "".join(held(r["speedup_over"].get(p), targets.get(p), "{:.2f}") for p in ("kornia", "Pillow"))
            + f"{r['share_of_floor']:>16.0%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json-out", type=Path, help="a file, or a folder that gets <device>/augment.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, help="images; 256, or on a CPU 64 for all but simclr")
    parser.add_argument("--only", default="", help="cases whose name begins so; the file keeps its others")
    parser.add_argument("--rounds", type=int, help="alternations; 7, or on a GPU 3 of many calls each")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after so many")
    parser.add_argument("--profile", action="store_true", help="time our steps, one after the other added")
    options = parser.parse_args()
    device, began = options.device, time.monotonic()
    cases = [case for case in CASES if case.name.startswith(options.only)]
    if not cases:
        raise SystemExit(f"--only: expected the beginning of {', '.join(case.name for case in CASES)}")
    torch.manual_seed(0)
    whole: dict = {
        **about(torch.device(device)),
        "kornia": metadata.version("kornia") if plain.K else None,
        "pillow": metadata.version("pillow") if plain.Image else None, "augment": [], "profile": [],
    }  # fmt: skip
    print(f"{whole['device']}, torch {whole['torch']}, {whole['threads']} threads")
    path = json_path(options.json_out, whole["device"], "augment.json")
    part, run = ("profile", profile) if options.profile else ("augment", run_case)
    if path and path.exists() and (options.only or options.profile):
        kept = json.loads(path.read_text())
        done = {case.name for case in cases}
        for key in ("augment", "profile"):
            whole[key] = [row for row in kept[key] if key != part or row["case"] not in done]
    rows: list[dict] = []
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    for case in cases:
        for dtype in dtypes:
            if time.monotonic() - began > options.seconds:
                print(f"{case.name}, {str(dtype)[6:]}: left out for lack of time")
                continue
            batch = options.batch or own_batch(case, device)
            found = run(case, batch, device, dtype, options.rounds or (3 if device == "cuda" else 7))
            rows += found
            whole[part] += [{**row, "commit": whole["commit"]} for row in found]
            keep(path, whole)
            if not options.profile:
                show(found)
    if not options.profile:
        summary(rows, device)
    if path:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
