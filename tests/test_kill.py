"""kill -9 at random moments, and a disk that fills up: each run that is resumed ends with the weights of one
that was left alone."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.torch import load_file

from sslfast.train import checkpoint


class Runs:
    """The command in processes of its own, on one thread each."""

    around: tuple[str, ...] = ()  # what runs the command
    output = subprocess.DEVNULL

    def __init__(self, folder) -> None:
        self.folder = folder
        pixels = np.random.default_rng(0).integers(0, 256, (50, 12, 12), dtype=np.uint8)
        np.savez(folder / "images.npz", images=pixels)

    def start(self, name: str, *more: str) -> subprocess.Popen:
        """5 epochs of 5 updates; a checkpoint after each, so that writing takes much of the time."""
        command = [
            sys.executable,
            "-m",
            "sslfast.cli",
            "train",
            "simclr",
            "--out",
            name,
            "--data",
            "npz:images.npz",
        ]
        options = ["--epochs", "5", "--batch-size", "8", "--augment", "mnist", "--checkpoint-minutes", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*self.around, *command, *options, "--device", "cpu", *more], cwd=self.folder, env=environment,
            stdout=self.output, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen) -> None:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()

    def weights(self, name: str):
        return load_file(self.folder / name / "weights.safetensors")


def check(folder, kills: int) -> None:
    runs = Runs(folder)
    began = time.monotonic()
    runs.finish(runs.start("whole"))
    duration, expected = time.monotonic() - began, runs.weights("whole")
    resumed_in_training = 0
    for number in range(kills):
        moment = random.SystemRandom().uniform(0.3, 1.0) * duration  # before it Python is still starting
        name = f"killed-{number}"
        process = runs.start(name)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        unfinished = not (folder / name / "weights.safetensors").exists()
        resumed_in_training += unfinished and (folder / name / "checkpoint.safetensors").exists()
        runs.finish(runs.start(name, "--resume"))
        actual = runs.weights(name)
        assert actual.keys() == expected.keys()
        different = [key for key in expected if not actual[key].equal(expected[key])]
        assert not different, f"killed after {moment:.2f} s: {different}"
        rows = [(folder / run / "metrics.csv").read_text().splitlines() for run in ("whole", name)]
        ours, theirs = ([line.rsplit(",", 10)[0] for line in lines] for lines in rows)  # without times
        assert ours == theirs
    print(f"{kills} kills within {duration:.1f} s; {resumed_in_training} left a checkpoint to go on from")
    assert resumed_in_training or kills < 10


def mounts() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(shutil.which("unshare")) and not subprocess.run(command, capture_output=True).returncode


@pytest.mark.skipif(not mounts(), reason="this user may not mount a file system")
def test_a_disk_that_fills_up_leaves_the_previous_checkpoint(tmp_path):
    """The run is on a disk with room for one checkpoint and a fifth; what it leaves there is carried away."""
    runs = Runs(tmp_path)
    runs.finish(runs.start("whole"))
    room = (tmp_path / "whole" / "checkpoint.safetensors").stat().st_size * 6 // 5
    (tmp_path / "full").mkdir()
    script = f'mount -t tmpfs -o size={room} tmpfs full && "$@"; code=$?; cp -r full left; exit $code'
    runs.around, runs.output = ("unshare", "-rm", "sh", "-c", script, "sh"), subprocess.PIPE
    process = runs.start("full/run")
    printed, errors = (text.decode() for text in process.communicate(timeout=300))
    said = " ".join(printed.split())
    assert re.search(r"could not write \S*checkpoint.safetensors: .*No space left on device", said)
    assert "; the checkpoint before it stays" in said
    assert process.returncode and "could not write" in errors and "Traceback" not in errors
    done = checkpoint.load(tmp_path / "left" / "run" / "checkpoint.safetensors")["done"]
    assert 0 < done < 25
    runs.around = ()
    runs.finish(runs.start("left/run", "--resume"))
    actual, expected = runs.weights("left/run"), runs.weights("whole")
    assert all(actual[key].equal(expected[key]) for key in expected)


def test_killed_runs_resume_bitwise(tmp_path):
    check(tmp_path, kills=3)


@pytest.mark.accuracy
def test_runs_killed_20_times_resume_bitwise(tmp_path):
    check(tmp_path, kills=20)
