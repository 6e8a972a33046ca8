"""WebDataset's tar shards as pictures that can be read in any order."""

import io
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslfast.train.data import Unreadable, tell

GROUP = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass
class Shards:
    """Images in uncompressed tar files, each read where it lies.

    A sample is what shares a name up to the first dot; it has an image and may have its class as a number in
    a file .cls, as the WebDataset library writes them. Arrays, not lists: workers share their memory.
    """

    paths: Sequence[Path]
    shard: np.ndarray
    """int32 [N]: which of the paths"""
    offset: np.ndarray
    """int64 [N]: where the file of the image begins"""
    size: np.ndarray
    """int64 [N]: its bytes"""
    names: np.ndarray
    """bytes [N]"""

    def __len__(self) -> int:
        return len(self.shard)

    def name(self, index: int) -> str:
        return f"{self.paths[self.shard[index]]}:{os.fsdecode(bytes(self.names[index]))}"

    def open(self, index: int) -> Any:
        from PIL import Image

        with open(self.paths[self.shard[index]], "rb") as file:
            file.seek(self.offset[index])
            data = file.read(self.size[index])
        if len(data) < self.size[index]:
            raise Unreadable("the shard ends within it")
        return Image.open(io.BytesIO(data))


def expand(pattern: str) -> list[Path]:
    """The shards of `pattern`: a tar file, a folder of them, or a name with {first..last}, as many as all
    combinations; sorted.

    Raises:
        ValueError: there is none.
    """
    group = GROUP.search(pattern)
    if group:
        first, last = group.groups()
        numbers = (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
        begin, end = pattern[: group.start()], pattern[group.end() :]
        found = sorted(path for number in numbers for path in expand(begin + number + end))
    else:
        path = Path(pattern).expanduser()
        found = sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.is_file() else []
    if not found:
        raise ValueError(
            f"data: expected a tar file, a folder of them or a name with {{000..146}}, got {pattern}"
        )
    return found


def index(paths: Sequence[Path], suffixes: set[str]) -> tuple[Shards, Tensor | None]:
    """(images with one of the suffixes in the order of shards, their classes [N] if all have one)

    A shard that is broken is named, and what is before the break is used.

    Raises:
        ValueError: no shard is an uncompressed tar file, or a class is no number.
    """
    rows: list[tuple[int, int, int, bytes]] = []
    problem: tuple[Path, Exception] | None = None
    links = 0
    classes: list[int | None] = []
    for shard, path in enumerate(paths):
        at: dict[str, int] = {}  # of each sample's image in rows
        known: dict[str, int] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    links += member.islnk() or member.issym()
                    folder, _, last = member.name.rpartition("/")
                    stem, dot, kind = last.partition(".")
                    key = f"{folder}/{stem}"
                    if not member.isreg() or not dot or not stem:
                        continue
                    if kind == "cls":
                        known[key] = _class(path, member, tar)
                    elif f".{kind.rpartition('.')[2].lower()}" in suffixes and key not in at:
                        at[key] = len(rows)
                        rows.append((shard, member.offset_data, member.size, os.fsencode(member.name)))
                _check_end(path, tar.offset)
        except (tarfile.TarError, OSError) as error:
            problem = problem or (path, error)
            tell(f"{path} is not a whole uncompressed tar file, {len(at)} images of it are used: {error}")
        classes += [known.get(key) for key in at]
    if problem and not rows:
        path, why = problem
        raise ValueError(f"data: {path} is not an uncompressed tar file: {why}") from why
    if links:
        tell(f"data: {links} links in the shards are left out")
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    shards = Shards(
        list(paths), np.array(columns[0], np.int32), np.array(columns[1], np.int64),
        np.array(columns[2], np.int64), np.array(columns[3], np.bytes_),
    )  # fmt: skip
    known_classes = [label for label in classes if label is not None]
    if 0 < len(known_classes) < len(rows):
        tell(f"data: {len(rows) - len(known_classes)} of {len(rows)} images have no .cls: no labels are used")
    return shards, torch.tensor(known_classes) if len(known_classes) == len(rows) else None


def _check_end(path: Path, offset: int) -> None:
    """A reader takes a broken header for the end, but nothing except zeros follows a true one."""
    with open(path, "rb") as file:
        if file.seek(0, 2) < offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without a mark")
        file.seek(offset)
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"a broken header at byte {offset}")


def _class(path: Path, member: tarfile.TarInfo, tar: tarfile.TarFile) -> int:
    file = tar.extractfile(member)
    assert file is not None
    text = file.read(64)
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 31:
        raise ValueError(f"data: expected the number of a class in {member.name} of {path}, got {text!r}")
    return number
