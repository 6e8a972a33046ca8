"""soft_cross_entropy: views of images against the sum of their targets, without log-probabilities in memory.

    targets of row (v, b) are q_tb of all t, or all but v:  Q_vb = sum_t q_tb,  W_vb = sum_k Q_vbk
    q_tb = a row of the targets, or softmax(target_scale (row - center))
    loss_vb = W_vb log sum_k exp(scale s_vbk) - scale <Q_vb, s_vb>: the sum of its pairs' cross-entropies
    dlogits_vb = upstream_vb scale (W_vb softmax(scale s_vb) - Q_vb)

Cross-entropy is linear in its targets, so one pass over a row serves all of its targets.
"""

import torch
from torch import Tensor

from sslfast import _C
from sslfast.ops import _backend
from sslfast.ops._check import FLOATS, check_tensor, number, traced, working_dtype
from sslfast.ops._library import define, once_differentiable


def reference(
    logits: Tensor,
    targets: Tensor,
    center: Tensor | None,
    scale: float,
    target_scale: float,
    softmax: bool,
    skip: bool,
) -> Tensor:
    """Plain PyTorch: specification, test truth and benchmark baseline. [S, B, K], [T, B, K] -> [S, B]."""
    work = working_dtype(logits)
    q = targets.detach().to(work)
    if softmax:
        q = ((q if center is None else q - center.to(work)) * target_scale).softmax(2)
    log_p = (logits.to(work) * scale).log_softmax(2)
    rows = []
    for v, row in enumerate(log_p):
        others = [q_t for t, q_t in enumerate(q) if not (skip and t == v)]
        rows.append(-sum((q_t * row for q_t in others), torch.zeros_like(row)).sum(1))
    return torch.stack(rows) if rows else log_p.sum(2)


# Backends: (loss [S, B], state [S, B, 2], mass [S, B], target_state [T, B, 2]), all of the working dtype


def _call(logits, targets, center, state, mass, target_state, scale, target_scale, softmax, skip):
    (views, batch, classes), count, device = logits.shape, len(targets), logits.device
    work = working_dtype(logits)

    def rows(name: str, x: Tensor, n: int) -> tuple[int, int, int]:
        at, strides = _backend.strided(name, x, x.dtype, (n, batch, classes), device)
        return at, strides[0], strides[1]

    return _C.SoftCrossEntropy(
        (views, count, batch, classes), rows("logits", logits, views), _backend.CODES[logits.dtype],
        rows("targets", targets, count), _backend.CODES[targets.dtype],
        _backend.pointer("center", center, work, (classes,), device), scale, target_scale, softmax, skip,
        _backend.pointer("state", state, work, (views, batch, 2), device),
        _backend.pointer("mass", mass, work, (views, batch), device),
        _backend.pointer("target_state", target_state, work, (count if softmax else 0, batch, 2), device),
        torch.get_num_threads(),
    )  # fmt: skip


def _outputs(logits: Tensor, targets: Tensor, softmax: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (views, batch, _), work = logits.shape, working_dtype(logits)
    return (
        logits.new_empty(views, batch, dtype=work),
        logits.new_empty(views, batch, 2, dtype=work),
        logits.new_empty(views, batch, dtype=work),
        logits.new_empty(len(targets) if softmax else 0, batch, 2, dtype=work),
    )


def _cpu_forward(logits, targets, center, scale, target_scale, softmax, skip):
    loss, state, mass, target_state = _outputs(logits, targets, softmax)
    if loss.numel():
        states = state, mass, target_state
        call = _call(logits, targets, center, *states, scale, target_scale, softmax, skip)
        call.forward(_backend.pointer("loss", loss, loss.dtype, loss.shape, loss.device))
    return loss, state, mass, target_state


def _cpu_backward(out, upstream, logits, targets, center, state, mass, target_state, *options):
    """The classes may be a slice of those that the states are of."""
    if not out.numel():
        return
    call = _call(logits, targets, center, state, mass, target_state, *options)
    at, strides = _backend.strided("dlogits", out, logits.dtype, logits.shape, logits.device)
    of_rows = mass.dtype, mass.shape, mass.device
    call.backward(_backend.pointer("upstream", upstream, *of_rows), (at, *strides[:2]))


def _triton_forward(logits, targets, center, *options):
    from sslfast.kernels import soft_cross_entropy as kernels

    loss, *states = _outputs(logits, targets, softmax=options[2])
    if loss.numel():
        with _backend.device_of(logits):
            kernels.launch_forward(logits, targets, center, loss, *states, *options)
    return loss, *states


def _triton_backward(out, *args):
    from sslfast.kernels import soft_cross_entropy as kernels

    if out.numel():
        with _backend.device_of(out):
            kernels.launch_backward(out, *args)


def _triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "it has no kernel for torch.float64"
    return _backend.triton_refuses(device)


_backend.register(
    "soft_cross_entropy", "triton", _backend.Backend(_triton_forward, _triton_backward, _triton_refuses)
)
_backend.register(
    "soft_cross_entropy", "cpu", _backend.Backend(_cpu_forward, _cpu_backward, _backend.cpu_refuses)
)

_OPTIONS = "float scale, float target_scale, bool softmax, bool skip, str backend"
_fwd = define(
    f"soft_cross_entropy(Tensor logits, Tensor targets, Tensor? center, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda *args: _backend.implementation("soft_cross_entropy", args[-1]).forward(*args[:-1]),
    lambda logits, targets, center, scale, target_scale, softmax, skip, backend: _outputs(
        logits, targets, softmax
    ),
)


def _into_new(upstream, logits, *args):
    out = logits.new_empty(logits.shape)
    _into(out, upstream, logits, *args)
    return out


def _into(out, upstream, logits, *args):
    backward = _backend.implementation("soft_cross_entropy", args[-1]).backward
    assert backward is not None
    backward(out, upstream, logits, *args[:-1])


_bwd = define(
    "soft_cross_entropy_backward(Tensor upstream, Tensor logits, Tensor targets, Tensor? center, "
    f"Tensor state, Tensor mass, Tensor target_state, {_OPTIONS}) -> Tensor",
    _into_new,
    lambda upstream, logits, *args: logits.new_empty(logits.shape),
)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, center, scale, target_scale, softmax, skip, in_place, backend):
        ctx.options = scale, target_scale, softmax, skip, backend
        loss, *states = _fwd(logits, targets, center, *ctx.options)
        ctx.save_for_backward(logits, targets, center, *states)
        ctx.in_place = in_place and logits.is_contiguous() and not traced()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        logits, targets, center, *states = ctx.saved_tensors
        args = upstream.contiguous(), logits, targets, center, *states, *ctx.options
        if not ctx.in_place or traced():
            return _bwd(*args), *(None,) * 8
        _into(logits, *args)
        # From here on whoever saved the logits, this graph too, is told that they are gone.
        torch.autograd.graph.increment_version(logits)
        return logits.detach(), *(None,) * 8


def view_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    scale: float,
    *,
    center: Tensor | None = None,
    target_scale: float | None = None,
    skip: bool = False,
    in_place: bool = False,
) -> Tensor:
    """Of each row of logits, the sum of its cross-entropies with the targets of the same image.

    Args:
        logits: [S, B, K], of any floating dtype.
        targets: [T, B, K]: probabilities; with a target_scale, logits too, of which
            softmax(target_scale * (targets - center)) is taken. They carry no gradient.
        scale: factor of the logits, 1 / temperature.
        center: [K] of any floating dtype.
        skip: view v and target v are the same view and do not meet.
        in_place: the backward pass writes the gradient over the logits.

    Returns:
        [S, B] of the working dtype. Differentiable in logits, once.
    """
    softmax, work = target_scale is not None, working_dtype(logits)
    targets = targets.detach()
    center = None if center is None else center.detach().to(work).contiguous()
    options = float(scale), float(target_scale or 0), softmax, skip
    backend = _backend.resolve("soft_cross_entropy", logits.device, logits.dtype)
    if backend == "reference":
        return reference(logits, targets, center, *options)
    logits, targets = (x if x.stride(2) == 1 else x.contiguous() for x in (logits, targets))
    return _SoftCrossEntropy.apply(logits, targets, center, *options, in_place, backend)


def soft_cross_entropy(
    logits: Tensor, targets: Tensor, *, scale: float = 1.0, inplace_backward: bool = False
) -> Tensor:
    """Cross-entropy of each row of logits with its own distribution over the classes.

    -sum_k targets_rk log softmax(scale * logits_r)_k, in one pass forward and one backward.

    Args:
        logits: [R, K], K at least 1, of any floating dtype and row stride.
        targets: [R, K], of any floating dtype; need not sum to 1. They carry no gradient.
        scale: factor of the logits, 1 / temperature; may be negative.
        inplace_backward: the backward pass writes the gradient over the logits and needs no memory of its
            own. Who uses the logits after that, a second backward pass too, gets autograd's error.

    Returns:
        [R], float32 (float64 for float64 logits). Differentiable in logits, once.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, a scale that is not
            finite, in-place logits that are a leaf; the message names it.
    """
    check_tensor("logits", logits, FLOATS, (None, None))
    check_tensor("targets", targets, FLOATS, tuple(logits.shape), logits)
    if not logits.shape[1]:
        raise ValueError(f"logits: expected at least one class, got shape {list(logits.shape)}")
    number("scale", scale)
    if inplace_backward and logits.requires_grad and logits.is_leaf:
        raise ValueError("inplace_backward: expected computed logits, got a leaf, which would be lost")
    losses = view_cross_entropy(logits[None], targets[None], scale, in_place=inplace_backward)
    return losses[0]
