"""The union-find against the plainest one there is."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hatcl.map.labels import Labels

SIZE = 24
pairs = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=12)


class Naive:
    """Every label's component as a set."""

    def __init__(self, size):
        self.of = {i: {i} for i in range(size + 1)}

    def union(self, a, b):
        if a and b and self.of[a] is not self.of[b]:
            merged = self.of[a] | self.of[b]
            for i in merged:
                self.of[i] = merged

    def find(self, i):
        return min(self.of[i])


@given(st.lists(pairs, max_size=6))
def test_find_and_union_are_those_of_sets(batches):
    labels, naive = Labels(), Naive(SIZE)
    assert labels.new(SIZE, ("w", 0)) == 1
    for batch in batches:
        left, right = (np.array([p[side] for p in batch], dtype=np.int64) for side in (0, 1))
        labels.union(left, right)
        for a, b in batch:
            naive.union(a, b)
        every = np.arange(SIZE + 1)
        assert labels.find(every).tolist() == [naive.find(i) for i in every]
    assert labels.find(np.array([0]))[0] == 0  # nothing is coupled to "always on"


@given(pairs, st.sets(st.integers(0, SIZE)))
def test_a_role_spreads_over_its_component(batch, marked):
    labels, naive = Labels(), Naive(SIZE)
    labels.new(SIZE, ("w", 0))
    labels.union(np.array([a for a, _ in batch], dtype=np.int64), np.array([b for _, b in batch], dtype=np.int64))
    for a, b in batch:
        naive.union(a, b)
    labels.mark("read", np.array(sorted(marked), dtype=np.int64))
    want = [bool(naive.of[i] & (marked - {0})) for i in range(SIZE + 1)]
    assert labels.any_in_component("read").tolist() == want


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.data())
def test_labels_know_their_axes(counts, data):
    labels = Labels()
    firsts = [labels.new(n, (f"p{i}", i)) for i, n in enumerate(counts)]
    assert firsts == [1 + sum(counts[:i]) for i in range(len(counts))]
    picked = data.draw(st.lists(st.integers(0, sum(counts)), max_size=5))
    want = {(f"p{i}", i) for i, (f, n) in enumerate(zip(firsts, counts, strict=True)) for x in picked if f <= x < f + n}
    assert set(labels.axes_of(np.array(picked, dtype=np.int64))) == want


def test_the_order_of_coupling_does_not_matter():
    rng = np.random.default_rng(0)
    batch = rng.integers(1, 200, size=(2, 150))
    found = []
    for order in (slice(None), slice(None, None, -1)):
        labels = Labels()
        labels.new(200, ("w", 0))
        for a, b in batch.T[order]:
            labels.union(np.array([a]), np.array([b]))
        found.append(labels.find(np.arange(201)).tolist())
    together = Labels()
    together.new(200, ("w", 0))
    together.union(*batch)
    assert found[0] == found[1] == together.find(np.arange(201)).tolist()
