"""masked_patch_mse and masked_patch_l1 beyond the cases of tests/test_backends.py: plain loops, what is not
masked, upstream gradients, compilers, peak memory of all ops on patches, errors."""

import itertools
import subprocess
import sys
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import guarded, inside_nan
from torch import Tensor
from torch.nn import functional as F

import sslfast
from sslfast import _C, masked_patch_l1, masked_patch_mse
from sslfast.ops._check import FLOATS
from sslfast.testing import CASES, assert_close_to_reference
from sslfast.testing._patches import MseCase

OP = "masked_patch_mse"
STATISTICS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}


@pytest.fixture(autouse=True)
def on_cpu():
    with sslfast.use_backend("cpu"):
        yield


def example(dtype=torch.float32, kind=None, batch=2):
    """Predictions for six patches of 4 x 4 pixels of three colours, images, and a mask of two thirds."""
    images = torch.rand(batch, 3, 8, 12)
    images = (images * 256).byte() if kind == "uint8" else images.to(kind or dtype)
    mask = (torch.rand(batch, 6).argsort(1) < 4).float()
    return torch.randn(batch, 6, 48).to(dtype).requires_grad_(), images, mask


def gradient(loss, pred, **options):
    return torch.autograd.grad(loss, pred, **options)[0]


# Numbers


def looped(pred, images, mask, patch_size, norm_pix=False, mean=None, std=None, absolute=False):
    """MAE's formula, one patch at a time, in float64."""
    images = images.double() / (255 if images.dtype == torch.uint8 else 1)
    if mean is not None:
        mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (mean, std))
        images = (images - mean) / std
    total, across = 0.0, images.shape[3] // patch_size
    for b, place in itertools.product(range(len(pred)), range(pred.shape[1])):
        y, x = (patch_size * i for i in divmod(place, across))
        target = images[b, :, y : y + patch_size, x : x + patch_size].permute(1, 2, 0).flatten()
        if norm_pix:
            target = target - target.mean()
            target = target / (target.square().sum() / (len(target) - 1) + 1e-6).sqrt()
        difference = pred[b, place].double() - target
        total = total + mask[b, place].double() * (difference.abs() if absolute else difference**2).mean()
    return total / mask.double().sum()


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, "uint8"], ids=str)
@pytest.mark.parametrize("function", [masked_patch_mse, masked_patch_l1])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_against_loops(norm_pix, function, kind, isa):
    """With weights, a patch of one colour, and an upstream gradient of 3."""
    pred, images, mask = example(torch.float64, kind)
    mask[0, :2], mask[1, 4], images[0, :, :4, :4] = 0.25, 1.5, 1
    for statistics in (STATISTICS,) if kind == "uint8" else ({}, STATISTICS):
        options = {"patch_size": 4, "norm_pix": norm_pix, **statistics}
        ours = function(pred, images, mask, **options)
        expected = looped(pred, images, mask, absolute=function is masked_patch_l1, **options)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(gradient(3 * ours, pred), gradient(3 * expected, pred))


def test_the_variance_is_a_sample_s():
    """0 and 2 have the variance 2; divided by their number it would be 1."""
    images, pred = torch.tensor([0.0, 2.0]).double().view(1, 2, 1, 1), torch.zeros(1, 1, 2).double()
    loss = masked_patch_mse(pred, images, torch.ones(1, 1), patch_size=1, norm_pix=True)
    assert loss.item() == pytest.approx(1 / (2 + 1e-6), rel=1e-12)


def test_gradcheck():
    pred, images, mask = example(torch.float64)

    def both(x):
        options = {"patch_size": 4, "norm_pix": True}
        return masked_patch_mse(x, images, mask, **options), masked_patch_l1(x, images, mask, **options)

    assert torch.autograd.gradcheck(both, pred)


def drawn_case(
    grid: tuple[int, int], patch: int, channels: int, norm_pix: bool, statistics: bool, batch: int,
    mask: Literal["random", "none", "all", "weights"], layout: Literal["", "behind", "gaps", "expanded"],
    kind: Literal["", "last", "gaps", "float32", "uint8"], absolute: bool,
) -> MseCase:  # fmt: skip
    return MseCase(
        "", batch, channels, grid[0] * patch, grid[1] * patch, patch, kind=kind, mask=mask, layout=layout,
        absolute=absolute and kind != "uint8", norm_pix=norm_pix and patch > 1,
        statistics=statistics or kind == "uint8",
    )  # fmt: skip


FOUR = st.integers(1, 4)
DRAWN = st.builds(drawn_case, grid=st.tuples(FOUR, FOUR), patch=st.integers(1, 9), channels=FOUR, batch=FOUR)


# Without what rounding decides: in float64 the yardstick is the truth itself, however ill-conditioned a patch
# is, and uint8 pixels may equal 16-bit predictions, so that the absolute error has no slope there.
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(case=DRAWN, dtype=st.sampled_from(FLOATS[:3]), seed=st.integers(0, 9))
def test_drawn_case(case, dtype, seed):
    inputs, rounds = case.inputs(dtype, seed=seed), dtype == torch.bfloat16
    assert_close_to_reference(OP, inputs, seed=seed, rounds_tiles=rounds)


@pytest.mark.parametrize("case", CASES[OP], ids=lambda case: case.name)
def test_every_place_is_written_and_no_other(case, isa):
    """Buffers are NaN before a kernel writes them, and inputs lie among NaN."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = {k: inside_nan(x) if isinstance(x, Tensor) else x for k, x in case.inputs(dtype).items()}
        with guarded():
            assert_close_to_reference(OP, inputs, upstream=[torch.tensor(2.0)])


@pytest.mark.parametrize("norm_pix", [False, True])
def test_uint8_images_are_those_from_0_to_1(norm_pix):
    pred, images, mask = example(kind="uint8")
    mean, std = (torch.tensor(x) for x in STATISTICS.values())
    pixels = (images / 255 - mean[:, None, None]) / std[:, None, None]
    ours = masked_patch_mse(pred, images, mask, patch_size=4, norm_pix=norm_pix, **STATISTICS)
    expected = masked_patch_mse(pred, pixels, mask, patch_size=4, norm_pix=norm_pix)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(ours, pred), gradient(expected, pred), rtol=1e-5, atol=1e-8)
    options = {"norm_pix": norm_pix, "mean": mean.double(), "std": std.view(3, 1, 1)}
    torch.testing.assert_close(masked_patch_mse(pred, images, mask, patch_size=4, **options), ours)


def test_masks_of_every_dtype():
    pred, images, mask = example()
    dtypes = (*FLOATS, torch.bool, torch.uint8, torch.int32, torch.int64)
    losses = [masked_patch_mse(pred, images, mask.to(t), patch_size=4) for t in dtypes]
    assert all(torch.equal(loss, losses[0]) for loss in losses) and losses[0].dtype == torch.float32


def test_simmim_s_loss():
    raw, images, mask = torch.randn(2, 48, 2, 3, requires_grad=True), torch.rand(2, 3, 8, 12), example()[2]
    pixels = mask.view(2, 1, 2, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    error = F.l1_loss(images, F.pixel_shuffle(raw, 4), reduction="none")
    expected = (error * pixels).sum() / (pixels.sum() + 1e-5) / 3
    pred = raw.view(2, 3, 4, 4, 6).permute(0, 4, 2, 3, 1).reshape(2, 6, 48)
    ours = masked_patch_l1(pred, images, mask, patch_size=4)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradient(ours, raw), gradient(expected, raw))


# What is masked, and what is not


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_is_not_masked_is_not_looked_at(dtype, backend):
    pred, images, mask = example(dtype)
    kept = mask == 0
    pixels = kept.view(2, 1, 2, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    with sslfast.use_backend(backend):
        for norm_pix, bad in itertools.product((False, True), (torch.nan, torch.inf)):
            spoiled = pred.detach().masked_fill(kept[..., None], bad).requires_grad_()
            images_too = images.masked_fill(pixels, bad)
            ours = masked_patch_mse(spoiled, images_too, mask, patch_size=4, norm_pix=norm_pix)
            expected = masked_patch_mse(pred, images, mask, patch_size=4, norm_pix=norm_pix)
            assert torch.equal(ours, expected) and ours > 0
            assert torch.equal(gradient(ours, spoiled), gradient(expected, pred))


@pytest.mark.parametrize("function", [masked_patch_mse, masked_patch_l1])
@pytest.mark.parametrize("where", ["pred", "images"])
def test_nan_in_a_masked_patch_is_nan(where, function):
    pred, images, mask = example()
    mask[1, 5] = 1
    with torch.no_grad():
        (pred[1, 5] if where == "pred" else images[1, :, 4:, 8:]).fill_(torch.nan)
    loss = function(pred, images, mask, patch_size=4)
    assert loss.isnan() and int(gradient(loss, pred).isnan().sum()) == 48


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_masked_gives_zero_and_no_gradient(dtype, backend):
    pred, images, mask = example(dtype)
    with sslfast.use_backend(backend):
        loss = masked_patch_mse(pred, images, mask * 0, patch_size=4, norm_pix=True)
    assert loss == 0 and (gradient(2 * loss, pred) == 0).all()


# Upstream gradients


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_backward_twice_gives_the_same_and_leaves_the_first(dtype):
    pred, images, mask = example(dtype)
    loss = 3 * masked_patch_mse(pred, images, mask, patch_size=4)
    first = gradient(loss, pred, retain_graph=True)
    expected = gradient(3 * looped(pred, images, mask, 4), pred)
    torch.testing.assert_close(first, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    before = first.clone()
    for keep in (True, False):  # the last may write over what it kept
        assert torch.equal(gradient(loss, pred, retain_graph=keep), before) and torch.equal(first, before)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradient(loss, pred)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_loss_scale_keeps_small_gradients(dtype):
    """About 1e-7 each, of which float16 can hold a digit."""
    pred = torch.randn(8, 64, 192).mul(0.01).to(dtype).requires_grad_()
    loss = masked_patch_mse(pred, torch.zeros(8, 3, 64, 64), torch.ones(8, 64), patch_size=8)
    ours, exact = gradient(65536 * loss, pred), 65536 * 2 / (8 * 64 * 192) * pred.detach().double()
    assert ours.dtype == dtype and (ours - exact).norm() < torch.finfo(dtype).eps / 2 * exact.norm()


LAYOUTS = {
    "behind a class token": lambda x: torch.cat((x[:, :1], x), 1)[:, 1:],
    "transposed": lambda x: x.mT.contiguous().mT,
    "gaps": lambda x: x.repeat_interleave(2, x.dim() - 1)[..., ::2],
    "other images between": lambda x: x.repeat_interleave(3, 0)[::3],
    "channels last": lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "lazily negated": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_any_strides(layout):
    pred, images, mask = example()
    change = LAYOUTS[layout]
    ours = masked_patch_mse(change(pred), change(images), change(mask[..., None])[..., 0], patch_size=4)
    expected = masked_patch_mse(pred, images, mask, patch_size=4)
    assert torch.equal(ours, expected) and torch.equal(gradient(ours, pred), gradient(expected, pred))


def test_inputs_are_not_modified():
    for dtype in FLOATS:
        pred, images, mask = example(dtype)
        inputs = [pred, images, mask, *(torch.tensor(x) for x in STATISTICS.values())]
        before = [x.detach().clone() for x in inputs]
        loss = masked_patch_mse(*inputs[:3], patch_size=4, norm_pix=True, mean=inputs[3], std=inputs[4])
        (5 * loss).backward()
        assert all(torch.equal(x, y) and x._version == 0 for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_gradient_is_computed_once_and_where_it_is_needed(dtype, monkeypatch):
    """In the forward pass, but for float16, whose upstream gradient has to come first."""
    asked, kernel = [], _C.masked_patch_mse
    monkeypatch.setattr(_C, "masked_patch_mse", lambda *args: asked.append(args[11] != 0) or kernel(*args))
    pred, images, mask = example(dtype)
    with torch.no_grad():
        masked_patch_mse(pred, images, mask, patch_size=4)
    masked_patch_mse(pred.detach(), images.requires_grad_(), mask, patch_size=4)
    assert asked == [False, False]
    loss = masked_patch_mse(pred, images, mask, patch_size=4)
    loss.backward()
    assert asked[2:] == ([True] if dtype == torch.float32 else [False, True]) and images.grad is None


def test_differentiable_once_on_cpu_and_twice_on_the_reference():
    pred, images, mask = example(torch.float64)
    for x in (pred, pred.detach().half().requires_grad_()):
        for ask in (lambda y: y.backward(), lambda y, x=x: torch.autograd.grad(y, x)):
            first = gradient(masked_patch_mse(x, images, mask, patch_size=4), x, create_graph=True)
            with pytest.raises(RuntimeError, match="differentiates once"):
                ask(first.square().sum())
    with sslfast.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda x: masked_patch_mse(x, images, mask, patch_size=4), pred)


def test_bits_do_not_depend_on_the_run_nor_those_of_the_gradient_on_threads(set_threads):
    images, mask, results = torch.rand(20, 3, 32, 32), torch.rand(20, 16), []
    pred = torch.randn(20, 16, 192, requires_grad=True)
    for threads in (1, 2, 3):
        set_threads(threads)
        first, again = (masked_patch_mse(pred, images, mask, patch_size=8, norm_pix=True) for _ in range(2))
        assert torch.equal(first, again) and torch.equal(gradient(first, pred), d := gradient(again, pred))
        results.append((first.detach(), d))
        torch.testing.assert_close(results[-1][0], results[0][0])
        assert torch.equal(results[-1][1], results[0][1])


def test_the_loss_lies_with_its_inputs_whatever_the_default_device():
    pred, images, mask = example()
    with torch.device("meta"):
        loss = masked_patch_mse(pred, images, mask, patch_size=4, **STATISTICS)
    assert loss.device == pred.device and loss.isfinite()


# Autocast, compilers, memory


def test_autocast_changes_nothing():
    pred, images, mask = example(torch.bfloat16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = masked_patch_mse(pred, images, mask, patch_size=4, norm_pix=True)
    expected = masked_patch_mse(pred, images, mask, patch_size=4, norm_pix=True)
    assert ours.dtype == torch.float32 and torch.equal(ours, expected)
    assert torch.equal(gradient(ours, pred), gradient(expected, pred))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compile(dtype):
    """Forward and backward, and again for a batch of another size."""

    def loss(pred, images, mask):
        normed = masked_patch_mse(pred, images, mask, patch_size=4, norm_pix=True, **STATISTICS)
        return 3 * normed + masked_patch_l1(pred, images, mask, patch_size=4, **STATISTICS)

    torch.compiler.reset()
    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for batch in (2, 5):
        pred, images, mask = example(dtype, "uint8", batch)
        ours, expected = fast(pred, images, mask), loss(pred, images, mask)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(gradient(ours, pred), gradient(expected, pred))
    torch.compiler.reset()


@pytest.mark.parametrize("kind", [torch.float32, "uint8"], ids=str)
def test_opcheck(kind):
    pred, images, mask = example(torch.bfloat16, kind)
    scale, shift = torch.rand(2, 3, dtype=torch.float64)
    for needed, upstream in ((False, None), (True, None), (True, torch.tensor(2.0))):
        arguments = (pred.detach(), images, mask, 4, True, scale, shift, False, needed, upstream, "cpu")
        torch.library.opcheck(torch.ops.sslfast.masked_patch_mse, arguments)


GROWTH = """
import torch, sslfast
def memory(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) >> 10 for line in status if line.startswith(kind))
def growth(function):
    before = memory("VmRSS")
    function().sum().backward()
    return memory("VmHWM") - before
pos, weight = torch.randn(196, 768, requires_grad=True), torch.randn(768, 768, requires_grad=True)
for b in (1, 128):
    images, ids, mask = torch.zeros(b, 3, 224, 224).add_(1), torch.arange(49).repeat(b, 1), torch.ones(b, 196)
    embed = growth(lambda: sslfast.embed_visible_patches(images, ids, weight, None, pos, patch_size=16))
    tokens = images.view(b, 196, 768).requires_grad_()
    loss = growth(lambda: 2 * sslfast.masked_patch_mse(tokens, images, mask, patch_size=16, norm_pix=True))
    tokens.grad = None
    gather = growth(lambda: sslfast.gather_patches(tokens, ids, pos))
print(embed, loss, gather)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in the units of Linux")
def test_peak_memory_of_all_ops_on_patches(tmp_path):
    """Kept patches of 128 images are 18 MB, all of them 74 MB. An embedding has pixels, tokens and gradients
    of kept ones only, the others one gradient of all; in PyTorch more than 160 MB. What the allocator keeps
    of an op before may stand beside it, so the smaller of two measurements counts."""
    command = [sys.executable, "-c", GROWTH]
    runs = [subprocess.run(command, capture_output=True, check=True, cwd=tmp_path) for _ in range(2)]
    measured = zip(*(map(int, run.stdout.split()) for run in runs), strict=True)
    assert max(map(min, measured)) < 100


# Refused

PRED, IMAGES, MASK = (x.detach() for x in example())
BAD = {
    "pred": [PRED[0], PRED[:, 1:], PRED[..., 1:], PRED[:1], PRED.long(), PRED.to("meta"), PRED.to_sparse()],
    "mask": [MASK[0], MASK[:, 1:], MASK[..., None], MASK.to(torch.complex64), MASK.to("meta"), [[1] * 6] * 2],
    "images": [IMAGES[0], IMAGES.long(), IMAGES.to("meta"), IMAGES[:, :, 0]],
    "patch_size": [0, -4, 5, 8, True, 4.0, "4"],
    "mean": [None, [0.5] * 2, 0.5, [0.5, torch.nan, 0.5], torch.zeros(2), torch.zeros(3).long(), "abc"],
    "std": [
        None, [0.5] * 4, 0.5, [0.5, 0.0, 0.5], [0.5, torch.inf, 0.5], [0.5, "1", 1], torch.ones(3, 2),
        torch.zeros(3), torch.tensor([0.5, torch.nan, 0.5]), torch.ones(3, device="meta"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("function", [masked_patch_mse, masked_patch_l1])
@pytest.mark.parametrize("name, number", [(name, i) for name, all in BAD.items() for i in range(len(all))])
def test_bad_arguments_are_named(name, number, function):
    good = {"pred": PRED, "images": IMAGES, "mask": MASK, "patch_size": 4, **STATISTICS}
    function(**good)
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        function(**{**good, name: BAD[name][number]})


def test_uint8_needs_statistics_and_norm_pix_a_variance():
    with pytest.raises(ValueError, match="^mean: expected mean and std for uint8 images, got None"):
        masked_patch_mse(PRED, IMAGES.byte(), MASK, patch_size=4)
    pred, images = torch.zeros(1, 4, 1), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="^norm_pix: expected patches of two numbers or more"):
        masked_patch_mse(pred, images, MASK[:1, :4], patch_size=1, norm_pix=True)
