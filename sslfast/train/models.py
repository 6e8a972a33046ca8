"""Backbones for small images. Each has `.dim`, the width of its output [B, dim]."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem without pooling, stages of basic blocks, global average: [B, C, H, W] -> [B, dim].

    Args:
        channels: of the input.
        widths: of the stages; the stem has the first.
        depth: blocks per stage.
        strides: of the stem, then of the first block of each stage.
    """

    def __init__(self, channels: int, widths: Sequence[int], depth: int, strides: Sequence[int]) -> None:
        super().__init__()
        stem, *stages = strides
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, stem, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        width_in = widths[0]
        for width, stride in zip(widths, stages, strict=True):
            for i in range(depth):
                blocks.append(BasicBlock(width_in, width, stride if i == 0 else 1))
                width_in = width
        self.stages = nn.Sequential(*blocks)
        self.dim = width_in
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x)).mean((2, 3))


def backbone(name: str, channels: int) -> ResNet:
    """ "compact" (0.3 M parameters, for CPUs) or "resnet18" with a 3x3 stem of stride 1 and no pooling."""
    if name == "compact":
        return ResNet(channels, (32, 64, 128), 1, (2, 1, 2, 2))
    if name == "resnet18":
        return ResNet(channels, (64, 128, 256, 512), 2, (1, 1, 2, 2, 2))
    raise ValueError(f"backbone: expected compact or resnet18, got {name!r}")
