"""Localize-and-Stitch by hand, and as the union of grafts that it is."""

from __future__ import annotations

import copy

import torch
from vector_parts import merged_rows

from hatcl import grafts
from hatcl.vectors.merging import merge


def test_by_hand():
    rows = [[4.0, 3.0, 0.0, 1.0], [2.0, -1.0, 5.0, 1.0]]
    # the two largest of each: 4, 3 and 2, 5; both have the first element
    assert merged_rows(rows, "localize_and_stitch", density=0.5) == [3.0, 3.0, 5.0, 0.0]
    assert merged_rows(rows, "localize_and_stitch", density=1.0) == [3.0, 1.0, 2.5, 1.0]
    assert merged_rows(rows, "mean", **{}) == [3.0, 1.0, 2.5, 1.0]


def test_it_is_the_union_of_grafts(base, models, vectors):
    merged = merge(vectors, "localize_and_stitch", density=0.2).apply_to(base)
    names = dict(base.named_parameters())
    chosen = [grafts.select_graft(base, m, sparsity=0.2, only="*") for m in models]
    stitched = grafts.union(chosen, overlap="mean").apply_to(copy.deepcopy(base))
    for name in names:
        # the mean of sums against the sum of a mean: an ulp of numbers below 2
        torch.testing.assert_close(merged.get_parameter(name), stitched.get_parameter(name), rtol=0, atol=2.4e-7)
        assert torch.equal(merged.get_parameter(name) != names[name], stitched.get_parameter(name) != names[name])
