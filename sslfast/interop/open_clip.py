"""Drop-ins for open_clip: CLIP's and SigLIP's losses.

    from sslfast.interop.open_clip import ClipLoss  # instead of: from open_clip import ClipLoss

Signatures, defaults and attributes are open_clip's, which need not be installed. The matrix of logits never
exists, and both directions come from one pass. Losses are float32, or float64.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast.interop._rows import (
    gathered,
    gathered_constant,
    positions,
    processes,
    products,
    softplus,
    wide,
)
from sslfast.losses import clip_loss, siglip_loss
from sslfast.ops import similarity_lse

PACKAGE = "open_clip"
NEEDS = "open_clip_torch>=3.3"


class ClipLoss(nn.Module):
    """open_clip.ClipLoss: the mean of image-to-text and text-to-image cross-entropy.

    Args:
        local_loss: with world_size above 1, this process' rows against all columns, instead of everything on
            every process.
        gather_with_grad: other processes' features get gradients. Averaged by DDP, a feature's gradient is
            that of the global mean loss where this is set, and 1 / world_size of it where it is not.
        cache_labels: `get_ground_truth` keeps its labels; the loss needs none.
        rank, world_size: of the process group.
        use_horovod: not served: with world_size above 1 the call raises NotImplementedError.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """Each row's column [num_logits]."""
        if self.prev_num_logits == num_logits and device in self.labels:
            return self.labels[device]
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        labels = torch.arange(first, first + num_logits, device=device)
        if self.cache_labels:
            self.labels[device], self.prev_num_logits = labels, num_logits
        return labels

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The logits per image and per text, as open_clip makes them: matrices that the loss spares."""
        images, texts = self._gather(image_features, text_features)
        if self.world_size > 1 and not self.local_loss:
            image_features, text_features = images, texts
        per_image = logit_scale * image_features @ texts.T
        per_text = logit_scale * text_features @ images.T
        if logit_bias is None:
            return per_image, per_text
        return per_image + logit_bias, per_text + logit_bias

    def _gather(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Features of all processes, with the gradients that the options ask for."""
        if self.world_size == 1:
            return images, texts
        if self.use_horovod:
            raise NotImplementedError("use_horovod: expected False, got True; torch.distributed is served")
        _check_group(self.rank, self.world_size)
        if self.gather_with_grad:
            return gathered(images), gathered(texts)
        every = gathered_constant(images), gathered_constant(texts)
        return every if self.local_loss else (self._own(every[0], images), self._own(every[1], texts))

    def _own(self, every: Tensor, own: Tensor) -> Tensor:
        """`every` with this process' rows, which have a gradient."""
        first = self.rank * len(own)
        return torch.cat((every[:first], own, every[first + len(own) :]))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, with output_dict as {"contrastive_loss": loss}.

        Args:
            image_features, text_features: [B, D], row i of both belong together; taken as they are.
            logit_scale, logit_bias: numbers or tensors of one element.
        """
        if not _is_plain(self, ClipLoss):
            both = self.get_logits(image_features, text_features, logit_scale, logit_bias)
            labels = self.get_ground_truth(image_features.device, len(both[0]))
            loss = torch.stack([F.cross_entropy(logits, labels) for logits in both]).mean()
            return {"contrastive_loss": loss} if output_dict else loss
        scale, bias = _scalar(logit_scale), None if logit_bias is None else _scalar(logit_bias)
        images, texts = self._gather(image_features, text_features)
        if self.world_size > 1 and self.local_loss:
            loss = self._local(image_features, text_features, images, texts, scale)
            loss = loss if bias is None else loss + 0 * bias
        else:
            loss = clip_loss(images, texts, scale, bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _local(
        self, image: Tensor, text: Tensor, images: Tensor, texts: Tensor, scale: Tensor | float
    ) -> Tensor:
        """Rows of this process against the columns of all."""
        own, every = positions(image, self.rank * len(image)), positions(images)
        rows = [
            similarity_lse(x, y, scale=scale, a_ids=own, b_ids=every)
            for x, y in ((image, texts), (text, images))
        ]
        # open_clip's columns are gathered, so without gather_with_grad the positive's too are constants.
        sides = [(image, text)] if self.gather_with_grad else [(image, text.detach()), (text, image.detach())]
        positive = torch.stack([products(x, y) for x, y in sides])
        return softplus(torch.stack(rows) - scale * positive).mean()


class SigLipLoss(nn.Module):
    """open_clip.SigLipLoss: each pair of image and text is a binary classification; summed, over the batch.

    Args:
        cache_labels: kept as an attribute; there are no labels to cache.
        rank, world_size: of the process group: images of this process meet the texts of all, whose gradients
            go back to them.
        dist_impl: "bidir" (the default), "shift", "reduce" or "gather", how open_clip exchanges texts. All
            give the same numbers; here the first two are a ring, and the others gather, [world_size B, D].
        chunk_size: newer versions' way to spare memory; nothing to spare here.

    Raises:
        AssertionError: another dist_impl.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl, self.chunk_size = dist_impl or "bidir", chunk_size
        choices = ("bidir", "shift", "reduce", "gather")
        assert self.dist_impl in choices, f"dist_impl: expected one of {choices}, got {dist_impl!r}"
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """[num_logits, num_logits]: 1 for a pair, -1 for all others."""
        labels = -torch.ones(num_logits, num_logits, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """The whole matrix of logits, which the loss spares."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, with output_dict as {"contrastive_loss": loss}.

        Args:
            image_features, text_features: [B, D], row i of both belong together; taken as they are.
            logit_scale, logit_bias: numbers or tensors of one element.
        """
        if self.world_size > 1:
            _check_group(self.rank, self.world_size)
        if not _is_plain(self, SigLipLoss):
            loss = self._of_logits(image_features, text_features, logit_scale, logit_bias)
            return {"contrastive_loss": loss} if output_dict else loss
        scale, bias = _scalar(logit_scale), _scalar(0.0 if logit_bias is None else logit_bias)
        if self.world_size > 1:
            strategy = "ring" if self.dist_impl in ("bidir", "shift") else "gather"
            terms = siglip_loss(
                image_features, text_features, scale, bias, reduction="none", group="world", strategy=strategy
            )
            loss = terms.sum() / len(image_features)
        else:
            loss = siglip_loss(image_features, text_features, scale, bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _of_logits(
        self, images: Tensor, texts: Tensor, scale: Tensor | float, bias: Tensor | float | None
    ) -> Tensor:
        """Where a subclass has logits or labels of its own."""
        every = gathered(texts).chunk(self.world_size) if self.world_size > 1 else [texts]
        total = images.new_zeros(())
        for rank, part in enumerate(every):
            logits = self.get_logits(images, part, scale, bias)
            foreign = self.world_size > 1 and rank != self.rank
            labels = self.get_ground_truth(images.device, images.dtype, len(images), negative_only=foreign)
            total = total - F.logsigmoid(labels * logits).sum()
        return total / len(images)


def _is_plain(loss: nn.Module, kind: type) -> bool:
    """Whether no subclass has logits or labels of its own."""
    return all(getattr(type(loss), k) is getattr(kind, k) for k in ("get_logits", "get_ground_truth"))


def _check_group(rank: int, world_size: int) -> None:
    if processes() != (rank, world_size):
        found = "rank {}, world_size {}".format(*processes())
        raise ValueError(f"rank: expected torch.distributed's {found}, got {rank} of {world_size}")


def _scalar(x: Tensor | float) -> Tensor | float:
    """open_clip's scale and bias may have the shape [1]."""
    return wide(x.reshape(())) if isinstance(x, Tensor) and x.numel() == 1 else x


SWAPS = {"open_clip.loss.ClipLoss": ClipLoss, "open_clip.loss.SigLipLoss": SigLipLoss}
