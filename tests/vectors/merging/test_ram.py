from __future__ import annotations

import pytest
from vector_parts import merged_rows


def test_by_hand():
    rows = [[1.0, 2.0, 0.0, 1e-6], [3.0, 0.0, 4.0, 0.0]]
    assert merged_rows(rows, "ram") == [2, 2, 4, 0]  # the last is below epsilon
    assert merged_rows(rows, "ram", epsilon=0.0)[3] == pytest.approx(1e-6)
    # one shared element of two: rho = 1 for both, at most .2
    assert merged_rows(rows, "ram", rescue=0.1) == pytest.approx([2, 2 * 1.02, 4 * 1.02, 0])
    assert merged_rows(rows, "ram", rescue=0.1, most=5) == pytest.approx([2, 2.2, 4.4, 0])
    # two shared elements and none of its own
    assert merged_rows([[1.0, 1.0], [3.0, 3.0]], "ram", rescue=1.0, most=9) == [2, 2]
