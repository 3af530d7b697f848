"""SCE, by hand."""

from __future__ import annotations

import pytest
from vector_parts import merged_rows

from hatcl import ConfigError


def test_select_calculate_erase():
    rows = [[4.0, 1.0, 0.0, -2.0], [0.0, 1.0, 0.0, 1.0]]
    # weights: mean squares 21/4 and 2/4; signs of the sums + + . -
    a, b = 21 / 23, 2 / 23
    assert merged_rows(rows, "sce") == pytest.approx([4 * a / a, 1, 0, -2])
    # variances 4, 0, 0, 2.25: half of the two that differ is one
    assert merged_rows(rows, "sce", density=0.5) == pytest.approx([4, 0, 0, 0])
    both = [[4.0, 2.0], [1.0, 1.0]]
    a, b = 20 / 22, 2 / 22
    assert merged_rows(both, "sce") == pytest.approx([4 * a + b, 2 * a + b])


def test_a_floor_below_which_all_count_the_same():
    rows = [[4e-4, 2e-4], [1e-4, 1e-4]]
    assert merged_rows(rows, "sce", floor=1e-6) == pytest.approx([2.5e-4, 1.5e-4])
    assert merged_rows(rows, "sce") == pytest.approx([1e-4 * (4 * 20 + 2) / 22, 1e-4 * (2 * 20 + 2) / 22])


def test_undecided():
    rows = [[2.0, 1.0], [-2.0, 1.0]]
    assert merged_rows(rows, "sce") == [0, 1] and merged_rows(rows, "sce", undecided="positive") == [2, 1]
    with pytest.raises(ConfigError, match="undecided: got 'posit', expected one of zero, positive; did you mean"):
        merged_rows(rows, "sce", undecided="posit")


def test_nothing_is_selected():
    assert merged_rows([[1.0, 2.0], [3.0, 5.0]], "sce", density=0.0) == [0, 0]
