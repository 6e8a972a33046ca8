"""The pictures of a run."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sslfast.train.data import Dataset

CPU = torch.device("cpu")


def loss_curve(rows: list[dict[str, float]], path: Path) -> None:
    """Loss and learning rate over the epochs, as in metrics.csv."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs, [row["loss"] for row in rows], marker=".", label="loss")
    axes.set(xlabel="epoch", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    rate = axes.twinx()
    rate.plot(epochs, [row["learning_rate"] for row in rows], color="tab:gray", ls=":", label="learning rate")
    rate.set_ylabel("learning rate at the end of the epoch")
    lines = [*axes.lines, *rate.lines]
    axes.legend(lines, [str(line.get_label()) for line in lines])
    figure.savefig(path, dpi=120)


def neighbours(
    dataset: Dataset, features: tuple[Tensor, Tensor], path: Path, rows: int = 10, columns: int = 9
) -> None:
    """Test images and their nearest training images by cosine; images of another class have a red frame."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    train, test = (F.normalize(f, dim=1) for f in features)
    queries = torch.linspace(0, len(test) - 1, min(rows, len(test))).long()
    nearest = (test[queries] @ train.T).topk(min(columns, len(train)), dim=1).indices
    _, height, width = dataset.train.shape
    gap = 1 + width // 16
    cell = width + gap  # a row is its query, an empty half cell, and the neighbours
    canvas = torch.ones(len(queries) * (height + gap), nearest.shape[1] * cell + cell + cell // 2, 3)
    figure = Figure(
        figsize=(0.7 * canvas.shape[1] / cell, 0.7 * canvas.shape[0] / cell + 0.4), layout="constrained"
    )
    axes = figure.subplots()
    rows_of = zip(queries.tolist(), nearest.tolist(), strict=True)
    tests = dataset.test.squares(queries[:, None], CPU)
    trains = dataset.train.squares(nearest, CPU)
    for i, ((query, found), first, others) in enumerate(zip(rows_of, tests, trains, strict=True)):
        for j, picture in enumerate([*first, *others]):
            top, left = i * (height + gap), j * cell + (cell // 2 if j else 0)
            pixels = picture.expand(3, -1, -1)[:3] if len(picture) == 1 else picture[:3]
            canvas[top : top + height, left : left + width] = pixels.permute(1, 2, 0)
            if j and _differ(dataset, query, found[j - 1]):
                corner = (left - 0.5 - gap / 4, top - 0.5 - gap / 4)
                axes.add_patch(
                    Rectangle(corner, width + gap / 2, height + gap / 2, fill=False, color="tab:red", lw=2)
                )
    axes.imshow(canvas.numpy())
    axes.set_title("test image, then its nearest training images", fontsize=8, loc="left")
    axes.set_axis_off()
    figure.savefig(path, dpi=120)


def pictures(titles: Sequence[str], columns: Sequence[Tensor], path: Path) -> None:
    """Columns of float images [N, C, h, w] in [0, 1] beside each other, an image in each row."""
    from matplotlib.figure import Figure

    height, width = (max(x.shape[i] for x in columns) for i in (2, 3))
    gap = 1 + width // 16
    framed = [
        F.pad(
            x.clamp(0, 1).expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3].clamp(0, 1),
            (0, width + gap - x.shape[3], 0, height + gap - x.shape[2]),
            value=1,
        )
        for x in columns
    ]
    canvas = torch.cat([x.permute(0, 2, 3, 1).flatten(0, 1) for x in framed], dim=1)
    cell = width + gap
    figure = Figure(figsize=(1.6 * len(columns), 1.6 * canvas.shape[0] / cell + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(canvas.cpu().numpy())
    for i, title in enumerate(titles):
        axes.text(i * cell + width / 2, -gap, title, ha="center", va="bottom", fontsize=8)
    axes.set_axis_off()
    figure.savefig(path, dpi=120)


def _differ(dataset: Dataset, test: int, train: int) -> bool:
    if dataset.train.labels is None or dataset.test.labels is None:
        return False
    return bool(dataset.train.labels[train] != dataset.test.labels[test])
