"""NT-Xent and InfoNCE against formulas written out row by row in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast import InfoNCELoss, NTXentLoss, info_nce_loss, ntxent_loss
from sslfast.losses.contrastive import ntxent_reference

NAN, INF = math.nan, math.inf


def f64(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)


def cross_entropy_rows(positives, negatives, temperature, label_smoothing=0.0, margin=0.0) -> Tensor:
    """Per row i: -sum_k target_k log softmax_k over [positives[i] - margin, *negatives[i]] / temperature."""
    terms = []
    for positive, others in zip(positives, negatives, strict=True):
        logits = torch.stack([positive - margin, *others]) / temperature
        target = torch.full_like(logits, label_smoothing / len(logits))
        target[0] += 1 - label_smoothing
        terms.append(-(target * logits.log_softmax(0)).sum())
    return torch.stack(terms) if terms else torch.zeros(0, dtype=torch.float64)


def explicit_ntxent(z1, z2, temperature=0.5, normalize=True, ids=None) -> Tensor:
    n = len(z1)
    z = torch.cat((z1, z2))
    z = unit(z) if normalize else z
    ids = (torch.arange(n) if ids is None else ids).repeat(2).tolist()
    positives = [z[i] @ z[(i + n) % (2 * n)] for i in range(2 * n)]
    negatives = [[z[i] @ z[j] for j in range(2 * n) if ids[j] != ids[i]] for i in range(2 * n)]
    return cross_entropy_rows(positives, negatives, temperature)


def explicit_info_nce(
    query, key, negatives=None, temperature=0.07, normalize=True, symmetric=False, ids=None, weights=None,
    label_smoothing=0.0, margin=0.0,
) -> Tensor:  # fmt: skip
    n = len(query)
    if normalize:
        query, key, negatives = unit(query), unit(key), None if negatives is None else unit(negatives)
    ids = list(range(n)) if ids is None else ids.tolist()
    sides = []
    for own, other in [(query, key), (key, query)][: 1 + symmetric]:
        positives = [own[i] @ other[i] for i in range(n)]
        others = [[own[i] @ other[j] for j in range(n) if ids[j] != ids[i]] for i in range(n)]
        if negatives is not None:
            for i in range(n):
                others[i] += [own[i] @ x for x in (negatives if negatives.dim() == 2 else negatives[i])]
        sides.append(cross_entropy_rows(positives, others, temperature, label_smoothing, margin))
    terms = sum(sides) / len(sides)
    return terms if weights is None else terms * weights


def reduced(terms: Tensor, reduction: str, weights: Tensor | None = None) -> Tensor:
    total = len(terms) if weights is None else weights.sum()
    return {"none": terms, "sum": terms.sum(), "mean": terms.sum() / total}[reduction]


def assert_same_loss(actual: Tensor, expected: Tensor, leaves, rtol=1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-11)
    upstream = torch.randn_like(expected)
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    for x, y in zip(
        torch.autograd.grad(actual, leaves, upstream, **options),
        torch.autograd.grad(expected, leaves, upstream, **options),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-11)


TEMPERATURES = st.sampled_from([0.5, 0.07, 1.0, -0.3, 20.0])
DRAWS = settings(max_examples=120, deadline=None, derandomize=True, database=None)


def draw_temperature(data) -> Tensor | float:
    value = data.draw(TEMPERATURES)
    as_tensor = data.draw(st.booleans())
    return torch.tensor(value, dtype=torch.float64, requires_grad=True) if as_tensor else value


@DRAWS
@given(data=st.data(), n=st.integers(1, 6), d=st.integers(1, 5))
def test_ntxent_with_any_options(data, n, d):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    z1, z2, temperature = f64(n, d), f64(n, d), draw_temperature(data)
    normalize, reduction = data.draw(st.booleans()), data.draw(st.sampled_from(["mean", "sum", "none"]))
    ids = torch.randint(-2, 3, (n,)) if data.draw(st.booleans()) else None
    actual = ntxent_loss(z1, z2, temperature, normalize=normalize, ids=ids, reduction=reduction)
    expected = reduced(explicit_ntxent(z1, z2, temperature, normalize, ids), reduction)
    assert_same_loss(actual, expected, [x for x in (z1, z2, temperature) if isinstance(x, Tensor)])


@DRAWS
@given(data=st.data(), n=st.integers(1, 6), d=st.integers(1, 5))
def test_info_nce_with_any_options(data, n, d):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    query, key, temperature = f64(n, d), f64(n, d), draw_temperature(data)
    extra = data.draw(st.sampled_from([None, "shared", "per query"]))
    count = data.draw(st.sampled_from([0, 1, 4]))
    options = {
        "negatives": None if extra is None else f64(count, d) if extra == "shared" else f64(n, count, d),
        "normalize": data.draw(st.booleans()),
        "symmetric": extra is None and data.draw(st.booleans()),
        "ids": torch.randint(-2, 3, (n,)) if data.draw(st.booleans()) else None,
        "weights": torch.rand(n, dtype=torch.float64) if data.draw(st.booleans()) else None,
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1, 0.9])),
        "margin": data.draw(st.sampled_from([0.0, 0.3, -0.2])),
        "temperature": temperature,
    }
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    if options["weights"] is not None:
        options["weights"].requires_grad_()
    actual = info_nce_loss(query, key, reduction=reduction, **options)
    expected = reduced(explicit_info_nce(query, key, **options), reduction, options["weights"])
    leaves = [query, key, options["negatives"], options["weights"], temperature]
    assert_same_loss(actual, expected, [x for x in leaves if isinstance(x, Tensor)])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_info_nce_is_cross_entropy_of_the_whole_matrix(label_smoothing):
    q, k = f64(40, 8), f64(40, 8)
    logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / 0.1
    sides = [
        F.cross_entropy(x, torch.arange(40), label_smoothing=label_smoothing) for x in (logits, logits.T)
    ]
    for symmetric, expected in ((False, sides[0]), (True, sum(sides) / 2)):
        loss = info_nce_loss(q, k, temperature=0.1, symmetric=symmetric, label_smoothing=label_smoothing)
        assert_same_loss(loss, expected, [q, k])


def test_ntxent_is_the_textbook_loss():
    z1, z2 = f64(300, 16), f64(300, 16)  # 600 rows: more than one tile
    assert_same_loss(ntxent_loss(z1, z2, 0.2), ntxent_reference(z1, z2, 0.2), [z1, z2])


def test_gradcheck():
    z1, z2, negatives, tau = f64(4, 3), f64(4, 3), f64(3, 3), torch.tensor(0.4, dtype=torch.float64)
    ids, tau = torch.tensor([0, 1, 1, 2]), tau.requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda x, y, t: ntxent_loss(x, y, t, ids=ids, reduction="none"), (z1, z2, tau))
    options = {"label_smoothing": 0.1, "margin": 0.2, "ids": ids, "reduction": "none"}
    assert check(lambda x, y, t: info_nce_loss(x, y, temperature=t, symmetric=True, **options), (z1, z2, tau))
    assert check(
        lambda x, y, n, t: info_nce_loss(x, y, negatives=n, temperature=t, **options),
        (z1, z2, negatives, tau),
    )


@pytest.mark.parametrize("loss", [ntxent_loss, info_nce_loss])
def test_float32_matches_float64(loss):
    z1, z2 = torch.randn(200, 32), torch.randn(200, 32)
    z2[:] = z1 + 0.5 * z2
    results = {}
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (z1, z2)]
        value = loss(*leaves, temperature=0.1)
        assert value.dtype == dtype
        results[dtype] = value.detach(), *torch.autograd.grad(value, leaves)
    for x, y in zip(results[torch.float32], results[torch.float64], strict=True):
        assert (x - y).norm() <= 2e-6 * y.norm()


# Where `lse_all - s_positive` cancels.


@pytest.mark.parametrize("name", ["ntxent", "info_nce", "symmetric", "queue"])
def test_aligned_pairs_at_a_low_temperature(name):
    """The true mean is about 1e-5, below one float32 rounding of logits of 20."""
    n, tau = 512, 0.05
    z1 = F.normalize(torch.randn(n, 128), dim=1)
    z2 = F.normalize(z1 + 1e-3 * torch.randn(n, 128), dim=1)
    queue = F.normalize(torch.randn(n, 128), dim=1)

    def matrix(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Logits of every row, and of its positive."""
        a, b, c = z1.to(dtype), z2.to(dtype), queue.to(dtype)
        if name == "ntxent":
            z = torch.cat((a, b))
            logits = (z @ z.T / tau).fill_diagonal_(-INF)
            return logits, (z * z.roll(n, 0)).sum(1) / tau
        logits, positive = a @ b.T / tau, (a * b).sum(1) / tau
        if name == "symmetric":
            return torch.cat((logits, logits.T)), positive.repeat(2)
        return (logits if name == "info_nce" else torch.cat((logits, a @ c.T / tau), 1)), positive

    logits, positive = matrix(torch.float64)
    truth = torch.expm1(logits.logsumexp(1) - positive).log1p().mean().item()
    logits, positive = matrix(torch.float32)
    textbook = (logits.logsumexp(1) - positive).mean().item()
    options = {"temperature": tau, "normalize": False}
    if name == "ntxent":
        ours = ntxent_loss(z1, z2, **options)
    else:
        extra = {"symmetric": {"symmetric": True}, "queue": {"negatives": queue}}.get(name, {})
        ours = info_nce_loss(z1, z2, **options, **extra)
    assert 1e-6 < truth < 1e-4
    assert abs(ours.item() - truth) < 1e-5 * truth
    assert abs(textbook - truth) > 1e-2 * truth


# 16-bit inputs, autocast, degenerate rows.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [ntxent_loss, info_nce_loss])
def test_zero_and_tiny_rows_stay_finite(loss, dtype):
    """float16 cannot hold the eps of the norm; 6e-8 is its smallest number, whose square is 0 in it."""
    x, y = torch.randn(6, 4).to(dtype), torch.randn(6, 4).to(dtype)
    x[0], y[0], x[1] = 0, 0, 6e-8
    x[2] = {torch.float16: 6e4, torch.bfloat16: 1e18}[dtype]  # squares overflow float16
    leaves = x.requires_grad_(), y.requires_grad_()
    value = loss(*leaves, temperature=0.1, reduction="none")
    assert value.dtype == torch.float32 and value.isfinite().all()
    expected = loss(x.double(), y.double(), temperature=0.1, reduction="none").float()
    torch.testing.assert_close(value, expected, rtol=0.02, atol=0.05)
    assert not any(d.isnan().any() for d in torch.autograd.grad(value.sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [ntxent_loss, info_nce_loss])
def test_16_bit_rows_are_normalised_in_float32_and_compared_exactly(loss, dtype):
    x, y = torch.randn(50, 24).to(dtype), torch.randn(50, 24).to(dtype)
    rounded = [F.normalize(z.float(), dim=1).to(dtype).double() for z in (x, y)]
    expected = loss(*rounded, temperature=0.07, normalize=False)
    actual = loss(x, y, temperature=0.07)
    assert actual.dtype == torch.float32
    assert abs(actual.item() - expected.item()) <= 2e-6 * expected.item()


@pytest.mark.parametrize("loss", [ntxent_loss, info_nce_loss])
def test_autocast_compares_in_its_dtype_and_normalises_in_float32(loss):
    x, y = torch.randn(50, 24, requires_grad=True), torch.randn(50, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = loss(x, y, temperature=0.07)
        exact = loss(x.double(), y.double(), temperature=0.07)
    rounded = [F.normalize(z, dim=1).bfloat16() for z in (x, y)]
    torch.testing.assert_close(actual, loss(*rounded, temperature=0.07, normalize=False), rtol=1e-6, atol=0)
    assert actual.dtype == torch.float32 and torch.autograd.grad(actual, x)[0].dtype == torch.float32
    torch.testing.assert_close(exact, loss(x.double(), y.double(), temperature=0.07), rtol=0, atol=0)
    assert actual.item() != loss(x, y, temperature=0.07).item()


@pytest.mark.parametrize("loss", [ntxent_loss, info_nce_loss])
def test_one_pair_has_no_negatives_and_loss_0(loss):
    x, y = torch.randn(1, 4, requires_grad=True), torch.randn(1, 4)
    value = loss(x, y)
    assert value.item() == 0 and torch.autograd.grad(value, x)[0].eq(0).all()


@pytest.mark.parametrize("loss", [ntxent_loss, info_nce_loss])
def test_empty_batch_is_what_torch_reductions_make_of_nothing(loss):
    x, y = torch.randn(0, 4, requires_grad=True), torch.randn(0, 4)
    assert loss(x, y, reduction="none").shape == (0,)
    assert loss(x, y, reduction="sum").item() == 0
    assert math.isnan(loss(x, y).item()) and math.isnan(torch.zeros(0).mean().item())
    assert torch.autograd.grad(loss(x, y, reduction="sum"), x)[0].shape == (0, 4)


# torch.compile, modules.


def assert_compiles(function, *leaves) -> None:
    torch.compiler.reset()
    fast, eager = torch.compile(function, fullgraph=True, backend="aot_eager")(), function()
    torch.testing.assert_close(fast, eager)
    for x, y in zip(torch.autograd.grad(fast, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(x, y)
    torch.compiler.reset()


def test_compile():
    x, y, tau = torch.randn(12, 4, requires_grad=True), torch.randn(12, 4), nn.Parameter(torch.tensor(0.3))
    queue, ids, weights = torch.randn(5, 4), torch.arange(12) // 2, torch.rand(12)
    module, options = NTXentLoss(tau), {"negatives": queue.expand(12, 5, 4), "label_smoothing": 0.2}
    assert_compiles(lambda: module(x, y, ids), x, tau)
    assert_compiles(lambda: info_nce_loss(x, y, symmetric=True, label_smoothing=0.1, ids=ids), x)
    assert_compiles(lambda: info_nce_loss(x, y, negatives=queue, weights=weights, margin=0.1), x)
    assert_compiles(lambda: info_nce_loss(x, y, temperature=tau, **options), x, tau)


@pytest.mark.parametrize("loss", [ntxent_loss, info_nce_loss])
def test_compile_with_one_tensor_for_both_sides(loss):
    x = torch.randn(6, 4, requires_grad=True)
    assert_compiles(lambda: loss(x, x, temperature=0.3), x)


MODULES = [
    (NTXentLoss, ntxent_loss, {"normalize": False, "reduction": "sum"}),
    (InfoNCELoss, info_nce_loss, {"normalize": False, "reduction": "sum", "symmetric": True}),
    (InfoNCELoss, info_nce_loss, {"label_smoothing": 0.1, "margin": 0.2, "reduction": "none"}),
]


@pytest.mark.parametrize("module, function, options", MODULES)
def test_module_is_its_function(module, function, options):
    x, y, ids = torch.randn(8, 4), torch.randn(8, 4), torch.arange(8) // 2
    tau = nn.Parameter(torch.tensor(0.4))
    fixed, trained = module(0.4, **options), module(tau, **options)
    assert torch.equal(fixed(x, y, ids=ids), function(x, y, temperature=0.4, ids=ids, **options))
    assert list(fixed.parameters()) == [] and [id(p) for p in trained.parameters()] == [id(tau)]
    trained(x, y).sum().backward()
    assert tau.grad.shape == () and tau.grad != 0
    assert repr(fixed).startswith(module.__name__)
    assert all(f"{k}={v!r}" in repr(fixed) for k, v in {"temperature": 0.4, **options}.items())
    assert torch.equal(module()(x, y), function(x, y))  # the same defaults


def test_info_nce_module_passes_negatives_and_weights():
    x, y, negatives, weights = torch.randn(6, 4), torch.randn(6, 4), torch.randn(3, 4), torch.rand(6)
    expected = info_nce_loss(x, y, negatives=negatives, weights=weights)
    assert torch.equal(InfoNCELoss()(x, y, negatives=negatives, weights=weights), expected)


# Bad arguments: the message starts with the argument's name.

X, IDS = torch.randn(4, 3), torch.arange(4)
META = X.to("meta")
SIDE = {TypeError: (None, [1.0], X.long(), X.double()), ValueError: (X[:3], X[:, :2], X[0], META)}
WRONG = {
    "temperature": {
        ValueError: (0, 0.0, NAN, INF, -INF, 1e-310, 1e-40, *map(torch.tensor, (0.0, NAN, INF, [0.5], 1))),
        TypeError: (None, "0.1", True),
    },
    "reduction": {ValueError: ("avg", None, "")},
    "ids": {TypeError: ([0, 1, 2, 3], IDS.int()), ValueError: (IDS[:3], IDS[:, None], IDS.to("meta"))},
}
WRONG_NTXENT = {"z2": SIDE, "z1": {TypeError: ([1.0], X.long()), ValueError: (X[0], X[None])}}
WRONG_INFO_NCE = {
    "key": SIDE,
    "query": {TypeError: (None, X.long()), ValueError: (X[0], X[None])},
    "negatives": {TypeError: ([X], X.double()), ValueError: (X[:, :2], X[0], torch.randn(5, 2, 3), META)},
    "weights": {TypeError: ([1.0] * 4, IDS), ValueError: (torch.ones(3), torch.ones(4, 1))},
    "label_smoothing": {TypeError: ("0", None, True), ValueError: (1.0, 1.5, -0.1, NAN, INF)},
    "margin": {TypeError: ("0", None, True), ValueError: (NAN, INF)},
}
LOSSES = [(ntxent_loss, ("z1", "z2"), WRONG_NTXENT), (info_nce_loss, ("query", "key"), WRONG_INFO_NCE)]
BAD = [
    pytest.param(loss, sides, name, error, value, id=f"{loss.__name__}-{name}-{error.__name__}-{i}")
    for loss, sides, wrong in LOSSES
    for name, groups in {**WRONG, **wrong}.items()
    for error, values in groups.items()
    for i, value in enumerate(values)
]


@pytest.mark.parametrize("loss, sides, name, error, value", BAD)
def test_bad_argument_is_named(loss, sides, name, error, value):
    with pytest.raises(error, match=f"^{name}: expected .*, got "):
        loss(**{**dict.fromkeys(sides, X), name: value})


def test_negatives_do_not_go_with_symmetric():
    with pytest.raises(ValueError, match="^negatives: expected None when symmetric=True"):
        info_nce_loss(X, X, negatives=X, symmetric=True)


@pytest.mark.parametrize("module", [NTXentLoss, InfoNCELoss])
def test_modules_refuse_bad_options_when_made(module):
    for name, bad in [("temperature", 0.0), ("temperature", NAN), ("reduction", "avg")]:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            module(**{name: bad})
