"""MagMax, by hand."""

from __future__ import annotations

from vector_parts import merged_rows


def test_magmax():
    assert merged_rows([[1.0, -5.0, 2.0], [3.0, 4.0, -2.0]], "magmax") == [3.0, -5.0, 2.0]
    assert merged_rows([[1.0, -5.0], [3.0, 4.0], [-4.0, 0.0]], "magmax", scale=0.5) == [-2.0, -2.5]
