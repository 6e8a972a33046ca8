"""ema_update_ of Triton in its interpreter, on a GPU where there is one, and of CUDA in its compiler."""

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from interpreter import grid_order, interpreted, launches
from sslfast.kernels import tuning
from torch import nn

import sslfast
from sslfast import ema_update_
from sslfast.ops import _backend, ema
from sslfast.testing import CASES, assert_close_to_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
PAIRS = list(itertools.product(DTYPES, DTYPES))


def lists(shapes, dtype=torch.float32, source=None):
    return [torch.randn(s).to(dtype) for s in shapes], [torch.randn(s).to(source or dtype) for s in shapes]


# Triton's kernel in its interpreter


@pytest.mark.parametrize("reverse", [False, True], ids=["in order", "permuted"])
@pytest.mark.parametrize("target, source", PAIRS, ids=str)
@interpreted
def test_triton(target, source, reverse, monkeypatch):
    """Every pair of dtypes, with a canary around each target, whatever the order of the programs."""
    monkeypatch.setattr(tuning, "EMA_SEGMENT", 2 * tuning.EMA_BLOCK)
    shapes = ((5 * tuning.EMA_BLOCK + 3,), (1,), (4, 7), (0,), (2 * tuning.EMA_BLOCK,))
    for momentum, offset in ((0.3, 0), (0.99, 1), (torch.tensor(0.9), 0)):
        with sslfast.use_backend("triton"), grid_order(reverse):
            targets, sources = lists(shapes, target, source)
            guarded = [t.new_full((t.numel() + 8,), torch.nan) for t in targets]
            inside = [
                g[3 + offset :][: t.numel()].view(t.shape) for g, t in zip(guarded, targets, strict=True)
            ]
            for x, t in zip(inside, targets, strict=True):
                x.copy_(t)
            ema_update_(inside, sources, momentum)
        ema.reference(targets, sources, momentum)
        for x, t, g in zip(inside, targets, guarded, strict=True):
            torch.testing.assert_close(x, t, rtol=2 * torch.finfo(target).eps, atol=1e-6)
            assert int(g.isnan().sum()) == 8


@pytest.mark.parametrize("case", CASES["ema_update_"], ids=lambda case: case.name)
@interpreted
def test_triton_case(case):
    for dtype in DTYPES:
        with sslfast.use_backend("triton"):
            assert_close_to_reference("ema_update_", case.inputs(dtype))


@interpreted
def test_triton_is_exact_at_both_ends_and_launches_once_per_pair_of_dtypes(monkeypatch):
    names = launches(monkeypatch)
    targets, sources = lists(((5000,), (3,), (7, 7)))
    old = [t.clone() for t in targets]
    with sslfast.use_backend("triton"):
        ema_update_(targets, sources, 1.0)
        assert all(torch.equal(t, x) for t, x in zip(targets, old, strict=True)) and names == ["ema_update"]
        ema_update_(targets, sources, torch.tensor(0.0, dtype=torch.float64))
        assert all(torch.equal(t, s) for t, s in zip(targets, sources, strict=True))
        more, half = lists(((4,), (5,)), torch.bfloat16)
        names.clear()
        ema_update_(targets + more, sources + half, 0.5)
    assert names == ["ema_update"] * 2


# On a GPU


@gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_gpu_no_host_read_graph_and_streams(backend):
    if reason := _backend.why_not("ema_update_", backend, "cuda", torch.float32):
        pytest.skip(reason)
    targets, sources = ([x.cuda() for x in side] for side in lists(((5000,), (3,), (64, 64))))
    more, half = ([x.cuda() for x in side] for side in lists(((777,), (3, 5)), torch.float32, torch.bfloat16))
    targets, sources = targets + more, sources + half
    momentum = torch.tensor(0.5, dtype=torch.float64, device="cuda")
    expected = [t.clone() for t in targets]
    with sslfast.use_backend(backend):
        with pytest.raises(RuntimeError, match="before the capture"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                ema_update_(targets, sources, momentum)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for value in (momentum, 0.25):
                ema_update_(targets, sources, value)
                ema.reference(expected, sources, value)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ema_update_(targets, sources, momentum)
        for value in (0.9, 0.1):
            momentum.fill_(value)
            graph.replay()
            ema.reference(expected, sources, value)
        for t, e in zip(targets, expected, strict=True):
            torch.testing.assert_close(t, e, rtol=1e-6, atol=1e-6)
        stream = torch.cuda.Stream()
        late = [torch.zeros_like(t) for t in targets]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            torch._foreach_copy_(late, sources)
            ema_update_(targets, late, 0.0)
        stream.synchronize()
        assert all(torch.equal(t, s.float()) for t, s in zip(targets, sources, strict=True))


@gpu
def test_gpu_teacher_in_a_graph():
    student = nn.Sequential(*(nn.Linear(16, 16) for _ in range(20))).cuda()
    teacher = sslfast.EMATeacher(student, torch.tensor(0.5, dtype=torch.float64, device="cuda"))
    teacher.update(student)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        teacher.update(student)
    expected = [p.clone() for p in teacher.parameters()]
    for _ in range(3):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p))
        graph.replay()
        ema.reference(expected, list(student.parameters()), 0.5)
    for p, e in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-6, atol=1e-6)


# nvcc


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_cuda_kernels_compile_without_spills(arch, tmp_path):
    source = Path(__file__).parents[1] / "csrc/cuda/ema.cu"
    flags = ["-std=c++17", "-O3", f"-arch=sm_{arch}", "-Werror", "all-warnings", "-Xptxas", "-v"]
    command = ["nvcc", *flags, "-c", str(source), "-o", str(tmp_path / "ema.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(PAIRS)
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)) <= 32  # all warps fit


def test_the_built_module_has_the_cuda_kernels_where_nvcc_is():
    from sslfast import _C

    refused = _backend.why_not("ema_update_", "cuda", "cuda", torch.float32)
    if hasattr(_C, "ema_update_cuda"):
        assert refused is None or "CUDA" in refused
        assert _C.ema_update_cuda(0, 0, 0, 0, 0.5, 0, False, 0) is None  # nothing to launch
        with pytest.raises(ValueError, match="no such floating dtype"):
            _C.ema_update_cuda(0, 0, 4, 0, 0.5, 0, False, 0)
    else:
        assert refused == "it was built without nvcc"


def test_a_segment_is_whole_blocks():
    assert tuning.EMA_SEGMENT % tuning.EMA_BLOCK == 0
