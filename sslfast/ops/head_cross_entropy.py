"""head_cross_entropy: `view_cross_entropy` of logits that are products with prototypes, without many logits.

    s_vbk = <f_vb, w_k>                  q_tb = softmax_k(target_scale (<u_tb, y_k> - center_k))
    loss_vb = -sum_k Q_vbk log softmax_k(scale s_vb),   Q_vb = sum_t q_tb of all t, or all but v

Prototypes come in chunks: two small products give their logits, in cache, and the kernels of
`soft_cross_entropy` meet those. The forward walk merges cross-entropies and log-sum-exps of the chunks, where
there are several; with the latter the backward walk turns the student's logits into

    G = upstream scale (W softmax(scale s) - Q),      df += G w,    dw = G^T f

Summing targets before the products spares attention over the prototypes, and softmax and Q, which are alike
late in training, are subtracted before anything is rounded. On a CPU up to `tuning.KEPT` logits are kept: the
kernels then meet all at once, and the backward walk is spared two products of six.
"""

import torch
from torch import Tensor

from sslfast.kernels import tuning
from sslfast.ops import _backend
from sslfast.ops._check import autocast, working_dtype
from sslfast.ops._library import define, once_differentiable
from sslfast.ops.soft_cross_entropy import reference as reference_on_logits

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453


def reference(
    features: Tensor,
    prototypes: Tensor,
    target_features: Tensor,
    target_prototypes: Tensor,
    center: Tensor | None,
    scale: float,
    target_scale: float,
    skip: bool,
) -> Tensor:
    """Plain PyTorch: specification, test truth and benchmark baseline. Returns [S, B]."""
    work = working_dtype(features)
    with torch.autocast(features.device.type, enabled=False):
        w, y = (x.to(features.dtype).to(work) for x in (prototypes, target_prototypes.detach()))
        logits, targets = features.to(work) @ w.T, target_features.detach().to(work) @ y.T
    return reference_on_logits(logits, targets, center, scale, target_scale, True, skip)


class _Walk:
    """A pass over the prototypes in chunks.

    keep: each chunk's logits have a place of their own in `room`. kept: the room of an earlier pass, whose
    logits are not made again.
    """

    def __init__(
        self, backend, kept, features, prototypes, target_features, target_prototypes, center, keep, scale,
        target_scale, skip,
    ) -> None:  # fmt: skip
        (views, batch, _), count, work = features.shape, len(target_features), working_dtype(features)
        self.count, self.dtype = count, features.dtype
        self.features, self.target_features = (
            self._factor(x.flatten(0, 1)) for x in (features, target_features)
        )
        self.prototypes, self.target_prototypes, self.center = prototypes, target_prototypes, center
        self.options = scale, target_scale, True, skip
        self.kernels = _backend.implementation("soft_cross_entropy", backend)
        elements = tuning.PROTOTYPES[features.device.type] // max(1, (views + count) * batch)
        self.step = max(tuning.PADDING, elements // tuning.PADDING * tuning.PADDING)
        self.keep, self.make = keep, kept is None
        self.places = len(prototypes) if keep else self.step
        sizes = views * batch * self.places, count * batch * self.places
        self.room = features.new_empty(sum(sizes), dtype=work) if kept is None else kept
        self.logits, self.targets = self.room.split(sizes)
        self.mass = torch.full((views, batch), count, dtype=work, device=features.device)
        if skip:
            self.mass[:count] -= 1

    def _factor(self, x: Tensor) -> Tensor:
        """Rounded to the features' dtype; a CPU has no product of 16-bit factors that leaves float32, so
        there they are converted again."""
        x = x.to(self.dtype)
        return x if x.is_cuda else x.to(working_dtype(x))

    def chunks(self):
        """(places, student's prototypes, and what a kernel takes: logits, targets, center), in turn; logits
        in the same memory unless they are kept."""
        for begin in range(0, len(self.prototypes), self.step):
            some = slice(begin, begin + self.step)
            w = self._factor(self.prototypes[some])
            logits, targets = self._of(self.logits, some, len(w)), self._of(self.targets, some, len(w))
            if self.make:
                y = self._factor(self.target_prototypes[some])
                _product(self.features, w.t(), logits)
                _product(self.target_features, y.t(), targets)
            yield some, w, self._given(logits, targets, some)

    def _of(self, room: Tensor, some: slice, count: int) -> Tensor:
        """[S B, count] or [T B, count]: the places of some prototypes."""
        rows = len(room) // self.places
        if self.keep:
            return room.view(rows, self.places)[:, some]
        return room[: rows * count].view(rows, count)

    def _given(self, logits: Tensor, targets: Tensor, some: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        (views, batch), count = self.mass.shape, self.count
        center = None if self.center is None else self.center[some]
        return logits.unflatten(0, (views, batch)), targets.unflatten(0, (count, batch)), center

    def losses(self) -> tuple[Tensor, Tensor, Tensor]:
        """[S, B], and states of all rows [S, B, 2] and targets [T, B, 2], as the kernels have them. Chunks,
        of which there may be hundreds, are merged in float64."""
        if self.keep or self.step >= len(self.prototypes):
            for _ in self.chunks():
                pass
            every = slice(0, len(self.prototypes))
            logits, targets = (self._of(x, every, every.stop) for x in (self.logits, self.targets))
            given = self._given(logits, targets, every)
            loss, state, _, target_state = self.kernels.forward(*given, *self.options)
            return loss, state, target_state
        count, work = self.count, self.mass.dtype
        both: tuple[Tensor, ...] = ()
        for _, _, (logits, targets, center) in self.chunks():
            pairs = [
                self.kernels.forward(logits, targets[t : t + 1], center, *self.options[:3], False)
                for t in range(count)
            ]
            loss, _, _, target_state = (torch.stack(x) for x in zip(*pairs, strict=True))
            found = loss.double(), pairs[0][1].double(), target_state.squeeze(1).double()
            both = _merge(both, found, *self.options[:2]) if both else found
        if self.options[3]:
            both[0].diagonal().zero_()  # of [T, S, B]: view v and target v
        return both[0].sum(0).to(work), both[1].to(work), both[2].to(work)

    def gradients(
        self, upstream: Tensor, state: Tensor, target_state: Tensor, trained: bool
    ) -> tuple[Tensor, Tensor]:
        """Of features [S B, D] and, where they are trained, prototypes [K, D]; in the working dtype or
        wider."""
        df = torch.zeros_like(self.features, dtype=upstream.dtype)
        kind = torch.promote_types(self.prototypes.dtype, upstream.dtype)
        dw = df.new_empty(self.prototypes.shape if trained else 0, dtype=kind)
        backward = self.kernels.backward
        assert backward is not None
        size = 0 if self.make else len(self.features) * min(self.step, len(self.prototypes))
        spare = self.features.new_empty(size)
        for some, w, given in self.chunks():
            # In place, but for kept logits, which another backward pass may want.
            out = given[0] if self.make else spare[: given[0].numel()].view(given[0].shape)
            backward(out, upstream, *given, state, self.mass, target_state, *self.options)
            weights = out.flatten(0, 1).to(w.dtype)
            if trained and kind == upstream.dtype:
                _product(weights.t(), self.features, dw[some])
            elif trained:
                dw[some] = _product(weights.t(), self.features)
            df += _product(weights, w)
        return df, dw


def _merge(
    old: tuple[Tensor, ...], new: tuple[Tensor, ...], scale: float, target_scale: float
) -> tuple[Tensor, ...]:
    """Cross-entropies [T, S, B], states [S, B, 2], [T, B, 2] of two sets of prototypes -> of both. A target
    is split among them; a set's cross-entropy grows by what the other one adds to the log-sum-exp."""
    losses, states, target_states = (torch.stack(x) for x in zip(old, new, strict=True))
    state, rises, none = _merge_states(states, scale)
    target_state, target_rises, no_target = _merge_states(target_states, target_scale)
    losses = losses.masked_fill(none[:, None] | no_target[:, :, None], 0)  # NaN of sets without any weight
    share = (-target_rises).exp2()[:, :, None]
    return (share * (losses + LN2 * rises[:, None])).sum(0), state, target_state


def _merge_states(states: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """[2, R, B, 2] -> [R, B, 2] of both together, by how much log2 of the sum is above each [2, R, B], and
    which of them are masked out beside one that is not."""
    tops, sums = states.unbind(3)
    top = tops.amin(0) if scale < 0 else tops.amax(0)
    none = (tops * scale == -torch.inf) & (tops != top)
    powers = sums + torch.where(tops == top, 0.0, tops - top) * (scale * LOG2E)
    powers = powers.masked_fill(none, -torch.inf)
    total = powers.exp2().sum(0).log2()
    return torch.stack((top, total), 2), total - powers, none


def _product(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """x y in float32 or wider."""
    if x.dtype in (torch.float32, torch.float64):
        return torch.mm(x, y, out=out)
    return torch.mm(x, y, out_dtype=torch.float32, out=out)


def _implementation(backend: str):
    def forward(features, *others):
        with torch.autocast(features.device.type, enabled=False):
            walk = _Walk(backend, None, features, *others)
            return *walk.losses(), walk.room if walk.keep else walk.room.new_empty(0)

    def backward(
        upstream, state, target_state, kept, trained, features, prototypes, target_features, *others
    ):
        # In float16 weights G might vanish or overflow: they are made with an upstream gradient that leaves
        # the largest of them, |scale| T, just room.
        gain = 2.0 ** (14 - len(target_features).bit_length()) / max(abs(others[3]), 1e-30)
        unit = upstream.abs().amax().clamp(min=1e-30) / gain
        with torch.autocast(features.device.type, enabled=False):
            room = kept if others[2] else None
            walk = _Walk(backend, room, features, prototypes, target_features, *others)
            df, dw = (x.mul_(unit) for x in walk.gradients(upstream / unit, state, target_state, trained))
        return df.view(features.shape).to(features.dtype), dw.to(prototypes.dtype)

    def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
        return _backend.implementation("soft_cross_entropy", backend).refuses(device, dtype)

    return _backend.Backend(forward, backward, refuses)


for _name in ("cpu", "triton"):
    _backend.register("head_cross_entropy", _name, _implementation(_name))

_INPUTS = (
    "Tensor features, Tensor prototypes, Tensor target_features, Tensor target_prototypes, Tensor? center"
)
_OPTIONS = "bool keep, float scale, float target_scale, bool skip, str backend"


def _serve_forward(*args):
    return _backend.implementation("head_cross_entropy", args[-1]).forward(*args[:-1])


def _serve_backward(*args):
    backward = _backend.implementation("head_cross_entropy", args[-1]).backward
    assert backward is not None
    return backward(*args[:-1])


def _fake(features, prototypes, target_features, target_prototypes, center, keep, *rest):
    (views, batch, _), count, work = features.shape, target_features.shape[0], working_dtype(features)
    kept = (views + count) * batch * prototypes.shape[0] if keep else 0
    sizes = (views, batch), (views, batch, 2), (count, batch, 2), (kept,)
    return tuple(features.new_empty(size, dtype=work) for size in sizes)


_fwd = define(
    f"head_cross_entropy_fwd({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _serve_forward,
    _fake,
)
_bwd = define(
    "head_cross_entropy_bwd(Tensor upstream, Tensor state, Tensor target_state, Tensor kept, bool trained, "
    f"{_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _serve_backward,
    lambda upstream, state, target_state, kept, trained, features, prototypes, *rest: (
        features.new_empty(features.shape),
        prototypes.new_empty(prototypes.shape if trained else 0),
    ),
)


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, prototypes, target_features, target_prototypes, center, *options):
        inputs = features, prototypes, target_features, target_prototypes, center
        loss, *states = _fwd(*inputs, *options)
        ctx.save_for_backward(*states, *inputs)
        ctx.options = options
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        state, target_state, kept, *inputs = ctx.saved_tensors
        trained = ctx.needs_input_grad[1]
        args = upstream.contiguous(), state, target_state, kept, trained, *inputs, *ctx.options
        df, dw = _bwd(*args)
        return df, dw if trained else None, *(None,) * 8


def head_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    target_features: Tensor,
    target_prototypes: Tensor,
    scale: float,
    target_scale: float,
    *,
    center: Tensor | None = None,
    skip: bool = False,
) -> Tensor:
    """Of each row of features, the sum of its cross-entropies with the targets of the same image.

    Args:
        features, target_features: [S, B, D] and [T, B, E], of one dtype; under autocast cast as torch.mm
            would cast them. The targets carry no gradient.
        prototypes, target_prototypes: [K, D] and [K, E], of any floating dtype: rounded to that of the
            features.
        scale, target_scale: factors of the logits, 1 / temperature.
        center: [K] of any floating dtype, subtracted from the targets' logits.
        skip: view v and target v are the same view and do not meet.

    Returns:
        [S, B] of the working dtype. Differentiable in features and prototypes, once.
    """
    features, others = autocast(features, target_features)
    assert others is not None
    targets, target_prototypes = others.detach(), target_prototypes.detach()
    center = None if center is None else center.detach().to(working_dtype(features)).contiguous()
    options = float(scale), float(target_scale), skip
    backend = _backend.resolve("head_cross_entropy", features.device, features.dtype)
    if backend == "reference" or not features.shape[0] * features.shape[1]:
        return reference(features, prototypes, targets, target_prototypes, center, *options)
    logits, keep = (features.shape[0] + targets.shape[0]) * features.shape[1] * prototypes.shape[0], False
    if torch.is_grad_enabled() and (features.requires_grad or prototypes.requires_grad):
        if logits <= tuning.KEPT[features.device.type]:  # a branch: under torch.compile no symbol
            keep = True
    return _HeadCrossEntropy.apply(
        features, prototypes, targets, target_prototypes, center, keep, *options, backend
    )
