"""What became slower since an earlier run."""

import statistics
from collections.abc import Iterable
from typing import Any

from rich.console import Console

KEY = ("op", "variant", "size", "dtype", "name", "pass")
MARGIN = 1.05
"""Times slower that is never told: clocks and other programs do as much."""


def spans(rows: Iterable[dict[str, Any]]) -> dict[tuple, tuple[float, float, float]]:
    """{key: (lowest, middle, highest) ms}: of one measurement its 20 and 80 % quantiles, of several what
    their medians span too."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if "ms" in row:
            found.setdefault(tuple(row[name] for name in KEY), []).append(row)
    return {
        key: (
            min(row["ms"] if len(same) > 1 else row["ms_20"] for row in same),
            statistics.median(row["ms"] for row in same),
            max(row["ms"] if len(same) > 1 else row["ms_80"] for row in same),
        )
        for key, same in found.items()
    }


def slower(before: dict[str, Any], now: dict[str, Any], console: Console) -> list[tuple]:
    """Keys of sslfast's rows that are missing now, or whose fastest measurement is slower than the slowest
    before, by more than plain PyTorch is; they are printed."""
    old, new = spans(before["rows"]), spans(now["rows"])
    both = [key for key in new if key in old]
    plain = [new[key][1] / old[key][1] for key in both if key[4] == "eager"]
    machine = statistics.median(plain) if plain else 1.0
    console.print(
        f"plain PyTorch takes {machine:.2f} times as long as in the baseline ({before.get('commit')})"
    )
    cases = {tuple(row[name] for name in KEY[:4]) for row in now["rows"]}
    found = [key for key in old if key not in new and key[:4] in cases and key[4].startswith("sslfast")]
    for key in found:
        console.print(f"not measured any more: {' '.join(map(str, key))}", style="red")
    for key in both:
        if not key[4].startswith("sslfast"):
            continue
        change = new[key][1] / old[key][1]
        if new[key][0] > old[key][2] * MARGIN * max(1.0, machine):
            found.append(key)
            op, variant, size, dtype, name, which = key
            console.print(
                f"slower by {change:.2f}: {op} {variant} {size} {dtype}, {name}, {which}: "
                f"{old[key][1]:.3f} -> {new[key][1]:.3f} ms", style="red",
            )  # fmt: skip
    compared = sum(key[4].startswith("sslfast") for key in old if key[:4] in cases)
    console.print(f"{len(found)} of {compared} became slower beyond noise")
    return found
