"""The steps of a view in plain PyTorch: what every backend's kernels are to give. Images are [C, h, w] in
[0, 1]."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GRAY = (0.299, 0.587, 0.114)


def to_gray(x: Tensor) -> Tensor:
    """[C, h, w] -> [1, h, w]"""
    return x if len(x) == 1 else (x * x.new_tensor(GRAY).view(3, 1, 1)).sum(0, keepdim=True)


def resize(x: Tensor, size: tuple[int, int], bicubic: bool) -> Tensor:
    """Along rows, then along columns, or the other way round where many more rows than columns go, as Pillow
    13 does it; both clipped to [0, 1]. Pillow also rounds both to 8 bits."""
    (_, height, width), (after_h, after_w) = x.shape, size
    across = resize_weights(x, width, after_w, bicubic).T
    down = resize_weights(x, height, after_h, bicubic)
    if height - after_h > 2 * max(width - after_w, 0):
        return ((down @ x).clamp(0, 1) @ across).clamp(0, 1)
    return (down @ (x @ across).clamp(0, 1)).clamp(0, 1)


def resize_weights(x: Tensor, before: int, after: int, bicubic: bool) -> Tensor:
    """[after, before]: Pillow's filters, a triangle or Keys' cubic with a = -0.5, widened when shrinking."""
    at = torch.arange(after, device=x.device, dtype=x.dtype) + 0.5
    pixel = torch.arange(before, device=x.device, dtype=x.dtype) + 0.5
    t = (pixel - at.unsqueeze(1) * (before / after)).abs() / max(1.0, before / after)
    if bicubic:
        near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
        weights = torch.where(t < 1, near, torch.where(t < 2, far, 0))
    else:
        weights = (1 - t).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def warp(x: Tensor, matrix: Sequence[float]) -> Tensor:
    """Bilinear, 0 outside; see ViewParams.affine."""
    height, width = x.shape[1:]
    if list(matrix) == [1, 0, 0, 0, 1, 0]:
        return x
    y = (torch.arange(height, device=x.device, dtype=x.dtype) - (height - 1) / 2).unsqueeze(1)
    x_ = torch.arange(width, device=x.device, dtype=x.dtype) - (width - 1) / 2
    column = matrix[0] * x_ + matrix[1] * y + matrix[2] + (width - 1) / 2
    row = matrix[3] * x_ + matrix[4] * y + matrix[5] + (height - 1) / 2
    left, top = column.floor(), row.floor()
    out = torch.zeros_like(x)
    for down in (0, 1):
        for right in (0, 1):
            weight = (1 - (row - top - down).abs()) * (1 - (column - left - right).abs())
            r, c = top + down, left + right
            inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
            pixel = x[:, r.clamp(0, height - 1).long(), c.clamp(0, width - 1).long()]
            out = out + torch.where(inside, weight, 0) * pixel
    return out


def brightness(x: Tensor, factor: float) -> Tensor:
    return (factor * x).clamp(0, 1)


def contrast(x: Tensor, factor: float) -> Tensor:
    return (factor * x + (1 - factor) * to_gray(x).mean()).clamp(0, 1)


def saturation(x: Tensor, factor: float) -> Tensor:
    return x if len(x) == 1 else (factor * x + (1 - factor) * to_gray(x)).clamp(0, 1)


def hue(x: Tensor, turns: float) -> Tensor:
    """Through hue in sixths of a turn, value and chroma."""
    if len(x) == 1 or turns == 0:
        return x
    r, g, b = x
    value = x.amax(0)
    chroma = value - x.amin(0)
    by = torch.where(chroma > 0, chroma, 1)
    sixth = torch.where(value == r, (g - b) / by, torch.where(value == g, (b - r) / by + 2, (r - g) / by + 4))
    k = (sixth + 6 * turns + x.new_tensor([5, 3, 1]).view(3, 1, 1)) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


ADJUST: tuple[Callable[[Tensor, float], Tensor], ...] = (brightness, contrast, saturation, hue)


def blur(x: Tensor, sigma: float, radius: int) -> Tensor:
    for _ in range(2):
        x = x.transpose(1, 2) @ blur_weights(x, x.shape[1], sigma, radius).T
    return x


def blur_weights(x: Tensor, n: int, sigma: float, radius: int) -> Tensor:
    """[n, n]: a Gaussian cut at the radius, pixels outside being reflected, as often as it takes."""
    distance = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-(distance.to(x.dtype) ** 2) / (2 * sigma**2), 0)
    period = max(1, 2 * (n - 1))
    at = (torch.arange(n, device=x.device).unsqueeze(1) + distance) % period
    at = torch.minimum(at, period - at) if n > 1 else at
    return x.new_zeros(n, n).scatter_add_(1, at, kernel.expand(n, -1))
