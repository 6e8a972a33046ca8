"""gather_patches, restore_patches and embed_visible_patches beyond the cases of tests/test_backends.py: plain
loops, ways of autograd, compilers, what MAE, SimMIM and BEiT do with them, errors."""

import functools
import importlib
import itertools
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import guarded, inside_nan
from torch import Tensor, nn
from torch.nn import functional as F

import sslfast
from sslfast import embed_visible_patches, gather_patches, restore_patches
from sslfast.ops import patches
from sslfast.ops._check import FLOATS
from sslfast.testing import CASES, OPS, assert_close_to_reference
from sslfast.testing._patches import EmbedCase, GatherCase, RestoreCase

NAMES = ("gather_patches", "restore_patches", "embed_visible_patches")
BY_NAME = {op: {case.name: case for case in CASES[op]} for op in NAMES}
embed_module = importlib.import_module("sslfast.ops.embed_visible_patches")


@pytest.fixture(autouse=True)
def on_cpu():
    with sslfast.use_backend("cpu"):
        yield


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def compare(ours, expected, leaves, **tolerance):
    """Values, and the gradients of the same random sum of both."""
    torch.testing.assert_close(ours, expected, **tolerance)
    upstream = torch.randn_like(ours)
    for x, y in zip(*(torch.autograd.grad(out, leaves, upstream) for out in (ours, expected)), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


# Numbers


def looped(ids, row):
    """out[b, i] = row(b, i, ids[b, i]), one at a time."""
    rows = [row(b, i, k) for b, given in enumerate(ids.tolist()) for i, k in enumerate(given)]
    return torch.stack(rows).view(*ids.shape, -1)


def test_against_loops(isa):
    """With images that are not square, and a patch that is kept twice."""
    images, double = torch.randn(2, 3, 4, 6).double(), functools.partial(leaf, dtype=torch.float64)
    ids = torch.tensor([[5, 0, 3, 3, 1, 2], [1, 2, 4, 5, 0, 0]])
    tokens, pos, token = double(2, 6, 5), double(6, 5), double(5)
    weight, bias = double(5, 3, 2, 2), double(5)

    def embedded(b, _, k):
        y, x = 2 * (k // 3), 2 * (k % 3)
        return (images[b, :, y : y + 2, x : x + 2] * weight).sum((1, 2, 3)) + bias + pos[k]

    expected = looped(ids, lambda b, i, k: tokens[b, k] + pos[k])
    compare(gather_patches(tokens, ids, pos), expected, (tokens, pos))
    expected = looped(ids, lambda b, i, k: (tokens[b, k] if k < 4 else token) + pos[i])
    compare(restore_patches(tokens[:, :4], ids, token, pos), expected, (tokens, token, pos))
    ours = embed_visible_patches(images, ids, weight, bias, pos, patch_size=2)
    compare(ours, looped(ids, embedded), (weight, bias, pos))
    assert torch.equal(embed_visible_patches(images, ids, weight.flatten(1), bias, pos, patch_size=2), ours)


@pytest.mark.parametrize("other", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mixed_dtypes_promote_and_round_once_as_pytorch_s(dtype, other):
    ids = torch.tensor([[2, 0, 1], [1, 1, 0]])
    tokens, pos, token = leaf(2, 3, 37, dtype=dtype), leaf(1, 3, 37, dtype=other), leaf(1, 1, 37, dtype=other)
    gathered, restored = gather_patches(tokens, ids, pos), restore_patches(tokens[:, :2], ids, token)
    promoted = torch.promote_types(dtype, other)
    assert gathered.dtype == restored.dtype == promoted
    assert torch.equal(gathered, looped(ids, lambda b, i, k: tokens[b, k] + pos[0, k]))
    assert torch.equal(
        restored, looped(ids, lambda b, i, k: (tokens[b, k] if k < 2 else token[0, 0]).to(promoted))
    )
    (gathered.sum() + restored.sum()).backward()
    for x in (tokens, pos, token):
        assert (x.grad.dtype, x.grad.shape) == (x.dtype, x.shape)
    assert tokens.grad[:, :, 5].tolist() == [[2, 2, 1], [2, 4, 0]] and pos.grad[0, :, 5].tolist() == [2, 3, 1]
    assert (token.grad == 1).all()


def drawn_image(grid: tuple[int, int], patch: int, bias: bool, ids: Literal["once", "repeated"], **others):
    height, width = (patch * size for size in grid)
    return EmbedCase("", height=height, width=width, patch=patch, bias=bias, ids=ids, **others)


SIZES = {"batch": st.integers(0, 5), "dim": st.integers(1, 40) | st.integers(250, 260)}
COUNT, INFERRED = st.integers(1, 30), dict.fromkeys(("pos", "three", "layout", "ids"), ...)
# In float64 the yardstick of a product is the truth itself, however many terms there are, and float32
# positions have the gradient of 16-bit weights rounded before its product, here as in PyTorch: luck decides
# which is better.
IMAGES = {
    "channels": st.integers(1, 5), "grid": st.tuples(st.integers(1, 4), st.integers(1, 4)), "bias": ...,
    "patch": st.integers(1, 9), "kept": st.integers(0, 12), "kind": st.sampled_from(["", "last", "gaps"]),
    "pos": st.sampled_from(["", "same"]), "ids": ...,
}  # fmt: skip
DRAWN = {
    "gather_patches": st.builds(GatherCase, st.just(""), rows=COUNT, count=COUNT, **SIZES, **INFERRED),
    "restore_patches": st.builds(
        RestoreCase, st.just(""), rows=st.integers(0, 30), count=COUNT, **SIZES, **INFERRED
    ).filter(lambda case: case.rows <= case.count),
    "embed_visible_patches": st.builds(drawn_image, **SIZES, **IMAGES),
}


@pytest.mark.parametrize("op", NAMES)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data(), seed=st.integers(0, 9))
def test_drawn_case(op, data, seed):
    dtype = data.draw(st.sampled_from(FLOATS[: 3 if op == "embed_visible_patches" else 4]))
    assert_close_to_reference(op, data.draw(DRAWN[op]).inputs(dtype, seed=seed), seed=seed)


@pytest.mark.parametrize(
    "op, case", [(op, case) for op in NAMES for case in CASES[op]], ids=lambda x: getattr(x, "name", x)
)
def test_every_place_is_written_and_no_other(op, case, isa):
    """Buffers are NaN before a kernel writes them, and inputs lie among NaN."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = {k: inside_nan(x) if isinstance(x, Tensor) else x for k, x in case.inputs(dtype).items()}
        with guarded():
            assert_close_to_reference(op, inputs, seed=3)


# Ways of autograd


@pytest.mark.parametrize("lead", [(), (1,)])
def test_gradcheck(lead):
    double, check = functools.partial(leaf, dtype=torch.float64), torch.autograd.gradcheck
    ids, restore = torch.tensor([[2, 0, 2], [1, 3, 0]]), torch.tensor([[1, 3, 0, 2], [2, 1, 1, 0]])
    images, pos, token = torch.randn(2, 2, 4, 4).double(), double(*lead, 4, 3), double(*lead, *lead, 3)
    assert check(gather_patches, (double(2, 4, 3), ids, pos))
    assert check(restore_patches, (double(2, 2, 3), restore, token, pos))
    embed = functools.partial(embed_visible_patches, images, ids, patch_size=2)
    assert check(embed, (double(3, 2, 2, 2), double(3), pos))


LAYOUTS = {
    "one number, as of .sum()": lambda b, m, d: torch.tensor(1.5).expand(b, m, d),
    "one row": lambda b, m, d: torch.randn(d).expand(b, m, d),
    "gaps": lambda b, m, d: torch.randn(b, m, 2 * d)[..., ::2],
    "transposed": lambda b, m, d: torch.randn(d, m, b).permute(2, 1, 0),
    "behind a class token": lambda b, m, d: torch.randn(b, m + 1, d)[:, 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["repeated", "float32 positions"])
@pytest.mark.parametrize("op", NAMES)
def test_upstream_gradients_of_any_strides(op, name, layout):
    inputs = BY_NAME[op][name].inputs(torch.float32)
    shape = OPS[op].reference(**inputs).shape
    assert_close_to_reference(op, inputs, upstream=[LAYOUTS[layout](*shape)])


@pytest.mark.parametrize("op", NAMES)
def test_only_gradients_that_are_needed_are_computed(op, monkeypatch):
    asked, put, cut = [], patches.put, embed_module._cut
    for module in (patches, embed_module):
        monkeypatch.setattr(module, "put", lambda *args: asked.append(args[4:7]) or put(*args))
    monkeypatch.setattr(embed_module, "_cut", lambda *args: asked.append("cut") or cut(*args))
    inputs = BY_NAME[op]["repeated"].inputs(torch.float32)
    names = [k for k in ("a", "bias", "mask_token", "pos_embed") if k in inputs]
    for needs in (s for size in range(len(names) + 1) for s in itertools.combinations(names, size)):
        leaves = {k: inputs[k].clone().requires_grad_(k in needs) for k in names}
        out = OPS[op].run(**{**inputs, **leaves})
        assert out.requires_grad == bool(needs)
        asked.clear()
        if needs:
            out.sum().backward()
        assert [k for k in names if leaves[k].grad is not None] == list(needs)
        a, pos, token = (k in needs for k in ("a", "pos_embed", "mask_token"))
        expected = {
            "gather_patches": [(a, pos, False)] * bool(needs),
            "restore_patches": [(a, False, token)] * (a or token),
            "embed_visible_patches": ["cut"] * a + [(False, True, False)] * pos,
        }
        assert asked == expected[op]


@pytest.mark.parametrize("op", NAMES)
def test_differentiable_once_on_cpu_and_twice_on_the_reference(op):
    inputs = BY_NAME[op]["repeated"].inputs(torch.float64)
    a = inputs["a"].requires_grad_()
    out = OPS[op].run(**inputs)
    for upstream in (torch.ones_like(out), torch.ones_like(out, requires_grad=True)):
        (first,) = torch.autograd.grad(out, a, upstream, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiates once"):
            first.square().sum().backward()
    with sslfast.use_backend("reference"):
        (first,) = torch.autograd.grad(OPS[op].run(**inputs).square().sum(), a, create_graph=True)
    assert torch.autograd.grad(first.sum(), a)[0].abs().sum() > 0


def test_images_that_require_a_gradient_get_the_convolution_s():
    images, weight, ids = leaf(2, 3, 4, 6), leaf(5, 3, 2, 2), torch.tensor([[5, 0, 0], [1, 2, 4]])
    ours = embed_visible_patches(images, ids, weight, patch_size=2)
    tokens = F.conv2d(images, weight, stride=2).flatten(2).transpose(1, 2)
    compare(ours, looped(ids, lambda b, i, k: tokens[b, k]), (images, weight))


def test_lazily_negated_tensors_and_lazy_zeros():
    negated, ids, restore = torch._neg_view, torch.tensor([[1, 0], [2, 2]]), torch.tensor([[2, 0, 1]] * 2)
    tokens, pos, images, weight = leaf(2, 3, 4), torch.randn(3, 4), torch.randn(2, 1, 2, 6), torch.randn(4, 4)

    def all_three(minus):
        yield gather_patches(minus(tokens), ids, minus(pos))
        yield restore_patches(minus(tokens)[:, :2], restore, minus(pos[0]), minus(pos))
        yield embed_visible_patches(minus(images), ids, minus(weight), None, minus(pos), patch_size=2)

    for ours, expected in zip(all_three(negated), all_three(torch.neg), strict=True):
        torch.testing.assert_close(ours, expected)
    for upstream, sign in ((negated(torch.ones(2, 2, 4)), -1), (torch._efficientzerotensor(2, 2, 4), 0)):
        (gradient,) = torch.autograd.grad(gather_patches(tokens, ids), tokens, upstream)
        assert torch.equal(gradient[:, :, 0], sign * torch.tensor([[1.0, 1, 0], [0, 0, 2]]))


# Autocast, compilers


@pytest.mark.parametrize("positions", [False, True])
def test_autocast_gives_what_a_convolution_under_it_gives(positions):
    images, ids = torch.rand(3, 3, 8, 12), torch.tensor([[5, 0], [1, 1], [2, 3]])
    weight, bias, pos = leaf(16, 3, 4, 4), leaf(16), leaf(6, 16) if positions else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, half = (
            embed_visible_patches(x, ids, weight, bias, pos, patch_size=4)
            for x in (images, images.bfloat16())
        )
        tokens = F.conv2d(images, weight, bias, stride=4).flatten(2).transpose(1, 2)
        tokens = tokens + pos if positions else tokens
    leaves = (weight, bias, pos) if positions else (weight, bias)
    compare(ours, looped(ids, lambda b, i, k: tokens[b, k]), leaves, rtol=2**-6, atol=0.02)
    exact = embed_visible_patches(images, ids, weight, bias, pos, patch_size=4)
    assert torch.equal(half, ours) and not torch.equal(exact, ours.float())


def test_compile():
    """Forward and backward, and again for a batch of another size."""

    def restored(tokens, ids, pos):
        return restore_patches(tokens[:, :3], ids, pos[0], pos)

    def embedded(images, ids, weight):
        return embed_visible_patches(images, ids, weight, weight[:, 0, 0, 0], patch_size=2)

    for function in (gather_patches, restored, embedded):
        torch.compiler.reset()
        fast = torch.compile(function, fullgraph=True, backend="aot_eager")
        for batch in (2, 5):
            first = torch.rand(batch, 3, 4, 6) if function is embedded else leaf(batch, 6, 4)
            last = leaf(4, 3, 2, 2) if function is embedded else leaf(6, 4)
            given = (first, torch.randint(0, 6, (batch, 6)), last)
            compare(fast(*given), function(*given), [x for x in given if x.requires_grad])
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    ops, ids = torch.ops.sslfast, torch.tensor([[1, 3], [0, 0]])
    tokens, pos = torch.randn(2, 4, 5).to(dtype), torch.randn(4, 5)
    for arguments in (
        (tokens, ids, None, None, False, dtype, "cpu"),
        (tokens[:, 1:], ids, pos[0], pos[:2], False, torch.float32, "cpu"),
        (tokens[:, :2], ids, None, pos, True, torch.float32, "cpu"),
    ):
        torch.library.opcheck(ops.take_patches, arguments)
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        torch.library.opcheck(ops.put_patches, (tokens[:, ::2], ids, 3, dtype, *needs, "cpu"))
    images = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    torch.library.opcheck(ops.cut_patches, (images, ids, 2, dtype, "cpu"))


# The same bits


def everything(images, weight, tokens, token, pos, ids):
    """Large enough for every kernel to share its work among threads; what is only moved comes first."""
    leaves = [x.clone().requires_grad_() for x in (weight, tokens, token, pos)]
    keep = ids[:, :48].contiguous()
    kept = gather_patches(leaves[1], keep, leaves[3])
    out = restore_patches(kept, ids, leaves[2], leaves[3])
    embedded = embed_visible_patches(images, keep, leaves[0], None, leaves[3], patch_size=4)
    dweight, dtokens, *others = torch.autograd.grad(out.sin().sum() + embedded.sin().sum(), leaves)
    cols = torch.ops.sslfast.cut_patches(images, keep, 4, torch.float32, "cpu")
    return [cols, kept.detach(), out.detach(), dtokens, embedded.detach(), dweight, *others]


def test_same_bits_in_every_run_and_for_what_is_moved_with_any_number_of_threads(set_threads):
    inputs = [torch.randn(*s) for s in ((16, 3, 32, 32), (96, 48), (16, 64, 96), (96,), (64, 96))]
    ids, single = torch.stack([torch.randperm(64) for _ in range(16)]), None
    for threads in (1, 2, 3):
        set_threads(threads)
        first, again = (everything(*inputs, ids) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
        single = single or first
        assert all(torch.equal(x, y) for x, y in zip(single[:4], first[:4], strict=True))
        torch.testing.assert_close(first, single, rtol=1e-4, atol=1e-4)


# What methods do with them


def test_what_was_kept_is_back_in_its_place():
    tokens, token = torch.randn(4, 20, 3), torch.randn(3)
    ids, restore, mask = sslfast.random_patch_mask(4, 20, 0.6)
    out = restore_patches(gather_patches(tokens, ids), restore, token)
    assert torch.equal(out, torch.where(mask[..., None] == 0, tokens, token)) and mask.sum() == 48


def test_an_encoder_layer_on_visible_tokens_alone():
    """The same as on all tokens with the removed ones masked out of attention."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    tokens, pos = leaf(3, 10, 16), leaf(10, 16)
    ids, _, mask = sslfast.random_patch_mask(3, 10, 0.7)
    visible = layer(gather_patches(tokens, ids, pos))
    whole = layer(tokens + pos, src_key_padding_mask=mask.bool())[torch.arange(3)[:, None], ids]
    compare(visible, whole, [tokens, pos, *layer.parameters()], rtol=1e-4, atol=1e-5)


def test_simmim_embeds_visible_patches_alone():
    """The same as to embed all patches and put the mask token in place of the masked ones."""
    images, (ids, restore, mask) = torch.rand(3, 3, 8, 12), sslfast.random_patch_mask(3, 24, 0.6)
    leaves = weight, bias, token, pos = leaf(7, 3, 2, 2), leaf(7), leaf(7), leaf(24, 7)
    visible = embed_visible_patches(images, ids, weight, bias, patch_size=2)
    tokens = F.conv2d(images, weight, bias, stride=2).flatten(2).transpose(1, 2)
    expected = torch.where(mask[..., None] == 1, token, tokens) + pos
    compare(restore_patches(visible, restore, token, pos), expected, leaves, rtol=1e-5, atol=1e-5)


def test_beit_predicts_the_tokens_of_masked_places():
    """The same loss as by boolean indexing, whose size is not known beforehand."""
    features, head, targets = leaf(3, 48, 8), nn.Linear(8, 11), torch.randint(0, 11, (3, 48))
    mask = sslfast.block_patch_mask(3, (6, 8), ratio_range=(0.1, 0.3), aspect_range=(0.3, 3), num_masked=19)
    ids = sslfast.PatchMask.from_mask(1 - mask, 48 - 19).ids_keep
    logits = head(gather_patches(features, ids))
    ours = F.cross_entropy(logits.flatten(0, 1), targets.gather(1, ids).flatten())
    expected = F.cross_entropy(head(features)[mask.bool()], targets[mask.bool()])
    compare(ours, expected, [features, *head.parameters()])


# Refused

IDS, ALL = torch.tensor([[0, 5], [1, 2]]), torch.arange(6).expand(2, 6)
X, PLACES, TOKEN = torch.randn(2, 6, 4), torch.randn(6, 4), torch.randn(4)
WEIGHT, PIXELS = torch.randn(4, 3, 2, 2), torch.randn(2, 3, 4, 6)
GOOD = {
    "gather_patches": {"tokens": X, "ids_keep": IDS, "pos_embed": PLACES},
    "restore_patches": {"tokens": X[:, :3], "ids_restore": ALL, "mask_token": TOKEN, "pos_embed": PLACES},
    "embed_visible_patches": {
        "images": PIXELS, "ids_keep": IDS, "weight": WEIGHT, "bias": TOKEN, "pos_embed": PLACES,
        "patch_size": 2,
    },
}  # fmt: skip
KEEP = [IDS - 1, IDS + 1, IDS.int(), [[0], [1]], IDS[[0, 1, 1]], IDS[0], IDS.to("meta")]
POSITIONS = [PLACES[:5], PLACES[:, :3], PLACES.expand(2, 6, 4), PLACES.long(), PLACES.to("meta"), 0.5]
BAD = {
    "gather_patches": {
        "tokens": [X[0], X.long(), X.to_sparse(), X.to("meta")], "ids_keep": KEEP, "pos_embed": POSITIONS,
    },
    "restore_patches": {
        "tokens": [X[0], X.long(), X.to("meta")], "pos_embed": POSITIONS,
        "ids_restore": [ALL - 1, ALL + 1, ALL.int(), ALL[:1], ALL[0], ALL[:, :2], ALL.to("meta")],
        "mask_token": [TOKEN[:3], TOKEN[None], TOKEN.expand(2, 1, 4), TOKEN.long(), None, TOKEN.to("meta")],
    },
    "embed_visible_patches": {
        "images": [PIXELS[0], PIXELS.byte(), PIXELS.to("meta")], "ids_keep": KEEP, "pos_embed": POSITIONS,
        "patch_size": [0, -2, True, 2.0, 4, 5], "bias": [TOKEN[:3], TOKEN.double(), TOKEN.to("meta"), 0.5],
        "weight": [WEIGHT[..., :1], WEIGHT.flatten(1)[:, :6], WEIGHT.bfloat16(), WEIGHT.to("meta"), None],
    },
}  # fmt: skip


@pytest.mark.parametrize("op, name", [(op, name) for op in NAMES for name in BAD[op]])
def test_bad_arguments_are_named(op, name):
    function = getattr(sslfast, op)
    function(**GOOD[op])
    for wrong in BAD[op][name]:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            function(**{**GOOD[op], name: wrong})
