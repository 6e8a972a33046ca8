"""The training loop that every method shares: batches, views, steps, progress and the run folder."""

import csv
import os
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import nn

from sslfast.train import augment, config, data, evaluate, models, optim, report
from sslfast.train.config import SimCLRConfig, TrainConfig
from sslfast.train.methods import Method
from sslfast.train.methods.simclr import SimCLR

METRICS = ("epoch", "loss", "feature_std", "learning_rate", "images_per_second", "data_wait", "seconds")


def build(method: str, cfg: TrainConfig, channels: int) -> Method:
    """The method's module with the weights of its seed, before any training."""
    torch.manual_seed(cfg.seed)
    encoder = models.backbone(cfg.backbone, channels)
    assert method == "simclr" and isinstance(cfg, SimCLRConfig), method
    return SimCLR(encoder, encoder.dim, cfg.projection_dim, cfg.temperature)


def train(method: str, cfg: TrainConfig) -> Path:
    """Trains, evaluates, and leaves the run in `cfg.out`."""
    console = Console()
    device = cfg.resolve_device()
    dataset = data.load(cfg.data, cfg.image_size)
    batch_size = min(cfg.batch_size, len(dataset.train))
    _start_run(method, cfg)

    images = dataset.train.images.to(device)
    channels, size = images.shape[1], images.shape[2]
    model = build(method, cfg, channels).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    views = augment.two_views(cfg.resolve_augment(), size, channels).to(device)
    optimizer = optim.build(cfg.optimizer, model, cfg.learning_rate, cfg.weight_decay)
    steps = (
        len(images) // batch_size
    )  # the last, smaller batch is left out: fewer negatives, another loss scale
    warmup, total = cfg.warmup_epochs * steps, cfg.epochs * steps
    order = torch.Generator().manual_seed(cfg.seed)

    console.print(
        f"{method} on {cfg.data}: {len(images)} images of {channels}x{size}x{size}, {cfg.epochs} epochs of "
        f"{steps} steps of {batch_size}, {cfg.backbone} on {device}"
    )
    started = time.perf_counter()
    with _Log(console, cfg.out / "metrics.csv", total) as log:
        for epoch in range(cfg.epochs):
            model.train()
            log.begin_epoch(epoch)
            for step, rows in enumerate(
                torch.randperm(len(images), generator=order).split(batch_size)[:steps]
            ):
                rate = cfg.learning_rate * optim.warmup_cosine(epoch * steps + step, warmup, total)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                with log.waiting():
                    batch = images[rows.to(device)].float().div_(255)
                    pair = views(batch).contiguous(memory_format=torch.channels_last)
                with autocast(device):
                    loss, metrics = model.training_step(pair)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                log.step(loss, metrics, rate, len(rows))
            log.end_epoch()
            save_weights(model, cfg.out / "weights.safetensors")
    console.print(f"trained {cfg.epochs} epochs in {time.perf_counter() - started:.0f} s")
    evaluate.run(method, cfg, dataset, console)
    report.loss_curve(cfg.out / "metrics.csv", cfg.out / "loss.png")
    return cfg.out


def autocast(device: torch.device) -> AbstractContextManager:
    """bfloat16 on a GPU and on a CPU with AMX, where it is faster; otherwise float32."""
    if device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_amx_tile_supported()):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes the state as safetensors, whole or not at all."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    temporary = path.with_suffix(".tmp")
    save_file(state, temporary)
    os.replace(temporary, path)


def _start_run(method: str, cfg: TrainConfig) -> None:
    if (cfg.out / "config.json").exists():
        if not cfg.overwrite:
            raise ValueError(f"out: {cfg.out} already holds a run; expected a new folder or --overwrite")
        shutil.rmtree(cfg.out)
    elif cfg.out.exists() and (not cfg.out.is_dir() or any(cfg.out.iterdir())):
        raise ValueError(f"out: expected a new or empty folder, got {cfg.out}")
    cfg.out.mkdir(parents=True, exist_ok=True)
    config.save(method, cfg, cfg.out / "config.json")


class _Log:
    """metrics.csv, one row an epoch, and live progress: a bar in a terminal, otherwise a line an epoch."""

    def __init__(self, console: Console, path: Path, total: int) -> None:
        self._console, self._path = console, path
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, epoch=0, text="")

    def __enter__(self) -> "_Log":
        self._file = self._path.open("w", newline="")
        self._rows = csv.DictWriter(self._file, METRICS)
        self._rows.writeheader()
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()
        self._file.close()

    def begin_epoch(self, epoch: int) -> None:
        self._epoch, self._images, self._waited, self._steps = epoch, 0, 0.0, 0
        self._sums: dict[str, torch.Tensor] = {}
        self._began = time.perf_counter()

    def waiting(self) -> AbstractContextManager:
        """Time spent in this context counts as waiting for data."""
        return _Stopwatch(self)

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def step(self, loss: torch.Tensor, metrics: dict[str, torch.Tensor], rate: float, images: int) -> None:
        for name, value in {"loss": loss.detach(), **metrics}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._rate, self._images, self._steps = rate, self._images + images, self._steps + 1
        self._bar.update(self._task, advance=1, epoch=self._epoch + 1)

    def end_epoch(self) -> None:
        means = {name: float(total) / self._steps for name, total in self._sums.items()}
        if not means["loss"] < float("inf"):
            raise FloatingPointError(
                f"the loss is {means['loss']} in epoch {self._epoch + 1}; try a lower --learning-rate"
            )
        seconds = time.perf_counter() - self._began
        row = {
            "epoch": self._epoch + 1,
            **means,
            "learning_rate": self._rate,
            "images_per_second": self._images / seconds,
            "data_wait": self._waited / seconds,
            "seconds": seconds,
        }
        self._rows.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self._file.flush()
        text = (
            f"loss {means['loss']:.3f}  lr {self._rate:.2g}  {row['images_per_second']:.0f} images/s  "
            f"data {row['data_wait']:.0%}"
        )
        self._bar.update(self._task, text=text)
        if not self._console.is_terminal:
            print(f"epoch {self._epoch + 1}: {text}", flush=True)


class _Stopwatch:
    def __init__(self, log: _Log) -> None:
        self._log = log

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_) -> None:
        self._log.waited(time.perf_counter() - self._began)
