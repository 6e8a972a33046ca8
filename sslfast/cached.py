"""cached_step: the gradient of a contrastive loss whose batch does not fit into memory (GradCache)."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from sslfast.ops._check import check_integer

Encoder = Callable[..., Tensor]


def cached_step(
    encoders: Encoder | Sequence[Encoder],
    inputs: Sequence[Any],
    loss: Callable[..., Tensor],
    micro_batch: int,
    *,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Loss and gradients of a whole batch, in the memory of a micro-batch (GradCache, Gao et al. 2021).

    With z_i = f_i(x_i), computed chunk by chunk without a graph, the loss L(z_1, ..., z_m) of all rows gives
    g_i = dL/dz_i; then each chunk c runs once more, with a graph:

        dL/dtheta = sum_i sum_c (dz_i[c]/dtheta)^T g_i[c]

    These are the gradients of one pass over the whole batch where an encoder treats rows apart; BatchNorm in
    training mode has the statistics of a chunk. They are added to .grad, as backward() does, of the encoders,
    of what the loss itself has (a temperature) and of inputs that require grad. It costs one forward pass of
    the encoders more than one batch does.

    A chunk's second run gets the random numbers (of torch's default generators, on the CPU and on the devices
    of inputs and parameters) and the buffers that its first run got; afterwards generators and buffers are
    as if each chunk had run once and the loss after them. An exception leaves both as they were before the
    call, so that it can be repeated with a smaller micro-batch; .grad may then hold a part.

    Under torch.autocast both runs and the loss are cast, the backward passes are not.

    DistributedDataParallel: each module averages its gradients once, in the last backward pass through it;
    within its no_sync() not at all. Where its last call does not use all parameters that calls before, or the
    loss, have used, it takes find_unused_parameters=True. All processes have to cut an input into as many
    chunks, which one small exchange checks.

    Args:
        encoders: one for all inputs, or a sequence with one for each, the same one repeated or not. A module,
            or any callable: the modules that a bound method, a partial or a function refers to are found;
            of those hidden deeper buffers change twice, and DistributedDataParallel averages after each
            chunk. A module (or the method of one) without parameters that require grad runs once.
        inputs: one for each argument of the loss, in its order: a tensor [B, ...] for encoder(x), a sequence
            for encoder(*x) or a mapping for encoder(**x), with tensors [B, ...] in it, nested or not; what is
            no tensor is passed on as it is. B may differ between inputs.
        loss: loss(z_1, ..., z_m) -> 0-d tensor; z_i [B_i, ...] are the encoder's outputs.
        micro_batch: the most rows of a chunk. Chunks are of one size, or of two that differ by 1.
        scaler: its scale multiplies the loss before the gradients are taken.

    Returns:
        The loss, 0-d, not scaled, without a graph.

    Raises:
        TypeError, ValueError: an invalid argument, a number of chunks that differs between processes (on all
            of them), or an encoder or a loss that returns something else; the message names the argument.
        RuntimeError: gradients are disabled.
    """
    if not torch.is_grad_enabled():
        raise RuntimeError("cached_step: expected gradients to be enabled, got a call under torch.no_grad")
    if not callable(loss):
        raise TypeError(f"loss: expected a callable, got {type(loss).__name__}")
    check_integer("micro_batch", micro_batch, 1)
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler: expected a torch.amp.GradScaler, got {type(scaler).__name__}")
    sides = _sides(encoders, inputs, micro_batch)
    devices = sorted({d for side in sides for d in side.devices}, key=str)
    modules = list(dict.fromkeys(m for side in sides for m in side.modules))

    random = _RandomState(devices)
    try:
        try:
            embeddings = [side.embed() for side in sides]
        finally:
            torch.clear_autocast_cache()  # of weights, which torch 2.8 casts without a graph here
        value = _checked_loss(loss(*embeddings))
        with _no_autocast(devices):
            (value if scaler is None else scaler.scale(value)).backward()
        value, gradients = value.detach(), [z.grad for z in embeddings]
        del embeddings
        buffers, random_after = _Buffers(modules), _RandomState(devices)
        last_calls = {m: (side, k) for side in sides if side.trains for m, k in side.last_calls.items()}
        for side, gradient in zip(sides, gradients, strict=True):
            side.backward(gradient, last_calls)
        leaves = [pair for side in sides for pair in side.input_gradients()]
        if leaves:
            tensors, dtensors = zip(*leaves, strict=True)
            with _no_autocast(devices):
                torch.autograd.backward(tensors, dtensors)
    except BaseException:
        for side in reversed(sides):
            side.rewind()
        random.restore()
        raise
    buffers.restore()
    random_after.restore()
    return value


class _Side:
    """An argument of the loss: its encoder, its input, and the states in which the first run found them."""

    def __init__(self, index: int, encoder: Encoder, x: Any, micro_batch: int) -> None:
        if not callable(encoder):
            raise TypeError(f"encoders[{index}]: expected a callable, got {type(encoder).__name__}")
        self.index, self.encoder = index, encoder
        if not isinstance(x, Tensor | Mapping | list | tuple):
            raise TypeError(
                f"inputs[{index}]: expected a tensor [B, ...] or a sequence or mapping of them, "
                f"got {type(x).__name__}"
            )
        # A sequence's items are the call's arguments, a mapping's its keywords.
        x = dict(x) if isinstance(x, Mapping) else tuple(x) if isinstance(x, list | tuple) else x
        paths, self.structure = tree_flatten_with_path(x)
        self.leaves = [leaf for _, leaf in paths]
        self.tensors = [k for k, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        names = [f"inputs[{index}]{keystr(path)}" for path, _ in paths]
        rows = _rows({names[k]: self.leaves[k] for k in self.tensors}, index)
        count = -(-rows // micro_batch)
        ends = [-(-rows * k // count) for k in range(count + 1)] if rows else [0]
        self.chunks = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]

        roots, tensors = _modules(encoder), [self.leaves[k] for k in self.tensors]
        self.modules = list(dict.fromkeys(m for root in roots for m in root.modules()))
        self.parallel = [m for m in self.modules if isinstance(m, DistributedDataParallel)]
        self.last_calls: dict[nn.Module, int] = {}  # the last chunk that called each of self.parallel
        parameters = [p for root in roots for p in root.parameters()]
        buffers = [b for root in roots for b in root.buffers()]
        self.devices = {x.device for x in (*parameters, *buffers, *tensors)}
        known = isinstance(getattr(encoder, "__self__", encoder), nn.Module)
        self.trains = not known or any(x.requires_grad for x in (*parameters, *tensors))
        self.random: list[_RandomState] = []
        self.before: _Buffers | None = None
        self.dinputs: list[list[Tensor | None]] = []

    @torch.no_grad()
    def embed(self) -> Tensor:
        """The embeddings of all chunks, as a leaf."""
        self.before = _Buffers(self.modules)
        self.broadcasts = [(m, m.require_forward_param_sync) for m in self.parallel]
        outputs: list[Tensor] = []
        with ExitStack() as stack:
            for module in self.parallel:
                handle = module.register_forward_pre_hook(
                    lambda module, _: self.last_calls.__setitem__(module, len(outputs))
                )
                stack.callback(handle.remove)
            for rows in self.chunks:
                self.random.append(_RandomState(self.devices))
                # An encoder may write into its input, which the second run needs as it was.
                z = self._encode([self.leaves[k][rows].clone() for k in self.tensors])
                outputs.append(self._checked(z, rows.stop - rows.start, outputs))
        return torch.cat(outputs).requires_grad_(self.trains)

    def backward(self, gradient: Tensor | None, last_calls: Mapping[nn.Module, tuple["_Side", int]]) -> None:
        """Runs the chunks again, and gradient [B, ...] of the embeddings back through them.

        last_calls: the side and chunk in which each DistributedDataParallel module is called last.
        """
        if not self.trains or (gradient is None and not self.last_calls):
            return
        self.rewind()
        for k, (rows, random) in enumerate(zip(self.chunks, self.random, strict=True)):
            random.restore()
            wholes = [self.leaves[i] for i in self.tensors]
            parts = [x[rows].detach().requires_grad_(x.requires_grad) for x in wholes]
            reduced = [m for m in self.parallel if last_calls.get(m) == (self, k)]
            with ExitStack() as stack:
                for module in self.parallel:
                    if module not in reduced and _may_wait(module):
                        stack.enter_context(module.no_sync())
                z = self._encode(parts)
                if z.requires_grad:
                    dz = torch.zeros_like(z) if gradient is None else gradient[rows]
                    with _no_autocast(self.devices):
                        z.backward(dz)
                elif any(m.require_backward_grad_sync for m in reduced):
                    raise ValueError(
                        f"encoders[{self.index}]: expected a gradient for the last call of a "
                        "DistributedDataParallel module, got an output without one: put its other inputs last"
                    )
            self.dinputs.append([x.grad for x in parts])

    def input_gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(tensor, its gradient) of what requires grad in the input."""
        for k, parts in zip(self.tensors, zip(*self.dinputs, strict=True), strict=False):
            x = self.leaves[k]
            if x.requires_grad and any(dx is not None for dx in parts):
                pairs = zip(parts, self.chunks, strict=True)
                yield x, torch.cat([torch.zeros_like(x[rows]) if dx is None else dx for dx, rows in pairs])

    def rewind(self) -> None:
        """Buffers as the first run found them, to be broadcast once more where they were."""
        if self.before is not None:
            self.before.restore()
            for module, broadcasts in self.broadcasts:
                module.require_forward_param_sync = broadcasts

    def _encode(self, parts: Iterable[Tensor]) -> Tensor:
        leaves = list(self.leaves)
        for k, part in zip(self.tensors, parts, strict=True):
            leaves[k] = part
        x = tree_unflatten(leaves, self.structure)
        if isinstance(x, Tensor):
            return self.encoder(x)
        return self.encoder(**x) if isinstance(x, dict) else self.encoder(*x)

    def _checked(self, z: Tensor, rows: int, others: list[Tensor]) -> Tensor:
        name = f"encoders[{self.index}]"
        if not isinstance(z, Tensor):
            raise TypeError(f"{name}: expected it to return a tensor [b, ...], got {type(z).__name__}")
        if not z.is_floating_point():
            raise TypeError(f"{name}: expected it to return a floating-point tensor, got {z.dtype}")
        if z.dim() == 0 or len(z) != rows:
            raise ValueError(
                f"{name}: expected it to return [{rows}, ...] for {rows} rows, got {list(z.shape)}"
            )
        expected, got = ((x.dtype, list(x.shape[1:])) for x in (others[0] if others else z, z))
        if expected != got:
            raise ValueError(f"{name}: expected it to return rows of {expected} for each chunk, got {got}")
        return z


def _sides(encoders: Any, inputs: Any, micro_batch: int) -> list[_Side]:
    if not isinstance(inputs, list | tuple):
        raise TypeError(
            f"inputs: expected a sequence with one for each argument of the loss, got {type(inputs).__name__}"
        )
    if not inputs:
        raise ValueError("inputs: expected at least one, got none")
    if isinstance(encoders, list | tuple | nn.ModuleList):
        if len(encoders) != len(inputs):
            raise ValueError(f"encoders: expected one for each of {len(inputs)} inputs, got {len(encoders)}")
    elif callable(encoders):
        encoders = [encoders] * len(inputs)
    else:
        raise TypeError(f"encoders: expected a callable or a sequence of them, got {type(encoders).__name__}")
    pairs = zip(encoders, inputs, strict=True)
    sides = [_Side(k, encoder, x, micro_batch) for k, (encoder, x) in enumerate(pairs)]
    _check_processes(sides)
    for side in sides:
        if not side.chunks:
            raise ValueError(f"inputs[{side.index}]: expected at least one row, got none")
    return sides


def _rows(tensors: dict[str, Tensor], index: int) -> int:
    """The first dimension of all of them."""
    if not tensors:
        raise TypeError(f"inputs[{index}]: expected a tensor [B, ...] in it, got none")
    rows: int | None = None
    for name, x in tensors.items():
        if x.dim() == 0:
            raise ValueError(f"{name}: expected a tensor [B, ...], got a 0-d one")
        rows = len(x) if rows is None else rows
        if len(x) != rows:
            raise ValueError(f"{name}: expected {rows} rows, as the first tensor of the input, got {len(x)}")
    return rows or 0


def _modules(encoder: Any) -> list[nn.Module]:
    """What an encoder calls, as far as it shows: the encoder, what it is bound to or refers to by name, and
    their attributes. A module that it does not call does no harm."""
    if isinstance(encoder, nn.Module):
        return [encoder]
    held = [encoder]
    if isinstance(encoder, functools.partial):
        held = [*_modules(encoder.func), *encoder.args, *encoder.keywords.values()]
    elif inspect.ismethod(encoder):
        held = [encoder.__self__]
    elif inspect.isfunction(encoder):
        names = inspect.getclosurevars(encoder)
        held = [*names.nonlocals.values(), *names.globals.values(), *(encoder.__defaults__ or ())]
    attributes = [getattr(x, "__dict__", {}) for x in held if not isinstance(x, nn.Module)]
    reached = [*held, *(x for names in attributes for x in names.values())]
    return [x for x in reached if isinstance(x, nn.Module)]


def _may_wait(module: DistributedDataParallel) -> bool:
    """Not in the first backward pass of a static graph, which cannot do without reduction."""
    return not module.static_graph or module._static_graph_delay_allreduce_enqueued


def _check_processes(sides: list[_Side]) -> None:
    """Raises, on all processes, unless they call each DistributedDataParallel module equally often.

    Its broadcasts of buffers, and SyncBatchNorm within it, would otherwise wait for each other.
    """
    groups: dict[Any, tuple[torch.device, dict[_Side, None]]] = {}
    for side in sides:
        for module in side.parallel:
            groups.setdefault(module.process_group, (module.device, {}))[1][side] = None
    for group, (device, users) in groups.items():
        if dist.get_world_size(group) == 1:
            continue
        counts = torch.tensor([len(side.chunks) for side in users], device=device)
        both = torch.stack((counts, -counts))
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
        for side, high, low in zip(users, *both.tolist(), strict=True):
            if high != -low:
                raise ValueError(
                    f"inputs[{side.index}]: expected as many chunks on all processes of a "
                    f"DistributedDataParallel module, got from {-low} to {high}"
                )


def _checked_loss(value: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"loss: expected it to return a 0-d tensor, got {type(value).__name__}")
    if value.dim() != 0:
        raise ValueError(f"loss: expected it to return a 0-d tensor, got {list(value.shape)}")
    if not value.requires_grad:
        raise ValueError("loss: expected one that depends on something that requires grad, got none")
    return value


class _RandomState:
    """Of the default generators of the CPU and of `devices`, as they are now."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        others = [d for d in devices if d.type not in ("cpu", "meta")]
        self.others = [(d, torch.get_device_module(d).get_rng_state(d)) for d in others]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.others:
            torch.get_device_module(device).set_rng_state(state, device)


class _Buffers:
    """Buffers of modules as they are now."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self.slots = [(m._buffers, name, b) for m in modules for name, b in m._buffers.items()]
        self.buffers = [
            b for b in dict.fromkeys(b for _, _, b in self.slots) if b is not None and _writable(b)
        ]
        self.values = [b.detach().clone() for b in self.buffers]

    @torch.no_grad()
    def restore(self) -> None:
        for slots, name, buffer in self.slots:
            slots[name] = buffer
        # Graphs of the caller, which may have saved a buffer, find it as it was.
        if self.buffers:
            with torch.autograd._unsafe_preserve_version_counter(tuple(self.buffers)):
                torch._foreach_copy_(self.buffers, self.values)


def _writable(x: Tensor) -> bool:
    """Not where an encoder's writing would raise: tensors of inference mode, rows that are one in memory."""
    overlaps = x.layout is torch.strided and any(
        s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True)
    )
    return not x.is_inference() and not overlaps


@contextmanager
def _no_autocast(devices: Iterable[torch.device]) -> Iterator[None]:
    """Backward passes take the dtypes of their forward pass."""
    with ExitStack() as stack:
        for kind in {"cpu", *(d.type for d in devices)}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
