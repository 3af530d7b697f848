"""Iso-C against numpy, and what it does not invent."""

from __future__ import annotations

import numpy as np
import torch

from hatcl.vectors.merging import merge
from hatcl.vectors.task_vector import TaskVector

# a float32 SVD of numbers below 5: measured 1.2e-6 over 50 seeds
SLACK = 1e-5


def merged(matrices, **options):
    return merge([TaskVector({"w": m}) for m in matrices], "iso_c", **options)["w"].double().numpy()


def test_the_sum_with_its_mean_singular_value_everywhere():
    for shape in ((5, 7), (7, 5), (6, 6)):
        taus = [torch.randn(shape) for _ in range(3)]
        u, s, vh = np.linalg.svd(sum(t.double().numpy() for t in taus), full_matrices=False)
        want = 0.7 * s.mean() * (u @ vh)
        assert np.abs(merged(taus, scale=0.7) - want).max() < SLACK


def test_the_nuclear_norm_is_that_of_the_sum_also_of_low_rank():
    """Two updates of rank 1 in a matrix of rank 6: their two directions, and none besides."""
    taus = [torch.outer(torch.randn(6), torch.randn(8)) for _ in range(2)]
    got = np.linalg.svd(merged(taus), compute_uv=False)
    want = np.linalg.svd(sum(t.double().numpy() for t in taus), compute_uv=False)
    assert abs(got.sum() - want.sum()) < SLACK and got[2:].max() < SLACK
    assert abs(got[0] - got[1]) < SLACK
    u, _, vh = torch.linalg.svd(taus[0] + taus[1], full_matrices=False)
    twin = np.linalg.svd((u @ vh).numpy(), compute_uv=False)  # as published: six directions
    assert twin[2:].min() > 0.9


def test_what_is_no_matrix_is_averaged():
    rows = [TaskVector({"b": torch.tensor([1.0, 4.0])}), TaskVector({"b": torch.tensor([3.0, -2.0])})]
    assert merge(rows, "iso_c", scale=2.0)["b"].tolist() == [4.0, 2.0]


def test_filters_on_demand_as_their_matrices():
    filters = [torch.randn(4, 2, 3, 3) for _ in range(2)]
    flat = merged([f.flatten(1) for f in filters])
    assert np.array_equal(merged(filters, convs=True).reshape(4, -1), flat)
    assert np.array_equal(merged(filters), ((filters[0].double() + filters[1].double()) / 2).float().double().numpy())
