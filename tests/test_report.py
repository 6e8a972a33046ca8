"""`sslfast report`: pages of runs, and what headless Chromium makes of them."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sslfast.cli import main
from sslfast.train import loop, methods, page
from sslfast.train.run import FOLDERS
from sslfast.train.vit import SIZES

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SECTIONS = ["Loss", "Collapse monitor", "Throughput", "Time budget", "Map", "Views", "Options"]
LABELLED = ["Accuracy", "Accuracy over time", "Neighbours"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 images of 24 x 24 pixels in three colours, one for each class."""
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = generator.integers(0, 100, (60, 24, 24, 3)) + 150 * np.eye(3, dtype=int)[labels][:, None, None]
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, images=images.clip(0, 255).astype(np.uint8), labels=labels)
    return f"npz:{path}"


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A run of each of three methods, by name."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "vit_nano", {"dim": 12, "depth": 1, "heads": 2})
        for method, options in {
            "simclr": {"backbone": "compact"},
            "dino": {"backbone": "vit_nano", "patch_size": 8, "prototypes": 64, "hidden_dim": 32},
            "mae": {"backbone": "vit_nano", "patch_size": 8},
        }.items():
            common = {"epochs": 2, "batch_size": 16, "warmup_epochs": 0.5, "device": "cpu", "knn_every": 1}
            found[method] = folder / method
            loop.train(
                method, methods.module(method).Config(out=found[method], data=data, **common, **options)
            )
    return found


@pytest.fixture
def copied(runs, tmp_path):
    """Copies that a test may change."""
    return {name: shutil.copytree(path, tmp_path / name) for name, path in runs.items()}


class Page(HTMLParser):
    """Headings, links to them, pictures, and what is loaded from elsewhere."""

    def __init__(self, path) -> None:
        super().__init__()
        self.headings, self.anchors, self.links, self.pictures, self.open = [], set(), set(), {}, []
        self.text = path.read_text()
        self.feed(self.text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag not in ("img", "meta", "link"):
            self.open.append(tag)
        if tag == "h2":
            self.anchors.add(values["id"])
        if tag == "a":
            self.links.add(values["href"].removeprefix("#"))
        if tag == "img":
            kind, _, data = values["src"].partition(",")
            assert kind in ("data:image/png;base64", "data:image/jpeg;base64") and values["alt"]
            self.pictures[values["alt"]] = Image.open(io.BytesIO(base64.b64decode(data)))
        assert tag != "script" and values.get("href", "#")[:1] in "#d"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


def test_a_page_of_each_method(copied):
    own = {"simclr": set(), "dino": {"Attention", "Components"}, "mae": {"Reconstruction"}}
    for name, path in copied.items():
        found = page.report([path])
        assert found == path / "report.html" and found.stat().st_size < 10 << 20
        shown = Page(found)
        assert set(SECTIONS + LABELLED) | own[name] == set(shown.headings)
        assert shown.anchors == shown.links and len(shown.headings) == len(shown.anchors)
        for picture in shown.pictures.values():
            assert np.asarray(picture.convert("L")).std() > 5 and min(picture.size) > 50
        plots = {p.stem for p in (path / "report-plots").iterdir()}
        assert plots == {"loss", "knn", "collapse", "speed", "time", "map"} <= set(shown.pictures)


def test_runs_side_by_side(copied, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["report", *map(str, copied.values())])
    assert capsys.readouterr().out == "wrote report.html\n"
    shown = Page(tmp_path / "report.html")
    assert set(SECTIONS + LABELLED) <= set(shown.headings)
    for name in copied:
        assert f"<th>{name}</th>" in shown.text and f"{name}: Images, and what" in shown.text
    results = json.loads((copied["mae"] / "evaluation.json").read_text())
    (knn,) = (of["trained encoder"][0] for what, of in results.items() if what.startswith("kNN"))
    assert f"<td>{knn:.4g}</td>" in shown.text
    assert "<th>method</th><td>&quot;simclr&quot;</td><td>&quot;dino&quot;</td>" in shown.text
    twice = page.report([copied["mae"], shutil.copytree(copied["mae"], tmp_path / "b" / "mae")])
    assert f"<th>{tmp_path / 'b' / 'mae'}</th>" in twice.read_text()


def test_what_is_missing_is_left_out(copied):
    path = copied["simclr"]
    whole = Page(page.report([path])).headings
    for name, section in (
        ("evaluation.json", "Accuracy"), ("views.png", "Views"), ("features.safetensors", "Map"),
        ("neighbours.png", "Neighbours"),
    ):  # fmt: skip
        (path / name).unlink()
        whole.remove(section)
        assert Page(page.report([path])).headings == whole
    (path / "features.safetensors").write_bytes(b"nothing")
    lines = (path / "metrics.csv").read_text().splitlines()
    (path / "metrics.csv").write_text("epoch,loss\n1,0.5\n")
    assert Page(page.report([path])).headings == ["Loss", "Options"]
    (path / "metrics.csv").write_text("\n".join(lines[:1]))  # no epoch has ended
    with pytest.raises(ValueError, match="^run: expected metrics.csv or pictures, found none"):
        page.report([path])
    assert (path / "report.html").exists()  # the one before


def test_names_and_options_are_text(copied, tmp_path):
    strange = tmp_path / "<script>alert(1)</script>"
    shutil.copytree(copied["simclr"], strange.parent / "x").rename(tmp_path / "<b>&amp;")
    config = json.loads((tmp_path / "<b>&amp;" / "config.json").read_text())
    (tmp_path / "<b>&amp;" / "config.json").write_text(json.dumps({**config, "data": "<script>1</script>"}))
    shown = Page(page.report([tmp_path / "<b>&amp;"]))
    assert "&lt;b&gt;&amp;amp;" in shown.text and "<script" not in shown.text


def test_features_of_a_run(runs):
    kept = load_file(runs["simclr"] / "features.safetensors")
    assert kept["features"].shape[0] == kept["labels"].shape[0] == 12 and kept["features"].shape[1] <= 50
    assert kept["features"].mean(0).abs().max() < 1e-5


@pytest.mark.parametrize("count, classes", [(9, 2), (10, 2), (60, 15), (60, 40), (60, 0)])
def test_maps_of_few_and_many_classes(copied, count, classes):
    kept = {"features": torch.randn(count, 5)}
    if classes:
        kept["labels"] = torch.arange(count) % classes
    path = copied["simclr"]
    save_file(kept, path / "features.safetensors", {"classes": json.dumps([f"c{i}" for i in range(classes)])})
    assert ("Map" in Page(page.report([path])).headings) == (count >= 10)


@pytest.mark.parametrize("features", [
    torch.zeros(200, 5), torch.full((200, 5), 0.3), torch.randn(1, 5).repeat(200, 1), torch.randn(200, 1),
    torch.full((200, 5), torch.nan), 1e-30 * torch.randn(200, 5), torch.randn(200),
])  # fmt: skip
def test_of_a_collapsed_run_there_is_no_map(copied, features):
    save_file({"features": features}, copied["simclr"] / "features.safetensors")
    assert "Map" not in Page(page.report([copied["simclr"]])).headings


def test_a_page_of_many_large_pictures_stays_below_10_mb(copied, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2400, 1200, 3), dtype=np.uint8)
    folders = [shutil.copytree(copied["dino"], tmp_path / f"run {i}") for i in range(4)]
    for folder in folders:
        for name in page.PICTURES:
            Image.fromarray(noise).save(folder / name)
    found = page.report(folders, tmp_path / "page.html")
    assert 1 << 20 < found.stat().st_size < 10 << 20
    assert all(min(picture.size) >= 75 for picture in Page(found).pictures.values())


def test_names_of_any_bytes(copied, tmp_path):
    names = ["a$x^$", "_a", os.fsdecode(b"caf\xe9")]
    folders = [copied["simclr"].rename(tmp_path / names[0])]
    folders += [shutil.copytree(folders[0], tmp_path / name) for name in names[1:]]
    found = page.report(folders, tmp_path / "page.html")
    assert "a$x^$" in found.read_text() and "caf\ufffd" in found.read_text()


def test_nothing_else_is_touched(copied, tmp_path):
    """The page may lie beside the folder of its run, and have its name."""
    run = copied["simclr"]
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    page.report([run], run.with_suffix(".html"))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    (run / "metrics.csv").write_text("epoch,loss\n1,0.5\n,0.4\n")
    assert Page(page.report([run])).headings[-1] == "Options"


@pytest.mark.parametrize("name, content", [
    ("config.json", "[]"), ("config.json", "3"), ("evaluation.json", "[1]"), ("evaluation.json", "{"),
    ("evaluation.json", '{"kNN": {"a": "x"}}'), ("metrics.csv", "epoch,loss\n1,x\n"),
])  # fmt: skip
def test_a_folder_that_is_no_run_is_named(copied, name, content):
    (copied["simclr"] / name).write_text(content)
    with pytest.raises(ValueError, match="^run: .* is not the folder of a run that this version knows"):
        page.report([copied["simclr"]])


def test_errors(copied, tmp_path, capsys):
    for argv, message in (
        (["report", str(tmp_path / "nothing")], "run: expected the folder of a run"),
        (["report"], "runs: expected"),
        (["report", str(copied["mae"]), "--out", str(tmp_path / "a.pdf")], "out: expected a file .html"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_overwriting_a_run_removes_its_page(copied, data):
    path = copied["simclr"]
    page.report([path])
    cfg = methods.module("simclr").Config(
        out=path, data=data, epochs=1, batch_size=16, device="cpu", overwrite=True
    )
    loop.train("simclr", cfg)
    assert not (path / "report.html").exists() and not (path / "report-plots").exists()
    assert {p.name for p in path.iterdir() if p.is_dir()} <= set(FOLDERS) and (path / "views.png").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_headless_chromium_shows_every_section(copied, tmp_path):
    """Without a message on its console; the bottom of the page is not empty."""
    for paths in ([copied["dino"]], list(copied.values())):
        found = page.report(paths, tmp_path / "page.html")
        picture = tmp_path / "page.png"
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
        ]  # fmt: skip
        script = "--window-size=1200,9000", f"--screenshot={picture}", found.as_uri()
        done = subprocess.run([*command, *script], capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in done.stderr
        pixels = np.asarray(Image.open(picture).convert("L")).astype(float)
        inked = pixels.reshape(90, 100, -1).std((1, 2)) > 1  # in each band of 100 pixels
        assert inked[: int(0.5 * inked.nonzero()[0].max())].all() and inked.sum() > 25
        dumped = subprocess.run(
            [*command, "--dump-dom", found.as_uri()], capture_output=True, text=True, timeout=120, check=True
        ).stdout
        assert re.findall(r"<h2[^>]*>(.*?)</h2>", dumped) == Page(found).headings
