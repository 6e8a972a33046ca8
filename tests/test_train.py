"""Runs from end to end, views, evaluation, options; runs here are tiny, `make demo` is the real one."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch.nn import functional as F

from sslfast.losses.contrastive import ntxent_reference
from sslfast.train import augment, evaluate, loop, models, sources
from sslfast.train.config import load, save
from sslfast.train.methods.simclr import Config as SimCLRConfig
from sslfast.train.methods.simclr import SimCLR


def config(out, folder, **changes):
    values = dict(
        out=out,
        data=f"folder:{folder}",
        epochs=2,
        batch_size=8,
        image_size=16,
        warmup_epochs=1.0,
        device="cpu",
    )
    return SimCLRConfig(**{**values, **changes})


# Views


@pytest.mark.parametrize(
    "preset, channels, size, moved", [("mnist", 1, 28, 0.5), ("simclr", 3, 32, 1.0), ("simclr", 3, 48, 1.0)]
)
def test_two_views(preset, channels, size, moved):
    images = torch.randint(0, 256, (200, channels, size, size), dtype=torch.uint8)
    views = augment.two_views(preset, size, channels)
    torch.manual_seed(3)
    z1, z2 = views(images)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip((z1, z2), views(images), strict=True))
    for z in (z1, z2):
        assert z.shape == images.shape and z.min() >= 0 and z.max() <= 1
        far = (z - images / 255).abs().flatten(1).amax(1) > 1e-4
        assert abs(far.float().mean() - moved) < 0.15
    pairs = (z1 != z2).flatten(1).any(1).float().mean()  # each image has its own pair of views
    assert abs(pairs - (1 - (1 - moved) ** 2)) < 0.15


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="augment: expected"):
        augment.two_views("simclr2", 32, 3)


# SimCLR


def test_simclr_step_is_the_published_loss():
    encoder = models.backbone("compact", 1, 28)
    method = SimCLR(encoder, encoder.dim, projection_dim=32, temperature=0.3).double()
    views = torch.rand(2, 6, 1, 28, 28, dtype=torch.float64)
    loss, metrics = method.training_step(list(views))
    z1, z2 = method.projector(method.encoder(views.flatten(0, 1))).chunk(2)
    torch.testing.assert_close(loss, ntxent_reference(z1, z2, 0.3), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(metrics["embeddings"], z1)
    assert not metrics["embeddings"].requires_grad
    layers = [type(layer).__name__ for layer in method.projector]
    assert layers == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert all(layer.bias is None for layer in method.projector if isinstance(layer, torch.nn.Linear))
    last = method.projector[-1]
    assert last.weight.requires_grad and not last.bias.requires_grad and (last.bias == 0).all()


# Evaluation


def test_knn_against_loops():
    train, test, labels = torch.randn(50, 8), torch.randn(20, 8), torch.randint(0, 3, (50,))
    expected = []
    for query in test:
        scores = sorted(
            ((F.cosine_similarity(query, x, dim=0).item(), i) for i, x in enumerate(train)), reverse=True
        )
        votes = [0.0] * 3
        for score, i in scores[:7]:
            votes[labels[i]] += math.exp(score / 0.1)
        expected.append(votes.index(max(votes)))
    assert evaluate.knn(train, labels, test, k=7, temperature=0.1).tolist() == expected


def test_few_labels_draws_ten_of_each_class():
    labels = torch.arange(40) % 4
    assert evaluate.few_labels(labels[:36]) == []  # nine of each
    draws = evaluate.few_labels(labels)
    assert len(draws) == 5 and all(labels[rows].bincount().tolist() == [10] * 4 for rows in draws)
    assert all(len(rows.unique()) == 40 for rows in draws)
    larger = torch.arange(400) % 4
    first, second, *_ = evaluate.few_labels(larger)
    assert not torch.equal(first.sort().values, second.sort().values)


def test_linear_probe_separates_what_is_linear():
    train = torch.randn(200, 5)
    labels = (train[:, 0] > 0).long()
    test = torch.randn(100, 5)
    assert evaluate.accuracy(evaluate.linear_probe(train, labels, test, train), (test[:, 0] > 0).long()) > 0.9


def test_raw_pixels_are_averaged_down_to_about_a_thousand_numbers():
    images = torch.rand(2, 3, 36, 36)
    torch.testing.assert_close(evaluate.Pixels()(images), F.avg_pool2d(images, 2).flatten(1))
    assert torch.equal(evaluate.Pixels()(images[:, :1, :28, :28]), images[:, :1, :28, :28].flatten(1))


# Runs


def test_a_run_leaves_everything_and_eval_repeats_it(class_folder, tmp_path, capsys):
    cfg = config(tmp_path / "run", class_folder, knn_every=2)
    loop.train("simclr", cfg)
    lines = capsys.readouterr().out.splitlines()
    names = {p.name for p in cfg.out.iterdir()}
    assert names == {
        "config.json", "metrics.csv", "checkpoint.safetensors", "weights.safetensors", "evaluation.json",
        "loss.png", "neighbours.png", "tensorboard", "views.png", "features.safetensors",
    }  # fmt: skip
    rows = list(csv.DictReader((cfg.out / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"] and all(float(row["loss"]) > 0 for row in rows)
    shares = [float(value) for name, value in rows[0].items() if name.startswith("time_")]
    assert len(shares) == 8 and min(shares) >= 0 and sum(shares) == pytest.approx(1, abs=1e-4)
    assert float(rows[0]["effective_rank"]) > 1
    assert rows[0]["knn"] == "" and 0.5 < float(rows[1]["knn"]) <= 1
    for name in ("loss.png", "neighbours.png", "views.png"):
        with Image.open(cfg.out / name) as picture:
            assert min(picture.size) > 100
    starts = [line.split(":")[0] for line in lines]
    assert {"kNN (k=20, T=0.07)", "linear probe", "10 labels per class"} <= set(starts)
    measured = json.loads((cfg.out / "evaluation.json").read_text())
    assert measured["linear probe"]["raw pixels"] == [1.0]  # dark against light
    knn = measured["kNN (k=20, T=0.07)"]["trained encoder"]
    assert float(rows[1]["knn"]) == pytest.approx(knn[0], abs=1e-5)

    assert load(cfg.out) == ("simclr", cfg)
    (cfg.out / "evaluation.json").unlink()
    from sslfast.cli import main

    main(["eval", str(cfg.out)])
    assert json.loads((cfg.out / "evaluation.json").read_text()) == measured
    assert "10 labels per class: " in capsys.readouterr().out
    (cfg.out / "weights.safetensors").unlink()  # as in a run that goes on: its last checkpoint is measured
    main(["eval", str(cfg.out)])
    assert json.loads((cfg.out / "evaluation.json").read_text()) == measured


def test_same_seed_same_weights_and_training_moves_them(class_folder, tmp_path):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cfg = config(tmp_path / name, class_folder, seed=seed, optimizer="lars" if seed else "adamw")
        loop.train("simclr", cfg)
        weights.append(load_file(cfg.out / "weights.safetensors"))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    stem = "encoder.stem.0.0.weight"
    assert not torch.equal(weights[0][stem], weights[2][stem])
    initial = loop.build("simclr", config(tmp_path / "a", class_folder), 3, 16).state_dict()
    assert not torch.equal(weights[0][stem], initial[stem])


def test_a_data_set_that_is_decoded_in_every_epoch_trains_to_the_same_weights(class_folder, tmp_path):
    weights = []
    for name, memory in (("a", 4.0), ("b", 0.0)):
        cfg = config(tmp_path / name, class_folder, workers=2, cache_gib=memory)
        loop.train("simclr", cfg)
        weights.append(load_file(cfg.out / "weights.safetensors"))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    evaluations = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in "ab"]
    assert evaluations[0] == evaluations[1]


def test_a_run_without_labels(class_folder, tmp_path, capsys):
    cfg = config(tmp_path / "run", class_folder / "dark", batch_size=4, epochs=1)
    loop.train("simclr", cfg)
    assert "no labels" in capsys.readouterr().out
    assert (cfg.out / "neighbours.png").exists() and not (cfg.out / "evaluation.json").exists()
    with pytest.raises(ValueError, match="knn_every: expected 0 for data without labels"):
        loop.train("simclr", config(tmp_path / "other", class_folder / "dark", knn_every=1))
    assert not (tmp_path / "other").exists()


def test_a_run_with_few_images_of_a_class(class_folder, tmp_path, capsys):
    for name in ("dark", "light"):
        for path in sorted((class_folder / name).iterdir())[8:]:
            path.unlink()
    loop.train("simclr", config(tmp_path / "a", class_folder, epochs=1))
    assert "10 labels per class: not measured" in capsys.readouterr().out
    for name in ("dark", "light"):
        for path in sorted((class_folder / name).iterdir())[4:]:
            path.unlink()
    cfg = config(tmp_path / "b", class_folder, epochs=1)
    loop.train("simclr", cfg)
    assert "no test images" in capsys.readouterr().out and (cfg.out / "loss.png").exists()


def test_an_earlier_run_is_kept_unless_told_otherwise(class_folder, tmp_path):
    cfg = config(tmp_path / "run", class_folder, epochs=1)
    again = config(cfg.out, class_folder, epochs=1, overwrite=True)
    cfg.out.mkdir()
    (cfg.out / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="out: expected a new or empty folder"):
        loop.train("simclr", cfg)
    (cfg.out / "config.json").write_text('{"name": "of another program"}')
    with pytest.raises(ValueError, match="run: .* is not the config of a run"):
        loop.train("simclr", again)
    save("simclr", cfg, cfg.out / "config.json")
    with pytest.raises(ValueError, match="out: .* already holds a run"):
        loop.train("simclr", cfg)
    (cfg.out / "evaluation.json").write_text("{}")
    loop.train("simclr", again)
    assert (cfg.out / "weights.safetensors").exists()
    assert (cfg.out / "thesis.tex").read_text() == "precious"  # no file of a run
    assert json.loads((cfg.out / "evaluation.json").read_text()) != {}


# Options


def test_bad_options_are_named(tmp_path):
    bad = [("epochs", 0), ("batch_size", 1), ("image_size", 4), ("learning_rate", -1.0),
           ("learning_rate", math.nan), ("weight_decay", math.inf), ("temperature", 0.0),
           ("temperature", math.nan), ("projection_dim", 0), ("accumulate", 0), ("clip_norm", -1.0),
           ("knn_every", -1), ("workers", -1), ("checkpoint_minutes", -1.0), ("seed", -1), ("seed", 1 << 32),
           ("patch_size", -1)]  # fmt: skip
    for name, value in bad:
        with pytest.raises(ValueError, match=f"{name}: expected"):
            SimCLRConfig(**{"out": tmp_path, name: value})
    with pytest.raises(ValueError, match="overwrite: expected --resume or --overwrite"):
        SimCLRConfig(out=tmp_path, resume=True, overwrite=True)


@pytest.mark.parametrize(
    "name, value",
    [("optimizer", "adam"), ("precision", "fp16"), ("stem", "large"), ("data", 5), ("epochs", 2.5),
     ("epochs", True), ("learning_rate", "fast"), ("compile", 1)],
)  # fmt: skip
def test_options_of_another_type_are_named(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        SimCLRConfig(**{"out": tmp_path, name: value})


def test_a_device_without_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="device: expected one that this machine has"):
        SimCLRConfig(out=tmp_path, device="meta").resolve_device()


def test_weights_that_are_not_of_the_run_are_named(class_folder, tmp_path):
    cfg = config(tmp_path / "run", class_folder, epochs=1)
    loop.train("simclr", cfg)
    path = cfg.out / "weights.safetensors"
    dataset = sources.load(cfg.data, 16)
    for content, message in (
        (path.read_bytes()[:-9], "is not a whole"),
        (save_bytes({}), "are not of its config"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"run: .*{message}"):
            evaluate.run("simclr", cfg, dataset, Console())


def test_more_batches_than_there_are_cannot_be_accumulated(class_folder, tmp_path):
    with pytest.raises(ValueError, match="accumulate: expected at most 4 for 32 images, got 5"):
        loop.train("simclr", config(tmp_path / "run", class_folder, accumulate=5))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer, rate", [("adamw", 2e-3), ("sgd", 0.06), ("lars", 0.6)])
def test_the_rate_follows_the_optimizer_and_the_batch(optimizer, rate, tmp_path):
    cfg = SimCLRConfig(out=tmp_path, optimizer=optimizer, batch_size=128, accumulate=4)
    assert cfg.resolve_learning_rate(512) == pytest.approx(rate)
    assert SimCLRConfig(out=tmp_path, optimizer=optimizer, learning_rate=0.7).resolve_learning_rate(8) == 0.7


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"method": "simclr", "colour": 1}', '{"method": "other"}', "\xff\xfe"]
)
def test_a_foreign_config_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match="run: "):
        load(tmp_path)


def test_a_photograph_data_set_trains(tmp_path, capsys, monkeypatch):
    """Colour images of 32 pixels through a ViT, from the option to the table."""
    monkeypatch.setattr("sslfast.train.sources.PHOTO_CROPS", (12, 2))
    monkeypatch.setitem(models.SIZES, "vit_tiny", {"dim": 16, "depth": 1, "heads": 2})
    options = dict(data="photos", image_size=32, backbone="vit_tiny", patch_size=8, device="cpu")
    loop.train("simclr", SimCLRConfig(out=tmp_path / "run", epochs=1, batch_size=64, **options))
    assert "10 labels per class: 0." in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "run" / "neighbours.png")).std() > 10
