"""MAE's training, what it draws and measures, and fine-tuning; tests/test_parity_mae.py has its numbers."""

import json

import pytest
import torch
from test_methods import CPU, config
from tiny_runs import assert_same_weights, timeless, weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sslfast
from sslfast.ops import patchify, unpatchify
from sslfast.train import augment, data, finetuning, loop, models, report
from sslfast.train.methods import mae


def build(tmp_path, channels=3, size=16, **changes):
    cfg = config("mae", tmp_path, **changes)
    model = loop.build("mae", cfg, channels, size)
    return model, cfg


def image_set(count=12, channels=3, size=16, labels=None):
    return data.ImageSet(torch.randint(0, 256, (count, channels, size, size)).byte(), labels)


def predicting(model, guess, monkeypatch):
    """The decoder predicts guess(target patches, mask) instead."""
    reconstruct = model.reconstruct

    def replaced(images, generator=None):
        _, mask, tokens = reconstruct(images, generator)
        return guess(patchify(images, model.encoder.patch_size), mask), mask, tokens

    monkeypatch.setattr(model, "reconstruct", replaced)


def test_sizes_are_the_papers(tmp_path):
    """ViT-B, L and H; a decoder of width 512, 8 blocks and 16 heads."""
    for name, sizes in {
        "vit_base": (768, 12, 12),
        "vit_large": (1024, 24, 16),
        "vit_huge": (1280, 32, 16),
    }.items():
        assert tuple(models.SIZES[name].values()) == sizes
    with torch.device("meta"):
        model, cfg = build(tmp_path, size=224, backbone="vit_base", patch_size=16)
    assert (cfg.mask_ratio, cfg.recipe) == (0.75, "mae")
    assert model.decoder.embed.weight.shape == (512, 768) and len(model.decoder.blocks) == 8
    assert model.decoder.blocks[0].attention.heads == 16 and model.decoder.pixels.weight.shape == (768, 512)
    count = sum(p.numel() for p in model.parameters())
    positions = 197 * (768 + 512)  # parameters in the official code, fixed there too
    assert count + positions == 111_907_840
    groups = model.parameter_groups(0.05)
    assert [(g["weight_decay"], g["betas"]) for g in groups] == [(0.05, (0.9, 0.95)), (0.0, (0.9, 0.95))]


def test_images_need_not_be_square_nor_of_the_trained_size(tmp_path):
    model, _ = build(tmp_path, patch_size=4)
    for height, width in ((16, 16), (8, 24), (32, 20)):
        images = torch.rand(2, 3, height, width)
        pred, mask, tokens = model.reconstruct(images)
        patches = height * width // 16
        assert pred.shape == (2, patches, 48) and mask.shape == (2, patches)
        assert tokens.shape == (2, 1 + patches // 4, 128)
        loss, _ = model.training_step((images,))
        loss.backward()
    with pytest.raises(ValueError, match="patch_size: expected a divisor"):
        model.training_step((torch.rand(2, 3, 16, 18),))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_masks_of_nothing_and_of_everything(ratio, tmp_path):
    model, _ = build(tmp_path, patch_size=4, mask_ratio=ratio)
    loss, metrics = model.training_step((torch.rand(3, 3, 16, 16),))
    loss.backward()
    assert (loss == 0) == (ratio == 0)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert metrics["embeddings"].isfinite().all()
    assert (model.show(image_set(), tmp_path, CPU) == {}) == (ratio == 0)


def test_one_view_of_crops_and_flips_alone(tmp_path):
    model, cfg = build(tmp_path, data="photos", augment="auto", size=24)
    colours = torch.randint(0, 256, (8, 3, 1, 1), dtype=torch.uint8)
    (view,) = model.views(cfg, 3, 24)(colours.expand(8, 3, 24, 24).contiguous())
    assert view.shape == (8, 3, 24, 24)
    assert (view - view[:, :, :1, :1]).abs().max() < 1e-5  # a colour stays one, and which
    (same,) = augment.one_view("mnist", 24, 1)(torch.randint(0, 256, (8, 1, 24, 24), dtype=torch.uint8))
    assert same.shape == (8, 1, 24, 24)


# What is drawn and measured.


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_perfect_prediction_is_drawn_as_the_original(norm_pix, tmp_path, monkeypatch):
    """Normalised pixels are put back to the mean and variance of their patch."""
    model, _ = build(tmp_path, patch_size=4, norm_pix=norm_pix)

    def perfect(target, mask):
        if not norm_pix:
            return target
        return (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()

    predicting(model, perfect, monkeypatch)
    drawn = []
    monkeypatch.setattr(
        report, "pictures", lambda titles, columns, path: drawn.append((titles, columns, path))
    )
    images = image_set()
    (measured,) = model.show(images, tmp_path, CPU).values()
    assert measured["reconstruction"][0] < 1e-10 < 0.01 < measured["visible mean"][0]
    ((titles, (masked, reconstructed, original), path),) = drawn
    assert titles == ("masked", "reconstructed", "original") and path.name == "reconstruction.png"
    torch.testing.assert_close(original, images.images[:10].float() / 255)
    torch.testing.assert_close(reconstructed, original)
    hidden = patchify(masked, 4).eq(0.5).all(2)
    assert (hidden.sum(1) == 12).all()
    assert torch.equal(patchify(masked, 4)[~hidden], patchify(original, 4)[~hidden])


def test_the_mean_of_the_visible_pixels_is_the_yardstick(tmp_path, monkeypatch):
    model, _ = build(tmp_path, patch_size=4, norm_pix=False)

    def visible_mean(target, mask):
        seen = [patches[mask_row == 0].mean() for patches, mask_row in zip(target, mask, strict=True)]
        return torch.stack(seen)[:, None, None].expand_as(target)

    predicting(model, visible_mean, monkeypatch)
    (measured,) = model.show(image_set(300), tmp_path, CPU).values()
    assert measured["reconstruction"][0] == pytest.approx(measured["visible mean"][0], rel=1e-5)
    assert (
        model.show(image_set(300), tmp_path, CPU) != {}
        and (tmp_path / "reconstruction.png").stat().st_size > 0
    )


def test_pictures_of_grey_and_colour(tmp_path):
    for channels in (1, 3):
        columns = [torch.rand(4, channels, 8, 12) for _ in range(3)]
        report.pictures("abc", columns, tmp_path / f"{channels}.png")
        assert (tmp_path / f"{channels}.png").read_bytes()[1:4] == b"PNG"


def test_patchify_is_undone():
    images = torch.rand(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert torch.equal(unpatchify(patches, 4, (3, 8, 12)), images)
    assert torch.equal(patches[1, 4].view(4, 4, 3).permute(2, 0, 1), images[1, :, 4:8, 4:8])


# Runs.


def test_an_interrupted_run_ends_bitwise_the_same(images, tmp_path, monkeypatch, interrupt):
    whole, cut = (config("mae", tmp_path / name, images) for name in ("whole", "cut"))
    loop.train("mae", whole)
    interrupt(3)
    with pytest.raises(KeyboardInterrupt, match="sslfast train mae"):
        loop.train("mae", cut)
    monkeypatch.undo()
    torch.manual_seed(99)
    loop.train("mae", config("mae", cut.out, images, resume=True))
    assert_same_weights(weights(whole), weights(cut))
    assert timeless(whole) == timeless(cut)
    assert (whole.out / "reconstruction.png").exists()


def test_an_update_reads_nothing_from_the_device(tmp_path):
    """A fake tensor has no numbers: reading one, which no CUDA graph could capture either, raises."""
    model, cfg = build(tmp_path, precision="float32")
    with FakeTensorMode() as mode:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                held.update({name: mode.from_tensor(x) for name, x in held.items() if x is not None})
        update = loop.Update(model, cfg, CPU)
        for _ in range(2):
            loss, _ = update.backward((torch.rand(4, 3, 16, 16),))
            update.step()
        with pytest.raises(Exception, match="local_scalar_dense"):
            float(loss)


def test_a_step_compiles_as_one_graph(tmp_path, monkeypatch):
    """Both with the same masks: compiled code may draw other numbers."""
    torch._dynamo.reset()
    noise, images = torch.rand(4, 16), torch.rand(4, 3, 16, 16)
    given = lambda *args, **_: sslfast.random_patch_mask(*args, noise=noise)  # noqa: E731
    monkeypatch.setattr(mae, "random_patch_mask", given)
    model, _ = build(tmp_path, patch_size=4)
    losses, gradients = [], []
    for step in (
        model.training_step,
        torch.compile(model.training_step, fullgraph=True, backend="aot_eager"),
    ):
        loss, _ = step((images,))
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_the_command_trains_evaluates_and_fine_tunes(class_folder, tmp_path, capsys):
    from sslfast.cli import main

    run = tmp_path / "run"
    options = ["--data", f"folder:{class_folder}", "--image-size", "16", "--epochs", "1", "--batch-size", "8"]
    main(["train", "mae", "--out", str(run), *options, "--patch-size", "4", "--no-norm-pix"])
    printed = capsys.readouterr().out
    assert "10 labels per class: " in printed and "squared error of masked patches: reconstruction" in printed
    main(["eval", str(run), "--finetune", "1"])
    assert "fine-tuned for 1 epochs: " in capsys.readouterr().out
    found = json.loads((run / "evaluation.json").read_text())
    assert set(found["fine-tuned for 1 epochs"]) == {"trained encoder", "untrained encoder"}
    with pytest.raises(SystemExit):
        main(["eval", str(run), "--finetune", "-1"])
    assert "finetune: expected" in capsys.readouterr().err


def test_pictures_of_images_without_labels(tmp_path, images):
    loop.train("mae", config("mae", tmp_path / "run", images))
    assert list(json.loads((tmp_path / "run/evaluation.json").read_text())) == [
        "squared error of masked patches"
    ]


@pytest.mark.parametrize(
    "name, value",
    [("mask_ratio", 1.1), ("mask_ratio", -0.1), ("decoder_dim", -1), ("decoder_depth", -1), ("pool", "max"),
     ("decoder_heads", 3), ("decoder_dim", 66), ("backbone", "compact")],
)  # fmt: skip
def test_bad_options_are_named(name, value, tmp_path):
    named = "decoder_dim" if name == "decoder_heads" else name
    with pytest.raises(ValueError, match=f"{named}: "):
        build(tmp_path, **{name: value})


@pytest.mark.parametrize(
    "size, patch", [(28, 4), (32, 4), (64, 8), (96, 8), (112, 16), (224, 16), (30, 2), (13, 1)]
)
def test_patches_fit_the_image_by_themselves(size, patch):
    assert models.auto_patch_size(size) == patch
    assert models.backbone("vit_nano", 1, size).patch_size == patch


def test_what_is_evaluated(tmp_path):
    images = torch.rand(2, 3, 16, 16)
    for pool in ("mean", "class"):
        model, _ = build(tmp_path, patch_size=4, pool=pool)
        tokens = model.encoder.tokens(images)
        expected = tokens[:, 0] if pool == "class" else tokens[:, 1:].mean(1)
        assert torch.equal(model.encoder(images), expected)


# Fine-tuning.


def separable(count):
    """Dark and light images."""
    labels = torch.arange(count) % 2
    images = torch.randint(0, 60, (count, 3, 16, 16)) + 150 * labels[:, None, None, None]
    return data.ImageSet(images.byte(), labels)


@pytest.mark.parametrize("method", ["mae", "simclr"])
def test_fine_tuning_trains_the_whole_encoder(method, tmp_path):
    dataset = data.Dataset(separable(64), separable(40), ("dark", "light"))
    cfg = config(method, tmp_path, precision="float32", batch_size=32)
    model = loop.build(method, cfg, 3, 16)
    before = {name: p.clone() for name, p in model.encoder.named_parameters()}
    assert finetuning.run(model.encoder, dataset, cfg, 12, CPU) == 1.0
    assert all(not torch.equal(p, before[name]) for name, p in model.encoder.named_parameters())
    again = loop.build(method, cfg, 3, 16)
    finetuning.run(again.encoder, dataset, cfg, 12, CPU)
    assert_same_weights(model.encoder.state_dict(), again.encoder.state_dict())


def test_earlier_blocks_are_fine_tuned_more_slowly(tmp_path):
    model, _ = build(tmp_path, patch_size=4)
    classifier = nn.Linear(128, 2)
    groups = finetuning.groups(nn.Sequential(model.encoder, classifier))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    encoder = model.encoder
    assert scale[id(classifier.weight)] == scale[id(encoder.norm.bias)] == 1
    for i, block in enumerate(encoder.blocks):
        assert scale[id(block.mlp[0].weight)] == pytest.approx(0.75 ** (4 - i))
    assert scale[id(encoder.patch_embed.weight)] == scale[id(encoder.class_token)] == pytest.approx(0.75**5)
    assert decay[id(classifier.weight)] == 0.05 and decay[id(classifier.bias)] == 0
    assert len(scale) == len(list(encoder.parameters())) + 2
