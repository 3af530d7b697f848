"""TALL-masks and Consensus by hand and against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vector_parts import merged_rows, of_rows

from hatcl import ConfigError
from hatcl.vectors.merging import merge
from hatcl.vectors.merging.tall_masks import tall_masks
from hatcl.vectors.task_vector import TaskVector


def test_by_hand():
    # sums 3, 0, 2, 1; the others add 1, -2, 0, 1 to the first and 2, 2, 2, 0 to the second
    rows = [[2.0, 2.0, 2.0, 0.0], [1.0, -2.0, 0.0, 1.0]]
    # thresholds .4: |2| > .4, |2| > .8, |2| > 0, 0 > .4 no; |1| > .8, |2| > .8, 0 > .8 no, |1| > 0
    own = tall_masks(of_rows(*rows), 0.4)
    assert [v["w"].tolist() for v in own] == [[3.0, 0.0, 2.0, 0.0], [3.0, 0.0, 0.0, 1.0]]
    assert merged_rows(rows, "consensus", scale=1.0) == [3.0, 0.0, 0.0, 0.0]  # the last two are selfish
    assert merged_rows(rows, "consensus", scale=1.0, agree=1) == [3.0, 0.0, 2.0, 1.0]
    # one threshold per task: |1| > .6 * 2 no
    assert tall_masks(of_rows(*rows), [0.4, 0.6])[1]["w"].tolist() == [0.0, 0.0, 0.0, 1.0]


def test_against_numpy():
    taus = np.random.default_rng(0).standard_normal((4, 300)).astype(np.float32)
    total = taus.astype(np.float64).sum(0)
    masks = np.abs(taus) > 0.5 * np.abs(total - taus)
    vectors = [TaskVector({"w": torch.from_numpy(t)}) for t in taus]
    for mask, own in zip(masks, tall_masks(vectors, 0.5), strict=True):
        assert np.array_equal(own["w"].numpy(), (mask * total).astype(np.float32))
    got = merge(vectors, "consensus", threshold=0.5, agree=3, scale=0.3)["w"].numpy()
    assert np.array_equal(got, (0.3 * total * (masks.sum(0) >= 3)).astype(np.float32))


def test_what_nobody_changed_is_in_no_mask():
    own = tall_masks(of_rows([0.0, 1.0], [0.0, 1.0]))
    assert all(v["w"].tolist() == [0.0, 2.0] for v in own)


def test_what_cannot_be_is_refused():
    vectors = of_rows([1.0], [2.0])
    with pytest.raises(ConfigError, match="agree: got 3 of 2 tasks, expected at most 2"):
        merge(vectors, "consensus", agree=3)
    with pytest.raises(ConfigError, match="threshold: got 3, expected one number or 2, one per vector"):
        tall_masks(vectors, [0.2, 0.3, 0.4])
    with pytest.raises(ConfigError, match="threshold: got -1"):
        tall_masks(vectors, -1.0)
