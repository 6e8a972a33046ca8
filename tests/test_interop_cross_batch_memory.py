"""CrossBatchMemory beside pytorch-metric-learning's own, and what it has in common with the losses: classes,
attributes, errors, SelfSupervisedLoss, statistics and 16-bit inputs."""

import copy
import importlib
import pickle
from collections.abc import Callable

import pytest
import torch
from originals import FLOOR, assert_like_original, assert_signature, evaluate, original, same_error
from torch import Tensor

losses = original("pytorch_metric_learning.losses")
distances = original("pytorch_metric_learning.distances")
miners = original("pytorch_metric_learning.miners")
reducers = original("pytorch_metric_learning.reducers")
interop = importlib.import_module("sslfast.interop.pytorch_metric_learning")

NAMES = ["NTXentLoss", "SupConLoss", "TripletMarginLoss"]
CANCELLED = 1e4  # floor where gradients are small differences of large terms
EACH_LOSS = pytest.mark.parametrize("name", NAMES)
EACH_CLASS = pytest.mark.parametrize("name", [*NAMES, "CrossBatchMemory"])
LABELS = torch.tensor([3, 0, 3, 1, 0, 3, 5, 1, 3])
OTHERS = torch.tensor([1, 3, 3, 0, 7, 3, 1])
DIM = 6


def rows(n: int) -> Tensor:
    return torch.randn(n, DIM, dtype=torch.float64)


def index(*lists: list[int]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(x, dtype=torch.long) for x in lists)


def both(name: str, **options) -> tuple:
    if name == "CrossBatchMemory":
        return tuple(
            m.CrossBatchMemory(m.NTXentLoss(), **{"embedding_size": DIM} | options) for m in (interop, losses)
        )
    return getattr(interop, name)(**options), getattr(losses, name)(**options)


# Memory: (class of the memory, class of the loss) of ours, each beside the original in the original
NESTS = {
    **{f"ours({name})": (interop, interop, name) for name in NAMES},
    **{f"original({name})": (losses, interop, name) for name in NAMES},
    **{
        f"ours(original {name})": (interop, losses, name)
        for name in ("NTXentLoss", "SupConLoss", "ContrastiveLoss", "MultiSimilarityLoss", "CircleLoss")
    },
}
EACH_NEST = pytest.mark.parametrize("outer, inner, name", NESTS.values(), ids=NESTS)
SIZES = {
    "wraps around": ([5, 5, 5, 5, 5], 12),
    "divides": ([4, 4, 4, 4], 8),
    "not yet full": ([3, 4], 12),
    "fills": ([12, 12, 5, 12], 12),
    "all sizes": ([1, 7, 2, 1, 11, 3, 1, 1], 11),
    "of one row": ([1, 1, 1, 1, 1], 3),
}


def train(make: Callable, labels: list[Tensor], options: list[dict] | None = None) -> Callable[..., Tensor]:
    """Sum of the losses of a fresh memory's steps, one for each batch, as a function of x0, x1, ..."""

    def steps(**batches: Tensor) -> Tensor:
        memory, given = make(), options or [{}] * len(labels)
        terms = [memory(x, y, **o) for x, y, o in zip(batches.values(), labels, given, strict=True)]
        return torch.stack([t * (i + 1) for i, t in enumerate(terms)]).sum()

    return steps


def compare(nest: tuple, labels: list[Tensor], options=None, size=12, floor=FLOOR, **more) -> None:
    """`more` are factories of further arguments of the memory."""
    outer, inner, name = nest

    def make(outer, inner):
        further = {k: f() for k, f in more.items()}
        return lambda: outer.CrossBatchMemory(getattr(inner, name)(), DIM, size, **further)

    batches = {f"x{i}": rows(len(y)) for i, y in enumerate(labels)}
    calls = (train(make(*modules), labels, options) for modules in ((outer, inner), (losses, losses)))
    assert_like_original(*calls, batches, floor)


def some_labels(sizes: list[int], classes: int = 3) -> list[Tensor]:
    return [torch.randint(0, classes, (n,)) for n in sizes]


@pytest.mark.parametrize("sizes, size", SIZES.values(), ids=SIZES)
@EACH_NEST
def test_steps(outer, inner, name, sizes, size):
    if outer is inner and name != "TripletMarginLoss":  # see test_one_row_does_not_meet_itself
        sizes = [n for n in sizes if n > 1] or [2]
    floor = CANCELLED if 1 in sizes else FLOOR
    compare((outer, inner, name), some_labels(sizes), size=size, floor=floor)


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_one_row_does_not_meet_itself(name):
    """As documented. The original removes a batch's pairs of a row and itself, unless it has one row."""
    memory = interop.CrossBatchMemory(getattr(interop, name)(), DIM, 3)
    x, labels = torch.nn.functional.normalize(rows(3)).float(), torch.tensor([0, 1, 0])
    found = [memory(x[i : i + 1], labels[i : i + 1]) for i in range(3)]
    logits = x[2] @ x[:2].T / memory.loss.temperature
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(0))
    torch.testing.assert_close(torch.stack(found), torch.stack((0 * expected, 0 * expected, expected)))


@EACH_NEST
def test_labels_of_other_kinds(outer, inner, name):
    for change in (lambda y: y.int() - 2, lambda y: y / 4 - 0.25, lambda y: y + 2**62, lambda y: y * 0):
        compare((outer, inner, name), [change(y) for y in some_labels([5, 5, 5])])
    compare((outer, inner, name), [torch.arange(5) + 5 * i for i in range(3)])
    compare((outer, inner, name), [torch.arange(5)] * 4)


MASKS = [
    [True, False, True, True, False, False],
    [False] * 6,
    [True] * 5 + [False],
    [False] * 5 + [True],
    [True, True, False, False, True, True],
]


@EACH_NEST
def test_enqueue_mask(outer, inner, name):
    options = [{"enqueue_mask": torch.tensor(mask)} for mask in MASKS]
    compare((outer, inner, name), some_labels([6] * 5), options, size=7)
    compare((outer, inner, name), some_labels([6] * 3), [options[0], {}, options[2]], size=7)
    compare((outer, inner, name), some_labels([6]), [options[0]], size=3)


MINERS = {
    "MultiSimilarityMiner": lambda: miners.MultiSimilarityMiner(),
    "BatchHardMiner": lambda: miners.BatchHardMiner(),
    "TripletMarginMiner": lambda: miners.TripletMarginMiner(margin=0.4),
}


@pytest.mark.parametrize("miner", MINERS.values(), ids=MINERS)
@EACH_NEST
def test_miner(outer, inner, name, miner):
    labels = some_labels([6, 6, 6, 6])
    compare((outer, inner, name), labels, miner=miner, size=14)
    masked = [{"enqueue_mask": torch.tensor(mask)} for mask in MASKS[2:]]
    compare((outer, inner, name), labels[:3], masked, miner=miner, size=14)


CLASSES = torch.tensor([0, 1, 0, 1, 1, 2])
PAIRS = index([0, 1, 4], [2, 3, 1], [0, 2, 2, 5], [1, 1, 4, 0])
TRIPLETS = index([0, 0, 1, 3], [2, 2, 4, 1], [1, 3, 2, 0])


@pytest.mark.parametrize("indices", [PAIRS, TRIPLETS], ids=["pairs", "triplets"])
@EACH_NEST
def test_indices_tuple(outer, inner, name, indices):
    """They are added to what the labels or the miner give."""
    options = [{"indices_tuple": indices}, {}, {"indices_tuple": tuple(x[:0] for x in indices)}]
    for miner in (lambda: None, *MINERS.values()):
        compare((outer, inner, name), [CLASSES] * 4, [*options, options[0]], miner=miner)
        if name in ("NTXentLoss", "TripletMarginLoss", "ContrastiveLoss"):  # pairs may contradict the labels
            compare((outer, inner, name), [CLASSES.flip(0)] * 3, options, miner=miner, size=14)


def state(memory) -> dict:
    names = ("queue_idx", "has_been_filled", "embedding_size", "memory_size", "curr_batch_idx")
    return {k: getattr(memory, k) for k in names if hasattr(memory, k)} | dict(memory.state_dict())


def assert_same_state(memory, other) -> None:
    found, expected = state(memory), state(other)
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, check_dtype=True)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.int64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("sizes, size", SIZES.values(), ids=SIZES)
def test_state(sizes, size, dtypes):
    ours, theirs = both("CrossBatchMemory", memory_size=size)
    assert_same_state(ours, theirs)
    for labels in some_labels(sizes):
        x = rows(len(labels)).to(dtypes[0])
        for memory in (ours, theirs):
            memory(x.clone().requires_grad_(), labels.to(dtypes[1]))
        assert_same_state(ours, theirs)
        assert not ours.embedding_memory.requires_grad
    for memory in (ours, theirs):
        memory.reset_queue()
    assert_same_state(ours, theirs)
    assert not ours.embedding_memory.any() and ours.queue_idx == 0
    torch.testing.assert_close(ours(x, labels), theirs(x, labels))


def test_state_with_masks():
    ours, theirs = both("CrossBatchMemory", memory_size=7)
    for mask in (MASKS[1], *MASKS):
        x, labels = rows(6), some_labels([6])[0]
        for memory in (ours, theirs):
            memory(x, labels, enqueue_mask=torch.tensor(mask))
        assert_same_state(ours, theirs)


@pytest.mark.parametrize("way", ["ours to original", "original to ours"])
def test_state_dict_interchange(way):
    pair = both("CrossBatchMemory", memory_size=12)
    source, target = pair if way == "ours to original" else pair[::-1]
    twin = copy.deepcopy(source)
    for labels in some_labels([5, 5, 5]):
        source(rows(5), labels)
    for memory in (target, twin):
        memory.load_state_dict(source.state_dict())
        memory.queue_idx, memory.has_been_filled = source.queue_idx, source.has_been_filled
    for labels in some_labels([5, 5, 5]):
        x = rows(5).float()
        torch.testing.assert_close(target(x, labels), twin(x, labels))
    assert_same_state(target, twin)
    again = pickle.loads(pickle.dumps(target))
    torch.testing.assert_close(again(x, labels), twin(x, labels))


def test_errors_of_the_memory():
    x = rows(9)
    wrong = {
        "mask and indices": lambda f: f(x, LABELS, PAIRS, torch.arange(9) < 4),
        "short mask": lambda f: f(x, LABELS, enqueue_mask=torch.arange(8) < 4),
        "batch larger than memory": lambda f: f(rows(13), torch.arange(13)),
        "fewer labels": lambda f: f(x, LABELS[:-1]),
        "2-D labels": lambda f: f(x, LABELS[:, None]),
        "other width": lambda f: f(x[:, 1:], LABELS),
        "no labels": lambda f: f(x, None),
    }
    for call in wrong.values():
        same_error(*(lambda f=f, call=call: call(f) for f in both("CrossBatchMemory", memory_size=12)))
    assert interop.CrossBatchMemory.supported_losses() == losses.CrossBatchMemory.supported_losses()
    for wrapper in (lambda f: interop.CrossBatchMemory(f, 4), interop.SelfSupervisedLoss):
        with pytest.raises(Exception, match="not supported for ArcFaceLoss"):
            wrapper(losses.ArcFaceLoss(3, 4))


@EACH_LOSS
def test_statistics(name):
    def stats(loss) -> dict:
        loss(rows(9), LABELS)
        loss(x, LABELS, ref_emb=y, ref_labels=OTHERS)
        return {
            f"{part}.{k}": v
            for part, m in (("loss", loss), ("distance", loss.distance), ("reducer", loss.reducer))
            for k, v in vars(m).items()
            if k in getattr(m, "_record_these", []) + getattr(m, "_record_these_stats", [])
        }

    x, y = rows(9), rows(7)
    ours, theirs = (
        getattr(module, name)(
            distance=distances.CosineSimilarity(collect_stats=True),
            reducer=reducers.ThresholdReducer(low=0.1, high=9, collect_stats=True),
            collect_stats=True,
        )
        for module in (interop, losses)
    )
    torch.manual_seed(1)
    found = stats(ours)
    torch.manual_seed(1)
    expected = stats(theirs)
    assert {"distance.final_avg_ref_norm", "reducer.losses_size", "reducer.num_past_filter"} <= set(expected)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
@EACH_LOSS
def test_self_supervised_loss(name, symmetric):
    assert interop.SelfSupervisedLoss is losses.SelfSupervisedLoss
    wrapped = [interop.SelfSupervisedLoss(loss, symmetric=symmetric) for loss in both(name)]
    for n in (1, 2, 7):
        assert_like_original(*wrapped, {"embeddings": rows(n), "ref_emb": rows(n)}, CANCELLED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EACH_LOSS
def test_16_bit_embeddings_give_float32(name, dtype):
    """At most twice as far from the truth as the original, where that can do 16 bits at all."""
    x = rows(9).to(dtype)
    ours, theirs = (lambda x, f=f: f(x, LABELS) for f in both(name))
    value, found = evaluate(ours, {"x": x})
    truth, slopes = evaluate(theirs, {"x": x.double()})
    try:
        yard, its = evaluate(theirs, {"x": x})
    except NotImplementedError:
        yard, its = truth, slopes
    assert value.dtype == torch.float32 and found["x"].dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (value - truth).abs() <= 2 * (yard - truth).abs() + 1e-5
    error, allowed = (found["x"] - slopes["x"]).norm(), 2 * (its["x"] - slopes["x"]).norm()
    assert error <= allowed + eps * slopes["x"].norm()


@EACH_CLASS
def test_class_and_attributes(name):
    mine, its = getattr(interop, name), getattr(losses, name)
    assert issubclass(mine, its) and mine.__name__ == name
    assert_signature(mine.forward, its.forward)
    assert_signature(mine, its)
    ours, theirs = both(name)
    assert repr(ours) == repr(theirs)
    for attribute in ("temperature", "margin", "swap", "smooth_loss", "triplets_per_anchor", "collect_stats"):
        assert hasattr(ours, attribute) == hasattr(theirs, attribute)
        assert getattr(ours, attribute, None) == getattr(theirs, attribute, None)
    for attribute in ("distance", "reducer", "miner"):
        assert type(getattr(ours, attribute, None)) is type(getattr(theirs, attribute, None))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(ours.parameters()) == []
    with pytest.raises(TypeError):
        both(name, unknown=1)
    x = rows(9)
    for loss in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        torch.testing.assert_close(loss(x, LABELS), copy.deepcopy(theirs)(x, LABELS))


ERRORS = {
    "fewer labels": lambda f, x: f(x, LABELS[:-1]),
    "2-D labels": lambda f, x: f(x, LABELS[:, None]),
    "no labels": lambda f, x: f(x),
    "no labels but references": lambda f, x: f(x, ref_emb=x, ref_labels=LABELS),
    "fewer reference labels": lambda f, x: f(x, LABELS, ref_emb=x, ref_labels=LABELS[1:]),
    "2-D reference labels": lambda f, x: f(x, LABELS, ref_emb=x, ref_labels=LABELS[:, None]),
    "references of other width": lambda f, x: f(x, LABELS, ref_emb=x[:, 1:], ref_labels=LABELS),
    "1-D embeddings": lambda f, x: f(x[:, 0], LABELS),
    "3-D embeddings": lambda f, x: f(x[..., None], LABELS),
    "other dtypes": lambda f, x: f(x, LABELS, ref_emb=x.float(), ref_labels=LABELS),
    "no such row": lambda f, x: f(x, indices_tuple=index([0, 1], [2, 9], [3, 3])),
    "no such anchor": lambda f, x: f(x, indices_tuple=index([0, 99], [2, 2], [3, 3])),
    "two indices": lambda f, x: f(x, indices_tuple=index([0, 1], [2, 3])),
}


@pytest.mark.parametrize("call", ERRORS.values(), ids=ERRORS)
@EACH_LOSS
def test_errors(name, call):
    x = rows(9)
    same_error(*(lambda f=f: call(f, x) for f in both(name)))


@EACH_LOSS
def test_indices_of_unequal_length(name):
    for loss in both(name):
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            loss(rows(9), indices_tuple=index([0, 1], [2, 3, 4], [5]))


@EACH_CLASS
def test_second_derivatives_are_right_or_an_error(name):
    x = rows(9)
    found = []
    for loss in both(name)[::-1]:
        z = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(z, LABELS), z, create_graph=True)
        try:
            found += torch.autograd.grad(slope.square().sum(), z)
        except RuntimeError:
            return
    torch.testing.assert_close(*found)
