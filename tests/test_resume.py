"""Resuming: bitwise, after any interruption or failure, and only what is this run."""

import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import assert_same_weights, config, timeless, weights
from train_processes import noted_views

from sslfast.cli import main
from sslfast.train import checkpoint, loop
from sslfast.train import log as log_module
from sslfast.train.methods.simclr import SimCLR
from sslfast.train.run import Interruption
from sslfast.train.vit import SIZES

CPU = torch.device("cpu")


# Resuming.


@pytest.mark.parametrize(
    "after, changes",
    [
        (3, {}),
        (4, {}),  # at the end of an epoch
        (7, {"optimizer": "sgd", "clip_norm": 1.0}),
        (1, {"optimizer": "lars", "accumulate": 2}),  # 2 updates an epoch
        (3, {"precision": "float16"}),  # with the state of the scaler
        (5, {"precision": "bfloat16", "backbone": "vit_tiny", "patch_size": 4}),
    ],
    ids=["adamw", "epoch-end", "sgd", "lars-accumulate", "float16", "bfloat16-vit"],
)
def test_an_interrupted_run_goes_on_to_bitwise_the_same_weights(
    after, changes, images, tmp_path, monkeypatch, interrupt, capsys
):
    monkeypatch.setitem(SIZES, "vit_tiny", {"dim": 12, "depth": 1, "heads": 2})
    whole = config(tmp_path / "whole", images, **changes)
    loop.train("simclr", whole)
    cut = config(tmp_path / "cut", images, **changes)
    with monkeypatch.context() as context:
        context.setattr(loop.Update, "step", loop.Update.step)
        interrupt(after)
        with pytest.raises(
            KeyboardInterrupt, match=f"to go on: sslfast train simclr --out {cut.out} --resume"
        ):
            loop.train("simclr", cut)
        context.undo()
    monkeypatch.undo()
    monkeypatch.setitem(SIZES, "vit_tiny", {"dim": 12, "depth": 1, "heads": 2})
    assert not (cut.out / "weights.safetensors").exists()
    torch.manual_seed(99)  # the generators of another process
    np.random.seed(99)
    loop.train("simclr", config(tmp_path / "cut", images, **changes, resume=True))
    assert f"going on after update {after}" in capsys.readouterr().out
    assert_same_weights(weights(whole), weights(cut))
    assert timeless(whole) == timeless(cut) and len(timeless(cut)) == 3


def test_resuming_in_the_middle_of_an_epoch_of_decoded_images(class_folder, tmp_path, monkeypatch, interrupt):
    decoded = {"image_size": 16, "cache_gib": 0.0}
    runs = [config(tmp_path / name, f"folder:{class_folder}", workers=2, **decoded) for name in "ab"]
    loop.train("simclr", runs[0])
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        loop.train("simclr", runs[1])
    monkeypatch.undo()
    loop.train("simclr", config(runs[1].out, f"folder:{class_folder}", workers=1, resume=True, **decoded))
    assert_same_weights(weights(runs[0]), weights(runs[1]))


def test_views_go_on_whatever_was_drawn_before(images, tmp_path, interrupt):
    """In the middle of an epoch, with all random states lost; and each epoch has views of its own."""
    with noted_views() as whole:
        loop.train("simclr", config(tmp_path / "whole", images, augment="simclr"))
    cut = config(tmp_path / "cut", images, augment="simclr")
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        loop.train("simclr", cut)
    state = checkpoint.load(cut.out / "checkpoint.safetensors")
    torch.manual_seed(99)
    checkpoint.save(
        cut.out / "checkpoint.safetensors", {**state, "random": checkpoint.random_state(CPU), "done": 3}
    )
    with noted_views() as rest:
        loop.train("simclr", config(cut.out, images, augment="simclr", resume=True))
    assert len(rest) == 5 and all(torch.equal(*views) for views in zip(rest, whole[3:], strict=True))
    first, second = {}, {}
    for epoch, of_image in enumerate((first, second)):
        rows = torch.cat(loop.order(39, 8, 0, epoch)[:4]).tolist()
        of_image |= zip(rows, torch.cat(whole[4 * epoch :][:4], 1).unbind(1), strict=True)
    assert len(both := first.keys() & second.keys()) > 20
    assert not any(torch.equal(first[image], second[image]) for image in both)


def test_resuming_a_finished_run_only_evaluates(images, tmp_path, capsys):
    cfg = config(tmp_path / "run", images)
    loop.train("simclr", cfg)
    before = weights(cfg)
    (cfg.out / "loss.png").unlink()
    loop.train("simclr", config(cfg.out, images, resume=True))
    assert "going on after update 8" in capsys.readouterr().out
    assert_same_weights(before, weights(cfg))
    assert (cfg.out / "loss.png").exists()


def test_resuming_without_a_checkpoint_starts_from_the_beginning(images, tmp_path, capsys):
    cfg = config(tmp_path / "run", images, epochs=1, resume=True)
    loop.train("simclr", cfg)  # a job script may always say --resume
    assert "no checkpoint" in capsys.readouterr().out
    (cfg.out / "checkpoint.safetensors").unlink()
    loop.train("simclr", cfg)
    assert "no checkpoint" in capsys.readouterr().out and len(timeless(cfg)) == 2


def test_other_options_or_data_are_refused_by_name(images, tmp_path):
    cfg = config(tmp_path / "run", images, epochs=1)
    loop.train("simclr", cfg)
    for name, value in (
        ("batch_size", 6),
        ("seed", 1),
        ("optimizer", "sgd"),
        ("temperature", 0.3),
        ("epochs", 3),
    ):
        with pytest.raises(ValueError, match=f"resume: the run in .* has {name} = .*, got {value!r}"):
            loop.train("simclr", config(cfg.out, images, **{"epochs": 1, name: value}, resume=True))
    np.savez(images.removeprefix("npz:"), images=np.zeros((40, 12, 12), np.uint8))
    with pytest.raises(
        ValueError, match=r"resume: the run in .* has images = \[39, 1, 12, \d+\], got \[32, 1, 12, "
    ):
        loop.train("simclr", config(cfg.out, images, epochs=1, resume=True))


def test_a_truncated_checkpoint_is_refused_by_name(images, tmp_path):
    cfg = config(tmp_path / "run", images, epochs=1)
    loop.train("simclr", cfg)
    path = cfg.out / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="resume: .*checkpoint.safetensors is not a whole checkpoint"):
        loop.train("simclr", config(cfg.out, images, epochs=1, resume=True))


def test_another_number_of_threads_is_said(images, tmp_path, capsys, set_threads):
    cfg = config(tmp_path / "run", images, epochs=1)
    loop.train("simclr", cfg)
    set_threads(torch.get_num_threads() + 1)
    loop.train("simclr", config(cfg.out, images, epochs=1, resume=True))
    assert "will not end with bitwise" in capsys.readouterr().out.replace("\n", " ")


# Interruptions and failures.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_how_to_go_on(number, images, tmp_path, interrupt, monkeypatch, capsys):
    out = str(tmp_path / "run")
    interrupt(3, number)
    command = ["train", "simclr", "--data", images, "--out", out, "--epochs", "2", "--batch-size", "8"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--augment", "mnist"])
    assert stopped.value.code == 130
    said = capsys.readouterr().err
    monkeypatch.undo()
    main(re.search(r"to go on: sslfast (.*)", said)[1].split())
    assert "going on after update 3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "simclr", "--out", out, "--resume", "--batch-size", "4"])
    assert "has batch_size = 8, got 4" in capsys.readouterr().err


def test_a_second_signal_interrupts_at_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with Interruption("command") as interruption:
        interruption.stop_here()
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        with pytest.raises(KeyboardInterrupt, match="to go on: command"):
            interruption.stop_here()
    assert signal.getsignal(signal.SIGINT) is before


def test_checkpoints_within_an_epoch(images, tmp_path, monkeypatch):
    saved, save = [], checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda path, state: saved.append(state["done"]) or save(path, state)
    )
    loop.train("simclr", config(tmp_path / "a", images))
    assert saved == [4, 8]
    saved.clear()
    loop.train("simclr", config(tmp_path / "b", images, checkpoint_minutes=0))
    assert saved == list(range(1, 9))


def test_a_full_disk_stops_no_run_and_leaves_the_last_checkpoint(images, tmp_path, monkeypatch, capsys):
    """Writing fails from the 3rd to the 7th update; in between, the state of the 2nd update is there."""
    write, done = checkpoint.write, []

    def failing(path, *rest):
        done.append(None)
        if 3 <= len(done) <= 7:
            raise OSError(f"could not write {path}: No space left on device")
        write(path, *rest)
        if len(done) == 2:
            done.append(checkpoint.load(path)["done"])
            done.pop()

    def full_for_metrics(rows, path):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "write", failing)
    monkeypatch.setattr(log_module, "write_csv", full_for_metrics)
    cfg = config(tmp_path / "run", images, checkpoint_minutes=0)
    loop.train("simclr", cfg)
    printed = capsys.readouterr().out.replace("\n", " ")
    assert printed.count("No space left on device; the checkpoint before it stays") == 5
    assert printed.count("could not write metrics.csv") == 3  # after each epoch and at the end
    assert checkpoint.load(cfg.out / "checkpoint.safetensors")["done"] == 8
    monkeypatch.undo()
    whole = config(tmp_path / "whole", images)
    loop.train("simclr", whole)
    assert_same_weights(weights(whole), weights(cfg))


@pytest.mark.parametrize("at", [1, 6])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(
    at, images, tmp_path, monkeypatch
):
    step, seen = SimCLR.training_step, []

    def breaking(self, views):
        seen.append(None)
        loss, metrics = step(self, views)
        return loss * (math.nan if len(seen) >= at else 1), metrics

    monkeypatch.setattr(SimCLR, "training_step", breaking)
    cfg = config(tmp_path / "run", images, checkpoint_minutes=0)
    with pytest.raises(FloatingPointError, match=f"the loss is nan in epoch {1 + at // 5}"):
        loop.train("simclr", cfg)
    if at > 1:
        state = checkpoint.load(cfg.out / "checkpoint.safetensors")
        assert state["done"] == at - 1
        assert all(value.isfinite().all() for value in state["model"].values())


def test_weights_that_are_not_finite_are_not_saved(images, tmp_path):
    """The loss of the only update is fine; what its rate does to the weights is not."""
    cfg = config(tmp_path / "run", images, epochs=1, batch_size=39, learning_rate=1e38, warmup_epochs=0.0)
    with pytest.raises(FloatingPointError, match="is not finite after update 1; try a lower --learning-rate"):
        loop.train("simclr", cfg)
    assert not (cfg.out / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("left", ["config.json.tmp", "checkpoint.safetensors.tmp", "metrics.csv.tmp"])
def test_what_a_killed_process_left_half_written_is_in_nobodys_way(left, images, tmp_path):
    cfg = config(tmp_path / "run", images, epochs=1, resume=True)
    cfg.out.mkdir()
    (cfg.out / left).write_text("half")
    loop.train("simclr", cfg)
    assert (cfg.out / "weights.safetensors").exists()


@pytest.mark.parametrize("change", ["no part", "other weights", "nothing"])
def test_a_checkpoint_of_another_layout_is_refused_by_name(change, images, tmp_path):
    cfg = config(tmp_path / "run", images, epochs=1)
    loop.train("simclr", cfg)
    path = cfg.out / "checkpoint.safetensors"
    state = checkpoint.load(path)
    if change == "no part":
        del state["monitor"]
    elif change == "other weights":
        state["model"]["other"] = state["model"].pop("encoder.stem.0.0.weight")
    else:
        state = {"a": 1}
    checkpoint.save(path, state)
    with pytest.raises(ValueError, match="resume: .*run"):
        loop.train("simclr", config(cfg.out, images, epochs=1, resume=True))


def test_data_that_moved_is_the_same_data(images, tmp_path):
    cfg = config(tmp_path / "run", images, epochs=1)
    loop.train("simclr", cfg)
    moved = tmp_path / "elsewhere.npz"
    moved.write_bytes(Path(images.removeprefix("npz:")).read_bytes())
    loop.train("simclr", config(cfg.out, f"npz:{moved}", epochs=1, resume=True))


def test_an_interrupted_evaluation_says_how_to_repeat_it(images, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.evaluate, "run", interrupted)
    with pytest.raises(KeyboardInterrupt, match="to evaluate: sslfast eval '.*a run'"):
        loop.train("simclr", config(tmp_path / "a run", images, epochs=1))


def test_the_first_update_may_overflow_in_float16(images, tmp_path):
    """A momentum that an overflowing step left unwritten would be whatever the memory held."""
    cfg = config(tmp_path / "run", images, epochs=1, precision="float16", optimizer="sgd", temperature=0.01)
    loop.train("simclr", cfg)
    state = checkpoint.load(cfg.out / "checkpoint.safetensors")["update"]
    assert state["scaler"]["scale"] < 65536  # it did overflow
    momenta = [values["momentum_buffer"] for values in state["optimizer"]["state"].values()]
    assert all(m.isfinite().all() and m.abs().max() < 1e6 for m in momenta)


def test_a_signal_to_all_processes_stops_a_run_whose_workers_decode(class_folder, tmp_path):
    """As job schedulers send it: to the workers too, which leave it to the main process."""
    options = "--image-size 16 --batch-size 8 --epochs 5000 --cache-gib 0".split()
    options += ["--data", f"folder:{class_folder}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sslfast", "train", "simclr", "--out", "run", *options, "--workers", "2"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("epoch 2"):
            break
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "to go on: sslfast train simclr --out run --resume" in errors
    with pytest.raises(ProcessLookupError):  # the workers ended as well
        os.killpg(process.pid, 0)
