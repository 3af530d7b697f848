"""DARE: how often it drops, that it drops the same whenever a tensor is read, and that nothing is lost on average."""

from __future__ import annotations

import pytest
import torch

from hatcl.vectors.merging import dare, merge
from hatcl.vectors.merging.dare import kept
from hatcl.vectors.task_vector import TaskVector

N = 40_000


def rate(p, **where):
    return float(kept((N,), p, **{"seed": 0, "vector": 0, "name": "w", **where}).float().mean())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_it_keeps_the_share_it_should(p):
    for seed in range(5):
        assert abs(rate(p, seed=seed) - (1 - p)) < 5 * (p * (1 - p) / N) ** 0.5  # five standard deviations


def test_ends():
    assert kept((7,), 0.0, 0, 0, "w").all() and kept((), 0.0, 0, 0, "w").shape == ()
    assert kept((0, 3), 0.5, 0, 0, "w").shape == (0, 3)


def test_what_is_kept_never_changes_between_versions():
    assert kept((16,), 0.5, 3, 1, "head.weight").int().tolist() == GOLDEN


GOLDEN = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("other", [{"seed": 1}, {"vector": 1}, {"name": "v"}])
def test_other_seeds_vectors_and_tensors_are_dropped_independently(other):
    a = kept((N,), 0.5, 0, 0, "w").double() - 0.5
    b = kept((N,), 0.5, **{"seed": 0, "vector": 0, "name": "w", **other}).double() - 0.5
    for shifted in (b, b.flip(0), b.roll(1)):
        assert abs(float((a * shifted).mean()) * 4) < 5 / N**0.5  # five standard deviations of a correlation
    assert abs(float((a[1:] * a[:-1]).mean()) * 4) < 5 / N**0.5


def test_the_size_of_the_pieces_is_nothing(monkeypatch):
    want = kept((5, 11), 0.3, 0, 0, "w")
    monkeypatch.setattr(dare, "HASHED_AT_ONCE", 7)
    assert torch.equal(kept((5, 11), 0.3, 0, 0, "w"), want)


@pytest.fixture
def two():
    return [TaskVector({n: torch.randn(30, 20) + 3 for n in "ab"}) for _ in range(2)]


def test_linear_is_task_arithmetic_of_what_is_kept(two):
    merged = merge(two, "dare_linear", drop=0.75, scale=0.5, seed=4)
    for n in merged:
        # 0.5 / (1 - 0.75) = 2, and the sums are taken in float64
        want = sum(v[n].double() * kept(v[n].shape, 0.75, 4, i, n) for i, v in enumerate(two)) * 2
        assert torch.equal(merged[n], want.float())


def test_on_average_nothing_is_lost(two):
    seeds = 400
    mean = sum(merge(two, "dare_linear", drop=0.5, scale=1.0, seed=s)["a"].double() for s in range(seeds)) / seeds
    total = two[0]["a"].double() + two[1]["a"].double()
    spread = (two[0]["a"].double() ** 2 + two[1]["a"].double() ** 2).sqrt() / seeds**0.5  # p / (1 - p) = 1
    assert float(((mean - total) / spread).abs().max()) < 5  # of 600 normal deviates


def test_ties_elects_among_what_is_kept(two):
    two[1] = -0.5 * two[1]
    merged = merge(two, "dare_ties", drop=0.5, seed=2)
    one, other = (kept((30, 20), 0.5, 2, i, "a") for i in range(2))
    a, b = two[0]["a"], two[1]["a"]
    alone = torch.where(one, a, torch.where(other, b, 0)) * 2
    both = one & other & (a > 0) & (b < 0)
    assert torch.equal(merged["a"][~(one & other)], alone[~(one & other)])
    assert torch.equal(merged["a"][both], torch.where(a + b > 0, a, b)[both] * 2)


def test_ties_trims_what_is_left():
    v = TaskVector({"w": torch.arange(1.0, 101.0)})
    left = torch.where(kept((100,), 0.5, 0, 0, "w"), v["w"], 0)
    best = left.sort().values[-10]
    assert torch.equal(merge([v], "dare_ties", drop=0.5, density=0.1)["w"], torch.where(left >= best, left, 0) * 2)


def test_twin_a_generator_that_runs_on_depends_on_the_order(two, monkeypatch):
    class Lazily:
        generator = torch.Generator()

        def kept(self, shape, p, seed, vector, name):
            return torch.rand(tuple(shape), generator=self.generator) >= p

    def both_ways():
        forward = {n: merge([TaskVector({n: v[n]}) for v in two], "dare_linear")[n] for n in "ab"}
        backward = {n: merge([TaskVector({n: v[n]}) for v in two], "dare_linear")[n] for n in "ba"}
        return all(torch.equal(forward[n], backward[n]) for n in "ab")

    assert both_ways()
    monkeypatch.setattr(dare, "kept", Lazily().kept)
    assert not both_ways()
