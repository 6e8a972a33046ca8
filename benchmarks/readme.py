"""Writes the figures of README.md and docs/benchmarks.md out of benchmarks/results/, between their lines
`<!-- figures: NAME -->` and `<!-- end -->`. With --check it only says whether they are there.

    make readme
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sslfast.bench import page
from sslfast.bench.cases import CASES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
CPU = "amd-epyc-2cpu"
MACHINE = "2 threads of an AMD EPYC with AVX-512"
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(\n<!-- end -->)", re.S)
SIDES = ("eager", "compile", "sslfast")
BOTH, FORWARD = "forward + backward", "forward"

Row = dict[str, Any]


def read(name: str, device: str = CPU) -> Any:
    return json.loads((RESULTS / device / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ms(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1e3:.1f} s"
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"


def mib(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def times(value: float) -> str:
    return f"{value:.3g}x" if value < 100 else f"{value:.0f}x"


def fastest(texts: list[str], rows: list[Row]) -> list[str]:
    """The texts of these rows, which have no "ms" where it was not timed, the fastest's in bold."""
    best = min((row["ms"] for row in rows if "ms" in row), default=None)
    pairs = zip(texts, rows, strict=True)
    return [f"**{text}**" if row.get("ms", ...) == best else text for text, row in pairs]


# sslfast bench.


def by_case(whole: dict[str, Any]) -> dict[tuple, dict[str, Row]]:
    """Rows by case, size and dtype, and by name; with the backward pass where there is one."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in whole["rows"]:
        key = row["op"], row["variant"], row["shape"], row["dtype"]
        own = found.setdefault(key, {})
        if row.get("pass") != FORWARD or row["name"] not in own:
            own[row["name"]] = row
    return found


def ops(device: str = CPU, every: bool = False) -> str:
    """every: size of an op, not its largest alone."""
    whole = read("bench", device)
    cases = {case: own for case, own in by_case(whole).items() if "ms" in own.get("sslfast", {})}
    places = {(case.op, case.variant): i for i, case in enumerate(CASES)}  # in a file the newest are last
    cases = dict(sorted(cases.items(), key=lambda item: places.get(item[0][:2], len(places))))
    last = {(op, variant, dtype): shape for op, variant, shape, dtype in cases}
    lines = []
    for (op, variant, shape, dtype), own in cases.items():
        if not every and shape != last[op, variant, dtype]:
            continue
        what = f"`{op}`{', ' * bool(variant)}{variant}{f', {dtype}' * (dtype != 'float32')}"
        name = "eager" if "eager" in own else "reference"
        plain, ours = own[name], own["sslfast"]
        sides = [plain, own.get("compile", {}), ours]
        taken = fastest([told(row) for row in sides], sides)
        taken[0] += " (reference)" * (name == "reference")
        ratios = [times(row["ms"] / ours["ms"]) if "ms" in row else "" for row in sides[:2]]
        memory = [mib(row["peak_mib"]) if "peak_mib" in row else "-" for row in sides]
        cells = [what, shape, *taken, *ratios, f"{ours['share']:.0%}"]
        cells += [" / ".join(memory) + " MiB" if "peak_mib" in ours else ""]
        if every:
            work = f"{ours['gflops']:,.0f} GFLOP/s" if ours.get("gflops") else f"{ours['gbps']:.1f} GB/s"
            cells += [work, f"{max(ours['error'], ours.get('gradient_error') or 0):.0e}"]
        others = [f"{x} {told(row)}" for x, row in own.items() if x not in (*SIDES, "reference")]
        lines.append([*cells, ", ".join(others)])
    head = ["", "inputs", "eager", "torch.compile", "sslfast", "vs eager", "vs compile", "share of floor"]
    head += ["memory: eager / compile / sslfast", *["rate", "error"] * every, "others"]
    rates = whole["ceilings"]
    products = ", ".join(f"{gflops:,.0f} ({name})" for name, gflops in rates["gflops"].items())
    about = f"torch {whole['torch']}; the machine: matrix products {products} GFLOP/s, memory "
    return f"{about}{rates['gbps']:.0f} GB/s.\n\n" + table(head, lines)


def every_op() -> str:
    return ops(every=True)


def told(row: Row) -> str:
    return ms(row["ms"]) if "ms" in row else row.get("why_not", "").replace("|", "/")


def scaling() -> str:
    """The plot, and what it shows in a sentence."""
    whole = read("scaling")
    by_size = {own["sslfast"]["size"]: own for own in by_case(whole).values() if "ms" in own["sslfast"]}
    most = next(size for size, own in reversed(by_size.items()) if "ms" in own["eager"])
    said = []
    for size in (most, max(by_size)):
        rows = [(name, by_size[size][name]) for name in SIDES]
        takes = [
            f"{name} {told(row)}" + (f" and {mib(row['peak_mib'])} MiB" if "ms" in row else "")
            for name, row in rows
        ]
        said.append(f"With {size:,} pairs: {', '.join(takes)}.".replace("compile", "torch.compile"))
    return (
        f"![NT-Xent: time and memory over the batch](benchmarks/results/{CPU}/scaling.png)\n\n"
        f"NT-Xent, forward + backward, on {MACHINE}. {' '.join(said)}"
    )


def gpus() -> str:
    found = [name for name in others() if "driver" in read("bench", name)]
    if not found:
        return "Not measured yet: the kernels have run in Triton's interpreter and its compiler only."
    return "\n\n".join(f"{name}: {ops(name)}" for name in found)


def machines() -> str:
    """Of those other than CPU all that was measured."""
    parts = {
        "bench": lambda name: ops(name, every=True), "interop": dropins, "steps": steps, "augment": views,
        "distributed": ranks,
    }  # fmt: skip
    found = [
        f"## {name}\n\n"
        + "\n\n".join(
            show(name) for file, show in parts.items() if (RESULTS / name / f"{file}.json").exists()
        )
        for name in others()
    ]
    return "\n\n".join(found) or "No other machine has been measured yet."


def others() -> list[str]:
    """Devices other than CPU of which there are figures of ops."""
    return [path.parent.name for path in sorted(RESULTS.glob("*/bench.json")) if path.parent.name != CPU]


# The other files.


def dropins(device: str = CPU) -> str:
    whole = read("interop", device)
    lines = []
    for case in whole["cases"]:
        sides = [case["original"], case["sslfast"]]
        memory = [mib(side["mib"]) for side in sides if side.get("mib")]
        beyond = case.get("beyond")
        larger = ""
        if beyond and "out_of_memory" in beyond["original"]:
            there = beyond["sslfast"]
            larger = f"{beyond['rows']:,}: {there['ms'] / 1e3:.1f} s, {mib(there['mib'])} MiB"
        cells = [f"{case['name']}, {case['size']}", *fastest([ms(side["ms"]) for side in sides], sides)]
        cells += [times(case["faster"]), " / ".join(memory) + " MiB" if len(memory) == 2 else "", larger]
        lines.append(cells)
    versions = ", ".join(f"{name} {version}" for name, version in whole["libraries"].items())
    head = [
        "",
        "original",
        "sslfast",
        "faster",
        "memory, original / sslfast",
        "a batch for which the original needs more than 16 GiB",
    ]
    return f"{versions}.\n\n" + table(head, lines)


def ranks(device: str = CPU) -> str:
    whole = read("distributed", device)
    if "steps" not in whole:
        return ""
    found: dict[int, dict[str, Row]] = {}
    for row in whole["steps"]["results"]:
        found.setdefault(row["processes"], {})[row["name"]] = row
    lines = []
    for processes, own in found.items():
        plain = min((row for name, row in own.items() if name.startswith("plain")), key=lambda row: row["ms"])
        ours = [own[f"sslfast, {name}"] for name in ("gather", "ring")]
        rows = [plain, *ours]
        cells = fastest([ms(row["ms"]) for row in rows], rows)
        faster = [
            f"{cell} ({times(row['plain_over_it'])})" for cell, row in zip(cells[1:], ours, strict=True)
        ]
        sent = " / ".join(f"{row['loopback'] / 1e6:.2f}" for row in rows)
        lines.append([str(processes), cells[0], *faster, f"{sent} MB"])
    return table(["processes", "plain", "gather", "ring", "sent by each: plain / gather / ring"], lines)


def views(device: str = CPU) -> str:
    whole = read("augment", device)
    found: dict[tuple, dict[str, Row]] = {}
    for row in whole["augment"]:
        if row["dtype"] == "float32":
            found.setdefault((row["case"], row["batch"], row["views"]), {})[row["name"]] = row
    lines = []
    for (case, batch, count), own in found.items():
        ours = next(row for name, row in own.items() if name.startswith("sslfast"))
        others = [own.get(name, {}) for name in ("kornia", "Pillow")]
        rows = [*others, ours]
        cells = [f"{case}, {batch} images, {count} view{'s' * (count > 1)}"]
        cells += fastest([ms(row["ms"]) if "ms" in row else "" for row in rows], rows)
        cells += [times(row["ms"] / ours["ms"]) if "ms" in row else "" for row in others]
        lines.append([*cells, f"{ours['images_per_second']:,.0f}"])
    head = ["", "kornia", "Pillow", "sslfast", "vs kornia", "vs Pillow", "images/s"]
    versions = [f"{name} {whole[name.lower()]}" for name in ("kornia", "Pillow") if whole[name.lower()]]
    return f"{', '.join(versions) or 'sslfast alone'}.\n\n" + table(head, lines)


def steps(device: str = CPU) -> str:
    if not (RESULTS / device / "steps.json").exists():
        return "Not measured yet."
    whole = read("steps", device)
    found: dict[str, dict[str, Row]] = {}
    for row in whole["steps"]:
        found.setdefault(row["title"], {})[row["name"]] = row
    lines = []
    for title, own in found.items():
        ours = own.get("sslfast", {})
        if "ms" not in ours:
            continue
        rows = [*(own.get(name, {}) for name in ("plain", "lightly")), ours]
        rates = [rate(x["images_per_second"]) if "ms" in x else x.get("why_not_timed", "") for x in rows]
        share = {name: value for name, value in ours.get("budget", {}).items() if value >= 0.005}
        budget = ", ".join(f"{name} {value:.0%}" for name, value in share.items())
        peaks = [row.get("peak_mib", "-") for row in rows]
        memory = " / ".join(x if isinstance(x, str) else mib(x) for x in peaks)
        what = f"{title}: {ours['backbone']}, {ours['size']} pixels, batch {ours['batch']:,}"
        lines.append([what, *fastest(rates, rows), f"{memory} MiB", budget])
    head = [
        "images/s of a training step",
        "plain",
        "lightly",
        "sslfast",
        "memory, in this order",
        "sslfast's time, views included",
    ]
    return f"torch {whole['torch']}, lightly {whole['lightly']}.\n\n" + table(head, lines)


def parity() -> str:
    if not (RESULTS / CPU / "parity.json").exists():
        return "Not measured yet."
    whole = read("parity")
    lines = []
    for name, own in whole["summary"].items():
        seeds, measure = own["seeds"], "10 labels per class"
        spread = seeds["accuracies"][measure]
        cells = [name, f"{spread['mean']:.3f} ± {spread['sd'] or 0:.3f}"]
        for variant in ("reference", "lightly"):
            other = own["variants"].get(variant)
            cells.append(f"{other['accuracies'][measure]['value']:.3f}" if other else "")
        apart = [f"{x['epoch_loss_difference']:.2g}" for x in own["variants"].values()]
        first = max(
            max(x["first_loss_difference"], x["first_gradient_difference"]) for x in own["variants"].values()
        )
        lines.append(
            [
                *cells,
                "< 1e-6" if first < 1e-6 else f"{first:.0e}",
                " / ".join(apart),
                f"{seeds['epoch_loss_difference']:.2g}",
            ]
        )
    head = ["10 labels per class", "sslfast, seeds", "plain PyTorch", "lightly"]
    head += ["first loss and gradient apart", "epoch losses apart", "between seeds"]
    largest = max(
        abs(y["difference"])
        for own in whole["summary"].values()
        for x in own["variants"].values()
        for y in x["accuracies"].values()
    )
    text = (
        f"![learning curves](benchmarks/results/{CPU}/parity.png)\n\nFrom one seed accuracies (kNN, linear "
    )
    text += f"probe, 10 labels per class) differ by {100 * largest:.1f} points at most.\n\n"
    return text + table(head, lines)


# Accuracies.


def accuracy(results: dict[str, Any], name: str, source: str = "trained encoder") -> str:
    draws = results[name][source]
    mean = statistics.fmean(draws)
    return f"{mean:.3f}" if len(draws) == 1 else f"{mean:.3f} ± {statistics.stdev(draws):.3f}"


def demo() -> str:
    row = next(row for row in read("accuracy")["rows"] if row["method"] == "simclr")
    lines = []
    for name in row["results"]:
        pixels, untrained = (accuracy(row["results"], name, x) for x in ("raw pixels", "untrained encoder"))
        own = accuracy(row["results"], name)
        lines.append(f"{name}: {own} (raw pixels {pixels}, untrained encoder {untrained})")
    return (
        f"On {MACHINE} it trains for {row['seconds']} s and ends with\n\n```\n" + "\n".join(lines) + "\n```"
    )


def methods() -> str:
    rows = [row for row in read("accuracy")["rows"] if "no-norm-pix" not in row["options"]]
    few, near = "10 labels per class", "kNN (k=20, T=0.07)"
    lines = []
    for row in rows:
        cells = [
            accuracy(row["results"], few, source).split(" ")[0]
            for source in ("trained encoder", "untrained encoder", "raw pixels")
        ]
        lines.append(
            [
                f"`{row['method']} {row['options']}`",
                *cells,
                accuracy(row["results"], near),
                f"{row['seconds']} s",
            ]
        )
    return table(["`sslfast train` …", few, "untrained", "raw pixels", "kNN", "training"], lines)


FIGURES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        scaling,
        demo,
        dropins,
        methods,
        ops,
        every_op,
        gpus,
        machines,
        ranks,
        views,
        steps,
        parity,
    )
}


def written(text: str) -> str:
    """A text with the figures of now.

    Raises:
        ValueError: a block of another name.
    """

    def block(match: re.Match) -> str:
        if match[2] not in FIGURES:
            raise ValueError(f"figures: expected one of {', '.join(FIGURES)}, got {match[2]}")
        return match[1] + FIGURES[match[2]]() + match[3]

    return BLOCK.sub(block, text)


def main() -> None:
    texts = {path: path.read_text() for path in FILES}
    new = {path: written(text) for path, text in texts.items()}
    if "--check" in sys.argv[1:]:
        wrong = [path.name for path in FILES if new[path] != texts[path]]
        sys.exit(f"{', '.join(wrong)} and benchmarks/results/ disagree: make readme" if wrong else 0)
    import parity

    (RESULTS / CPU / "scaling.png").write_bytes(page.scaling(read("scaling")["rows"], "ntxent_loss, float32"))
    (RESULTS / CPU / "roofline.png").write_bytes(page.roofline(read("bench")))
    (RESULTS / CPU / "parity.png").write_bytes(parity.draw(read("parity")))
    for path in FILES:
        path.write_text(new[path])


if __name__ == "__main__":
    main()
