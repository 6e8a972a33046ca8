"""The processes of a run, which torchrun starts on one or several machines, and what they agree on.

They are those of torch.distributed's default group. A process alone sends nothing: each function here then
gives back what it was given. Messages between hosts are of CPU tensors, through Gloo, and wait for no device.
"""

import os
import pickle
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from sslfast.train import checkpoint

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, started this process."""
    return dist.is_available() and "RANK" in os.environ and "WORLD_SIZE" in os.environ


def on_machine() -> tuple[int, int]:
    """This process's number on its machine, and how many there are."""
    if not launched():
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def launcher() -> str:
    """What a command that starts these processes begins with."""
    here, whole = on_machine()[1], processes()
    if whole == 1:
        return ""
    machines = f"--nnodes {whole // here} " if whole > here else ""
    return f"torchrun {machines}--nproc-per-node {here} -m "


@contextmanager
def group(timeout_minutes: float) -> Iterator[None]:
    """The group of all processes that torchrun started, if it did: Gloo for the CPU, NCCL for GPUs.

    Args:
        timeout_minutes: how long one waits for another before it gives up.

    Raises:
        ConnectionError: another process did not come.
    """
    if not launched() or dist.is_initialized():
        yield
        return
    gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    if on_machine()[0] < gpus:
        torch.cuda.set_device(on_machine()[0])
    with watched():
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    yield  # an error leaves the group as it is: closing it may wait for processes that are gone
    dist.destroy_process_group()


@contextmanager
def watched(command: str = "") -> Iterator[None]:
    """Raises ConnectionError where another process is lost; command: how to go on then."""
    try:
        yield
    except RuntimeError as error:
        several = launched() or processes() > 1
        # Gloo's errors have no class of their own; their text begins with the place in its sources
        if not several or not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        reason = re.sub(r"^\[\S+\] ", "", str(error).strip().splitlines()[0]).split(". ")[0]
        told = f"; to go on: {command}" if command else ""
        raise ConnectionError(f"lost another process: {reason}{told}") from error


def say(error: BaseException, text: str) -> None:
    """The text on stderr: once of an error that all processes raise, otherwise with this one's number.

    Of an error of all of them nobody goes before the first has spoken, as torchrun ends it then.
    """
    raised_on = vars(error).get("process")
    number = rank() if raised_on is None else raised_on
    if raised_on is None or rank() == 0:
        who = f"sslfast (rank {number})" if number else "sslfast"
        print(f"{who}: {text}", file=sys.stderr, flush=True)
    if raised_on is not None:
        agreed(True)


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number; the first one, 0, speaks, writes and evaluates for all."""
    return dist.get_rank() if processes() > 1 else 0


@contextmanager
def together() -> Iterator[None]:
    """What is raised inside on any process is raised on all of them, which all come here.

    Inside nothing may wait for another process, unless all or none raise before it.
    """
    if processes() == 1:
        yield
        return
    error: BaseException | None = None
    try:
        yield
    except (Exception, KeyboardInterrupt) as raised:
        error = raised
    found: list[Any] = [None] * processes()
    dist.all_gather_object(found, None if error is None else _message(error))
    for number, other in enumerate(found):
        if other is not None:
            raise everywhere(error if error is not None and number == rank() else other, number)


def everywhere(error: E, number: int = 0) -> E:
    """The error, marked as one that all processes raise; it arose on the one of this number."""
    vars(error)["process"] = number
    return error


def _message(error: BaseException) -> BaseException:
    """The error, or one that says the same and can be sent."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # whatever the error's own classes raise
        return RuntimeError(f"{type(error).__name__}: {error}")


def agreed(*flags: bool) -> list[bool]:
    """Which of them are true on any process."""
    if processes() == 1:
        return list(flags)
    numbers = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.bool().tolist()


def summed(x: Tensor) -> Tensor:
    """Its sum over the processes, on the CPU."""
    x = x.detach().cpu()
    if processes() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def collected(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if processes() == 1:
        return [value]
    found: list[Any] = [None] * processes()
    dist.all_gather_object(found, value)
    return found


def first(value: T) -> T:
    """The value of the first process."""
    if processes() == 1:
        return value
    box = [value if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]  # that of the first process, which has one


def first_state(state: dict | None) -> dict | None:
    """The nested state of the first process, on the CPU; one tensor is sent at a time."""
    if processes() == 1:
        return state
    tensors: dict[str, Tensor] = {}
    tree = checkpoint.pack(state, tensors) if rank() == 0 else None
    tree, kinds = first((tree, {name: (x.shape, x.dtype) for name, x in tensors.items()}))
    for name, (shape, dtype) in kinds.items():
        if rank():
            tensors[name] = torch.empty(shape, dtype=dtype)
        if tensors[name].numel():
            dist.broadcast(tensors[name].view(-1).view(torch.uint8), src=0)
    return checkpoint.unpack(tree, tensors)


@torch.no_grad()
def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, which have as many each, in their order; without gradients."""
    if processes() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(processes())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
