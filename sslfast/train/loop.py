"""The training loop that every method shares."""

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from sslfast.train import (
    augment,
    batchnorm,
    checkpoint,
    config,
    evaluate,
    methods,
    optim,
    processes,
    report,
    sources,
)
from sslfast.train.budget import Budget, phase, running
from sslfast.train.config import TrainConfig
from sslfast.train.data import in_one_copy
from sslfast.train.log import Log, wandb
from sslfast.train.methods import Method, Now
from sslfast.train.monitor import CollapseMonitor
from sslfast.train.parallel import Parallel
from sslfast.train.run import VIEWS, WEIGHTS, Interruption, Run


def train(method: str, cfg: TrainConfig) -> Path:
    """Trains, evaluates, and leaves the run in `cfg.out`.

    All processes of torch.distributed's default group call it, if there is one. Each trains on its part of
    every batch, and the first one's `cfg` is that of all; it alone speaks, writes and evaluates.

    Raises:
        ValueError: an option, the data or the run to resume is not what it should be; nothing was started.
        FloatingPointError: the loss is not finite.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the state was saved.
        ConnectionError: another process was lost.
    """
    command = f"{processes.launcher()}sslfast train {method} --out {shlex.quote(str(cfg.out))} --resume"
    with processes.watched(command):
        return _train(method, processes.first(cfg), command)


def _train(method: str, cfg: TrainConfig, command: str) -> Path:
    rank, parts = processes.rank(), processes.processes()
    console = Console(quiet=True, force_terminal=False) if rank else Console()
    with processes.together():
        if cfg.wandb:
            wandb()
        device = cfg.resolve_device()
        dataset = sources.load(cfg.data, cfg.image_size, cfg.memory())
        count, (channels, size, _) = len(dataset.train), dataset.train.shape
        batch_size = min(cfg.batch_size, count)
        steps = count // (batch_size * cfg.accumulate)  # a smaller last batch has fewer negatives: left out
        if not steps:
            most = count // batch_size
            raise ValueError(f"accumulate: expected at most {most} for {count} images, got {cfg.accumulate}")
        if batch_size % parts:
            raise ValueError(f"batch_size: expected one that {parts} processes can share, got {batch_size}")
        if cfg.knn_every and (dataset.train.labels is None or not len(dataset.test)):
            raise ValueError("knn_every: expected 0 for data without labels or test images")
        model = build(method, cfg, channels, size).to(device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        views = model.views(cfg, channels, size)
        fingerprint = [count, channels, size, dataset.train.fingerprint()]
    if rank:
        checkpoint.reseed(cfg.seed, rank, 0)  # the first goes on as if it were alone
    own = slice(batch_size // parts * rank, batch_size // parts * (rank + 1))  # of each batch
    total, peak = cfg.epochs * steps, cfg.resolve_learning_rate(batch_size * cfg.accumulate)
    update, monitor, budget = Update(model, cfg, device), CollapseMonitor(), Budget(device)
    log = Log(cfg.out, console, total, budget, {"method": method, **config.values(cfg)} if cfg.wandb else {})
    kept = {"model": model, "update": update, "monitor": monitor, "log": log}
    run = Run(method, cfg, fingerprint, device, kept, console)
    done = run.start()

    console.print(
        f"{method} on {cfg.data}: {count} images of {channels}x{size}x{size}, {cfg.epochs} epochs of {steps} "
        f"steps of {batch_size * cfg.accumulate}, {cfg.backbone} on {device}"
        + (f", {parts} processes" if parts > 1 else "")
    )
    began, images = time.perf_counter(), dataset.train.to(device)
    rows = partial(rows_of_run, cfg, count, batch_size, own, done)
    batches, ids = images.batches(rows(images.device), device, cfg.workers), rows(device)
    with log, closing(batches), running(budget), Interruption(command) as interruption:
        for epoch in range(done // steps, cfg.epochs):
            model.train()
            seed = augment.epoch_seed(cfg.seed, epoch)
            for step in range(done, (epoch + 1) * steps):
                rate = peak * optim.rate_at(cfg.schedule, step, cfg.warmup_epochs * steps, total)
                optim.set_rate(update.optimizer, rate)
                model.schedule(Now(step, total, steps), update.optimizer.param_groups)
                with phase("ema"):
                    model.before_step()
                for _ in range(cfg.accumulate):
                    with phase("data"):
                        batch = next(batches)
                    with phase("augment"):
                        seen = views(batch, next(ids), seed)
                    if not (done or update.batches or rank):
                        log.show(batch, seen, VIEWS)
                    loss, metrics = update.backward(seen)
                    monitor.update(metrics.pop("embeddings"), metrics.pop("targets", None))
                    log.add({"loss": loss, **metrics}, batch_size)
                log.add(update.step())
                log.live(done := step + 1, rate)
                stop, due = processes.agreed(interruption.requested, run.due())
                if done % steps and (stop or due):
                    with log.paused():
                        run.save(done)
                    interruption.stop_here(stop)
            measured = monitor.read()
            if cfg.knn_every and (epoch + 1) % cfg.knn_every == 0:
                with log.paused():
                    measured["knn"] = evaluate.online_knn(model.encoder, dataset, device, cfg.workers)
            log.end_epoch(rate, measured, monitor.warning(log.means()))
            monitor.reset()
            with log.paused():
                run.save(done)
            interruption.stop_here(*processes.agreed(interruption.requested))
    if rank:
        return cfg.out
    console.print(f"trained for {time.perf_counter() - began:.0f} s")
    weights = {name: checkpoint.on_cpu(tensor) for name, tensor in model.state_dict().items()}
    checkpoint.write(cfg.out / WEIGHTS, weights)
    log.write()
    report.loss_curve(log.rows, cfg.out / "loss.png")
    try:
        evaluate.run(method, cfg, dataset, console)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"trained; to evaluate: sslfast eval {shlex.quote(str(cfg.out))}") from None
    return cfg.out


def build(method: str, cfg: TrainConfig, channels: int, size: int) -> Method:
    """The method's module for images [channels, size, size], with the weights of its seed."""
    torch.manual_seed(cfg.seed)
    model = methods.module(method).build(cfg, channels, size)
    if cfg.sync_batchnorm and processes.processes() > 1:
        on_gpu = cfg.resolve_device().type == "cuda"
        batchnorm.synchronize(model, nn.SyncBatchNorm if on_gpu else batchnorm.SyncBatchNorm)
    return model


def order(count: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """The rows of each batch of an epoch: a random order that depends on seed and epoch alone."""
    permutation = np.random.default_rng((seed, epoch)).permutation(count)
    return torch.from_numpy(permutation).split(batch_size)


def rows_of_run(
    cfg: TrainConfig, count: int, batch_size: int, own: slice, done: int, device: torch.device
) -> Iterator[Tensor]:
    """A process's rows of each batch after `done` updates, to the end of the run, on the device."""
    steps = count // (batch_size * cfg.accumulate)
    for epoch in range(done // steps, cfg.epochs):
        whole = order(count, batch_size, cfg.seed, epoch)[: steps * cfg.accumulate]
        first = max(0, done - epoch * steps) * cfg.accumulate
        yield from in_one_copy([part[own] for part in whole[first:]], device)


class Update:
    """One update of a method's weights: `backward` for each of the accumulated batches, then `step`.

    The gradient is the mean over the batches. Each batch is a loss of its own: its negatives are its own
    images. Of several processes each has a part of every batch, and the last `backward` averages their
    gradients. Neither function reads from the device, so that both can be captured in one CUDA graph; with
    float16 and LARS, torch's GradScaler reads whether gradients overflowed.
    """

    def __init__(self, model: Method, cfg: TrainConfig, device: torch.device) -> None:
        self.model, self.accumulate, self.clip_norm = model, cfg.accumulate, cfg.clip_norm
        self.optimizer = optim.build(cfg.optimizer, model.parameter_groups(cfg.weight_decay), device)
        dtype = cfg.resolve_precision(device)
        self.autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.training_step = torch.compile(model.training_step) if cfg.compile else model.training_step
        self.parallel = Parallel(model, self.training_step) if processes.processes() > 1 else None
        self.batches = 0  # of this update so far

    def backward(self, views: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        self.batches += 1
        last = self.batches == self.accumulate
        with self.parallel.averaging(last) if self.parallel else nullcontext(self.training_step) as step:
            with self.autocast(), phase("forward"):
                loss, metrics = step(views)
            with phase("backward"):
                self.scaler.scale(loss / self.accumulate).backward()
        return loss.detach(), metrics

    def step(self) -> dict[str, Tensor]:
        """Clips if asked to, updates, and returns metrics."""
        metrics, self.batches = {}, 0
        with phase("optimizer"):
            if self.clip_norm:
                self.scaler.unscale_(self.optimizer)
                metrics["grad_norm"] = self.model.clip(self.clip_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        with phase("ema"):
            self.model.after_step()
        return metrics

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        optim.load_state(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
