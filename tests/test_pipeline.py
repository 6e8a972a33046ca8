"""A run on files that are decoded while it trains: speed, memory, the same batches after kill -9."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from sslfast.train import checkpoint
from sslfast.train.sources import PHOTOS

BROKEN = 5


def photographs():
    """The bundled ones, in full."""
    import skimage.data

    for name in PHOTOS:
        photo = getattr(skimage.data, name if name != "motorcycle" else "stereo_motorcycle")()
        photo = photo[0] if isinstance(photo, tuple) else photo
        yield np.repeat(photo[..., None], 3, 2) if photo.ndim == 2 else photo[..., :3]


def make(folder: Path, count: int) -> Path:
    """JPEGs of random parts of the photographs, 80 to 240 pixels wide and high, a class for each, and files
    that are none."""
    photos = list(photographs())

    def write(i: int) -> None:
        photo, generator = photos[i % len(photos)], np.random.default_rng(i)
        height, width = (min(int(generator.integers(80, 241)), side) for side in photo.shape[:2])
        top, left = (
            int(generator.integers(0, n - m + 1)) for n, m in zip(photo.shape, (height, width), strict=False)
        )
        part = Image.fromarray(np.ascontiguousarray(photo[top : top + height, left : left + width]))
        part.save(folder / PHOTOS[i % len(photos)] / f"{i:05}.jpg", quality=85)

    for name in PHOTOS:
        (folder / name).mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(count)))
    first = folder / PHOTOS[0]
    whole = next(first.iterdir()).read_bytes()
    (first / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (first / "text.jpg").write_text("no image")
    Image.new("RGB", (1, 1)).save(first / "spacer.jpg")
    Image.new("L", (14_000, 14_000)).save(first / "bomb.png")
    (first / "gone.jpg").symlink_to(first / "nowhere.jpg")
    return folder


def start(folder: Path, data: Path, name: str, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "sslfast", "train", "simclr", "--out", name, "--data", f"folder:{data}"]
    options = "--image-size 32 --cache-gib 0 --workers 2 --batch-size 64 --device cpu --checkpoint-minutes 0"
    return subprocess.Popen(
        [*command, *options.split(), *more], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def memory_of(group: int) -> int:
    """Bytes that the processes of a group have, each page once."""
    total = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(path.name)) == group:
                text = (path / "smaps_rollup").read_text()
                total += 1024 * int(re.search(r"^Pss: +(\d+)", text, re.M)[1])
        except (OSError, TypeError, ValueError):  # it has ended
            continue
    return total


def watched(process: subprocess.Popen) -> tuple[str, list[int]]:
    """(what it printed, its memory at the end of each epoch)"""
    lines, memory = [], []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("epoch "):
            memory.append(memory_of(process.pid))
    assert process.wait() == 0, "".join(lines)
    return "".join(lines), memory


def updates(run: Path) -> int:
    """Before the checkpoint, if there is one."""
    path = run / "checkpoint.safetensors"
    return checkpoint.load(path)["done"] if path.exists() else 0


def check(folder: Path, count: int, epochs: int) -> None:
    data = make(folder / "images", count)
    printed, memory = watched(start(folder, data, "whole", "--epochs", str(epochs)))
    rows = list(csv.DictReader((folder / "whole" / "metrics.csv").open()))
    speed, wait = (
        float(np.median([float(row[name]) for row in rows])) for name in ("images_per_second", "time_data")
    )
    print(
        f"{count} JPEGs: {speed:.0f} images/s sustained, {wait:.1%} of the time waiting for data, "
        f"{', '.join(f'{x / 2**20:.0f}' for x in memory)} MiB after each epoch"
    )
    counts = re.findall(r"^(\d) of \d+ images could not be read$", printed, re.M)
    assert printed.count("skipped") == BROKEN == sum(map(int, counts))
    for name in ("cut.jpg", "text.jpg", "spacer.jpg", "bomb.png", "gone.jpg"):
        assert len(re.findall(rf"^skipped .*{name}: ", printed, re.M)) == 1
    # the first checkpoint follows the first of these, and at the last the workers have nothing left to do
    assert len(memory) == epochs and memory[-2] < 1.02 * memory[1] + (8 << 20)

    process = start(folder, data, "killed", "--epochs", str(epochs))
    steps = int(re.search(r"epochs of (\d+)\s+steps", printed)[1])
    while not (done := updates(folder / "killed")) or done % steps in (0, steps - 1):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    again, _ = watched(start(folder, data, "killed", "--resume"))
    assert int(re.search(r"going on after update (\d+)", again)[1]) >= done
    whole, killed = (load_file(folder / name / "weights.safetensors") for name in ("whole", "killed"))
    assert all(whole[name].equal(killed[name]) for name in whole)


def test_files_are_decoded_while_the_run_trains(tmp_path):
    check(tmp_path, 900, epochs=4)


@pytest.mark.accuracy
def test_10_000_files_are_decoded_while_the_run_trains(tmp_path):
    check(tmp_path, 10_000, epochs=4)
