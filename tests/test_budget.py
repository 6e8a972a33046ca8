"""Where the time of training goes."""

import time

import pytest
import torch

from sslfast.train import budget as module
from sslfast.train.budget import PHASES, Budget, phase, running


class Clock:
    """Host and device, each with a time of its own: the device does what it was given later."""

    def __init__(self, monkeypatch) -> None:
        self.host, self.queue, self.device, self.made = 0.0, [], 0.0, 0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(torch.cuda, "Event", self._event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)

    def _event(self, enable_timing):
        assert enable_timing
        self.made += 1
        return Event(self)

    def work(self, seconds: float) -> None:
        """Takes the host no time."""
        self.queue.append(seconds)

    def catch_up(self) -> None:
        for item in self.queue:
            if isinstance(item, Event):
                item.at = max(self.device, item.given)
            else:
                self.device += item
            self.device = item.at if isinstance(item, Event) else self.device
        self.queue.clear()


class Event:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.at = clock, None

    def record(self, stream) -> None:
        assert stream.type == "cuda"
        self.at, self.given = None, self.clock.host
        self.clock.queue.append(self)

    def query(self) -> bool:
        return self.at is not None

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


def spend(clock: Clock, seconds: float) -> None:
    clock.host += seconds


def test_phases_on_the_host(monkeypatch):
    clock = Clock(monkeypatch)
    budget = Budget(torch.device("cpu"))
    with running(budget):
        spend(clock, 1)
        with phase("forward"):
            spend(clock, 2)
            with phase("loss"):
                spend(clock, 4)
            spend(clock, 8)
        with pytest.raises(KeyError), phase("data"):
            spend(clock, 16)
            raise KeyError
        spend(clock, 32)
        found = budget.shares()
    expected = {"other": 33, "forward": 10, "loss": 4, "data": 16}
    assert found == {name: pytest.approx(expected.get(name, 0) / 63) for name in PHASES}
    later = Budget(torch.device("cpu"))
    spend(clock, 5)
    later.load_state_dict(budget.state_dict())
    assert later.seconds == {name: expected.get(name, 0) + 5 * (name == "other") for name in PHASES}
    with budget.phase(module.PAUSE):
        spend(clock, 100)
    spend(clock, 100)
    budget.restart()
    assert sum(budget.state_dict().values()) == 68
    budget.reset()
    assert set(budget.shares().values()) == {0}


def test_phases_on_a_gpu_are_of_its_own_clock(monkeypatch):
    """Its time while the host waits for data is the data's, even if the host had given it work before."""
    clock = Clock(monkeypatch)
    budget = Budget(torch.device("cuda"))
    for _ in range(1000):
        with budget.phase("data"):
            spend(clock, 3)
        with budget.phase("forward"):
            clock.work(1)
        with budget.phase("backward"):
            clock.work(1)
        clock.catch_up()
    found = budget.shares()
    assert found["forward"] == found["backward"] == pytest.approx(1 / 3, rel=1e-2)
    assert found["data"] == pytest.approx(1 / 3, rel=1e-2) and found["loss"] == 0
    assert clock.made < 2 * module.PENDING  # events are used again


def test_nothing_waits_for_a_gpu(monkeypatch):
    clock = Clock(monkeypatch)
    budget = Budget(torch.device("cuda"))
    for _ in range(10):
        with budget.phase("forward"):
            clock.work(1)
    assert set(budget.shares().values()) == {0}
    clock.catch_up()
    assert budget.shares()["forward"] == 1


def test_no_phase_outside_of_training_or_in_compiled_code():
    def step(x):
        with phase("loss"):
            return x * 2

    assert step(3) == 6
    budget = Budget(torch.device("cpu"))
    with running(budget):
        compiled = torch.compile(step, fullgraph=True, backend="eager")
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
        budget.shares()
        assert budget.seconds["loss"] == 0
        step(3)
    assert budget.seconds["loss"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_phases_on_a_gpu_add_up_and_nothing_waits_for_them():
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    budget, began = Budget(device), time.perf_counter()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with running(budget):
            for _ in range(100):
                with phase("forward"):
                    x = (x @ x).tanh_()
                    with phase("loss"):
                        for _ in range(3):
                            x = (x @ x).tanh_()
        given = time.perf_counter() - began
        budget.shares()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    whole = time.perf_counter() - began
    shares = budget.shares()
    assert sum(budget.seconds.values()) == pytest.approx(whole, rel=0.1)
    assert shares["loss"] == pytest.approx(3 * shares["forward"], rel=0.2) and shares["other"] < 0.05
    assert given < 0.8 * whole  # otherwise this shows nothing
