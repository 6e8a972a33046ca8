"""linear_cross_entropy against torch.nn.functional.cross_entropy of all logits in float64."""

import itertools
import subprocess
import sys

import pytest
import torch
from explicit import (
    BAD_REDUCTION,
    DRAWS,
    EACH_CHECK,
    INF,
    NAN,
    REDUCTIONS,
    assert_compiles,
    assert_finite,
    assert_float32_is_close,
    assert_names,
    assert_no_host_read,
    assert_no_worse_than_torch,
    assert_same_loss,
    bad_arguments,
    f64,
    leaves_of,
    needs_gpu,
    outcome,
    tensors,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import sslfast
from sslfast import linear_cross_entropy


def explicit(hidden, weight, labels, bias=None, ignore_index=-100, reduction="mean") -> Tensor:
    logits = F.linear(hidden, weight, bias)
    terms = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction=reduction
    )
    return terms.view(labels.shape) if reduction == "none" else terms


LABELS = torch.tensor([[2, 0, -100, 6], [0, 2, -100, 2]])


def drawn(dtype=torch.float64) -> list[Tensor]:
    """hidden [2, 4, 5], weight [7, 5], bias [7]"""
    return leaves_of([f64(2, 4, 5), f64(7, 5), f64(7)], dtype)


def ours(hidden, weight, bias, **options) -> Tensor:
    return linear_cross_entropy(hidden, weight, LABELS, bias, **options)


def theirs(hidden, weight, bias, **options) -> Tensor:
    return explicit(hidden, weight, LABELS, bias, **options)


@DRAWS
@given(data=st.data(), n=st.integers(1, 7), d=st.integers(1, 5), classes=st.integers(1, 6))
def test_any_options(data, n, d, classes):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    shape = data.draw(st.sampled_from([(n,), (n, 2), (2, 1, n)]))
    hidden, weight = f64(*shape, d), f64(classes, d)
    bias = f64(classes) if data.draw(st.booleans()) else None
    ignored = data.draw(st.sampled_from([-100, 0, classes - 1, classes + 3, -1]))
    labels = torch.randint(classes, shape).masked_fill(torch.rand(shape) < 0.3, ignored)
    options = {"ignore_index": ignored, "reduction": data.draw(st.sampled_from(["mean", "sum", "none"]))}
    count = int((labels != ignored).sum())
    bound = data.draw(st.sampled_from([None, count, count + 1, 10**6]))
    actual = linear_cross_entropy(hidden, weight, labels, bias, num_labelled=bound, **options)
    expected = explicit(hidden, weight, labels, bias, **options)
    if count == 0 and options["reduction"] == "mean":
        assert actual.isnan() and expected.isnan()
    else:
        assert_same_loss(actual, expected, tensors(hidden, weight, bias))


@EACH_CHECK
@REDUCTIONS
def test_common(check, reduction):
    check(lambda *x: ours(*x, reduction=reduction), lambda *x: theirs(*x, reduction=reduction), drawn())


@EACH_CHECK
def test_common_without_a_bias(check):
    check(lambda h, w: ours(h, w, None), lambda h, w: theirs(h, w, None), drawn()[:2])


@pytest.mark.parametrize("n, classes", [(500, 3000), (1500, 40)])
def test_more_than_one_tile(n, classes):
    leaves, labels = (f64(n, 6), f64(classes, 6), f64(classes)), torch.randint(classes, (n,))
    labels[::3] = -100
    loss = linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2])
    assert_same_loss(loss, explicit(leaves[0], leaves[1], labels, leaves[2]), leaves)


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_many_classes_in_every_dtype(scale):
    labels = torch.randint(1000, (64,))
    hidden, weight = f64(64, 32), f64(1000, 32)
    with torch.no_grad():
        hidden *= scale
        hidden[:32] += 0.5 * weight[labels[:32]]  # some are right

    def of(function):
        return lambda h, w: function(h, w, labels)

    inputs = [hidden, weight]
    assert_float32_is_close(of(linear_cross_entropy), of(explicit), inputs, 1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        assert_no_worse_than_torch(of(linear_cross_entropy), of(explicit), inputs, dtype, 1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_every_class_has_a_gradient_where_all_are_equally_likely(scale, bias):
    """Each of 100,000 has a probability of 1e-5; a sum of that in bfloat16, or a threshold, would lose it."""
    classes = 100_000
    hidden = (scale * torch.randn(64, 32)).bfloat16().requires_grad_()
    weight = (0.02 * torch.randn(classes, 32)).bfloat16().requires_grad_()
    offsets = (0.1 * torch.randn(classes)).bfloat16().requires_grad_() if bias else None
    labels = torch.randint(classes, (64,))
    leaves = tensors(hidden, weight, offsets)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = explicit(*exact[:2], labels, *exact[2:])
    loss = linear_cross_entropy(hidden, weight, labels, offsets)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    others = torch.ones(classes, dtype=torch.bool)
    others[labels] = False
    gradients = torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, exact)
    for x, y in zip(*gradients, strict=True):
        for some in (slice(None), others) if len(x) == classes else (slice(None),):
            a, b = x[some].double().flatten(), y[some].flatten()
            assert a @ b > 0.999 * a.norm() * b.norm() and 0.99 < a.norm() / b.norm() < 1.01
    assert gradients[0][1].ne(0).any(1).all()
    assert not bias or gradients[0][2].ne(0).all()


def test_hidden_features_of_zero():
    """The loss is log V, and the bias alone has a gradient in which all classes are alike."""
    classes, labels = 5000, torch.zeros(8, dtype=torch.int64)
    hidden, bias = torch.zeros(8, 4, requires_grad=True), torch.zeros(classes, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(classes, 4), labels, bias)
    torch.testing.assert_close(loss, torch.tensor(float(classes)).log())
    (gradient,) = torch.autograd.grad(loss, bias)
    torch.testing.assert_close(gradient[1:], torch.full((classes - 1,), 1 / classes))
    torch.testing.assert_close(gradient[0], torch.tensor(1 / classes - 1))


@pytest.mark.parametrize("ignored", [-100, 0, 6, 9])
def test_ignore_index(ignored):
    leaves = drawn()
    labels = LABELS.masked_fill(LABELS < 0, ignored)
    loss = linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2], ignored, reduction="none")
    expected = explicit(leaves[0], leaves[1], labels, leaves[2], ignored, "none")
    assert_same_loss(loss, expected, leaves)
    assert loss[labels == ignored].eq(0).all() and loss[labels != ignored].gt(0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (0,)])
def test_no_labels(backend, shape):
    hidden, weight, bias = f64(*shape, 4), f64(5, 4), f64(5)
    labels = torch.full(shape, -100)
    for reduction in ("mean", "sum", "none"):
        with sslfast.use_backend(backend):
            loss = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction)
        assert loss.isnan() if reduction == "mean" else loss.eq(0).all()
        assert loss.shape == (shape if reduction == "none" else ())
        gradients = torch.autograd.grad(loss.sum(), (hidden, weight, bias))
        assert all(d.eq(0).all() for d in gradients)


@pytest.mark.parametrize("value", [NAN, INF])
@REDUCTIONS
def test_rows_without_a_label_take_no_part(value, reduction):
    leaves = drawn()
    expected = outcome(lambda *x: ours(*x, reduction=reduction), leaves)
    with torch.no_grad():
        leaves[0][LABELS == -100] = value
    found = outcome(lambda *x: ours(*x, reduction=reduction), leaves)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert found[1][LABELS == -100].eq(0).all()


def test_the_same_label_for_all_rows():
    hidden, weight, labels = f64(40, 3), f64(6, 3), torch.full((40,), 4)
    loss = linear_cross_entropy(hidden, weight, labels)
    assert_same_loss(loss, explicit(hidden, weight, labels), [hidden, weight])


def test_one_class():
    hidden, weight, bias = f64(3, 4), f64(1, 4), f64(1)
    labels = torch.tensor([0, -100, 0])
    found = outcome(lambda *x: linear_cross_entropy(x[0], x[1], labels, x[2]), [hidden, weight, bias])
    assert all(x.eq(0).all() for x in found)


def test_large_logits_stay_finite():
    """Certain and right, certain and wrong."""
    hidden = torch.tensor([[1000.0], [1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    labels = torch.tensor([0, 1, 1])
    loss = linear_cross_entropy(hidden, weight, labels, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.0, 2000.0, 0.0]))
    assert_same_loss(loss, explicit(hidden, weight, labels, reduction="none"), [hidden, weight], rtol=1e-6)
    assert_finite(lambda *x: linear_cross_entropy(*x, labels), [hidden, weight])


def test_a_sure_row_keeps_its_digits():
    """-log(1 / (1 + e^-30)) is e^-30; log-sum-exp less the label's logit is 0 in float32."""
    hidden, weight = torch.tensor([[30.0]]), torch.tensor([[1.0], [0.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0]))
    assert abs(loss.item() / 9.357622968839e-14 - 1) < 1e-5


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3))[:-1])
def test_only_what_needs_a_gradient_gets_one(needs):
    leaves = [x.requires_grad_(need) for x, need in zip(drawn(), needs, strict=True)]
    assert_same_loss(ours(*leaves), theirs(*leaves), [x for x in leaves if x.requires_grad])


def test_strides_do_not_matter():
    hidden, weight, bias = f64(5, 4, 2), f64(5, 14), f64(14)
    views = hidden.permute(2, 1, 0), weight.T[::2], bias[::2]
    labels = torch.stack((LABELS, LABELS), 2)[:, :, 1]
    loss = linear_cross_entropy(views[0], views[1], labels, views[2])
    assert_same_loss(loss, theirs(*views), [hidden, weight, bias])


def test_a_bias_of_another_dtype():
    hidden, weight, bias = drawn(torch.bfloat16)
    offsets = bias.detach().float().requires_grad_()
    loss, expected = ours(hidden, weight, offsets), ours(hidden, weight, bias)
    assert torch.equal(loss, expected)
    gradients = (torch.autograd.grad(x, y)[0] for x, y in ((loss, offsets), (expected, bias)))
    torch.testing.assert_close(*(x.bfloat16() for x in gradients), rtol=0, atol=0)


@pytest.mark.parametrize("dtypes", list(itertools.product([torch.float32, torch.bfloat16], repeat=2)))
def test_autocast_rounds_both_and_keeps_their_gradients_dtypes(dtypes):
    hidden, weight, bias = drawn(torch.float32)
    hidden, weight = (
        x.detach().to(dtype).requires_grad_() for x, dtype in zip((hidden, weight), dtypes, strict=True)
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(hidden, weight, bias)
        gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    rounded = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    assert loss.dtype == torch.float32 and torch.equal(loss, ours(*rounded, bias))
    assert [x.dtype for x in gradients] == [*dtypes, torch.float32]
    for x, y in zip(gradients, torch.autograd.grad(ours(*rounded, bias), (*rounded, bias)), strict=True):
        torch.testing.assert_close(x, y.to(x.dtype))


def test_compile_with_a_bound_of_the_labels():
    assert_compiles(lambda *x: ours(*x, num_labelled=6), drawn(torch.float32))
    assert_compiles(lambda *x: ours(*x, num_labelled=8, reduction="none"), drawn(torch.float32))


@pytest.mark.parametrize("labels, bound", [([0, 7, 1], None), ([0, -1, 1], 3), ([0, 2, 1], 2)])
def test_what_cannot_be_looked_at_gives_nan(labels, bound):
    hidden, weight, labels = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4), torch.tensor(labels)

    def loss(labels):
        return linear_cross_entropy(hidden, weight, labels, num_labelled=bound, reduction="none")

    torch.compiler.reset()
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(labels)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    torch.compiler.reset()
    wrong = torch.tensor([True] * 3 if bound == 2 else [False, True, False])
    assert torch.equal(found.isnan(), wrong) and torch.equal(gradient.isnan().all(1), wrong)
    expected = explicit(hidden, weight, labels.clamp(0, 6), reduction="none")
    torch.testing.assert_close(found[~wrong], expected[~wrong])


def test_second_derivatives_are_refused_but_in_the_reference():
    hidden, weight, bias = drawn()
    (gradient,) = torch.autograd.grad(ours(hidden, weight, bias), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiates once"):
        gradient.sum().backward()
    with sslfast.use_backend("reference"):
        assert torch.autograd.gradgradcheck(ours, drawn())


def test_same_bits_from_run_to_run():
    leaves, labels = drawn(torch.float32), torch.randint(7, (2, 4))
    runs = [outcome(lambda h, w, b: linear_cross_entropy(h, w, labels, b), leaves) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


H, W = torch.randn(2, 4, 5), torch.randn(7, 5)
WRONG = {
    "hidden": {
        TypeError: (None, [1.0], H.long()),
        ValueError: (H[0, 0], H[..., :4], H.to("meta")),
    },
    "weight": {
        TypeError: (None, W.long(), W.double(), W.bfloat16()),
        ValueError: (W[0], W[None], W[:0], W.to("meta")),
    },
    "labels": {
        TypeError: (None, LABELS.tolist(), LABELS.int(), LABELS.float()),
        ValueError: (LABELS[0], LABELS.T, LABELS + 1, LABELS - 1, LABELS.to("meta")),
    },
    "bias": {TypeError: ([0.0] * 7, LABELS[0]), ValueError: (W[:, :1], W[:6, 0], W[:, 0].to("meta"))},
    "ignore_index": {TypeError: (None, 1.0, True, "0")},
    "num_labelled": {TypeError: (6.0, True, "6"), ValueError: (5, 0, -1)},
    "reduction": BAD_REDUCTION,
}


@pytest.mark.parametrize(
    "call, error, name",
    bad_arguments(linear_cross_entropy, {"hidden": H, "weight": W, "labels": LABELS}, WRONG),
)
def test_bad_argument_is_named(call, error, name):
    assert_names(call, error, name)


def test_labels_that_are_wrong_are_told():
    with pytest.raises(ValueError, match=r"^labels: expected classes in \[0, 7\) or 3, got -100"):
        linear_cross_entropy(H, W, LABELS, ignore_index=3)
    with pytest.raises(ValueError, match="^num_labelled: expected at least 6, .* got 5"):
        linear_cross_entropy(H, W, LABELS, num_labelled=5)


GROWTH = """
import torch, sslfast
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
def step(n, classes):
    hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(classes, 8, requires_grad=True)
    sslfast.linear_cross_entropy(hidden, weight, torch.arange(n)).backward()
    return peak()
small = step(512, 512)
print((step(2048, 32768) - small) >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in the units of Linux")
def test_peak_memory_of_a_process(tmp_path):
    """2048 x 32768 logits would be 256 MB; weights and their gradient are 2 MB."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, check=True, cwd=tmp_path)
    assert int(done.stdout) < 48


@needs_gpu
@pytest.mark.parametrize("bound", [None, 6])
def test_no_host_read_on_a_gpu(bound):
    leaves = [x.detach().cuda().requires_grad_() for x in drawn(torch.float32)]
    labels = LABELS.cuda()

    def loss(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, labels, bias, num_labelled=bound)

    assert_no_host_read(lambda: outcome(loss, leaves))
    torch.testing.assert_close(
        loss(*leaves).cpu(), theirs(*(x.detach().cpu() for x in leaves)), rtol=1e-2, atol=0
    )
