"""EMATeacher: a copy of a model that follows it as an exponential moving average."""

import copy
import itertools
import math
import operator
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sslfast.ops import _backend
from sslfast.ops import ema as _ema
from sslfast.ops._check import FLOATS, number, traced

BUFFERS = ("copy", "ema", "keep")
ALIGNMENT = 128  # bytes between the starts of two parameters in a flat tensor: a GPU's cache line


def cosine_momentum(step: float, total: float, start: float = 0.996, end: float = 1.0) -> float:
    """From `start` to `end` on a half cosine: end - (end - start) (1 + cos(pi step / total)) / 2.

    BYOL (Grill et al. 2020), DINO (Caron et al. 2021) and MoCo v3 (Chen et al. 2021) share it; the first two
    count updates, MoCo v3 counts epochs with their fraction.

    Args:
        step, total: how far training is, and its length, in the same unit. Beyond `total` it stays at `end`.
        start, end: in [0, 1].

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.
    """
    if not number("total", total) > 0:
        raise ValueError(f"total: expected a positive number, got {total}")
    for name, value in (("start", start), ("end", end)):
        if not 0 <= number(name, value) <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    part = min(max(number("step", step) / total, 0.0), 1.0)
    return end - (end - start) * (1 + math.cos(math.pi * part)) / 2


class EMATeacher(nn.Module):
    """A copy of a model, without gradients, that follows it: t <- momentum t + (1 - momentum) s.

    The copy's parameters lie in one flat tensor per dtype. An update is one pass over the memory (on a GPU
    one launch for each pair of dtypes), runs no Python per tensor and reads nothing on the host; it looks
    anew at the models where a module, a parameter or its memory was replaced. To capture updates in a CUDA
    graph, update once before.

    Args:
        model: what to copy and to follow. Wrappers of DistributedDataParallel, DataParallel and torch.compile
            are taken off, here and in `update`.
        momentum: number or 0-d tensor in [0, 1]; what `update` uses when it is given none.
        buffers: what `update` does with buffers, such as BatchNorm's statistics: "copy" the model's, average
            them like parameters ("ema"; copied where they are not floating-point), or "keep" the teacher's
            own, which change when it is called in training mode.

    Attributes:
        model: the copy, in the mode (training or evaluation) that the model was in. Calling the teacher calls
            it under torch.no_grad.

    Raises:
        TypeError, ValueError: a model that cannot be copied or averaged, or an invalid argument; the message
            names the parameter or argument.
    """

    def __init__(self, model: nn.Module, momentum: Tensor | float = 0.996, buffers: str = "copy") -> None:
        super().__init__()
        if buffers not in BUFFERS:
            raise ValueError(f"buffers: expected one of {', '.join(BUFFERS)}, got {buffers!r}")
        _ema.check_momentum("momentum", momentum)
        self.momentum, self.buffers_mode = momentum, buffers
        student = unwrap(model)
        for name, p in student.named_parameters():
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise ValueError(f"model: expected parameters with a shape, got none yet for {name!r}")
            if (p.is_floating_point() or p.is_complex()) and p.dtype not in FLOATS:
                raise TypeError(
                    f"model: expected {' or '.join(map(str, FLOATS))}, got {p.dtype} for {name!r}"
                )
        try:
            self.model = copy.deepcopy(student)
        except RuntimeError as error:
            raise ValueError(
                f"model: expected one that copy.deepcopy copies (with parametrizations.weight_norm instead "
                f"of torch.nn.utils.weight_norm), got: {error}"
            ) from error
        for p in self.model.parameters():
            p.requires_grad_(False).grad = None
        self._link: _Link | None = None
        self._flats: list[Tensor] = []
        self._apart: list[Tensor] = []  # parameters with a version of their own
        self._flatten()

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def update(self, model: nn.Module, momentum: Tensor | float | None = None) -> None:
        """Moves the teacher towards `model`.

        Args:
            model: the model that was copied, or one with parameters and buffers of the same names and shapes,
                wrapped or not.
            momentum: number or 0-d tensor in [0, 1]; None: the teacher's own.

        Raises:
            TypeError, ValueError: an invalid momentum, another structure, or memory that both models share;
                the message names the argument or the parameter.
        """
        momentum = self.momentum if momentum is None else momentum
        _ema.check_momentum("momentum", momentum)
        momentum = momentum.detach() if isinstance(momentum, Tensor) else momentum
        link = self._link
        if traced():
            return self._update_traced(unwrap(model), momentum)
        if link is None or not link.holds(self.model, model):
            ours, student = unwrap(self.model), unwrap(model)
            _check_alike(ours, student)
            _check_memory(ours, student)
            if not _backend.unchanged(list(ours.parameters()), self._described):
                self._flatten()
            self._link = link = _Link(self.model, model, self.buffers_mode)
        link.plan.run(link.targets, link.sources, momentum)
        if link.copies[0]:
            torch._foreach_copy_(*link.copies)
        _ema.changed([*self._flats, *self._apart, *link.separate])

    def _update_traced(self, student: nn.Module, momentum: Tensor | float) -> None:
        """Of tensors that may have no memory."""
        _check_alike(unwrap(self.model), student)
        averaged, copied = _pairs(unwrap(self.model), student, self.buffers_mode)
        _ema.ema_update_([t for _, t, _ in averaged], [s for _, _, s in averaged], momentum)
        for _, t, s in copied:
            t.copy_(s)

    @torch.no_grad()
    def _flatten(self) -> None:
        """Moves the copy's parameters into one tensor per dtype, each with the strides that it had.

        As views of it they share its version, which one call can raise. Parameters of other classes stay.
        """
        by_kind: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
        for p in self.model.parameters():
            if type(p) is nn.Parameter and p.dtype in FLOATS and _ema.addressable(p, p):
                by_kind.setdefault((p.device, p.dtype), []).append(p)
        self._link, self._flats, self._apart = None, [], []
        for (device, dtype), parameters in by_kind.items():
            step = ALIGNMENT // dtype.itemsize
            starts = list(itertools.accumulate((-(-p.numel() // step) * step for p in parameters), initial=0))
            flat = torch.zeros(starts[-1], dtype=dtype, device=device)
            for p, start in zip(parameters, starts, strict=False):
                view = nn.Parameter(flat.as_strided(p.shape, p.stride(), start), requires_grad=False)
                view.copy_(p)
                view.__dict__.update(p.__dict__)
                try:
                    torch.utils.swap_tensors(p, view)  # p stays the object that the model holds
                except RuntimeError:  # something else, such as a graph, holds what would be swapped
                    p.data = view.detach()
                    self._apart.append(p)
            self._flats.append(flat)
        self._described = None if traced() else _backend.describe(list(unwrap(self.model).parameters()))

    def _apply(self, fn: Any, recurse: bool = True) -> "EMATeacher":
        super()._apply(fn, recurse)  # gives each parameter memory of its own
        self._flatten()
        return self

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_link": None}

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, buffers={self.buffers_mode!r}"


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of wrappers of DistributedDataParallel, DataParallel and torch.compile."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    parallel = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    inner = model.module if parallel else getattr(model, "_orig_mod", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def _check_alike(teacher: nn.Module, student: nn.Module) -> None:
    """Raises unless both have parameters and buffers of the same names and shapes."""
    for kind in ("parameter", "buffer"):
        ours, theirs = (dict(getattr(m, f"named_{kind}s")()) for m in (teacher, student))
        for name in [*theirs, *ours]:
            if name not in ours or name not in theirs:
                where = "teacher" if name not in ours else "model"
                raise ValueError(f"model: expected the teacher's {kind}s, but the {where} has no {name!r}")
            if ours[name].shape != theirs[name].shape:
                raise ValueError(
                    f"model: expected shape {list(ours[name].shape)} of {kind} {name!r}, "
                    f"got {list(theirs[name].shape)}"
                )


def _check_memory(teacher: nn.Module, student: nn.Module) -> None:
    """Raises unless each has memory of its own: a teacher that is the model itself lets the loss collapse."""
    memory = {_memory(x) for x in (*teacher.parameters(), *teacher.buffers())} - {0}
    for kind in ("parameter", "buffer"):
        for name, x in getattr(student, f"named_{kind}s")():
            if _memory(x) in memory:
                raise ValueError(
                    f"model: expected memory of its own, got {kind} {name!r} in the teacher's memory"
                )


def _memory(x: Tensor) -> int:
    return 0 if is_traceable_wrapper_subclass(x) else x.untyped_storage().data_ptr()


Pair = tuple[str, Tensor, Tensor]


def _pairs(teacher: nn.Module, student: nn.Module, buffers: str) -> tuple[list[Pair], list[Pair]]:
    """(name, teacher's, student's) of the tensors that are averaged, and of those that are copied."""
    theirs: dict[str, Tensor] = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    ours: list[tuple[str, Tensor]] = list(teacher.named_parameters())
    if buffers != "keep":
        ours += teacher.named_buffers()
    averaged: list[Pair] = []
    copied: list[Pair] = []
    for name, t in ours:
        follows = t.is_floating_point() and (buffers == "ema" or isinstance(t, nn.Parameter))
        (averaged if follows else copied).append((name, t, theirs[name]))
    return averaged, copied


class _Link:
    """A teacher and a model, pair by pair, for as long as nothing in either is replaced or moves.

    Args:
        ours, given: the teacher's model and what `update` was given; either may be wrapped.
    """

    def __init__(self, ours: nn.Module, given: nn.Module, buffers: str) -> None:
        teacher, student = unwrap(ours), unwrap(given)
        averaged, copied = _pairs(teacher, student, buffers)
        self.targets, self.sources = [t for _, t, _ in averaged], [s for _, _, s in averaged]
        self.copies = [t for _, t, _ in copied], [s for _, _, s in copied]
        self.plan = _ema.Plan(self.targets, self.sources, lambda i: f" {averaged[i][0]!r}")
        self.separate = [t for t in self.targets if type(t) is not nn.Parameter]
        self.models = weakref.ref(ours), weakref.ref(given)
        buffers_too = buffers != "keep"
        self.ours, self.theirs = _Slots(teacher, buffers_too), _Slots(student, buffers_too)
        self.described = _backend.describe(self.theirs.tensors)
        # The model is described at each update; of the teacher, whose objects are watched, a part in turns.
        tensors = [x for x in self.ours.tensors if x is not None]
        turns = max(1, min(16, len(tensors)))
        self.parts = [(tensors[k::turns], _backend.describe(tensors[k::turns])) for k in range(turns)]
        self.turn = 0

    def holds(self, ours: nn.Module, given: nn.Module) -> bool:
        """At the speed of C: a model may have thousands of parameters."""
        self.turn = (self.turn + 1) % len(self.parts)
        return (
            self.models[0]() is ours
            and self.models[1]() is given
            and self.ours.same_modules()
            and self.theirs.same_modules()
            and sum(map(len, self.theirs.dicts)) == self.theirs.count
            and all(map(operator.is_, self.ours.found(), self.ours.tensors))
            and _backend.unchanged(self.theirs.found(), self.described)
            and _backend.unchanged(*self.parts[self.turn])
        )


class _Slots:
    """Where a model keeps its modules, parameters and buffers: dicts."""

    def __init__(self, model: nn.Module, buffers: bool) -> None:
        modules = list(model.modules())
        kinds = ("_parameters", "_buffers") if buffers else ("_parameters",)
        tensors: list[dict] = [getattr(m, kind) for m in modules for kind in kinds]
        self.dicts = [*(m._modules for m in modules), *tensors]
        self.count = sum(map(len, self.dicts))
        self.of_modules, self.of_tensors = (
            [m._modules for m in modules if m._modules],
            list(filter(None, tensors)),
        )
        self.modules, self.tensors = list(_values(self.of_modules)), self.found()

    def same_modules(self) -> bool:
        return all(map(operator.is_, _values(self.of_modules), self.modules))

    def found(self) -> list[Tensor | None]:
        return list(_values(self.of_tensors))


def _values(dicts: list[dict]) -> Iterator:
    return itertools.chain.from_iterable(map(dict.values, dicts))
