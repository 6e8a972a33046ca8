import os
import site
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import sslfast
from sslfast import _C


def pytest_configure() -> None:
    """The package under test is this checkout's or an installed one, not a stray copy on sys.path."""
    package = Path(sslfast.__file__).resolve().parent
    checkout = Path(__file__).resolve().parents[1] / "sslfast"
    installed = [Path(p).resolve() for p in (*site.getsitepackages(), site.getusersitepackages())]
    expected = os.environ.get(
        "SSLFAST_EXPECT_IN"
    )  # a folder: a build that is neither, and no other, is meant
    if expected:
        if Path(expected).resolve() not in package.parents:
            raise pytest.UsageError(f"sslfast comes from {package}, not from {expected}")
    elif package != checkout and package.parent not in installed:
        raise pytest.UsageError(f"sslfast comes from {package}, neither {checkout} nor an installed package")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set of this CPU; the kernels read the variable at each call."""
    monkeypatch.setenv("SSLFAST_CPU_ISA", request.param)
    assert _C.cpu_isa() == request.param
    return request.param


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
