"""random_patch_mask, block_patch_mask and PatchMask.from_mask beyond the cases of tests/test_backends.py: two
argsorts to the bit, what is random and how, shapes of blocks, generators, errors, compilers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import sslfast
from sslfast import PatchMask, block_patch_mask, random_patch_mask
from sslfast.ops._check import FLOATS

NAN, INF = math.nan, math.inf
SPECIAL = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-310, -1e-310], dtype=torch.float64)
BEIT = {"ratio_range": (16 / 196, 75 / 196), "aspect_range": (0.3, 1 / 0.3)}
DINOV2 = {"ratio_range": (4 / 256, 0.5), "aspect_range": (0.3, 1 / 0.3)}
IJEPA = {"ratio_range": (0.15, 0.2), "aspect_range": (0.75, 1.5)}
DRAWN = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def two_argsorts(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """As MAE has it, with sorts that leave equal numbers in order."""
    order = noise.argsort(dim=1, stable=True)
    restore = order.argsort(dim=1, stable=True)
    removed = (torch.arange(noise.shape[1]) >= keep).float().expand(noise.shape)
    return order[:, :keep], restore, removed.gather(1, restore)


def assert_same(ours, theirs) -> None:
    torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=0, atol=0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Random masks


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 47, 48, 49, 50, 196, 1024, 65536])
def test_random_is_two_argsorts(length, dtype):
    """Uniform, few numbers, falling, special, both signs, random bits."""
    x = torch.rand(6, length, dtype=torch.float64)
    x[1] = (x[1] * 3).floor() - 1
    x[2] = x[2].sort(descending=True).values
    x[3] = torch.where(x[3] < 0.5, SPECIAL[torch.randint(8, (length,))], x[3])
    x[4] = 100 * torch.randn(length)
    noise = x.to(dtype)
    noise[5] = torch.randint(-(2**63), 2**63 - 1, (length,)).view(dtype)[:length]
    for ratio in (0, 0.25, 0.75, 0.9, 1) if length < 9999 else (0.75,):
        expected = two_argsorts(noise, int(length * (1 - ratio)))
        assert_same(random_patch_mask(6, length, ratio, noise=noise), expected)


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row for all": lambda x: x[:1].expand(x.shape),
    "one number in a row": lambda x: x[:, :1].expand(x.shape),
    "negated": torch._neg_view,
}


@DRAWN
@given(
    st.tuples(st.integers(0, 5), st.integers(1, 130)), st.floats(0, 1), st.sampled_from((1, 2, 5, 10**6)),
    st.sampled_from(FLOATS), st.sampled_from(list(LAYOUTS)), st.integers(0, 99),
)  # fmt: skip
def test_drawn_random_masks(shape, ratio, kinds, dtype, layout, seed):
    noise = LAYOUTS[layout]((torch.randint(0, kinds, shape, generator=seeded(seed)) / kinds).to(dtype))
    before = noise.clone()
    expected = two_argsorts(before, int(shape[1] * (1 - ratio)))
    assert_same(random_patch_mask(*shape, ratio, noise=noise), expected)
    assert torch.equal(noise, before)


@pytest.mark.parametrize(
    "length, ratio, keep",
    [(196, 0.75, 49), (7, 0.5, 3), (10, 0.7, 3), (100, 0.9, 9), (10, 0.9, 0), (1, 0.5, 0), (3, 1 / 3, 2)],
)
def test_how_many_are_kept(length, ratio, keep):
    """int(L * (1 - ratio)), whose rounding MAE has too."""
    drawn = random_patch_mask(2, length, ratio)
    assert drawn.ids_keep.shape == (2, keep) and drawn.ids_restore.shape == (2, length)
    assert (drawn.mask.sum(1) == length - keep).all()


def test_what_is_kept_goes_back_to_its_place():
    x, drawn = torch.randn(6, 49, 3), random_patch_mask(6, 49, 0.75)
    kept = x.gather(1, drawn.ids_keep[:, :, None].expand(-1, -1, 3))
    whole = torch.cat((kept, torch.full((6, 37, 3), 7.0)), 1)
    back = whole.gather(1, drawn.ids_restore[:, :, None].expand(-1, -1, 3))
    assert torch.equal(back, torch.where(drawn.mask[:, :, None] == 1, 7.0, x))


def test_threads_and_instruction_sets_change_no_bit(isa, set_threads):
    noise, counts = torch.rand(400, 1000).sub_(0.5), torch.randint(0, 401, (400,))
    with sslfast.use_backend("reference"):
        blocks = block_patch_mask(400, (20, 20), num_masked=counts, generator=seeded(), **DINOV2)
    for threads in (1, 2, 3):
        set_threads(threads)
        assert_same(random_patch_mask(400, 1000, 0.75, noise=noise), two_argsorts(noise, 250))
        again = block_patch_mask(400, (20, 20), num_masked=counts, generator=seeded(), **DINOV2)
        assert torch.equal(again, blocks)


def test_every_place_and_every_pair_of_patches_is_equally_likely():
    """Counts of 60000 draws are within five standard deviations of what they should be."""
    batch, length, masked = 60_000, 10, 6
    _, restore, mask = random_patch_mask(batch, length, 0.6, generator=seeded())
    pairs = (mask.T @ mask)[~torch.eye(length, dtype=torch.bool)]
    for counts, chance in (
        (torch.nn.functional.one_hot(restore, length).sum(0), 1 / length),  # places of each patch
        (pairs, masked * (masked - 1) / length / (length - 1)),
        (mask[1:].T @ mask[:-1], (masked / length) ** 2),  # images next to each other
    ):
        assert (counts - batch * chance).abs().max() < 5 * math.sqrt(batch * chance * (1 - chance))


# Generators and devices

DRAW = {
    "random": lambda **k: torch.cat([x.flatten().double() for x in random_patch_mask(3, 50, 0.75, **k)]),
    "blocks": lambda **k: block_patch_mask(3, (14, 14), num_masked=75, **BEIT, **k),
    "one block": lambda **k: block_patch_mask(9, (14, 14), **IJEPA, **k),
}


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_the_generator_decides(draw):
    generator, before = seeded(3), torch.get_rng_state()
    first, second = draw(generator=generator), draw(generator=generator)
    assert not torch.equal(first, second) and not torch.equal(first, draw(generator=seeded(4)))
    assert torch.equal(draw(generator=seeded(3)), first) and torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    assert torch.equal(draw(), first) and torch.equal(draw(device="cpu"), second)


def test_masks_are_where_the_arguments_say():
    with torch.device("meta"):
        assert random_patch_mask(2, 4, 0.5).mask.is_meta and block_patch_mask(2, (2, 2), **IJEPA).is_meta
        assert not random_patch_mask(2, 4, 0.5, generator=seeded()).mask.is_meta
        assert not block_patch_mask(2, (2, 2), num_masked=torch.ones(2, device="cpu").long(), **IJEPA).is_meta


# Blocks


@DRAWN
@given(
    st.integers(0, 4), st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from((None, "mixed", 0, 1)) | st.floats(0, 1), st.tuples(*[st.floats(0, 1)] * 2),
    st.tuples(*[st.floats(0.05, 20)] * 2), st.integers(0, 99),
)  # fmt: skip
def test_drawn_blocks(batch, grid, share, ratios, aspects, seed):
    """The reference's masks; exact counts, or one rectangle each."""
    length, counts = math.prod(grid), None
    if share == "mixed":
        counts = torch.randint(0, length + 1, (batch,), generator=seeded(seed))
    elif share is not None:
        counts = round(share * length)
    ranges = {"ratio_range": sorted(ratios), "aspect_range": sorted(aspects), "num_masked": counts}
    mask = block_patch_mask(batch, grid, generator=seeded(seed), **ranges)
    with sslfast.use_backend("reference"):
        assert torch.equal(block_patch_mask(batch, grid, generator=seeded(seed), **ranges), mask)
    assert box(mask, grid) if counts is None else (mask.sum(1) == counts).all()
    assert mask.shape == (batch, length) and ((mask == 0) | (mask == 1)).all()


def box(mask: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """Top, height, left and width of the one filled rectangle of each mask."""
    m, result = mask.view(-1, *grid).bool(), []
    rows, columns = m.any(2), m.any(1)
    assert torch.equal(m, rows[:, :, None] & columns[:, None, :]) and rows.any(1).all()
    for side in (rows, columns):
        start, size, at = side.int().argmax(1), side.sum(1), torch.arange(side.shape[1])
        assert torch.equal(side, (at >= start[:, None]) & (at < (start + size)[:, None]))
        result += [start, size]
    return result


@pytest.mark.parametrize(
    "grid, ratios, aspects",
    [
        ((14, 14), *IJEPA.values()), ((16, 16), (0.85, 1.0), (1.0, 1.0)),
        ((5, 11), (0.1, 0.4), (0.3, 1 / 0.3)), ((1, 20), (0.2, 0.5), (0.05, 0.3)),
        ((20, 1), (0.2, 0.5), (3.0, 20.0)), ((1, 1), (1, 1), (1, 1)), ((9, 30), (0.3, 0.4), (0.2, 0.9)),
        # k / L * L is a rounding below k, above, or k
        *(((7, 7), (k / 49, k / 49), (0.4, 2.5)) for k in (4, 8, 16, 9)),
        *(((10, 10), (k / 100, k / 100), (0.4, 2.5)) for k in (28, 56, 20)),
    ],
)  # fmt: skip
def test_one_block_has_the_area_and_aspect_asked_for(grid, ratios, aspects):
    low, high = (x * math.prod(grid) for x in ratios)
    _, h, _, w = box(block_patch_mask(500, grid, ratio_range=ratios, aspect_range=aspects), grid)
    assert ((h * w >= low - 1e-9) & (h * w <= high + 1e-9)).all()
    assert ((h - 0.5) / (w + 0.5) <= aspects[1]).all() and ((h + 0.5) / (w - 0.5) >= aspects[0]).all()


@pytest.mark.parametrize(
    "ratios, aspects, size",
    [((0.3, 0.3), (1.0, 1.0), (3, 3)), ((0.9, 1.0), (30.0, 40.0), (6, 1)), ((0.0, 0.0), (1.0, 1.0), (1, 1))],
)
def test_one_block_where_none_can_be_as_asked_for(ratios, aspects, size):
    _, h, _, w = box(block_patch_mask(40, (6, 6), ratio_range=ratios, aspect_range=aspects), (6, 6))
    assert (h == size[0]).all() and (w == size[1]).all()


def test_one_block_has_uniform_area_log_uniform_aspect_and_any_place():
    """Means of 4000 draws are within five standard deviations."""
    batch, grid, ratios = 4000, (64, 64), (80 / 4096, 400 / 4096)
    mask = block_patch_mask(batch, grid, ratio_range=ratios, aspect_range=(0.25, 4.0), generator=seeded())
    top, h, left, w = box(mask, grid)
    area, aspect = (h * w).double(), (h / w).double().log()
    for numbers, low, high in ((area, 80, 400), (aspect, -math.log(4), math.log(4))):
        assert abs(numbers.mean() - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * batch)
        assert abs(numbers.var() * 12 / (high - low) ** 2 - 1) < 0.08
    for start, size in ((top, h), (left, w)):
        expected = (1 / (64 - size + 1)).sum()
        for end in (start == 0, start == 64 - size):
            assert abs(end.sum() - expected) < 5 * expected.sqrt()
    numbers = torch.stack((top / (64 - h), left / (64 - w), area, aspect))
    assert (torch.corrcoef(numbers) - torch.eye(4)).abs().max() < 0.1


def test_blocks_of_the_methods():
    """As the docstring has them: of each place there are masks, and few masked patches stand alone."""
    counts = torch.cat((torch.zeros(100), torch.linspace(0.1, 0.5, 100) * 256)).long()
    for size, count, ranges in ((14, 75, BEIT), (16, counts, DINOV2)):
        mask = block_patch_mask(200, (size, size), num_masked=count, **ranges)
        assert (mask.sum(1) == count).all() and mask.sum(0).min() > 0
        padded = torch.nn.functional.pad(mask.view(-1, size, size), (1, 1, 1, 1))
        beside = padded[:, 2:, 1:-1] + padded[:, :-2, 1:-1] + padded[:, 1:-1, 2:] + padded[:, 1:-1, :-2]
        assert (mask.view_as(beside) > beside).sum() < 0.01 * mask.sum()  # random masks: 0.17 and more


def test_where_no_block_fits_single_patches_are_anywhere():
    """Counts of 5000 draws of 10 of 25 patches are within five standard deviations."""
    ranges = {"ratio_range": (1, 1), "aspect_range": (100, 100)}
    mask = block_patch_mask(5000, (5, 5), num_masked=10, generator=seeded(), **ranges)
    pairs = (mask.T @ mask)[~torch.eye(25, dtype=torch.bool)]
    for counts, chance in ((mask.sum(0), 0.4), (pairs, 0.4 * 9 / 24)):
        assert (counts - 5000 * chance).abs().max() < 5 * math.sqrt(5000 * chance * (1 - chance))


def test_an_image_does_not_depend_on_the_counts_of_others():
    def mask(count) -> Tensor:
        return block_patch_mask(3, (14, 14), num_masked=count, generator=seeded(), **BEIT)

    one, other, same = mask(torch.tensor([30, 75, 196])), mask(torch.tensor([100, 75, 0])), mask(75)
    assert torch.equal(one[1], other[1]) and torch.equal(one[1], same[1]) and not torch.equal(one[1], same[0])


# Given masks


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_from_mask(dtype):
    mask = block_patch_mask(6, (14, 14), num_masked=75, **BEIT)
    visible, masked = (PatchMask.from_mask(x.to(dtype), n) for x, n in ((mask, 75), (1 - mask, 121)))
    assert torch.equal(visible.ids_keep, (mask == 0).nonzero()[:, 1].view(6, 121))
    assert torch.equal(masked.ids_keep, (mask == 1).nonzero()[:, 1].view(6, 75))
    assert_same(visible, two_argsorts(mask, 121))
    assert_same(masked, two_argsorts(1 - mask, 75))
    row = torch.tensor([1, 0, 0, 1]).to(dtype).expand(3, 4)
    assert PatchMask.from_mask(row, 2).ids_keep.tolist() == [[1, 2]] * 3
    assert PatchMask.from_mask(0 * row, 0).ids_keep.tolist() == [[0, 1, 2, 3]] * 3
    assert PatchMask.from_mask(0 * row + 1, 4).ids_keep.shape == (3, 0)


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 256), (torch.float16, 2048)], ids=str)
def test_from_mask_counts_beyond_what_a_dtype_holds(dtype, most):
    mask = (torch.arange(2 * most) < most + 1).to(dtype)[None]
    assert PatchMask.from_mask(mask, most + 1).ids_keep[0, 0] == most + 1
    for wrong in (most, most + 2):
        with pytest.raises(ValueError, match="mask: expected"):
            PatchMask.from_mask(mask, wrong)


# Refused

ARGUMENTS = {
    random_patch_mask: {"batch": 2, "num_patches": 4, "mask_ratio": 0.5},
    block_patch_mask: {"batch": 2, "grid": (4, 4), **IJEPA},
    PatchMask.from_mask: {"mask": torch.eye(4), "num_masked": 1},
}
random, block, from_mask = ARGUMENTS
RANGES = ("ratio_range", "aspect_range")
COUNTS = (2.0, "2", True, None, torch.tensor(2))
COUNTED = ((random, "batch"), (random, "num_patches"), (block, "batch"), (from_mask, "num_masked"))
WRONG = [
    *((*counted, x, TypeError) for counted in COUNTED for x in COUNTS),
    *((*counted, -1, ValueError) for counted in COUNTED), (random, "num_patches", 0, ValueError),
    *((random, "mask_ratio", x, ValueError) for x in (-0.01, 1.01, NAN, INF)),
    *((random, "mask_ratio", x, TypeError) for x in (True, None, "0.5", torch.tensor(0.5))),
    *((random, "noise", torch.ones(s), ValueError) for s in ((2, 5), (3, 4), (4,), (2, 4, 1))),
    *((random, "noise", x, TypeError) for x in (torch.eye(4).int(), torch.eye(4).to_sparse(), [[0.5]])),
    (random, "noise", torch.ones(2, 4, device="meta"), ValueError),
    *((f, "generator", 5, TypeError) for f in (random, block)),
    *((f, "device", x, ValueError) for f in (random, block) for x in ("nowhere", 2.5)),
    *((block, "grid", x, TypeError) for x in (4, (4,), (4, 4, 4), (4.0, 4), (4, True), None)),
    *((block, "grid", x, ValueError) for x in ((0, 4), (4, -1), (1025, 1024))),
    *((block, r, x, TypeError) for r in RANGES for x in (0.5, (0.5,), (0.1, 0.2, 0.3), "ab", (True, 1))),
    *((block, r, x, ValueError) for r in RANGES for x in ((0.5, 0.4), (NAN, 1), (0, INF), (-1, 1))),
    (block, "ratio_range", (0.5, 1.01), ValueError), (block, "aspect_range", (0, 1), ValueError),
    *((block, "num_masked", x, ValueError) for x in (-1, 17, torch.tensor([0, 17]), torch.tensor([-1, 0]))),
    *((block, "num_masked", torch.zeros(s).long(), ValueError) for s in ((), (1,), (3,), (2, 1))),
    *((block, "num_masked", x, TypeError) for x in (2.0, True, torch.zeros(2), torch.zeros(2).int(), [1, 1])),
    *((from_mask, "mask", x, TypeError) for x in (torch.eye(4).bool(), torch.eye(4).long(), [[1.0]])),
    *((from_mask, "mask", x, ValueError) for x in (torch.ones(4), torch.ones(4, 4), torch.eye(4) * NAN)),
    (from_mask, "mask", torch.eye(4, device="meta"), ValueError), (from_mask, "num_masked", 5, ValueError),
    (from_mask, "mask", torch.full((4, 4), 0.25), ValueError),
]  # fmt: skip


@pytest.mark.parametrize("function, name, value, error", WRONG)
def test_wrong_arguments_are_named(function, name, value, error):
    with pytest.raises(error, match=f"^{name}: "):
        function(**{**ARGUMENTS[function], name: value})


def test_arguments_that_contradict_each_other():
    noise, counts = torch.rand(2, 4), torch.tensor([1, 2])
    for function, name, arguments in (
        (random, "generator", {"noise": noise, "generator": seeded()}),
        (random, "noise", {"noise": noise, "device": "meta"}),
        *((f, "generator", {"device": "meta", "generator": seeded()}) for f in (random, block)),
        (block, "num_masked", {"device": "meta", "num_masked": counts}),
        (random, "device", {"noise": noise, "device": "nowhere"}),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            function(**{**ARGUMENTS[function], **arguments})


# Autograd, modes, compilers


def test_nothing_is_recorded_and_nothing_changed():
    mask = (torch.arange(60) % 3 == 0).float().repeat(3, 1)
    inputs = torch.rand(3, 60, requires_grad=True), mask.requires_grad_(), torch.tensor([0, 5, 60])
    before = [x.detach().clone() for x in inputs]
    for backend in ("cpu", "reference"):
        with sslfast.use_backend(backend):
            results = *random_patch_mask(3, 60, 0.5, noise=inputs[0]), *PatchMask.from_mask(mask, 20)
            results += (block_patch_mask(3, (6, 10), num_masked=inputs[2], **DINOV2),)
        assert not any(x.requires_grad for x in results)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_inference_mode_and_fake_tensors():
    noise, counts = torch.rand(3, 16), torch.tensor([1, 2, 3])
    with torch.inference_mode():
        assert_same(random_patch_mask(3, 16, 0.5, noise=noise.clone()), two_argsorts(noise, 8))
        assert (block_patch_mask(3, (4, 4), num_masked=counts.clone(), **DINOV2).sum(1) == counts).all()
    with FakeTensorMode() as mode:
        noise, counts = mode.from_tensor(noise), mode.from_tensor(counts)
        for options in ({}, {"noise": noise}):
            assert [x.shape[1] for x in random_patch_mask(3, 16, 0.75, **options)] == [4, 16, 16]
        assert [x.shape[1] for x in PatchMask.from_mask(noise, 4)] == [12, 16, 16]
        for count in (None, 3, counts):
            assert block_patch_mask(3, (4, 4), num_masked=count, **DINOV2).shape == (3, 16)


STEPS = {
    "noise": lambda x, counts: random_patch_mask(len(x), 16, 0.75, noise=x),
    "drawn": lambda x, counts: random_patch_mask(len(x), 16, 0.75),
    "one block": lambda x, counts: (block_patch_mask(len(x), (4, 4), **DINOV2),),
    "blocks": lambda x, counts: (block_patch_mask(len(x), (4, 4), num_masked=5, device=x.device, **DINOV2),),
    "counts": lambda x, counts: (block_patch_mask(len(x), (4, 4), num_masked=counts, **DINOV2),),
    "from_mask": lambda x, counts: PatchMask.from_mask((x.argsort(1) < 4).float(), 4),
}


@pytest.mark.parametrize("name, backend", [*((name, "aot_eager") for name in STEPS), ("noise", "inductor")])
def test_compile(name, backend):
    """The same numbers, also when a batch of another size comes."""
    torch.compiler.reset()
    fast = torch.compile(STEPS[name], fullgraph=True, backend=backend)
    for batch in (3, 5, 8):
        x, counts = torch.rand(batch, 16), torch.randint(0, 17, (batch,))
        torch.manual_seed(batch)
        ours = fast(x, counts)
        torch.manual_seed(batch)
        assert_same(ours, STEPS[name](x, counts))


def test_opcheck():
    noise, draws = torch.rand(3, 16), torch.rand(3, 8, 4, dtype=torch.float64).clamp(0.1)
    for dtype, keep in zip(FLOATS, (0, 4, 16, 9), strict=True):
        torch.library.opcheck(torch.ops.sslfast.random_patch_mask.default, (noise.to(dtype), keep, "cpu"))
    for counts in (None, torch.tensor([0, 5, 16])):
        arguments = draws, noise, counts, 4, 4, 2.0, 8.0, "cpu"
        torch.library.opcheck(torch.ops.sslfast.block_patch_mask.default, arguments)
