"""MultipleNegativesRankingLoss, plain and cached, beside those of the installed sentence-transformers."""

import copy
import functools
import logging

import interop_text_processes as text
import processes
import pytest
import torch
from interop_text_processes import ALL, TEXTS, Columns, cached_ranking, interop, losses, modules, ranking
from originals import FLOOR, assert_like_original, assert_signature, evaluate, same_error
from torch import Tensor

from sslfast.testing import assert_no_worse

util = text.library.util
PLAIN, CACHED = "MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"
EACH_CLASS = pytest.mark.parametrize("name", [PLAIN, CACHED])
CANCELLED = 1e4  # floor where gradients are small differences of large terms
HARDNESS = [None, "in_batch_negatives", "hard_negatives", "all_negatives"]


def rows(n: int, d: int = 6) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64)


def columns(count: int, n: int = 7, d: int = 6) -> dict[str, Tensor]:
    """Queries, documents near to them, hard negatives."""
    x = {f"x{i}": rows(n, d) for i in range(count)}
    x["x1"] += x["x0"]
    return x


def compare(leaves: dict[str, Tensor], make=ranking, floor=FLOOR, **options) -> None:
    assert_like_original(make(interop, **options), make(losses, **options), leaves, floor)


def skewed(a: Tensor, b: Tensor) -> Tensor:
    """A user's similarity that has no transpose."""
    return a @ b.T - a.norm(dim=1)[:, None]


SIMILARITIES = {
    "cos_sim": util.cos_sim,
    "dot_score": util.dot_score,
    "euclidean_sim": util.euclidean_sim,
    "a user's": skewed,
}
DIRECTIONS = [(*(d for i, d in enumerate(ALL[1:]) if chosen >> i & 1), "query_to_doc") for chosen in range(8)]
PARTITIONS = [
    *[(directions[::-1], "joint") for directions in DIRECTIONS],
    *[(directions, "per_direction") for directions in (("query_to_doc",), ("query_to_doc", "doc_to_query"))],
]


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("mode", HARDNESS)
@pytest.mark.parametrize("similarity", SIMILARITIES.values(), ids=SIMILARITIES)
def test_all_combinations(similarity, mode, negatives):
    leaves = columns(2 + negatives)
    floor = 16 * FLOOR if similarity is util.dot_score else FLOOR  # logits of up to 300
    for i, (directions, partition_mode) in enumerate(PARTITIONS):
        compare(
            leaves,
            floor=floor,
            directions=directions,
            partition_mode=partition_mode,
            hardness_mode=mode,
            hardness_strength=[5.0, 0.5][i % 2],
            similarity_fct=similarity,
            scale=[20.0, 1.0, 2.5][i % 3],
        )


@pytest.mark.parametrize("n", [1, 2, 17])
@pytest.mark.parametrize("mode", HARDNESS)
def test_batch_sizes(mode, n):
    options = {"hardness_mode": mode, "hardness_strength": 9.0, "scale": 4.0}
    options["floor"] = CANCELLED if n <= 2 else FLOOR
    for negatives in (0, 1, 3):
        for directions in (("query_to_doc",), ("query_to_doc", "doc_to_query"), ALL):
            compare(columns(2 + negatives, n), directions=directions, **options)
        compare(columns(2 + negatives, n), **text.TWO, **options)


@pytest.mark.parametrize("scale", [0.01, 1, 20.0, 100.0])
@pytest.mark.parametrize("strength", [0.0, 1e-3, 9.0])
def test_scale_and_strength(scale, strength):
    for mode in HARDNESS:
        compare(columns(3), scale=scale, hardness_mode=mode, hardness_strength=strength)


def test_directions_in_any_order_and_as_a_list():
    for directions in (["doc_to_query", "query_to_doc"], ALL[::-1], ("query_to_doc",) * 2, list(ALL)):
        compare(columns(3), directions=directions)


def test_other_ways_to_name_a_similarity():
    for similarity in (util.pytorch_cos_sim, functools.partial(util.cos_sim), util.manhattan_sim):
        compare(columns(3), similarity_fct=similarity, directions=ALL)


def test_unusual_embeddings():
    zeros, same = columns(3), columns(3)
    zeros["x0"][2] = zeros["x1"][4] = zeros["x2"][0] = 0
    same["x1"] = same["x0"].clone()
    same["x2"] = same["x0"].flip(0)
    for leaves in (zeros, same, columns(3, 40, 33)):
        compare(leaves, directions=ALL, scale=3.0)
    compare(columns(3, d=1), directions=ALL, scale=3.0, floor=CANCELLED)
    wide = columns(3, 6, 7)
    calls = (ranking(m) for m in (interop, losses))
    assert_like_original(*(lambda f=f, **x: f(**{k: v.T for k, v in x.items()}) for f in calls), wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_embeddings_give_float32(dtype):
    leaves = {k: x.to(dtype) for k, x in columns(3).items()}
    value, found = evaluate(ranking(interop, directions=ALL), leaves)
    yard, its = evaluate(ranking(losses, directions=ALL), leaves)
    truth, slopes = evaluate(ranking(losses, directions=ALL), {k: x.double() for k, x in leaves.items()})
    assert value.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert (value - truth).abs() <= 2 * (yard - truth).abs() + eps
    for key, slope in slopes.items():
        assert found[key].dtype == dtype
        assert (found[key] - slope).norm() <= 2 * (its[key] - slope).norm() + eps * slope.norm()


# Models: all parameters' gradients


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return text.text_model(tmp_path_factory.mktemp("model"), dropout=0.2)


def step(model, make, module, dtype, texts, seed=3) -> dict[str, Tensor]:
    """The value, and the gradient of each parameter, of a step with dropout."""
    model = copy.deepcopy(model).to(dtype).train()
    loss = make(module, model)
    torch.manual_seed(seed)
    value = loss([model.preprocess(column) for column in texts], torch.empty(0))
    (3 * value).backward()
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {"value": value.detach()} | gradients


def assert_same_step(model, make, texts) -> None:
    truth = step(model, make, losses, torch.float64, texts)
    assert len(truth) > 15 and all(x.isfinite().all() for x in truth.values())
    for dtype in (torch.float64, torch.float32):
        ours = step(model, make, interop, dtype, texts)
        yard = truth if dtype == torch.float64 else step(model, make, losses, dtype, texts)
        assert list(ours) == list(truth)
        eps = torch.finfo(dtype).eps
        for key, exact in truth.items():
            assert ours[key].dtype == dtype
            floor = 64 * eps * max(1.0, exact.abs().max().item())
            assert_no_worse(f"{dtype} {key}", ours[key], exact, yard[key], floor)


OPTIONS = {
    "default": {},
    "all directions": {"directions": ALL, "scale": 5.0},
    "per direction": text.TWO,
    "harder": {"hardness_mode": "all_negatives", "hardness_strength": 2.0, "scale": 5.0},
    "another similarity": {"similarity_fct": util.euclidean_sim, "scale": 1.0, "directions": ALL},
}
EACH_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.mark.parametrize("count", [2, 3, 5])
@EACH_OPTION
def test_forward(model, options, count):
    make = lambda module, model: module.MultipleNegativesRankingLoss(model, **options)  # noqa: E731
    assert_same_step(model, make, TEXTS[:count])


SIZES = {
    "2": {"mini_batch_size": 2},
    "3": {"mini_batch_size": 3},
    "one batch": {"mini_batch_size": 32},
    "tokens": {"mini_batch_num_tokens": 9},
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@EACH_OPTION
def test_cached_forward(model, options, size):
    make = lambda module, model: module.CachedMultipleNegativesRankingLoss(model, **options, **size)  # noqa: E731
    assert_same_step(model, make, TEXTS[:3])


@EACH_OPTION
def test_cached_is_the_same_as_plain_and_without_a_gradient_too(model, options):
    model = copy.deepcopy(model).eval()
    features = [model.preprocess(column) for column in TEXTS[:3]]
    expected = losses.MultipleNegativesRankingLoss(model, **options)(features, None)
    for name, more in ((PLAIN, {}), (CACHED, {"mini_batch_size": 2}), (CACHED, {"mini_batch_size": 3})):
        loss = getattr(interop, name)(model, **options, **more)
        with torch.no_grad():
            value = loss(features, None)
        assert not value.requires_grad
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(loss(features, None), expected)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("n, size", [(7, 2), (7, 3), (6, 3), (1, 2)])
def test_calculate_loss(n, size):
    for options in OPTIONS.values():
        floor = CANCELLED if n == 1 else FLOOR
        compare(columns(3, n), cached_ranking, floor, mini_batch_size=size, **options)
    leaves = columns(4, n)
    results = []
    for module in (interop, losses):
        loss = module.CachedMultipleNegativesRankingLoss(Columns("x"), mini_batch_size=size)
        reps = [[part.clone().requires_grad_() for part in x.split(size)] for x in leaves.values()]
        value = loss.calculate_loss(reps, None, with_backward=True)
        assert not value.requires_grad and value.dim() == 0
        results.append([value, *(part.grad for column in reps for part in column)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("count", [-1, 2])
@EACH_CLASS
def test_matryoshka(model, name, count):
    def make(module, model):
        loss = getattr(module, name)(model, **({"mini_batch_size": 3} if name == CACHED else {}))
        import random

        random.seed(4)
        return losses.MatryoshkaLoss(model, loss, [8, 4, 2], [1, 0.5, 0.3], count)

    for texts in (TEXTS[:2], TEXTS[:3]):
        assert_same_step(model, make, texts)


# Classes


def build(name: str, module, model=None, **options):
    return getattr(module, name)(model or Columns("x"), **options)


@EACH_CLASS
def test_class_and_attributes(name, model):
    mine, its = getattr(interop, name), getattr(losses, name)
    assert issubclass(mine, its) and mine.__name__ == name
    for method in ("__init__", "forward", "get_config_dict"):
        assert_signature(getattr(mine, method), getattr(its, method))
    method = "calculate_loss" if name == CACHED else "compute_loss_from_embeddings"
    assert_signature(getattr(mine, method), getattr(its, method))
    named = [{"similarity_fct": s} for s in (functools.partial(util.cos_sim), model.similarity, skewed)]
    sizes = [{"mini_batch_size": 3, "mini_batch_num_tokens": 5, "show_progress_bar": True}]
    for options in (*OPTIONS.values(), *named, *(sizes if name == CACHED else [])):
        ours, theirs = (build(name, m, model, **options) for m in (interop, losses))
        assert ours.get_config_dict() == theirs.get_config_dict()
        attributes = [*theirs.get_config_dict(), "temperature", "citation", "uses_gradient_cache"]
        for attribute in (*attributes, "show_progress_bar"):
            if attribute != "similarity_fct":
                assert getattr(ours, attribute, None) == getattr(theirs, attribute, None)
        assert ours.similarity_fct == theirs.similarity_fct and ours.model is theirs.model
        assert repr(ours) == repr(theirs)
        assert [k for k, _ in ours.named_parameters()] == [k for k, _ in theirs.named_parameters()]
        assert list(ours.state_dict()) == list(theirs.state_dict())


@EACH_CLASS
def test_attributes_may_change_later(name):
    changes = {
        "scale": 4.0,
        "directions": ALL,
        "hardness_mode": "in_batch_negatives",
        "hardness_strength": 3.0,
        "similarity_fct": util.dot_score,
    }
    make = ranking if name == PLAIN else cached_ranking

    def changed(module, **_):
        loss = build(name, module)
        for key, value in changes.items():
            setattr(loss, key, value)
        assert loss.get_config_dict()["directions"] == ALL and loss.temperature == 0.25
        holder = type("Holder", (), {name: lambda *_, **__: loss})
        return make(holder)

    compare(columns(3), changed)


WRONG = {
    "scale=0": {"scale": 0},
    "scale=-1": {"scale": -1.0},
    "scale=nan": {"scale": float("nan")},
    "no direction": {"directions": ()},
    "no query_to_doc": {"directions": ("doc_to_query",)},
    "unknown direction": {"directions": ("query_to_doc", "doc_to_nobody")},
    "partition": {"partition_mode": "both"},
    "per direction with queries": {"directions": ALL[:2], "partition_mode": "per_direction"},
    "per direction with documents": {"directions": ALL, "partition_mode": "per_direction"},
    "hardness": {"hardness_mode": "hard"},
    "strength": {"hardness_strength": -0.1},
    "unknown": {"unknown": 1},
    "tokens": {"mini_batch_num_tokens": 0},
}


@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG)
@EACH_CLASS
def test_errors_of_the_constructor(name, options):
    same_error(*(lambda m=m: build(name, m, **options) for m in (interop, losses)))


def test_errors_of_calls(model):
    one = [model.preprocess(TEXTS[0])]
    for name in (PLAIN, CACHED):
        same_error(*(lambda m=m, n=name: build(n, m, model)(one, None) for m in (interop, losses)))
    x = rows(4)
    for leaves in ({"x0": x}, {"x0": x, "x1": rows(4, 5)}, {"x0": x, "x1": x.float()}):
        same_error(*(lambda m=m, given=leaves: ranking(m)(**given) for m in (interop, losses)))
    for module in (interop, losses):
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            ranking(module)(x0=x, x1=x[1:])
    static = modules.StaticEmbedding(text.tokenizer(), embedding_dim=4)
    model = text.library.SentenceTransformer(modules=[static], device="cpu")
    same_error(*(lambda m=m: build(CACHED, m, model) for m in (interop, losses)))
    features = [model.preprocess(column) for column in TEXTS[:3]]
    torch.testing.assert_close(*(build(PLAIN, m, model)(features, None) for m in (interop, losses)))


def test_strength_without_effect_warns(caplog):
    with caplog.at_level(logging.WARNING, "sentence_transformers"):
        build(PLAIN, interop, hardness_mode="hard_negatives")
    assert "has no effect" in caplog.text


# Several processes


def test_gathering_without_processes():
    for make in (ranking, cached_ranking):
        compare(columns(3), make, directions=ALL, gather_across_devices=True)


def test_gathering(tmp_path):
    for found in processes.run(text.gathered, 2, tmp_path / "run"):
        assert list(found) == list(text.GATHERED)
        for name, (ours, theirs) in found.items():
            (value, slopes), (expected, wanted) = ours, theirs
            torch.testing.assert_close(value, expected, msg=lambda m, name=name: f"{name}: {m}")
            for key, slope in wanted.items():
                where = f"{name}, gradient of {key}: "
                torch.testing.assert_close(slopes[key], slope, msg=lambda m, where=where: where + m)
                assert slope.any() or key.startswith("g"), where
