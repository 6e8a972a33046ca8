import os
import signal
import site
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports a kernel
    os.environ.setdefault("TRITON_INTERPRET", "1")

import sslfast  # noqa: E402
from sslfast import _C  # noqa: E402


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


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """Two classes of 20 images: dark and light noise, so that even an untrained encoder separates them."""
    from PIL import Image

    for name, low in (("dark", 0), ("light", 150)):
        for i in range(20):
            pixels = np.random.default_rng(i).integers(low, low + 100, (16, 16, 3), dtype=np.uint8)
            path = tmp_path / "images" / name / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path / "images"


@pytest.fixture
def images(tmp_path):
    """48 noise images without labels, of which 39 are for training."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 12, 12), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    return f"npz:{tmp_path / 'images.npz'}"


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(after, number): that signal arrives within the update after `after` updates."""

    from sslfast.train import loop

    def arrange(after: int, number: int = signal.SIGINT) -> None:
        step, seen = loop.Update.step, []

        def counted(self):
            seen.append(None)
            if len(seen) == after:
                os.kill(os.getpid(), number)
            return step(self)

        monkeypatch.setattr(loop.Update, "step", counted)

    return arrange


@pytest.fixture
def plans(monkeypatch):
    """One entry for each table of EMA updates that is made."""
    from sslfast.ops import ema

    made, init = [], ema.Plan.__init__
    monkeypatch.setattr(ema.Plan, "__init__", lambda self, *args: made.append(1) or init(self, *args))
    return made
