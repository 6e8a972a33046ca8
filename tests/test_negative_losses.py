"""dcl_loss, hard_negative_ntxent_loss, nnclr_loss, KeyQueue.nearest against formulas in float64."""

import itertools
import math
from functools import partial

import pytest
import torch
from explicit import (
    BAD_REDUCTION,
    BAD_TEMPERATURE,
    CHECKS,
    DRAWS,
    EACH_CHECK,
    REDUCTIONS,
    assert_finite,
    assert_float32_is_close,
    assert_names,
    assert_no_host_read,
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

from sslfast import (
    DCLLoss,
    HardNegativeNTXentLoss,
    KeyQueue,
    dcl_loss,
    hard_negative_ntxent_loss,
    nnclr_loss,
    ntxent_loss,
)
from sslfast.losses import momentum


def rows(z1, z2, normalize):
    """Each row's product with its positive, and those with its negatives: [2B], [2B, 2B - 2]."""
    n, z = len(z1), torch.cat((z1, z2))
    z = unit(z) if normalize else z
    positives = torch.stack([z[i] @ z[(i + n) % (2 * n)] for i in range(2 * n)])
    negatives = [torch.stack([z[i] @ z[j] for j in range(2 * n) if j % n != i % n]) for i in range(2 * n)]
    return positives, torch.stack(negatives)


def explicit_dcl(z1, z2, temperature=0.1, weight_sigma=None, normalize=True) -> Tensor:
    positives, negatives = rows(z1, z2, normalize)
    weights = torch.ones(2 * len(z1), dtype=z1.dtype)
    if weight_sigma is not None:  # -L_vmf of the pairs
        exponentials = (positives[: len(z1)].detach() / weight_sigma).exp()
        weights = (2 - exponentials / exponentials.mean()).repeat(2)
    return -weights * positives / temperature + (negatives / temperature).exp().sum(1).log()


def explicit_hard(z1, z2, temperature=0.5, beta=1.0, tau_plus=0.1, normalize=True) -> Tensor:
    """Robinson et al.'s own code: exponentials, importances, and the least that the estimate may be."""
    positives, negatives = ((x / temperature).exp() for x in rows(z1, z2, normalize))
    count = negatives.shape[1]
    importance = (beta * negatives.log()).exp()
    weighed = (importance * negatives).sum(1) / importance.mean(1)
    estimate = (weighed - tau_plus * count * positives) / (1 - tau_plus)
    least = count * torch.exp(-1 / abs(torch.as_tensor(temperature, dtype=z1.dtype)))
    return -(positives / (positives + torch.maximum(estimate, least))).log()


def explicit_nnclr(nearest, prediction, temperature=0.1, normalize=True) -> Tensor:
    if normalize:
        nearest, prediction = F.normalize(nearest, dim=1), F.normalize(prediction, dim=1)
    logits = nearest @ prediction.T / temperature
    return F.cross_entropy(logits, torch.arange(len(nearest)), reduction="none")


LOSSES = {
    "dcl": (dcl_loss, explicit_dcl, {"temperature": 0.2}),
    "dclw": (dcl_loss, explicit_dcl, {"temperature": 0.2, "weight_sigma": 0.5}),
    "hard": (hard_negative_ntxent_loss, explicit_hard, {}),
    "hard, true": (hard_negative_ntxent_loss, explicit_hard, {"tau_plus": 0.0, "beta": 0.5}),
    "debiased": (hard_negative_ntxent_loss, explicit_hard, {"beta": 0.0, "tau_plus": 0.05}),
    "nnclr": (nnclr_loss, explicit_nnclr, {"temperature": 0.2}),
}
EACH = pytest.mark.parametrize("loss, formula, options", LOSSES.values(), ids=LOSSES)


@EACH_CHECK
@EACH
@pytest.mark.parametrize("learned", [True, False])
def test_common(check, loss, formula, options, learned):
    if "weight_sigma" in options and check is CHECKS["gradcheck"]:
        return  # a difference sees the weight, which has no gradient
    if learned:
        options = {k: v for k, v in options.items() if k != "temperature"}
    check(
        lambda *x: loss(*x, **options),
        lambda *x: formula(*x, **options).mean(),
        [f64(5, 12), f64(5, 12), *([number(0.4)] if learned else [])],
    )


@DRAWS
@given(data=st.data(), n=st.integers(2, 6), d=st.integers(1, 5))
def test_dcl_with_any_options(data, n, d):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    z1, z2, temperature = f64(n, d), f64(n, d), draw_number(data, 0.1, 0.5, 1.0, -0.3, 20.0)
    options = {
        "temperature": temperature,
        "weight_sigma": data.draw(st.sampled_from([None, 0.5, 2.0, -1.0, 0.05])),
        "normalize": data.draw(st.booleans()),
    }
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    actual = dcl_loss(z1, z2, reduction=reduction, **options)
    expected = reduced(explicit_dcl(z1, z2, **options), reduction)
    assert_same_loss(actual, expected, tensors(z1, z2, temperature))


@DRAWS
@given(data=st.data(), n=st.integers(2, 6), d=st.integers(2, 5))
def test_hard_negatives_with_any_options(data, n, d):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    z1, z2, temperature = f64(n, d), f64(n, d), draw_number(data, 0.1, 0.5, 1.0, -0.3, 20.0)
    options = {
        "temperature": temperature,
        "beta": data.draw(st.sampled_from([0.0, 1.0, 0.5, 2.0, -0.5, -1.0])),
        "tau_plus": data.draw(st.sampled_from([0.0, 0.1, 0.01, 0.9])),
        "normalize": data.draw(st.booleans()),
    }
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    actual = hard_negative_ntxent_loss(z1, z2, reduction=reduction, **options)
    expected = reduced(explicit_hard(z1, z2, **options), reduction)
    assert_same_loss(actual, expected, tensors(z1, z2, temperature), rtol=1e-8)


@DRAWS
@given(data=st.data(), n=st.integers(1, 6), d=st.integers(1, 5))
def test_nnclr_with_any_options(data, n, d):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    nearest, prediction, temperature = f64(n, d), f64(n, d), draw_number(data, 0.1, 1.0, -0.3)
    normalize, reduction = data.draw(st.booleans()), data.draw(st.sampled_from(["mean", "sum", "none"]))
    actual = nnclr_loss(nearest, prediction, temperature, normalize=normalize, reduction=reduction)
    expected = reduced(explicit_nnclr(nearest, prediction, temperature, normalize), reduction)
    assert_same_loss(actual, expected, tensors(nearest, prediction, temperature))


@EACH
def test_more_than_one_tile(loss, formula, options):
    """600 rows; the sums over all but one image by another way than row by row."""
    z1, z2 = f64(300, 6), f64(300, 6)
    if loss is nnclr_loss:
        expected = formula(z1, z2, **options)
    else:
        z, image = unit(torch.cat((z1, z2))), torch.arange(600) % 300
        products, other = z @ z.T, image[:, None] != image
        found = products.roll(300, 0).diagonal(), products[other].view(600, 598)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "rows", lambda *_: found)
            expected = formula(z1, z2, **options)
    assert_same_loss(loss(z1, z2, reduction="none", **options), expected, [z1, z2])


def test_dcl_is_the_official_code():
    """Of rows that are normalised already."""
    z1, z2 = (unit(f64(20, 6, grad=False)).requires_grad_() for _ in range(2))
    for sigma in (None, 0.5):
        total = 0.0
        for a, b in ((z1, z2), (z2, z1)):
            cross, own = a @ b.T, a @ a.T
            weight = 2 - 20 * torch.softmax((a * b).sum(1) / sigma, 0).detach() if sigma else 1.0
            logits = torch.cat((own, cross), 1) / 0.1 + torch.eye(20).repeat(1, 2) * -1e9
            total = total + (-cross.diagonal() / 0.1 * weight + logits.logsumexp(1)).mean()
        assert_same_loss(DCLLoss(weight_sigma=sigma, normalize=False)(z1, z2), total / 2, [z1, z2])


def test_the_weight_of_dcl_has_no_gradient():
    """With it, a larger product would also lower the pair's own weight."""
    z1, z2 = f64(6, 4), f64(6, 4)
    loss = dcl_loss(z1, z2, weight_sigma=0.3, reduction="none")
    plain = dcl_loss(z1, z2, reduction="none")
    cosine = F.cosine_similarity(z1, z2, dim=1)
    weights = 2 - 6 * (cosine / 0.3).softmax(0)
    for with_gradient in (False, True):
        w = weights if with_gradient else weights.detach()
        expected = plain + ((1 - w) * cosine / 0.1).repeat(2)
        torch.testing.assert_close(loss, expected)
        both = [torch.autograd.grad(x.sum(), z1, retain_graph=True)[0] for x in (loss, expected)]
        assert torch.allclose(*both) != with_gradient


@REDUCTIONS
def test_hard_negatives_without_weights_are_ntxent(reduction):
    z1, z2 = f64(9, 5), f64(9, 5)
    loss = hard_negative_ntxent_loss(z1, z2, 0.3, 0.0, 0.0, reduction=reduction)
    assert_same_loss(loss, ntxent_loss(z1, z2, 0.3, reduction=reduction), [z1, z2])


@pytest.mark.parametrize("learned", [True, False])
def test_where_the_estimate_is_as_low_as_it_may_be(learned):
    """Some rows there, some not; the negatives of the former have no gradient."""
    z1, z2 = f64(8, 4), f64(8, 4)
    with torch.no_grad():
        z2[:4] = z1[:4] + 0.1 * z2[:4]
    tau = number(0.5) if learned else 0.5
    positives, negatives = ((x / 0.5).exp() for x in rows(z1, z2, True))
    weighed = (negatives**2).sum(1) / negatives.mean(1)
    low = (weighed - 0.3 * 14 * positives) / 0.7 < 14 * math.exp(-2)
    assert low.any() and not low.all()
    loss = hard_negative_ntxent_loss(z1, z2, tau, tau_plus=0.3, reduction="none")
    assert_same_loss(loss, explicit_hard(z1, z2, tau, tau_plus=0.3), tensors(z1, z2, tau))
    row = int(low[:8].nonzero()[0])
    gradient = torch.autograd.grad(loss[row], z1, retain_graph=True)[0]
    assert gradient[row].ne(0).all() and gradient.ne(0).any(1).sum() == 1


def test_rows_that_are_all_alike_have_a_finite_gradient():
    """tau_plus close to 1 leaves next to nothing of the estimate."""
    x = torch.ones(4, 3, requires_grad=True)
    loss = hard_negative_ntxent_loss
    for options in itertools.product((0.5, 0.01, -0.5), (1.0, 0.0), (0.1, 0.999, 1 - 1e-9, 1e-30)):
        assert_finite(lambda x, options=options: loss(x, x, *options), [x])


@EACH
@pytest.mark.parametrize("temperature", [0.01, 0.001, 100.0, -0.01, -100.0])
def test_extreme_temperatures_stay_finite(loss, formula, options, temperature):
    options = {**options, "temperature": temperature}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        z1, z2 = torch.randn(6, 4), torch.randn(6, 4)
        z1[0] = z1[1] = z2[2] = z2[0]
        leaves = [x.to(dtype).requires_grad_() for x in (z1, z2)]
        assert_finite(lambda *x: loss(*x, **options), leaves)


@pytest.mark.parametrize("tau_plus", [0.0, 0.1])
def test_hard_negatives_at_a_low_temperature(tau_plus):
    """Exponentials would overflow a float32."""
    z1, z2 = torch.randn(20, 16), torch.randn(20, 16)
    z2[:10] = z1[:10] + 0.3 * z2[:10]
    loss = partial(hard_negative_ntxent_loss, temperature=0.01, tau_plus=tau_plus)
    formula = partial(explicit_hard, temperature=0.01, tau_plus=tau_plus)
    assert_float32_is_close(loss, lambda *x: formula(*x).mean(), [z1, z2], 1e-4)


@EACH
def test_one_pair(loss, formula, options):
    x, y, tau = f64(1, 4), f64(1, 4), number(0.2)
    options = {k: v for k, v in options.items() if k != "temperature"}
    found = outcome(lambda *x: loss(*x, **options), [x, y, tau])
    if loss is dcl_loss:  # the weight of a single pair is 1
        expected = outcome(lambda x, y, t: -F.cosine_similarity(x, y)[0] / t, [x, y, tau])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    else:
        assert all(a.eq(0).all() for a in found)


@EACH
def test_empty_batch(loss, formula, options):
    x, y = torch.randn(0, 4, requires_grad=True), torch.randn(0, 4)
    assert loss(x, y, **options).isnan() and loss(x, y, reduction="none", **options).shape == (0,)
    total = loss(x, y, reduction="sum", **options)
    assert total == 0 and torch.autograd.grad(total, x)[0].shape == (0, 4)


@EACH
def test_nan_is_not_hidden(loss, formula, options):
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    x[2, 1] = math.nan
    assert loss(x, y, reduction="none", **options)[2].isnan() and loss(x, y, **options).isnan()


@EACH
def test_autocast_takes_sides_of_two_dtypes(loss, formula, options):
    x, y = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(x, y, **options)
        assert torch.equal(value, loss(x, y.float(), **options))
    assert torch.autograd.grad(value, x)[0].dtype == torch.float32


@EACH
def test_no_matrix_of_similarities(loss, formula, options):
    z = [torch.randn(512, 8, requires_grad=True) for _ in range(2)]
    assert largest_tensor(lambda *x: loss(*x, **options), z) <= 8 * z[0].numel()


@EACH
def test_strides_do_not_matter(loss, formula, options):
    x, y = f64(4, 6), f64(6, 8)
    expected = formula(x.T, y[:, ::2], **options).mean()
    assert_same_loss(loss(x.T, y[:, ::2], **options), expected, [x, y])


HARD_OPTIONS = {"beta": 0.5, "tau_plus": 0.05, "normalize": False, "reduction": "none"}
MODULES = [
    (DCLLoss, dcl_loss, {"weight_sigma": 0.5, "normalize": False, "reduction": "sum"}),
    (HardNegativeNTXentLoss, hard_negative_ntxent_loss, HARD_OPTIONS),
]


@pytest.mark.parametrize("module, function, options", MODULES)
def test_module_is_its_function(module, function, options):
    x, y, tau = torch.randn(8, 4), torch.randn(8, 4), nn.Parameter(torch.tensor(0.4))
    fixed, trained = module(0.4, **options), module(tau, **options)
    assert torch.equal(fixed(x, y), function(x, y, 0.4, **options))
    assert list(fixed.parameters()) == [] and [id(p) for p in trained.parameters()] == [id(tau)]
    trained(x, y).sum().backward()
    assert tau.grad.shape == () and tau.grad != 0
    assert repr(fixed).startswith(module.__name__)
    assert all(f"{k}={v!r}" in repr(fixed) for k, v in {"temperature": 0.4, **options}.items())
    assert torch.equal(module()(x, y), function(x, y))
    wrong = {"temperature": 0.0, "reduction": "avg"}
    wrong |= {"weight_sigma": 0} if module is DCLLoss else {"beta": math.nan, "tau_plus": 1.0}
    for name, bad in wrong.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            module(**{name: bad})


# The nearest keys


@pytest.mark.parametrize("chunk", [1, 30, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nearest_is_the_largest_product(chunk, dtype, monkeypatch):
    monkeypatch.setattr(momentum, "NEAREST_CHUNK", chunk)
    queue, x = KeyQueue(13, 4), torch.randn(9, 4, requires_grad=True).to(dtype)
    found = queue.nearest(x)
    assert found.shape == (9, 4) and found.dtype == dtype and not found.requires_grad
    for row, key in zip(x.tolist(), found, strict=True):
        products = [sum(a * b for a, b in zip(row, k, strict=True)) for k in queue.keys.tolist()]
        assert torch.equal(key, queue.keys[products.index(max(products))].to(dtype))
    assert queue.nearest(x[:0]).shape == (0, 4)


def test_nearest_is_not_rounded_by_autocast_and_outlives_the_keys():
    queue = KeyQueue(2, 2, normalize=False)
    queue.enqueue(torch.tensor([[1.0, 0.0], [1.0001, 0.0]]))
    with torch.autocast("cpu", torch.bfloat16):
        found = queue.nearest(torch.ones(3, 2))
    queue.enqueue(torch.zeros(2, 2))
    assert torch.equal(found, torch.tensor([[1.0001, 0.0]]).expand(3, 2))


def test_nearest_compiles_and_goes_into_nnclr():
    queue, x, prediction = KeyQueue(20, 4), torch.randn(6, 4), torch.randn(6, 4, requires_grad=True)

    def step(x, prediction):
        return nnclr_loss(queue.nearest(x), prediction, 0.2)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, prediction)
    keys = torch.stack([max(queue.keys, key=lambda k, row=row: float(k @ row)) for row in x])
    expected = explicit_nnclr(keys, prediction, 0.2).mean()
    torch.testing.assert_close(compiled, expected)
    gradients = (torch.autograd.grad(loss, prediction)[0] for loss in (compiled, expected))
    torch.testing.assert_close(*gradients)
    torch.compiler.reset()


X = torch.randn(4, 3)
SIDE = {TypeError: (None, [1.0], X.long(), X.double()), ValueError: (X[:3], X[:, :2], X[0], X.to("meta"))}
FIRST = {TypeError: (None, X.long()), ValueError: (X[0], X[None])}
COMMON = {"temperature": BAD_TEMPERATURE, "reduction": BAD_REDUCTION}
NOT_A_NUMBER = {ValueError: (math.nan, math.inf), TypeError: ("1", True, [1.0])}
SIGMA = {**NOT_A_NUMBER, ValueError: (0, 1e-40, math.nan, math.inf)}
TAU_PLUS = {**NOT_A_NUMBER, ValueError: (1, 1.5, -0.1, math.nan, math.inf)}
VIEWS = {"z1": FIRST, "z2": SIDE, **COMMON}
HARD = {"beta": NOT_A_NUMBER, "tau_plus": TAU_PLUS, **VIEWS}
BAD = [
    *bad_arguments(dcl_loss, {"z1": X, "z2": X}, {"weight_sigma": SIGMA, **VIEWS}),
    *bad_arguments(hard_negative_ntxent_loss, {"z1": X, "z2": X}, HARD),
    *bad_arguments(
        nnclr_loss, {"nearest": X, "prediction": X}, {"nearest": FIRST, "prediction": SIDE, **COMMON}
    ),
    *bad_arguments(KeyQueue(5, 3).nearest, {"x": X}, {"x": {**FIRST, ValueError: (X[0], X[:, :2])}}),
]


@pytest.mark.parametrize("call, error, name", BAD)
def test_bad_argument_is_named(call, error, name):
    assert_names(call, error, name)


@needs_gpu
@EACH
def test_no_host_read_on_a_gpu(loss, formula, options):
    x, y = (torch.randn(16, 8, device="cuda", requires_grad=True) for _ in range(2))
    queue = KeyQueue(64, 8).cuda()
    assert_no_host_read(lambda: outcome(lambda *x: loss(*x, **options), [x, y]))
    assert_no_host_read(lambda: loss(queue.nearest(x), y, **options))
