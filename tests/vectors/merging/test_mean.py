"""The mean, by hand."""

from __future__ import annotations

from vector_parts import merged_rows


def test_mean():
    assert merged_rows([[1.0, 2.0], [3.0, -6.0], [2.0, 1.0]], "mean") == [2.0, -1.0]
