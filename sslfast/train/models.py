"""Backbones. Each maps images [B, C, H, W] to features [B, dim] and has `.dim`."""

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from sslfast.train.config import TrainConfig
from sslfast.train.vit import SIZES, ViT

RESNETS = ("compact", "resnet18", "resnet50")
NAMES = (*RESNETS, *SIZES)


def _conv(width_in: int, width: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width)
    )


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, or with a bottleneck 1x1, 3x3, 1x1 (He et al. 2016).

    The stride of a bottleneck is in its 3x3 convolution, as torchvision has it.
    """

    def __init__(self, width_in: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        width_out = 4 * width if bottleneck else width
        if bottleneck:
            layers = [_conv(width_in, width, 1), _conv(width, width, 3, stride), _conv(width, width_out, 1)]
        else:
            layers = [_conv(width_in, width, 3, stride), _conv(width, width, 3)]
        self.layers = nn.ModuleList(layers)
        self.shortcut = (
            nn.Identity() if stride == 1 and width_in == width_out else _conv(width_in, width_out, 1, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers[:-1]:
            y = F.relu(layer(y))
        return F.relu(self.layers[-1](y) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, stages of blocks, global average: [B, C, H, W] -> [B, dim].

    Args:
        channels: of the input.
        widths: of the stages (a bottleneck's output is 4 times as wide); the stem has the first.
        depths: blocks per stage.
        strides: of the first block of each stage.
        bottleneck: blocks of three convolutions.
        stem: "small": 3x3, stride 1 (2 for "compact"); "imagenet": 7x7 with stride 2 and max pooling.
        stem_stride: of the small stem.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        depths: Sequence[int],
        strides: Sequence[int],
        *,
        bottleneck: bool = False,
        stem: str = "small",
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if stem == "imagenet":
            self.stem = nn.Sequential(_conv(channels, widths[0], 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        else:
            self.stem = nn.Sequential(_conv(channels, widths[0], 3, stem_stride), nn.ReLU())
        blocks: list[nn.Module] = []
        self.dim = widths[0]
        for width, depth, stride in zip(widths, depths, strides, strict=True):
            for i in range(depth):
                blocks.append(Block(self.dim, width, stride if i == 0 else 1, bottleneck))
                self.dim = 4 * width if bottleneck else width
        self.stages = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x)).mean((2, 3))


class Borrowed(nn.Module):
    """A model of torchvision or timm without its classifier; grey images are repeated to its 3 channels."""

    def __init__(self, model: nn.Module, dim: int, channels: int) -> None:
        super().__init__()
        self.model, self.dim, self.repeats = model, dim, 3 if channels == 1 else 1

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.repeat(1, self.repeats, 1, 1))


def backbone(
    name: str,
    channels: int,
    image_size: int,
    *,
    stem: str = "auto",
    patch_size: int = 0,
    positions: str = "learned",
    heads: int = 0,
    pool: str = "class",
) -> nn.Module:
    """The backbone called `name`.

    Args:
        name: "compact" (0.3 M parameters, for CPUs), "resnet18", "resnet50", "vit_nano" (0.8 M, for CPUs),
            "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "torchvision:MODEL" or "timm:MODEL".
        channels, image_size: of the training images.
        stem: of a ResNet: "small" (3x3, stride 1), "imagenet" (7x7, stride 2, pooling), or "auto": by
        image_size.
        patch_size, positions, pool: of a ViT; patch_size 0: `auto_patch_size`.
        heads: of a ViT; 0: those of its name.

    Raises:
        ValueError: an unknown name, a package that is not installed, or a patch that does not divide the
        image.
    """
    if stem == "auto":
        stem = "small" if image_size <= 64 else "imagenet"
    if name == "compact":
        return ResNet(channels, (32, 64, 128), (1, 1, 1), (1, 2, 2), stem_stride=2)
    if name == "resnet18":
        return ResNet(channels, (64, 128, 256, 512), (2, 2, 2, 2), (1, 2, 2, 2), stem=stem)
    if name == "resnet50":
        return ResNet(channels, (64, 128, 256, 512), (3, 4, 6, 3), (1, 2, 2, 2), bottleneck=True, stem=stem)
    if name in SIZES:
        sizes = {**SIZES[name], "heads": heads or SIZES[name]["heads"]}
        if sizes["dim"] % sizes["heads"]:
            raise ValueError(f"heads: expected a divisor of {sizes['dim']}, got {heads}")
        patch_size = patch_size or auto_patch_size(image_size)
        return ViT(channels, image_size, patch_size, **sizes, positions=positions, pool=pool)
    library, _, model = name.partition(":")
    if library in ("torchvision", "timm") and model:
        return _borrow(library, model, channels, image_size)
    raise ValueError(
        f"backbone: expected one of {', '.join(NAMES)}, torchvision:MODEL or timm:MODEL, got {name!r}"
    )


def auto_patch_size(image_size: int) -> int:
    """The largest of 16, 8, 4, 2 and 1 that divides the image into seven patches a side or more."""
    return next(p for p in (16, 8, 4, 2, 1) if p == 1 or (image_size % p == 0 and image_size >= 7 * p))


def build(cfg: TrainConfig, channels: int, size: int, pool: str = "class") -> Any:
    """The backbone of a run for images [channels, size, size]."""
    return backbone(
        cfg.backbone, channels, size, stem=cfg.stem, patch_size=cfg.patch_size, positions=cfg.positions,
        heads=cfg.heads, pool=pool,
    )  # fmt: skip


def _borrow(library: str, name: str, channels: int, image_size: int) -> nn.Module:
    try:
        package = importlib.import_module("torchvision.models" if library == "torchvision" else "timm")
    except ModuleNotFoundError as error:
        raise ValueError(f"backbone: {library}:{name} needs the package {library}: {error}") from error
    try:
        if library == "timm":
            sized = {"img_size": image_size} if name.startswith("vit") else {}
            model = package.create_model(name, pretrained=False, num_classes=0, in_chans=channels, **sized)
            return Borrowed(model, model.num_features, channels=3)  # timm takes any number of channels
        model = package.get_model(name, weights=None)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"backbone: {library} has no model {name!r}: {error}") from error
    if channels not in (1, 3):
        raise ValueError(f"backbone: {library}:{name} takes 1 or 3 channels, got {channels}")
    heads = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if not heads:
        raise ValueError(f"backbone: {library}:{name} has no linear classifier to take off")
    path, classifier = heads[-1]
    model.set_submodule(path, nn.Identity())
    return Borrowed(model, classifier.in_features, channels)
