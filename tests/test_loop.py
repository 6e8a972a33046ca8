"""The loop: what it asks of a method, precisions, no reads from the device, what it tells."""

import csv
import io
import re
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_runs import config, timeless, weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sslfast.train import checkpoint, loop, optim
from sslfast.train import log as log_module
from sslfast.train.methods import Method, Now
from sslfast.train.methods.simclr import Config as SimCLRConfig
from sslfast.train.methods.simclr import SimCLR

CPU = torch.device("cpu")


# What the loop asks of a method.


class Watched(Method):
    """Notes what is called; its loss pulls the embeddings of all images together."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(144, 8))
        self.events: list[str] = []
        self.register_buffer("momentum", torch.zeros(()))

    def schedule(self, now: Now, groups: list[dict]) -> None:
        self.events.append(f"schedule {now.step}/{now.total} {now.epoch} {len(groups)}")
        self.momentum.fill_(now.step / now.total)

    def training_step(self, views):
        self.events.append(f"training_step {len(views)} {self.training}")
        z = self.encoder(torch.cat(tuple(views)))
        return -nn.functional.normalize(z, dim=1).mean(0).norm(), {
            "embeddings": z,
            "extra": z.detach().mean(),
        }

    def after_step(self) -> None:
        self.events.append("after_step")


def test_calls_come_in_the_order_that_methods_rely_on(images, tmp_path, monkeypatch):
    method = Watched()
    monkeypatch.setattr(loop, "build", lambda *_: method)
    loop.train("simclr", config(tmp_path / "run", images, accumulate=2, epochs=2))
    train = [event for event in method.events]
    expected = []
    for step in range(4):
        expected += [f"schedule {step}/4 {step / 2} 2", *["training_step 2 True"] * 2, "after_step"]
    assert train == expected
    assert ",extra," in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]


def test_a_provoked_collapse_is_said_once_in_words(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "build", lambda *_: Watched())
    cfg = config(tmp_path / "run", images, epochs=30, learning_rate=0.05)
    loop.train("simclr", cfg)
    printed = capsys.readouterr().out.replace("\n", " ")
    assert printed.count("warning: the embeddings have collapsed") == 1
    last = dict(zip(*(line.split(",") for line in np.take(timeless(cfg), [0, -1])), strict=True))
    assert float(last["feature_std"]) < 0.03 and float(last["effective_rank"]) < 1.6


def test_healthy_training_raises_no_alarm(images, tmp_path, capsys):
    loop.train("simclr", config(tmp_path / "run", images))
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("count, batch_size", [(10, 3), (8, 8)])
def test_order_depends_on_seed_and_epoch_alone(count, batch_size):
    def rows(seed, epoch):
        return torch.cat(loop.order(count, batch_size, seed, epoch))

    first = rows(0, 0)
    torch.rand(3)
    assert torch.equal(first, rows(0, 0)) and torch.equal(first.sort().values, torch.arange(count))
    assert not any(torch.equal(first, rows(*other)) for other in ((1, 0), (0, 1), (1 << 31, 0)))


# Precision, compilation, capture.


@pytest.mark.parametrize("precision, dtype", [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_autocast(precision, dtype, images, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        SimCLR,
        "training_step",
        lambda self, views, step=SimCLR.training_step: (
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
            or step(self, views)
        ),
    )
    cfg = config(tmp_path / "run", images, precision=precision)
    loop.train("simclr", cfg)
    assert set(seen) == {dtype}
    assert all(value.dtype in (torch.float32, torch.int64) for value in weights(cfg).values())
    scaler = checkpoint.load(cfg.out / "checkpoint.safetensors")["update"]["scaler"]
    assert bool(scaler) == (precision == "float16")


def test_compile_trains_like_eager(images, tmp_path):
    # SGD: AdamW divides gradients by their size, so that roundings decide the sign of steps where they vanish
    options = {"epochs": 1, "augment": "mnist", "optimizer": "sgd", "learning_rate": 0.003}
    runs = [config(tmp_path / str(c), images, compile=c, **options) for c in (False, True)]
    untrained = dict(loop.build("simclr", runs[0], 1, 12).named_parameters())
    for cfg in runs:
        loop.train("simclr", cfg)
    start, eager, compiled = (
        torch.cat([x[name].detach().flatten() for name in untrained])
        for x in (untrained, *map(weights, runs))
    )
    assert (compiled - eager).norm() < 0.05 * (eager - start).norm()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_an_update_reads_nothing_from_the_device(optimizer, clip_norm, tmp_path):
    """A fake tensor has no numbers: reading one, which no CUDA graph could capture either, raises."""
    cfg = SimCLRConfig(
        out=tmp_path, optimizer=optimizer, clip_norm=clip_norm, accumulate=2, precision="float32"
    )
    with FakeTensorMode():
        model = loop.build("simclr", cfg, 1, 12)
        update = loop.Update(model, cfg, CPU)
        for _ in range(2):
            model.schedule(Now(0, 2, 1), update.optimizer.param_groups)
            for _ in range(2):
                loss, metrics = update.backward(tuple(torch.rand(2, 4, 1, 12, 12)))
            update.step()
        with pytest.raises(Exception, match="local_scalar_dense"):
            float(loss)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_an_update_can_be_captured_in_a_cuda_graph(optimizer, tmp_path):
    cfg = SimCLRConfig(
        out=tmp_path, optimizer=optimizer, clip_norm=1.0, precision="float32", learning_rate=0.01
    )
    device, batches = torch.device("cuda"), torch.rand(8, 2, 16, 1, 12, 12, device="cuda")
    results = []
    for captured in (False, True):
        model = loop.build("simclr", cfg, 1, 12).to(device)
        update, static = loop.Update(model, cfg, device), batches[0].clone()

        def step(update=update, static=static):
            loss, _ = update.backward(tuple(static))
            update.step()
            return loss

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # the first updates run as they are
            for i in range(3):
                optim.set_rate(update.optimizer, 0.01)
                static.copy_(batches[i])
                step()
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
        for i in range(3, 8):
            optim.set_rate(update.optimizer, 0.01 / i)
            static.copy_(batches[i])
            step()
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5)


def test_the_loop_reads_on_one_screen():
    folder = Path(loop.__file__).parent
    lines = {
        path: len(path.read_text().splitlines())
        for path in [folder / "loop.py", *folder.glob("methods/*.py")]
    }
    assert lines.pop(folder / "loop.py") < 250
    assert lines and max(lines.values()) < 120


# Progress.


def test_live_progress_in_a_terminal(images, tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(loop, "Console", lambda: Console(file=screen, force_terminal=True, width=160))
    monkeypatch.setattr(log_module, "LIVE", 0.0)
    loop.train("simclr", config(tmp_path / "run", images))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"epoch 2 .* [1-8]/8 +loss \d\.\d+ +lr \S+ +\d+ images/s +\d:\d\d:\d\d", shown)
    assert re.search(r"^ +data \d+%, (\w+ \d+%, )*forward \d+%, (\w+ \d+%(, )?)+ *$", shown, re.M)


def test_quiet_without_a_terminal(images, tmp_path, capsys):
    loop.train("simclr", config(tmp_path / "run", images))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2 and re.fullmatch(
        r"epoch 1: loss \d\.\d+  lr \S+  \d+ images/s  data \d+%(, [a-z]+ \d+%)+", lines[0]
    )


class FakeWandb(types.ModuleType):
    """What the loop uses of Weights & Biases."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls, self.rows, self.finished = [], [], []

    def init(self, **options):
        self.calls.append(options)
        return self

    def log(self, row, step):
        self.rows.append((step, row))

    def finish(self, exit_code):
        self.finished.append(exit_code)


def test_weights_and_biases_where_they_are_installed(images, tmp_path, monkeypatch, interrupt):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    cfg = config(tmp_path / "run", images, epochs=3, wandb="digits")
    with monkeypatch.context() as context:
        context.setattr(loop.Update, "step", loop.Update.step)
        interrupt(6)
        with pytest.raises(KeyboardInterrupt):
            loop.train("simclr", cfg)
    loop.train("simclr", config(cfg.out, images, epochs=3, wandb="digits", resume=True))
    first, second = fake.calls
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["project"] == "digits"
    assert first["config"]["method"] == "simclr" and first["config"]["epochs"] == 3
    assert [step for step, _ in fake.rows] == [1, 2, 3] and fake.finished == [1, 0]
    assert {"loss", "learning_rate", "time_loss"} <= set(fake.rows[0][1])
    loop.train("simclr", config(tmp_path / "other", images))
    assert len(fake.calls) == 2
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    sys.modules["wandb"].__path__ = ["a folder"]
    with pytest.raises(ValueError, match="^wandb: needs the package wandb, found"):
        loop.train("simclr", config(tmp_path / "third", images, wandb="digits"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="^wandb: needs the package wandb"):
        loop.train("simclr", config(tmp_path / "third", images, wandb="digits"))
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("what", ["init", "log", "finish"])
def test_weights_and_biases_stop_no_run(what, images, tmp_path, monkeypatch, capsys):
    fake = FakeWandb()

    def failing(**_):
        raise RuntimeError("not logged in")

    setattr(fake, what, failing if what != "log" else lambda *_, **__: failing())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    cfg = config(tmp_path / "run", images, wandb="digits")
    loop.train("simclr", cfg)
    assert capsys.readouterr().out.count("Weights & Biases: RuntimeError: not logged in") == 1
    assert len(timeless(cfg)) == 3 and weights(cfg)


def test_only_training_is_timed(class_folder, tmp_path, monkeypatch):
    """Not the kNN accuracy, checkpoints, what is drawn, or what precedes the first update."""

    def slowed(function):
        def slow(*args, **kwargs):
            time.sleep(1.5)
            return function(*args, **kwargs)

        return slow

    monkeypatch.setattr(loop.evaluate, "online_knn", slowed(loop.evaluate.online_knn))
    monkeypatch.setattr(loop.Run, "save", slowed(loop.Run.save))
    monkeypatch.setattr(log_module.report, "pictures", slowed(log_module.report.pictures))
    monkeypatch.setattr(log_module, "_tensorboard", slowed(log_module._tensorboard))
    cfg = config(tmp_path / "run", f"folder:{class_folder}", image_size=16, knn_every=1, epochs=2)
    loop.train("simclr", cfg)
    for row in csv.DictReader((cfg.out / "metrics.csv").open()):
        assert float(row["seconds"]) < 1.4 and float(row["time_forward"]) > 0.05


def test_tensorboard_has_each_epoch_once(images, tmp_path, monkeypatch, interrupt):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = config(tmp_path / "run", images, epochs=3)
    interrupt(6)
    with pytest.raises(KeyboardInterrupt):
        loop.train("simclr", cfg)
    monkeypatch.undo()
    time.sleep(1.1)  # within one process, TensorBoard orders its files by the second in their names
    loop.train("simclr", config(cfg.out, images, epochs=3, resume=True))
    events = EventAccumulator(str(cfg.out / "tensorboard")).Reload()
    assert {"loss", "effective_rank", "learning_rate", "time_data"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
