"""What every contrastive loss keeps under autocast, strides, NaN and a device whose numbers the host does not
read."""

import importlib

import pytest
import torch
from losses import LOSSES, Inputs, made, step
from torch.nn import functional as F

import sslfast

linear = importlib.import_module("sslfast.ops.linear_cross_entropy")
checks = importlib.import_module("sslfast.losses.linear")


@pytest.fixture(params=LOSSES)
def case(request):
    return made(request.param, Inputs("cpu", 40, 12))


def test_a_backward_pass_inside_autocast_is_the_same(case):
    loss, leaves, constants = case
    expected = step(*case)
    value = loss(*leaves, *constants)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(value, leaves)
    for x, y in zip(found, expected[1:], strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("case", [k for k in LOSSES if k != "triplet, hard"], indirect=True)
def test_second_derivatives_raise(case):
    """By every way of asking; a part that is differentiable twice is not taken for the whole."""
    loss, leaves, constants = case
    for ask in (lambda x: torch.autograd.grad(x, leaves, allow_unused=True), lambda x: x.backward()):
        slopes = torch.autograd.grad(loss(*leaves, *constants), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiates once"):
            ask(sum(x.square().sum() for x in slopes))


def test_strided_and_expanded_rows(case):
    loss, leaves, constants = case
    expected = step(*case)
    gaps = [torch.stack((x, x), -1).detach()[..., 0].requires_grad_() if x.dim() else x for x in leaves]
    for x, y in zip(step(loss, tuple(gaps), constants), expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", [name for name in LOSSES if "rows apart" not in name])
def test_nan_is_not_passed_over(name):
    loss, leaves, constants = made(name, Inputs("cpu", 40, 12))
    with torch.no_grad():
        leaves[0].view(-1, 12)[-2, 3] = torch.nan  # a row with a label
    assert loss(*leaves, *constants).isnan()


@pytest.mark.parametrize("tau_plus", [0.0, 0.1])
def test_nan_among_hard_negatives_reaches_every_row(tau_plus):
    z1, z2 = torch.randn(6, 4), torch.randn(6, 4)
    z1[2, 1] = torch.nan
    terms = sslfast.hard_negative_ntxent_loss(z1, z2, tau_plus=tau_plus, reduction="none")
    assert terms.isnan().all()


@pytest.mark.parametrize("mining", ["hard", "semihard", "all"])
@pytest.mark.parametrize("shift", [1.0, 1000.0])
def test_triplets_of_rows_that_are_nearly_alike(mining, shift):
    """As of a network that has collapsed: squares minus products would leave no digit of the distances."""
    normalize = shift == 1.0
    x, labels = shift + 1e-3 * shift**0.5 * torch.randn(40, 16), torch.randint(0, 5, (40,))
    options = {"margin": 0.01, "mining": mining, "normalize": normalize}
    near, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    found, expected = (sslfast.triplet_margin_loss(leaf, labels, **options) for leaf in (near, exact))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)
    (a,), (b,) = torch.autograd.grad(found, near), torch.autograd.grad(expected, exact)
    assert F.cosine_similarity(a.double().flatten(), b.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("shape", [(0, 5), (0, 2, 5), (3, 0, 5)])
@pytest.mark.parametrize("form", ["outside", "inside"])
def test_supcon_of_nothing(shape, form):
    labels = torch.zeros(shape[0], dtype=torch.int64)
    x = torch.zeros(shape, requires_grad=True)
    assert sslfast.supcon_loss(x, labels, form=form).isnan()
    assert sslfast.supcon_loss(x, labels, form=form, reduction="sum") == 0


def test_supcon_of_two_views_keeps_the_digits_of_ntxent():
    z1 = torch.randn(32, 16)
    z2 = z1 + 1e-4 * torch.randn_like(z1)
    found = sslfast.supcon_loss(torch.stack((z1, z2)).transpose(0, 1), None, 0.01, 0.01)
    exact = sslfast.ntxent_loss(z1.double(), z2.double(), 0.01)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-18)


def test_nnclr_step_under_autocast():
    queue = sslfast.KeyQueue(64, 8)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = torch.nn.Linear(8, 8)(torch.randn(5, 8))
        loss = sslfast.nnclr_loss(queue.nearest(prediction), prediction)
        mixed = sslfast.clip_loss(prediction, prediction.float(), 10.0)
        pairs = sslfast.siglip_loss(prediction, prediction.float(), 10.0, -10.0)
    assert loss.isfinite() and mixed.isfinite() and pairs.isfinite()


# A device whose numbers the host does not read, on the CPU


@pytest.fixture
def unread(monkeypatch):
    monkeypatch.setattr(linear, "_may_count", lambda labels: False)
    monkeypatch.setattr(checks, "may_read", lambda x: False)


def head(count: int = 12, classes: int = 9):
    hidden, weight, bias = torch.randn(count, 5), torch.randn(classes, 5), torch.randn(classes)
    labels = torch.randint(0, classes, (count,))
    labels[1::3] = -100
    return tuple(x.double().requires_grad_() for x in (hidden, weight, bias)), labels


@pytest.mark.parametrize("bound", [None, 8, 10, 12, 50])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_labels_compacted_without_a_look(unread, bound, reduction):
    leaves, labels = head()
    with torch.no_grad():
        leaves[0][1] = torch.inf  # has no label
    found = sslfast.linear_cross_entropy(
        leaves[0], leaves[1], labels, leaves[2], num_labelled=bound, reduction=reduction
    )
    kept = labels != -100
    expected = F.cross_entropy(leaves[0][kept] @ leaves[1].T + leaves[2], labels[kept], reduction=reduction)
    torch.testing.assert_close(found[kept] if reduction == "none" else found, expected)
    upstream = torch.randn_like(found)
    if reduction == "none":
        upstream[~kept] = torch.inf  # of a mean over no label, say
    gradients = torch.autograd.grad(found, leaves, upstream)
    true = torch.autograd.grad(expected, leaves, upstream[kept] if reduction == "none" else upstream)
    for x, y in zip(gradients, true, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("bound", [None, 0, 4])
def test_no_label_at_all(unread, bound):
    leaves, labels = head()
    loss = sslfast.linear_cross_entropy(
        leaves[0], leaves[1], labels.fill_(-100), leaves[2], num_labelled=bound
    )
    assert loss.isnan()
    assert all((x == 0).all() for x in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("wrong", ["label", "bound"])
def test_what_is_wrong_and_not_looked_at_gives_nan(unread, wrong):
    leaves, labels = head()
    labels[0] = 99 if wrong == "label" else 0
    loss = sslfast.linear_cross_entropy(
        leaves[0], leaves[1], labels, leaves[2], num_labelled=5 if wrong == "bound" else None
    )
    assert loss.isnan()
    assert all(x.isnan().any() for x in torch.autograd.grad(loss, leaves)[1:])  # no optimizer steps on it


def test_changing_counts_do_not_compile_anew():
    loss = torch.compile(
        lambda h, w, y, n: sslfast.linear_cross_entropy(h, w, y, num_labelled=n),
        fullgraph=True,
        backend="aot_eager",
    )
    (hidden, weight, _), _ = head()
    for count in range(1, 13):
        labels = torch.arange(12).masked_fill(torch.arange(12) >= count, -100) % 9
        labels[count:] = -100
        found = loss(hidden, weight, labels, count)
        torch.testing.assert_close(found, F.cross_entropy(hidden @ weight.T, labels))
