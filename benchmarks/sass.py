"""Reads NVIDIA machine code with the tools in Triton's package: instructions, labels, the innermost loop."""

import os
import re
import subprocess
from functools import lru_cache
from pathlib import Path

import triton


@lru_cache
def _tool(name: str) -> str:
    found = [str(path) for path in Path(triton.__file__).parent.rglob(name) if os.access(path, os.X_OK)]
    if not found:
        raise FileNotFoundError(f"{name}: expected in triton's package")
    return found[0]


def run(tool: str, *arguments: str) -> str:
    return subprocess.run([_tool(tool), *arguments], check=True, capture_output=True, text=True).stdout


def parse(sass: str) -> tuple[list[str], dict[str, int]]:
    """Instructions in order, and the index at which each label stands."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*\.(L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1])
    return instructions, labels


def is_any(instruction: str, *names: str) -> bool:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0] in names


def multiplies(instruction: str) -> bool:
    """Whether it is a matrix instruction: of Ampere and consumer cards, of Hopper, of B200."""
    return re.search(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", instruction) is not None


def _target(instruction: str, labels: dict[str, int]) -> int | None:
    found = re.search(r"\bBRA\b.*\.(L_\w+)", instruction)
    return labels.get(found[1]) if found else None


def loop(instructions: list[str], labels: dict[str, int]) -> dict[str, int]:
    """Of the first innermost loop with matrix instructions: the safe range's. A branch forward over many
    instructions
    skips what masks a tile."""
    loops = [(t, i) for i, x in enumerate(instructions) if (t := _target(x, labels)) is not None and t <= i]
    loops = [(a, b) for a, b in loops if any(map(multiplies, instructions[a : b + 1]))]
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    first, last = min(inner) if inner else (0, len(instructions) - 1)
    skipped: set[int] = set()
    for i in range(first, last + 1):
        target = _target(instructions[i], labels)
        if inner and target is not None and i + 60 < target <= last:
            skipped |= set(range(i + 1, target))
    hot = [instructions[i] for i in range(first, last + 1) if i not in skipped]
    return {
        "instructions": len(hot),
        "powers": sum("MUFU.EX2" in x for x in hot),
        "matrix": sum(map(multiplies, hot)),
        "waits": sum("WARPGROUP.DEPBAR" in x for x in hot),
    }
