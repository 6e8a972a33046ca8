"""`sslfast report`: a run, or several beside each other, as one HTML file that needs nothing else."""

import base64
import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import IO, Any

import numpy as np

from sslfast.train.budget import PHASES
from sslfast.train.checkpoint import write_text
from sslfast.train.run import ATTENTION, COMPONENTS, FEATURES, NEIGHBOURS, RECONSTRUCTION, REPORT, VIEWS

COLLAPSE = {
    "feature_std": "standard deviation of the embeddings; 0: all images have one",
    "effective_rank": "effective rank of the embeddings; 1: one direction",
    "teacher_agreement": "cosine of student and teacher, same image",
    "teacher_contrast": "the same, less that of any two images",
}
PICTURES = {
    VIEWS: ("Views", "Images, and what the network sees of each in one update."),
    NEIGHBOURS: ("Neighbours", "Test images and their nearest training images; of another class in red."),
    ATTENTION: ("Attention", "Of the class token to the patches, by each head of the last block."),
    COMPONENTS: (
        "Components",
        "The three principal components of the patches' features as red, green, blue.",
    ),
    RECONSTRUCTION: ("Reconstruction", "What the network sees, what it makes of it, and the image."),
}
PICTURES_BYTES = 5 << 20  # of a page, which base64 makes a third more
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1100px;
  margin: 2em auto; padding: 0 1em }
h1 { margin-bottom: 0 } h2 { border-bottom: 1px solid #ddd; margin-top: 2em } img { max-width: 100% }
table { border-collapse: collapse } td, th { border: 1px solid #ddd; padding: .25em .6em; text-align: left }
figure { margin: 1em 0 } figcaption, .note { color: #666 } nav a { margin-right: 1em }
"""


@dataclass(frozen=True)
class Record:
    """What the folder of a run holds; what it lacks is empty."""

    path: Path
    name: str
    config: dict[str, Any]
    rows: list[dict[str, float]]
    """of metrics.csv, an epoch each"""
    results: dict[str, dict[str, list[float]]]
    """of evaluation.json"""

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """(epochs, values), where there are any"""
        found = [(row["epoch"], row[name]) for row in self.rows if name in row]
        return [x for x, _ in found], [y for _, y in found]


def report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page, and its plots as PNGs into the folder NAME-plots beside it; returns its path.

    Args:
        runs: folders of runs, also unfinished ones; a part that is not there is left out.
        out: the file; None: report.html in the folder of a single run, otherwise here.

    Raises:
        ValueError: not the folder of a run, or with nothing to show.
    """
    records = _records(runs)
    if out is None:
        out = records[0].path / REPORT if len(records) == 1 else Path(REPORT)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"out: expected a file .html, got {out}")
    sections: list[tuple[str, str]] = []
    if results := _results(records):
        sections.append(("Accuracy", results))
    from matplotlib import rc_context

    plots: dict[str, bytes] = {}
    for title, file, caption, draw in PLOTS:
        drawn = io.BytesIO()
        with rc_context({"text.parse_math": False}):  # names are text
            if draw(records, drawn):
                plots[file] = drawn.getvalue()
                sections.append((title, _figure(file, plots[file], caption)))
    for file, (title, caption) in PICTURES.items():
        shown = [(record, record.path / file) for record in records if (record.path / file).is_file()]
        told = [(record, _smaller(path.read_bytes(), len(records))) for record, path in shown]
        if figures := [_figure(file, data, f"{_of(record, records)}{caption}") for record, data in told]:
            sections.append((title, "".join(figures)))
    if not sections:
        raise ValueError(f"run: expected metrics.csv or pictures, found none in {records[0].path}")
    sections.append(("Options", _options(records)))
    folder = out.with_name(f"{out.stem}-plots")
    folder.mkdir(parents=True, exist_ok=True)
    for _, file, _, _ in PLOTS:
        (folder / file).unlink(missing_ok=True)
    for file, data in plots.items():
        (folder / file).write_bytes(data)
    write_text(out, _page(" and ".join(record.name for record in records), records, sections))
    return out


def _records(runs: Sequence[Path]) -> list[Record]:
    paths = [Path(run) for run in runs]
    for path in paths:
        if not (path / "config.json").is_file():
            raise ValueError(f"run: expected the folder of a run, with a config.json, got {path}")
    full = [path.resolve() for path in paths]
    short = [path.name for path in full]
    alike = len(set(short)) < len(short)
    return [
        _record(path, _text(str(path) if alike else name)) for path, name in zip(paths, short, strict=True)
    ]


def _text(name: Any) -> str:
    """A name, which may be of any bytes, as text that can be written."""
    return os.fsencode(str(name)).decode("utf-8", "replace")


def _record(path: Path, name: str) -> Record:
    try:
        config = dict(json.loads((path / "config.json").read_text()).items())
        metrics, results = path / "metrics.csv", path / "evaluation.json"
        rows = csv.DictReader(io.StringIO(metrics.read_text() if metrics.is_file() else ""))
        numbers = [{k: float(v) for k, v in row.items() if v} for row in rows]
        measured = {
            what: {source: [float(x) for x in draws] for source, draws in by_source.items()}
            for what, by_source in (json.loads(results.read_text()) if results.is_file() else {}).items()
        }
        return Record(path, name, config, [row for row in numbers if "epoch" in row], measured)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"run: {path} is not the folder of a run that this version knows: {error}"
        ) from error


# Plots: each draws what the runs have of it into a file, and says whether there was anything.


def _lines(
    records: Sequence[Record], columns: dict[str, str], file: IO[bytes], logarithmic: Sequence[str] = ()
) -> bool:
    """A plot for each column that some run has, over the epochs, a line for each run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = [name for name in columns if any(record.column(name)[0] for record in records)]
    if not shown:
        return False
    across = min(2, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(5.2 * across, 3.2 * down), layout="constrained")
    for name, axes in zip(shown, figure.subplots(down, across, squeeze=False).flat, strict=False):
        named = []
        for record in records:
            epochs, values = record.column(name)
            if epochs:
                named.append(record.name)
                axes.plot(epochs, values, marker="." if len(epochs) < 60 else None)
        axes.set_title(columns[name], fontsize=9, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if name in logarithmic and all(y > 0 for record in records for y in record.column(name)[1]):
            axes.set_yscale("log")
        if len(records) > 1:  # names are given, since one that begins with _ would be left out
            axes.legend(axes.lines, named, fontsize=8)
    for axes in figure.axes[len(shown) :]:
        axes.remove()
    figure.savefig(file, dpi=110, format="png")
    return True


def _loss(records: Sequence[Record], file: IO[bytes]) -> bool:
    known = {"epoch", "loss", "learning_rate", "knn", "images_per_second", "seconds", "data_wait", *COLLAPSE}
    names = {name: None for record in records for row in record.rows for name in row}
    others = [name for name in names if name not in known and not name.startswith("time_")]
    columns = {"loss": "loss", "learning_rate": "learning rate at the end of the epoch"}
    return _lines(records, columns | {name: name.replace("_", " ") for name in others}, file)


def _knn(records: Sequence[Record], file: IO[bytes]) -> bool:
    return _lines(records, {"knn": "kNN accuracy on the test images"}, file)


def _collapse(records: Sequence[Record], file: IO[bytes]) -> bool:
    return _lines(records, COLLAPSE, file, logarithmic=("feature_std",))


def _speed(records: Sequence[Record], file: IO[bytes]) -> bool:
    return _lines(records, {"images_per_second": "images per second"}, file)


def _time(records: Sequence[Record], file: IO[bytes]) -> bool:
    """A bar for each run: the share that each phase had of the time of all epochs."""
    from matplotlib.figure import Figure

    timed = [record for record in records if any("time_forward" in row for row in record.rows)]
    if not timed:
        return False
    figure = Figure(figsize=(10.4, 1.3 + 0.5 * len(timed)), layout="constrained")
    axes = figure.subplots()
    begin = [0.0] * len(timed)
    for i, phase in enumerate(PHASES):
        shares = []
        for record in timed:
            rows = [(row.get("seconds", 1.0), row) for row in record.rows if "time_forward" in row]
            whole = sum(seconds for seconds, _ in rows) or 1.0
            shares.append(sum(seconds * row.get(f"time_{phase}", 0.0) for seconds, row in rows) / whole)
        axes.barh([record.name for record in timed], shares, left=begin, label=phase, color=f"C{i}")
        for j, share in enumerate(shares):
            if share >= 0.03:
                place = begin[j] + share / 2
                axes.text(place, j, f"{share:.0%}", ha="center", va="center", fontsize=8, color="white")
        begin = [a + b for a, b in zip(begin, shares, strict=True)]
    axes.set(xlim=(0, max(1.0, *begin)), xticks=[])
    axes.invert_yaxis()
    axes.legend(ncols=len(PHASES), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.02), frameon=False)
    figure.savefig(file, dpi=110, format="png")
    return True


def _map(records: Sequence[Record], file: IO[bytes]) -> bool:
    """t-SNE (van der Maaten and Hinton 2008) of the test images' features, a panel for each run."""
    from matplotlib.figure import Figure
    from safetensors import SafetensorError, safe_open

    found = []
    for record in records:
        try:
            with safe_open(record.path / FEATURES, "np") as kept:
                labels = kept.get_tensor("labels") if "labels" in set(kept.keys()) else None
                classes = json.loads((kept.metadata() or {}).get("classes", "[]"))
                found.append((record.name, kept.get_tensor("features"), labels, classes))
        except (OSError, SafetensorError):
            continue
    found = [each for each in found if _can_be_mapped(each[1])]
    if not found:
        return False
    from sklearn.manifold import TSNE

    across = min(2, len(found))
    down = -(-len(found) // across)
    figure = Figure(figsize=((5.2 if across > 1 else 7.5) * across, 5.2 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flat
    for (name, features, labels, classes), axes in zip(found, panels, strict=False):
        perplexity = min(30.0, (len(features) - 1) / 3)
        places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features)
        many = labels is not None and labels.max() >= 20
        colours = "hsv" if many else "tab10" if len(classes) <= 10 else "tab20"
        given = {} if labels is None else {"c": labels, "cmap": colours}
        dots = axes.scatter(*places.T, s=8, **given)
        if labels is not None and not many:
            handles, _ = dots.legend_elements(num=None)
            shown = sorted(set(labels.tolist()))
            names = [_text(classes[i]) if i < len(classes) else str(i) for i in shown]
            axes.legend(handles, names, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        axes.set(xticks=[], yticks=[])
        if len(found) > 1:
            axes.set_title(name, fontsize=9, loc="left")
    for axes in figure.axes[len(found) :]:
        axes.remove()
    figure.savefig(file, dpi=110, format="png")
    return True


def _can_be_mapped(features: np.ndarray) -> bool:
    """Not those of a collapsed run, which are one point."""
    large = features.ndim == 2 and features.shape[0] >= 10 and features.shape[1] >= 2
    return bool(large and np.isfinite(features).all() and np.ptp(features, 0).max() > 1e-6)


PLOTS: tuple[tuple[str, str, str, Callable[[Sequence[Record], IO[bytes]], bool]], ...] = (
    ("Loss", "loss.png", "Means of each epoch.", _loss),
    ("Accuracy over time", "knn.png", "Weighted nearest neighbours, as the run measured it.", _knn),
    ("Collapse monitor", "collapse.png", "Of the L2-normalised embeddings of each epoch.", _collapse),
    ("Throughput", "speed.png", "Of training alone, without evaluations and checkpoints.", _speed),
    ("Time budget", "time.png", "Shares of the time of training, on the device's clock.", _time),
    ("Map", "map.png", "Features of test images in two dimensions (t-SNE), coloured by label.", _map),
)


# HTML


def _results(records: Sequence[Record]) -> str:
    """Each measurement with a row for every run, a column for everything it was measured on."""
    tables = []
    for name in dict.fromkeys(name for record in records for name in record.results):
        measured = [record for record in records if name in record.results]
        sources = list(dict.fromkeys(s for record in measured for s in record.results[name]))
        head = "".join(f"<th>{escape(source)}</th>" for source in sources)
        body = ""
        for record in measured:
            cells = (_number(record.results[name].get(source)) for source in sources)
            body += f"<tr><th>{escape(record.name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        tables.append(f"<tr><th>{escape(name)}</th>{head}</tr>{body}")
    return f"<table>{''.join(tables)}</table>" if tables else ""


def _number(draws: list[float] | None) -> str:
    if not draws:
        return ""
    mean = sum(draws) / len(draws)
    if len(draws) == 1:
        return f"{mean:.4g}"
    spread = (sum((x - mean) ** 2 for x in draws) / (len(draws) - 1)) ** 0.5
    return f"{mean:.3f} ± {spread:.3f}"


def _options(records: Sequence[Record]) -> str:
    """All of a single run's; of several those that differ, and the rest folded."""
    names = list(dict.fromkeys(name for record in records for name in record.config))
    told = {name: [json.dumps(record.config.get(name)) for record in records] for name in names}
    differ = [name for name in names if len(set(told[name])) > 1]
    head = f"<tr><th></th>{''.join(f'<th>{escape(record.name)}</th>' for record in records)}</tr>"

    def table(names: Sequence[str]) -> str:
        rows = (
            f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(x)}</td>' for x in told[name])}</tr>"
            for name in names
        )
        return f"<table>{head}{''.join(rows)}</table>"

    same = [name for name in names if name not in differ]
    first = table(differ) if differ else ""
    return f"{first}<details><summary>{len(same)} options</summary>{table(same)}</details>"


def _figure(file: str, data: bytes, caption: str) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return (
        f'<figure><img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" '
        f'alt="{escape(Path(file).stem)}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _smaller(data: bytes, runs: int) -> bytes:
    """A picture as it is in the page: if it is too large a JPEG, of ever fewer pixels, so that all of them
    stay within PICTURES_BYTES."""
    from PIL import Image

    most, image = PICTURES_BYTES // (len(PICTURES) * runs), Image.open(io.BytesIO(data)).convert("RGB")
    while len(data) > most and min(image.size) > 100:
        file = io.BytesIO()
        image.save(file, "jpeg", quality=85)
        data, image = file.getvalue(), image.reduce(2)
    return data


def _of(record: Record, records: Sequence[Record]) -> str:
    return f"{record.name}: " if len(records) > 1 else ""


def _page(title: str, records: Sequence[Record], sections: Sequence[tuple[str, str]]) -> str:
    told = []
    for record in records:
        config, epochs = record.config, len(record.rows)
        text = f"{record.name}: {config.get('method')} on {config.get('data')}, {config.get('backbone')}"
        told.append(f"<p class=note>{escape(_text(text))}, {epochs} of {config.get('epochs')} epochs</p>")
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name, _ in sections)
    body = "".join(f'<h2 id="{_anchor(name)}">{escape(name)}</h2>{html}' for name, html in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{''.join(told)}<nav>{links}</nav>"
        f"{body}</body></html>\n"
    )


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")
