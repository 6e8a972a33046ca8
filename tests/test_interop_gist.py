"""GISTEmbedLoss beside that of the installed sentence-transformers."""

import copy

import interop_text_processes as text
import pytest
import torch
from interop_text_processes import TEXTS, WORDS, Columns, gist, interop, losses, modules, tokenizer
from originals import FLOOR, assert_like_original, assert_signature, evaluate, same_error
from torch import Tensor
from torch.nn import functional as F

from sslfast.testing import assert_no_worse

CANCELLED = 1e4  # floor where gradients are small differences of large terms


def rows(n: int, d: int) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64)


def columns(count: int, n: int = 9, guide: int = 4) -> dict[str, Tensor]:
    """x0, x1, x2: anchors, positives, negatives; g0, g1, g2: the guide's."""
    x = {f"{k}{i}": rows(n, d) for i in range(count) for k, d in (("x", 6), ("g", guide))}
    x["x1"] += x["x0"]
    x["g1"] += x["g0"]
    return x


def compare(leaves: dict[str, Tensor], floor: float = FLOOR, **options) -> None:
    assert_like_original(gist(interop, **options), gist(losses, **options), leaves, floor)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def masked(leaves: dict[str, Tensor], margin_strategy: str, margin: float) -> dict[str, float]:
    """Which share of the other rows the guide masks, for each kind of negatives."""
    guides = [v for k, v in leaves.items() if k[0] == "g"]
    own = cosines(guides[0], guides[1]).diagonal()[:, None]
    limit = own - margin * (own.abs() if margin_strategy == "relative" else 1)
    others = ~torch.eye(len(own), dtype=torch.bool)
    pairs = {"ap": guides[:2], "aa": [guides[0]] * 2, "pp": [guides[1]] * 2}
    pairs |= {"an": [guides[0], guides[2]]} if len(guides) == 3 else {}
    return {k: (cosines(*v) > limit)[others].double().mean().item() for k, v in pairs.items()}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("contrast_positives", [True, False])
@pytest.mark.parametrize("contrast_anchors", [True, False])
@pytest.mark.parametrize("margin", [0.0, 0.05, 0.1, -0.1])
@pytest.mark.parametrize("margin_strategy", ["absolute", "relative"])
def test_options(margin_strategy, margin, contrast_anchors, contrast_positives, count):
    options = {"margin_strategy": margin_strategy, "margin": margin}
    leaves = columns(count)
    assert all(0.02 < share < 0.9 for share in masked(leaves, **options).values())
    options |= {"contrast_anchors": contrast_anchors, "contrast_positives": contrast_positives}
    for temperature in (0.01, 0.2):
        compare(leaves, temperature=temperature, **options)


@pytest.mark.parametrize("temperature", [0.01, 0.05, 1, 10.0])
@pytest.mark.parametrize("guide", [1, 3, 6, 50])
def test_temperature_and_width_of_the_guide(guide, temperature):
    for count in (2, 3):
        compare(columns(count, guide=guide), temperature=temperature)


@pytest.mark.parametrize("n", [1, 2, 17, 40])
def test_batch_sizes(n):
    for count in (2, 3):
        for margin in (0.0, 0.1):
            compare(columns(count, n), CANCELLED if n <= 2 else FLOOR, margin=margin, temperature=0.1)


@pytest.mark.parametrize("margin_strategy", ["absolute", "relative"])
def test_pairs_that_the_guide_finds_dissimilar(margin_strategy):
    leaves = columns(3)
    leaves["g1"] = rows(9, 4) - leaves["g0"]
    assert (F.cosine_similarity(leaves["g0"], leaves["g1"]) < 0).sum() > 3
    compare(leaves, margin_strategy=margin_strategy, margin=0.3, temperature=0.1)


def test_all_or_none_masked():
    """All: the positive alone is left, and the loss is 0 without a gradient."""
    leaves = columns(3)
    leaves["g1"] = leaves["g2"] = -leaves["g0"] + 1e-3 * leaves["g1"]
    leaves["g0"] = leaves["g0"][:1] + 0.1 * leaves["g0"]
    shares = masked(leaves | {"g1": leaves["g0"]}, "absolute", 2.5)
    assert set(shares.values()) == {1.0}
    compare(leaves, margin=2.5)
    value, slopes = evaluate(gist(interop, margin=2.5), leaves)
    assert value == 0 and not any(x.any() for x in slopes.values())
    compare(columns(3), margin=-2.5, temperature=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["repeated positives", "repeated negatives", "guide without differences"])
def test_ties_with_the_pair_itself_are_kept(kind, dtype):
    """Equal texts have equal similarities, which are not above the limit."""
    for n, d in ((9, 4), (17, 33), (33, 384)):
        leaves = columns(3, n, d)
        if kind == "repeated positives":
            for k in "xg":
                leaves[f"{k}1"][n // 2 :] = leaves[f"{k}1"][0]
        elif kind == "repeated negatives":
            leaves["g2"] = leaves["g1"].clone()
        else:
            leaves |= {k: v[:1].repeat(n, 1) for k, v in leaves.items() if k[0] == "g"}
            leaves["g1"], leaves["g2"] = leaves["g0"] + rows(1, d), leaves["g0"] * 1.0
            leaves["g2"] = leaves["g1"].clone()
        leaves = {k: v.to(dtype) for k, v in leaves.items()}
        ours, theirs = (evaluate(gist(m, temperature=0.5), leaves) for m in (interop, losses))
        torch.testing.assert_close(ours, theirs)


def test_rows_of_no_length():
    """nn.CosineSimilarity takes lengths below 1e-8 for 1e-8, and has no derivative between 0 and there."""
    short = {"x0": 0, "x1": 3, "x2": 5, "g0": 1, "g1": 4, "g2": 5}
    for size in (0.0, 1e-9, 1e-7):
        leaves = columns(3)
        for key, row in short.items():
            leaves[key][row] *= size
        if size == 1e-9:
            ours, theirs = (evaluate(gist(m, temperature=0.2), leaves) for m in (interop, losses))
            torch.testing.assert_close(ours[0], theirs[0])
            for key, row in short.items():
                others = torch.arange(9) != row
                torch.testing.assert_close(ours[1][key][others], theirs[1][key][others])
        else:
            compare(leaves, temperature=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_embeddings_give_float32(dtype):
    leaves = {k: v.to(dtype if k[0] == "x" else torch.float32) for k, v in columns(3).items()}
    options = {"temperature": 0.2, "margin": 0.1}
    value, found = evaluate(gist(interop, **options), leaves)
    yard, its = evaluate(gist(losses, **options), leaves)
    wide = {k: v.double() for k, v in leaves.items()}
    truth, slopes = evaluate(gist(losses, **options), wide)
    assert value.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert (value - truth).abs() <= 2 * (yard - truth).abs() + eps
    for key in ("x0", "x1", "x2"):
        assert found[key].dtype == dtype
        error, allowed = ((x[key] - slopes[key]).norm() for x in (found, its))
        assert error <= 2 * allowed + eps * slopes[key].norm()


# Models


GUIDES = {
    "same tokenizer": {},
    "wider": {"width": 12},
    "other tokenizer": {"words": WORDS[::-1], "width": 12},
    "fewer words": {"words": WORDS[:-1], "width": 10},
    "shorter": {"longest": 6},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model with dropout, and guides."""
    made = {k: text.text_model(tmp_path_factory.mktemp("guide"), **v) for k, v in GUIDES.items()}
    return text.text_model(tmp_path_factory.mktemp("model"), dropout=0.2), made


def step(module, model, guide, dtype, texts, matryoshka=False, **options) -> dict[str, Tensor]:
    """The value, and the gradient of each parameter of the model, of a step with dropout."""
    model, guide = copy.deepcopy(model).to(dtype).train(), copy.deepcopy(guide).to(dtype)
    loss = module.GISTEmbedLoss(model, guide, **options)
    loss = losses.MatryoshkaLoss(model, loss, [8, 4]) if matryoshka else loss
    features = [model.preprocess(column) for column in texts]
    torch.manual_seed(3)
    value = loss(features, torch.empty(0))
    (3 * value).backward()
    assert all(p.grad is None for p in guide.parameters())
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {"value": value.detach()} | gradients


def assert_same_step(*given, **options) -> None:
    model, guide, texts = given
    truth = step(losses, model, guide, torch.float64, texts, **options)
    assert len(truth) > 15 and truth["value"] > 0
    for dtype in (torch.float64, torch.float32):
        ours = step(interop, model, guide, dtype, texts, **options)
        yard = truth if dtype == torch.float64 else step(losses, model, guide, dtype, texts, **options)
        assert list(ours) == list(truth)
        for key, exact in truth.items():
            assert ours[key].dtype == dtype
            floor = FLOOR * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())
            assert_no_worse(f"{dtype} {key}", ours[key], exact, yard[key], floor)


@pytest.mark.parametrize("name", GUIDES)
def test_models(models, name):
    model, guides = models
    retokenizes = name in ("other tokenizer", "fewer words", "shorter")
    assert interop.GISTEmbedLoss(model, guides[name]).must_retokenize == retokenizes
    for texts in (TEXTS[:2], TEXTS[:3]):
        assert_same_step(model, guides[name], texts, temperature=0.1, margin=0.05)
    assert_same_step(model, guides[name], TEXTS[:3], temperature=0.2, matryoshka=True)


def test_without_a_gradient(models):
    model, guides = models
    model = copy.deepcopy(model).eval()
    features = [model.preprocess(column) for column in TEXTS[:3]]
    for guide in guides.values():
        with torch.no_grad():
            ours, theirs = (m.GISTEmbedLoss(model, guide)(features, None) for m in (interop, losses))
        assert not ours.requires_grad
        torch.testing.assert_close(ours, theirs)


class Reader(Columns):
    """A guide that keeps what it is given to read."""

    def preprocess(self, texts: list[str]) -> dict[str, Tensor]:
        self.seen = [*getattr(self, "seen", []), texts]
        counts = [[len(t), t.count("a") + 1, t.count("e") + 2] for t in texts]
        return {"g": torch.tensor(counts, dtype=torch.float64)}


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "flattened"])
def test_what_the_guide_reads(flat):
    """Also of sentences one after another in one row, as flash attention takes them."""
    mine, features = tokenizer(), []
    for column in TEXTS[:3]:
        ids = mine(column, padding=not flat, return_tensors=None if flat else "pt")["input_ids"]
        if flat:
            ends = torch.tensor([0, *map(len, ids)]).cumsum(0)
            given = {"input_ids": torch.tensor([sum(ids, [])]), "cu_seq_lens_q": ends}
        else:
            given = {"input_ids": ids}
        features.append(given | {"x": rows(len(column), 6)})
    seen, values = [], []
    for module in (interop, losses):
        guide = Reader("g", tokenizer(WORDS[::-1]))
        loss = module.GISTEmbedLoss(Columns("x", mine), guide)
        values.append(loss([dict(f) for f in features], None))
        seen.append(guide.seen)
    assert seen[0] == seen[1] == TEXTS[:3]
    torch.testing.assert_close(*values)


# Classes


def test_class_and_attributes(models):
    mine, its = interop.GISTEmbedLoss, losses.GISTEmbedLoss
    assert issubclass(mine, its) and mine.__name__ == "GISTEmbedLoss"
    for method in ("__init__", "forward", "get_config_dict", "sim_matrix"):
        assert_signature(getattr(mine, method), getattr(its, method))
    model, guides = models
    for guide in guides.values():
        for options in ({}, {"margin": 0.1, "margin_strategy": "relative", "contrast_anchors": False}):
            ours, theirs = (m.GISTEmbedLoss(model, guide, **options) for m in (interop, losses))
            assert ours.get_config_dict() == theirs.get_config_dict()
            assert ours.citation == theirs.citation and repr(ours) == repr(theirs)
            assert list(ours.state_dict()) == list(theirs.state_dict())
            assert hasattr(ours, "tokenizer") == hasattr(theirs, "tokenizer")
            x, y = rows(3, 4), rows(5, 4)
            torch.testing.assert_close(ours.sim_matrix(x, y), theirs.sim_matrix(x, y))


def test_attributes_may_change_later():
    changes = {"temperature": 0.3, "margin": 0.2, "margin_strategy": "relative", "contrast_positives": False}

    def changed(module):
        words = tokenizer()
        loss = module.GISTEmbedLoss(Columns("x", words), Columns("g", words))
        for key, value in changes.items():
            setattr(loss, key, value)
        holder = type("Holder", (), {"GISTEmbedLoss": lambda *_: loss})
        return gist(holder)

    assert_like_original(changed(interop), changed(losses), columns(3))


def test_errors(models):
    model, guides = models
    static = text.library.SentenceTransformer(
        modules=[modules.StaticEmbedding(tokenizer(), embedding_dim=4)], device="cpu"
    )
    bare = torch.nn.Linear(2, 2)
    guide = guides["same tokenizer"]
    features = [model.preprocess(column) for column in TEXTS]
    wrong = [
        lambda m: m.GISTEmbedLoss(model, guide, margin_strategy="none"),
        lambda m: m.GISTEmbedLoss(model, guide, unknown=1),
        lambda m: m.GISTEmbedLoss(bare, guide),
        lambda m: m.GISTEmbedLoss(model, bare),
        lambda m: m.GISTEmbedLoss(model, Columns("g", "words")),
        lambda m: m.GISTEmbedLoss(static, guide),
        lambda m: m.GISTEmbedLoss(static, guides["other tokenizer"]),
        lambda m: m.GISTEmbedLoss(model, guide)(features[:1], None),
        lambda m: m.GISTEmbedLoss(model, guide)(features[:4], None),
    ]
    for call in wrong:
        same_error(*(lambda m=m, call=call: call(m) for m in (interop, losses)))
    x, g = rows(4, 6), rows(4, 3)
    for a, b, u, v in ((x, x[:, 1:], g, g), (x, x, g, g[:, 1:]), (x, x[1:], g, g[1:])):
        for module in (interop, losses):
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                gist(module)(x0=a, x1=b, g0=u, g1=v)


@pytest.mark.parametrize("make", [gist, text.ranking], ids=["gist", "ranking"])
def test_second_derivatives_are_right_or_an_error(make):
    given = columns(3) if make is gist else {k: v for k, v in columns(3).items() if k[0] == "x"}
    found = []
    for module in (losses, interop):
        x = given["x0"].clone().requires_grad_()
        (slope,) = torch.autograd.grad(make(module)(**given | {"x0": x}), x, create_graph=True)
        try:
            found += torch.autograd.grad(slope.square().sum(), x)
        except RuntimeError:
            return
    torch.testing.assert_close(*found)


def test_gathering_without_processes():
    for count in (2, 3):
        compare(columns(count), gather_across_devices=True, margin=0.05)
