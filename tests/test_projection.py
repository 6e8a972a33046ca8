"""The page of projections is what its script writes, and its arithmetic is that of sslfast.distributed."""

import importlib.util
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from sslfast.distributed import _ranks, _sharded, bytes_sent

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def projection():
    spec = importlib.util.spec_from_file_location("projection", BENCHMARKS / "projection.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["projection"] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes(projection) -> None:
    text = (BENCHMARKS / "PROJECTION.md").read_text()
    (written,) = (line for line in text.splitlines() if line.startswith("Written by"))
    assert projection.page(re.findall("`results/([^`]+)`", written)) == text


def test_measured_blocks_are_used_where_there_are_some(projection, tmp_path) -> None:
    shutil.copy(BENCHMARKS / "results" / "static.json", tmp_path)
    assert projection.sources(tmp_path) == ["static.json"]
    for name, kind, dtype, quick in (
        ("a-quick-run", "cpu", "float32", True), ("cpu", "cpu", "float32", False),
        ("nvidia-h100", "cuda", "bfloat16", False),
    ):  # fmt: skip
        rows = [
            {"form": form, "pass": which, "dim": dim, "n": n, "ms": n * n / 1e6}
            for form in ("NT-Xent, own", "NT-Xent", "CLIP")
            for which in projection.PASSES
            for dim in (128, 512)
            for n in (1024, 4096)
        ]
        blocks = {"device": name, "type": kind, "dtype": dtype, "torch": "2", "threads": 2, "quick": quick}
        (tmp_path / name).mkdir()
        (tmp_path / name / "distributed.json").write_text(json.dumps({"blocks": blocks | {"results": rows}}))
    files = projection.sources(tmp_path)
    assert files == ["nvidia-h100/distributed.json", "cpu/distributed.json"]
    assert "Kernel times were measured on one nvidia-h100" in projection.page(files, tmp_path)
    device = projection.measured(json.loads((tmp_path / files[1]).read_text())["blocks"])
    assert device.e == 4 and device.block(projection.CLIP, "forward", True, 500) == pytest.approx(0.25)
    assert projection.compute(device, projection.NTXENT, 8, 1024) == pytest.approx(2 * 8 * 2.048**2)


def test_bytes_by_hand(projection) -> None:
    """Of 3 processes with 2 images: 4 rows of 128 numbers, or 2 of 512, to 2 others."""
    found = [
        [projection.sent(loss, which, 3, 2, 2, 4, strategy) for which in projection.PASSES]
        for loss in (projection.NTXENT, projection.CLIP)
        for strategy in ("ring", "gather")
    ]
    assert found[0] == [2 * 4 * (256 + 8), 2 * 4 * (256 + 8 + 4 + 4)]
    assert found[1] == [found[0][0], 2 * 4 * (4 + 4)]
    assert found[2] == [2 * 2 * (1024 + 8 + 4), 2 * 2 * (1024 + 8 + 4 + 4 + 2048)]
    assert found[3] == [2 * 2 * (1024 + 8 + 4 + 4 + 4), 2 * 2 * (4 + 4 + 2048)]


@pytest.mark.parametrize("strategy", ["ring", "gather"])
@pytest.mark.parametrize("name", ["NTXENT", "CLIP"])
@pytest.mark.parametrize(("size", "images"), [(2, 3), (5, 2)])
def test_bytes_are_those_counted(projection, name, strategy, size, images, monkeypatch) -> None:
    """By one process of a group that sends nothing and receives what it finds in its memory."""
    for function, does in {
        "get_rank": lambda group: 1, "get_global_rank": lambda group, rank: rank, "P2POp": lambda *args: args,
        "batch_isend_irecv": lambda operations: [], "all_reduce": lambda *args, **options: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(dist, function, does)
    for function in ("all_gather", "reduce_scatter"):
        monkeypatch.setattr(_ranks, function, lambda out, x, group: out.zero_())
    ranks = _ranks.Ranks(object(), [images] * size, ring=strategy == "ring")
    loss = getattr(projection, name)
    a, b = torch.randn(2, loss.views * images, loss.dim).unbind()
    ids = ranks.images(a[:images]).repeat(loss.views)
    pair = (a.requires_grad_(), b.requires_grad_()) if loss is projection.CLIP else (a.requires_grad_(),)
    options = {"b_ids": ids, "return_cols": True} if len(pair) == 2 else {}
    before = bytes_sent()
    found = _sharded.similarity_lse(ranks, *pair, scale=10.0, a_ids=ids, **options)
    between = bytes_sent()
    torch.autograd.backward(found, [torch.ones(len(a))] * len(pair) if len(pair) == 2 else torch.ones(len(a)))
    counted = [between - before, bytes_sent() - between]
    assert counted == [
        projection.sent(loss, which, size, images, 4, 4, strategy) for which in ("forward", "backward")
    ]


def test_limits(projection) -> None:
    device = projection.Device(lambda loss, which, itself, rows: 3.0 if itself else 2.0, 2)
    fast, slow = projection.Link("", math.inf, 0), projection.Link("", 1e-6, 0)
    for loss in (projection.NTXENT, projection.CLIP):
        for strategy in ("ring", "gather"):
            for size, images in ((1, 8), (2, 8), (8, 1024), (8, 65536)):
                alone = projection.compute(device, loss, size, images)
                args = device, loss, size, images
                assert projection.step(*args, fast, strategy) == pytest.approx(alone)
                assert alone == pytest.approx(2 * (3 + 2 * (size - 1)))
                count = sum(projection.sent(loss, x, size, images, 2, 4, strategy) for x in projection.PASSES)
                assert (count == 0) == (size == 1)
                if size > 1:  # a link so slow that nothing else counts: bytes / v
                    assert projection.step(*args, slow, strategy) == pytest.approx(count, rel=0.01)


def test_a_ring_by_hand(projection) -> None:
    """CLIP backward, 3 processes: a piece of 8 rows has 8,320 bytes, and 16,384 go home with it."""
    device = projection.Device(lambda loss, which, itself, rows: 3.0 if itself else 2.0, 2)
    link = projection.Link("", 0.01, 1000)  # 10,000 bytes and a latency take 1 ms each
    there, home = 1 + 0.832, 1 + 1.6384
    found = projection.ring(device, projection.CLIP, "backward", 3, 8, link)
    assert found == pytest.approx(max(3, there) + max(2, there) + max(2, home) + home)
