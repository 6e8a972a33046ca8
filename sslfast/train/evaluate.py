"""What the encoder learned: weighted kNN, a linear probe, and 10 labels per class, beside two baselines.

Each figure stands next to the same measurement on raw pixels and on the same encoder with its initial
weights.
"""

import json
import math
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast.train import checkpoint, finetuning, loop, processes, report
from sslfast.train.config import TrainConfig
from sslfast.train.data import Dataset, Decoded, ImageSet
from sslfast.train.run import CHECKPOINT, FEATURES, NEIGHBOURS, WEIGHTS

K, TEMPERATURE = 20, 0.07  # DINO's kNN
LABELS, DRAWS = 10, 5
KEPT = 1000, 50  # images of a map of the features, and how many of their principal components
SOURCES = ("trained encoder", "raw pixels", "untrained encoder")

Features = tuple[Tensor, Tensor]  # of the training images [N, D] and of the test images [M, D]


def run(
    method: str, cfg: TrainConfig, dataset: Dataset, console: Console, finetune: int = 0
) -> dict[str, dict[str, list[float]]]:
    """Evaluates the run in `cfg.out`, prints a table, and writes evaluation.json and pictures there.

    finetune: epochs of training the whole encoder on all labels, which is left out for 0.
    """
    device = cfg.resolve_device()
    channels, size, _ = dataset.train.shape
    model = loop.build(method, cfg, channels, size)
    sets = (dataset.train, dataset.test)
    untrained = features(model.encoder, sets, device, cfg.workers)
    for images in (part.images for part in sets):
        if isinstance(images, Decoded):
            images.tell_count()
    try:
        state = weights(cfg.out)
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"run: the weights in {cfg.out} are not of its config: {error}") from error
    trained = features(model.encoder, sets, device, cfg.workers)
    pixels = features(Pixels(), sets, device, cfg.workers)
    if len(dataset.test):
        report.neighbours(dataset, trained, cfg.out / NEIGHBOURS)
    others = model.show(dataset.test if len(dataset.test) else dataset.train, cfg.out, device)
    for name, of in others.items():
        print(f"{name}: " + ", ".join(f"{what} {values[0]:.4g}" for what, values in of.items()))
    results: dict[str, dict[str, list[float]]] = {}
    if dataset.train.labels is None or dataset.test.labels is None:
        console.print("no labels (they come from class sub-folders): see loss.png and neighbours.png")
    elif not len(dataset.test):
        console.print("no test images (every fifth of a class is for testing): no accuracy is measured")
    else:
        results = measure(dataset.train.labels, dataset.test.labels, (trained, pixels, untrained))
        show(results, console)
        if finetune:
            name = f"fine-tuned for {finetune} epochs"
            results[name] = {}
            for source, start in (("trained encoder", state), ("untrained encoder", None)):
                model = loop.build(method, cfg, channels, size)
                if start is not None:
                    model.load_state_dict(start)
                results[name][source] = [finetuning.run(model.encoder, dataset, cfg, finetune, device)]
            first, second = (f"{values[0]:.3f}" for values in results[name].values())
            print(f"{name}: {first} (untrained encoder {second})")
    results.update(others)
    if results:
        (cfg.out / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
    keep_features(dataset, trained, cfg.out / FEATURES)
    return results


def keep_features(dataset: Dataset, features: Features, path: Path) -> None:
    """What a report draws a map of: features of some test images, or of training images where there are
    none, and their labels. None if they are not finite."""
    images, x = (dataset.test, features[1]) if len(dataset.test) else (dataset.train, features[0])
    rows = torch.linspace(0, len(x) - 1, min(KEPT[0], len(x))).long()
    x = F.normalize(x[rows], dim=1).double()
    if not x.isfinite().all():
        return
    x = x - x.mean(0)
    directions = torch.linalg.svd(x, full_matrices=False)[2][: KEPT[1]]
    kept = {"features": (x @ directions.T).float()}
    if images.labels is not None:
        kept["labels"] = images.labels[rows]
    checkpoint.write(path, kept, {"classes": json.dumps(dataset.classes)})


def weights(run: Path) -> dict[str, Tensor]:
    """The state of a run's model: at its end, or of its last checkpoint."""
    try:
        if (run / WEIGHTS).exists():
            return load_file(run / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"run: {run / WEIGHTS} is not a whole safetensors file: {error}") from error
    if (run / CHECKPOINT).exists():
        return checkpoint.load(run / CHECKPOINT)["model"]
    raise ValueError(f"run: {run} has neither {WEIGHTS} nor {CHECKPOINT}")


class Pixels(nn.Module):
    """[B, C, H, W] -> [B, D]: the image itself, averaged down to D <= 1024 (grey 32 x 32, colour 18 x 18)."""

    def forward(self, images: Tensor) -> Tensor:
        side = math.isqrt(1024 // images.shape[1])
        if max(images.shape[-2:]) > side:
            images = F.adaptive_avg_pool2d(images, side)
        return images.flatten(1)


@torch.no_grad()
def features(
    encoder: nn.Module,
    sets: tuple[ImageSet, ImageSet],
    device: torch.device,
    workers: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Features:
    """float32 features of un-augmented images, on the CPU, with the encoder in evaluation mode.

    part: (i, n): those of the i-th of n consecutive parts of both sets.
    """
    encoder = encoder.to(device).eval()
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def of(images: ImageSet) -> Tensor:
        own = torch.arange(len(images)).tensor_split(part[1])[part[0]]
        rows = own.split(images.batch_size) if len(own) else ()
        parts = [encoder(batch).float().cpu() for batch in images.squares(rows, device, workers)]
        return torch.cat(parts) if parts else torch.empty(0)

    return of(sets[0]), of(sets[1])


def online_knn(encoder: nn.Module, dataset: Dataset, device: torch.device, workers: int) -> float:
    """Accuracy of kNN on the test images, with the encoder as it is; leaves it in evaluation mode.

    All processes call it, and each takes its part of the images.
    """
    part, parts = processes.rank(), processes.processes()
    train, test = features(encoder, (dataset.train, dataset.test), device, workers, (part, parts))
    bank = torch.cat(processes.collected(train))
    predicted = knn(bank, dataset.train.labels, test) if len(test) else torch.empty(0)  # type: ignore[arg-type]  # the loop has seen to it
    return accuracy(torch.cat(processes.collected(predicted)), dataset.test.labels)  # type: ignore[arg-type]


def measure(
    train_labels: Tensor, test_labels: Tensor, by_source: tuple[Features, ...]
) -> dict[str, dict[str, list[float]]]:
    """{measurement: {source: [accuracy of each draw]}}, for the sources in the order of SOURCES."""
    results: dict[str, dict[str, list[float]]] = {}
    draws = few_labels(train_labels)
    for source, (train, test) in zip(SOURCES, by_source, strict=True):
        knn_accuracy = accuracy(knn(train, train_labels, test), test_labels)
        results.setdefault(f"kNN (k={K}, T={TEMPERATURE})", {})[source] = [knn_accuracy]
        results.setdefault("linear probe", {})[source] = [
            accuracy(linear_probe(train, train_labels, test, train), test_labels)
        ]
        if draws:
            results.setdefault(f"{LABELS} labels per class", {})[source] = [
                accuracy(linear_probe(train[rows], train_labels[rows], test, train), test_labels)
                for rows in draws
            ]
    return results


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).float().mean().item()


def knn(train: Tensor, labels: Tensor, test: Tensor, k: int = K, temperature: float = TEMPERATURE) -> Tensor:
    """Weighted k nearest neighbours as DINO has it (Caron et al. 2021): cosine, votes weighted exp(s /
    temperature).

    Args:
        train: [N, D], labels: [N], test: [M, D]; k is at most N.

    Returns:
        predicted labels [M].
    """
    bank = F.normalize(train, dim=1)
    classes = int(labels.max()) + 1
    predicted = []
    for part in F.normalize(test, dim=1).split(1024):
        similarity, rows = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(part), classes).scatter_add_(
            1, labels[rows], (similarity / temperature).exp()
        )
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, unlabelled: Tensor) -> Tensor:
    """Logistic regression on frozen features, standardised by the statistics of `unlabelled` [N, D]."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    mean, std = unlabelled.mean(0), unlabelled.std(0) + 1e-3
    classifier = LogisticRegression(max_iter=300)
    with (
        threadpool_limits(1, "blas"),
        warnings.catch_warnings(),
    ):  # its small products are slower on two threads
        warnings.simplefilter("ignore", ConvergenceWarning)  # 300 iterations are the definition of this probe
        classifier.fit(((train - mean) / std).numpy(), labels.numpy())
    return torch.from_numpy(classifier.predict(((test - mean) / std).numpy()))


def few_labels(labels: Tensor) -> list[Tensor]:
    """DRAWS times the rows of LABELS random images per class; none where a class has fewer."""
    per_class = [torch.nonzero(labels == c)[:, 0] for c in labels.unique()]
    if min(len(rows) for rows in per_class) < LABELS:
        return []
    draws = []
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        draws.append(
            torch.cat([rows[torch.randperm(len(rows), generator=generator)[:LABELS]] for rows in per_class])
        )
    return draws


def show(results: dict[str, dict[str, list[float]]], console: Console) -> None:
    """A table, then one plain line per measurement, the trained encoder first."""
    table = Table("accuracy on the test images", *SOURCES)
    for name, by_source in results.items():
        table.add_row(name, *(_text(by_source[source]) for source in SOURCES))
    console.print(table)
    for name, by_source in results.items():
        first, *others = SOURCES
        beside = ", ".join(f"{source} {_text(by_source[source])}" for source in others)
        print(f"{name}: {_text(by_source[first])} ({beside})")
    if f"{LABELS} labels per class" not in results:
        print(f"{LABELS} labels per class: not measured, a class has fewer training images")


def _text(draws: list[float]) -> str:
    mean = torch.tensor(draws).mean().item()
    return f"{mean:.3f}" if len(draws) == 1 else f"{mean:.3f} ± {torch.tensor(draws).std().item():.3f}"
