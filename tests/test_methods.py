"""The methods: heads, views, order of updates, normalisation of keys, resuming, no reads, options."""

import processes
import pytest
import torch
from tiny_runs import assert_same_weights, timeless, weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import sslfast
from sslfast.train import augment, batchnorm, loop, methods, optim
from sslfast.train.methods import Now
from sslfast.train.vit import SIZES

CPU = torch.device("cpu")
SMALL = {
    "simclr": {},
    "byol": {"hidden_dim": 24, "projection_dim": 12},
    "moco": {"queue_size": 21, "projection_dim": 12, "bn_splits": 2},
    "mocov3": {"hidden_dim": 24, "projection_dim": 12},
    "dino": {"prototypes": 48, "hidden_dim": 24, "bottleneck_dim": 12, "momentum": 0.99},
    "mae": {"patch_size": 4},
}
TEACHERS = ("byol", "moco", "mocov3", "dino")


def config(method, out, images="mnist5k", **changes):
    """2 epochs of 4 updates."""
    values = dict(
        out=out, data=images, epochs=2, batch_size=8, warmup_epochs=0.5, device="cpu", augment="mnist"
    )
    return methods.module(method).Config(**{**values, **SMALL[method], **changes})


def build(method, tmp_path, **changes):
    cfg = config(method, tmp_path, precision="float32", **changes)
    model = loop.build(method, cfg, 1, 12)
    return model, loop.Update(model, cfg, CPU)


def two_views(batch=8):
    return tuple(torch.rand(2, batch, 1, 12, 12))


def layers(head):
    return [(type(x).__name__, *x.weight.shape, x.bias is not None) if isinstance(x, nn.Linear)
            else (type(x).__name__, x.affine) if isinstance(x, nn.BatchNorm1d) else type(x).__name__
            for x in (head if isinstance(head, nn.Sequential) else [head])]  # fmt: skip


def test_every_method_is_here():
    assert set(SMALL) == set(methods.NAMES)


# Heads, as the papers' code has them.


def test_byol_heads(tmp_path):
    model, _ = build("byol", tmp_path)

    def head(dim):
        return [("Linear", 24, dim, True), ("BatchNorm1d", True), "ReLU", ("Linear", 12, 24, False)]

    assert layers(model.projector) == layers(model.target.model[1]) == head(128)
    assert layers(model.predictor) == head(12)
    first, second = model.encoder.state_dict(), model.target.model[0].state_dict()
    assert not torch.equal(first["stem.0.0.weight"], second["stem.0.0.weight"])  # weights of its own at first
    groups = model.parameter_groups(0.1)
    assert [(g["weight_decay"], g["trust"], g["lr_in_momentum"]) for g in groups] == [
        (0.1, True, False),
        (0.0, False, False),
    ]


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_moco_heads(head, tmp_path):
    model, update = build("moco", tmp_path, head=head, optimizer="sgd", weight_decay=0.1)
    last = ("Linear", 12, 128, True)
    expected = [("Linear", 128, 128, True), "ReLU", last] if head == "mlp" else [last]
    assert layers(model.projector) == layers(model.keys.model[1]) == expected
    assert_same_weights(model.projector.state_dict(), model.keys.model[1].state_dict())
    assert model.queue.keys.shape == (21, 12)
    assert [g["weight_decay"] for g in update.optimizer.param_groups] == [0.1, 0.1]
    _, update = build("moco", tmp_path, optimizer="lars", weight_decay=0.1)
    assert [g["weight_decay"] for g in update.optimizer.param_groups] == [0.1, 0.0]


def test_mocov3_heads(tmp_path, monkeypatch):
    def linear(width, dim):
        return ("Linear", width, dim, False)

    inner, last = [("BatchNorm1d", True), "ReLU"], ("BatchNorm1d", False)
    model, _ = build("mocov3", tmp_path)
    assert layers(model.projector) == [linear(24, 128), *inner, linear(12, 24), last]
    assert layers(model.predictor) == [linear(24, 12), *inner, linear(12, 24)]
    monkeypatch.setitem(SIZES, "vit_tiny", {"dim": 16, "depth": 1, "heads": 2})
    options = dict(backbone="vit_tiny", patch_size=4, heads=4, positions="fixed", weight_decay=0.1)
    model, update = build("mocov3", tmp_path, **options)
    assert layers(model.projector) == [linear(24, 16), *inner, linear(24, 24), *inner, linear(12, 24), last]
    assert layers(model.predictor) == [linear(24, 12), *inner, linear(12, 24), last]
    trained = {name for name, p in model.encoder.named_parameters() if p.requires_grad}
    assert model.encoder.blocks[0].attention.heads == 4
    with pytest.raises(ValueError, match="heads: expected a divisor of 16, got 3"):
        build("mocov3", tmp_path, **{**options, "heads": 3})
    assert "class_token" in trained and not any(name.startswith("patch_embed") for name in trained)
    weight = model.encoder.patch_embed.weight
    assert 0.9 < weight.abs().max() / (6 / (16 + 16)) ** 0.5 <= 1 and not model.encoder.patch_embed.bias.any()
    assert [g["weight_decay"] for g in update.optimizer.param_groups] == [0.1, 0.1]


# When teachers move.


@pytest.mark.parametrize("method", TEACHERS)
def test_the_teacher_moves_once_per_update_and_when_it_should(method, tmp_path):
    model, update = build(method, tmp_path, accumulate=2, learning_rate=0.1)
    optim.set_rate(update.optimizer, 0.1)
    teacher = {"byol": "target", "dino": "teacher"}.get(method, "keys")
    teacher, after = getattr(model, teacher), method in ("byol", "dino")
    calls, follow = [], teacher.update
    teacher.update = lambda model, momentum=None: (
        calls.append(("teacher", momentum)) or follow(model, momentum)
    )
    step = update.optimizer.step
    update.optimizer.step = lambda *args: calls.append(("optimizer", None)) or step(*args)
    for k in range(3):
        calls.clear()
        model.schedule(Now(k, 10, 5), update.optimizer.param_groups)
        model.before_step()
        for _ in range(2):
            update.backward(two_views())
        update.step()
        order = [name for name, _ in calls]
        assert order == (["optimizer", "teacher"] if after else ["teacher", "optimizer"])
        momentum = dict(calls)["teacher"]
        if method != "moco":
            start, part = 0.99, torch.tensor(torch.pi * k / 10, dtype=torch.float64)
            assert momentum.item() == pytest.approx(1 - (1 - start) * (1 + part.cos().item()) / 2, abs=1e-12)
        else:
            assert momentum is None and teacher.momentum == 0.99


def test_moco_enqueues_the_keys_that_it_compared(tmp_path):
    model, update = build("moco", tmp_path, bn_splits=1)
    views, before = two_views(), model.queue.keys.clone()
    expected = F.normalize(model.keys.model.train()(views[1]), dim=1)
    _, metrics = update.backward(views)
    torch.testing.assert_close(metrics["targets"], expected)
    torch.testing.assert_close(model.queue.keys[:8], expected)
    assert torch.equal(model.queue.keys[8:], before[8:]) and model.queue.pointer == 8


# BatchNorm of MoCo's keys.


@pytest.mark.parametrize("batch, splits", [(12, 4), (7, 3), (2, 8), (6, 1)])
def test_split_batchnorm_is_batchnorm_of_each_part(batch, splits):
    x = torch.randn(batch, 5, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    split = batchnorm.SplitBatchNorm2d(5, splits).double()
    with torch.no_grad():
        split.weight.normal_(), split.bias.normal_(), split.running_mean.normal_()
    before = {name: value.clone() for name, value in split.state_dict().items()}
    parts, states = [], []
    for part in x.tensor_split(min(splits, batch)):
        plain = nn.BatchNorm2d(5).double()
        plain.load_state_dict(before)
        parts.append(plain(part))
        states.append(plain.state_dict())
    torch.testing.assert_close(split(x), torch.cat(parts))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(split, name), torch.stack([s[name] for s in states]).mean(0))
    assert split.num_batches_tracked == 1
    plain = nn.BatchNorm2d(5).double().eval()
    plain.load_state_dict(split.state_dict())
    torch.testing.assert_close(split.eval()(x), plain(x))


def test_split_batchnorm_replaces_every_layer_in_place():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.BatchNorm1d(4))
    weight, state = net[1][0].weight, {k: v.clone() for k, v in net.state_dict().items()}
    batchnorm.split_batchnorm(net, 4)
    assert type(net[1][0]) is batchnorm.SplitBatchNorm2d and net[1][0].weight is weight
    assert type(net[2]) is nn.BatchNorm1d and net.state_dict().keys() == state.keys()


def test_keys_are_shuffled_and_come_back_in_order():
    images, seen = torch.arange(20.0), []
    encoded = batchnorm.shuffled(lambda x: seen.append(x) or x * 2, images)
    assert torch.equal(encoded, images * 2)
    assert not torch.equal(seen[0], images) and torch.equal(seen[0].sort().values, images)


def test_keys_are_shuffled_across_processes(tmp_path):
    found = processes.run(processes.shuffled_keys, 3, tmp_path)
    for rank, (_, encoded) in enumerate(found):
        assert torch.equal(encoded, 2 * (torch.arange(4.0) + 4 * rank)[:, None])
    seen, whole = torch.cat([images for images, _ in found]), torch.arange(12.0)
    assert torch.equal(seen.sort().values, whole) and not torch.equal(seen, whole)


def test_moco_enqueues_the_keys_of_all_processes(tmp_path):
    found = processes.run(processes.moco_step, 2, tmp_path)
    for _, queue, split in found:
        torch.testing.assert_close(queue[:8], torch.cat([keys for keys, _, _ in found]))
        assert split == 0  # each process is a part of its own
    (found,) = processes.run(processes.moco_step, 1, tmp_path / "one")
    assert found[2] > 0


def test_mocov3_compares_with_the_keys_of_all_processes(tmp_path):
    losses = processes.run(processes.mocov3_loss, 3, tmp_path)
    torch.manual_seed(5)
    query, key = (torch.randn(2, 4, 6)[:, :3].transpose(0, 1).flatten(0, 1) for _ in range(2))
    expected = sslfast.info_nce_loss(query, key, temperature=0.2)
    torch.testing.assert_close(torch.stack(losses).mean(), expected)


# Views.


@pytest.mark.parametrize("preset", ["byol", "mocov3"])
def test_asymmetric_recipes_solarize_the_second_view_alone(preset):
    """White images: only what is solarized, a fifth of the second views, gets dark."""
    views = augment.two_views(preset, 16, 1)
    first, second = views(torch.full((2000, 1, 16, 16), 255, dtype=torch.uint8))
    assert (first.flatten(1).amin(1) > 0.9).all()
    assert 0.15 < (second.flatten(1).amax(1) < 0.1).float().mean() < 0.25


@pytest.mark.parametrize(
    "method, recipe",
    [("byol", "byol"), ("moco", "mocov2"), ("mocov3", "mocov3"), ("dino", "dino"), ("mae", "mae")],
)
def test_each_method_has_its_recipe(method, recipe, tmp_path):
    assert methods.module(method).Config(out=tmp_path, data="photos").resolve_augment() == recipe
    assert methods.module(method).Config(out=tmp_path).resolve_augment() == "mnist"
    assert config(method, tmp_path, data="photos", augment="simclr").resolve_augment() == "simclr"


# Schedules of the learning rate.


def test_rate_in_steps():
    rates = [optim.rate_at("steps", k, 0, 200) for k in (0, 119, 120, 159, 160, 199)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert optim.rate_at("steps", 1, 4, 200) == 0.25
    assert optim.rate_at("cosine", 50, 0, 100) == pytest.approx(0.5)


# Runs.


@pytest.mark.parametrize(
    "method, after, changes",
    [
        ("byol", 3, {"optimizer": "lars"}), ("byol", 5, {"accumulate": 2, "epochs": 3}),
        ("moco", 3, {"optimizer": "sgd", "schedule": "steps"}), ("moco", 4, {"head": "linear"}),
        ("mocov3", 3, {}), ("mocov3", 6, {"precision": "bfloat16"}),
        ("dino", 3, {}), ("dino", 5, {"centering": "center", "local_size": 8}),
    ],
)  # fmt: skip
def test_an_interrupted_run_ends_bitwise_the_same(
    method, after, changes, images, tmp_path, monkeypatch, interrupt
):
    whole, cut = (config(method, tmp_path / name, images, **changes) for name in ("whole", "cut"))
    loop.train(method, whole)
    interrupt(after)
    with pytest.raises(KeyboardInterrupt, match=f"sslfast train {method} --out {cut.out} --resume"):
        loop.train(method, cut)
    monkeypatch.undo()
    torch.manual_seed(99)
    loop.train(method, config(method, cut.out, images, **changes, resume=True))
    assert_same_weights(weights(whole), weights(cut))
    assert timeless(whole) == timeless(cut)
    assert "teacher_agreement" in timeless(whole)[0]


@pytest.mark.parametrize("method", TEACHERS)
def test_the_command_trains_and_evaluates(method, class_folder, tmp_path, capsys):
    from sslfast.cli import main

    small = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL[method].items()]
    options = ["--data", f"folder:{class_folder}", "--image-size", "16", "--epochs", "1", "--batch-size", "8"]
    main(["train", method, "--out", str(tmp_path / "run"), *options, *small])
    assert "10 labels per class: " in capsys.readouterr().out
    main(["eval", str(tmp_path / "run")])
    assert "10 labels per class: " in capsys.readouterr().out


@pytest.mark.parametrize("method", methods.NAMES)
def test_what_is_evaluated_is_the_trained_network(method, tmp_path):
    """The network that the optimizer trains, and not the teacher; but DINO's is the teacher."""
    model, update = build(method, tmp_path)
    trained = {id(p) for group in update.optimizer.param_groups for p in group["params"]}
    assert all((id(p) in trained) == (method != "dino") for p in model.encoder.parameters())
    assert model.encoder(torch.rand(2, 1, 12, 12)).shape == (2, 128)


@pytest.mark.parametrize("method", TEACHERS)
def test_an_update_reads_nothing_from_the_device(method, tmp_path):
    """A fake tensor has no numbers: reading one, which no CUDA graph could capture either, raises."""
    cfg = config(method, tmp_path, precision="float32", accumulate=2)
    model, faked = loop.build(method, cfg, 1, 12), {}
    with FakeTensorMode() as mode:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, x in held.items():
                    if x is not None:
                        held[name] = faked.setdefault(id(x), mode.from_tensor(x))
        update = loop.Update(model, cfg, CPU)
        for k in range(2):
            model.schedule(Now(k, 2, 1), update.optimizer.param_groups)
            model.before_step()
            for _ in range(2):
                loss, _ = update.backward(two_views())
            update.step()
        with pytest.raises(Exception, match="local_scalar_dense"):
            float(loss)


@pytest.mark.parametrize("method", TEACHERS)
def test_a_compiled_step_trains_like_an_eager_one(method, images, tmp_path):
    torch._dynamo.reset()
    options = dict(epochs=1, optimizer="sgd")  # AdamW would divide the rounding of a zero gradient by itself
    options |= {"local_crops": 0} if method == "dino" else {}  # one resolution to compile
    runs = [config(method, tmp_path / str(c), images, compile=c, **options) for c in (False, True)]
    for cfg in runs:
        loop.train(method, cfg)
    eager, compiled = map(weights, runs)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "method, name, value",
    [("byol", "momentum", 1.1), ("byol", "hidden_dim", 0), ("moco", "queue_size", 0), ("moco", "head", "x"),
     ("moco", "temperature", 0.0), ("moco", "bn_splits", 0), ("moco", "schedule", "linear"),
     ("mocov3", "heads", -1), ("mocov3", "momentum", -0.1), ("mocov3", "projection_dim", 0),
     ("mocov3", "temperature", -1.0)],
)  # fmt: skip
def test_bad_options_are_named(method, name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        config(method, tmp_path, **{name: value})


# Collapse, provoked, is said in words.


class Pull(nn.Module):
    def forward(self, x, y, *_, **__):
        return sslfast.byol_loss(x, y)


def without_safeguards(method, model, monkeypatch):
    """What keeps a method from giving all images one embedding is taken away."""
    module = methods.module(method)
    if method == "simclr":
        model.loss, model.projector[-1] = Pull(), nn.Identity()
    elif method == "byol":
        model.predictor, model.first_momentum = nn.Identity(), 0.0
    elif method == "moco":
        monkeypatch.setattr(module, "moco_loss", Pull())
    elif method == "dino":
        model.losses.images.centering, model.losses.images.momentum = "center", 1.0
        monkeypatch.setattr(module, "cosine_momentum", lambda *args: 0.0)
    else:
        model.predictor = model.projector[-1] = model.keys.model[1][-1] = nn.Identity()
        model.first_momentum = 0.0
        monkeypatch.setattr(module, "info_nce_loss", Pull())


@pytest.mark.parametrize("method", ["simclr", *TEACHERS])
def test_a_provoked_collapse_is_said(method, images, tmp_path, monkeypatch, capsys):
    build = loop.build

    def broken(*args):
        model = build(*args)
        without_safeguards(method, model, monkeypatch)
        return model

    monkeypatch.setattr(loop, "build", broken)
    cfg = config(method, tmp_path / "run", images, epochs=10, learning_rate=0.01, warmup_epochs=0.0)
    loop.train(method, cfg)
    printed = " ".join(capsys.readouterr().out.split())
    words = (
        "the embeddings have collapsed", "the embeddings use few", "student and teacher agree as much",
        "the teacher's assignments have collapsed",
    )  # fmt: skip
    assert any(f"warning: {w}" in printed for w in words), printed
    rows = [line.split(",") for line in timeless(cfg)]
    first, last = (dict(zip(rows[0], row, strict=True)) for row in (rows[1], rows[-1]))
    assert float(last["feature_std"]) < 0.5 * float(first["feature_std"])
    if method in TEACHERS:
        assert float(last["teacher_agreement"]) > 0.95 and float(last["teacher_contrast"]) < 0.02
