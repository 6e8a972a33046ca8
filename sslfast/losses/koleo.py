"""KoLeo (Sablayrolles et al. 2019): features of a batch spread out over the sphere."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast.distributed import _sharded as sharded
from sslfast.distributed._join import Group, across, collective, join
from sslfast.distributed._ranks import ALONE, Ranks
from sslfast.losses._common import reduced
from sslfast.ops._check import FLOATS, check_tensor, number, working_dtype

CHUNK = 1 << 22  # similarities at a time


@collective
def koleo_loss(
    features: Tensor,
    eps: float = 1e-8,
    *,
    group: Group = None,
    strategy: str = "auto",
    scaling: str = "ddp",
) -> Tensor:
    """-mean_i log(|x_i - x_nn(i)| + eps) of rows of unit length and their nearest neighbours.

    As DINOv2 (Oquab et al. 2023) has it, in float32 or wider whatever autocast says. Neighbours are found in
    chunks of rows, so no matrix of all similarities exists; the gradient goes to both rows of each pair.

    Args:
        features: [N, D], N at least 2 (of all processes together); normalised here.
        eps: added to each distance, positive.
        group, strategy, scaling: processes among whose rows neighbours are sought; see `sslfast.distributed`.
            None, as DINOv2: this process's alone.

    Returns:
        0-d float32 (float64 for float64 features). Differentiable in features.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value.
    """
    check_tensor("features", features, FLOATS, (None, None))
    if not number("eps", eps) > 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")
    ranks = join(group, strategy, scaling, "features", len(features))
    if ranks.count(len(features)) < 2:
        raise ValueError(f"features: expected at least two rows, got {len(features)}")
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.to(working_dtype(features)), dim=1)
        distance = (x - _nearest(x, ranks)).norm(dim=1)
    return reduced(-(distance + eps).log(), "mean", ranks=ranks)


def _nearest(x: Tensor, ranks: Ranks) -> Tensor:
    """[N, D] -> of each row the one of all processes with the largest product, but itself."""

    def choose(begin: int, block: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        (others,), found, own = block, [], x.detach()
        for i, rows in enumerate(own.split(step := max(1, CHUNK // len(others)))):
            products = rows @ others.T
            if begin == ranks.first:
                products.diagonal(i * step).fill_(-torch.inf)
            found.append(products.max(1))
        return [tuple(map(torch.cat, zip(*found, strict=True)))]  # type: ignore[list-item]

    if ranks is ALONE:
        return x[choose(0, [x.detach()])[0][1]]
    return sharded.best_rows(ranks, x, [], choose, 1)[0]


class KoLeoLoss(nn.Module):
    """`koleo_loss` as a module: loss(features)."""

    def __init__(
        self,
        eps: float = 1e-8,
        *,
        group: Group = None,
        strategy: str = "auto",
        scaling: str = "ddp",
    ) -> None:
        super().__init__()
        self.eps = eps
        self.across = across(group, strategy, scaling)

    def forward(self, features: Tensor) -> Tensor:
        return koleo_loss(features, self.eps, **self.across)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
