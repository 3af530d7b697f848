"""Sums over examples, and the classifier that follows from them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hatcl.hat.routing.ridge import STRENGTHS, Sums, lifted, projection, ridge


def examples(count=60, features=5, classes=3, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    h = torch.randn(classes, features, generator=generator)[y] + torch.randn(count, features, generator=generator)
    return lifted(h, projection(features, width, seed, 0)), torch.nn.functional.one_hot(y, classes).double()


def sums_of(phi, onehot, rank=None):
    return Sums.of(phi.T @ phi, phi.T @ onehot, rank)


def test_lifted_features_are_the_formula():
    h, p = torch.randn(4, 5), projection(5, 7, 3, 2)
    phi = lifted(h, p)
    assert phi.dtype == torch.float64 and torch.equal(phi[:, -1], torch.ones(4, dtype=torch.float64))
    assert torch.equal(phi[:, :-1], (h.double() @ p.double()).clamp(min=0))
    assert torch.equal(p, projection(5, 7, 3, 2))
    assert not torch.equal(p, projection(5, 7, 3, 1)) and not torch.equal(p, projection(5, 7, 4, 2))


def gcv(phi, onehot, strength):
    """Written from the definition, without the eigenvectors."""
    hat = phi @ torch.linalg.solve(phi.T @ phi + strength * torch.eye(phi.shape[1]).double(), phi.T)
    n = len(phi)
    return float(n * (onehot - hat @ onehot).square().sum() / (n - hat.trace()) ** 2)


@given(st.integers(0, 20), st.integers(20, 90))
@settings(max_examples=10, deadline=None)
def test_the_classifier_solves_the_ridge_of_the_best_strength(seed, count):
    phi, onehot = examples(count, seed=seed)
    w = ridge([sums_of(phi, onehot)], count)
    gram = phi.T @ phi
    tried = STRENGTHS * torch.linalg.eigvalsh(gram).clamp(min=0).mean()
    best = min(tried.tolist(), key=lambda strength: gcv(phi, onehot, strength))
    want = torch.linalg.solve(gram + best * torch.eye(len(gram)).double(), phi.T @ onehot)
    # 40 strengths, a fourth apart: measured 1e-9 where both choose the same one
    assert torch.allclose(w, want, rtol=1e-5, atol=1e-7)


def test_several_tasks_are_one_sum():
    phi, onehot = examples()
    parts = [sums_of(phi[:20], onehot[:20, :2]), sums_of(phi[20:], onehot[20:, 2:])]
    joined = sums_of(phi, torch.block_diag(onehot[:20, :2], onehot[20:, 2:]))
    assert torch.allclose(ridge(parts, 60), ridge([joined], 60), atol=1e-9)  # measured 1e-13


def test_all_of_a_sum_is_kept_bit_for_bit():
    phi, onehot = examples()
    gram = phi.T @ phi
    kept = sums_of(phi, onehot)
    assert torch.equal(kept.whole().tril(), gram.tril()) and torch.equal(kept.whole(), kept.whole().T)
    assert kept.gram.numel() == 13 * 14 // 2


def test_diagonal_plus_low_rank():
    phi, onehot = examples()
    gram, losses = phi.T @ phi, []
    for rank in (1, 4, 13):
        kept = sums_of(phi, onehot, rank)
        assert torch.allclose(kept.whole().diagonal(), gram.diagonal())
        assert float(torch.linalg.eigvalsh(kept.whole()).min()) > -1e-9
        losses.append(float((kept.whole() - gram).norm() / gram.norm()))
    assert losses[0] > losses[1] > losses[2] and losses[2] < 1e-12
    assert losses[1] < float((gram.diagonal().diag() - gram).norm() / gram.norm())


@pytest.mark.parametrize("count", [1, 12])
def test_fewer_examples_than_features(count):
    phi, onehot = examples(count)
    assert torch.isfinite(ridge([sums_of(phi, onehot)], count)).all()
