"""Cross-entropy of a linear head over many classes, as masked and causal language models have it."""

import torch
from torch import Tensor

from sslfast.losses._common import check_reduction, reduced
from sslfast.ops._check import FLOATS, autocast, check_integer, check_tensor, may_read
from sslfast.ops.linear_cross_entropy import linear_cross_entropy_rows


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    *,
    num_labelled: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """torch.nn.functional.cross_entropy(hidden @ weight.T + bias, labels), without the logits in memory.

    Rows without a label take no part in any product (on a GPU see num_labelled), and every class gets its
    gradient, however small its probability.

    Args:
        hidden: [..., D] floating: features, for a causal model those that predict the label of the same
            place.
        weight: [V, D] of the same dtype; under autocast both are cast as torch.nn.functional.linear would.
        labels: int64 [...]: classes in [0, V), or ignore_index.
        bias: [V] floating.
        ignore_index: the label of rows that have none.
        num_labelled: how many labels are not ignore_index, or a bound that they do not exceed. On a GPU,
            where looking would stall, that many rows are computed, all of them without it; more labels than
            that give NaN. A CPU counts by itself.
        reduction: "mean" over the rows with a label, "sum", or "none": [...], 0 without a label.

    Returns:
        float32 (float64 for float64 input). A mean over no label is NaN, as PyTorch's.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it. Labels on a GPU are looked at under
            SSLFAST_CHECK=1 only; elsewhere one outside of [0, V) gives NaN.
    """
    check_tensor("weight", weight, FLOATS, (None, None))
    classes, dim = weight.shape
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden: expected a tensor, got {type(hidden).__name__}")
    if hidden.dim() < 2:
        raise ValueError(f"hidden: expected shape [..., {dim}], got {list(hidden.shape)}")
    check_tensor("hidden", hidden, FLOATS, (*(None,) * (hidden.dim() - 1), dim), weight)
    check_tensor("labels", labels, (torch.int64,), tuple(hidden.shape[:-1]), hidden)
    if classes < 1:
        raise ValueError("weight: expected at least one class, got none")
    if bias is not None:
        check_tensor("bias", bias, FLOATS, (classes,), hidden)
    check_integer("ignore_index", ignore_index, -(2**63))
    if ignore_index >= 2**63:
        raise ValueError(f"ignore_index: expected an int64, got {ignore_index}")
    check_reduction(reduction)
    h, w = autocast(hidden.flatten(0, -2), weight)
    assert w is not None
    if h.dtype != w.dtype:
        raise TypeError(f"weight: expected {h.dtype}, as hidden, got {w.dtype}")

    flat = labels.reshape(-1)
    labelled = flat != ignore_index
    valid = ~labelled | (flat >= 0) & (flat < classes)
    count = labelled.sum()
    if num_labelled is not None:
        check_integer("num_labelled", num_labelled, 0)
        valid = valid & (count <= num_labelled)
    if may_read(flat) and not valid.all():
        if num_labelled is not None and num_labelled < int(count):
            raise ValueError(f"num_labelled: expected at least {int(count)}, all labels, got {num_labelled}")
        wrong = flat[~valid][0].item()
        raise ValueError(f"labels: expected classes in [0, {classes}) or {ignore_index}, got {wrong}")
    flat = torch.where(labelled, flat.clamp(0, classes - 1), ignore_index)
    terms = linear_cross_entropy_rows(h, w, bias, flat, ignore_index, num_labelled)
    terms = terms * torch.where(valid, 1.0, torch.nan)  # its gradient is NaN, too
    if reduction == "mean":
        return terms.sum() / count
    return reduced(terms.view(labels.shape), reduction)
