"""linear_cross_entropy: cross-entropy of a linear layer's logits, which are never all in memory.

    s_ij = <h_i, w_j> + bias_j      y: label of row i      lse_i = log sum_{j != y} exp s_ij
    loss_i = -log softmax(s_i)_y = softplus(lse_i - s_iy)

The sums are those of `similarity_lse` over the classes other than the label. With m_i = 1 - softmax(s_i)_y
its backward pass, of upstream gradient g_i m_i, gives what those classes contribute; the label's class gets
dw_y -= g_i m_i h_i and dh_i -= g_i m_i w_y in place, so that weights have one gradient in memory.
Rows that have no label are left out of every product, on a GPU as many as the caller vouches for.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sslfast.ops import _backend
from sslfast.ops._check import working_dtype
from sslfast.ops._library import define, once_differentiable


def reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignored: int) -> Tensor:
    """Plain PyTorch, differentiable to any order: specification, test truth and benchmark baseline."""
    work = working_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(work), weight.to(work), None if bias is None else bias.to(work))
    return F.cross_entropy(logits, labels, ignore_index=ignored, reduction="none")


def _may_count(labels: Tensor) -> bool:
    """Whether the host may read how many labels there are."""
    return not labels.is_cuda


class _Labelled:
    """The rows that have a label, next to each other.

    On a GPU a bound of their number is the caller's to tell. Rows without a label that stay below it, or all
    of them where there is none, are zeros of any label and count for nothing.
    """

    def __init__(self, hidden: Tensor, labels: Tensor, classes: int, ignored: int, count: int) -> None:
        self.size, some = len(labels), labels != ignored
        self.rows: Tensor | None = None  # all of them
        if _may_count(labels):
            found = some.nonzero()[:, 0]
            self.rows = None if len(found) == self.size else found
        elif 0 <= count < self.size:
            self.rows = (~some).to(torch.uint8).argsort(stable=True)[:count]
        self.some, self.hidden, self.labels = (self.take(x) for x in (some, hidden, labels))
        if not _may_count(labels):
            others = torch.arange(len(self.labels), device=labels.device) % classes
            self.labels = torch.where(self.some, self.labels, others)
            self.hidden = self.hidden.masked_fill(~self.some[:, None], 0.0)

    def take(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x[self.rows]

    def put(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x.new_zeros(self.size, *x.shape[1:]).index_copy_(0, self.rows, x)


def _forward(hidden, weight, bias, labels, ignored, count, backend):
    at = _Labelled(hidden, labels, len(weight), ignored, count)
    work = working_dtype(hidden)
    if len(at.labels) == 0:
        return tuple(hidden.new_zeros(len(labels), dtype=work) for _ in range(3))
    one = torch.ones((), dtype=work, device=hidden.device)
    ids = torch.arange(len(weight), device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        serve = _backend.implementation("similarity_lse", backend).forward
        lse = serve(at.hidden, weight, one, bias, at.labels, ids, False, False, False)[0]
        own = (at.hidden.to(work) * weight[at.labels].to(work)).sum(1)
        own = own if bias is None else own + bias[at.labels].to(work)
        gap = lse - own
        loss, missed = (
            f(gap).masked_fill(~at.some, 0.0) for f in (lambda x: F.softplus(x, threshold=40), torch.sigmoid)
        )
    return at.put(loss), at.put(lse), at.put(missed)


def _backward(g, missed, lse, hidden, weight, bias, labels, ignored, count, needs, backend):
    at = _Labelled(hidden, labels, len(weight), ignored, count)
    need_h, need_w, need_b = needs
    work = working_dtype(hidden)
    if len(at.labels) == 0:
        inputs = zip((hidden, weight, bias), needs, strict=True)
        return tuple(x.new_zeros(x.shape) if need else hidden.new_empty(0) for x, need in inputs)
    one = torch.ones((), dtype=work, device=hidden.device)
    ids = torch.arange(len(weight), device=hidden.device)
    upstream = at.take(g * missed).masked_fill(~at.some, 0.0)
    with torch.autocast(hidden.device.type, enabled=False):
        serve = _backend.implementation("similarity_lse", backend).backward
        assert serve is not None
        dh, dw, _, db = serve(
            upstream, None, at.hidden, weight, one, bias, at.labels, ids, at.take(lse), None, False,
            (need_h, need_w, False, need_b),
        )  # fmt: skip
        if need_h:
            dh = torch.addcmul(dh.to(work), upstream[:, None], weight[at.labels].to(work), value=-1)
        if need_w:
            dw = _subtract(dw.to(work), at.labels, upstream[:, None] * at.hidden.to(work))
        if need_b:
            db = _subtract(db.to(work), at.labels, upstream)
    return (
        at.put(dh).to(hidden.dtype) if need_h else hidden.new_empty(0),
        dw.to(weight.dtype) if need_w else hidden.new_empty(0),
        db.to(bias.dtype) if need_b else hidden.new_empty(0),
    )


def _subtract(total: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """total[rows] -= x, in place and in a fixed order."""
    if total.is_cuda:  # sorts before it adds; index_add_ does not
        return total.index_put_((rows,), -x, accumulate=True)
    return total.index_add_(0, rows, x, alpha=-1)


def _backward_fake(g, missed, lse, hidden, weight, bias, labels, ignored, count, needs, backend):
    inputs = zip((hidden, weight, bias), needs, strict=True)
    return tuple(x.new_empty(x.shape) if need else hidden.new_empty(0) for x, need in inputs)


_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignored, SymInt count"
_fwd = define(
    f"linear_cross_entropy_fwd({_INPUTS}, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    lambda hidden, weight, bias, labels, *options: tuple(
        hidden.new_empty(len(labels), dtype=working_dtype(hidden)) for _ in range(3)
    ),
)
_bwd = define(
    f"linear_cross_entropy_bwd(Tensor g, Tensor missed, Tensor lse, {_INPUTS}, bool[] needs, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignored, count, backend):
        loss, lse, missed = _fwd(hidden, weight, bias, labels, ignored, count, backend)
        ctx.save_for_backward(missed, lse, hidden, weight, bias, labels)
        ctx.options = ignored, count, backend
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        needs = ctx.needs_input_grad[:3]
        ignored, count, backend = ctx.options
        found = _bwd(g, *ctx.saved_tensors, ignored, count, needs, backend)
        return *(d if need else None for d, need in zip(found, needs, strict=True)), *(None,) * 4


def linear_cross_entropy_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignored: int, count: int | None
) -> Tensor:
    """Losses of the rows [N], 0 where the label is `ignored`; the caller has checked the arguments.

    Args:
        hidden: [N, D], weight: [V, D] of one floating dtype, bias: [V] floating or None.
        labels: int64 [N], in [0, V) or `ignored`.
        count: at most so many rows have a label, where that is known; a GPU then computes no more.

    Returns:
        [N] of the working dtype. Differentiable in hidden, weight and bias, once.
    """
    backend = _backend.resolve("similarity_lse", hidden.device, hidden.dtype)
    if backend == "reference":
        return reference(hidden, weight, bias, labels, ignored)
    return _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, ignored, -1 if count is None else count, backend
    )
