"""Drop-ins for pytorch-metric-learning (2.9 and newer), which has to be installed: they are its subclasses.

    from sslfast.interop.pytorch_metric_learning import NTXentLoss
    # instead of: from pytorch_metric_learning.losses import NTXentLoss

With a cosine or dot-product distance (Euclidean for triplets) and pairs that come from labels, memory is
linear in the batch and, for NT-Xent, in the positive pairs. Index tuples of NT-Xent are served as sparse
pairs, in memory linear in their number. Everything else, such as another distance, SupCon with an index
tuple, triplets with one, with ref_emb, `swap` or `smooth_loss`, is the original's own code, and so is its
memory. Distances, reducers, miners and regularizers are the original's.
"""

from typing import Any

import torch
from torch import Tensor

from sslfast.interop._rows import products, softplus, unit, whole_numbers, wide
from sslfast.losses import triplet_margin_loss
from sslfast.ops import pair_products, similarity_lse

try:
    from pytorch_metric_learning import distances, losses, reducers
    from pytorch_metric_learning.losses import SelfSupervisedLoss
    from pytorch_metric_learning.utils import loss_and_miner_utils as pairs_of
except ImportError as error:
    raise ImportError(
        "sslfast.interop.pytorch_metric_learning: pip install pytorch-metric-learning"
    ) from error

__all__ = ["CrossBatchMemory", "NTXentLoss", "SelfSupervisedLoss", "SupConLoss", "TripletMarginLoss"]

PACKAGE = "pytorch_metric_learning"
NEEDS = "pytorch-metric-learning>=2.9"

# The originals' methods, which serve what is not fused, also while `patch` has put others in their place.
_ntxent = losses.NTXentLoss.compute_loss
_supcon = losses.SupConLoss.compute_loss
_triplet = losses.TripletMarginLoss.compute_loss
_all_pairs = losses.CrossBatchMemory.create_indices_tuple


class _Memory(tuple):
    """In place of an index tuple: all pairs but those of a row and its own slot of the memory; the slots."""


class _Rows:
    """Embeddings and what they are compared with, as a fused loss takes them.

    Attributes:
        z, ref: rows [M, D], and [N, D] or None where they are compared among themselves.
        labels, ref_labels: int64 [M], [N].
        skips: the column that is the row itself, int64 [M]; of meaning where skips_some.
        order, ordered: columns in the order of their labels, and these labels.
        first, count: where those of a row's label begin there, and how many they are, itself among them.
    """

    def __init__(self, loss, embeddings, labels, indices, ref_emb, ref_labels) -> None:
        normalize = loss.distance.normalize_embeddings
        same = ref_emb is embeddings
        self.z = unit(embeddings) if normalize else embeddings
        self.ref = None if same else unit(ref_emb) if normalize else ref_emb
        self.columns = self.z if self.ref is None else self.ref
        both = whole_numbers("labels", labels, ref_labels)
        self.labels, self.ref_labels = (x.to(embeddings.device) for x in both)
        rows = torch.arange(len(self.z), device=self.z.device)
        if isinstance(indices, _Memory):
            self.skips = indices[0].to(rows.device)
        else:
            self.skips = rows
        self.skips_some = isinstance(indices, _Memory) or ref_labels is labels
        self.order = self.ref_labels.argsort(stable=True)
        self.ordered = self.ref_labels[self.order]
        self.first = torch.searchsorted(self.ordered, self.labels)
        self.count = torch.searchsorted(self.ordered, self.labels, right=True) - self.first

    def has_pairs(self) -> bool:
        """Whether there is a positive and a negative pair; one of each alone the original leaves out."""
        equal = int(self.count.sum())
        positives = equal - len(self.z) * self.skips_some
        negatives = len(self.z) * len(self.columns) - equal
        return positives > 0 and negatives > 0 and positives + negatives > 2

    def lse_of_negatives(self, scale: Tensor | float) -> Tensor:
        if self.ref is None and self.skips_some:
            return similarity_lse(self.z, scale=scale, a_ids=self.labels)
        return similarity_lse(self.z, self.columns, scale=scale, a_ids=self.labels, b_ids=self.ref_labels)

    def lse_of_all(self, scale: Tensor | float) -> Tensor:
        if self.ref is None and self.skips_some:
            return similarity_lse(self.z, scale=scale)
        if not self.skips_some:
            return similarity_lse(self.z, self.columns, scale=scale)
        rows = torch.arange(len(self.z), device=self.z.device)
        slots = torch.full((len(self.columns),), -1, device=self.z.device)
        return similarity_lse(
            self.z, self.columns, scale=scale, a_ids=rows, b_ids=slots.index_copy(0, self.skips, rows)
        )

    def positives(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the same label, in the order of the matrix."""
        count = self.count
        rows = torch.arange(len(count), device=count.device).repeat_interleave(count)
        place = torch.arange(len(rows), device=count.device) - (count.cumsum(0) - count)[rows]
        columns = self.order[self.first[rows] + place]
        if not self.skips_some:
            return rows, columns
        keep = columns != self.skips[rows]
        return rows[keep], columns[keep]

    def mean_of_positives(self) -> tuple[Tensor, Tensor]:
        """Mean product with the columns of the row's label [M], 0 for none, and how many they are."""
        columns, size = wide(self.columns), len(self.columns)
        group = torch.searchsorted(self.ordered, self.ref_labels)
        sums = _sums(size, group, columns)[self.first.clamp(max=size - 1)]
        sums, count = sums.masked_fill((self.count == 0)[:, None], 0.0), self.count
        if self.skips_some:
            sums, count = sums - columns[self.skips], count - 1
        return products(self.z, sums) / count.clamp(min=1), count


def _sums(groups: int, group: Tensor, x: Tensor) -> Tensor:
    zeros = x.new_zeros(groups, x.shape[1])
    return zeros.index_put((group,), x, accumulate=True) if x.is_cuda else zeros.index_add(0, group, x)


def _fuses(loss, kind, embeddings, ref_emb, ref_labels) -> bool:
    """Whether the formula is the library's, of products; ref_labels: of which there is one for each column,
    or None."""
    temperature = loss.temperature
    return (
        type(loss)._compute_loss is kind._compute_loss
        and (temperature.numel() == 1 if isinstance(temperature, Tensor) else temperature != 0)
        and _is_product(loss.distance)
        and _dense(embeddings, ref_emb)
        and (ref_labels is None or len(ref_labels) == len(ref_emb))
    )


def _scale(loss) -> Tensor | float:
    temperature = loss.temperature
    return 1 / (temperature.reshape(()) if isinstance(temperature, Tensor) else temperature)


def _is_product(distance) -> bool:
    kinds = (distances.CosineSimilarity, distances.DotProductSimilarity)
    return type(distance) in kinds and _is_plain(distance)


def _is_plain(distance) -> bool:
    return distance.p == 2 and distance.power == 1 and not distance.collect_stats


def _dense(*tensors: Tensor) -> bool:
    first = tensors[0]
    return first.is_floating_point() and all(
        x.dim() == 2 and x.dtype == first.dtype and x.shape[1] == first.shape[1] for x in tensors
    )


class NTXentLoss(losses.NTXentLoss):
    """pytorch_metric_learning.losses.NTXentLoss: one term per positive pair, against the anchor's negatives.

    An anchor's other positives are not in the denominator. softplus(lse of negatives - positive) has the
    original's value but for its log(x + tiny), which ends at 87 in float32 and has no gradient there.
    """

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        listed = not (indices_tuple is None or isinstance(indices_tuple, _Memory))
        ref_labels = labels if ref_labels is None else ref_labels
        known = listed or labels is not None
        if not known or not _fuses(
            self, losses.NTXentLoss, embeddings, ref_emb, None if listed else ref_labels
        ):
            return _ntxent(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if not listed:
            data = _Rows(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
            if not data.has_pairs():
                return self.zero_losses()
            rows, columns = data.positives()
            positive = pair_products(data.z, data.columns, rows, columns) / self.temperature
            negatives = data.lse_of_negatives(_scale(self))[rows]
        else:
            rows, columns, others, negatives_at = (
                x.to(embeddings.device) for x in pairs_of.convert_to_pairs(indices_tuple, labels, ref_labels)
            )
            if not len(rows) or not len(others) or len(rows) + len(others) == 2:
                return self.zero_losses()
            rows, others = _from_start(rows, len(embeddings)), _from_start(others, len(embeddings))
            columns, negatives_at = (_from_start(x, len(ref_emb)) for x in (columns, negatives_at))
            normalize = self.distance.normalize_embeddings
            z = unit(embeddings) if normalize else embeddings
            ref = z if ref_emb is embeddings else unit(ref_emb) if normalize else ref_emb
            positive = pair_products(z, ref, rows, columns) / self.temperature
            logits = pair_products(z, ref, others, negatives_at) / self.temperature
            negatives = _lse_by_row(logits, others, len(z))[rows]
        return {
            "loss": {
                "losses": softplus(negatives - positive),
                "indices": (rows, columns),
                "reduction_type": "pos_pair",
            }
        }


def _from_start(index: Tensor, count: int) -> Tensor:
    """Indices that may count from the end, looked at where that does not stall a device."""
    if index.numel() and not index.is_cuda and not -count <= int(index.min()) <= int(index.max()) < count:
        raise IndexError(f"indices_tuple: expected indices in [-{count}, {count}), got {index.tolist()}")
    return torch.where(index < 0, index + count, index).long()


def _lse_by_row(logits: Tensor, rows: Tensor, count: int) -> Tensor:
    """Log-sum-exp of the logits of each of `count` rows, -inf for a row that has none."""
    most = logits.new_full((count,), -torch.inf).scatter_reduce(0, rows, logits.detach(), "amax")
    shift = most.masked_fill(most == -torch.inf, 0.0)
    sums = _sums(count, rows, (logits - shift[rows]).exp()[:, None])[:, 0]
    none = sums == 0
    return (sums.masked_fill(none, 1.0).log() + shift).masked_fill(none, -torch.inf)


class SupConLoss(losses.SupConLoss):
    """pytorch_metric_learning.losses.SupConLoss: the mean over an anchor's positives, outside the logarithm.

    0 unless the batch has a positive and a negative pair. With an index tuple the original's code serves.
    """

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        listed = not (indices_tuple is None or isinstance(indices_tuple, _Memory))
        ref_labels = labels if ref_labels is None else ref_labels
        known = not listed and labels is not None
        if not known or not _fuses(self, losses.SupConLoss, embeddings, ref_emb, ref_labels):
            return _supcon(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        data = _Rows(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if not data.has_pairs():
            return self.zero_losses()
        mean, count = data.mean_of_positives()
        terms = data.lse_of_all(_scale(self)) - mean / self.temperature
        return {
            "loss": {
                "losses": torch.where(count > 0, terms, 0.0),
                "indices": torch.arange(len(terms), device=terms.device),
                "reduction_type": "element",
            }
        }


class TripletMarginLoss(losses.TripletMarginLoss):
    """pytorch_metric_learning.losses.TripletMarginLoss, all triplets in N^2 log N instead of N^3.

    That is for labels alone, triplets_per_anchor="all", Euclidean distance, and the mean over all triplets
    (MeanReducer) or those with a loss above 0 (the default); for the rest the original's code serves.
    """

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        kinds = {reducers.AvgNonZeroReducer: "mean_nonzero", reducers.MeanReducer: "mean"}
        kind = kinds.get(type(self.reducer))
        distance = self.distance
        fused = (
            kind is not None
            and not self.reducer.collect_stats
            and indices_tuple is None
            and labels is not None
            and ref_emb is embeddings
            and ref_labels is labels
            and self.triplets_per_anchor == "all"
            and not self.swap
            and not self.smooth_loss
            and type(distance) is distances.LpDistance
            and _is_plain(distance)
            and _dense(embeddings)
            and isinstance(self.margin, int | float)
        )
        if not fused:
            return _triplet(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        value = triplet_margin_loss(
            embeddings,
            whole_numbers("labels", labels)[0],
            self.margin,
            mining="all",
            normalize=distance.normalize_embeddings,
            reduction=str(kind),
        )
        return {"loss": {"losses": value, "indices": None, "reduction_type": "already_reduced"}}


class CrossBatchMemory(losses.CrossBatchMemory):
    """pytorch_metric_learning.losses.CrossBatchMemory: embeddings against those of earlier batches too.

    As in the original, a batch is enqueued before the loss and does not meet itself; nor does one of a single
    row, which the original compares with itself. Around the NTXentLoss and SupConLoss above, without miner,
    index tuple and enqueue_mask, no pairs are listed; otherwise all are, batch times memory_size of them.
    """

    def create_indices_tuple(
        self, embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons
    ):
        kinds: dict[Any, Any] = {
            NTXentLoss.compute_loss: losses.NTXentLoss,
            SupConLoss.compute_loss: losses.SupConLoss,
        }
        kind = kinds.get(getattr(type(self.loss), "compute_loss", None))
        plain = not self.miner and input_indices_tuple is None and do_remove_self_comparisons
        if kind and plain and _fuses(self.loss, kind, embeddings, E_mem, L_mem):
            return _Memory((self.curr_batch_idx,))
        return _all_pairs(
            self, embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons
        )


SWAPS = {
    "pytorch_metric_learning.losses.ntxent_loss.NTXentLoss": NTXentLoss,
    "pytorch_metric_learning.losses.supcon_loss.SupConLoss": SupConLoss,
    "pytorch_metric_learning.losses.triplet_margin_loss.TripletMarginLoss": TripletMarginLoss,
    "pytorch_metric_learning.losses.cross_batch_memory.CrossBatchMemory": CrossBatchMemory,
}
