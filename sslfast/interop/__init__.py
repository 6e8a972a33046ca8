"""Drop-ins with other libraries' exact signatures, one module for each, and `patch` that puts them in place.

from sslfast.interop.lightly import NTXentLoss  # one changed line, or
sslfast.interop.patch("lightly")                # none: what the program has imported is swapped
"""

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["patch", "patched", "unpatch"]

LIBRARIES = (
    "lightly", "open_clip", "pytorch_metric_learning", "sentence_transformers", "solo_learn", "timm", "torch",
    "transformers",
)  # fmt: skip

# library: {dotted name: (original, what stands in for it)}
_swapped: dict[str, dict[str, tuple[Any, Any]]] = {}


def patched() -> tuple[str, ...]:
    """Libraries whose classes and functions are swapped now."""
    return tuple(_swapped)


def patch(library: str) -> list[str]:
    """Swaps a library's losses and helpers for the drop-ins, in every loaded module that refers to them.

    Imports after it get the drop-ins too. Instances that exist keep their class; of `transformers` a method
    is swapped, which they get as well. Instances made while it is in place are pickled as the original's,
    and load without it.

    Args:
        library: one of `LIBRARIES`.

    Returns:
        What was swapped, such as "lightly.loss.ntx_ent_loss.NTXentLoss"; names that the installed version
        does not have are left out.

    Raises:
        ValueError: another name, or a collection of files that has no package: import its drop-in instead.
        ImportError: the library is not installed.
    """
    adaptor = _adaptor(library)
    if library in _swapped:
        return list(_swapped[library])
    try:
        importlib.import_module(adaptor.PACKAGE)
    except ImportError as error:
        raise ImportError(f"sslfast.interop.patch({library!r}): pip install {adaptor.NEEDS}") from error
    swaps = {}
    for name, ours in adaptor.SWAPS.items():
        owner = _owner(name)
        original = getattr(owner, name.rsplit(".", 1)[1], None)
        if original is not None:
            swaps[name] = original, _stand_in(original, ours)
    for name, (original, stand_in) in swaps.items():
        _replace(_owner(name), original, stand_in)
    _swapped[library] = swaps
    return list(swaps)


def unpatch(library: str) -> None:
    """Puts the originals back, also where they were imported since; what never was swapped stays.

    Raises:
        ValueError: an unknown name.
    """
    _adaptor(library)
    for name, (original, stand_in) in _swapped.pop(library, {}).items():
        _replace(_owner(name), stand_in, original)


def _adaptor(library: str) -> Any:
    if library in ("moco", "supcontrast"):
        raise ValueError(
            f"library: {library} has no package to patch; import from sslfast.interop.{library} instead"
        )
    if library not in LIBRARIES:
        raise ValueError(f"library: expected one of {', '.join(LIBRARIES)}, got {library!r}")
    return importlib.import_module(f"sslfast.interop.{library}")


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


def _stand_in(original: Any, ours: Any) -> Any:
    """Ours under the original's module and name, and an object of its own, which `unpatch` can tell from a
    drop-in that a program imported itself."""
    if isinstance(ours, type):
        names = {key: getattr(original, key) for key in ("__module__", "__qualname__")}
        return type(original.__name__, (ours,), {**names, "__doc__": ours.__doc__})
    return _copy(ours, original)


def _copy(function: Callable, original: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__module__, call.__qualname__ = original.__module__, original.__qualname__
    return call


def _replace(owner: Any, old: Any, new: Any) -> None:
    """In the owner if it is a class, otherwise wherever a loaded module has it."""
    modules = [owner] if isinstance(owner, type) else list(sys.modules.values())
    for module in modules:
        names = getattr(module, "__dict__", None)
        if not isinstance(names, dict) and not isinstance(module, type):
            continue
        if isinstance(module, ModuleType) and module.__name__.startswith("sslfast.interop"):
            continue
        for key, value in list((names or {}).items()):
            if value is old:
                setattr(module, key, new)
