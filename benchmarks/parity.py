"""Learning parity: methods trained with our ops, with plain PyTorch and with lightly's losses.

All variants of a method run in the same loop from the same seed: same initial weights, batches and views.

    ours        the fused ops
    reference   plain PyTorch for every op but the views: losses, averages, masks, patches
    lightly     lightly's loss, where it has one; all else is ours
    nudged      ours, but each initial weight is moved by about its last bit: what rounding does to a run

Training amplifies rounding, so that no two variants end with the same numbers. What is to be seen is that
losses and gradients coincide at first, that curves then lie closer together than those of two seeds, and that
accuracies are where those of further seeds would be.

    python benchmarks/parity.py --json-out benchmarks/results

writes <device>/parity.json after each run, and parity.png beside it at the end. A run that is in the file
with the same options, data, threads and torch is not repeated. Beside device, threads and versions it has

    recipes     by key: what decides the numbers of runs
    differs     of each name, how lightly's loss is made the same, and what stays different
    runs        a list: name, variant, seed, recipe (the key), losses of all updates, epoch_losses,
                gradient_norms of the first updates, accuracies, seconds of training and evaluation
    summary     of each name: see `summary`
"""

import functools
import hashlib
import io
import itertools
import json
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

import sslfast
from sslfast.bench import page
from sslfast.bench.run import about
from sslfast.ops import _backend
from sslfast.train import augment, config, distillation, loop, methods, sources
from sslfast.train.checkpoint import write_text
from sslfast.train.config import TrainConfig
from sslfast.train.data import Dataset, ImageSet
from sslfast.train.methods import byol, dino, moco, simclr

Name = Literal["simclr", "moco", "byol", "dino", "dino-center", "mae"]
Variant = Literal["ours", "reference", "lightly", "nudged"]

DINO = {"epochs": 10, "local_crops": 0, "head_layers": 2}
BYOL = {"epochs": 10, "batch_size": 32, "learning_rate": 1e-3, "momentum": 0.95, "hidden_dim": 1024}
RECIPES: dict[str, tuple[str, dict]] = {  # the README's, and DINO with the paper's centre and temperature
    "simclr": ("simclr", {"epochs": 20}),
    "moco": ("moco", {"epochs": 20, "batch_size": 128, "queue_size": 1024}),
    "byol": ("byol", BYOL),
    "dino": ("dino", DINO),
    "dino-center": ("dino", {**DINO, "centering": "center", "teacher_temp": 0.04}),
    "mae": ("mae", {"epochs": 25, "patch_size": 7}),
}
QUICK = {"epochs": 2, "batch_size": 64, "warmup_epochs": 0.5}
DIFFERS = {
    "simclr": "NTXentLoss(temperature): the same definition.",
    "moco": "NTXentLoss(temperature, (K, D)), whose bank begins as the queue does. It normalises rows again. "
    "Were K no multiple of the batch, it would drop rows beyond its end, which the queue has at its start.",
    "byol": "2 + 2 NegativeCosineSimilarity() of each direction, the paper's squared distance; lightly's "
    "examples take a quarter of the sum, less 1. Norms are at least 1e-8, here 1e-12.",
    "dino": "DINOLoss(student_temp), of logits made for it. It has no Sinkhorn-Knopp: before each loss its "
    "centre is set to the one that stands for Sinkhorn's assignments, which our op finds.",
    "dino-center": "DINOLoss(student_temp, center_momentum), of logits made for it, with its own centre, "
    "which moves after the loss as here. The teacher's temperature, here constant, is divided out before it.",
    "mae": "lightly has no loss for MAE.",
}
QUICK_IMAGES, NORMS = 500, 10  # about so many images; updates of which the gradient's norm is kept
LIGHTLY = next((x.version for x in metadata.distributions(name="lightly")), None)
COINCIDE = 1e-4  # relative difference of the first loss and gradient up to which they are the same
BEYOND = {"1e-4": 1e-4, "1e-2": 1e-2}


# Variants: contexts in which a method is built and trained with a config.


@contextmanager
def reference(cfg: TrainConfig) -> Iterator[None]:
    chosen = _backend.resolve("augment_views", cfg.resolve_device(), torch.float32)
    views = augment.Views.__call__

    def same_views(*args, **options) -> tuple[Tensor, ...]:
        with sslfast.use_backend(chosen):
            return views(*args, **options)

    with mock.patch.object(augment.Views, "__call__", same_views), sslfast.use_backend("reference"):
        yield


@contextmanager
def nudged(cfg: TrainConfig) -> Iterator[None]:
    build = loop.build

    @torch.no_grad()
    def built(*args) -> methods.Method:
        model = build(*args)
        generator = torch.Generator().manual_seed(cfg.seed)
        for p in model.parameters():
            p.mul_(1 + 2.0**-23 * torch.randn(p.shape, generator=generator))
        return model

    with mock.patch.object(loop, "build", built):
        yield


def lightly(cfg: TrainConfig) -> AbstractContextManager:
    from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss

    kept: dict[str, torch.nn.Module] = {}  # of this run

    def of_moco(query: Tensor, key: Tensor, queue: Tensor, temperature: float, **others) -> Tensor:
        if not kept:
            with torch.random.fork_rng():
                kept["loss"] = NTXentLoss(temperature, memory_bank_size=tuple(queue.shape)).to(queue.device)
            kept["loss"].memory_bank.bank.copy_(queue)
        return kept["loss"](query, key)

    def of_byol(prediction: Tensor, target: Tensor) -> Tensor:
        return 2 + 2 * NegativeCosineSimilarity()(prediction, target.detach())

    def of_dino(x: Tensor, w: Tensor, y: Tensor, v: Tensor, center: Tensor, *temps: float) -> Tensor:
        """Features and prototypes [K, D]: the student's x, w, the teacher's y, v, y over its temperature."""
        sinkhorn = cfg.centering == "sinkhorn"
        if not kept:
            options = {"student_temp": temps[0], "center_momentum": 1.0 if sinkhorn else cfg.center_momentum}
            kept["loss"] = DINOLoss(len(center), **options).to(center.device)
        if sinkhorn:
            kept["loss"].center.copy_(center)
        return kept["loss"](list((y @ v.T).detach()), list(x @ w.T), teacher_temp=temps[1])

    places = {
        simclr.Config: (simclr, "NTXentLoss", lambda temperature, group: NTXentLoss(temperature)),
        moco.Config: (moco, "moco_loss", of_moco),
        byol.Config: (byol, "byol_loss", of_byol),
        dino.Config: (distillation, "dino_head_loss", of_dino),
    }
    return mock.patch.object(*places[type(cfg)])


VARIANTS = {"ours": nullcontext, "reference": reference, "lightly": lightly, "nudged": nudged}


# Runs.


def setting(name: str, data: str, quick: bool) -> tuple[str, Callable[..., TrainConfig], dict]:
    """A method, what makes its config of `out` and `seed`, and all else that decides a run's numbers."""
    method, options = RECIPES[name]
    options = {"data": data, "device": "cpu", "precision": "float32", **options}
    if quick:
        options |= {**QUICK, "queue_size": 256} if method == "moco" else QUICK
    make = functools.partial(methods.module(method).Config, **options)
    whole = config.identity(method, make(out=Path(), seed=0))
    del whole["seed"]
    others = {"data": data, "quick": quick, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return method, make, whole | others


def run(name: str, variant: str, seed: int, data: str, quick: bool) -> dict:
    """Trains in a temporary folder; accuracies are the trained encoder's, means over draws of labels."""
    method, make, _ = setting(name, data, quick)
    losses, norms, began = [], [], time.perf_counter()
    backward, load = loop.Update.backward, sources.load

    def noted(update: loop.Update, views: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        result = backward(update, views)
        losses.append(result[0])
        if len(norms) < NORMS:
            gradients = [p.grad for p in update.model.parameters() if p.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(gradients))
        return result

    def fewer(*args) -> Dataset:
        whole = load(*args)
        parts = ((x, max(1, len(x) // QUICK_IMAGES)) for x in (whole.train, whole.test))
        return Dataset(*(ImageSet(x.images[::n], x.labels[::n]) for x, n in parts), whole.classes)

    with tempfile.TemporaryDirectory() as folder:
        cfg = make(out=Path(folder) / "run", seed=seed)
        with (
            mock.patch.object(loop.Update, "backward", noted),
            mock.patch.object(sources, "load", fewer if quick else load),
            VARIANTS[variant](cfg),
            redirect_stdout(io.StringIO()),
        ):
            loop.train(method, cfg)
        evaluation = json.loads((cfg.out / "evaluation.json").read_text())
    trained = {x: of["trained encoder"] for x, of in evaluation.items() if "trained encoder" in of}
    values = torch.stack(losses).double()
    seconds = round(time.perf_counter() - began, 1)
    return {
        **{"name": name, "variant": variant, "seed": seed, "seconds": seconds},
        "accuracies": {x: round(statistics.fmean(draws), 5) for x, draws in trained.items()},
        "gradient_norms": digits(norms),
        "epoch_losses": digits(values.view(cfg.epochs, -1).mean(1)),
        "losses": digits(values),
    }


def digits(values: Iterable, count: int = 6) -> list[float]:
    return [float(f"{float(x):.{count}g}") for x in values]


# What they show.


def summary(runs: list[dict]) -> dict:
    """Of the runs of one name with one recipe.

    Returns:
        seeds: how many of ours; the mean absolute difference of the epochs' losses between two; of each
            accuracy mean, sd, least, greatest, and the interval that has 95% of further seeds.
        variants: of each other one, beside ours with the same seed: relative difference of the first loss and
            of the first gradient's norm, and whether they coincide; the first update, counted from 1, whose
            losses differ by more than 1e-4 and 1e-2 of ours; the mean absolute difference of the epochs'
            losses; accuracies, their difference from ours, and whether they are in the interval.
    """
    ours = {x["seed"]: x for x in runs if x["variant"] == "ours"}
    measures = next(iter(ours.values()))["accuracies"]
    accuracies = {x: spread([own["accuracies"][x] for own in ours.values()]) for x in measures}
    apart = [epochs_apart(*pair) for pair in itertools.combinations(ours.values(), 2)]
    variants: dict[str, dict] = {}
    for other in (x for x in runs if x["variant"] != "ours" and x["seed"] in ours):
        same, measured = ours[other["seed"]], {}
        loss, gradient = (differences(same[x], other[x]) for x in ("losses", "gradient_norms"))
        for x, value in other["accuracies"].items():
            interval, difference = accuracies[x]["interval"], round(value - same["accuracies"][x], 5)
            within = interval and interval[0] <= value <= interval[1]
            measured[x] = {"value": value, "difference": difference, "within": within}
        beyond = {x: next((i for i, d in enumerate(loss, 1) if d > most), None) for x, most in BEYOND.items()}
        variants[other["variant"]] = {
            "seed": other["seed"],
            "first_loss_difference": loss[0],
            "first_gradient_difference": gradient[0],
            "coincides": max(loss[0], gradient[0]) <= COINCIDE,
            "first_update_beyond": beyond,
            "epoch_loss_difference": epochs_apart(same, other),
            "accuracies": measured,
        }
    between = digits([statistics.fmean(apart)], 3)[0] if apart else None
    seeds = {"count": len(ours), "epoch_loss_difference": between, "accuracies": accuracies}
    return {"seeds": seeds, "variants": variants}


def differences(one: list[float], other: list[float]) -> list[float]:
    return digits((abs(b - a) / max(abs(a), 1e-30) for a, b in zip(one, other, strict=True)), 3)


def epochs_apart(one: dict, other: dict) -> float:
    pairs = zip(one["epoch_losses"], other["epoch_losses"], strict=True)
    return digits([statistics.fmean(abs(a - b) for a, b in pairs)], 3)[0]


def spread(values: list[float]) -> dict:
    """The interval is that of one further value of the same normal distribution."""
    from scipy.stats import t

    n, middle, sd, interval = len(values), statistics.fmean(values), None, None
    if n > 1:
        sd = round(statistics.stdev(values), 6)
        half = t.ppf(0.975, n - 1) * sd * math.sqrt(1 + 1 / n)
        interval = digits([middle - half, middle + half])
    least, greatest = min(values), max(values)
    return {"mean": round(middle, 6), "sd": sd, "least": least, "greatest": greatest, "interval": interval}


def show(name: str, found: dict, console: Console) -> None:
    seeds = found["seeds"]
    columns = "first loss", "gradient", "> 1e-4, 1e-2 at update", "epochs apart"
    table = Table(name, *columns, *seeds["accuracies"])
    cells = (f"{x['mean']:.3f} ± {x['sd'] or 0:.3f}" for x in seeds["accuracies"].values())
    table.add_row(f"ours, seeds: {seeds['count']}", *[""] * 3, f"{seeds['epoch_loss_difference']}", *cells)
    for variant, x in found["variants"].items():
        row = [f"{variant}, seed {x['seed']}" + ("" if x["coincides"] else ": DIFFERS")]
        row += [f"{x['first_loss_difference']:.1g}", f"{x['first_gradient_difference']:.1g}"]
        row += [", ".join(map(str, x["first_update_beyond"].values())), f"{x['epoch_loss_difference']}"]
        for y in x["accuracies"].values():
            row.append(f"{y['value']:.3f} ({y['difference']:+.3f})" + ": OUTSIDE" * (y["within"] is False))
        table.add_row(*row)
    console.print(table)


def draw(results: dict) -> bytes:
    """A PNG of losses over epochs; below them, how far the loss of each update is from that of ours."""
    from matplotlib.figure import Figure

    styles = {"reference": ("tab:orange", "--", 2), "lightly": ("black", ":", 2), "nudged": ("g", "-.", 1)}
    by_name = compared(results)
    figure = Figure(figsize=(4.2 * len(by_name), 6.4))
    panels = figure.subplots(2, len(by_name), squeeze=False).T
    for (above, below), (name, runs) in zip(panels, by_name.items(), strict=True):
        first, measure = runs[0], list(runs[0]["accuracies"])[-1]
        ours = {x["seed"]: x for x in runs if x["variant"] == "ours"}
        for x in runs:
            other_seed = ("0.75", "-", 1) if x is not first else ("tab:blue", "-", 5)
            color, dash, width = styles.get(x["variant"], other_seed)
            label = f"{x['variant']}, seed {x['seed']}: {x['accuracies'][measure]:.3f}"
            epochs = range(1, len(x["epoch_losses"]) + 1)
            above.plot(epochs, x["epoch_losses"], dash, color=color, linewidth=width, label=label)
            if x is not first:
                beside = first if x["variant"] == "ours" else ours.get(x["seed"], first)
                apart = [max(d, 1e-7) for d in differences(beside["losses"], x["losses"])]
                below.loglog(range(1, len(apart) + 1), apart, color=color, linewidth=0.8, alpha=0.8)
        above.set(title=name, xlabel="epoch", ylabel="loss")
        below.set(xlabel="update", ylabel="relative difference of the loss")
        above.legend(title=measure, fontsize=7, title_fontsize=7)
    figure.tight_layout()
    return page.png(figure, results["runs"])


def compared(results: dict) -> dict[str, list[dict]]:
    """Of each name the runs that have the recipe of its newest run of ours, which come first."""
    newest = {x["name"]: x["recipe"] for x in results["runs"] if x["variant"] == "ours"}
    runs = [x for x in results["runs"] if x["recipe"] == newest.get(x["name"])]
    runs.sort(key=lambda x: (list(VARIANTS).index(x["variant"]), x["seed"]))
    return {name: own for name in RECIPES if (own := [x for x in runs if x["name"] == name])}


def write(results: dict, path: Path) -> None:
    """Adds the summary, and writes the file whole or not at all."""
    results["summary"] = {name: summary(runs) for name, runs in compared(results).items()}
    used = {x["recipe"] for x in results["runs"]}
    results["recipes"] = {key: recipe for key, recipe in results["recipes"].items() if key in used}
    text = json.dumps(results, indent=1)
    write_text(path, re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n")


def main(
    methods: tuple[Name, ...] = tuple(RECIPES),
    variants: tuple[Variant, ...] = ("ours", "reference", "lightly"),
    seeds: tuple[int, ...] = (0, 1, 2),
    data: str = "mnist5k",
    json_out: Path = Path("benchmarks/results"),
    quick: bool = False,
    again: bool = False,
) -> None:
    """Trains what is not in the file yet, and shows how far variants are apart.

    Args:
        methods: dino-center is DINO with the paper's centre in place of Sinkhorn-Knopp.
        variants: lightly only where it is installed, and of methods for which it has a loss.
        seeds: of ours; the other variants have the first.
        data: as `sslfast train` has it.
        json_out: a folder, which gets <device>/parity.json.
        quick: two epochs on a part of the data, in parity-quick.json.
        again: repeat runs that are in the file.
    """
    console = Console(width=150)
    head = about(torch.device("cpu"))
    path = json_out / head["device"] / ("parity-quick.json" if quick else "parity.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {"runs": [], "recipes": {}}
    results = {**head, "lightly": LIGHTLY or before.get("lightly")}
    results |= {"differs": DIFFERS, "recipes": before["recipes"], "runs": before["runs"]}
    for name in methods:
        recipe = setting(name, data, quick)[-1]
        key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
        results["recipes"][key] = recipe
        for variant, seed in ((v, s) for v in variants for s in (seeds if v == "ours" else seeds[:1])):
            if variant == "lightly" and (name == "mae" or not LIGHTLY):
                continue
            label = {"name": name, "variant": variant, "seed": seed}
            known = [x for x in results["runs"] if {**x, **label} == x]
            if not again and any(x["recipe"] == key for x in known):
                continue
            found = {**run(name, variant, seed, data, quick), "recipe": key, "commit": head["commit"]}
            results["runs"] = [x for x in results["runs"] if x not in known] + [found]
            write(results, path)
            console.print(f"{name}, {variant}, seed {seed}: {found['seconds']:.0f} s, {found['accuracies']}")
    write(results, path)
    if results["summary"]:
        path.with_suffix(".png").write_bytes(draw(results))
    for name, found in results["summary"].items():
        show(name, found, console)
    console.print(f"wrote {path}")
    apart = {name: [v for v, x in found["variants"].items() if not x["coincides"]]
             for name, found in results["summary"].items()}  # fmt: skip
    if any(apart.values()):
        raise SystemExit(f"differ from ours in the first update: {apart}")


if __name__ == "__main__":
    tyro.cli(main)
