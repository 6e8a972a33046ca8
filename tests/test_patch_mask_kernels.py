"""random_patch_mask and block_patch_mask of Triton in its interpreter, on a GPU where there is one, and of
CUDA in its compiler."""

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from interpreter import grid_order, guarded, inside_nan, interpreted, launches
from sslfast.kernels import tuning

import sslfast
from sslfast import PatchMask, block_patch_mask, random_patch_mask
from sslfast.ops import _backend, block_mask, patch_mask
from sslfast.ops._check import FLOATS
from sslfast.testing import CASES

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
BEIT = {"ratio_range": (16 / 196, 75 / 196), "aspect_range": (0.3, 1 / 0.3)}


def assert_same(ours, theirs) -> None:
    torch.testing.assert_close([x.cpu() for x in ours], list(theirs), rtol=0, atol=0)


# Triton's kernels in its interpreter


@pytest.fixture
def poisoned(monkeypatch):
    """Masks that a kernel fills, and what it reads, lie in buffers of NaN."""
    given = patch_mask._sorted
    monkeypatch.setattr(patch_mask, "_sorted", lambda x: (inside_nan(given(x)[0]), given(x)[1]))
    monkeypatch.setattr(torch, "empty_like", lambda x: x.new_empty(x.shape))


@pytest.mark.parametrize(
    "case, dtype",
    [(c, t) for c in CASES["random_patch_mask"] for t in FLOATS if c.length <= 50 or t == torch.float32],
    ids=lambda x: getattr(x, "name", str(x)),
)
@interpreted
def test_triton_random_case(case, dtype, poisoned):
    noise = case.inputs(dtype)["a"]
    with sslfast.use_backend("triton"), grid_order(True), guarded():
        ours = random_patch_mask(*noise.shape, case.ratio, noise=noise)
    assert_same(ours, patch_mask.reference(noise, int(case.length * (1 - case.ratio))))


@pytest.mark.parametrize("length", [31, 32, 33, 100, 1025])
@interpreted
def test_triton_rows_that_a_program_does_not_sort(length, poisoned, monkeypatch):
    monkeypatch.setattr(tuning, "MASK_SORT", 32)
    noise = (4 * torch.randn(3, length)).round()
    with sslfast.use_backend("triton"), grid_order(True), guarded():
        ours = random_patch_mask(3, length, 0.6, noise=noise)
    assert_same(ours, patch_mask.reference(noise, int(length * (1 - 0.6))))


@pytest.mark.parametrize("case", CASES["block_patch_mask"], ids=lambda case: case.name)
@interpreted
def test_triton_block_case(case, poisoned):
    draws, noise, counts, rule = case.inputs().values()
    tensors = [x if x is None else inside_nan(x) for x in (draws, noise, counts)]
    with sslfast.use_backend("triton"), grid_order(True), guarded():
        mask = block_mask.blocks(*tensors, rule)
    assert_same([mask], [block_mask.block_reference(draws, noise, counts, rule)])


@pytest.mark.parametrize("count", [None, 3], ids=["one block", "counts"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (4, 4)], ids=str)
@interpreted
def test_triton_narrow_grids(grid, count, poisoned):
    """Specialised where a side is 1, and without a patch to spare where the grid is a power of two."""
    options = {"ratio_range": (0.2, 0.6), "aspect_range": (0.2, 5.0)}
    count = None if count is None else min(count, math.prod(grid))
    masks = []
    for backend in ("triton", "reference"):
        generator = torch.Generator().manual_seed(2)
        with sslfast.use_backend(backend):
            masks.append(block_patch_mask(5, grid, num_masked=count, generator=generator, **options))
    assert torch.equal(*masks)


@interpreted
def test_triton_launches_once_and_not_for_no_image(monkeypatch):
    names = launches(monkeypatch)
    with sslfast.use_backend("triton"):
        random_patch_mask(5, 49, 0.75)
        block_patch_mask(5, (7, 7), num_masked=20, **BEIT)
        block_patch_mask(5, (7, 7), **BEIT)
        random_patch_mask(2, tuning.MASK_SORT + 1, 0.75)
        PatchMask.from_mask(torch.eye(4), 1)
        assert names == ["random_mask", "block_mask", "block_mask", "random_mask", "random_mask"]
        random_patch_mask(0, 49, 0.75)
        block_patch_mask(0, (7, 7), **BEIT)
    assert len(names) == 5


# On a GPU, and on every instruction set of the CPU


def a_side_that_rounds_to_a_half(device: str) -> list[float]:
    """3 + draw * 6.1 is 6.25 when rounded once, and less when rounded twice, as plain PyTorch does."""
    draws = torch.tensor([[[0.5327868852459015, 1.0, 0.0, 0.0]]], dtype=torch.float64, device=device)
    rule = block_mask.BlockRule(6, 6, 3.0, 9.1)
    return block_mask.blocks(draws, torch.zeros(1, 36, device=device), None, rule).sum(1).tolist()


def test_numbers_are_rounded_as_often_on_every_instruction_set(isa):
    assert a_side_that_rounds_to_a_half("cpu") == [4]


@interpreted
def test_triton_rounds_numbers_as_often():
    with sslfast.use_backend("triton"):
        assert a_side_that_rounds_to_a_half("cpu") == [4]


@pytest.fixture(params=["triton", "cuda"])
def on_gpu(request):
    if reason := _backend.why_not("random_patch_mask", request.param, "cuda", torch.float32):
        pytest.skip(reason)
    with sslfast.use_backend(request.param):
        yield request.param


@gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 48, 49, 196, 1024, 4096, 4097, 65536])
def test_gpu_random_is_the_cpu_s(length, dtype, on_gpu):
    """Uniform, few numbers, special, random bits."""
    noise = torch.rand(4, length, dtype=torch.float64).to(dtype)
    noise[1] = (noise[1] * 3).floor() - 1
    special = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0]).to(dtype)
    noise[2] = torch.where(noise[2] < 0.5, special[torch.randint(6, (length,))], noise[2])
    noise[3] = torch.randint(-(2**63), 2**63 - 1, (length,)).view(dtype)[:length]
    for ratio in (0, 0.75, 1):
        ours = random_patch_mask(4, length, ratio, noise=noise.cuda())
        assert_same(ours, patch_mask.reference(noise, int(length * (1 - ratio))))


@gpu
@pytest.mark.parametrize("case", CASES["block_patch_mask"], ids=lambda case: case.name)
def test_gpu_blocks_are_the_cpu_s(case, on_gpu):
    for seed in range(3):
        draws, noise, counts, rule = case.inputs(seed=seed).values()
        ours = block_mask.blocks(
            draws.cuda(), noise.cuda(), counts if counts is None else counts.cuda(), rule
        )
        with sslfast.use_backend("cpu"):
            assert_same([ours], [block_mask.blocks(draws, noise, counts, rule)])


@gpu
def test_gpu_rounds_numbers_as_often(on_gpu):
    assert a_side_that_rounds_to_a_half("cuda") == [4]


@gpu
def test_gpu_host_does_not_wait(on_gpu):
    counts = torch.tensor([0, 10, 196], device="cuda")
    given = torch.eye(8, device="cuda")
    generator = torch.Generator("cuda").manual_seed(1)

    def draw():
        for options in ({"device": "cuda"}, {"generator": generator}):
            kept = random_patch_mask(3, 196, 0.75, **options).ids_keep
            masks = [
                block_patch_mask(3, (14, 14), num_masked=n, **BEIT, **options) for n in (None, 75, counts)
            ]
        return kept, masks, PatchMask.from_mask(given, 1).ids_keep

    draw()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept, masks, visible = draw()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert kept.shape == (3, 49) and (masks[1].sum(1) == 75).all() and (masks[2].sum(1) == counts).all()
    assert_same([visible], [torch.tensor([[k for k in range(8) if k != i] for i in range(8)])])


@gpu
def test_gpu_generator_decides(on_gpu):
    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.cat(
            (
                random_patch_mask(3, 196, 0.75, generator=generator).mask,
                block_patch_mask(3, (14, 14), num_masked=75, generator=generator, **BEIT),
                block_patch_mask(3, (14, 14), generator=generator, **BEIT),
            )
        )

    first, other = draw(1), draw(2)
    assert torch.equal(draw(1), first) and not any(map(torch.equal, first, other))


@gpu
def test_gpu_graph(on_gpu):
    """Replays follow what is in their inputs, and draw anew each time."""
    noise, counts = torch.rand(3, 196, device="cuda"), torch.tensor([0, 10, 196], device="cuda")

    def step():
        drawn = random_patch_mask(3, 196, 0.75, device="cuda")
        blocks = block_patch_mask(3, (14, 14), num_masked=counts, **BEIT)
        return random_patch_mask(3, 196, 0.75, noise=noise), drawn.mask, blocks

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given, drawn, blocks = step()
    seen = []
    for _ in range(3):
        noise.uniform_()
        counts.copy_(torch.randint(1, 196, (3,)))
        graph.replay()
        assert_same(given, patch_mask.reference(noise.cpu(), 49))
        assert (drawn.sum(1) == 147).all() and (blocks.sum(1) == counts).all()
        seen.append(drawn.clone())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


# nvcc


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_cuda_kernels_compile_without_spills(arch, tmp_path):
    source = Path(__file__).parents[1] / "csrc/cuda/patch_mask.cu"
    flags = ["-std=c++17", "-O3", f"-arch=sm_{arch}", "-Werror", "all-warnings", "-Xptxas", "-v"]
    command = ["nvcc", *flags, "-c", str(source), "-o", str(tmp_path / "patch_mask.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 3


def test_the_built_module_checks_what_the_cuda_kernels_are_given():
    from sslfast import _C

    refused = _backend.why_not("random_patch_mask", "cuda", "cuda", torch.float32)
    if not hasattr(_C, "random_patch_mask_cuda"):
        assert refused == "it was built without nvcc"
        return
    assert refused is None or "CUDA" in refused
    addresses = (0, 0, 0, 0)
    assert _C.random_patch_mask_cuda(0, 49, 12, 0, False, *addresses) is None  # nothing to launch
    assert _C.block_patch_mask_cuda(0, 64, (7, 7, 1, 9), 1.0, 9.0, 0, *addresses) is None
    for batch, length, keep in ((-1, 49, 12), (0, -1, 0), (0, 49, -1), (0, 49, 50), (0, 2**31, 12)):
        with pytest.raises(ValueError, match="sizes must be positive"):
            _C.random_patch_mask_cuda(batch, length, keep, 0, False, *addresses)
    for batch, tries, height, width in (
        (-1, 64, 7, 7),
        (0, 0, 7, 7),
        (0, 64, 0, 7),
        (0, 64, 7, -1),
        (0, 64, 2**11, 2**10),
    ):
        with pytest.raises(ValueError, match="sizes must be positive"):
            _C.block_patch_mask_cuda(batch, tries, (height, width, 1, 9), 1.0, 9.0, 0, *addresses)
