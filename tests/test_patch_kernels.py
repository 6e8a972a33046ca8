"""The kernels of patches of Triton: in its interpreter every case, buffers with guards, ids out of range and
launches, on a GPU, where there is one, graphs and streams."""

import pytest
import torch
from interpreter import INTERPRETED, grid_order, guarded, inside_nan, interpreted, launches
from sslfast.kernels import tuning
from torch import Tensor

import sslfast
from sslfast import (
    embed_visible_patches,
    gather_patches,
    masked_patch_mse,
    random_patch_mask,
    restore_patches,
)
from sslfast.testing import CASES, OPS, assert_close_to_reference

NAMES = ("gather_patches", "restore_patches", "embed_visible_patches", "masked_patch_mse")
BY_NAME = {op: {case.name: case for case in CASES[op]} for op in NAMES}
STATISTICS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def leaf(*shape, device="cpu"):
    return torch.randn(shape, device=device).requires_grad_()


# Triton's kernels in their interpreter

# (dtype, of how many cases one is taken): of the others none of the largest, which take seconds each.
RUNS = [(torch.float32, 1), (torch.bfloat16, 2), (torch.float16, 4), (torch.float64, 6)]
LARGE = {"several threads", "many mask tokens"}
CHOSEN = [
    (op, case, dtype)
    for op in NAMES
    for dtype, every in RUNS
    for case in CASES[op][::every]
    if every == 1 or case.name not in LARGE
]


@pytest.mark.parametrize("op, case, dtype", CHOSEN, ids=lambda x: getattr(x, "name", str(x)))
@interpreted
def test_triton_case(op, case, dtype):
    """Programs out of order, buffers of NaN with guards around them, inputs among NaN."""
    inputs = {k: inside_nan(x) if isinstance(x, Tensor) else x for k, x in case.inputs(dtype).items()}
    with sslfast.use_backend("triton"), grid_order(True), guarded():
        assert_close_to_reference(op, inputs, rounds_tiles=dtype.itemsize == 2)


SMALL = [
    ("gather_patches", "repeated"),
    ("restore_patches", "repeated"),
    ("restore_patches", "all the mask token"),
    ("embed_visible_patches", "colours"),
    ("masked_patch_mse", "weights"),
    ("masked_patch_mse", "uint8"),
]


@pytest.mark.parametrize("op, name", SMALL)
@interpreted
def test_rows_and_patches_in_many_pieces(op, name, monkeypatch):
    monkeypatch.setattr(tuning, "PATCH_PIXELS", 16)
    monkeypatch.setattr(tuning, "PATCH_BLOCK", 4)
    monkeypatch.setattr(tuning, "PATCH_TILE", 16)
    with sslfast.use_backend("triton"), guarded():
        assert_close_to_reference(op, BY_NAME[op][name].inputs(torch.float32))


@pytest.mark.parametrize("op, name", SMALL)
@interpreted
def test_same_bits_whatever_the_order_of_programs(op, name):
    inputs = BY_NAME[op][name].inputs(torch.float32)

    def once(reverse: bool) -> list[Tensor]:
        leaves = {
            k: x.clone().requires_grad_() for k, x in inputs.items() if k in ("a", "mask_token", "pos_embed")
        }
        with sslfast.use_backend("triton"), grid_order(reverse):
            out = OPS[op].run(**{**inputs, **leaves})
            return [out.detach(), *torch.autograd.grad(out.sin().sum(), list(leaves.values()))]

    assert all(torch.equal(x, y) for x, y in zip(once(False), once(True), strict=True))


@pytest.mark.parametrize("layout", ["one number", "one row", "gaps", "transposed"])
@pytest.mark.parametrize("op", NAMES[:3])
@interpreted
def test_upstream_gradients_of_any_strides(op, layout):
    inputs = BY_NAME[op]["repeated"].inputs(torch.float32)
    batch, rows, dim = shape = OPS[op].reference(**inputs).shape
    upstream = {
        "one number": torch.tensor(1.5).expand(shape),
        "one row": inside_nan(torch.randn(dim)).expand(shape),
        "gaps": torch.randn(batch, rows, 2 * dim)[..., ::2],
        "transposed": torch.randn(dim, rows, batch).permute(2, 1, 0),
    }[layout]
    with sslfast.use_backend("triton"):
        assert_close_to_reference(op, inputs, upstream=[upstream])


@pytest.mark.parametrize("bad", [-1, 3, 2**40, -(2**40)])
@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=INTERPRETED)])
def test_ids_out_of_range_give_nan_and_touch_nothing(backend, bad):
    """Where nobody looked at them: in compiled code, and on a GPU."""
    tokens, pos, images = torch.randn(2, 3, 4), torch.randn(3, 4), torch.randn(2, 1, 2, 6)
    ids, ops, dtype = torch.tensor([[1, bad], [0, 2]]), torch.ops.sslfast, torch.float32
    with guarded():
        taken = [
            ops.take_patches(inside_nan(tokens), ids, None, None, False, dtype, backend),
            ops.take_patches(inside_nan(tokens), ids, None, inside_nan(pos), False, dtype, backend),
            ops.take_patches(inside_nan(tokens[:, :2]), ids, None, inside_nan(pos), True, dtype, backend),
            ops.cut_patches(inside_nan(images), ids, 2, dtype, backend),
        ]
        restored = ops.take_patches(tokens, ids, pos[0], pos[:2], False, dtype, backend)
        dtokens, dpos, _ = ops.put_patches(torch.ones(2, 2, 4), ids, 3, dtype, True, True, False, backend)
        _, _, dtoken = ops.put_patches(torch.ones(2, 2, 4), ids, 3, dtype, False, False, True, backend)
    for out in taken if bad > 0 else (*taken, restored):
        assert out.isnan().all(2).tolist() == [[False, True], [False, False]] and int(out.isnan().sum()) == 4
    assert dtokens[:, :, 0].tolist() == [[0, 1, 0], [1, 0, 1]] and dpos[:, 0].tolist() == [1, 1, 1]
    assert dtoken.tolist() == [float(bad > 0)] * 4


@pytest.mark.parametrize("norm_pix", [False, True])
@interpreted
def test_what_is_not_masked_is_not_looked_at(norm_pix):
    pred, images, mask = torch.randn(1, 4, 12), torch.rand(1, 3, 4, 4), torch.tensor([[1.0, 0, 0.5, 0]])
    spoiled, images_too = pred.clone(), images.clone()
    spoiled[:, 1::2], images_too[..., 2:] = torch.nan, torch.nan
    results = []
    for x, pixels in ((pred, images), (spoiled, images_too)):
        with sslfast.use_backend("triton"):
            loss = masked_patch_mse(x.requires_grad_(), pixels, mask, patch_size=2, norm_pix=norm_pix)
        results.append((loss, *torch.autograd.grad(loss, x)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True)) and results[0][0] > 0


def example(device="cpu"):
    """Images, noise, and what a step below differentiates in."""
    leaves = [leaf(*s, device=device) for s in ((24, 3, 8, 8), (24,), (16, 24), (24,), (24, 192))]
    return torch.rand(8, 3, 32, 32, device=device), torch.rand(8, 16, device=device), leaves


def step(images, noise, leaves):
    """Mask, embed the visible patches, restore, predict pixels, loss, and all gradients."""
    weight, bias, pos, token, last = leaves
    ids, restore, mask = random_patch_mask(*noise.shape, 0.75, noise=noise)
    tokens = embed_visible_patches(images, ids, weight, bias, pos, patch_size=8)
    whole = restore_patches(tokens, restore, token, pos)
    loss = masked_patch_mse(whole @ last, images, mask, patch_size=8, norm_pix=True, **STATISTICS)
    loss = loss + gather_patches(whole, ids, pos).square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@interpreted
def test_a_whole_step():
    given, results = example(), []
    for backend in ("triton", "reference"):
        with sslfast.use_backend(backend):
            results.append(step(*given))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@interpreted
def test_launches(monkeypatch):
    """One for a forward pass, and no more for the gradients than are needed."""
    names, ids = launches(monkeypatch), torch.tensor([[0, 2], [1, 1]])
    tokens, pos, token, weight = leaf(2, 3, 4), leaf(3, 4), leaf(4), leaf(4, 1, 2, 2)
    images, mask = torch.rand(2, 1, 2, 6), torch.ones(2, 3)

    def launched(function, leaves):
        names.clear()
        with sslfast.use_backend("triton"):
            out = function()
        forward = tuple(names)
        names.clear()
        torch.autograd.grad(out.sum(), leaves)
        return forward, tuple(names)

    def restored():
        return restore_patches(tokens, ids, token, pos[:2])

    assert launched(lambda: gather_patches(tokens, ids), tokens) == (("take_rows",), ("places", "put_rows"))
    gathered = launched(lambda: gather_patches(tokens, ids, pos), (tokens, pos))
    assert gathered == (("take_rows",), ("places", "put_rows", "sum_rows"))
    ids = torch.tensor([[0, 1], [1, 1]])
    tokens = leaf(2, 1, 4)
    assert launched(restored, (tokens, token, pos)) == (("take_rows",), ("places", "put_rows", "sum_fill"))
    tokens = tokens.detach()
    assert launched(restored, (token, pos)) == (("take_rows",), ("sum_fill",))

    def embedded():
        return embed_visible_patches(images, ids, weight, None, pos, patch_size=2)

    assert launched(embedded, (weight, pos)) == (
        ("cut_rows", "take_rows"),
        ("cut_rows", "places", "sum_rows"),
    )
    pos = None
    assert launched(embedded, weight) == (("cut_rows",), ("cut_rows",))
    for pred, backward in (
        (leaf(2, 3, 4), "scale"),
        (leaf(2, 3, 4).detach().half().requires_grad_(), "patch_error"),
    ):
        found = launched(lambda p=pred: masked_patch_mse(p, images, mask, patch_size=2), pred)
        assert found == (("patch_error",), (backward,))


# On a GPU


def calls(device):
    """(function, what it differentiates in) of each op, mean and std given as numbers."""
    images, noise, (weight, bias, pos, token, _) = example(device)
    ids, restore, _ = mask = random_patch_mask(*noise.shape, 0.75, noise=noise)
    tokens, pred, half = (leaf(8, *s, device=device) for s in ((16, 24), (16, 192), (16, 192)))
    half, pixels = half.detach().half().requires_grad_(), (images * 255).byte()

    def error(x, pixels):
        return 2 * masked_patch_mse(x, pixels, mask.mask, patch_size=8, norm_pix=True, **STATISTICS)

    return {
        "gather": (lambda: gather_patches(tokens, ids, pos), (tokens, pos)),
        "restore": (lambda: restore_patches(tokens[:, :4], restore, token, pos), (tokens, token, pos)),
        "embed": (
            lambda: embed_visible_patches(images, ids, weight, bias, pos, patch_size=8), (weight, bias, pos)
        ),
        "error": (lambda: error(pred, images), (pred,)),
        "error, float16 and uint8": (lambda: error(half, pixels), (half,)),
    }  # fmt: skip


@pytest.fixture
def no_sync():
    """Within its block the host may not wait for the GPU."""
    mode = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("name", ["gather", "restore", "embed", "error", "error, float16 and uint8"])
@gpu
def test_gpu_no_host_read(name, no_sync):
    function, leaves = calls("cuda")[name]
    expected = [function(), *torch.autograd.grad(function().sum(), leaves)]
    torch.cuda.synchronize()
    no_sync()
    out = function()
    found = [out, *torch.autograd.grad(out.sum(), leaves)]
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@gpu
def test_gpu_graph_of_a_whole_step():
    images, noise, leaves = example("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(images, noise, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(images, noise, leaves)
    for _ in range(2):
        images.uniform_(), noise.uniform_()
        graph.replay()
        torch.testing.assert_close(captured, step(images, noise, leaves), rtol=1e-4, atol=1e-5)


@gpu
def test_gpu_other_streams():
    given = example("cuda")
    expected = step(*given)
    images, noise = (torch.zeros_like(x) for x in given[:2])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # on any other stream the kernels would see zeros
        torch.cuda._sleep(50_000_000)
        images.copy_(given[0]), noise.copy_(given[1])
        found = step(images, noise, given[2])
    stream.synchronize()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@gpu
def test_gpu_ids_are_looked_at_when_asked(monkeypatch):
    x, ids = torch.randn(2, 3, 4, device="cuda"), torch.tensor([[0, 3], [1, 2]], device="cuda")
    images, weight = torch.rand(2, 1, 2, 6, device="cuda"), torch.randn(4, 4, device="cuda")
    for out in (gather_patches(x, ids), embed_visible_patches(images, ids, weight, patch_size=2)):
        assert out.isnan().all(2).tolist() == [[False, True], [False, False]]
    monkeypatch.setenv("SSLFAST_CHECK", "1")
    for name, call in (
        ("ids_keep", lambda: gather_patches(x, ids)),
        ("ids_keep", lambda: embed_visible_patches(images, ids, weight, patch_size=2)),
        ("ids_restore", lambda: restore_patches(x, -ids.repeat(1, 2), x[0, 0])),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected indices in "):
            call()
