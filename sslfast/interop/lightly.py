"""Drop-ins for lightly (1.6 and newer): NT-Xent with its memory bank, DCL, DCLW, DINO, the EMA update.

    from sslfast.interop.lightly import NTXentLoss  # instead of: from lightly.loss import NTXentLoss

Signatures, defaults, attributes and buffers are lightly's, which need not be installed. Losses are float32,
or float64, where lightly's have the dtype of 16-bit inputs.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from sslfast.interop._rows import (
    check_rows,
    gathered,
    gathered_constant,
    positions,
    processes,
    products,
    softplus,
    unit,
    wide,
)
from sslfast.losses import dino_loss, ntxent_loss, update_center_
from sslfast.ops import ema_update_, similarity_lse

PACKAGE = "lightly"
NEEDS = "lightly>=1.6"


class MemoryBankModule(nn.Module):
    """lightly's memory bank, the newest rows of all batches: buffers bank [K, D] and bank_ptr [1].

    A batch that reaches the end fills it, its remaining rows are dropped and the next batch begins at 0, as
    in lightly. No host reads the pointer.

    Raises:
        ValueError: a negative size, or one that is neither 0 nor (K, D).
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self, size: int | Sequence[int], gather_distributed: bool = False, feature_dim_first: bool = True
    ) -> None:
        super().__init__()
        sizes = (size,) if isinstance(size, int) else tuple(size)
        if any(x < 0 for x in sizes):
            raise ValueError(f"size: expected no negative entry, got {size}")
        if sizes != (0,) and len(sizes) != 2:
            raise ValueError(f"size: expected (num_features, dim), or 0 for no memory bank, got {size}")
        self.size, self.gather_distributed, self.feature_dim_first = (
            sizes,
            gather_distributed,
            feature_dim_first,
        )
        bank = F.normalize(torch.randn(sizes), dim=-1) if len(sizes) == 2 else torch.empty(0)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """`output`, and a copy of the bank as it was: [D, K], or [K, D] without feature_dim_first."""
        if self.size[0] == 0:
            return output, None
        bank = self.bank.clone()
        if update:
            self._dequeue_and_enqueue(output)
        return output, bank.T if self.feature_dim_first else bank

    @torch.no_grad()
    def _dequeue_and_enqueue(self, batch: Tensor) -> None:
        """Writes rows [B, D] behind the newest, with gather_distributed those of all processes."""
        batch = gathered_constant(batch) if self.gather_distributed else batch
        count, size = len(batch), self.size[0]
        batch = batch[:size].to(self.bank)  # which may be on another device
        rows = self.bank_ptr + positions(batch)
        fits = rows < size
        rows = rows % size
        self.bank.index_copy_(0, rows, torch.where(fits[:, None], batch, self.bank[rows]))
        end = self.bank_ptr + count
        self.bank_ptr.copy_(torch.where(end >= size, 0, end))


class NTXentLoss(nn.Module):
    """lightly.loss.NTXentLoss: NT-Xent, or with a memory bank MoCo's loss against it.

    In memory linear in the batch, unless `cross_entropy` is replaced. With a bank its keys are the negatives,
    and out1 is enqueued once they were used, where out0 requires a gradient; nothing is cloned.

    Args:
        temperature: number of either sign.
        memory_bank_size: (K, D), or 0 for none.
        gather_distributed: negatives (and what is enqueued) come from all processes, with gradients.

    Raises:
        ValueError: |temperature| below 1e-8, a size as in `MemoryBankModule`, or no torch.distributed to
            gather with.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed)
        self.temperature, self.gather_distributed = temperature, gather_distributed
        self.cross_entropy = nn.CrossEntropyLoss(reduction="mean")
        self.eps = 1e-8
        if abs(temperature) < self.eps:
            raise ValueError(f"temperature: expected at least 1e-8 in magnitude, got {temperature}")
        _check_gather(gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The mean over both views' rows [B, D], with a memory bank over out0's."""
        check_rows("out1", out1, "out0", out0)
        if not self._is_cross_entropy():
            return self._with_another_criterion(out0, out1)
        rank, size = processes()
        scale = 1 / self.temperature
        if self.memory_bank.size[0]:
            z0, z1 = unit(out0), unit(out1)
            bank = self.memory_bank.bank.to(z0.device, z0.dtype)
            if z0.shape[1] != bank.shape[1]:
                raise ValueError(
                    f"out0: expected the memory bank's {bank.shape[1]} features, got {z0.shape[1]}"
                )
            negatives = similarity_lse(z0, bank, scale=scale)
            if z0.requires_grad:
                self.memory_bank._dequeue_and_enqueue(z1)
            return softplus(negatives - scale * products(z0, z1)).mean()
        if not self.gather_distributed or size == 1:
            return ntxent_loss(out0, out1, self.temperature)
        z0, z1 = unit(out0), unit(out1)
        own, every = torch.cat((z0, z1)), torch.cat((gathered(z0), gathered(z1)))
        a_ids, b_ids = _images(len(z0), rank, size, z0.device)
        negatives = similarity_lse(own, every, scale=scale, a_ids=a_ids, b_ids=b_ids)
        return softplus(negatives - scale * products(z0, z1).repeat(2)).mean()

    def _is_cross_entropy(self) -> bool:
        """Whether the criterion is the one that lightly sets, which is fused here."""
        entropy = self.cross_entropy
        options = entropy.weight, entropy.reduction, entropy.label_smoothing
        return type(entropy) is nn.CrossEntropyLoss and options == (None, "mean", 0.0)

    def _with_another_criterion(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Of the whole matrix of logits, as lightly computes it."""
        rank, size = processes() if self.gather_distributed else (0, 1)
        z0, z1 = (F.normalize(x, dim=1) for x in (out0, out1))
        if self.memory_bank.size[0]:
            bank = self.memory_bank.bank.to(z0.device, z0.dtype, copy=True)
            if z0.requires_grad:
                self.memory_bank._dequeue_and_enqueue(z1)
            logits = torch.cat(((z0 * z1).sum(1, keepdim=True), z0 @ bank.T), 1)
            return self.cross_entropy(logits / self.temperature, logits.new_zeros(len(z0)).long())
        all0, all1 = (gathered(x) if size > 1 else x for x in (z0, z1))
        own = positions(z0, rank * len(z0))
        keep = torch.ones(len(z0), len(all0), dtype=torch.bool, device=z0.device)
        keep[positions(z0), own] = False
        sides = [
            torch.cat((x @ other.T, (x @ same.T)[keep].view(len(x), -1)), 1)
            for x, other, same in ((z0, all1, all0), (z1, all0, all1))
        ]
        return self.cross_entropy(torch.cat(sides) / self.temperature, own.repeat(2))


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """DCLW's weights [B] of rows [B, D] of unit length: 2 - B softmax(<out0, out1> / sigma), no gradient."""
    similarity = products(out0.detach(), out1.detach()) / sigma
    return 2 - len(out0) * similarity.softmax(0)


class DCLLoss(nn.Module):
    """lightly.loss.DCLLoss: NT-Xent without the positive in the denominator (Yeh et al. 2022).

    In memory linear in the batch. One image alone has no negative, and the loss is -inf as in lightly;
    `sslfast.dcl_loss` leaves the empty sum out.

    Args:
        temperature: number of either sign, not 0.
        weight_fn: from the normalised (out0, out1), [B, D] each, to weights [B] of the positive terms; called
            once in each order.
        gather_distributed: negatives come from all processes, with gradients.

    Raises:
        ValueError: no torch.distributed to gather with.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.temperature, self.weight_fn, self.gather_distributed = temperature, weight_fn, gather_distributed
        _check_gather(gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The mean over the rows [B, D] of both views."""
        check_rows("out1", out1, "out0", out0)
        z0, z1 = unit(out0), unit(out1)
        rank, size = processes() if self.gather_distributed else (0, 1)
        own, scale = torch.cat((z0, z1)), 1 / self.temperature
        a_ids, b_ids = _images(len(z0), rank, size, z0.device)
        if size == 1:
            negatives = similarity_lse(own, scale=scale, a_ids=a_ids)
        else:
            every = torch.cat((gathered(z0), gathered(z1)))
            negatives = similarity_lse(own, every, scale=scale, a_ids=a_ids, b_ids=b_ids)
        positive = scale * products(z0, z1)
        sides = [positive, positive]
        if self.weight_fn:
            sides = [positive * self.weight_fn(z0, z1), positive * self.weight_fn(z1, z0)]
        return (negatives - torch.cat(sides)).mean()


class DCLWLoss(DCLLoss):
    """lightly.loss.DCLWLoss: `DCLLoss` whose positive terms `negative_mises_fisher_weights` weighs."""

    def __init__(
        self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False
    ) -> None:
        super().__init__(temperature, partial(negative_mises_fisher_weights, sigma=sigma), gather_distributed)


def _check_gather(gather_distributed: bool) -> None:
    if gather_distributed and not distributed.is_available():
        raise ValueError("gather_distributed: expected False, since this torch was built without distributed")


def _images(count: int, rank: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images of this process' rows, two views of each, and of all processes' rows."""
    own = torch.arange(rank * count, (rank + 1) * count, device=device)
    return own.repeat(2), torch.arange(size * count, device=device).repeat(2)


class DINOLoss(nn.Module):
    """lightly.loss.DINOLoss: each view of the student against the teacher's other views.

    Each view is read once, and no softmax is stored. A teacher that requires a gradient gets one, as in
    lightly; then plain PyTorch computes the loss, and the memory is lightly's.

    Args:
        output_dim: K, prototypes.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs: the schedule that `epoch` of the call
            indexes.
        student_temp: of the student's softmax.
        center_momentum: of the centre, a buffer [1, 1, K] that follows the teacher after each loss, over all
            processes.
        center_mode: "mean".

    Raises:
        ValueError: another center_mode; in the call, views of which no two differ.
    """

    center: Tensor

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
    ) -> None:
        super().__init__()
        if center_mode != "mean":
            raise ValueError(f"center_mode: expected 'mean', got {center_mode!r}")
        self.teacher_temp, self.student_temp = teacher_temp, student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, 1, output_dim))
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.teacher_temp_schedule = torch.linspace(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs
        )

    def forward(
        self,
        teacher_out: list[Tensor],
        student_out: list[Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """The mean over pairs of different views and over images; then the centre moves.

        Args:
            teacher_out, student_out: views [B, K]; the student's first views are the teacher's.
            teacher_temp: in place of the schedule's.
            epoch: where in the schedule; without it, and beyond, the final temperature.
        """
        if teacher_temp is None:
            warming = epoch is not None and epoch < self.warmup_teacher_temp_epochs
            teacher_temp = float(self.teacher_temp_schedule[epoch]) if warming else self.teacher_temp
        teacher_temp = float(torch.tensor(teacher_temp))  # lightly's is a float32 tensor
        for name, views in (("teacher_out", teacher_out), ("student_out", student_out)):
            if not len(views):
                raise ValueError(f"{name}: expected at least one view, got none")
            for i, view in enumerate(views):
                check_rows(f"{name}[{i}]", view, "teacher_out[0]", teacher_out[0])
        if teacher_out[0].shape[1] != self.center.shape[-1]:
            expected, got = self.center.shape[-1], list(teacher_out[0].shape)
            raise ValueError(f"teacher_out[0]: expected [B, {expected}], got {got}")
        teacher = torch.stack(tuple(teacher_out))
        if teacher.requires_grad and torch.is_grad_enabled():
            loss = self._with_teacher_gradient(teacher, torch.stack(tuple(student_out)), teacher_temp)
        else:
            loss = dino_loss(student_out, teacher, self.center, self.student_temp, teacher_temp)
        self.update_center(teacher)
        return loss

    def _with_teacher_gradient(self, teacher: Tensor, student: Tensor, teacher_temp: float) -> Tensor:
        pairs = len(teacher) * len(student) - min(len(teacher), len(student))
        if not pairs:
            raise ValueError("student_out: expected two views that differ, got none")
        targets = ((wide(teacher) - self.center) / teacher_temp).softmax(-1)
        logs = (wide(student) / self.student_temp).log_softmax(-1)
        losses = -torch.einsum("tbk,sbk->ts", targets, logs)
        return (losses.sum() - losses.diagonal().sum()) / (pairs * teacher.shape[1])

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor) -> None:
        """center <- momentum center + (1 - momentum) mean of teacher_out [T, B, K]: the mean of processes."""
        mean = wide(teacher_out.detach()).mean((0, 1))
        self.center.data = self.center.to(torch.promote_types(self.center.dtype, teacher_out.dtype))
        update_center_(self.center, mean[None], self.center_momentum)


@torch.no_grad()
def update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None:
    """lightly.models.utils.update_momentum: parameters of model_ema <- m model_ema + (1 - m) model, in one
    pass. Buffers stay. `sslfast.EMATeacher` spares also the search for the parameters."""
    ema_update_(list(model_ema.parameters()), list(model.parameters()), m)


SWAPS = {
    "lightly.loss.ntx_ent_loss.NTXentLoss": NTXentLoss,
    "lightly.loss.dcl_loss.DCLLoss": DCLLoss,
    "lightly.loss.dcl_loss.negative_mises_fisher_weights": negative_mises_fisher_weights,
    "lightly.loss.dino_loss.DINOLoss": DINOLoss,
    "lightly.models.utils.update_momentum": update_momentum,
}
