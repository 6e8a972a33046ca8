"""How the processes of a call find each other: with the same arguments, or with the same error."""

import functools
import inspect
import threading
import weakref
import zlib
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sslfast.distributed._ranks import ALONE, Ranks, all_gather, world
from sslfast.ops._check import check_choice, may_read

P = ParamSpec("P")
R = TypeVar("R")

STRATEGIES = ("auto", "gather", "ring")
SCALINGS = ("ddp", "sum")
GATHER_BYTES = 256 << 20
"""Of the gathered rows of a call's first argument, up to which "auto" gathers: each of a ring's stages costs
the host a fraction of a millisecond, which so few numbers do not repay."""

Group = dist.ProcessGroup | Literal["world"] | None

_thread = threading.local()


class NonFiniteError(ValueError):
    """A process brought NaN or infinity into a loss of all."""


KINDS = (NonFiniteError, TypeError, ValueError)
_host_groups: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def collective(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function of `group` that calls `join` once it has looked at its arguments.

    `join` compares what was passed, and an error that one process raises before it is raised by all.
    """
    signature = inspect.signature(function)
    default = signature.parameters["group"].default

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        group = options.get("group", default)
        if group == "world":
            options["group"] = group = world()
        if not isinstance(group, dist.ProcessGroup) or dist.get_world_size(group) < 2:
            return function(*args, **options)
        _thread.joined = False
        try:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            _thread.call = function.__qualname__, bound.arguments
            return function(*args, **options)
        except (TypeError, ValueError) as error:
            if not _thread.joined:
                _thread.joined = True  # also for a call that this one is made within
                _agree(group, (0, 0), {}, error)
            raise
        finally:
            _thread.call = None

    return call


def across(group: Group, strategy: str, scaling: str) -> dict[str, Any]:
    """These arguments of a loss as a module keeps them, checked."""
    check_choice("strategy", strategy, STRATEGIES)
    check_choice("scaling", scaling, SCALINGS)
    if not (group is None or group == "world" or isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"group: expected a torch.distributed.ProcessGroup, 'world' or None, got {type(group).__name__}"
        )
    if group is not None and group is dist.group.WORLD:
        group = "world"  # which can be copied and pickled
    return {"group": group, "strategy": strategy, "scaling": scaling}


def join(
    group: Group,
    strategy: str,
    scaling: str,
    name: str,
    rows: int,
    others: int = 0,
    features: Sequence[Tensor] | None = None,
) -> Ranks:
    """The processes of a call, once they have agreed that it is the same call.

    Args:
        group: None: this process alone.
        name, rows: the argument whose rows, at least one, are this process's images, and how many they are.
        others: rows of a second argument.
        features: the first argument as tensors [rows, ...], where it is not of that shape.

    Raises:
        TypeError, ValueError: on every process alike, where dtypes, dimensions but the first, whether
            gradients are asked for, or options differ between processes, and where an argument whose numbers
            may be read is not finite; the message names the argument and the process.
    """
    across(group, strategy, scaling)
    return ALONE if group is None else _join(group, strategy, scaling, name, rows, others, features)


@torch._disable_dynamo
def _join(group, strategy, scaling, name, rows, others, features) -> Ranks:
    if dist.get_rank(group) < 0:
        raise ValueError("group: expected one that this process belongs to")
    if dist.get_world_size(group) == 1:
        return ALONE
    function, arguments = _thread.call
    given = {key: value for key, value in arguments.items() if key != "group"}
    given |= {} if features is None else {name: list(features)}
    device = _tensors(given[name])[0].device
    if device.type == "cuda" and group._get_backend(device).name() == "gloo":
        raise ValueError(f"group: expected one of NCCL for tensors on {device}, got Gloo's")
    error: Exception | None = None
    broken = [key for key, value in given.items() if not all(map(_finite, _tensors(value)))]
    if broken:
        error = NonFiniteError(f"{broken[0]}: expected finite numbers, got some that are not")
    elif not rows:
        error = ValueError(f"{name}: expected at least one row on every process, got none")
    described = {"function": function, **{key: _described(value) for key, value in given.items()}}
    if torch.is_autocast_enabled(device.type):
        described["autocast"] = str(torch.get_autocast_dtype(device.type))
    _thread.joined = True
    counts = _agree(group, (rows, others), described, error)
    size = sum(x.numel() * x.element_size() for x in _tensors(given[name])) // rows
    gathered = sum(n for n, _ in counts) * size
    ring = strategy == "ring" or (strategy == "auto" and gathered > GATHER_BYTES)
    return Ranks(group, [n for n, _ in counts], [n for _, n in counts], ring, scaling)


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in (value if isinstance(value, list | tuple) else (value,)) if isinstance(x, Tensor)]


def _finite(x: Tensor) -> bool:
    return not (x.is_floating_point() and may_read(x)) or bool(x.isfinite().all())


def _described(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_described, value))
    if not isinstance(value, Tensor):
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        return str(float(value) if is_number else value)
    shape = ", ".join(["*", *map(str, value.shape[1:])][: value.dim()])
    gradient = " with a gradient" if value.requires_grad and torch.is_grad_enabled() else ""
    return f"{str(value.dtype).removeprefix('torch.')} [{shape}]{gradient}"


def _agree(
    group: dist.ProcessGroup, counts: tuple[int, int], described: dict[str, str], error: Exception | None
) -> list[tuple[int, int]]:
    """The counts of all processes, whose descriptions are the same. Host to host: no device is waited for.

    Raises:
        TypeError, ValueError: the error of the first process that has one, or what they differ in; on all.
    """
    host, size, rank = _host_group(group), dist.get_world_size(group), dist.get_rank(group)
    checksum = zlib.crc32(repr(sorted(described.items())).encode())
    own = torch.tensor([rank, error is not None, checksum, *counts])
    every = own.new_empty(size * 5)
    all_gather(every, own, group=host)
    table = sorted(every.view(size, 5).tolist())  # the host's group may have another order
    if not any(failed for _, failed, *_ in table) and len({check for _, _, check, *_ in table}) == 1:
        return [(n, m) for *_, n, m in table]
    reports: list[Any] = [None] * size
    kind = next((k for k in KINDS if isinstance(error, k)), None)
    dist.all_gather_object(reports, (dist.get_rank(), kind, str(error), described), group=host)
    reports.sort(key=lambda report: report[0])
    for rank, kind, message, _ in reports:
        if kind is not None:
            raise kind(f"{message} (on rank {rank})") from error
    lowest, *_, first = reports[0]
    for rank, *_, other in reports:
        for key in (*first, *other):
            if first.get(key) != other.get(key):
                raise ValueError(
                    f"{key}: expected the same on every process, got {first.get(key)} on rank {lowest} and "
                    f"{other.get(key)} on rank {rank}"
                )
    raise AssertionError("checksums differ, descriptions do not")


def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group itself where it can send what is in the CPU's memory, otherwise one beside it that can."""
    try:
        group._get_backend(torch.device("cpu"))
        return group
    except RuntimeError:
        if group not in _host_groups:
            ranks = dist.get_process_group_ranks(group)
            options = getattr(group._get_backend(torch.device("cuda")), "options", None)
            timeout = getattr(options, "_timeout", None)
            _host_groups[group] = dist.new_group(
                ranks, timeout=timeout, backend="gloo", use_local_synchronization=True
            )
        return _host_groups[group]
