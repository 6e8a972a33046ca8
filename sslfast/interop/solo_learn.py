"""Drop-ins for solo-learn's loss functions and its DINO loss; solo-learn need not be installed.

    from sslfast.interop.solo_learn import simclr_loss_func
    # instead of: from solo.losses.simclr import simclr_loss_func

Where torch.distributed runs, rows of other processes take part as in solo-learn.
"""

import numpy as np
import torch
from torch import Tensor, nn

from sslfast.interop._rows import (
    gathered,
    gathered_constant,
    positions,
    processes,
    products,
    softplus,
    unit,
    whole_numbers,
    wide,
)
from sslfast.losses import byol_loss, dino_loss, supcon_loss, update_center_
from sslfast.ops import similarity_lse

PACKAGE = "solo"
NEEDS = "solo-learn>=1.0"


def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    """solo.losses.simclr: -log(sum over positives / sum over all but itself), the sum inside the logarithm.

    Does not overflow at a low temperature, as the original does; a row without a positive gives 0, not inf.

    Args:
        z: [M, D], views of this process' images; normalised here.
        indexes: [M], whole numbers: rows of the same are positives; images, or classes.
    """
    rank, size = processes()
    ids = whole_numbers("indexes", gathered_constant(indexes))[0]
    if size == 1:
        return supcon_loss(z, ids, temperature, temperature, form="inside")
    z = unit(z)
    every, scale = gathered(z), 1 / temperature
    indexes = ids[rank * len(z) : (rank + 1) * len(z)]
    negatives = similarity_lse(z, every, scale=scale, a_ids=indexes, b_ids=ids)
    positives = _lse_of_equal(z, every, indexes, ids, scale, rank * len(z))
    alone = positives == -torch.inf
    terms = softplus(negatives - positives.masked_fill(alone, 0.0))
    return terms.masked_fill(alone, 0.0).mean()


def _lse_of_equal(z: Tensor, every: Tensor, indexes: Tensor, ids: Tensor, scale: float, first: int) -> Tensor:
    """Log-sum-exp over columns of the row's index, but the row itself, which is column first + i."""
    own = torch.zeros(len(every), dtype=torch.bool, device=z.device)
    own[first : first + len(z)] = True
    free = ids.max() + 1  # an index that no row has
    elsewhere = similarity_lse(
        z, every, scale=scale, a_ids=indexes, b_ids=torch.where(own, free, ids), pairs="same"
    )
    here = similarity_lse(z, scale=scale, a_ids=indexes, pairs="same")
    none = (elsewhere == -torch.inf) & (here == -torch.inf)
    both = torch.logaddexp(elsewhere.masked_fill(none, 0.0), here.masked_fill(none, 0.0))
    return both.masked_fill(none, -torch.inf)


def mocov2plus_loss_func(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """solo.losses.mocov2plus: cross-entropy of the query's key against a queue, which has no gradient.

    Args:
        query, key: [N, D], taken as they are.
        queue: [D, K].
    """
    scale = 1 / temperature
    negatives = similarity_lse(query, queue.detach().T.to(query.dtype), scale=scale)
    return softplus(negatives - scale * products(query, key)).mean()


moco_loss_func = mocov2plus_loss_func  # its name up to solo-learn 1.0.2


def mocov3_loss_func(query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor:
    """solo.losses.mocov3: InfoNCE of normalised queries against all processes' keys, times 2 temperature.

    Keys have no gradient. Without torch.distributed this is the loss of one process, where some releases of
    solo-learn look for the keys of a second one and fail.

    Args:
        query, key: [N, D].
    """
    query, key = unit(query), unit(key.detach())
    keys = gathered_constant(key)
    return 2 * temperature * _info_nce(query, keys, key, 1 / temperature)


def nnclr_loss_func(nn: Tensor, p: Tensor, temperature: float = 0.1) -> Tensor:
    """solo.losses.nnclr: InfoNCE of normalised neighbours against the predictions of all processes.

    Args:
        nn: [N, D], neighbours of one view; p: [N, D], predictions of the other.
    """
    neighbours, p = unit(nn), unit(p)
    return _info_nce(neighbours, gathered(p), p, 1 / temperature)


def _info_nce(query: Tensor, keys: Tensor, own: Tensor, scale: float) -> Tensor:
    """Query i against all keys, of which own_i, this process' i-th, is its positive."""
    a_ids = positions(query, processes()[0] * len(own))
    negatives = similarity_lse(query, keys, scale=scale, a_ids=a_ids, b_ids=positions(keys))
    return softplus(negatives - scale * products(query, own)).mean()


def byol_loss_func(p: Tensor, z: Tensor, simplified: bool = True) -> Tensor:
    """solo.losses.byol: 2 - 2 cos, the mean over the rows [N, D]; z has no gradient. `simplified` changes
    nothing but, in solo-learn, the way it is computed."""
    return byol_loss(p, z)


class DINOLoss(nn.Module):
    """solo.losses.dino.DINOLoss: the student's views against the teacher's two others; keeps the centre.

    The mean over pairs of different views and over images. Set `epoch` for the teacher's temperature.

    Args:
        num_prototypes: K.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, num_epochs: the schedule, linear and
            then constant.
        student_temp: of the student's softmax.
        num_large_crops: into how many views the student's output is cut.
        center_momentum: of the centre, a buffer [1, K] that follows the teacher, over all processes.
    """

    center: Tensor

    def __init__(
        self,
        num_prototypes: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: float,
        num_epochs: int,
        student_temp: float = 0.1,
        num_large_crops: int = 2,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.epoch = 0
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.num_large_crops = num_large_crops
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        warm = int(warmup_teacher_temp_epochs)
        self.teacher_temp_schedule = np.concatenate(
            (np.linspace(warmup_teacher_temp, teacher_temp, warm), np.full(num_epochs - warm, teacher_temp))
        )

    def forward(self, student_output: Tensor, teacher_output: Tensor) -> Tensor:
        """
        Args:
            student_output: [num_large_crops B, K], one view after another.
            teacher_output: [2 B, K]; it has no gradient.
        """
        loss = dino_loss(
            student_output.chunk(self.num_large_crops),
            teacher_output.detach().chunk(2),
            self.center,
            self.student_temp,
            float(self.teacher_temp_schedule[self.epoch]),
        )
        self.update_center(teacher_output)
        return loss

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """center <- momentum center + (1 - momentum) mean of teacher_output [R, K]."""
        mean = wide(teacher_output.detach()).mean(0, keepdim=True)
        update_center_(self.center, mean, self.center_momentum)


SWAPS = {
    "solo.losses.simclr.simclr_loss_func": simclr_loss_func,
    "solo.losses.mocov2plus.mocov2plus_loss_func": mocov2plus_loss_func,
    "solo.losses.moco.moco_loss_func": moco_loss_func,
    "solo.losses.mocov3.mocov3_loss_func": mocov3_loss_func,
    "solo.losses.nnclr.nnclr_loss_func": nnclr_loss_func,
    "solo.losses.byol.byol_loss_func": byol_loss_func,
    "solo.losses.dino.DINOLoss": DINOLoss,
}
