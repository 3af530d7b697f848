"""NuSLERP, by hand."""

from __future__ import annotations

import math

import pytest
from vector_parts import merged_rows, of_rows

from hatcl import ConfigError
from hatcl.vectors.merging import merge

HALF = math.sqrt(0.5)


def test_weights_are_the_place_on_the_arc():
    right = [[1.0, 0.0], [0.0, 1.0]]
    assert merged_rows(right, "nuslerp") == pytest.approx([HALF, HALF])
    assert merged_rows(right, "nuslerp", weights=[2.0, 1.0]) == pytest.approx(merged_rows(right, "slerp", t=1 / 3))
    assert merged_rows(right, "nuslerp", weights=[1.0, -1.0]) == pytest.approx([HALF, HALF])  # their sum is 0


def test_rows_and_columns():
    a, b = [[1.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [2.0, 0.0]]
    assert merged_rows([a, b], "nuslerp", along=-1) == [pytest.approx([HALF, HALF]), pytest.approx([2, 0])]
    turned = [list(map(list, zip(*m, strict=True))) for m in (a, b)]
    got = merged_rows(turned, "nuslerp", along=0)
    assert list(map(list, zip(*got, strict=True))) == [pytest.approx([HALF, HALF]), pytest.approx([2, 0])]
    whole = merged_rows([a, b], "nuslerp")
    assert whole[0] != pytest.approx([HALF, HALF])


def test_it_bends_where_slerp_is_straight():
    angle = 0.02  # its cosine is 0.9998
    rows = [[1.0, 0.0], [math.cos(angle), math.sin(angle)]]
    assert math.hypot(*merged_rows(rows, "nuslerp")) == pytest.approx(1, abs=1e-7)
    assert math.hypot(*merged_rows(rows, "slerp")) < 1 - 4e-5
    assert merged_rows([[1.0, 0.0], [-3.0, 0.0]], "nuslerp") == [-1, 0]  # opposite: no arc


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="nuslerp: got 3 vectors, expected 2; for more take karcher or multislerp"):
        merge(of_rows([1.0], [1.0], [1.0]), "nuslerp")
    with pytest.raises(ConfigError, match=r"along: got 1, expected None \(whole tensors\), -1"):
        merge(of_rows([1.0], [1.0]), "nuslerp", along=1)
