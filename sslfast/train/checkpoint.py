"""A checkpoint: one safetensors file with the tensors of a nested state, and the rest as JSON in its header.

Nothing in a file is executed when it is read. It is written beside its destination and renamed, so that a
crash or a full disk leaves the previous one whole.
"""

import json
import os
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "sslfast checkpoint 1"


def save(path: Path, state: dict) -> None:
    """Writes dicts, lists, tuples, tensors, numbers, strings, booleans and None, nested in any way."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(pack(state, tensors))
    checksum = zlib.crc32(tree.encode())
    for tensor in tensors.values():
        checksum = zlib.crc32(_bytes(tensor), checksum)
    write(path, tensors, {"format": FORMAT, "tree": tree, "crc32": str(checksum)})


def load(path: Path) -> dict:
    """What `save` was given, with all tensors on the CPU.

    Raises:
        ValueError: the file is missing, cut off, damaged, or not a checkpoint of this format.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(
                    f"resume: {path} is not an {FORMAT!r}, but {header.get('format', 'another file')!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        checksum = zlib.crc32(header["tree"].encode())
        for i in range(len(tensors)):
            checksum = zlib.crc32(_bytes(tensors[str(i)]), checksum)
        if header["crc32"] != str(checksum):
            raise ValueError(f"resume: {path} is damaged: its checksum is not that of its contents")
        return unpack(json.loads(header["tree"]), tensors)
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"resume: {path} is not a whole checkpoint: {error}") from error


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file whole or not at all.

    Raises:
        OSError: it could not be written, say because the disk is full; what was at `path` is still there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = (
            temporary.stat().st_mode
        )  # as the umask has it; safetensors would let nobody else read the file
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all; raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def on_cpu(tensor: Tensor) -> Tensor:
    """A contiguous copy with memory of its own, as safetensors wants it."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is one


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; what JSON lacks becomes a list that begins with its kind."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = on_cpu(value)
        return ["tensor", name]
    if isinstance(value, dict):
        return ["dict", [[pack(k, tensors), pack(v, tensors)] for k, v in value.items()]]
    if isinstance(value, list | tuple):
        return [type(value).__name__, [pack(v, tensors) for v in value]]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"state: expected tensors, containers, numbers and strings, got {type(value).__name__}")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {unpack(k, tensors): unpack(v, tensors) for k, v in content}
    items = [unpack(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items


def reseed(seed: int, process: int, step: int) -> None:
    """All global generators, from these three numbers alone."""
    drawn = int(np.random.default_rng((seed, process, step)).integers(1 << 63))
    torch.manual_seed(drawn)
    np.random.seed(drawn % (1 << 32))
    random.seed(drawn)


def random_state(device: torch.device) -> dict:
    """The states of all global random generators: torch's on the CPU and the device, NumPy's, Python's."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
