"""Helpers for Triton's interpreter: marks, the order of a grid, buffers with guards around them."""

import contextlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from sslfast.kernels import tuning
from torch import Tensor

from sslfast.ops import _backend

REASON = _backend.why_not("similarity_lse", "triton", "cpu", torch.float32)
INTERPRETED = [
    pytest.mark.interpreted,
    pytest.mark.skipif(REASON is not None, reason=f"no interpreter: {REASON}"),
]


def interpreted(test: Callable) -> Callable:
    """Marks one test, where a module's others need no interpreter."""
    for mark in INTERPRETED:
        test = mark(test)
    return test


def larger_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tiles for the interpreter, which takes milliseconds for each."""
    monkeypatch.setattr(tuning, "EPILOGUE", tuning.Tile(256, 512, 4, 1))
    monkeypatch.setattr(tuning, "default_tile", lambda *args: tuning.Tile(128, 128, 4, 1))


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched from now on."""
    from triton.runtime import interpreter

    names: list[str] = []
    run = interpreter.GridExecutor.__call__

    def record(self, *args, **options):
        names.append(self.fn.__name__)
        return run(self, *args, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", record)
    return names


@contextlib.contextmanager
def grid_order(reverse: bool) -> Iterator[None]:
    """Programs of a grid run from the last to the first, with odd ones before even ones."""
    from triton.runtime import interpreter

    builder = type(interpreter.interpreter_builder)
    set_grid_idx = builder.set_grid_idx

    def permuted(self, *idx: int) -> None:
        sizes = self.grid_dim
        place = sum(i * math.prod(sizes[axis + 1 :]) for axis, i in enumerate(idx))
        count = math.prod(sizes)
        odd = count // 2
        place = 2 * place + 1 if place < odd else 2 * (place - odd)
        place = count - 1 - place
        set_grid_idx(self, *(place // math.prod(sizes[axis + 1 :]) % sizes[axis] for axis in range(3)))

    with pytest.MonkeyPatch.context() as patch:
        if reverse:
            patch.setattr(builder, "set_grid_idx", permuted)
        yield


MARGIN = 64  # elements; keeps the alignment


class Guards:
    """Stands in for Tensor.new_empty: NaN (ids: the lowest number) all over, and around what it returns."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, int]] = []
        self._new_empty = Tensor.new_empty

    def new_empty(self, like: Tensor, *size, **options) -> Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        count = shape.numel()
        buffer = self._new_empty(like, count + 2 * MARGIN, **options).fill_(
            _poison(options.get("dtype", like.dtype))
        )
        self.kept.append((buffer, count))
        return buffer[MARGIN : MARGIN + count].view(shape)

    def check(self) -> None:
        assert self.kept, "no kernel's buffer was guarded"
        for buffer, count in self.kept:
            around = torch.cat((buffer[:MARGIN], buffer[MARGIN + count :]))
            expected = torch.full_like(around, _poison(around.dtype))
            assert torch.equal(around.nan_to_num(7.0), expected.nan_to_num(7.0)), (
                "a kernel wrote outside of a buffer"
            )


def _poison(dtype: torch.dtype) -> float:
    return math.nan if dtype.is_floating_point else torch.iinfo(dtype).min


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Every buffer that is made with new_empty is guarded, and checked at the end."""
    guards = Guards()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", lambda *args, **options: guards.new_empty(*args, **options))
        yield
    guards.check()


def inside_nan(x: Tensor) -> Tensor:
    """The same numbers and strides, in the middle of a buffer of NaN (ids: the lowest number)."""
    if not x.is_contiguous():
        return x
    buffer = x.new_full((x.numel() + 2 * MARGIN,), _poison(x.dtype))
    return buffer[MARGIN : MARGIN + x.numel()].view(x.shape).copy_(x)
