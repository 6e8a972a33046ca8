"""The pictures of a run."""

import csv
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sslfast.train.data import Dataset


def loss_curve(metrics: Path, path: Path) -> None:
    """Loss and learning rate over the epochs of metrics.csv."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) for row in rows]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs, [float(row["loss"]) for row in rows], marker=".", label="loss")
    axes.set(xlabel="epoch", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    rate = axes.twinx()
    rate.plot(
        epochs, [float(row["learning_rate"]) for row in rows], color="tab:gray", ls=":", label="learning rate"
    )
    rate.set_ylabel("learning rate at the end of the epoch")
    lines = [*axes.lines, *rate.lines]
    axes.legend(lines, [str(line.get_label()) for line in lines])
    figure.savefig(path, dpi=120)


def neighbours(
    dataset: Dataset, features: tuple[Tensor, Tensor], path: Path, rows: int = 10, columns: int = 9
) -> None:
    """Test images and their nearest training images by cosine; images of another class have a red frame."""
    from matplotlib.figure import Figure

    train, test = (F.normalize(f, dim=1) for f in features)
    queries = torch.linspace(0, len(test) - 1, min(rows, len(test))).long()
    nearest = (test[queries] @ train.T).topk(min(columns, len(train)), dim=1).indices
    figure = Figure(figsize=(0.8 * (columns + 1.4), 0.8 * len(queries) + 0.4), layout="constrained")
    grid = figure.subplots(len(queries), 1 + nearest.shape[1], squeeze=False)
    for query, found, axes in zip(queries.tolist(), nearest.tolist(), grid, strict=True):
        _picture(axes[0], dataset.test.images[query])
        for axis, row in zip(axes[1:], found, strict=True):
            _picture(axis, dataset.train.images[row])
            if dataset.train.labels is None or dataset.test.labels is None:
                continue
            if dataset.train.labels[row] != dataset.test.labels[query]:
                for spine in axis.spines.values():
                    spine.set(visible=True, color="tab:red", linewidth=2)
    grid[0][0].set_title("test", fontsize=8)
    grid[0][1].set_title("nearest training images", fontsize=8, loc="left")
    figure.savefig(path, dpi=120)


def _picture(axis, image: Tensor) -> None:
    pixels = image.permute(1, 2, 0).numpy()
    axis.imshow(pixels.squeeze(), cmap="gray" if image.shape[0] == 1 else None)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
