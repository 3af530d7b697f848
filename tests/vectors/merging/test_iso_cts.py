"""Iso-CTS against a reference in numpy, written from the paper's Algorithm 2."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hatcl.vectors.merging import merge
from hatcl.vectors.task_vector import TaskVector

# float32 SVDs of numbers below 5: measured 2.1e-6 over 50 seeds
SLACK = 2e-5


def merged(matrices, **options):
    return merge([TaskVector({"w": m}) for m in matrices], "iso_cts", **options)["w"].double().numpy()


def polar(x):
    p, _, qh = np.linalg.svd(x, full_matrices=False)
    return p @ qh


def reference(taus, common):
    taus = [t.double().numpy() for t in taus]
    r, tasks = min(taus[0].shape), len(taus)
    own = round((r - int(r * common)) / tasks)
    k = r - own * tasks
    u, s, vh = np.linalg.svd(sum(taus), full_matrices=False)
    left, values, right = [u[:, :k]], [s[:k]], [vh[:k]]
    for tau in taus:
        ut, st, vt = np.linalg.svd(tau - u[:, :k] @ u[:, :k].T @ tau, full_matrices=False)
        left, values, right = [*left, ut[:, :own]], [*values, st[:own]], [*right, vt[:own]]
    mean = np.concatenate(values).mean()
    return mean * polar(np.concatenate(left, 1)) @ polar(np.concatenate(right).T).T


@pytest.mark.parametrize("common", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_as_in_the_paper(shape, common):
    taus = [torch.randn(shape) for _ in range(2)]
    got = merged(taus, common=common, scale=1.3)
    assert np.abs(got - 1.3 * reference(taus, common)).max() < SLACK


def test_without_room_for_tasks_it_is_iso_c():
    taus = [torch.randn(4, 6) for _ in range(3)]
    iso_c = merge([TaskVector({"w": t}) for t in taus], "iso_c")["w"].double().numpy()
    assert np.abs(merged(taus, common=1.0) - iso_c).max() < SLACK
    assert np.abs(merged(taus, common=0.0) - iso_c).max() > 0.1


def test_more_is_asked_for_than_there_is():
    """round(5 / 3) = 2 directions for each of three tasks would be six of five."""
    taus = [torch.randn(5, 9) for _ in range(3)]
    assert (np.linalg.svd(merged(taus, common=0.0), compute_uv=False) > 0.1).sum() == 5


def test_equal_tasks_bring_no_direction_of_their_own():
    tau = torch.outer(torch.randn(6), torch.randn(8))
    got = merged([tau, tau], common=0.5)
    assert (np.linalg.svd(got, compute_uv=False) > SLACK).sum() == 1


def test_what_is_no_matrix_is_averaged():
    rows = [TaskVector({"b": torch.tensor([1.0, 4.0])}), TaskVector({"b": torch.tensor([3.0, -2.0])})]
    assert merge(rows, "iso_cts", scale=2.0)["b"].tolist() == [4.0, 2.0]
