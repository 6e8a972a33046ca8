"""benchmarks/parity.py: what it writes, how it goes on, and that it sees a loss that is another one."""

import importlib.util
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from sslfast.ops import _backend
from sslfast.train import augment, loop
from sslfast.train.methods import simclr

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def parity(monkeypatch, set_threads):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("parity", BENCHMARKS / "parity.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "parity", module)
    spec.loader.exec_module(module)
    set_threads(1)
    return module


@pytest.fixture
def data(tmp_path) -> str:
    """Two classes of 96 images, of which a fifth is for testing: 2 updates of 64 images in an epoch."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 120, (192, 14, 14), dtype=np.uint8)
    images[96:, 3:6] += 100
    np.savez(tmp_path / "stripes.npz", images=images, labels=np.repeat([0, 1], 96))
    return f"npz:{tmp_path / 'stripes.npz'}"


def results(parity, out: Path) -> dict:
    (path,) = out.glob("*/parity-quick.json")
    return json.loads(path.read_text())


def by_variant(found: dict) -> dict:
    return {(x["variant"], x["seed"]): x for x in found["runs"]}


def test_what_is_written(parity, data, tmp_path) -> None:
    options = {"data": data, "json_out": tmp_path / "out", "quick": True}
    parity.main(("simclr",), ("ours", "reference"), (0, 1), **options)
    found = results(parity, tmp_path / "out")
    runs = by_variant(found)
    assert list(runs) == [("ours", 0), ("ours", 1), ("reference", 0)]
    for run in runs.values():
        recipe = found["recipes"][run["recipe"]]
        assert (recipe["method"], recipe["epochs"], recipe["data"]) == ("simclr", 2, data)
        assert (recipe["threads"], recipe["torch"]) == (1, torch.__version__)
        assert len(run["losses"]) == len(run["gradient_norms"]) == 4 and run["seconds"] > 0
        assert run["epoch_losses"] == pytest.approx(
            [np.mean(run["losses"][:2]), np.mean(run["losses"][2:])], 1e-5
        )
        assert set(run["accuracies"]) == {"kNN (k=20, T=0.07)", "linear probe", "10 labels per class"}
    ours, reference = runs["ours", 0], runs["reference", 0]
    assert reference["losses"][:2] == pytest.approx(ours["losses"][:2], 1e-5)
    assert {"device", "threads", "torch", "lightly", "sslfast", "differs"} < set(found)
    summary = found["summary"]["simclr"]
    assert summary["seeds"]["count"] == 2
    assert summary["seeds"]["epoch_loss_difference"] == pytest.approx(
        np.mean(np.abs(np.subtract(ours["epoch_losses"], runs["ours", 1]["epoch_losses"]))), 1e-2
    )
    beside = summary["variants"]["reference"]
    assert beside["coincides"] and beside["first_update_beyond"] == {"1e-4": None, "1e-2": None}
    assert beside["epoch_loss_difference"] < 0.1 * summary["seeds"]["epoch_loss_difference"]
    for name, measured in beside["accuracies"].items():
        assert measured["value"] == reference["accuracies"][name]
        assert measured["difference"] == pytest.approx(measured["value"] - ours["accuracies"][name], abs=1e-5)
    assert next((tmp_path / "out").glob("*/parity-quick.png")).stat().st_size > 10_000


def test_it_goes_on_where_it_was_interrupted(parity, data, tmp_path) -> None:
    done, options = [], {"data": data, "json_out": tmp_path, "quick": True}

    def run(name, variant, seed, data, quick) -> dict:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append((variant, seed))
        which = {"name": name, "variant": variant, "seed": seed, "seconds": 1.0}
        numbers = dict.fromkeys(("losses", "gradient_norms", "epoch_losses"), [1.0, 2.0])
        return {**which, **numbers, "accuracies": {"kNN": 0.5}}

    def main(**more) -> list:
        done.clear()
        parity.main(("simclr",), ("ours", "reference"), (0, 1), **options, **more)
        return list(done)

    with mock.patch.object(parity, "run", run):
        with pytest.raises(KeyboardInterrupt):
            main()
        assert list(by_variant(results(parity, tmp_path))) == [("ours", 0), ("ours", 1)]
        assert main() == [("reference", 0)]
        assert main() == []
        parity.RECIPES["simclr"] = ("simclr", {"epochs": 2, "temperature": 0.3})
        with pytest.raises(KeyboardInterrupt):
            main()  # all are run anew
        assert (
            results(parity, tmp_path)["summary"]["simclr"]["variants"] == {}
        )  # the other recipe's is left out
        assert main() == [("reference", 0)]
        assert len(results(parity, tmp_path)["runs"]) == 3 and len(results(parity, tmp_path)["recipes"]) == 1
        with pytest.raises(KeyboardInterrupt):
            main(again=True)
        assert done == [("ours", 0), ("ours", 1)]


def test_another_loss_is_seen(parity, data, tmp_path, monkeypatch) -> None:
    """Of another temperature, and one of the right value with twice the gradient, which AdamW hardly sees."""
    right = simclr.NTXentLoss

    @contextmanager
    def colder(cfg):
        with mock.patch.object(simclr, "NTXentLoss", lambda t, group: right(t / 5, group=group)):
            yield

    @contextmanager
    def doubled(cfg):
        def loss(t, group):
            module = right(t, group=group)
            module.register_forward_hook(lambda _, inputs, x: 2 * x - x.detach())
            return module

        with mock.patch.object(simclr, "NTXentLoss", loss):
            yield

    monkeypatch.setattr(parity, "VARIANTS", {**parity.VARIANTS, "colder": colder, "doubled": doubled})
    with pytest.raises(SystemExit, match="differ from ours in the first update.*'colder', 'doubled'"):
        parity.main(("simclr",), ("ours", "colder", "doubled"), (0,), data, tmp_path, quick=True)
    found = results(parity, tmp_path)["summary"]["simclr"]["variants"]
    assert not found["colder"]["coincides"] and found["colder"]["first_update_beyond"]["1e-2"] == 1
    assert found["doubled"]["first_loss_difference"] < 1e-5 and not found["doubled"]["coincides"]
    assert found["doubled"]["first_gradient_difference"] == pytest.approx(1, 1e-4)


@pytest.mark.parametrize("name", ["simclr", "moco", "byol", "dino", "dino-center", "mae"])
def test_variants_coincide(parity, data, name, monkeypatch) -> None:
    """With plain PyTorch for all but the views, and with lightly's losses where it is installed."""
    served, resolve = set(), _backend.resolve

    def noted(op, device, dtype) -> str:
        served.add((op, resolve(op, device, dtype)))
        return resolve(op, device, dtype)

    def unmeasured(method, cfg, dataset, console) -> None:
        (cfg.out / "evaluation.json").write_text("{}")

    def run(variant) -> dict:
        served.clear()
        return parity.run(name, variant, 0, data, True)

    monkeypatch.setattr(loop.evaluate, "run", unmeasured)
    monkeypatch.setattr(_backend, "resolve", noted)
    ours = run("ours")
    fused = set(served)
    assert {backend for _, backend in fused} == {"cpu"}
    others = [run("reference")]
    assert {op for op, _ in served} == {op for op, _ in fused}
    assert {backend for op, backend in served if op != "augment_views"} == {"reference"}
    assert ("augment_views", "cpu") in served and ("augment_views", "reference") not in served
    if parity.LIGHTLY and name != "mae":
        others.append(run("lightly"))
        lost = {op for op, _ in fused} - {op for op, _ in served}
        loss = {"simclr": "similarity_lse", "moco": "similarity_lse", "byol": None}
        assert lost == {loss.get(name, "head_cross_entropy")} - {None}
    for other in others:
        assert other["losses"][:2] == pytest.approx(ours["losses"][:2], 1e-5)
        assert other["gradient_norms"][:2] == pytest.approx(ours["gradient_norms"][:2], 1e-4)


def test_reference_has_the_same_views(parity, tmp_path) -> None:
    _, make, _ = parity.setting("byol", "mnist5k", True)
    images = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8)
    views = augment.two_views("byol", 28, 1)
    expected = views(images, seed=3)
    with parity.reference(make(out=tmp_path, seed=0)):
        assert _backend.forced() == "reference"
        assert all(map(torch.equal, views(images, seed=3), expected))
        assert _backend.forced() == "reference"
    assert _backend.forced() is None
