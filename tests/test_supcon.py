"""supcon_loss and multiview_ntxent_loss against formulas written out row by row in float64."""

import math

import pytest
import torch
from explicit import (
    BAD_NUMBER,
    BAD_REDUCTION,
    BAD_TEMPERATURE,
    DRAWS,
    EACH_CHECK,
    REDUCTIONS,
    assert_finite,
    assert_names,
    assert_no_host_read,
    assert_no_worse_than_torch,
    assert_same_loss,
    bad_arguments,
    draw_number,
    f64,
    largest_tensor,
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

from sslfast import SupConLoss, multiview_ntxent_loss, ntxent_loss, supcon_loss

FORMS = pytest.mark.parametrize("form", ["outside", "inside"])


def explicit_supcon(
    features, labels=None, temperature=0.07, base_temperature=0.07, normalize=True, form="outside"
) -> Tensor:
    shape, dim = features.shape[:-1], features.shape[-1]
    labels = range(len(features)) if labels is None else labels.tolist()
    labels = [y for y in labels for _ in range(math.prod(shape[1:]))]
    z = features.reshape(-1, dim)
    z = unit(z) if normalize else z
    terms = []
    for i in range(len(z)):
        s = (z @ z[i]) / temperature
        others = [s[a] for a in range(len(z)) if a != i]
        positives = [s[p] for p in range(len(z)) if p != i and labels[p] == labels[i]]
        if not positives:
            terms.append(0 * z[i].sum())
            continue
        positives, total = torch.stack(positives), torch.stack(others).logsumexp(0)
        term = total - (positives.mean() if form == "outside" else positives.logsumexp(0))
        terms.append(term * temperature / base_temperature)
    return torch.stack(terms).view(shape)


def supcontrast(features, labels, temperature=0.07, base_temperature=0.07) -> Tensor:
    """Khosla et al.'s own code: views one after another, masks, the row's largest logit taken off."""
    batch, views, _ = features.shape
    z = torch.cat([F.normalize(x, dim=1) for x in features.unbind(1)])
    logits = z @ z.T / temperature
    logits = logits - logits.amax(1, keepdim=True).detach()
    other = 1 - torch.eye(batch * views, dtype=z.dtype)
    mask = (labels[:, None] == labels).to(z.dtype).repeat(views, views) * other
    log_prob = logits - (logits.exp() * other).sum(1, keepdim=True).log()
    mean = (mask * log_prob).sum(1) / mask.sum(1)
    return -(temperature / base_temperature) * mean.mean()


def solo_learn(z, indexes, temperature) -> Tensor:
    """SimCLR's loss there: the sum over the positives is inside of the logarithm."""
    z = F.normalize(z, dim=1)
    similarity = torch.exp(z @ z.T / temperature)
    same = indexes[:, None] == indexes
    positive = (similarity * (same & ~torch.eye(len(z), dtype=torch.bool))).sum(1)
    return -torch.log(positive / (positive + (similarity * ~same).sum(1))).mean()


def explicit_multiview(views, temperature=0.5, normalize=True, ids=None) -> Tensor:
    count, n, _ = views.shape
    z, ids = unit(views) if normalize else views, range(n) if ids is None else ids.tolist()
    rows = []
    for v in range(count):
        for i in range(n):
            negatives = [z[v, i] @ z[w, j] for w in range(count) for j in range(n) if ids[j] != ids[i]]
            terms = []
            for w in range(count):
                if w != v:
                    logits = torch.stack([z[v, i] @ z[w, i], *negatives]) / temperature
                    terms.append(-logits.log_softmax(0)[0])
            rows.append(sum(terms) / (count - 1))
    return torch.stack(rows).view(count, n)


TEMPERATURES = 0.5, 0.07, 1.0, -0.3, 20.0
LABELS = torch.tensor([3, -1, 3, 0, 3, 0, -1, 7])


IDS = torch.tensor([4, 4, 1])
LOSSES = {
    "outside": (
        lambda x: supcon_loss(x, LABELS, reduction="none"),
        lambda x: explicit_supcon(x, LABELS),
        lambda: [f64(8, 12)],
    ),
    "inside": (
        lambda x: SupConLoss(0.2, form="inside")(x, LABELS),
        lambda x: explicit_supcon(x, LABELS, 0.2, form="inside").mean(),
        lambda: [f64(8, 12)],
    ),
    "views": (
        lambda x, t: supcon_loss(x, None, t, 0.1, normalize=False),
        lambda x, t: explicit_supcon(x, None, t, 0.1, normalize=False).mean(),
        lambda: [f64(4, 2, 5), number(0.5)],
    ),
    "multiview": (
        lambda x, t: multiview_ntxent_loss(list(x), t, ids=IDS, reduction="none"),
        lambda x, t: explicit_multiview(x, t, ids=IDS),
        lambda: [f64(3, 3, 5), number(0.5)],
    ),
}


@EACH_CHECK
@pytest.mark.parametrize("loss, formula, draw", LOSSES.values(), ids=LOSSES)
def test_common(check, loss, formula, draw):
    check(loss, formula, draw())


@DRAWS
@given(data=st.data(), n=st.integers(1, 7), d=st.integers(1, 5), views=st.sampled_from([None, 1, 2, 3]))
def test_supcon_with_any_options(data, n, d, views):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    features = f64(n, d) if views is None else f64(n, views, d)
    without = views is not None and data.draw(st.booleans())
    labels = None if without else torch.randint(-2, 3, (n,))
    options = {
        "temperature": draw_number(data, *TEMPERATURES),
        "base_temperature": data.draw(st.sampled_from([0.07, 1.0, -0.5])),
        "normalize": data.draw(st.booleans()),
        "form": data.draw(st.sampled_from(["outside", "inside"])),
    }
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    actual = supcon_loss(features, labels, reduction=reduction, **options)
    expected = reduced(explicit_supcon(features, labels, **options), reduction)
    assert_same_loss(actual, expected, tensors(features, options["temperature"]), rtol=1e-8)


@DRAWS
@given(data=st.data(), views=st.integers(2, 5), n=st.integers(1, 5), d=st.integers(1, 5))
def test_multiview_with_any_options(data, views, n, d):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x, temperature, normalize = f64(views, n, d), draw_number(data, *TEMPERATURES), data.draw(st.booleans())
    ids = torch.randint(-2, 3, (n,)) if data.draw(st.booleans()) else None
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    given_as = x if data.draw(st.booleans()) else data.draw(st.sampled_from([list, tuple]))(x)
    actual = multiview_ntxent_loss(given_as, temperature, normalize=normalize, ids=ids, reduction=reduction)
    expected = reduced(explicit_multiview(x, temperature, normalize, ids), reduction)
    assert_same_loss(actual, expected, tensors(x, temperature))


@pytest.mark.parametrize("temperature, base", [(0.07, 0.07), (0.1, 0.07), (0.5, 1.0)])
def test_supcon_is_the_official_code(temperature, base):
    features, labels = f64(200, 3, 16), torch.randint(-3, 4, (200,))  # 600 rows: more than one tile
    expected = supcontrast(features, labels, temperature, base)
    assert_same_loss(supcon_loss(features, labels, temperature, base), expected, [features])
    expected = supcontrast(features, torch.arange(200), temperature, base)
    assert_same_loss(supcon_loss(features, None, temperature, base), expected, [features])


def test_supcon_inside_is_solo_learns():
    z, indexes = f64(60, 8), torch.arange(20).repeat(3)
    loss = supcon_loss(z, indexes, 0.2, 0.2, form="inside")
    assert_same_loss(loss, solo_learn(z, indexes, 0.2), [z])


def test_inside_of_the_paper_is_larger_by_the_log_of_the_positives():
    z = f64(8, 5)
    loss = supcon_loss(z, LABELS, 0.3, 0.3, form="inside", reduction="none")
    for i in range(8):
        s = [(F.cosine_similarity(z[i], z[j], dim=0) / 0.3).exp() for j in range(8)]
        positives = [s[j] for j in range(8) if j != i and LABELS[j] == LABELS[i]]
        if positives:
            share = sum(positives) / len(positives) / sum(s[j] for j in range(8) if j != i)
            torch.testing.assert_close(loss[i], -share.log() - math.log(len(positives)))


@FORMS
@REDUCTIONS
def test_two_views_without_labels_are_ntxent(form, reduction):
    z = f64(9, 2, 5)
    expected = ntxent_loss(z[:, 0], z[:, 1], 0.2, reduction=reduction)
    expected = expected.view(2, 9).T if reduction == "none" else expected
    loss = supcon_loss(z, None, 0.2, 0.2, form=form, reduction=reduction)
    assert_same_loss(loss, expected, [z])


@REDUCTIONS
@pytest.mark.parametrize("ids", [None, torch.tensor([1, 1, -4, 2, 1])])
def test_two_views_of_multiview_are_ntxent(reduction, ids):
    x, y = f64(5, 4), f64(5, 4)
    expected = ntxent_loss(x, y, 0.2, ids=ids, reduction=reduction)
    loss = multiview_ntxent_loss((x, y), 0.2, ids=ids, reduction=reduction)
    assert_same_loss(loss, expected.view(2, 5) if reduction == "none" else expected, [x, y])


@FORMS
@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4, 5], [7] * 6, [-5, -5, 2**63 - 1, -(2**63), 2**63 - 1, 0]])
def test_labels(form, labels):
    labels = torch.tensor(labels)
    x = f64(6, 4)
    loss = supcon_loss(x, labels, form=form, reduction="none")
    assert_same_loss(loss, explicit_supcon(x, labels, form=form), [x])


@FORMS
def test_rows_without_positives_have_no_gradient_and_count_in_the_mean(form):
    x, tau = f64(5, 3), number(0.2)
    terms = supcon_loss(x, torch.tensor([1, 2, 1, 3, 2]), tau, form=form, reduction="none")
    torch.testing.assert_close(supcon_loss(x, torch.tensor([1, 2, 1, 3, 2]), 0.2, form=form), terms.sum() / 5)
    assert terms[3] == 0 and all(d.eq(0).all() for d in torch.autograd.grad(terms[3], (x, tau)))
    loss = supcon_loss(x, torch.arange(5), tau, form=form)
    assert loss == 0 and all(d.eq(0).all() for d in torch.autograd.grad(loss, (x, tau)))


@FORMS
def test_one_row_or_one_image(form):
    for loss, x in (
        (lambda x: supcon_loss(x, torch.tensor([3]), form=form), f64(1, 4)),
        (lambda x: supcon_loss(x, form=form), f64(1, 1, 4)),
        (multiview_ntxent_loss, f64(3, 1, 4)),
    ):
        assert all(y.eq(0).all() for y in outcome(loss, [x]))


NOTHING = torch.zeros(0, dtype=torch.int64)
EMPTY = [
    (lambda x, **options: supcon_loss(x, NOTHING, **options), (0, 4)),
    (lambda x, **options: supcon_loss(x, NOTHING, form="inside", **options), (0, 4)),
    (supcon_loss, (0, 2, 4)),
    (multiview_ntxent_loss, (3, 0, 4)),
]


@pytest.mark.parametrize("loss, shape", EMPTY)
def test_empty_batch(loss, shape):
    x = torch.randn(shape, requires_grad=True)
    assert loss(x).isnan() and loss(x, reduction="none").shape == shape[:-1]
    total = loss(x, reduction="sum")
    assert total == 0 and torch.autograd.grad(total, x)[0].shape == shape


@FORMS
@pytest.mark.parametrize("normalize", [True, False])
def test_strides_do_not_matter(form, normalize):
    views_first, columns = f64(3, 5, 4), f64(4, 8)
    for x in (views_first.transpose(0, 1), columns.T.view(4, 2, 4), columns.T):
        labels = LABELS[: len(x)]
        expected = explicit_supcon(x, labels, 0.3, normalize=normalize, form=form).mean()
        loss = supcon_loss(x, labels, 0.3, normalize=normalize, form=form)
        assert_same_loss(loss, expected, [views_first, columns])
    x = views_first.transpose(0, 1)
    loss = multiview_ntxent_loss(x, normalize=normalize)
    assert_same_loss(loss, explicit_multiview(x, normalize=normalize).mean(), [views_first])


@pytest.mark.parametrize("name", ["inside", "multiview"])
def test_aligned_rows_at_a_low_temperature(name):
    """The true loss is far below one float32 rounding of its logits."""
    classes = F.normalize(torch.randn(100, 64), dim=1)
    x = F.normalize(classes + 1e-3 * torch.randn(3, 100, 64), dim=2).double()
    labels = torch.arange(100).repeat(3)
    z = x.view(300, 64)
    s = (z @ z.T / 0.05).exp()
    negatives = (s * (labels[:, None] != labels)).sum(1)
    own = s.view(3, 100, 3, 100).diagonal(dim1=1, dim2=3).permute(2, 0, 1)  # [image, view, view]
    if name == "inside":
        positives = own.sum(2) - own.diagonal(dim1=1, dim2=2)
        truth = torch.log1p(negatives.view(3, 100).T / positives).mean()
        loss = supcon_loss(z.float(), labels, 0.05, 0.05, normalize=False, form="inside")
    else:
        terms = torch.log1p(negatives.view(3, 100).T[:, :, None] / own)
        truth = (terms.sum(2) - terms.diagonal(dim1=1, dim2=2)).mean() / 2
        loss = multiview_ntxent_loss(x.float(), 0.05, normalize=False)
    assert 1e-8 < truth < 1e-4 and abs(loss.item() - truth) < 1e-4 * truth


def test_many_16_bit_rows_are_no_worse_than_in_torch():
    labels, x = torch.randint(10, (64,)), f64(64, 2, 32)
    for dtype in (torch.bfloat16, torch.float16):
        assert_no_worse_than_torch(
            lambda x: supcon_loss(x, labels, 0.1), lambda x: supcontrast(x, labels, 0.1), [x], dtype
        )


EXTREME = [
    lambda x, t, **options: supcon_loss(x, LABELS, t, **options),
    lambda x, t, **options: supcon_loss(x, LABELS, t, form="inside", **options),
    lambda x, t, **options: multiview_ntxent_loss(x.view(2, 4, 4), t, **options),
]
EACH_EXTREME = pytest.mark.parametrize("loss", EXTREME, ids=["outside", "inside", "multiview"])


@EACH_EXTREME
@pytest.mark.parametrize("temperature", [0.001, 100.0, -0.001, -0.5])
def test_extreme_temperatures_stay_finite(loss, temperature):
    x = torch.randn(8, 4)
    x[2] = x[3]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_finite(lambda x: loss(x, temperature), [x.to(dtype).requires_grad_()])


@EACH_EXTREME
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zero_and_tiny_rows(loss, dtype):
    """float16 cannot hold the eps of the norm; 6e-8 is its smallest number, whose square is 0 in it."""
    x = torch.randn(8, 4).to(dtype)
    x[0], x[1], x[4] = 0, 6e-8, {torch.float16: 6e4, torch.bfloat16: 1e18}[dtype]
    value = loss(x.requires_grad_(), 0.1, reduction="none")
    torch.testing.assert_close(value, loss(x.double(), 0.1, reduction="none").float(), rtol=0.02, atol=0.1)
    assert not torch.autograd.grad(value.sum(), x)[0].isnan().any()


def test_no_matrix_of_similarities():
    x, labels = torch.randn(1024, 8, requires_grad=True), torch.arange(1024) % 9
    for loss in (
        lambda x: supcon_loss(x, labels),
        lambda x: supcon_loss(x, labels, form="inside"),
        lambda x: multiview_ntxent_loss(x.view(4, 256, 8)),
    ):
        assert largest_tensor(loss, [x]) <= 4 * x.numel()


@pytest.mark.parametrize(
    "options", [{}, {"form": "inside", "reduction": "sum"}, {"normalize": False, "base_temperature": 1.0}]
)
def test_module_is_its_function(options):
    x, tau = torch.randn(8, 4), nn.Parameter(torch.tensor(0.4))
    fixed, trained = SupConLoss(0.4, **options), SupConLoss(tau, **options)
    assert torch.equal(fixed(x, LABELS), supcon_loss(x, LABELS, 0.4, **options))
    assert torch.equal(fixed(x.view(4, 2, 4)), supcon_loss(x.view(4, 2, 4), None, 0.4, **options))
    assert list(fixed.parameters()) == [] and [id(p) for p in trained.parameters()] == [id(tau)]
    trained(x, LABELS).backward()
    assert tau.grad.shape == () and tau.grad != 0
    assert all(f"{k}={v!r}" in repr(fixed) for k, v in {"temperature": 0.4, **options}.items())
    assert torch.equal(SupConLoss()(x, LABELS), supcon_loss(x, LABELS))


X, VIEWS = torch.randn(8, 3), torch.randn(3, 8, 2)
COMMON = {"temperature": BAD_TEMPERATURE, "reduction": BAD_REDUCTION}
WRONG = {
    "features": {TypeError: (None, [X], X.long()), ValueError: (X[0], X[None, None], X.to("meta"))},
    "labels": {
        TypeError: (LABELS.tolist(), LABELS.int(), LABELS.float()),
        ValueError: (None, LABELS[:3], LABELS[:, None], LABELS.to("meta")),
    },
    "base_temperature": {ValueError: (0, 1e-40, math.nan, math.inf), TypeError: BAD_NUMBER[TypeError]},
    "form": {ValueError: ("out", None)},
    **COMMON,
}
WRONG_VIEWS = {
    "views": {TypeError: (None, 3, VIEWS.long()), ValueError: (X, [], VIEWS[:1], [X], VIEWS.to("meta"))},
    "views[1]": {TypeError: ([X, None], [X, X.double()]), ValueError: ([X, X[1:]], [X, X[:, 1:]])},
    "ids": {TypeError: ([0] * 8, LABELS.int()), ValueError: (LABELS[:3], LABELS[None])},
    **COMMON,
}
BAD = [
    *bad_arguments(supcon_loss, {"features": X, "labels": LABELS}, WRONG),
    *bad_arguments(multiview_ntxent_loss, {"views": VIEWS}, WRONG_VIEWS),
]


@pytest.mark.parametrize("call, error, name", BAD)
def test_bad_argument_is_named(call, error, name):
    assert_names(call, error, name)


def test_the_module_refuses_bad_options_when_made():
    for name, bad in [("temperature", 0.0), ("form", "out"), ("reduction", "avg")]:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            SupConLoss(**{name: bad})


@needs_gpu
def test_no_host_read_on_a_gpu():
    x, labels = torch.randn(8, 16, device="cuda", requires_grad=True), LABELS.cuda()
    assert_no_host_read(lambda: outcome(lambda x: supcon_loss(x, labels), [x]))
    assert_no_host_read(lambda: outcome(lambda x: supcon_loss(x, labels, form="inside"), [x]))
    assert_no_host_read(lambda: outcome(lambda x: multiview_ntxent_loss(x.view(4, 2, 16)), [x]))
