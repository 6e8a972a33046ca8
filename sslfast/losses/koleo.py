"""KoLeo (Sablayrolles et al. 2019): features of a batch spread out over the sphere."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast.ops._check import FLOATS, check_tensor, number, working_dtype

CHUNK = 1 << 22  # similarities at a time


def koleo_loss(features: Tensor, eps: float = 1e-8) -> Tensor:
    """-mean_i log(|x_i - x_nn(i)| + eps) of rows of unit length and their nearest neighbours.

    As DINOv2 (Oquab et al. 2023) has it, in float32 or wider whatever autocast says. Neighbours are found in
    chunks of rows, so no matrix of all similarities exists; the gradient goes to both rows of each pair.

    Args:
        features: [N, D], N at least 2; normalised here. Their neighbours are of this process.
        eps: added to each distance, positive.

    Returns:
        0-d float32 (float64 for float64 features). Differentiable in features.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value.
    """
    check_tensor("features", features, FLOATS, (None, None))
    if len(features) < 2:
        raise ValueError(f"features: expected at least two rows, got {len(features)}")
    if not number("eps", eps) > 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.to(working_dtype(features)), dim=1)
        distance = (x - x[_nearest(x.detach())]).norm(dim=1)
    return -(distance + eps).log().mean()


def _nearest(x: Tensor) -> Tensor:
    """[N, D] -> index of the row with the largest product with each row but itself."""
    found = []
    for i, rows in enumerate(x.split(step := max(1, CHUNK // len(x)))):
        products = rows @ x.T
        products.diagonal(i * step).fill_(-torch.inf)
        found.append(products.argmax(1))
    return torch.cat(found)


class KoLeoLoss(nn.Module):
    """`koleo_loss` as a module: loss(features)."""

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, features: Tensor) -> Tensor:
        return koleo_loss(features, self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
