"""The collapse monitor: its numbers against their definitions, and its words when embeddings collapse."""

import pytest
import torch
from torch.nn import functional as F

from sslfast.train.monitor import CollapseMonitor


def measure(*batches):
    monitor = CollapseMonitor()
    for batch in batches:
        monitor.update(batch)
    return monitor.read(), monitor.warning()


def test_numbers_follow_their_definitions():
    z = torch.randn(300, 16) @ torch.diag(torch.linspace(0.1, 3, 16)) + 0.5
    measured, warning = measure(z[:100], z[100:])
    unit = F.normalize(z.double(), dim=1)
    p = torch.linalg.svdvals(unit)
    p = p / p.sum()
    assert measured["feature_std"] == pytest.approx(unit.std(0, correction=0).mean().item(), rel=1e-9)
    assert measured["effective_rank"] == pytest.approx((-(p * p.log()).sum()).exp().item(), rel=1e-9)
    assert warning is None


def test_spread_evenly():
    measured, warning = measure(torch.randn(5000, 32))
    assert measured["feature_std"] == pytest.approx(32**-0.5, rel=0.01)
    assert measured["effective_rank"] == pytest.approx(32, rel=0.02) and warning is None


def test_one_embedding_for_all_images():
    measured, warning = measure(torch.randn(16).expand(200, 16) + 1e-4 * torch.randn(200, 16))
    assert measured["effective_rank"] < 1.01 and measured["feature_std"] < 1e-3
    assert "have collapsed: all images get nearly the same one" in warning


def test_few_dimensions():
    measured, warning = measure(torch.randn(400, 2) @ torch.randn(2, 128))
    assert measured["effective_rank"] == pytest.approx(2, abs=0.1)
    assert "use few dimensions: effective rank 2.0 of 128" in warning or "effective rank 1.9" in warning


def test_nothing_seen_or_not_a_number():
    assert measure() == ({}, None)
    measured, warning = measure(torch.full((4, 3), torch.nan))
    assert all(value != value for value in measured.values()) and warning is None


def test_state_comes_back_and_reset_forgets():
    z = torch.randn(50, 8)
    first, second = CollapseMonitor(), CollapseMonitor()
    first.update(z[:20])
    second.load_state_dict(first.state_dict())
    first.update(z[20:])
    second.update(z[20:])
    assert first.read() == second.read()
    second.reset()
    assert second.read() == {}


def test_16_bit_embeddings_are_summed_in_float64():
    measured, _ = measure(torch.full((70_000, 4), 1.0, dtype=torch.float16))
    assert measured["feature_std"] == pytest.approx(0, abs=1e-6)


def test_agreement_with_a_teacher():
    monitor, z = CollapseMonitor(), torch.randn(300, 16) + 0.3
    t = z + 0.5 * torch.randn(300, 16)
    for rows in (slice(0, 100), slice(100, 300)):
        monitor.update(z[rows], t[rows])
    measured = monitor.read()
    a, b = F.normalize(z.double(), dim=1), F.normalize(t.double(), dim=1)
    cosines = a @ b.T
    assert measured["teacher_agreement"] == pytest.approx(cosines.diagonal().mean().item(), rel=1e-9)
    contrast = cosines.diagonal().mean() - cosines.mean()
    assert measured["teacher_contrast"] == pytest.approx(contrast.item(), rel=1e-9)
    assert monitor.warning() is None
    other = CollapseMonitor()
    other.load_state_dict(monitor.state_dict())
    assert other.read() == measured


def test_agreement_on_all_images_alike():
    """The student's embeddings differ enough, the teacher's are one: what they share is not the image."""
    monitor, common = CollapseMonitor(), torch.zeros(400, 8)
    common[:, 0] = 4
    monitor.update(common + torch.randn(400, 8) * 0.5, common)
    assert "student and teacher agree as much on two different images as on one" in monitor.warning()
    monitor = CollapseMonitor()
    monitor.update(torch.randn(400, 8), torch.randn(400, 8))  # not trained yet
    assert monitor.warning() is None
    assert "teacher_agreement" not in measure(torch.randn(4, 3))[0]
