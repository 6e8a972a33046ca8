"""Training in several processes: the same as in one, one voice, interruptions, errors, lost processes."""

import os
import signal
import subprocess
import sys
from functools import partial

import processes
import pytest
import torch
import train_processes
from tiny_runs import assert_same_weights, config, timeless, weights

from sslfast.cli import main
from sslfast.train import checkpoint, evaluate, loop
from sslfast.train.config import load
from sslfast.train.sources import load as load_data


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes find, in their order, and where."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("two")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 12, 12), dtype=np.uint8)
    np.savez(folder / "images.npz", images=pixels)
    for i in range(40):
        path = folder / "labelled" / ("dark", "light")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        low = 60 * (i % 2)
        Image.fromarray(np.random.default_rng(i).integers(low, low + 100, (16, 16, 3), dtype=np.uint8)).save(
            path
        )
    images, labelled = f"npz:{folder / 'images.npz'}", folder / "labelled"
    worker = partial(train_processes.everything, folder=folder, images=images, labelled=labelled)
    processes.run(worker, 2, folder / "group")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)], folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train_processes.all_trained(tmp_path_factory.mktemp("one"))
    torch.set_num_threads(before)


# Two processes train like one with the whole batch.


def floats(state):
    return {name: value.double() for name, value in state.items() if value.is_floating_point()}


def distance(one, other):
    return sum((one[name] - other[name]).square().sum() for name in one).sqrt().item()


@pytest.mark.parametrize("name", train_processes.CASES)
def test_20_updates_are_those_of_one_process(name, found, alone):
    """Parameters, teachers, queues, centres and statistics, each within 1e-9 of its own change."""
    before, after, losses = alone["float64"][name]
    ranks = [each["trained"]["float64"][name] for each in found[0]]
    for start, state, _ in ranks:
        for key, value in after.items():
            assert torch.equal(start[key], before[key]), key
            moved = (value - before[key]).abs().max() if value.numel() else 0
            error = (state[key] - value).abs().max() if value.numel() else 0
            # what no gradient reaches but rounding, such as a bias before BatchNorm, moves by 1e-10 or less
            assert error <= 1e-9 * max(moved, 1e-6), f"{key} moved by {moved}, differs by {error}"
    assert all(torch.equal(ranks[0][1][key], ranks[1][1][key]) for key in after)  # bitwise the same on both
    means = [(a + b) / 2 for a, b in zip(ranks[0][2], ranks[1][2], strict=True)]
    assert means == pytest.approx(losses, rel=1e-9)


@pytest.mark.parametrize("name", train_processes.CASES)
def test_in_float32_they_differ_as_float32_does(name, found, alone):
    """From the updates in float64: at most twice as far as one process in float32 is, and 1e-6 of the way."""
    exact, own = (floats(alone[kind][name][1]) for kind in ("float64", "float32"))
    way = distance(exact, floats(alone["float64"][name][0]))
    state = floats(found[0][0]["trained"]["float32"][name][1])
    assert distance(state, exact) <= 2 * distance(own, exact) + 1e-6 * way


@pytest.mark.parametrize("case", train_processes.NORMS, ids=str)
def test_batchnorm_of_all_rows(case, found):
    kind, affine, rows = case
    net, x, dy = train_processes.normalization(kind, affine, sum(rows))
    expected = train_processes.passed(net, x, dy)
    ranks = [each["norms"][case] for each in found[0]]
    assert ranks[0].keys() == expected.keys() and ranks[0]["kept"].keys() == expected["kept"].keys()
    for name, value in expected.items():
        if name == "kept":
            for rank in ranks:
                torch.testing.assert_close(rank[name], value, rtol=1e-10, atol=1e-10)
        elif name.startswith("d0"):  # of a parameter: each process has its share
            torch.testing.assert_close(sum(rank[name] for rank in ranks), value, rtol=1e-10, atol=1e-10)
        else:
            torch.testing.assert_close(torch.cat([r[name] for r in ranks]), value, rtol=1e-10, atol=1e-10)


def test_a_batchnorm_that_does_more_is_refused():
    from sslfast.train import batchnorm

    class Activated(torch.nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="sync_batchnorm: expected a BatchNorm of torch, got Activated"):
        batchnorm.synchronize(torch.nn.Sequential(Activated(3)))


def test_the_monitor_sees_the_images_of_all(found):
    numbers, warning, _ = train_processes.monitored()
    for each in found[0]:
        theirs, said, restarted = each["monitor"]
        assert theirs == pytest.approx(numbers) and restarted == pytest.approx(numbers) and said == warning


# Runs of two processes.


def test_an_interrupted_run_goes_on_bitwise(found):
    ranks, folder = found
    for each in ranks:  # the signal came to the second
        kind, message, _ = each["interrupted"]
        assert kind == "KeyboardInterrupt" and "stopped and saved; to go on: torchrun" in message
    whole, cut = (config(folder / name, "") for name in ("whole", "cut"))
    assert_same_weights(weights(whole), weights(cut))
    assert timeless(whole) == timeless(cut) and len(timeless(cut)) == 3


def test_each_batch_is_cut_in_the_order_of_the_processes(found):
    own = [each["rows"] for each in found[0]]
    whole = [torch.cat(parts) for parts in zip(*own, strict=True)]
    for batch, expected in zip(whole, loop.order(32, 8, 0, 0), strict=True):
        assert torch.equal(batch, expected)


def test_two_processes_draw_the_views_that_one_draws(found, tmp_path):
    data, sizes = f"folder:{found[1] / 'labelled'}", dict(hidden_dim=24, projection_dim=12)
    with train_processes.noted_views() as alone:
        loop.train(
            "byol", train_processes.small("byol", tmp_path / "one", data, **train_processes.KNN, **sizes)
        )
    both = [torch.cat(parts, 1) for parts in zip(*(each["views"] for each in found[0]), strict=True)]
    assert len(both) == len(alone) == 4
    assert all(torch.equal(*views) for views in zip(both, alone, strict=True))


@pytest.mark.accuracy
def test_three_processes_go_on_bitwise(images, tmp_path):
    """Sums of three numbers depend on their order."""
    processes.run(partial(train_processes.moco_runs, folder=tmp_path, images=images), 3, tmp_path / "group")
    assert_same_weights(*(weights(config(tmp_path / name, "")) for name in ("whole", "cut")))


@pytest.mark.parametrize(
    "what, kind, message, process",
    [
        ("indivisible", "ValueError", "batch_size: expected one that 2 processes can share, got 7", 0),
        ("unreadable", "ValueError", "data: not here", 1),
        ("broken", "FloatingPointError", "the loss is nan in epoch 2; try a lower", 0),
    ],
)
def test_an_error_of_one_is_raised_by_all(what, kind, message, process, found):
    ranks, folder = found
    errors = [each[what] for each in ranks]
    assert errors[0] == errors[1] and errors[0][0] == kind and message in errors[0][1]
    assert errors[0][2] == process
    assert not (folder / "no").exists()


def test_the_last_good_state_stays(found):
    assert checkpoint.load(found[1] / "broken" / "checkpoint.safetensors")["done"] == 5


def test_knn_in_parts_is_that_of_all_images(found):
    method, cfg = load(found[1] / "knn")
    dataset = load_data(cfg.data, cfg.image_size)
    model = loop.build(method, cfg, 3, 16)
    model.load_state_dict(weights(cfg))
    names, row = (line.split(",") for line in timeless(cfg))
    expected = evaluate.online_knn(model.encoder, dataset, torch.device("cpu"), 0)
    assert float(row[names.index("knn")]) == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_from_before_there_were_several_goes_on(images, tmp_path, capsys):
    cfg = config(tmp_path / "run", images, epochs=1)
    loop.train("simclr", cfg)
    state = checkpoint.load(cfg.out / "checkpoint.safetensors")
    assert state["identity"].pop("sync_batchnorm") is True and "others" not in state
    checkpoint.save(cfg.out / "checkpoint.safetensors", state)
    loop.train("simclr", config(cfg.out, images, epochs=1, resume=True))
    assert "going on after update 4" in capsys.readouterr().out


# The command, started by torchrun.


class Torchrun:
    """`torchrun --nproc-per-node 2 -m sslfast train simclr ...` in a folder; 4 updates an epoch."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def start(self, *options: str) -> subprocess.Popen:
        launcher = [
            sys.executable,
            "-u",
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
        ]
        command = [*launcher, "-m", "sslfast", "train", "simclr", "--device", "cpu", *options]
        return subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def new(self, out: str, epochs: int, *options: str) -> subprocess.Popen:
        return self.start(*self.options(out, epochs), *options)

    @staticmethod
    def options(out: str, epochs: int) -> list[str]:
        chosen = ["--data", "npz:images.npz", "--batch-size", "8", "--augment", "mnist"]
        return ["--out", out, "--epochs", str(epochs), *chosen]


@pytest.fixture
def torchrun(images, tmp_path):
    return Torchrun(tmp_path)


def wait_for(process, text: str) -> list[str]:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(text):
            break
    return lines


def ours(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("sslfast") and "FAILED" not in line]


def test_a_run_changes_its_number_of_processes(torchrun, tmp_path, monkeypatch, interrupt, capsys):
    """Two, of which a signal to torchrun stops both; then one; then two to the end."""
    process = torchrun.new("run", 12)
    said = wait_for(process, "epoch 1:")
    process.send_signal(signal.SIGTERM)
    rest, errors = process.communicate(timeout=60)
    said += rest.splitlines(keepends=True)
    assert len(set(said)) == len(said) and "2 processes" in "".join(said)
    how = "to go on: torchrun --nproc-per-node 2 -m sslfast train simclr --out run --resume"
    assert ours(errors) == [f"sslfast: stopped and saved; {how}"]
    state = checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")
    assert len(state["others"]) == 1 and not torch.equal(
        state["random"]["torch"], state["others"][0]["torch"]
    )

    monkeypatch.chdir(tmp_path)
    interrupt(2)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "simclr", "--out", "run", "--resume"])
    said = capsys.readouterr()
    assert stopped.value.code == 130 and "to go on: sslfast train simclr" in said.err
    assert "processes: 2 before, now 1; the run goes on with new random numbers" in " ".join(said.out.split())

    process = torchrun.start("--out", "run", "--resume")
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert ours(errors) == [] and len(set(said.splitlines())) == len(said.splitlines())
    done = state["done"] + 2
    assert f"going on after update {done}" in said and "processes: 1 before, now 2" in " ".join(said.split())
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", *map(str, range(1, 13))]
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert kept == {"config.json", "metrics.csv", "loss.png", "neighbours.png", "tensorboard", "views.png",
                    "checkpoint.safetensors", "weights.safetensors", "features.safetensors"}  # fmt: skip

    process = torchrun.new("run", 12)
    said, errors = process.communicate(timeout=60)
    assert said == "" and "failed (exitcode: 2)" in errors
    assert ours(errors) == [
        "sslfast: out: run already holds a run; expected a new folder, --resume or --overwrite"
    ]


def test_a_loss_that_is_not_finite_ends_all(torchrun):
    process = torchrun.new("run", 1, "--learning-rate", "1e30", "--warmup-epochs", "0")
    _, errors = process.communicate(timeout=60)
    assert "failed (exitcode: 1)" in errors and "[rank" not in errors  # no traceback of a worker
    (said,) = ours(errors)
    assert "not finite" in said and "try a lower --learning-rate" in said


def test_the_other_says_that_one_was_killed(torchrun, tmp_path, monkeypatch, interrupt):
    process = torchrun.new("run", 3000, "--checkpoint-minutes", "0")
    wait_for(process, "epoch 1:")
    os.kill(worker(process.pid, 0), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    (said,) = ours(errors)
    how = "to go on: torchrun --nproc-per-node 2 -m sslfast train simclr --out run --resume"
    assert said.startswith("sslfast (rank 1): lost another process: ") and said.endswith(how)
    assert "exitcode  : 1 " in errors and "[rank" not in errors
    monkeypatch.chdir(tmp_path)
    interrupt(2)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "simclr", "--out", "run", "--resume"])
    assert stopped.value.code == 130


def worker(agent: int, rank: int) -> int:
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            with open(f"/proc/{pid}/stat") as stat, open(f"/proc/{pid}/environ") as environ:
                parent = int(stat.read().rsplit(")", 1)[1].split()[1])
                if parent == agent and f"\0RANK={rank}\0" in f"\0{environ.read()}":
                    return pid
        except OSError:
            pass  # ended meanwhile, or another user's
    raise AssertionError(f"no worker of rank {rank}")
