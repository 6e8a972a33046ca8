"""What a run tells while it trains: live progress, metrics.csv and TensorBoard."""

import csv
import importlib
import io
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sslfast.train import report
from sslfast.train.augment import squares
from sslfast.train.budget import PAUSE, PHASES, Budget
from sslfast.train.checkpoint import write_text
from sslfast.train.data import Images
from sslfast.train.processes import everywhere, processes, rank, summed

SHOWN = 8
"""Images of which views are drawn."""
LIVE = 0.5
"""Seconds between two readings of the loss, each of which waits for the device."""


class Log:
    """One row of metrics per epoch, and a bar in a terminal, otherwise a line per epoch.

    Rows are kept, and metrics.csv is written anew and atomically, so that a resumed run's file has no row
    twice. Several processes have one each, of which the first tells what all of them measure, and how long
    its own phases took.
    """

    def __init__(
        self, out: Path, console: Console, total: int, budget: Budget, online: dict[str, Any] | None = None
    ) -> None:
        """online: options of a run whose metrics Weights & Biases get too, in the project online["wandb"]."""
        self.out, self.console, self.budget, self.online = out, console, budget, online
        self.id = uuid.uuid4().hex[:12]  # Weights & Biases know a run by it that goes on
        self._online: Any = None
        self.rows: list[dict[str, float]] = []
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._warned = False  # in the epoch before: a warning that stays is said once
        self._task = self._bar.add_task("train", total=total, epoch=1, text="")
        self.begin_epoch()

    def __enter__(self) -> "Log":
        self._board = None
        if rank():
            return self
        with self._disk_may_be_full("TensorBoard events"):
            self._board = _tensorboard(self.out, purge_step=len(self.rows) + 1)
        if self.online:
            with self._may_fail():
                self._online = wandb().init(
                    project=self.online["wandb"], dir=self.out, id=self.id, name=self.out.name,
                    config=self.online, resume="allow",
                )  # fmt: skip
        self._bar.start()
        self._began = self._shown = time.perf_counter()
        self.budget.restart()
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self._bar.stop()
        with self._disk_may_be_full("TensorBoard events"):
            if self._board:
                self._board.close()
        if self._online:
            with self._may_fail():
                self._online.finish(exit_code=int(kind is not None))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within is not training: neither throughput nor the time budget have it."""
        began = time.perf_counter()
        with self.budget.phase(PAUSE):
            yield
        self._began += time.perf_counter() - began

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        """Weights & Biases, whatever goes wrong there, stop no run."""
        try:
            yield
        except Exception as error:
            self._online = None
            self.console.print(
                f"[bold red]warning:[/] Weights & Biases: {type(error).__name__}: {error}", highlight=False
            )

    def begin_epoch(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._images, self._elapsed = 0, 0.0
        self._began = self._shown = time.perf_counter()
        self.budget.reset()

    def add(self, metrics: dict[str, Tensor], images: int = 0) -> None:
        """Values to average over the epoch, and how many images they came from."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.detach().double()
            self._counts[name] = self._counts.get(name, 0) + 1
        self._images += images

    def means(self) -> dict[str, float]:
        """Means of the epoch so far, over all processes, which all call it.

        Raises:
            FloatingPointError: the mean loss is not finite.
        """
        means = self._averages(self._of_all())
        if not abs(means["loss"]) < float("inf"):
            problem = f"the loss is {means['loss']} in epoch {len(self.rows) + 1}"
            advice = "try a lower --learning-rate, or --precision float32"
            raise everywhere(FloatingPointError(f"{problem}; {advice}"))
        return means

    def _averages(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return {name: float(total) / self._counts[name] for name, total in sums.items()}

    def _of_all(self) -> dict[str, Tensor]:
        """The sums of all processes, divided by how many there are."""
        if processes() == 1 or not self._sums:
            return self._sums
        means = summed(torch.stack(list(self._sums.values()))) / processes()
        return dict(zip(self._sums, means.unbind(), strict=True))

    def check(self) -> None:
        """Raises FloatingPointError as `means` does."""
        if self._sums:
            self.means()

    def live(self, step: int, rate: float) -> None:
        now = time.perf_counter()
        if now - self._shown >= LIVE and self.console.is_terminal:
            self._shown = now
            means = self.means() if processes() == 1 else self._averages(self._sums)  # waits for no other
            row = {**means, "learning_rate": rate, **self._speed()}
            text = f"{self._text(row)}\n{self._budget(row)}"
            self._bar.update(self._task, completed=step, epoch=len(self.rows) + 1, text=text)

    def end_epoch(self, rate: float, measured: dict[str, float], warning: str | None = None) -> None:
        row = {
            "epoch": len(self.rows) + 1,
            **self.means(),
            **measured,
            "learning_rate": rate,
            **self._speed(),
        }
        self.rows.append(row)
        if rank() == 0:
            self._tell(row, warning)
        self.begin_epoch()

    def _tell(self, row: dict[str, float], warning: str | None) -> None:
        self.write()
        with self._disk_may_be_full("TensorBoard events"):
            if self._board:
                for name, value in row.items():
                    self._board.add_scalar(name, value, row["epoch"])
                self._board.flush()
        if self._online:
            with self._may_fail():
                self._online.log(row, step=int(row["epoch"]))
        if not self.console.is_terminal:
            print(f"epoch {row['epoch']}: {self._text(row)}  {self._budget(row)}", flush=True)
        if warning and not self._warned:
            self.console.print(f"[bold red]warning:[/] {warning}", highlight=False)
        self._warned = bool(warning)

    def write(self) -> None:
        """Writes metrics.csv, of all epochs, so that one that could not be written is not lost."""
        with self._disk_may_be_full("metrics.csv"):
            write_csv(self.rows, self.out / "metrics.csv")

    @contextmanager
    def _disk_may_be_full(self, what: str) -> Iterator[None]:
        """What cannot be written stops no run."""
        try:
            yield
        except OSError as error:
            self.console.print(f"[bold red]warning:[/] could not write {what}: {error}", highlight=False)

    def show(self, images: Images, views: Sequence[Tensor], name: str) -> None:
        """Draws some images of a batch and the views that are made of each."""
        rows = slice(SHOWN)
        titles = ["image", *(f"view {i + 1}" for i in range(len(views)))]
        columns = [squares(images[rows], max(views[0].shape[-2:])), *(view[rows] for view in views)]
        with self.paused(), self._disk_may_be_full(name):
            report.pictures(titles, [x.float().cpu() for x in columns], self.out / name)

    def _speed(self) -> dict[str, float]:
        seconds = self._elapsed + time.perf_counter() - self._began
        return {
            "images_per_second": self._images / seconds,
            "seconds": seconds,
            **{f"time_{name}": share for name, share in self.budget.shares().items()},
        }

    @staticmethod
    def _text(row: dict[str, float]) -> str:
        knn = f"kNN {row['knn']:.3f}  " if "knn" in row else ""
        return (
            f"loss {row['loss']:.3f}  {knn}lr {row['learning_rate']:.2g}  "
            f"{row['images_per_second']:.0f} images/s"
        )

    @staticmethod
    def _budget(row: dict[str, float]) -> str:
        """Of the time, phases of a hundredth or more."""
        shares = {name: f"{row[f'time_{name}']:.0%}" for name in PHASES}
        return ", ".join(
            f"{name} {share}" for name, share in shares.items() if share != "0%" or name == "data"
        )

    def state_dict(self) -> dict:
        """Of all processes, which all call it."""
        return {
            "id": self.id,
            "rows": self.rows,
            "sums": self._of_all(),
            "counts": self._counts,
            "images": self._images,
            "phases": self.budget.state_dict(),
            "elapsed": self._elapsed + time.perf_counter() - self._began,
        }

    def load_state_dict(self, state: dict) -> None:
        self.id = state.get("id", self.id)
        self.rows, self._sums, self._counts = state["rows"], state["sums"], state["counts"]
        self._images, self._elapsed = state["images"], state["elapsed"]
        self.budget.load_state_dict(state.get("phases", {}))


def write_csv(rows: list[dict[str, float]], path: Path) -> None:
    """One line per row under the names of all; a value that a row lacks is left blank."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_text(path, text.getvalue())


def _tensorboard(out: Path, purge_step: int):
    """A writer where TensorBoard is installed. Steps from purge_step on are dropped."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=purge_step)


def wandb() -> Any:
    """The package; raises ValueError where it is not installed."""
    try:
        module = importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(f"wandb: needs the package wandb: {error}") from error
    if not hasattr(module, "init"):  # a folder of that name
        raise ValueError(f"wandb: needs the package wandb, found {list(module.__path__)}")
    return module
