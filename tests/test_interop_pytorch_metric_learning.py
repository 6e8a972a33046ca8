"""NTXentLoss, SupConLoss and TripletMarginLoss beside those of the installed pytorch-metric-learning."""

import importlib

import pytest
import torch
from explicit import largest_tensor
from originals import FLOOR, assert_like_original, evaluate, original, same_error
from torch import Tensor
from torch.nn import functional as F

losses = original("pytorch_metric_learning.losses")
distances = original("pytorch_metric_learning.distances")
miners = original("pytorch_metric_learning.miners")
reducers = original("pytorch_metric_learning.reducers")
regularizers = original("pytorch_metric_learning.regularizers")
interop = importlib.import_module("sslfast.interop.pytorch_metric_learning")

NAMES = ["NTXentLoss", "SupConLoss", "TripletMarginLoss"]
EACH_LOSS = pytest.mark.parametrize("name", NAMES)
LABELS = torch.tensor([3, 0, 3, 1, 0, 3, 5, 1, 3])  # 5 stands alone
OTHERS = torch.tensor([1, 3, 3, 0, 7, 3, 1])
CANCELLED = 1e4  # floor where gradients are small differences of large terms


def rows(n: int, d: int = 6) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64)


def index(*lists: list[int]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(x, dtype=torch.long) for x in lists)


def both(name: str, **options) -> tuple:
    return getattr(interop, name)(**options), getattr(losses, name)(**options)


def compare(pair: tuple, *, seed: int | None = None, floor: float = FLOOR, **given) -> None:
    """`given` are forward's arguments; embeddings and ref_emb get gradients, the others pass as they are."""
    leaves = {k: given[k] for k in ("embeddings", "ref_emb") if given.get(k) is not None}

    def calls(loss):
        def call(**x):
            if seed is not None:
                torch.manual_seed(seed)
            return loss(**{**given, **x})

        return call

    assert_like_original(*map(calls, pair), leaves, floor)


LABEL_CASES = {
    "uneven": LABELS,
    "pairs": torch.arange(7).repeat(2),
    "triples": torch.arange(4).repeat_interleave(3),
    "same": torch.zeros(6, dtype=torch.long),
    "distinct": torch.arange(6),
    "two rows, one class": torch.tensor([1, 1]),
    "two rows, two classes": torch.tensor([0, 1]),
    "three rows": torch.tensor([0, 0, 1]),
    "one row": torch.tensor([4]),
    "int32": LABELS.int(),
    "uint8": (LABELS + 250).to(torch.uint8),
    "bool": LABELS > 1,
    "negative": torch.tensor([-1, -7, -1, 7, -7, -100, -1]),
    "float": torch.tensor([0.5, -1.25, 0.5, 0.0, -0.0, 0.6, 0.0]),
    "float64": torch.tensor([0.1, 0.1 + 1e-12, 0.1, 0.2, 0.2], dtype=torch.float64),
    "large": torch.tensor([2**62, 2**62 + 1, 2**62, -(2**63), 0, 2**62 + 1, 2**32, 0]),
}


@pytest.mark.parametrize("labels", LABEL_CASES.values(), ids=LABEL_CASES)
@EACH_LOSS
def test_labels(name, labels):
    compare(both(name), embeddings=rows(len(labels)), labels=labels)


@EACH_LOSS
def test_no_rows(name):
    for loss in both(name):
        value, slopes = evaluate(lambda x: loss(x, LABELS[:0]), {"x": rows(0)})  # noqa: B023
        assert value == 0 and slopes["x"].shape == (0, 6)


REFERENCES = {
    "other rows": (LABELS, 7, OTHERS),
    "more rows": (OTHERS, 9, LABELS),
    "same object": (LABELS, 9, LABELS),
    "clone": (LABELS, 9, LABELS.clone()),
    "same values": (torch.arange(6), 6, torch.arange(6)),
    "same classes": (torch.arange(4), 8, torch.arange(4).repeat(2)),
    "no labels for them": (LABELS, 9, None),
    "other dtypes": (LABELS.int(), 7, OTHERS.double()),
    "no positives": (LABELS, 7, OTHERS + 100),
    "no negatives": (torch.zeros(3), 4, torch.zeros(4)),
    "one of them": (LABELS, 1, LABELS[:1].clone()),
    "one row": (LABELS[:1], 7, OTHERS),
    "one pair of each": (torch.tensor([0]), 2, torch.tensor([0, 1])),
}


@pytest.mark.parametrize("labels, count, ref_labels", REFERENCES.values(), ids=REFERENCES)
@EACH_LOSS
def test_references(name, labels, count, ref_labels):
    given = {"embeddings": rows(len(labels)), "labels": labels, "ref_labels": ref_labels}
    compare(both(name), floor=CANCELLED if count == 1 else FLOOR, **given, ref_emb=rows(count))


@EACH_LOSS
def test_references_that_are_the_embeddings(name):
    loss, original_loss = both(name)
    for ids in (LABELS, LABELS.clone()):
        calls = (lambda x, f=f, y=ids: f(x, LABELS, ref_emb=x, ref_labels=y) for f in (loss, original_loss))
        assert_like_original(*calls, {"x": rows(9)})
    compare((loss, original_loss), embeddings=rows(9), labels=LABELS, ref_labels=LABELS.flip(0))


INDICES = {
    "pairs": index([0, 0, 3, 4], [2, 5, 7, 1], [0, 0, 3, 3, 4], [1, 3, 0, 6, 6]),
    "triplets": index([0, 0, 0, 3, 4, 4], [2, 2, 5, 7, 1, 1], [1, 3, 4, 0, 6, 7]),
    "twice the same pairs": index([0, 0, 0, 3], [2, 2, 5, 7], [0, 0, 3, 3, 3], [1, 1, 0, 0, 6]),
    "twice the same triplet": index([0, 0, 0, 4], [2, 2, 2, 1], [1, 1, 3, 6]),
    "one-sided anchors": index([0, 0, 1, 7], [2, 5, 4, 3], [3, 3, 6, 7], [0, 4, 1, 8]),
    "disjoint anchors": index([0, 0, 1], [2, 5, 4], [3, 3], [0, 6]),
    "no positives": index([], [], [0, 1, 1], [1, 2, 3]),
    "no negatives": index([0, 0, 1], [2, 5, 4], [], []),
    "one pair of each": index([0], [2], [0], [1]),
    "one positive pair": index([0], [2], [0, 0], [1, 3]),
    "one triplet": index([0], [2], [1]),
    "no pairs": index([], [], [], []),
    "no triplets": index([], [], []),
    "anchors as pairs": index([0, 3], [0, 3], [0, 3], [1, 1]),
}


@pytest.mark.parametrize("use", ["labels", "no labels", "references", "no labels, references"])
@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES)
@EACH_LOSS
def test_indices_tuple(name, indices, use):
    """Indices decide alone; labels may contradict them."""
    given = {} if use.startswith("no") else {"labels": torch.arange(9) % 2}
    if "references" in use:
        given |= {"ref_emb": rows(11)} | ({"ref_labels": torch.arange(11) % 3} if given else {})
    compare(both(name), embeddings=rows(9), indices_tuple=indices, **given)


@EACH_LOSS
def test_indices_tuple_as_a_list_and_counted_from_the_end(name):
    compare(both(name), embeddings=rows(9), indices_tuple=list(INDICES["triplets"]))
    indices = index([0, 0, 4], [-7, 5, -8], [1, -1, 6])
    compare(both(name), embeddings=rows(9), indices_tuple=indices)


MINERS = {
    "MultiSimilarityMiner": lambda: miners.MultiSimilarityMiner(),
    "BatchHardMiner": lambda: miners.BatchHardMiner(),
    "TripletMarginMiner": lambda: miners.TripletMarginMiner(margin=0.3),
    "hard TripletMarginMiner": lambda: miners.TripletMarginMiner(type_of_triplets="hard"),
}


@pytest.mark.parametrize("miner", MINERS.values(), ids=MINERS)
@EACH_LOSS
def test_miners(name, miner):
    x, y = rows(9), rows(7)
    compare(both(name), embeddings=x, labels=LABELS, indices_tuple=miner()(x, LABELS))
    found = miner()(x, LABELS, y, OTHERS)
    assert len(found[0]) > 1
    compare(both(name), embeddings=x, labels=LABELS, indices_tuple=found, ref_emb=y, ref_labels=OTHERS)


class Shifted(distances.CosineSimilarity):
    """A user's own distance."""

    def compute_mat(self, query_emb, ref_emb):
        return super().compute_mat(query_emb, ref_emb) * torch.linspace(0.1, 1, len(ref_emb)).to(query_emb)


DISTANCES = {
    "cosine": lambda: distances.CosineSimilarity(),
    "cosine, p=1": lambda: distances.CosineSimilarity(p=1),
    "cosine, power=2": lambda: distances.CosineSimilarity(power=2),
    "dot product": lambda: distances.DotProductSimilarity(normalize_embeddings=False),
    "dot product of unit rows": lambda: distances.DotProductSimilarity(),
    "dot product, p=3": lambda: distances.DotProductSimilarity(p=3),
    "dot product, power=2": lambda: distances.DotProductSimilarity(normalize_embeddings=False, power=2),
    "Lp": lambda: distances.LpDistance(),
    "Lp of any rows": lambda: distances.LpDistance(normalize_embeddings=False),
    "Lp, power=2": lambda: distances.LpDistance(power=2),
    "L1": lambda: distances.LpDistance(normalize_embeddings=False, p=1),
    "SNR": lambda: distances.SNRDistance(),
    "a user's": lambda: Shifted(),
}


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
@EACH_LOSS
def test_distances(name, distance):
    x, y = rows(9), rows(7)
    compare(both(name, distance=distance()), embeddings=x, labels=LABELS)
    compare(both(name, distance=distance()), embeddings=x, labels=LABELS, ref_emb=y, ref_labels=OTHERS)
    compare(both(name, distance=distance()), embeddings=x, indices_tuple=INDICES["pairs"])


class HalfReducer(reducers.MeanReducer):
    """A user's own reducer."""

    def element_reduction(self, losses, *_):
        return losses[::2].square().mean()


REDUCERS = {
    "mean": lambda low, high: reducers.MeanReducer(),
    "sum": lambda low, high: reducers.SumReducer(),
    "non-zero": lambda low, high: reducers.AvgNonZeroReducer(),
    "above": lambda low, high: reducers.ThresholdReducer(low=low),
    "below": lambda low, high: reducers.ThresholdReducer(high=high),
    "between": lambda low, high: reducers.ThresholdReducer(low, high),
    "none past": lambda low, high: reducers.ThresholdReducer(low=1e3),
    "per anchor": lambda low, high: reducers.PerAnchorReducer(),
    "per anchor, non-zero": lambda low, high: reducers.PerAnchorReducer(reducers.AvgNonZeroReducer()),
    "classes": lambda low, high: reducers.ClassWeightedReducer(torch.rand(6).square()),
    "several": lambda low, high: reducers.MultipleReducers({"loss": reducers.ThresholdReducer(low, high)}),
    "several, default": lambda low, high: reducers.MultipleReducers({"x": reducers.AvgNonZeroReducer()}),
    "a user's": lambda low, high: HalfReducer(),
}


@pytest.mark.parametrize("use", ["labels", "references", "pairs", "triplets"])
@pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS)
@EACH_LOSS
def test_reducers(name, reducer, use):
    given = {"embeddings": rows(9), "labels": LABELS, "indices_tuple": INDICES.get(use)}
    if use == "references":
        given |= {"ref_emb": rows(7), "ref_labels": OTHERS}
    _, every = both(name, reducer=reducers.DoNothingReducer())
    values = every(**given)["loss"]["losses"].sort().values
    low, high = values[[len(values) // 3, 2 * len(values) // 3]].tolist()
    pair = both(name, reducer=reducer((low + values[0].item()) / 2, (high + values[-1].item()) / 2))
    if name == "TripletMarginLoss" and isinstance(pair[1].reducer, reducers.PerAnchorReducer):
        same_error(*(lambda f=f: f(**given) for f in pair))
    else:
        compare(pair, **given)


@EACH_LOSS
def test_do_nothing_reducer_gives_the_same_table(name):
    x = rows(9)
    for dtype in (torch.float64, torch.float32):
        for options in ({"labels": LABELS}, {"indices_tuple": INDICES["pairs"]}, {"labels": torch.arange(9)}):
            ours, theirs = (
                f(x.to(dtype), **options)["loss"] for f in both(name, reducer=reducers.DoNothingReducer())
            )
            assert ours.pop("reduction_type") == theirs.pop("reduction_type")
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [1, 0.3, 0])
@EACH_LOSS
def test_embedding_regularizer(name, weight):
    options = {"embedding_regularizer": regularizers.LpRegularizer(power=2), "embedding_reg_weight": weight}
    pair = both(name, **options)
    assert pair[0].sub_loss_names() == pair[1].sub_loss_names() == ["loss", "embedding_reg_loss"]
    compare(pair, embeddings=rows(9), labels=LABELS)
    compare(pair, embeddings=rows(9), labels=LABELS, ref_emb=rows(7), ref_labels=OTHERS)
    compare(pair, embeddings=rows(9), labels=torch.arange(9))


# Options of each loss


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1, 20.0, -0.3])
@pytest.mark.parametrize("name", NAMES[:2])
def test_temperature(name, temperature):
    compare(both(name, temperature=temperature), embeddings=rows(9), labels=LABELS)
    compare(both(name, temperature=temperature), embeddings=rows(14), labels=LABEL_CASES["pairs"])
    compare(both(name, temperature=temperature), embeddings=rows(9), indices_tuple=INDICES["pairs"])


@pytest.mark.parametrize("name", NAMES[:2])
def test_learnable_temperature(name):
    leaves = {"x": rows(9), "t": torch.tensor(0.3, dtype=torch.float64)}
    assert_like_original(
        *(
            lambda x, t, module=module: getattr(module, name)(temperature=t)(x, LABELS)
            for module in (interop, losses)
        ),
        leaves,
    )


@pytest.mark.parametrize("use", ["labels", "references", "same object", "pairs", "triplets"])
@pytest.mark.parametrize("smooth_loss", [False, True])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("margin", [0.05, 0.7, 0, -0.4])
def test_triplet_options(margin, swap, smooth_loss, use):
    given = {"embeddings": rows(9), "labels": LABELS, "indices_tuple": INDICES.get(use)}
    if use in ("references", "same object"):
        given |= {"ref_emb": rows(9), "ref_labels": LABELS if use == "same object" else LABELS.flip(0)}
    for distance in (None, distances.CosineSimilarity()):
        options = {"margin": margin, "swap": swap, "smooth_loss": smooth_loss, "distance": distance}
        compare(both("TripletMarginLoss", **options), **given)


@pytest.mark.parametrize("count", ["all", 1, 4])
def test_triplets_per_anchor(count):
    pair = both("TripletMarginLoss", triplets_per_anchor=count, margin=0.5)
    x, y = rows(9), rows(7)
    compare(pair, seed=3, embeddings=x, labels=LABELS)
    compare(pair, seed=4, embeddings=x, labels=LABELS, ref_emb=y, ref_labels=OTHERS)
    compare(pair, seed=5, embeddings=x, labels=LABELS, ref_emb=rows(9), ref_labels=LABELS)
    compare(pair, seed=6, embeddings=x, labels=torch.arange(9))
    compare(pair, seed=7, embeddings=x, indices_tuple=INDICES["triplets"])


# Inputs and attributes


@EACH_LOSS
def test_unusual_embeddings(name):
    pair = both(name)
    wide = rows(6, 9)
    assert_like_original(*(lambda x, f=f: f(x.T, LABELS) for f in pair), {"x": wide})
    with_zeros = rows(9)
    with_zeros[[0, 4]] = 0
    compare(pair, embeddings=with_zeros, labels=LABELS)
    compare(pair, embeddings=rows(1).repeat(9, 1), labels=LABELS, floor=CANCELLED)
    compare(pair, embeddings=2 + rows(9, 1).tanh(), labels=LABELS, floor=CANCELLED)
    compare(pair, embeddings=rows(40, 33), labels=torch.randint(0, 9, (40,)))
    with torch.no_grad():
        torch.testing.assert_close(*(f(wide.T, LABELS) for f in pair))


@EACH_LOSS
def test_only_references_need_a_gradient(name):
    x = rows(9)
    assert_like_original(
        *(lambda y, f=f: f(x.to(y), LABELS, ref_emb=y, ref_labels=OTHERS) for f in both(name)), {"y": rows(7)}
    )


def test_ntxent_is_right_where_the_original_saturates():
    """The original's log(x + tiny) stops at 87.3 in float32; the terms here are about 400."""
    x = torch.tensor([[1, 0], [-1, 0], [1, 0.1], [-1, 0.1]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    ours, theirs = both("NTXentLoss", temperature=0.005)
    truth, slope = evaluate(lambda x: theirs(x, labels), {"x": x})
    value, found = evaluate(lambda x: ours(x, labels), {"x": x.float()})
    assert theirs(x.float(), labels) < 88 and truth > 350
    torch.testing.assert_close(value, truth.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found["x"], slope["x"].float(), rtol=1e-4, atol=1e-2)


@EACH_LOSS
def test_attributes_may_change_later(name):
    pair = both(name)
    compare(pair, embeddings=rows(9), labels=LABELS)
    for loss in pair:
        loss.temperature, loss.margin = 0.7, 0.4
    compare(pair, embeddings=rows(9), labels=LABELS)
    for loss in pair:
        loss.reducer = reducers.ThresholdReducer(low=0.1)
    compare(pair, embeddings=rows(9), labels=LABELS)
    for loss in pair:
        loss.distance.power = 2
    compare(pair, embeddings=rows(9), labels=LABELS)


@EACH_LOSS
def test_subclasses_by_users(name):
    def subclass(base):
        class Mine(base):
            def get_default_distance(self):
                return distances.DotProductSimilarity(normalize_embeddings=False)

            def get_default_reducer(self):
                return reducers.SumReducer()

        return Mine

    pair = tuple(subclass(getattr(module, name))() for module in (interop, losses))
    compare(pair, embeddings=rows(9), labels=LABELS)


def test_pairs_that_are_positive_and_negative():
    given = {"embeddings": rows(9), "indices_tuple": index([0, 0, 1], [2, 5, 4], [0, 0], [2, 3])}
    same_error(*(lambda f=f: f(**given) for f in both("SupConLoss")))
    compare(both("NTXentLoss"), **given)
    compare(both("TripletMarginLoss"), **given)


@pytest.mark.parametrize("name", NAMES[:2])
def test_no_square_tensor(name):
    n = 256
    x = F.normalize(torch.randn(n, 8), dim=1)
    for labels in [torch.arange(n // 2).repeat(2)] + [torch.arange(n) // 7] * (name == "SupConLoss"):
        loss = both(name)[0]
        assert largest_tensor(lambda x: loss(x, labels), [x.requires_grad_()]) < n * n  # noqa: B023
