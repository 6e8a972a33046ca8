"""triplet_margin_loss against loops over triplets in float64."""

import math
import subprocess
import sys

import pytest
import torch
from explicit import (
    BAD_NUMBER,
    DRAWS,
    EACH_CHECK,
    assert_compiles,
    assert_finite,
    assert_names,
    assert_no_host_read,
    assert_same_loss,
    bad_arguments,
    f64,
    needs_gpu,
    outcome,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import sslfast
from sslfast import triplet_margin_loss
from sslfast.losses import triplet
from sslfast.ops import hardest_pairs

MININGS, REDUCTIONS = ("hard", "semihard", "all"), ("mean", "mean_nonzero", "sum", "none")
EACH_MINING = pytest.mark.parametrize("mining", MININGS)
EACH_REDUCTION = pytest.mark.parametrize("reduction", REDUCTIONS)


def length(x: Tensor) -> Tensor:
    """|x|, of gradient 0 at 0."""
    square = x.square().sum()
    return square.sqrt() if square > 0 else 0 * square


def mined(distance: list[list[float]], labels: list[int], mining: str) -> list[tuple[int, int, int]]:
    """(anchor, positive, negative) of all triplets."""
    found, n = [], len(labels)
    for a in range(n):
        positives = [p for p in range(n) if p != a and labels[p] == labels[a]]
        negatives = [x for x in range(n) if labels[x] != labels[a]]
        to = distance[a].__getitem__
        if mining == "all":
            found += [(a, p, x) for p in positives for x in negatives]
        elif mining == "hard" and positives and negatives:
            found.append((a, max(positives, key=to), min(negatives, key=to)))
        elif mining == "semihard":
            for p in positives:
                farther = [x for x in negatives if to(x) > to(p)]
                found += [(a, p, min(farther, key=to))] if farther else []
    return found


def explicit_triplet(
    embeddings, labels, margin=0.05, mining="hard", normalize=True, reduction="mean"
) -> Tensor:
    x = F.normalize(embeddings, dim=1) if normalize else embeddings
    distance = [[length(a - b) for b in x] for a in x]
    values = [[d.item() for d in row] for row in distance]
    anchors, count, active = [0 * x[a].sum() for a in range(len(x))], 0, 0
    for a, p, n in mined(values, labels.tolist(), mining):
        term = distance[a][p] - distance[a][n] + margin
        count += 1
        if term > 0:
            anchors[a], active = anchors[a] + term, active + 1
    if reduction == "none":
        return torch.stack(anchors)
    divisor = {"mean": count, "mean_nonzero": active, "sum": 1}[reduction]
    return sum(anchors) / max(1, divisor)


LABELS = torch.tensor([3, -1, 3, 0, 3, 0, -1, 7])


@EACH_CHECK
@EACH_MINING
@pytest.mark.parametrize("options", [{"margin": 0.3}, {"normalize": False, "reduction": "mean_nonzero"}])
def test_common(check, mining, options):
    check(
        lambda x: triplet_margin_loss(x, LABELS, mining=mining, **options),
        lambda x: explicit_triplet(x, LABELS, mining=mining, **options),
        [f64(8, 5)],
    )


@DRAWS
@given(data=st.data(), n=st.integers(1, 8), d=st.integers(2, 5), classes=st.integers(1, 4))
def test_any_options(data, n, d, classes):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x, labels = f64(n, d), torch.randint(classes, (n,)) * 2**40 - 2**40
    options = {
        "margin": data.draw(st.sampled_from([0.05, 0.5, 0.0, -0.1, 5])),
        "normalize": data.draw(st.booleans()),
        "reduction": data.draw(st.sampled_from(REDUCTIONS)),
    }
    for mining in MININGS:
        expected = explicit_triplet(x, labels, mining=mining, **options)
        assert_same_loss(triplet_margin_loss(x, labels, mining=mining, **options), expected, [x], rtol=1e-7)


@DRAWS
@given(data=st.data(), n=st.integers(1, 4), d=st.integers(1, 3))
def test_ties_and_rows_that_are_the_same(data, n, d):
    """Of small whole numbers, 0 on average, whose squared distances are exact. Which of two equally far rows
    is taken is open, so gradients are compared where all are."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    half = torch.randint(-1, 2, (n, d)).double()
    x, labels = torch.cat((half, -half)).requires_grad_(), torch.randint(3, (2 * n,))
    options = {
        "normalize": False,
        "margin": data.draw(st.sampled_from([0.05, 0.5, -0.5, 1.0, 0.0])),
        "reduction": data.draw(st.sampled_from(REDUCTIONS)),
    }
    for mining in MININGS:
        loss = triplet_margin_loss(x, labels, mining=mining, **options)
        expected = explicit_triplet(x, labels, mining=mining, **options)
        torch.testing.assert_close(loss, expected)
        if mining == "all":
            assert_same_loss(loss, expected, [x])
        assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


@EACH_MINING
@EACH_REDUCTION
@pytest.mark.parametrize("chunk", [1, 40, 100])
def test_more_than_one_chunk(mining, reduction, chunk, monkeypatch):
    x, labels = f64(24, 4), torch.randint(4, (24,))
    expected = explicit_triplet(x, labels, 0.4, mining, reduction=reduction)
    for module in (triplet, hardest_pairs):
        monkeypatch.setattr(module, "CHUNK", chunk)
    for backend in ("cpu", "reference"):
        with sslfast.use_backend(backend):
            loss = triplet_margin_loss(x, labels, 0.4, mining=mining, reduction=reduction)
            assert_same_loss(loss, expected, [x], rtol=1e-7)


def matrix(x, labels, margin, mining) -> tuple[Tensor, Tensor]:
    """Losses of all triplets [N, N, N], and which of them are meant."""
    distance = (x[:, None] - x).square().sum(2).clamp_min(1e-300).sqrt()
    same = labels[:, None] == labels
    positive, negative = same & ~torch.eye(len(x), dtype=torch.bool), ~same
    meant = positive[:, :, None] & negative[:, None, :]
    if mining == "hard":
        far = distance.masked_fill(~positive, -1).argmax(1)
        near = distance.masked_fill(~negative, math.inf).argmin(1)
        meant = meant & F.one_hot(far, len(x)).bool()[:, :, None] & F.one_hot(near, len(x)).bool()[:, None, :]
    elif mining == "semihard":
        meant = meant & (distance[:, None, :] > distance[:, :, None])
        nearest = distance[:, None, :].masked_fill(~meant, math.inf).argmin(2)
        meant = meant & F.one_hot(nearest, len(x)).bool()
    return (distance[:, :, None] - distance[:, None, :] + margin).relu(), meant


@EACH_MINING
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_rows(mining, dtype):
    x = torch.randn(150, 16).double().requires_grad_()
    labels = torch.arange(150) % 7
    terms, meant = matrix(F.normalize(x, dim=1), labels, 0.2, mining)
    rounded = x.detach().to(dtype).requires_grad_()
    for reduction, divisor in (("mean", meant.sum()), ("mean_nonzero", (meant & (terms > 0)).sum())):
        expected = torch.autograd.grad((terms * meant).sum() / divisor, x, retain_graph=True)[0]
        loss = triplet_margin_loss(rounded, labels, 0.2, mining=mining, reduction=reduction)
        torch.testing.assert_close(loss.double(), (terms * meant).sum() / divisor, rtol=1e-5, atol=0)
        (gradient,) = torch.autograd.grad(loss, rounded)
        assert (gradient.double() - expected).norm() <= 1e-4 * expected.norm()


@EACH_MINING
@pytest.mark.parametrize("where", ["one direction", "far from the origin"])
def test_rows_close_together(mining, where):
    """|x|^2 - 2 <x, y> + |y|^2 has no digits left there in float32."""
    labels, normalize = torch.arange(40) % 5, where == "one direction"
    x = torch.randn(16) + 1e-3 * torch.randn(40, 16) if normalize else 100 + torch.randn(40, 16)
    exact = x.double().requires_grad_()
    terms, meant = matrix(F.normalize(exact, dim=1) if normalize else exact, labels, 1.0, mining)
    (expected,) = torch.autograd.grad((terms * meant).sum() / meant.sum(), exact)
    loss = triplet_margin_loss(x.requires_grad_(), labels, 1.0, mining=mining, normalize=normalize)
    (gradient,) = torch.autograd.grad(loss, x)
    assert (gradient.double() - expected).norm() <= 0.01 * expected.norm()


def test_all_triplets_are_torchs():
    x, labels = f64(12, 5), torch.arange(12) % 4
    anchors, positives, negatives = zip(*mined([[0.0] * 12] * 12, labels.tolist(), "all"), strict=True)
    rows = (x[list(index)] for index in (anchors, positives, negatives))
    expected = F.triplet_margin_loss(*rows, margin=0.7, eps=0.0)
    loss = triplet_margin_loss(x, labels, 0.7, mining="all", normalize=False)
    assert_same_loss(loss, expected, [x])


@EACH_MINING
@EACH_REDUCTION
@pytest.mark.parametrize("labels", [[5, 5, 5, 5], [1, 2, 3, 4], [9], []], ids=str)
def test_no_triplet(mining, reduction, labels):
    x = torch.randn(len(labels), 3, requires_grad=True)
    labels = torch.tensor(labels, dtype=torch.int64)
    loss = triplet_margin_loss(x, labels, mining=mining, reduction=reduction)
    assert loss.shape == ((len(x),) if reduction == "none" else ()) and loss.eq(0).all()
    assert torch.autograd.grad(loss.sum(), x)[0].eq(0).all()


@EACH_MINING
@EACH_REDUCTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_that_are_the_same_have_a_finite_gradient(mining, reduction, dtype):
    same = torch.randn(4, 6).repeat(3, 1)
    for normalize in (True, False):
        x = same.clone()
        if not normalize:
            x[0] = x[4] = 0
        for labels in (torch.arange(12) % 4, torch.arange(12) // 4, torch.arange(12) % 2):
            options = {"mining": mining, "normalize": normalize, "reduction": reduction}
            assert_finite(
                lambda z, y=labels, o=options: triplet_margin_loss(z, y, 0.3, **o),
                [x.to(dtype).requires_grad_()],
            )


@EACH_MINING
def test_one_point(mining):
    """All distances are 0: the margin is the loss where there is a triplet, and nothing has a direction."""
    x, labels = torch.ones(6, 4, requires_grad=True), torch.arange(6) % 2
    loss = triplet_margin_loss(x, labels, 0.25, mining=mining, normalize=False)
    assert loss == (0 if mining == "semihard" else 0.25)
    assert torch.autograd.grad(loss, x)[0].eq(0).all()


@EACH_MINING
def test_nan_is_not_hidden(mining):
    x = torch.randn(8, 4)
    x[2, 1] = math.nan
    for reduction in REDUCTIONS:
        assert triplet_margin_loss(x, LABELS, mining=mining, reduction=reduction).isnan().any()


def test_margins_that_all_or_none_exceed():
    x, labels = f64(9, 4), torch.arange(9) % 3
    for mining in MININGS:
        none = [triplet_margin_loss(x, labels, -9.0, mining=mining, reduction=r) for r in REDUCTIONS]
        assert all(loss.eq(0).all() for loss in none)
        means = [triplet_margin_loss(x, labels, 9.0, mining=mining, reduction=r) for r in REDUCTIONS[:2]]
        assert torch.equal(*means) and means[0] > 5


@EACH_MINING
def test_strides_do_not_matter(mining):
    x, labels = f64(5, 16), torch.arange(8) % 3
    view, both = x.T[::2], torch.stack((labels, labels), 1)[:, 0]
    assert not view.is_contiguous() and not both.is_contiguous()
    for normalize in (True, False):
        expected = explicit_triplet(view, labels, 0.5, mining, normalize)
        loss = triplet_margin_loss(view, both, 0.5, mining=mining, normalize=normalize)
        assert_same_loss(loss, expected, [x], rtol=1e-7)


@EACH_MINING
def test_compile_single_anchors(mining):
    def loss(x):
        return triplet_margin_loss(x, LABELS, 0.3, mining=mining, reduction="none")

    assert_compiles(loss, [torch.randn(8, 5, requires_grad=True)])


@EACH_MINING
def test_autocast_changes_nothing(mining):
    x = torch.randn(8, 5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = triplet_margin_loss(x, LABELS, 0.3, mining=mining)
    assert torch.equal(loss, triplet_margin_loss(x, LABELS, 0.3, mining=mining))


def test_second_derivatives_of_mined_sums_are_refused():
    x = f64(8, 4)
    (gradient,) = torch.autograd.grad(triplet_margin_loss(x, LABELS, mining="all"), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiates once"):
        gradient.sum().backward()


X = torch.randn(8, 3)
WRONG = {
    "embeddings": {TypeError: (None, [X], X.long()), ValueError: (X[0], X[None], X.to("meta"))},
    "labels": {
        TypeError: (None, LABELS.tolist(), LABELS.int(), LABELS.float()),
        ValueError: (LABELS[:3], LABELS[:, None], LABELS.to("meta")),
    },
    "margin": {TypeError: (*BAD_NUMBER[TypeError], None), ValueError: (math.nan, math.inf, -math.inf)},
    "mining": {ValueError: ("easy", None, "")},
    "reduction": {ValueError: ("avg", None, "")},
}


@pytest.mark.parametrize(
    "call, error, name", bad_arguments(triplet_margin_loss, {"embeddings": X, "labels": LABELS}, WRONG)
)
def test_bad_argument_is_named(call, error, name):
    assert_names(call, error, name)


GROWTH = """
import sys, torch, sslfast
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
def step(n, mining):
    x, labels = torch.randn(n, 8, requires_grad=True), torch.arange(n) % 50
    sslfast.triplet_margin_loss(x, labels, mining=mining).backward()
    return peak()
for n in (1024, 2560):
    print(max(step(n, "semihard"), step(3 * n, "hard")) >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in the units of Linux")
def test_peak_memory_of_a_process(tmp_path):
    """2560 x 2560 distances and their order are 75 MB, with what comes of them more than 200;
    7680 x 7680 distances are 225."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, check=True, cwd=tmp_path)
    small, large = map(int, done.stdout.split())
    assert large - small < 80


@needs_gpu
@EACH_MINING
def test_no_host_read_on_a_gpu(mining):
    x, labels = torch.randn(64, 8, device="cuda", requires_grad=True), torch.arange(64, device="cuda") % 5
    assert_no_host_read(lambda: outcome(lambda x: triplet_margin_loss(x, labels, mining=mining), [x]))
