"""Multi-SLERP, by hand."""

from __future__ import annotations

import math

import pytest
from vector_parts import merged_rows

from hatcl import ConfigError, VectorError


def test_of_two_it_is_the_middle_of_the_arc_and_the_mean_length():
    assert merged_rows([[2.0, 0.0], [0.0, 4.0]], "multislerp") == pytest.approx([3 * math.sqrt(0.5)] * 2)
    assert merged_rows([[2.0, 1.0]], "multislerp") == [2, 1]
    assert merged_rows([[0.0, 0.0], [0.0, 0.0]], "multislerp") == [0, 0]


def test_weights():
    right = [[1.0, 0.0], [0.0, 1.0]]
    one = merged_rows(right, "multislerp", weights=[3.0, 1.0])
    # the direction of (3, 1) is 18.43 degrees from the first; the tangents' mean leads on from there
    m = [3 / math.sqrt(10), 1 / math.sqrt(10)]
    ways = [[1 - m[0] * m[0], -m[0] * m[1]], [-m[1] * m[0], 1 - m[1] * m[1]]]
    way = [0.75 * a + 0.25 * b for a, b in zip(*ways, strict=True)]
    length = math.hypot(*way)
    want = [math.cos(length) * x + math.sin(length) / length * v for x, v in zip(m, way, strict=True)]
    assert one == pytest.approx(want)
    # weights that sum to 2: twice the way and twice the length
    twice = [2 * (math.cos(2 * length) * x + math.sin(2 * length) / length * v) for x, v in zip(m, way, strict=True)]
    assert merged_rows(right, "multislerp", weights=[1.5, 0.5], normalise=False) == pytest.approx(twice)


def test_directions_that_cancel():
    assert merged_rows([[1.0, 0.0], [-3.0, 0.0]], "multislerp") == [-1, 0]  # two are added by their weights
    three = [[1.0, 0.0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]]
    with pytest.raises(VectorError, match="w: the directions cancel each other out; choose other weights"):
        merged_rows(three, "multislerp")
    with pytest.raises(ConfigError, match="weights: they sum to 0; pass others, or normalise=False"):
        merged_rows([[1.0], [2.0]], "multislerp", weights=[1.0, -1.0])
