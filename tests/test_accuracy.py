"""Training runs with gates: the recipes learn, within the time that the README gives."""

import re
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.accuracy


def train(out, method: str, *options: str) -> tuple[float, float, str]:
    """(accuracy with 10 labels per class, seconds of training, all that was printed)"""
    command = [
        sys.executable,
        "-m",
        "sslfast.cli",
        "train",
        method,
        "--out",
        str(out),
        "--seed",
        "0",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=out.parent)
    print(done.stdout)
    accuracy = re.search(r"^10 labels per class: (0\.\d+)", done.stdout, re.M)
    seconds = re.search(r"^trained for (\d+) s", done.stdout, re.M)
    return float(accuracy[1]), float(seconds[1]), done.stdout


def test_simclr_on_mnist5k(tmp_path):
    began = time.monotonic()
    accuracy, seconds, printed = train(tmp_path / "run", "simclr", "--data", "mnist5k", "--epochs", "20")
    assert accuracy >= 0.85 and seconds <= 180
    assert "warning" not in printed
    print(f"{time.monotonic() - began:.0f} s in all")
