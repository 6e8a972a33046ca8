"""The benchmark of whole training steps runs, and times nothing that is not right."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PHASES = {"data", "augment", "forward", "loss", "backward", "optimizer", "ema", "other"}


@pytest.fixture
def steps(monkeypatch, set_threads):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    set_threads(1)
    return importlib.import_module("steps")


@pytest.fixture
def plain(steps):
    return importlib.import_module("steps_plain")


def read(folder: Path) -> dict:
    (path,) = folder.rglob("steps.json")
    return json.loads(path.read_text())


def test_what_is_written(steps, tmp_path, capsys):
    steps.main(("simclr",), quick=True, json_out=tmp_path)
    steps.main(("mae",), quick=True, json_out=tmp_path, memory=False)
    found = read(tmp_path)
    assert found["torch"] == torch.__version__ and found["threads"] == 1 and found["quick"]
    rows = {(row["method"], row["name"]): row for row in found["steps"]}
    assert {(m, n) for m in ("simclr", "mae") for n in ("plain", "sslfast")} <= rows.keys()
    for (method, name), row in rows.items():
        assert 0 < row["ms_20"] <= row["ms"] <= row["ms_80"] and len(row["samples"]) == 2
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["ms"] * 1e3)
        assert row["speedup"] == pytest.approx(rows[method, "plain"]["ms"] / row["ms"])
        assert row["loss_error"] <= 1e-4 and row["gradient_error"] <= 1e-3 and row["state_error"] <= 1e-2
        assert ("peak_mib" in row) == (method == "simclr")
        assert ("budget" in row) == (name == "sslfast")
        assert name == "plain" or row["gradient_error"] > 0  # it is not the same code
    for method in ("simclr", "mae"):
        budget = rows[method, "sslfast"]["budget"]
        assert budget.keys() == PHASES and sum(budget.values()) == pytest.approx(1)
        assert budget["data"] == 0 < min(budget[name] for name in ("augment", "forward", "loss", "backward"))
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "method, name, error",
    [
        ("simclr", "ntxent", "loss_error"),
        ("moco", "enqueue", "state_error"),
        ("dino", "follow", "state_error"),
    ],
)
def test_what_is_wrong_is_not_timed(steps, plain, monkeypatch, tmp_path, method, name, error):
    right = getattr(plain, name)
    wrong = (lambda *x: 1.001 * right(*x)) if name == "ntxent" else (lambda *x: None)
    monkeypatch.setattr(plain, name, wrong)
    with pytest.raises(SystemExit, match=f"differs from plain PyTorch:.*{error}"):
        steps.main((method,), quick=True, json_out=tmp_path, memory=False)
    (row,) = read(tmp_path)["steps"]
    assert error in row["why_not_timed"] and "ms" not in row


def test_memory_that_is_not_enough(steps, plain, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("64 GiB")

    monkeypatch.setattr(steps, "installed", lambda: ["plain", "sslfast"])
    checked = steps.checked

    def then_full(*x):
        found = checked(*x)
        monkeypatch.setattr(plain, "ntxent", full)
        return found

    monkeypatch.setattr(steps, "checked", then_full)
    (case,) = (c for c in steps.CASES["quick"] if c.method == "simclr")
    rows = {row["name"]: row for row in steps.run_case(case, "cpu", 1, memory=False)}
    assert rows["plain"]["why_not_timed"] == "out of memory" and "ms" not in rows["plain"]
    assert rows["sslfast"]["ms"] > 0 and "speedup" not in rows["sslfast"]


def test_autocast(steps):
    """As on a GPU: both sides in bfloat16, and their errors beside float32."""
    (case,) = (c for c in steps.CASES["quick"] if c.method == "dino")
    found = steps.checked(replace(case, dtype="bfloat16"), "cpu", case.batch, ["plain", "sslfast"])
    assert all(1e-7 < row["loss_error"] < 0.1 for row in found.values())
