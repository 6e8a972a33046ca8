"""clip_loss, siglip_loss and similarity_bce against cross-entropies of the whole matrix in float64."""

import subprocess
import sys

import pytest
import torch
from explicit import (
    BAD_NUMBER,
    BAD_REDUCTION,
    DRAWS,
    EACH_CHECK,
    REDUCTIONS,
    assert_compiles,
    assert_finite,
    assert_float32_is_close,
    assert_names,
    assert_no_host_read,
    assert_no_worse_than_torch,
    assert_same_loss,
    bad_arguments,
    draw_number,
    f64,
    needs_gpu,
    number,
    outcome,
    reduced,
    tensors,
    unit,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast import CLIPLoss, SigLIPLoss, clip_loss, siglip_loss
from sslfast.ops.similarity_bce import similarity_bce


def explicit_clip(image, text, scale, bias=0.0, *, reduction="mean") -> Tensor:
    logits, own = scale * (image @ text.T) + bias, torch.arange(len(image))
    sides = [F.cross_entropy(x, own, reduction="none") for x in (logits, logits.T)]
    return reduced((sides[0] + sides[1]) / 2, reduction)


def explicit_bce(a, b, scale, bias, a_ids, b_ids) -> Tensor:
    sign = torch.where(a_ids[:, None] == b_ids, 1, -1)
    return -F.logsigmoid(sign * (scale * (a @ b.T) + bias)).sum(1)


def explicit_siglip(image, text, scale, bias, *, ids=None, reduction="mean") -> Tensor:
    ids = torch.arange(len(image)) if ids is None else ids
    return reduced(explicit_bce(image, text, scale, bias, ids, ids), reduction)


LOSSES = {clip_loss: explicit_clip, siglip_loss: explicit_siglip}
BOTH = pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x.__name__)


def drawn(n=6, d=4, scale=3.0, bias=-1.0) -> list[Tensor]:
    return [unit(f64(n, d, grad=False)).requires_grad_() for _ in range(2)] + [number(scale), number(bias)]


SCALES, BIASES = (14.3, 1.0, 100.0, -1.0, 0.0), (0.0, -10.0, 2.5)


@DRAWS
@given(data=st.data(), n=st.integers(1, 7), d=st.integers(1, 5))
def test_clip_with_any_options(data, n, d):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    image, text, scale = f64(n, d), f64(n, d), draw_number(data, *SCALES)
    bias = draw_number(data, *BIASES) if data.draw(st.booleans()) else None
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    actual = clip_loss(image, text, scale, bias, reduction=reduction)
    expected = explicit_clip(image, text, scale, 0.0 if bias is None else bias, reduction=reduction)
    assert_same_loss(actual, expected, tensors(image, text, scale, bias))


@DRAWS
@given(data=st.data(), n=st.integers(1, 7), d=st.integers(1, 5))
def test_siglip_with_any_options(data, n, d):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    image, text = f64(n, d), f64(n, d)
    scale, bias = draw_number(data, *SCALES), draw_number(data, *BIASES)
    ids = torch.randint(-2, 3, (n,)) if data.draw(st.booleans()) else None
    options = {"ids": ids, "reduction": data.draw(st.sampled_from(["mean", "sum", "none"]))}
    actual = siglip_loss(image, text, scale, bias, **options)
    assert_same_loss(
        actual, explicit_siglip(image, text, scale, bias, **options), tensors(image, text, scale, bias)
    )


@BOTH
@REDUCTIONS
def test_more_than_one_tile(loss, reduction):
    leaves = drawn(1100, 6, 8.0)
    expected = LOSSES[loss](*leaves, reduction=reduction)
    assert_same_loss(loss(*leaves, reduction=reduction), expected, leaves)


@pytest.mark.parametrize("m, n", [(3, 7), (7, 3), (400, 1100), (1100, 400), (1, 1), (5, 0), (0, 5)])
@pytest.mark.parametrize("total", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_bce_of_any_rows_and_columns(m, n, total, grouped):
    leaves = f64(m, 5), f64(n, 5), number(0.7), number(-0.4)
    ids = [torch.randint(4, (x,)) if grouped else torch.arange(x) for x in (m, n)]
    expected = explicit_bce(*leaves, *ids)
    given_ids = dict(zip(("a_ids", "b_ids"), ids, strict=True)) if grouped else {}
    actual = similarity_bce(*leaves[:2], scale=leaves[2], bias=leaves[3], total=total, **given_ids)
    assert_same_loss(actual, expected.sum() if total else expected, leaves)


def inputs_of(loss, *options) -> list[Tensor]:
    """Without the bias of CLIP, whose gradient is that of nothing."""
    return drawn(*options)[: 3 if loss is clip_loss else 4]


@EACH_CHECK
@BOTH
@pytest.mark.parametrize("scale, bias", [(10.0, -10.0), (-1.0, 0.0)])
def test_common(check, loss, scale, bias):
    check(loss, LOSSES[loss], inputs_of(loss, 10, 8, scale, bias))


@EACH_CHECK
@BOTH
def test_common_of_single_rows(check, loss):
    weights = torch.arange(1.0, 7)

    def of(function):
        return lambda *x: function(*x, reduction="none") * weights.to(x[0].dtype)

    check(of(loss), of(LOSSES[loss]), inputs_of(loss))


@BOTH
@pytest.mark.parametrize("scale, bias", [(10.0, -10.0), (100.0, -10.0), (-1.0, 0.0)])
def test_many_rows_in_every_dtype(loss, scale, bias):
    image, text, *numbers = inputs_of(loss, 200, 32, scale, bias)
    inputs = [image, unit(image + text), *numbers]
    assert_float32_is_close(loss, LOSSES[loss], inputs, 1e-6 * abs(scale))
    for dtype in (torch.bfloat16, torch.float16):
        assert_no_worse_than_torch(loss, LOSSES[loss], inputs, dtype, 1e-5)


def test_the_bias_has_no_part_in_clip():
    leaves = drawn()
    loss = clip_loss(*leaves)
    assert torch.equal(loss, clip_loss(*leaves[:3]))
    (gradient,) = torch.autograd.grad(loss, leaves[3])
    assert gradient.shape == () and gradient == 0


@BOTH
def test_logits_of_1000(loss):
    """Certain and right, certain and wrong."""
    image = torch.tensor([[1.0], [-1.0], [1.0]], requires_grad=True)
    text = torch.tensor([[1.0], [-1.0], [-1.0]], requires_grad=True)
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (1000.0, 0.0))
    leaves = image, text, scale, bias
    expected = LOSSES[loss](*leaves, reduction="none")
    actual = loss(*leaves, reduction="none")
    assert actual.isfinite().all() and expected.max() >= 999
    torch.testing.assert_close(actual, expected)
    for x, y in zip(*(torch.autograd.grad(z.sum(), leaves) for z in (actual, expected)), strict=True):
        torch.testing.assert_close(x, y)
    assert_finite(loss, leaves)


@REDUCTIONS
def test_siglip_of_infinite_logits_is_its_formula(reduction):
    image = torch.tensor([[1e20], [-1e20]], requires_grad=True)
    text = torch.tensor([[1e20], [1e20]], requires_grad=True)
    actual, expected = (f(image, text, 1.0, 0.0, reduction=reduction) for f in (siglip_loss, explicit_siglip))
    assert torch.equal(actual, expected) and actual.isinf().any()
    for x, y in zip(*(torch.autograd.grad(z.sum(), (image, text)) for z in (actual, expected)), strict=True):
        torch.testing.assert_close(x, y)


def test_one_pair():
    leaves = drawn(1)
    assert all(x == 0 for x in outcome(clip_loss, leaves) for x in x.flatten())
    assert_same_loss(siglip_loss(*leaves), explicit_siglip(*leaves), leaves)
    logit = leaves[2] * (leaves[0] @ leaves[1].T)[0, 0] + leaves[3]
    torch.testing.assert_close(siglip_loss(*leaves), torch.log1p(torch.exp(-logit)))


@BOTH
def test_empty_batch(loss):
    leaves = [torch.randn(0, 4, requires_grad=True), torch.randn(0, 4, requires_grad=True), number(2.0)]
    leaves.append(number(0.0))
    assert loss(*leaves, reduction="none").shape == (0,)
    assert loss(*leaves, reduction="sum").item() == 0 and loss(*leaves).isnan()
    gradients = torch.autograd.grad(loss(*leaves, reduction="sum"), leaves)
    assert [x.shape for x in gradients] == [x.shape for x in leaves]


def test_pairs_of_one_id_belong_together():
    image, text, scale, bias = drawn(4)
    ids = torch.tensor([5, -7, 5, 2**62])
    rows = []
    for i in range(4):
        logits = [scale * (image[i] @ text[j]) + bias for j in range(4)]
        signs = [1 if ids[i] == ids[j] else -1 for j in range(4)]
        rows.append(-sum((1 / (1 + torch.exp(-y * x))).log() for x, y in zip(logits, signs, strict=True)))
    expected = torch.stack(rows)
    assert_same_loss(siglip_loss(image, text, scale, bias, ids=ids, reduction="none"), expected, [image])
    assert_same_loss(siglip_loss(image, text, scale, bias, ids=torch.arange(4) + 9),
                     explicit_siglip(image, text, scale, bias), [image, text])  # fmt: skip


def test_strides_do_not_matter():
    image, text = f64(4, 7).T, f64(7, 8)[:, ::2]
    for loss, formula in LOSSES.items():
        assert_same_loss(loss(image, text, 2.0, 0.5), formula(image, text, 2.0, 0.5), [image, text])


@BOTH
def test_one_tensor_for_both_sides(loss):
    x, scale, bias = f64(6, 4), number(1.5), number(-0.5)
    assert_same_loss(loss(x, x, scale, bias), LOSSES[loss](x, x, scale, bias), [x, scale, bias])
    assert_compiles(lambda x: loss(x, x, 1.5, -0.5), [x])


def test_compile_with_ids():
    ids = torch.arange(6) // 2
    assert_compiles(lambda *x: SigLIPLoss()(*x, ids=ids), drawn())


@BOTH
def test_autocast_rounds_as_a_product_does(loss):
    image, text, scale, bias = (x.detach().float() for x in drawn(40, 16))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss(image, text, scale, bias)
    expected = loss(image.bfloat16(), text.bfloat16(), scale, bias)
    torch.testing.assert_close(rounded, expected, rtol=1e-6, atol=0)
    assert rounded != loss(image, text, scale, bias)


@BOTH
def test_autocast_takes_sides_of_two_dtypes(loss):
    image, text, scale, bias = (x.detach().float().requires_grad_() for x in drawn())
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(image.bfloat16(), text, scale, bias)
        assert torch.equal(value, loss(image, text, scale, bias))
    assert torch.autograd.grad(value, text)[0].dtype == torch.float32


@BOTH
def test_nan_is_not_hidden(loss):
    leaves = [x.detach() for x in drawn()]
    leaves[0][2, 1] = torch.nan
    assert loss(*leaves, reduction="none")[2].isnan() and loss(*leaves).isnan()


def test_a_scale_of_another_dtype_keeps_it():
    image, text, _, _ = drawn()
    scale, bias = nn.Parameter(torch.tensor(4.0)), nn.Parameter(torch.tensor(-10.0, dtype=torch.bfloat16))
    loss = siglip_loss(image, text, scale.exp(), bias)
    loss.backward()
    assert loss.dtype == torch.float64 and scale.grad.dtype == torch.float32 and bias.grad != 0
    expected = explicit_siglip(image, text, scale.detach().exp().double(), -10.0)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("module, function", [(CLIPLoss, clip_loss), (SigLIPLoss, siglip_loss)])
@REDUCTIONS
def test_module_is_its_function(module, function, reduction):
    leaves = drawn()
    assert torch.equal(module(reduction=reduction)(*leaves), function(*leaves, reduction=reduction))
    assert torch.equal(module()(*leaves), function(*leaves)) and not list(module().parameters())
    assert repr(module(reduction=reduction)) == f"{module.__name__}(reduction={reduction!r})"
    with pytest.raises(ValueError, match="^reduction: expected"):
        module(reduction="avg")


def test_modules_pass_what_is_optional():
    leaves, ids = drawn(), torch.arange(6) // 2
    assert torch.equal(CLIPLoss()(*leaves[:3]), clip_loss(*leaves[:3]))
    assert torch.equal(SigLIPLoss()(*leaves, ids=ids), siglip_loss(*leaves, ids=ids))
    assert not torch.equal(SigLIPLoss()(*leaves, ids=ids), siglip_loss(*leaves))


X, IDS = torch.randn(4, 3), torch.arange(4)
GOOD = {"image_features": X, "text_features": X, "logit_scale": 1.0, "logit_bias": 0.0}
WRONG = {
    "image_features": {TypeError: (None, X.long()), ValueError: (X[0], X[None], X.to("meta"))},
    "text_features": {TypeError: ([1.0], X.long(), X.double()), ValueError: (X[:3], X[:, :2], X[0])},
    "logit_scale": {TypeError: (*BAD_NUMBER[TypeError], None), ValueError: (*BAD_NUMBER[ValueError], 1e39)},
    "logit_bias": {**BAD_NUMBER, ValueError: (*BAD_NUMBER[ValueError], -1e39)},
    "reduction": BAD_REDUCTION,
}
NO_IDS = {"ids": {TypeError: ([0, 1, 2, 3], IDS.int()), ValueError: (IDS[:3], IDS[:, None])}}
BAD = [
    *bad_arguments(clip_loss, GOOD, WRONG),
    *bad_arguments(siglip_loss, GOOD, {**WRONG, **NO_IDS, "logit_bias": WRONG["logit_scale"]}),
]


@pytest.mark.parametrize("call, error, name", BAD)
def test_bad_argument_is_named(call, error, name):
    assert_names(call, error, name)


GROWTH = """
import torch, sslfast
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
def step(loss, n):
    x, y = torch.randn(2, n, 16).unbind()
    scale, bias = torch.tensor(1.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    loss(x.requires_grad_(), y.requires_grad_(), scale, bias).backward()
    return peak()
losses = sslfast.clip_loss, sslfast.siglip_loss
small = max(step(loss, 2048) for loss in losses)
print((max(step(loss, 8192) for loss in losses) - small) >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in the units of Linux")
def test_peak_memory_of_a_process(tmp_path):
    """8192 x 8192 logits would be 256 MB; inputs and gradients are 2 MB."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, check=True, cwd=tmp_path)
    assert int(done.stdout) < 48


@needs_gpu
@BOTH
@REDUCTIONS
def test_no_host_read_on_a_gpu(loss, reduction):
    leaves = [x.detach().to("cuda", torch.float32).requires_grad_() for x in drawn(64, 32)]
    assert_no_host_read(lambda: outcome(lambda *x: loss(*x, reduction=reduction), leaves))
    expected = LOSSES[loss](*(x.detach().cpu() for x in leaves), reduction=reduction)
    torch.testing.assert_close(loss(*leaves, reduction=reduction).cpu(), expected, rtol=1e-3, atol=1e-3)
