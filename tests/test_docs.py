"""What README.md and docs/ say: their Python runs, their commands parse, and what they name is there."""

import contextlib
import functools
import importlib.util
import inspect
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import sslfast
from sslfast import cli, losses, ops
from sslfast.ops import _backend

ROOT = Path(__file__).resolve().parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
FILES = [README, *sorted(DOCS.glob("*.md"))]
GUIDES = ("README", "losses", "distributed", "training", "benchmarks")
PAGES = [path for path in FILES[1:] if path.stem not in GUIDES]
HEADINGS = ["Equation", "Shapes", "Use", "Numerics", "Cost", "Backends"]
DTYPES = ("float32", "bfloat16", "float16", "float64")

# Public names that have no page of their own, and the one that has them.
ELSEWHERE = {
    "EMATeacher": "ema_update_", "PackedImages": "augment_views", "PatchMask": "random_patch_mask",
    "ViewParams": "augment_views", "ViewSpec": "augment_views", "available_backends": "README",
    "cosine_momentum": "ema_update_", "head_cross_entropy": "dino_head_loss",
    "masked_patch_l1": "masked_patch_mse", "pack_images": "augment_views", "patchify": "masked_patch_mse",
    "sinkhorn_pass": "sinkhorn_knopp", "unpatchify": "masked_patch_mse", "use_backend": "README",
    "view_specs": "augment_views",
}  # fmt: skip
# Pages whose backends are those of another op.
SERVED_AS = dict(
    dino_head_loss="head_cross_entropy", linear_cross_entropy="similarity_lse", sinkhorn_knopp="sinkhorn_pass"
)


def blocks(path: Path, language: str) -> list[tuple[str, int, str]]:
    """(section, line, text) of each block of a language."""
    found, section, begin, lines = [], "", 0, path.read_text().splitlines()
    for i, line in enumerate(lines):
        if line.startswith("```") and begin:
            if lines[begin - 1] == f"```{language}":
                found.append((section, begin + 1, "\n".join(lines[begin:i])))
            begin = 0
        elif line.startswith("```"):
            begin = i + 1
        elif line.startswith("#") and not begin:
            section = line.lstrip("# ")
    return found


def prose(path: Path) -> str:
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)


def spans(path: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(path))


def run(path: Path, line: int, code: str, names: dict[str, Any]) -> None:
    exec(compile("\n" * (line - 1) + code, str(path), "exec"), names)  # with the file's line numbers


@pytest.mark.parametrize("path", FILES[1:], ids=lambda path: path.stem)
def test_page_runs(path):
    """With nothing prepared: the blocks of a page import what they use."""
    names: dict[str, Any] = {}
    for _, line, code in blocks(path, "python"):
        run(path, line, code, names)


leaf = functools.partial(torch.randn, requires_grad=True)


def network() -> dict[str, Any]:
    model = torch.nn.Linear(5, 8)
    return {"student": model, "model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}


# What the fragments of a section of README.md are about.
SECTIONS = {
    "sslfast": lambda: {"z1": leaf(6, 8), "z2": leaf(6, 8)},
    "The primitive": lambda: {
        "a": leaf(6, 8), "b": leaf(5, 8), "bias": leaf(5), "z": leaf(6, 8), "image_ids": torch.arange(6) % 3
    },
    "Losses": lambda: {
        "image": leaf(6, 8), "text": leaf(6, 8), "logit_scale": torch.tensor(10.0),
        "logit_bias": torch.tensor(-10.0), "features": leaf(6, 8), "labels": torch.arange(6) % 3,
        "x": leaf(6, 8), "query": leaf(6, 8), "key": leaf(6, 8), "memory": leaf(4, 8), "hidden": leaf(6, 8),
        "lm_head": torch.nn.Linear(8, 20),
    },
    "Many GPUs, one batch": lambda: {
        "z1": leaf(6, 8), "z2": leaf(6, 8), "view1": leaf(6, 5), "view2": leaf(6, 5), **network()
    },
    "The teacher": network,
    "Augmentation": lambda: {
        "images": torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8), "index": torch.tensor([7, 3]),
        "photographs": [pytest.importorskip("PIL.Image").new("RGB", size) for size in ((40, 30), (33, 51))],
    },
    "Masked patches": lambda: {
        "images": torch.randn(2, 3, 224, 224), "conv": torch.nn.Conv2d(3, 8, 16, 16),
        "pos_embed": leaf(196, 8), "mask_token": leaf(8), "decoder_pos_embed": leaf(196, 8),
        "pred": leaf(2, 196, 768),
    },
    "Distillation into prototypes": lambda: {
        "student_logits": leaf(10, 2, 65536), "teacher_logits": torch.randn(2, 2, 65536),
        "student": leaf(10, 2, 8), "student_prototypes": leaf(300, 8), "teacher": torch.randn(2, 2, 8),
        "teacher_prototypes": torch.randn(300, 8), "center": torch.zeros(300),
    },
}  # fmt: skip


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("section", dict.fromkeys(section for section, *_ in blocks(README, "python")))
def test_readme_runs(section, group_of_one):
    names = {"torch": torch, "sslfast": sslfast, **SECTIONS.get(section, dict)()}
    try:
        for _, line, code in (block for block in blocks(README, "python") if block[0] == section):
            if not torch.cuda.is_available():
                code = code.replace('"cuda"', '"cpu"')
            missing = 'patch("lightly")' in code and importlib.util.find_spec("lightly") is None
            with pytest.raises(ImportError, match="lightly") if missing else contextlib.nullcontext():
                run(README, line, code, names)
    finally:
        importlib.import_module("sslfast.interop").unpatch("lightly")


# Commands


@functools.cache
def help_of(*command: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--help"])
    assert stopped.value.code == 0, command
    return printed.getvalue()


def commands() -> list[list[str]]:
    lines = (line for path in FILES for _, _, text in blocks(path, "bash") for line in text.splitlines())
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def has(option: str, text: str) -> bool:
    return re.search(rf"(?<![\w-]){option}(?![\w-])", text) is not None


def sslfast_commands() -> list[list[str]]:
    return [words[words.index("sslfast") + 1 :] for words in commands() if "sslfast" in words]


def test_commands_and_their_options_exist():
    for given in sslfast_commands():
        text = help_of(*given[: 2 if given[0] == "train" else 1])
        options = [word.split("=")[0] for word in given if word.startswith("--")]
        assert all(has(option, text) for option in options), given


def test_train_commands_parse(monkeypatch, tmp_path):
    """With their values."""
    parsed = []
    monkeypatch.chdir(tmp_path)  # where there is no run to resume
    monkeypatch.setattr(cli, "_train", lambda method, config: parsed.append(method))
    given = [words for words in sslfast_commands() if words[0] == "train"]
    for words in given:
        cli.main(words)
    assert parsed == [words[1] for words in given] and parsed


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    said = [" ".join(words) for words in commands()] + [span for path in FILES for span in spans(path)]
    named = {match[1] for x in said if (match := re.match(r"make ([\w-]+)", x))}
    assert not [target for target in named if not re.search(rf"^{target}:", makefile, re.M)]


def test_options_in_the_text_exist():
    """Those of a span that begins with one belong to one command, or to one benchmark."""
    methods = importlib.import_module("sslfast.train.methods").NAMES
    texts = [help_of("train", method) for method in methods] + [
        help_of("eval"),
        help_of("report"),
        help_of("bench"),
    ]
    texts += [path.read_text() for path in (ROOT / "benchmarks").glob("*.py")]
    for span in (span for path in FILES for span in spans(path) if span.startswith("--")):
        options = [word for word in span.split() if word.startswith("--")]
        assert any(all(has(option, text) for option in options) for text in texts), span


# Figures


@pytest.fixture
def figures():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_are_those_of_the_results(figures, monkeypatch):
    for path in figures.FILES:
        assert figures.written(path.read_text()) == path.read_text(), f"{path} disagrees: make readme"
    text = "".join(path.read_text() for path in figures.FILES)
    assert sorted(re.findall(r"<!-- figures: ([\w-]+) -->", text)) == sorted(figures.FIGURES)
    read = figures.read

    def lower(value):
        """Every number with a point a tenth lower."""
        if isinstance(value, dict):
            return {key: lower(x) for key, x in value.items()}
        if isinstance(value, list):
            return [lower(x) for x in value]
        return 0.9 * value if isinstance(value, float) else value

    for name in ("accuracy", "bench", "scaling", "interop", "distributed", "augment", "steps", "parity"):
        if not (figures.RESULTS / figures.CPU / f"{name}.json").exists():
            continue

        def one(x, *device, name=name):
            return lower(read(x, *device)) if x == name else read(x, *device)

        monkeypatch.setattr(figures, "read", one)
        assert figures.written(text) != text, name
    for name, file in (("scaling", "scaling"), ("roofline", "bench"), ("parity", "parity")):
        shown = read(file)["runs" if name == "parity" else "rows"]
        picture = (figures.RESULTS / figures.CPU / f"{name}.png").read_bytes()
        assert figures.page.digest(shown).encode() in picture, f"{name}.png: make readme"
    with pytest.raises(ValueError, match="figures: expected one of .*, got nothing"):
        figures.written("<!-- figures: nothing -->\n\n<!-- end -->")


def test_figures_of_a_gpu(figures, monkeypatch, tmp_path):
    """Of another machine all that is there, with what its scripts leave out or could not time."""
    shutil.copytree(figures.RESULTS / figures.CPU, tmp_path / figures.CPU)
    gpu = tmp_path / "nvidia-test"
    gpu.mkdir()
    whole = figures.read("bench") | {"device": gpu.name, "driver": "1"}
    (gpu / "bench.json").write_text(json.dumps(whole))
    whole = figures.read("augment")
    rows = [{**row, "name": "sslfast (triton)"} for row in whole["augment"] if row["name"] == "sslfast (cpu)"]
    lost = {key: value for key, value in rows[0].items() if key != "ms"}
    rows.append({**lost, "name": "kornia", "why_not_timed": "missing"})
    (gpu / "augment.json").write_text(json.dumps(whole | {"augment": rows, "kornia": None}))
    (gpu / "distributed.json").write_text(json.dumps({"blocks": {}}))
    whole = figures.read("steps")
    plain = [row for row in whole["steps"] if row["name"] == "plain"]
    (gpu / "steps.json").write_text(json.dumps(whole | {"steps": plain}))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    found = figures.machines()
    assert found.startswith("## nvidia-test") and "`ntxent_loss`" in found and "simclr, 256 images" in found
    assert figures.gpus().startswith("nvidia-test: torch")


# What is named


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_files_are_there(path):
    for link in re.findall(r"\]\((?!\w+://)([^)\s]+)\)", prose(path)):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", prose(target), re.M) if anchor else []
        assert not anchor or anchor in [h.lower().replace(" ", "-") for h in headings], link
    places = r"(?:benchmarks|csrc|docs|examples|kernels|sslfast|tests)/[\w./*-]*"
    named = [word for span in spans(path) for word in span.split() if re.fullmatch(places, word)]
    assert not [word for word in named if not any(ROOT.glob(word.rstrip("/")))]


def test_every_op_has_a_page_and_every_loss_its_line():
    of_losses = set(losses.__all__)
    names = (set(sslfast.__all__) | set(ops.__all__) | set(_backend.PREFERENCE)) - of_losses
    for name in sorted(names - {"__version__", "cached_step"}):
        page = DOCS / f"{ELSEWHERE.get(name, name)}.md"
        assert page.exists() and re.search(rf"\b{name}\b", page.read_text()), f"{name}: expected in {page}"
    text, index = prose(DOCS / "losses.md"), prose(DOCS / "README.md")
    assert not [name for name in of_losses if not re.search(rf"`{name}[`(]", text)]
    assert not [path for path in PAGES if f"| [{path.stem}]({path.stem}.md) |" not in index]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pages_have_the_same_form_and_the_arguments_of_their_op(path):
    text = prose(path)
    assert re.findall(r"^# (.*)$", text, re.M) == [path.stem]
    assert re.findall(r"^## (.*)$", text, re.M) == HEADINGS
    shapes = re.search(r"^## Shapes$(.*?)^## ", text, re.M | re.S)[1]
    named = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\|([^|]*)", shapes, re.M)))
    function = getattr(sslfast, path.stem, None) or getattr(ops, path.stem)
    assert sorted(named) == sorted(inspect.signature(function).parameters)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_backends_serve_what_their_tables_say(path):
    rows = re.findall(r"^\| `(cpu|triton|cuda|reference)` \| ([^|]*) \|", path.read_text(), re.M)
    assert [name for name, _ in rows] == list(_backend.BACKENDS)
    op = SERVED_AS.get(path.stem, path.stem)
    for name, cell in rows if op in _backend.PREFERENCE else []:
        said = [] if cell == "none" else list(DTYPES) if cell == "all" else cell.split(", ")
        device = torch.device("cuda" if name == "triton" and torch.cuda.is_available() else "cpu")
        if name == "cuda":  # whether it was built is another matter
            assert bool(said) == (name in _backend._registered[op])
        elif name != "triton" or not _backend.triton_refuses(device):
            assert said == [x for x in DTYPES if not _backend.why_not(op, name, device, getattr(torch, x))]
