"""ema_update_: t <- m t + (1 - m) s for whole lists of tensors in place, reading both once and writing one.

Sums are float32, or float64 where either side is. Kernels see addresses only: a Plan checks the tensors and
turns them into tables, which are kept for as long as the same tensors have the same memory.
"""

import contextlib
import struct
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sslfast import _C
from sslfast.kernels import tuning
from sslfast.ops import _backend
from sslfast.ops._check import FLOATS, SCALAR, check_tensor, may_read, number
from sslfast.ops._library import define


def reference(targets: list[Tensor], sources: list[Tensor], momentum: Tensor | float) -> None:
    """Plain PyTorch: specification, test truth and benchmark baseline."""
    with torch.no_grad():
        for t, s in zip(targets, sources, strict=True):
            work = torch.promote_types(torch.promote_types(t.dtype, s.dtype), torch.float32)
            take = 1 - momentum
            if isinstance(momentum, Tensor):
                take = (1 - momentum.double()).to(t.device, work)
            t.copy_(torch.lerp(t.to(work), s.to(work), take))


@dataclass(frozen=True)
class Table:
    """Pairs of one device and one pair of dtypes, in rows (target, source, elements): int64 [segments, 3]."""

    rows: Tensor
    pairs: list[int]
    target: torch.dtype
    source: torch.dtype
    device: torch.device
    copied: torch.cuda.Event | None

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Makes the device the current one, and its stream wait for the rows if they are still on the way."""
        if self.copied is None:
            yield
            return
        with torch.cuda.device(self.device):
            if torch.cuda.is_current_stream_capturing():
                _captured.append(self.rows)  # the graph will read it whenever it is replayed
            else:
                stream = torch.cuda.current_stream()
                stream.wait_event(self.copied)
                self.rows.record_stream(stream)
            yield

    def address(self) -> int:
        return _backend.pointer("table", self.rows, torch.int64, tuple(self.rows.shape), self.device)


_captured: list[Tensor] = []


class Plan:
    """Checked pairs of tensors: tables for the kernels, and the numbers of those that only PyTorch can serve.

    Args:
        targets, sources: the pairs. They are not kept.
        names: one for each pair, for errors.

    Raises:
        TypeError, ValueError: a pair that cannot be averaged, targets that share memory with another target
        or with a source.
        RuntimeError: a CUDA graph is being captured.
    """

    def __init__(self, targets: list[Tensor], sources: list[Tensor], names: Callable[[int], str]) -> None:
        self.others: list[int] = []
        groups: dict[tuple, list[int]] = {}
        for i, (t, s) in enumerate(zip(targets, sources, strict=True)):
            _check_pair(t, s, names(i))
            if not addressable(t, s):
                self.others.append(i)
            elif t.numel():
                groups.setdefault((t.device, t.dtype, s.dtype), []).append(i)
        _check_disjoint(targets, sources, [i for pairs in groups.values() for i in pairs], names)
        self.tables = [_table(targets, sources, pairs) for pairs in groups.values()]

    def run(self, targets: list[Tensor], sources: list[Tensor], momentum: Tensor | float) -> None:
        """Updates the tensors that the plan was made of."""
        others = self.others
        if isinstance(momentum, Tensor) and momentum.device.type != "cpu":
            for device in {table.device for table in self.tables}:
                if momentum.device != device:
                    raise ValueError(f"momentum: expected device {device}, got {momentum.device}")
        for table in self.tables:
            backend = _backend.resolve("ema_update_", table.device, table.target)
            if backend == "reference":
                others = others + table.pairs
                continue
            with table.ready():
                _backend.implementation("ema_update_", backend).forward(table, momentum)
        if others:
            reference([targets[i] for i in others], [sources[i] for i in others], momentum)


def _check_pair(t: Tensor, s: Tensor, name: str) -> None:
    check_tensor(f"targets{name}", t, FLOATS, tuple(t.shape) if isinstance(t, Tensor) else ())
    check_tensor(f"sources{name}", s, FLOATS, tuple(t.shape), t)
    if torch._debug_has_internal_overlap(t) == 1:
        raise ValueError(f"targets{name}: expected elements with memory of their own, got an expanded tensor")
    if s is t or (s._is_view() and t._is_view() and s._base is t._base and s.data_ptr() == t.data_ptr()):
        raise ValueError(f"sources{name}: expected memory of its own, got the target's")


def addressable(t: Tensor, s: Tensor) -> bool:
    """Whether element k of one's memory belongs to element k of the other's, and both are plain memory."""
    if any(is_traceable_wrapper_subclass(x) or x.is_neg() or x._is_zerotensor() for x in (t, s)):
        return False
    if t.is_contiguous() and s.is_contiguous():
        return True
    return t.stride() == s.stride() and _dense(t)


def _dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gaps, in any order."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _check_disjoint(
    targets: list[Tensor], sources: list[Tensor], pairs: list[int], names: Callable[[int], str]
) -> None:
    """A target's memory is written to by one thread and read by no other."""
    extents = []
    for i in pairs:
        for target, x in ((True, targets[i]), (False, sources[i])):
            begin = _backend.address(f"{'targets' if target else 'sources'}{names(i)}", x)
            extents.append((begin, begin + x.numel() * x.element_size(), target, i))
    past_any = past_target = (0, 0)
    for begin, end, target, i in sorted(extents):
        before, other = past_any if target else past_target
        if begin < before:
            sides = [f"{'target' if target else 'source'}s{names(i)}", f"targets{names(other)}"]
            if target:
                sides = [f"targets{names(i)}", f"another tensor, of pair {names(other)}"]
            raise ValueError(f"{sides[0]}: expected memory of its own, got some of {sides[1]}")
        past_any = max(past_any, (end, i))
        past_target = max(past_target, (end, i)) if target else past_target


def _table(targets: list[Tensor], sources: list[Tensor], pairs: list[int]) -> Table:
    t, s = [targets[i] for i in pairs], [sources[i] for i in pairs]
    device, piece, rows = t[0].device, tuning.EMA_SEGMENT, []
    for x, y in zip(t, s, strict=True):
        to, at = _backend.address("targets", x), _backend.address("sources", y)
        for first in range(0, x.numel(), piece):
            count = min(piece, x.numel() - first)
            rows.append((to + first * x.element_size(), at + first * y.element_size(), count))
    table, copied = torch.tensor(rows, dtype=torch.int64), None
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "ema_update_: expected tensors that it has seen before the capture of a CUDA graph: call "
                    "it once with the same ones first"
                )
            table = table.pin_memory().to(device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
    return Table(table, pairs, t[0].dtype, s[0].dtype, device, copied)


# Backends: table and momentum.


def _codes(table: Table) -> tuple[int, int]:
    return _backend.CODES[table.target], _backend.CODES[table.source]


def _cpu_update(table: Table, momentum: Tensor | float) -> None:
    _C.ema_update(
        table.address(), len(table.rows), *_codes(table), float(momentum), torch.get_num_threads()
    )  # fmt: skip


def _split(momentum: Tensor | float) -> tuple[float, Tensor | None]:
    """A number, or a 0-d tensor of float32 or float64 on the device: the host does not read it."""
    if isinstance(momentum, Tensor):
        if momentum.device.type != "cpu":
            return 0.0, momentum if momentum.dtype in (torch.float32, torch.float64) else momentum.float()
    return float(momentum), None


def _triton_update(table: Table, momentum: Tensor | float) -> None:
    from sslfast.kernels import ema

    number, tensor = _split(momentum)
    (bits,) = struct.unpack("<q", struct.pack("<d", number))
    ema.launch(table.rows, table.target, table.source, bits, tensor)


def _cuda_update(table: Table, momentum: Tensor | float) -> None:
    number, tensor = _split(momentum)
    at = 0 if tensor is None else _backend.pointer("momentum", tensor, tensor.dtype, (), table.device)
    _C.ema_update_cuda(
        table.address(), len(table.rows), *_codes(table), number, at,
        tensor is not None and tensor.dtype == torch.float32,
        torch.cuda.current_stream(table.device).cuda_stream,
    )  # fmt: skip


def _triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return _backend.triton_refuses(device)


def _cuda_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return _backend.cuda_refuses(device, "ema_update_cuda")


for _name, _update, _refuses in (
    ("cpu", _cpu_update, _backend.cpu_refuses),
    ("triton", _triton_update, _triton_refuses),
    ("cuda", _cuda_update, _cuda_refuses),
):
    _backend.register("ema_update_", _name, _backend.Backend(_update, None, _refuses))


# Plans of earlier calls, by the ids of their tensors: one goes as soon as one of its tensors does.


@dataclass
class _Kept:
    plan: Plan
    described: Any
    watch: list[weakref.ref]


_kept: dict[tuple[int, int, int], _Kept] = {}


def _plan(targets: list[Tensor], sources: list[Tensor]) -> Plan:
    key, both = (id(targets[0]), id(sources[0]), len(targets)), targets + sources
    kept = _kept.get(key)
    if kept is not None and _backend.unchanged(both, kept.described):
        return kept.plan
    plan = Plan(targets, sources, lambda i: f"[{i}]")
    described = _backend.describe(both)
    if described is not None:

        def forget(_: weakref.ref) -> None:
            _kept.pop(key, None)

        _kept[key] = _Kept(plan, described, [weakref.ref(x, forget) for x in both])
    return plan


def _run(targets: list[Tensor], sources: list[Tensor], number: float, momentum: Tensor | None) -> None:
    _plan(targets, sources).run(targets, sources, number if momentum is None else momentum)
    changed(targets)


def changed(targets: list[Tensor]) -> None:
    """Tells autograd, which would otherwise use new numbers where it saved old ones."""
    with contextlib.suppress(RuntimeError):  # tensors of inference mode have no version
        torch.autograd.graph.increment_version(targets)


_op = define(
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, float number, Tensor? momentum) -> ()",
    _run,
    lambda targets, sources, number, momentum: None,
)


def ema_update_(targets: Iterable[Tensor], sources: Iterable[Tensor], momentum: Tensor | float) -> None:
    """Exponential moving average of whole lists of tensors, in place: t <- momentum t + (1 - momentum) s.

    One pass over the memory and no read by the host; on a GPU one launch for each pair of dtypes. Sums are
    float32, or float64 where either side is. Autograd records nothing, as under torch.no_grad. Non-contiguous
    tensors are as fast where both sides are dense and laid out alike; others go through PyTorch. Which memory
    is meant is looked up again only when a tensor or its address is another one than in an earlier call; to
    capture a CUDA graph, call it once before with the same tensors.

    A bfloat16 target loses every step below a 256th of its value (float16: a 2048th): with a momentum near 1
    keep targets in float32; their sources may have any dtype.

    Args:
        targets: float32, bfloat16, float16 or float64 tensors, none of which shares memory with another
            target or a source.
        sources: as many, of the same shapes and devices, each of any of these dtypes.
        momentum: number or 0-d tensor in [0, 1]. A tensor on the device is read when the kernel runs, so that
            a captured graph sees it change and torch.compile, for which a number is a constant, does not
            compile anew; float64 keeps 1 - momentum exact.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, or shared memory;
            the message names the argument and, in a list, the position.
    """
    targets, sources = _listed("targets", targets), _listed("sources", sources)
    if len(targets) != len(sources):
        raise ValueError(f"sources: expected {len(targets)} tensors, as many as targets, got {len(sources)}")
    check_momentum("momentum", momentum)
    if not targets:
        return
    if isinstance(momentum, Tensor):
        _op(targets, sources, 0.0, momentum.detach())
    else:
        _op(targets, sources, float(momentum), None)


def check_momentum(name: str, momentum: Tensor | float) -> None:
    """A number or 0-d tensor in [0, 1]; a GPU's is looked at under SSLFAST_CHECK=1 only."""
    if isinstance(momentum, Tensor):
        if momentum.dim() != 0 or not momentum.is_floating_point():
            raise ValueError(
                f"{name}: expected a number or a 0-d floating-point tensor, "
                f"got {momentum.dtype} {list(momentum.shape)}"
            )
        if not may_read(momentum):
            return
        momentum = float(momentum.detach())
    if not 0 <= number(name, momentum, SCALAR) <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {momentum}")


def _listed(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        raise TypeError(f"{name}: expected a list of tensors, got {type(tensors).__name__}")
    return list(tensors)
