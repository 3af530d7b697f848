"""EMR by hand and against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vector_parts import merged_rows, of_rows

from hatcl.vectors.merging import emr_parts, merge
from hatcl.vectors.task_vector import TaskVector

ROWS = [[2.0, -1.0, 0.5, 1.0], [3.0, 2.0, -1.0, -1.0], [-1.0, 3.0, -1.5, 0.0]]


def test_by_hand():
    assert merged_rows(ROWS, "emr") == [3.0, 3.0, -1.5, 0.0]  # masses 4, 4, -2, 0
    (a, first), (b, second), (c, third) = emr_parts(of_rows(*ROWS))
    assert [v["w"].tolist() for v in (first, second, third)] == [[3, 0, 0, 0], [3, 3, -1.5, 0], [0, 3, -1.5, 0]]
    assert (a, b, c) == pytest.approx((4.5 / 3, 7 / 7.5, 5.5 / 4.5))


def test_scales_are_of_the_whole_vector():
    """Two tensors of unequal size: sums over all elements, not means of the tensors' means."""
    rng = np.random.default_rng(0)
    taus = [{"w": rng.standard_normal((9, 5)), "b": 3 * rng.standard_normal(2)} for _ in range(3)]
    vectors = [TaskVector({n: torch.from_numpy(x).float() for n, x in t.items()}) for t in taus]
    flat = np.stack([np.concatenate([v["w"].numpy().ravel(), v["b"].numpy()]) for v in vectors]).astype(np.float64)
    sign = np.sign(flat.sum(0))
    tau = sign * np.max(np.where(np.sign(flat) == sign, np.abs(flat), 0), 0)
    unified = merge(vectors, "emr")
    assert np.array_equal(np.concatenate([unified["w"].numpy().ravel(), unified["b"].numpy()]), tau)
    for own, (scale, part) in zip(flat, emr_parts(vectors), strict=True):
        mask = own * tau > 0
        assert scale == pytest.approx(np.abs(own).sum() / np.abs(mask * tau).sum(), rel=1e-12)
        assert np.array_equal(np.concatenate([part["w"].numpy().ravel(), part["b"].numpy()]), mask * tau)


def test_one_task_is_itself():
    [(scale, part)] = emr_parts(of_rows(ROWS[0]))
    assert scale == 1 and part["w"].tolist() == ROWS[0]


def test_a_task_without_an_update_has_none():
    parts = emr_parts(of_rows([1.0, 2.0], [0.0, 0.0]))
    assert parts[1][0] == 1 and not parts[1][1]["w"].any()


def test_adapters_of_different_layers():
    vectors = [TaskVector({"x": torch.ones(2)}, partial=True), TaskVector({"y": torch.ones(3)}, partial=True)]
    (a, first), (b, second) = emr_parts(vectors)
    assert (a, b) == (1, 1) and first["x"].all() and not first["y"].any() and second["y"].all()
