"""`sslfast bench`: every op and loss has a case that is right, and what is told of it is true."""

import json
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import sslfast.losses
import sslfast.ops
from sslfast import cli
from sslfast.bench import compare, measure, page, peers
from sslfast.bench.case import Case, Work, copied
from sslfast.bench.cases import BY_NAME, CASES
from sslfast.bench.run import is_failure, keep, read

CPU = torch.device("cpu")
RATES = {"gflops": {"float32": 100.0, "bfloat16": 200.0}, "gbps": 10.0}
NO_OPS = {
    *(
        "available_backends",
        "use_backend",
        "view_specs",
        "pack_images",
        "patchify",
        "unpatchify",
    ),  # no kernels
    "update_center_",  # a mean
}


def small(case: Case) -> int:
    return {"ema_update_": case.sizes[-1] if case.sizes else 0, "dino_loss": 2, "dino_head_loss": 2}.get(
        case.op, 24
    )


def test_every_op_and_loss_has_a_case():
    public = {
        name for module in (sslfast.ops, sslfast.losses) for name in module.__all__ if name[0].islower()
    }
    assert {case.op for case in CASES} == public - NO_OPS
    assert set(peers.PEERS) <= set(BY_NAME)


@pytest.mark.parametrize("name", [case.name for case in CASES if "ViT" not in case.variant])
def test_results_are_right_and_floors_positive(name):
    case, size = BY_NAME[name], small(BY_NAME[name])
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        if str(dtype).removeprefix("torch.") not in case.dtypes:
            continue
        inputs = case.inputs(size, dtype, CPU)
        true = measure.truth(case, inputs)
        for which, call in measure.implementations(case, (), (), compiled=False).items():
            found = measure.results(case, call, copied(case, inputs))
            errors = [measure.error(a, b) for a, b in zip(found, true, strict=True)]
            assert max(errors) <= measure.limit(case, which, dtype), (which, dtype, errors)
        for backward in (False, True)[: 1 + bool(case.trained)]:
            assert measure.floor(case.work(size, dtype.itemsize, backward), RATES, dtype) > 0


def plain(x):
    return (x * x).sum()


def numbers(size, dtype, device):
    return {"x": torch.randn(size, device=device).to(dtype)}


def toy_work(size, itemsize, backward):
    return Work(flops=2 * size, bytes=size * itemsize * (1 + 2 * backward))


TOY = Case(
    "toy", "{} numbers", (1000,), (1000,), numbers, lambda x: x.square().sum(), plain, ("x",), toy_work
)


def rows_of(case, **calls):
    calls = {**measure.implementations(case, (), (), compiled=False), **calls}
    return list(measure.rows(case, 1000, torch.float32, CPU, calls, RATES, 0.05))


def test_what_is_wrong_is_told_and_not_timed():
    wrong = {
        "off by a little": lambda x: plain(x) * 1.01,
        "no gradient": lambda x: plain(x.detach()) + 0 * x.sum(),
        "another shape": lambda x: plain(x)[None],
        "nan": lambda x: plain(x) * torch.nan,
        "raises": lambda x: x.missing,
    }
    rows = rows_of(TOY, **wrong)
    told = {row["name"]: row["why_not"] for row in rows if "why_not" in row}
    assert told.keys() == wrong.keys() and {row["name"] for row in rows if "ms" in row} == {
        "sslfast",
        "eager",
    }
    assert told["off by a little"] == told["no gradient"] == told["nan"] == "wrong"
    assert told["another shape"].startswith("RuntimeError") and told["raises"].startswith("AttributeError")
    (own,) = (row for row in rows_of(replace(TOY, ours=wrong["off by a little"])) if row["name"] == "sslfast")
    assert own["why_not"] == "wrong" and is_failure(own, ())
    assert not is_failure({**own, "why_not": "out of memory"}, ()) and not is_failure(rows[0], ())
    assert is_failure({**own, "why_not": "ValueError"}, ()) and not is_failure(
        {**own, "why_not": "ValueError"}, ("cpu",)
    )


def test_figures_of_a_row():
    rows = rows_of(TOY)
    assert [(row["name"], row["pass"]) for row in rows] == [
        (name, which) for which in measure.PASSES for name in ("sslfast", "eager")
    ]
    for row in rows:
        backward = row["pass"] == measure.PASSES[1]
        assert 0 < row["ms_20"] <= row["ms"] <= row["ms_80"] and row["samples"] >= measure.SAMPLES[0]
        assert row["gbps"] == pytest.approx(4000 * (1 + 2 * backward) / row["ms"] / 1e6)
        assert row["floor_ms"] == pytest.approx(max(2000 / 1e11, 4000 * (1 + 2 * backward) / 1e10) * 1e3)
        assert row["share"] == pytest.approx(row["floor_ms"] / row["ms"])


def test_the_longer_of_products_and_bytes_is_the_floor():
    assert measure.floor(Work(flops=2e11, bytes=1e9), RATES, torch.float32) == pytest.approx(2)
    assert measure.floor(Work(flops=2e11, bytes=1e9), RATES, torch.bfloat16) == pytest.approx(1)
    assert measure.floor(Work(flops=2e11, bytes=1e11), RATES, torch.float32) == pytest.approx(10)


# Memory.


def test_memory_is_what_a_call_needs_beyond_inputs_and_gradients():
    found = measure.memory(BY_NAME["ntxent_loss"], 2048, torch.float32, ["sslfast", "eager"], (), 8.0)
    matrix = 4096**2 * 4 / 2**20
    assert 2.5 * matrix < found["eager"]["peak_mib"] < 6 * matrix
    assert found["sslfast"]["peak_mib"] < 0.3 * matrix


def test_what_runs_out_of_memory_is_told_and_the_others_are_measured():
    found = measure.memory(BY_NAME["ntxent_loss"], 4096, torch.float32, ["eager", "sslfast"], (), 0.6)
    assert found["eager"] == {"why_not": "out of memory"} and found["sslfast"]["peak_mib"] < 200


# Earlier results.


def whole(*ms, plain=10.0, device="x"):
    """Each is a repeat."""

    def row(name, value):
        about = {"op": "toy", "variant": "", "size": 1, "dtype": "float32", "pass": "forward"}
        return {**about, "name": name, "ms_20": 0.95 * value, "ms": value, "ms_80": 1.05 * value}

    rows = [row(name, value) for own in ms for name, value in (("sslfast", own), ("eager", plain))]
    return {"device": device, "commit": "abc", "rows": rows}


def test_what_is_not_measured_any_more_is_told():
    now = whole(1.0)
    now["rows"][0] = {**{key: now["rows"][0][key] for key in compare.KEY[:5]}, "why_not": "wrong"}
    assert len(compare.slower(whole(1.0), now, Console(quiet=True))) == 1


@pytest.mark.parametrize(
    "before, now, found",
    [
        (whole(1.0), whole(1.0), 0),
        (whole(1.0), whole(1.15), 0),  # within the quantiles
        (whole(1.0), whole(1.3), 1),
        (whole(1.0), whole(0.2), 0),
        (whole(1.0, 1.4), whole(1.45), 0),  # runs differed by as much
        (whole(1.0, 1.1), whole(1.5, 1.1, 1.6), 0),  # one of the new runs was as fast
        (whole(1.0, 1.1), whole(1.5, 1.4, 1.6), 1),
        (whole(1.0), whole(1.5, plain=16.0), 0),  # the machine is slower
        (whole(1.0), whole(3.0, plain=16.0), 1),
    ],
)
def test_slower_beyond_noise(before, now, found):
    assert len(compare.slower(before, now, Console(quiet=True))) == found


@pytest.mark.parametrize("text", ["", "{}", '{"rows": 3}', "[1]", "text"])
def test_another_file_is_no_baseline(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="baseline: .*a.json is not a file that --json wrote"):
        read(tmp_path / "a.json")
    with pytest.raises(ValueError, match="baseline: .*missing"):
        read(tmp_path / "missing")


# The command.


def run(*arguments):
    try:
        cli.main(["bench", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_the_command(tmp_path, capsys):
    common = (
        "byol_loss",
        "random_patch_mask",
        "--sizes",
        16,
        32,
        "--no-compile",
        "--no-memory",
        "--seconds",
        "0.02",
    )
    assert run(*common, "--json", tmp_path, "--plots", tmp_path / "plots", "--device", "cpu") == 0
    (path,) = tmp_path.glob("*/bench.json")
    found = json.loads(path.read_text())
    assert {"device", "threads", "torch", "triton", "python", "sslfast", "commit", "ceilings"} <= found.keys()
    assert {(row["op"], row["size"]) for row in found["rows"]} == {
        (op, size) for op in ("byol_loss", "random_patch_mask") for size in (16, 32)
    }
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"index.html", "roofline.png", "byol_loss-float32.png", "random_patch_mask-float32.png"}
    text = (tmp_path / "plots" / "index.html").read_text()
    assert text.count("data:image/png;base64,") == 3 and not re.search(r'(src|href)="(?!data:)', text)
    assert run("koleo_loss", *common[2:], "--json", tmp_path, "--device", "cpu") == 0
    both = json.loads(path.read_text())["rows"]
    assert {row["op"] for row in both} == {"byol_loss", "random_patch_mask", "koleo_loss"}
    for row in found["rows"]:
        if row["name"] == "sslfast":
            row |= {key: row[key] / 1000 for key in ("ms", "ms_20", "ms_80")}
    (tmp_path / "faster.json").write_text(json.dumps(found))
    capsys.readouterr()
    assert run(*common, "--repeats", 1, "--baseline", tmp_path / "faster.json") == 1
    printed = capsys.readouterr().out
    assert "slower by" in printed and re.search(r"(\d+) of \1 became slower beyond noise", printed)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("ntxent",), "op: expected one of .*ntxent_loss.*, got 'ntxent'"),
        (("ntxent_loss", "--sizes", 0), "sizes: expected positive numbers"),
        (("ntxent_loss", "--baseline", "/no/such"), "baseline: /no/such"),
        (("ntxent_loss", "--peers", "lightl"), "peers: expected all, none or some of .*lightly"),
        (("ntxent_loss", "--json", "/dev/null/x"), "json: cannot write to /dev/null/x"),
    ],
)
def test_errors_name_the_argument(arguments, message, capsys):
    assert run(*arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_was_written_is_never_half_a_file(tmp_path, monkeypatch):
    keep(tmp_path / "a.json", {"rows": [{"ms": 1.23456789}]})
    before = (tmp_path / "a.json").read_text()
    assert json.loads(before) == {"rows": [{"ms": 1.235}]}
    with pytest.raises(TypeError):
        keep(tmp_path / "a.json", {"rows": [{"ms": object()}]})
    assert (tmp_path / "a.json").read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_plots_mark_where_memory_ran_out(tmp_path):
    about = {"op": "toy", "variant": "", "dtype": "float32"}
    rows = []
    for size in (1000, 2000):
        for name in ("sslfast", "eager"):
            figures = {"ms": size / 10, "gflops": 3.0, "gbps": 1.0, "peak_mib": float(size)}
            shape = {"shape": f"{size:,} rows", "size": size}
            rows.append({**about, **shape, "name": name, "pass": "forward", **figures})
    without = page.scaling(rows, "toy")
    lost = {**about, "shape": "4,000 rows", "size": 4000, "name": "eager", "why_not": "out of memory"}
    marked = page.scaling([*rows, lost], "toy")
    assert marked[:8] == without[:8] == b"\x89PNG\r\n\x1a\n" and marked != without
    page.write({"ceilings": RATES, "device": "x", "rows": [*rows, lost]}, tmp_path)
