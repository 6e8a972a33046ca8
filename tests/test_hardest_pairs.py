"""hardest_pairs: the C++ kernel of every instruction set against all distances, written out."""

import pytest
import torch

import sslfast
from sslfast import _C
from sslfast.ops.hardest_pairs import _KERNELS, hardest_pairs, reference


def distances(x):
    return torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


def assert_hardest(x, groups, far, near):
    """The rows found are of the right group and no row is farther, or nearer, by more than rounding."""
    d, same = distances(x), groups[:, None] == groups
    others = same & ~torch.eye(len(x), dtype=torch.bool)
    slack = 1e-5 * (1 + d.max()) if x.dtype == torch.float32 else 1e-10
    rows, some, any_other = torch.arange(len(x)), others.any(1), ~same.all(1)
    farthest, nearest = d.masked_fill(~others, -1).amax(1), d.masked_fill(same, torch.inf).amin(1)
    assert (others[rows, far] | ~some).all() and ((d[rows, far] >= farthest - slack) | ~some).all()
    assert (~same[rows, near] | ~any_other).all()
    assert ((d[rows, near] <= nearest + slack) | ~any_other).all()
    assert ((far >= 0) & (far < len(x)) & (near >= 0) & (near < len(x))).all()


@pytest.mark.parametrize("isa", _C.cpu_isas(), indirect=True)
@pytest.mark.parametrize("dtype", _KERNELS, ids=str)
@pytest.mark.parametrize(
    "n, d, classes", [(1, 3, 1), (2, 3, 1), (5, 4, 5), (33, 1, 3), (64, 7, 2), (700, 8, 9), (1100, 300, 4)]
)
def test_hardest(isa, dtype, n, d, classes):
    """Across tiles (1024 x 1024 for the widest rows) and a last part that fills no lane."""
    torch.manual_seed(n)
    x, groups = torch.randn(n, d, dtype=dtype), torch.randint(0, min(classes, n), (n,))
    assert_hardest(x, groups, *hardest_pairs(x, groups))
    assert_hardest(x, groups, *reference(x, groups))


def test_same_rows_of_one_group_are_each_others_farthest():
    """A row's distance to itself is no distance to a positive, even where all of them are 0."""
    x, groups = torch.ones(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
    far, near = hardest_pairs(x, groups)
    assert far.tolist() == [1, 0, 3, 2, 5, 4]
    assert (groups[near] != groups).all()


def test_threads_do_not_change_the_choice(set_threads):
    x, groups = torch.randint(0, 3, (900, 2)).float(), torch.randint(0, 5, (900,))  # many ties
    found = []
    for count in (1, 2, 3):
        set_threads(count)
        found.append(torch.stack(hardest_pairs(x, groups)))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_nan_stays_inside():
    x, groups = torch.full((5, 3), torch.nan), torch.tensor([0, 0, 1, 1, 2])
    for found in hardest_pairs(x, groups):
        assert ((found >= 0) & (found < 5)).all()
    assert sslfast.triplet_margin_loss(x, groups).isnan()


def test_strided_and_forced_reference():
    x, groups = torch.randn(40, 60).t(), torch.randint(0, 4, (60,))
    assert_hardest(x, groups, *hardest_pairs(x, groups))
    with sslfast.use_backend("reference"):
        assert_hardest(x, groups, *hardest_pairs(x, groups))


def test_a_tile_outside_of_the_matrix_is_refused():
    arguments = {"n": 8, "rows": 4, "cols": 4, "r0": 4, "c0": 4}
    for name, value in (("rows", 5), ("cols", 5), ("r0", -1), ("c0", 5), ("rows", -1), ("n", 7)):
        with pytest.raises(IndexError, match="outside"):
            _C.hardest_pairs_f32(*{**arguments, name: value}.values(), 0, 0, 0, 0, 0, 1)
