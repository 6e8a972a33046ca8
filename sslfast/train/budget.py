"""Where the time of training goes, phase by phase, on the device's own clock."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

PHASES = ("data", "augment", "forward", "loss", "backward", "optimizer", "ema", "other")
"""Waiting for images; making views; networks; the loss, with what it does of the gradient already; the rest
of the gradient, and averaging it over processes; the update; the teacher's; all else."""

PAUSE = "pause"  # a phase that is not counted: what happens then is not training
PENDING = 256  # marks after which those that a GPU has passed are read


class Budget:
    """Seconds of each phase. Inside of one the loop, or a method, may begin another, whose time is not
    counted for the outer one.

    On a GPU a mark is an event of the current stream, and a phase has the time between its marks there,
    whether the GPU worked or waited; nothing waits for a mark. In compiled code there are no phases: a
    compiled step's loss is part of its forward pass.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._free: list[Any] = []  # events to use again
        self.reset()

    def reset(self) -> None:
        """Begins anew, outside of all phases."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._now = "other"
        self._marks: deque[tuple[Any, str]] = deque([(self._mark(), self._now)])  # each begins a phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self._now
        self._begin(name)
        try:
            yield
        finally:
            self._begin(before)

    def restart(self) -> None:
        """Goes on from now, with the seconds there are."""
        self._marks = deque([(self._mark(), self._now)])

    def shares(self) -> dict[str, float]:
        """Of all seconds so far, of each phase; those that a GPU has not passed yet are left out."""
        self._begin(self._now)
        self._read()
        whole = sum(self.seconds.values()) or 1.0
        return {name: seconds / whole for name, seconds in self.seconds.items()}

    def state_dict(self) -> dict[str, float]:
        self.shares()
        return dict(self.seconds)

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seconds.update(state)

    def _begin(self, name: str) -> None:
        self._now = name
        self._marks.append((self._mark(), name))
        if not self._on_gpu or len(self._marks) > PENDING:
            self._read()

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _read(self) -> None:
        """Adds up the phases whose end has passed."""
        while len(self._marks) > 1 and (not self._on_gpu or self._marks[1][0].query()):
            begin, name = self._marks.popleft()
            end = self._marks[0][0]
            if name != PAUSE:
                self.seconds[name] += begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
            if self._on_gpu:
                self._free.append(begin)


_running: Budget | None = None


@contextmanager
def running(budget: Budget) -> Iterator[None]:
    """Within it `phase` is the budget's."""
    global _running
    before, _running = _running, budget
    try:
        yield
    finally:
        _running = before


def phase(name: str) -> AbstractContextManager[None]:
    """A phase of the running budget; nothing where there is none, as in a method that is used alone."""
    if torch.compiler.is_compiling() or _running is None:
        return nullcontext()
    return _running.phase(name)
