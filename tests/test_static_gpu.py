"""The compiler's report of every shipped configuration of the Triton kernels: what none of them may have."""

import dataclasses
import fcntl
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "static_gpu.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Made by one worker, which takes minutes of all cores; the others wait for it."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    out = folder / "static.json"
    with open(folder / "static.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            env = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
            command = [sys.executable, SCRIPT, "--quick", "--json-out", out]
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return json.loads(out.read_text())


@pytest.fixture(scope="module")
def static_gpu():
    before = os.environ.get("TRITON_INTERPRET")
    sys.path.insert(0, str(SCRIPT.parent))  # it imports its neighbour
    spec = importlib.util.spec_from_file_location("static_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["static_gpu"] = module
    spec.loader.exec_module(module)
    if before is not None:  # the script compiles; tests interpret
        os.environ["TRITON_INTERPRET"] = before
    return module


def test_every_configuration_is_fit_to_ship(results):
    """No spill in 16-bit kernels at D <= 128, no large stack, memory that fits, matrix instructions."""
    kernels = results["kernels"]
    assert {k["job"]["arch"] for k in kernels} == {80, 90, 100}
    assert {k["job"]["dtype"] for k in kernels} == {"bf16", "fp16", "fp32"}
    assert len(kernels) > 84
    for k in kernels:
        job = k["job"]
        if job["dtype"] != "fp32" and 0 < job["width"] <= 128:
            assert k["spills"] == k["stack"] == 0 and k["matrix"] > 0, job


def test_kernels_that_move_memory_do_so_16_bytes_at_a_time(results):
    kernels = {}
    for k in results["memory_kernels"]:
        kernels.setdefault(k["job"]["name"], []).append(k)
    ema = {(k["job"]["dtype"], k["job"]["arch"]) for k in kernels["ema_update"]}
    assert ema >= {("fp32", 80), ("fp32", 100)}
    rows = {"ema_update", "take_rows: gather", "take_rows: restore", "take_rows: embed", "put_rows"}
    for name in rows:
        for k in kernels[name]:
            assert k["stack"] == k["spills"] == 0 and k["wide_loads"] and k["wide_stores"], k
    for k in kernels["ema_update"]:
        fp32 = k["job"]["dtype"] == k["job"]["source"] == "fp32"
        assert k["warps"] == k["most"] or not (fp32 and k["job"]["arch"] == 90)


def test_no_kernel_of_patches_and_views_spills(results):
    """Masks, rows and errors: most on three architectures, slow and similar ones on one."""
    kernels = [k for k in results["memory_kernels"] if k["job"]["name"] != "ema_update"]
    names = {k["job"]["name"].split(":")[0] for k in kernels}
    assert names >= {"random_mask 256", "block_mask", "take_rows", "sum_fill", "places", "cut_rows", "scale"}
    assert names >= {"views", "sinkhorn", "resample", "warp", "colour", "blur"}
    assert {k["job"]["arch"] for k in kernels} == {80, 90, 100}
    assert {k["job"]["source"] for k in kernels if "patch_error" in k["job"]["name"]} == {"fp32", "u8"}
    for k in kernels:
        assert not k["spills"], k


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("put_rows", {}, None),
        ("put_rows", {"spills": 1, "stack": 8}, "1 spills"),
        ("sum_rows", {"wide_loads": 0}, None),
        ("take_rows: gather", {"wide_stores": 0}, "no loads or stores of 16 bytes"),
        ("take_rows: gather", {"warps": 16}, None),
        ("ema_update", {"warps": 16}, "16 warps of 64"),
    ],
)
def test_what_a_kernel_that_moves_memory_may_not_have_is_named(static_gpu, name, change, message):
    memory = static_gpu.static_memory
    good = memory.Report(memory.Job(name, 90, "fp32", "fp32"), 40, 0, 0, 0, 8, 4, 4, 4, 64, 64)
    found = memory.problems(dataclasses.replace(good, **change))
    assert [message in x for x in found] == [True] if message else not found


def test_one_power_per_pair_serves_both_directions(results):
    seen = 0
    for k in results["kernels"]:
        job = k["job"]
        if job["name"] in ("sums: NT-Xent", "grad: NT-Xent"):
            assert k["powers_per_tile"] == job["tile"][0] * job["tile"][1], job
            seen += 1
    assert seen >= 20


def test_hopper_uses_its_own_matrix_instructions_and_pipelines_loads(static_gpu):
    job = static_gpu.Job("grad: NT-Xent", 90, "bf16", 128, static_gpu.tuning.Tile(128, 64, 8, 3))
    sass = _in_subprocess("compiled(job).asm['sass']", job)
    assert "HGMMA" in sass and "LDGSTS" in sass and "HMMA" not in sass.replace("HGMMA", "")


def test_predictions_are_for_every_card_and_above_the_floor(results):
    rows = results["predictions"]
    assert {row["arch"] for row in rows} == {80, 90, 100}
    assert all(row["times_floor"] >= 0.8 and row["ms"] > 0 for row in rows)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"spills": 1}, "1 spills"), ({"stack": 8}, "8 bytes of stack"), ({"stack": 10**4}, "more than 512"),
        ({"shared": 10**6}, "shared memory"), ({"matrix": 0}, "no matrix instruction"),
        ({"blocks_per_sm": 0}, "does not fit"), ({"loop": {"matrix": 12, "waits": 12}}, "wait after every"),
    ],
    ids=["spill", "stack", "large stack", "shared", "matrix", "occupancy", "serial"],
)  # fmt: skip
def test_what_is_not_fit_to_ship_is_named(static_gpu, change, message):
    job = static_gpu.Job("grad: NT-Xent", 90, "bf16", 128, static_gpu.tuning.Tile(128, 64, 8, 3))
    good = static_gpu.Report(
        job, 200, 0, 0, 80_000, 12, 1, {"instructions": 300, "powers": 32, "matrix": 12, "waits": 2}
    )
    assert not static_gpu.problems(good)
    assert any(message in problem for problem in static_gpu.problems(dataclasses.replace(good, **change)))


def test_a_spilling_configuration_is_found(static_gpu):
    job = static_gpu.Job("grad: NT-Xent", 80, "bf16", 128, static_gpu.tuning.Tile(128, 128, 4, 2))
    assert "spills" in _in_subprocess("problems(report(job))", job)


def _in_subprocess(expression: str, job) -> str:
    """A compiling process: this one's Triton interprets."""
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); from static_gpu import *; "
        f"job = Job({job.name!r}, {job.arch}, {job.dtype!r}, {job.width}, tuning.{job.tile!r}); "
        f"print({expression})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
