"""Training on two machines, each a network namespace with an address of its own and a folder of its own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ADDRESSES = ("10.77.86.1", "10.77.86.2")
TIMEOUT = 60.0  # seconds for a process to wait for another, and a bit


def _ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True)


@pytest.fixture
def machines(tmp_path):
    """The commands that run a program on either machine."""
    names = [f"sslfast-{os.getpid()}-{k}" for k in range(2)]
    ends = [f"ssl{os.getpid() % 10**6}{x}" for x in "ab"]
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2")
    try:
        _ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs the right to make network namespaces: {error.stderr.decode().strip()}")
    try:
        _ip("netns", "add", names[1])
        _ip(
            "-n", names[0], "link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", names[1]
        )
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                _ip("-n", name, "link", "set", device, "up")
        yield [["ip", "netns", "exec", name] for name in names], ends
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)


def _start(machines, folder: Path, *options: str) -> list[subprocess.Popen]:
    """torchrun on both machines, one process each, which find each other at the first one's address."""
    commands, ends = machines
    started = []
    for k, (prefix, end) in enumerate(zip(commands, ends, strict=True)):
        home = folder / f"machine{k}"
        home.mkdir(exist_ok=True)
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
            "--max-restarts", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29511",
            "--rdzv-id", "run", "--rdzv-conf", f"is_host={k == 0}", "--local-addr", ADDRESSES[k],
            "-m", "sslfast", "train", "simclr", "--out", "run", *options,
        ]  # fmt: skip
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": end, "OMP_NUM_THREADS": "1"}
        with (home / "output").open("w") as output:
            started.append(
                subprocess.Popen(
                    prefix + torchrun,
                    cwd=home,
                    env=environment,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )  # fmt: skip
            )
    return started


def _kill(prefix: list[str]) -> None:
    """All that runs on a machine: torchrun's processes are sessions of their own."""
    for _ in range(3):
        name = prefix[-1]
        found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True)
        for number in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)


def _kill_all(machines) -> None:
    for prefix in machines[0]:
        _kill(prefix)


def _output(folder: Path, machine: int) -> str:
    return (folder / f"machine{machine}" / "output").read_text()


def test_a_machine_is_lost_and_the_run_goes_on(machines, tmp_path) -> None:
    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 256, (64, 12, 12), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    options = [
        "--data", f"npz:{tmp_path / 'images.npz'}", "--batch-size", "16", "--device", "cpu",
        "--epochs", "400", "--timeout-minutes", "0.5", "--augment", "mnist",
    ]  # fmt: skip
    metrics = tmp_path / "machine0" / "run" / "metrics.csv"

    def lose(machine: int, epochs: int, *more: str) -> str:
        """Starts both, kills all on one of them after so many epochs; what the other one says."""
        both = _start(machines, tmp_path, *options, *more)
        try:
            _wait_for_epochs(metrics, epochs, both[0])
            _kill(machines[0][machine])
            lost = time.monotonic()
            assert both[1 - machine].wait(TIMEOUT) != 0
            assert time.monotonic() - lost < 30 + 15
        finally:
            _kill_all(machines)
        return _output(tmp_path, 1 - machine)

    said = lose(1, epochs=2)
    assert "sslfast: lost another process: " in said and "--resume" in said, said
    assert not (tmp_path / "machine1" / "run").exists()  # the first process writes for all
    done = _epochs(metrics)
    said = lose(0, done + 2, "--resume")
    assert "sslfast (rank 1): lost another process: " in said, said
    assert "going on after update" in _output(tmp_path, 0) and "going on" not in said

    both = _start(machines, tmp_path, *options, "--resume")
    try:
        _wait_for_epochs(metrics, _epochs(metrics) + 2, both[0])
        for process in both:  # both sides stop after the same update, and the first says how to go on
            process.terminate()
        for process in both:
            process.wait(TIMEOUT)
    finally:
        _kill_all(machines)
    said = _output(tmp_path, 0)
    assert "going on after update" in said and "stopped and saved" in said, said


def _epochs(metrics: Path) -> int:
    return len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0


def _wait_for_epochs(metrics: Path, epochs: int, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while _epochs(metrics) < epochs:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.2)
