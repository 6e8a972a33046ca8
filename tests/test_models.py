"""Backbones: sizes as published, any image size, positions, attention, models of other libraries."""

import sys
import types

import pytest
import torch
from torch import nn

from sslfast.train import models
from sslfast.train.vit import ViT, sine_cosine_positions


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "name, dim, size",
    [("compact", 128, 28), ("resnet18", 512, 32), ("resnet50", 2048, 32), ("vit_tiny", 192, 32)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_backbone(name, dim, size, channels):
    encoder = models.backbone(name, channels, size)
    assert encoder.dim == dim
    features = encoder(torch.rand(2, channels, size, size))
    assert features.shape == (2, dim) and features.isfinite().all()
    features.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize(
    "name, published", [("resnet18", 11_689_512 - 513_000), ("resnet50", 25_557_032 - 2_049_000)]
)
def test_resnets_have_the_published_size(name, published):
    """torchvision's counts without the classifier; the small stem is 3x3 where theirs is 7x7."""
    assert count(models.backbone(name, 3, 224)) == published
    assert count(models.backbone(name, 3, 32)) == published - 64 * 3 * (49 - 9)
    assert count(models.backbone(name, 3, 32, stem="imagenet")) == published


@pytest.mark.parametrize("stem, side", [("small", 8), ("imagenet", 2)])
def test_stems_keep_or_reduce_the_resolution(stem, side):
    encoder = models.backbone("resnet18", 3, 64, stem=stem)
    assert encoder.stages(encoder.stem(torch.rand(1, 3, 64, 64))).shape == (1, 512, side, side)


# timm's counts of vit_*_patch16_224 without the classifier of 1,000 classes
@pytest.mark.parametrize(
    "name, dim, published",
    [
        ("vit_tiny", 192, 5_717_416),
        ("vit_small", 384, 22_050_664),
        ("vit_base", 768, 86_567_656),
        ("vit_large", 1024, 304_326_632),
    ],
)
def test_vits_have_the_published_size(name, dim, published):
    with torch.device("meta"):
        encoder = models.backbone(name, 3, 224)
    assert count(encoder) == published - (1000 * dim + 1000)


def small_vit(**options) -> ViT:
    return ViT(3, 32, 8, dim=24, depth=3, heads=4, **options)


@pytest.mark.parametrize("positions", ["learned", "fixed"])
def test_vit_takes_other_sizes_by_interpolating_positions(positions):
    vit = small_vit(positions=positions).eval()
    images = torch.rand(2, 3, 48, 24)
    assert vit.tokens(images).shape == (2, 1 + 6 * 3, 24) and vit(images).shape == (2, 24)
    table = vit.positions.detach().unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(table, size=(6, 3), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(vit._positions_for((6, 3)), expected)
    assert vit._positions_for((4, 4)) is vit.positions
    assert ("positions" in dict(vit.named_parameters())) == (positions == "learned")
    assert "positions" in vit.state_dict()


def test_vit_attention_of_the_last_block():
    vit = small_vit().double().eval()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    weights = vit.last_attention(images)
    assert weights.shape == (2, 4, 17, 17)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 17, dtype=torch.float64))
    # with these weights put in by hand the last block gives the tokens that the fused attention gives
    seen = []
    last = vit.blocks[-1]
    handle = last.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    tokens = vit.tokens(images)
    handle.remove()
    (x, after), *_ = seen
    values = last.attention.qkv(last.norm1(x))[..., 48:].unflatten(2, (4, 6)).transpose(1, 2)
    mixed = last.attention.proj((weights @ values).transpose(1, 2).flatten(2)) + x
    torch.testing.assert_close(mixed + last.mlp(last.norm2(mixed)), after)
    torch.testing.assert_close(vit.norm(after), tokens)


def test_drop_path_drops_whole_samples_and_only_in_training():
    vit = small_vit(drop_path=0.5)
    assert [block.drop_path for block in vit.blocks] == [0, 0.25, 0.5]
    block = vit.blocks[-1]
    branch = torch.ones(4000, 2, 3)
    dropped = block._drop(branch)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert (dropped == dropped[:, :1, :1]).all() and abs(dropped.mean() - 1) < 0.1
    assert block.eval()._drop(branch) is branch


def test_fixed_positions_are_sines_and_cosines_of_column_then_row():
    table = sine_cosine_positions(8, (2, 3)).view(2, 3, 8)
    for row in range(2):
        for column in range(3):
            angles = [torch.tensor([1.0, 0.01]) * coordinate for coordinate in (column, row)]
            expected = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)])
            torch.testing.assert_close(table[row, column], expected)
    with pytest.raises(ValueError, match="dim: expected a multiple of 4"):
        sine_cosine_positions(6, (2, 2))


@pytest.mark.parametrize("size", [30, 12])
def test_a_patch_divides_the_image(size):
    with pytest.raises(ValueError, match="patch_size: expected a divisor"):
        models.backbone("vit_tiny", 3, size, patch_size=8)
    with pytest.raises(ValueError, match="patch_size: expected a divisor"):
        small_vit()(torch.rand(1, 3, 32, size))


def test_unknown_positions_are_refused():
    with pytest.raises(ValueError, match="positions: expected learned or fixed"):
        small_vit(positions="rotary")


# Models of torchvision and timm, by stand-ins with the interface that we use of them.


def features_and_classifier(*_, **options) -> nn.Module:
    if options.get("name") == "convolutions":
        return nn.Sequential(nn.Conv2d(3, 2, 1))
    if options.get("name") not in (None, "net"):
        raise ValueError(f"Unknown model {options['name']}")
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5))


@pytest.fixture
def libraries(monkeypatch):
    torchvision, timm = types.ModuleType("torchvision.models"), types.ModuleType("timm")
    torchvision.get_model = lambda name, weights: features_and_classifier(name=name)

    def create_model(name, pretrained, num_classes, in_chans, **sized):
        assert not pretrained and num_classes == 0 and sized == ({"img_size": 32} if "vit" in name else {})
        model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_chans, 9))
        model.num_features = 9
        return model

    timm.create_model = create_model
    for name, module in (("torchvision", torchvision), ("torchvision.models", torchvision), ("timm", timm)):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("channels", [1, 3])
def test_models_of_other_libraries(libraries, channels):
    images = torch.rand(2, channels, 32, 32)
    encoder = models.backbone("torchvision:net", channels, 32)
    assert encoder.dim == 7 and encoder(images).shape == (2, 7)  # without the classifier
    for name in ("net", "vit_small"):
        encoder = models.backbone(f"timm:{name}", channels, 32)
        assert encoder.dim == 9 and encoder(images).shape == (2, 9)


def test_models_of_other_libraries_that_do_not_fit(libraries):
    with pytest.raises(ValueError, match="backbone: torchvision has no model 'other'"):
        models.backbone("torchvision:other", 3, 32)
    with pytest.raises(ValueError, match="has no linear classifier"):
        models.backbone("torchvision:convolutions", 3, 32)
    with pytest.raises(ValueError, match="takes 1 or 3 channels"):
        models.backbone("torchvision:net", 2, 32)


@pytest.mark.parametrize("name", ["resnet", "timm:", "hub:net", ""])
def test_unknown_backbones_are_refused(name):
    with pytest.raises(ValueError, match="backbone: expected one of compact, "):
        models.backbone(name, 3, 32)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_missing_library_is_named(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ValueError, match=f"backbone: {library}:net needs the package {library}"):
        models.backbone(f"{library}:net", 3, 32)
