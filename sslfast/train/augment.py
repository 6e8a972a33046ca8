"""Batched augmentations on the training device, by kornia. Images are float in [0, 1], [B, C, H, W]."""

import torch
from torch import Tensor, nn


def two_views(preset: str, image_size: int, channels: int) -> nn.Module:
    """A module that maps [B, C, H, W] to two such tensors: two independent random views of each image.

    Args:
        preset: "simclr": the recipe of the official code for small images (colour strength 0.5, blur above 32
        pixels);
            "mnist": small affine maps, since digits are neither mirrored nor coloured.

    Raises:
        ValueError: an unknown preset.
    """
    if preset == "simclr":
        return _TwoViews(_simclr(image_size, channels))
    if preset == "mnist":
        return _TwoViews(_mnist())
    raise ValueError(f"augment: expected simclr or mnist, got {preset!r}")


class _TwoViews(nn.Module):
    def __init__(self, augment: nn.Module) -> None:
        super().__init__()
        self.augment = augment

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        views = self.augment(images.repeat(2, 1, 1, 1)).clamp(0, 1)
        return views.contiguous(memory_format=torch.channels_last).chunk(2)


def _simclr(size: int, channels: int, strength: float = 0.5) -> nn.Module:
    import kornia.augmentation as K

    s = strength
    steps: list[nn.Module] = [
        K.RandomResizedCrop((size, size), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)),
        K.RandomHorizontalFlip(),
    ]
    if channels == 3:
        steps += [K.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8), K.RandomGrayscale(p=0.2)]
    if size > 32:
        kernel = size // 10 // 2 * 2 + 1
        steps.append(K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=0.5))
    return nn.Sequential(*steps)


def _mnist() -> nn.Module:
    import kornia.augmentation as K

    return K.RandomAffine(
        degrees=20.0,
        translate=(0.1, 0.1),
        scale=(0.7, 1.2),
        shear=(-15.0, 15.0, -15.0, 15.0),  # type: ignore[arg-type]  # x and y, which kornia's annotation leaves out
        p=0.5,  # half of the views are the digit as it is, which suits the few labels of the evaluation best
    )
