"""Model Stock, by hand."""

from __future__ import annotations

import math

import pytest
from vector_parts import merged_rows, of_rows

from hatcl import ConfigError
from hatcl.vectors.merging import merge


def test_the_mean_times_what_the_angle_gives():
    # 60 degrees: r = 2 * 0.5 / (1 + 0.5)
    s = math.sqrt(0.75)
    assert merged_rows([[1.0, 0.0], [0.5, s]], "model_stock") == pytest.approx([0.75 * 2 / 3, s / 2 * 2 / 3])
    assert merged_rows([[1.0, 0.0], [0.0, 1.0]], "model_stock") == pytest.approx([0, 0])  # nothing in common
    assert merged_rows([[2.0, 4.0], [1.0, 2.0]], "model_stock") == pytest.approx([1.5, 3])  # the mean
    assert merged_rows([[1.0, 2.0], [-1.0, -2.0]], "model_stock") == [0, 0]  # the denominator is 0
    rows = [[1.0, 0.0, 0.0], [0.5, s, 0.0], [0.5, 0.0, s]]  # cosines 1/2, 1/2, 1/4: r = 3 c / (1 + 2 c), c = 5/12
    r = 3 * (5 / 12) / (1 + 2 * 5 / 12)
    assert merged_rows(rows, "model_stock") == pytest.approx([r * 2 / 3, r * s / 3, r * s / 3], rel=1e-6)


def test_an_angle_for_each_row():
    rows = [[[1.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [1.0, 1.0]]]
    assert merge(of_rows(*rows), "model_stock", rows=True)["w"].tolist() == [
        pytest.approx([0, 0]),
        pytest.approx([1, 1]),
    ]
    assert merged_rows(rows, "model_stock")[0] != pytest.approx([0, 0])


def test_a_floor_draws_small_vectors_to_the_base():
    rows = [[1e-4, 2e-4], [1e-4, 2e-4]]  # one direction: the mean itself, but for the floor
    assert merged_rows(rows, "model_stock") == pytest.approx(rows[0])
    cosine = 5e-8 / 1e-6
    share = 2 * cosine / (1 + cosine)
    assert merged_rows(rows, "model_stock", floor=1e-6) == pytest.approx([x * share for x in rows[0]])


def test_one_vector_has_no_angle():
    with pytest.raises(ConfigError, match="model_stock: got 1 vector, expected two or more: it takes the angles"):
        merge(of_rows([1.0]), "model_stock")
