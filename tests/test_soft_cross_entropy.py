"""soft_cross_entropy: against loops, gradients, memory that is written over, strides, errors; Triton's
kernels in their interpreter. Its cases on the CPU's backends are in test_backends.py."""

import importlib

import pytest
import torch
from interpreter import grid_order, guarded, inside_nan, interpreted
from sslfast.kernels import tuning
from torch import Tensor

import sslfast
from sslfast import soft_cross_entropy
from sslfast.testing import CASES, assert_close_to_reference

op = importlib.import_module("sslfast.ops.soft_cross_entropy")
BY_NAME = {case.name: case for case in CASES["soft_cross_entropy"]}


def logits_of(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).requires_grad_()


def test_against_loops(isa):
    logits, targets = torch.randn(3, 4, 7), torch.randn(2, 4, 7)
    center = torch.randn(7)
    found = op.view_cross_entropy(logits, targets, 10.0, center=center, target_scale=25.0, skip=True)
    for b in range(4):
        for v in range(3):
            expected = 0.0
            for t in range(2):
                if t != v:
                    q = ((targets[t, b] - center).double() * 25).softmax(0)
                    expected -= sum(q * (logits[v, b].double() * 10).log_softmax(0)).item()
            assert found[v, b].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 5.0, -2.0])
def test_is_cross_entropy_with_probabilities(scale):
    logits, targets = logits_of(6, 11), torch.rand(6, 11).softmax(1)
    expected = torch.nn.functional.cross_entropy(scale * logits, targets, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(logits, targets, scale=scale), expected)


def test_gradcheck():
    logits, targets = logits_of(3, 4, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    options = {"center": torch.randn(5).double(), "target_scale": 3.0, "skip": True}
    assert torch.autograd.gradcheck(lambda x: op.view_cross_entropy(x, targets, 2.0, **options), logits)
    assert torch.autograd.gradcheck(lambda x: op.view_cross_entropy(x, targets, -2.0), logits)


def test_aligned_rows_keep_their_digits():
    """The loss of a sure and right row is tiny: lse - <q, s> would lose it in float32."""
    logits = torch.zeros(1, 50)
    logits[0, 3] = 30.0
    targets = torch.zeros(1, 50)
    targets[0, 3] = 1.0
    exact = (49 * torch.exp(torch.tensor(-30.0, dtype=torch.float64))).log1p()
    # float32 holds 1 + 4.6e-12 as 1, so the sum's own rounding is all that may be lost
    assert abs(soft_cross_entropy(logits + 900, targets).item() - exact) < 1e-7


# The gradient over the logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_gradient_may_take_the_place_of_the_logits(dtype):
    leaf, targets = logits_of(6, 300, dtype=dtype), torch.rand(6, 300).softmax(1).to(dtype)
    (expected,) = torch.autograd.grad(soft_cross_entropy(leaf * 1.5, targets, scale=4.0).sum(), leaf)
    logits = leaf * 1.5
    loss = soft_cross_entropy(logits, targets, scale=4.0, inplace_backward=True).sum()
    place, kept = logits.data_ptr(), []
    logits.register_hook(lambda g: kept.append(g.data_ptr()))
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, expected) and kept == [place]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_who_saved_the_logits_is_told_that_they_are_gone():
    leaf, targets = logits_of(6, 30), torch.rand(6, 30)
    logits = leaf * 2
    other = (logits**2).sum()  # made first, so that its backward comes last
    loss = soft_cross_entropy(logits, targets, inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_logits_that_cannot_be_written_over_are_not():
    rows = logits_of(1, 30)
    logits, targets = (rows * 2).expand(4, 30), torch.rand(4, 30)
    expected = torch.autograd.grad(soft_cross_entropy(logits, targets).sum(), rows, retain_graph=True)
    before = logits.detach().clone()
    found = torch.autograd.grad(soft_cross_entropy(logits, targets, inplace_backward=True).sum(), rows)
    assert torch.equal(found[0], expected[0]) and torch.equal(logits, before)
    with pytest.raises(ValueError, match="inplace_backward"):
        soft_cross_entropy(logits_of(2, 3), torch.rand(2, 3), inplace_backward=True)


# Strides, threads, numbers that are not finite


@pytest.mark.parametrize("layout", ["expanded", "gaps", "zeros"])
def test_upstream_gradients_of_any_strides(layout):
    u = {"expanded": torch.randn(1, 1).expand(10, 3), "gaps": torch.randn(10, 3, 2)[..., 0]}.get(layout)
    inputs = BY_NAME["DINO"].inputs(torch.float32)
    assert_close_to_reference("soft_cross_entropy", inputs, upstream=[torch.zeros(10, 3) if u is None else u])


def test_bits_depend_on_neither_run_nor_threads(set_threads):
    inputs, first = BY_NAME["DINO"].inputs(torch.float32), None
    for threads in (1, 2, 3, 2):
        set_threads(threads)
        a = inputs["a"].clone().requires_grad_()
        loss = op.view_cross_entropy(
            a, inputs["targets"], 10.0, center=inputs["center"], target_scale=25.0, skip=True
        )
        loss.sum().backward()
        first = first or (loss, a.grad)
        assert torch.equal(first[0], loss) and torch.equal(first[1], a.grad)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["first", "middle", "all"])
def test_non_finite_logits_give_what_log_softmax_gives(value, where):
    logits, targets = torch.randn(3, 5000), torch.rand(3, 5000).softmax(1)
    logits[1, {"first": 0, "middle": 4500, "all": slice(None)}[where]] = value
    expected = -(targets * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(soft_cross_entropy(logits, targets), expected, equal_nan=True)


def test_differentiable_once_on_cpu_and_twice_on_the_reference():
    logits, targets = logits_of(3, 4), torch.rand(3, 4)
    for backend in ("cpu", "reference"):
        with sslfast.use_backend(backend):
            (g,) = torch.autograd.grad(soft_cross_entropy(logits, targets).sum(), logits, create_graph=True)
        if backend == "cpu":
            with pytest.raises(RuntimeError, match="differentiates once"):
                g.sum().backward()
        else:
            assert torch.autograd.grad((g**2).sum(), logits)[0].abs().sum() > 0


def test_nothing_is_changed_and_targets_have_no_gradient():
    logits, targets = logits_of(3, 4), torch.rand(3, 4).requires_grad_()
    before = [x.detach().clone() for x in (logits, targets)]
    soft_cross_entropy(logits, targets).sum().backward()
    assert targets.grad is None and logits.grad is not None
    assert all(torch.equal(x, y) for x, y in zip((logits, targets), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile(dtype):
    torch.compiler.reset()
    fast = torch.compile(soft_cross_entropy, fullgraph=True, backend="aot_eager")
    for rows in (2, 5):
        logits, targets = logits_of(rows, 40, dtype=dtype), torch.rand(rows, 40)
        found, expected = (_results(f, logits, targets) for f in (fast, soft_cross_entropy))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    torch.compiler.reset()


def _results(function, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    loss = function(logits, targets, scale=3.0)
    return loss, torch.autograd.grad(loss.sum(), logits)[0]


def test_opcheck():
    logits, targets, center = torch.randn(3, 2, 9), torch.randn(2, 2, 9)[:, :, :9], torch.randn(9)
    options = 10.0, 25.0, True, True, "cpu"
    torch.library.opcheck(torch.ops.sslfast.soft_cross_entropy, (logits, targets, center, *options))
    _, *states = torch.ops.sslfast.soft_cross_entropy(logits, targets, center, *options)
    arguments = torch.randn(3, 2), logits, targets, center, *states, *options
    torch.library.opcheck(torch.ops.sslfast.soft_cross_entropy_backward, arguments)


@pytest.mark.parametrize(
    "name, change, error",
    [
        ("logits", {"logits": torch.randn(3)}, ValueError), ("logits", {"logits": None}, TypeError),
        ("logits", {"logits": torch.ones(3, 4, dtype=torch.int64)}, TypeError),
        ("logits", {"logits": torch.ones(3, 0), "targets": torch.ones(3, 0)}, ValueError),
        ("targets", {"targets": torch.randn(3, 5)}, ValueError), ("targets", {"targets": [1]}, TypeError),
        ("scale", {"scale": torch.nan}, ValueError), ("scale", {"scale": "1"}, TypeError),
        ("scale", {"scale": torch.inf}, ValueError),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(name, change, error):
    with pytest.raises(error, match=f"^{name}: "):
        soft_cross_entropy(**{"logits": torch.randn(3, 4), "targets": torch.rand(3, 4), **change})


# Triton's kernels in their interpreter

RUNS = [(torch.float32, 1), (torch.bfloat16, 2), (torch.float16, 3)]
CHOSEN = [(case, dtype) for dtype, every in RUNS for case in CASES["soft_cross_entropy"][::every]]


@pytest.mark.parametrize("case, dtype", CHOSEN, ids=lambda x: getattr(x, "name", str(x)))
@interpreted
def test_triton_case(case, dtype, monkeypatch):
    """Programs out of order, buffers of NaN with guards around them, inputs among NaN."""
    monkeypatch.setattr(tuning, "TARGET_TILE", 1024)  # several stretches
    inputs = {k: inside_nan(x) if isinstance(x, Tensor) else x for k, x in case.inputs(dtype).items()}
    with sslfast.use_backend("triton"), grid_order(True), guarded():
        assert_close_to_reference("soft_cross_entropy", inputs)
