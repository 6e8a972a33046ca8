"""Collapse, in numbers and in words: are the embeddings of different images still different?"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sslfast.train.processes import processes, rank, summed


class CollapseMonitor:
    """Moments of the L2-normalised embeddings of an epoch, kept on the device; only `read` waits for it.

    feature_std: standard deviation over images, mean over dimensions: 1/sqrt(D) when directions are spread
        evenly, 0 when all images have one embedding (Chen & He 2021).
    effective_rank: exp of the entropy of the normalised singular values of the embeddings [N, D] (Roy &
        Vetterli 2007; RankMe, Garrido et al. 2023): from 1 (one direction) to min(N, D).
    teacher_agreement: mean cosine between a student's embedding and its teacher's of the same image.
    teacher_contrast: what of it is about the image: the mean over the same image less that over any two.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.count = 0
        self.total: Tensor | None = None  # sum z [D]
        self.gram: Tensor | None = None  # sum z z^T [D, D]
        self.targets: Tensor | None = None  # sum t [D]
        self.agreement: Tensor | None = None  # sum <z, t>

    @torch.no_grad()
    def update(self, embeddings: Tensor, targets: Tensor | None = None) -> None:
        """embeddings, and the teacher's that they are to match: [B, D]"""
        z = F.normalize(embeddings.detach().double(), dim=1)
        self.total = _plus(self.total, z.sum(0))
        self.gram = _plus(self.gram, z.T @ z)
        if targets is not None:
            t = F.normalize(targets.detach().double(), dim=1)
            self.targets = _plus(self.targets, t.sum(0))
            self.agreement = _plus(self.agreement, (z * t).sum())
        self.count += len(z)

    def read(self) -> dict[str, float]:
        """{} before the first update. Of the images of all processes, which all call it."""
        return _measured(self.state_dict())

    def warning(self, metrics: Mapping[str, float] | None = None) -> str | None:
        """What is wrong, in words; None when nothing is.

        metrics: means of the epoch, of which "teacher_entropy" and "kl" are looked at: assignments that are
        the same for all images, to all prototypes evenly or to one, have nothing left to teach.
        """
        entropy, kl = ((metrics or {}).get(name) for name in ("teacher_entropy", "kl"))
        if entropy is not None and kl is not None and abs(kl) < 0.01 and not 0.01 < entropy < 0.99:
            return (
                f"the teacher's assignments have collapsed (entropy {entropy:.3f} of ln K, divergence "
                f"{kl:.2g}). Try --centering sinkhorn, a lower teacher's temperature, or another momentum"
            )
        sums = self.state_dict()
        measured = _measured(sums)
        if not measured:
            return None
        dim = len(sums["gram"])
        std, rank = measured["feature_std"], measured["effective_rank"]
        if std < 0.1 / dim**0.5:
            return (
                f"the embeddings have collapsed: all images get nearly the same one (standard deviation "
                f"{std:.2g}, {dim**-0.5:.2g} is healthy). Try a lower learning rate or a longer warm-up"
            )
        most = min(dim, sums["count"])
        if rank < min(0.05 * most, 0.5 * dim):
            return (
                f"the embeddings use few dimensions: effective rank {rank:.1f} of {most}. Try stronger "
                f"augmentation, another temperature or a lower learning rate"
            )
        agreement, contrast = (measured.get(f"teacher_{x}", 0.0) for x in ("agreement", "contrast"))
        if agreement > 0.9 and contrast < 0.01:
            return (
                f"student and teacher agree as much on two different images as on one (mean cosine "
                f"{agreement - contrast:.3f} and {agreement:.3f}). Try a lower learning rate, or another "
                f"momentum of the teacher"
            )
        return None

    def state_dict(self) -> dict:
        """The sums of all processes, which all call it."""
        own = dict(vars(self))
        return own if processes() == 1 else {name: _of_all(x) for name, x in own.items()}

    def load_state_dict(self, state: dict) -> None:
        """Into the first process; the others begin at 0."""
        if rank() == 0:
            vars(self).update(state)


def _measured(sums: dict) -> dict[str, float]:
    if sums["total"] is None:
        return {}
    count = sums["count"]
    mean, gram = sums["total"].cpu() / count, sums["gram"].cpu() / count
    if not gram.isfinite().all():
        return {"feature_std": float("nan"), "effective_rank": float("nan")}
    std = (gram.diagonal() - mean.square()).clamp(min=0).sqrt().mean()
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = singular / singular.sum().clamp(min=1e-300)
    entropy = -torch.special.xlogy(p, p).sum()
    measured = {"feature_std": std.item(), "effective_rank": entropy.exp().item()}
    if sums["targets"] is not None:
        same = sums["agreement"].item() / count
        measured["teacher_agreement"] = same
        measured["teacher_contrast"] = same - (mean @ sums["targets"].cpu()).item() / count
    return measured


def _of_all(x: Tensor | int | None) -> Tensor | int | None:
    if x is None:
        return None
    return summed(x) if isinstance(x, Tensor) else int(summed(torch.tensor(x)))


def _plus(total: Tensor | None, x: Tensor) -> Tensor:
    return x if total is None else total.to(x.device).add_(x)
