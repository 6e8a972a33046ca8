"""Plots of a benchmark, and a page that shows them."""

import base64
import hashlib
import html
import io
import json
from pathlib import Path
from typing import Any

COLORS = {"eager": "tab:gray", "compile": "tab:blue"}
OURS = "tab:red"
LOST = "out of memory"


def write(whole: dict[str, Any], folder: Path) -> Path:
    """Draws OP.png of each op that was measured at two sizes or more, and roofline.png, and writes index.html
    with them and all figures, which needs no other file. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for op, variant, dtype in dict.fromkeys(
        (row["op"], row["variant"], row["dtype"]) for row in whole["rows"]
    ):
        own = [
            row for row in whole["rows"] if (row["op"], row["variant"], row["dtype"]) == (op, variant, dtype)
        ]
        if len({row["size"] for row in own}) > 1:
            name = "-".join(filter(None, (op, variant, dtype))).replace(" ", "-").replace(",", "")
            pictures[name] = scaling(own, f"{op}{', ' * bool(variant)}{variant}, {dtype}")
    pictures["roofline"] = roofline(whole)
    for name, data in pictures.items():
        (folder / f"{name}.png").write_bytes(data)
    (folder / "index.html").write_text(_page(whole, pictures), encoding="utf-8")
    return folder / "index.html"


def scaling(rows: list[dict[str, Any]], title: str) -> bytes:
    """Time and memory of each implementation over the size, on logarithmic axes; a cross at the top
    is where it ran out of memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    passes = {row["pass"] for row in rows if "pass" in row}
    last = "forward + backward" if "forward + backward" in passes else "forward"
    for name in dict.fromkeys(row["name"] for row in rows):
        color, ours = COLORS.get(name), name.startswith("sslfast")
        style = {
            "color": OURS if name == "sslfast" else color,
            "lw": 2.5 if ours else 1.5,
            "marker": "o",
            "ms": 4,
        }
        own = sorted((row for row in rows if row["name"] == name and row.get("pass") == last), key=_size)
        for axis, key in zip(axes, ("ms", "peak_mib"), strict=True):
            points = [(row["size"], row[key]) for row in own if row.get(key, 0) > 0]
            lost = min(
                (row["size"] for row in rows if row["name"] == name and row.get("why_not") == LOST),
                default=None,
            )
            if not points:
                continue
            (line,) = axis.plot(*zip(*points, strict=True), label=name, **style)
            if lost:
                top = axis.get_xaxis_transform()  # sizes, and shares of the height
                axis.plot([lost], [0.97], "x", color=line.get_color(), ms=9, mew=2.5, transform=top)
    sizes = sorted({row["size"] for row in rows})
    shape = rows[0]["shape"].replace(f"{rows[0]['size']:,}", "size", 1)
    for axis, label in zip(axes, (f"ms, {last}", "peak MiB beyond inputs and gradients"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel=shape, ylabel=label)
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8, rotation=30)
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.yaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    figure.suptitle(f"{title} (x: {LOST})", fontsize=10)
    return png(figure, rows)


def roofline(whole: dict[str, Any]) -> bytes:
    """Rates of sslfast's and plain PyTorch's passes over what they compute for each byte they must move,
    below what the machine can do. Ops without matrix products are at an eighth of a FLOP for each byte."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes, rates = figure.subplots(), whole["ceilings"]
    x = [2**i for i in range(-4, 13)]
    for dtype, peak in rates["gflops"].items():
        axes.plot(x, [min(peak, rates["gbps"] * i) for i in x], lw=1, label=f"machine, {dtype}")
    for name, color in (("eager", COLORS["eager"]), ("sslfast", OURS)):
        points = []
        for row in whole["rows"]:
            if row["name"] == name and row.get("ms") and row["gbps"]:
                flops = row["gflops"] or row["gbps"] / 8
                points.append((flops / row["gbps"], flops))
        if points:
            axes.scatter(
                [p[0] for p in points], [p[1] for p in points], s=14, color=color, label=name, zorder=3
            )
    axes.set(xscale="log", yscale="log", xlabel="FLOPs of matrix products for each byte", ylabel="GFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return png(figure, whole["rows"])


def _size(row: dict[str, Any]) -> int:
    return row["size"]


def digest(rows: list[dict[str, Any]]) -> str:
    """A plot of these rows has it in its file, so that an old one is found out."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def png(figure: Any, rows: list[dict[str, Any]]) -> bytes:
    """The figure, with a digest of the rows that it shows."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None, "Description": digest(rows)})
    return data.getvalue()


def _page(whole: dict[str, Any], pictures: dict[str, bytes]) -> str:
    columns = (
        *("op", "variant", "shape", "dtype", "name", "pass", "ms", "ms_20", "ms_80", "gflops", "gbps"),
        *("share", "error", "gradient_error", "peak_mib", "why_not"),
    )
    lines = [
        "<tr>" + "".join(f"<td>{_cell(row.get(column, ''))}</td>" for column in columns) + "</tr>"
        for row in whole["rows"]
    ]
    images = [
        f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)}" src="data:image/png;base64,'
        f'{base64.b64encode(data).decode()}">'
        for name, data in pictures.items()
    ]
    machine = {key: value for key, value in whole.items() if key != "rows"}
    about = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{_cell(value)}</td></tr>" for key, value in machine.items()
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>sslfast bench</title><style>'
        "body{font:14px sans-serif;margin:2em auto;max-width:70em;padding:0 1em}img{max-width:100%}"
        "table{border-collapse:collapse;font-size:12px}td,th{padding:2px 8px;border-bottom:1px solid #ddd;"
        "text-align:left}</style>"
        f"<h1>sslfast bench</h1><table>{about}</table>{''.join(images)}<h2>All figures</h2><table><tr>"
        + "".join(f"<th>{column}</th>" for column in columns)
        + f"</tr>{''.join(lines)}</table></html>\n"
    )


def _cell(value: Any) -> str:
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))
