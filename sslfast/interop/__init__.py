"""Drop-ins with other libraries' exact signatures, one module for each, and `patch` that puts them in place.

from sslfast.interop.lightly import NTXentLoss  # one changed line, or
sslfast.interop.patch("lightly")                # none: the library's own classes get the fast methods
"""

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from importlib import metadata
from types import FunctionType
from typing import Any

__all__ = ["patch", "patched", "unpatch"]

LIBRARIES = (
    "lightly", "open_clip", "pytorch_metric_learning", "sentence_transformers", "solo_learn", "timm", "torch",
    "transformers",
)  # fmt: skip
_MISSING = object()

# library: {name: what undoes its swap}
_swapped: dict[str, dict[str, Callable[[], None]]] = {}


def patched() -> tuple[str, ...]:
    """Libraries whose classes and functions are swapped now."""
    return tuple(_swapped)


def patch(library: str) -> list[str]:
    """Makes a library's losses and helpers compute what the drop-ins compute.

    Classes stay the library's: their methods are swapped, so that instances that exist, subclasses,
    isinstance and pickles are what they were. Functions are swapped in every loaded module that refers to
    them, and for imports after this call.

    Args:
        library: one of `LIBRARIES`.

    Returns:
        What was swapped, such as "lightly.loss.ntx_ent_loss.NTXentLoss". What the installed version does not
        have, or has with other parameters, is left alone.

    Raises:
        ValueError: another name, or a collection of files that has no package: import its drop-in instead.
        ImportError: the library is not installed, or is too old.
    """
    _check_name(library)
    if library in _swapped:
        return list(_swapped[library])
    adaptor = importlib.import_module(f"sslfast.interop.{library}")
    _check_installed(adaptor)
    undo = _swapped[library] = {}
    try:
        _swap(adaptor, undo)
    except BaseException:
        unpatch(library)
        raise
    return list(undo)


def _swap(adaptor: Any, undo: dict[str, Callable[[], None]]) -> None:
    for name, ours in adaptor.SWAPS.items():
        owner, key = _owner(name), name.rsplit(".", 1)[1]
        original = getattr(owner, key, None)
        if original is None or not _alike(original, ours):
            continue
        if isinstance(ours, type):
            methods = {k: f for k, f in vars(ours).items() if isinstance(f, FunctionType) and k[:2] != "__"}
            undo[name] = _set(original, methods)
        elif isinstance(owner, type):
            undo[name] = _set(owner, {key: ours})
        else:
            stand_in = _copy(ours, original)
            _replace(original, stand_in)
            undo[name] = functools.partial(_replace, stand_in, original)


def unpatch(library: str) -> None:
    """Puts the originals back, functions also where they were imported since.

    Raises:
        ValueError: an unknown name.
    """
    _check_name(library)
    for undo in _swapped.pop(library, {}).values():
        undo()


def _check_name(library: str) -> None:
    if library in ("moco", "supcontrast"):
        raise ValueError(
            f"library: {library} has no package to patch; import from sslfast.interop.{library} instead"
        )
    if library not in LIBRARIES:
        raise ValueError(f"library: expected one of {', '.join(LIBRARIES)}, got {library!r}")


def _check_installed(adaptor: Any) -> None:
    """adaptor.NEEDS is such as "lightly>=1.5"."""
    try:
        importlib.import_module(adaptor.PACKAGE)
    except ImportError as error:
        raise ImportError(
            f"{adaptor.PACKAGE} cannot be imported ({error}): pip install '{adaptor.NEEDS}'"
        ) from error
    package, least = adaptor.NEEDS.split(">=")
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:  # a checkout
        return
    if _numbers(found) < _numbers(least):
        raise ImportError(f"{package} is {found}: pip install '{adaptor.NEEDS}'")


def _numbers(version: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", version)[:2]]


def _owner(name: str) -> Any:
    """The module or class that a dotted name's last part belongs to; None where there is none."""
    parts = name.split(".")[:-1]
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        return functools.reduce(lambda x, part: getattr(x, part, None), parts[count:], found)
    return None


def _alike(original: Any, ours: Any) -> bool:
    """Whether ours takes what the original takes: its parameters, and perhaps more behind them."""
    if isinstance(ours, type):
        public = [k for k, f in vars(ours).items() if isinstance(f, FunctionType) and k[0] != "_"]
        return all(_alike(getattr(original, k), getattr(ours, k)) for k in public if hasattr(original, k))
    theirs, mine = (list(inspect.signature(f).parameters) for f in (original, ours))
    return mine[: len(theirs)] == theirs


def _set(owner: type, values: dict[str, Any]) -> Callable[[], None]:
    """Sets attributes of a class; the result puts back what was there."""
    before = {key: vars(owner).get(key, _MISSING) for key in values}

    def undo() -> None:
        for key, value in before.items():
            if value is _MISSING:
                delattr(owner, key)
            else:
                setattr(owner, key, value)

    for key, value in values.items():
        setattr(owner, key, value)
    return undo


def _copy(function: Callable, original: Callable) -> Callable:
    """An object of its own, so that `_replace` can tell it from a drop-in that a program imported itself."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__module__, call.__qualname__ = original.__module__, original.__qualname__
    return call


def _replace(old: Any, new: Any) -> None:
    """Wherever a loaded module has it, but for the adaptors, which keep the original."""
    for name, module in list(sys.modules.items()):
        names = getattr(module, "__dict__", None)
        if isinstance(names, dict) and not name.startswith("sslfast.interop"):
            for key in [k for k, value in list(names.items()) if value is old]:
                names[key] = new
