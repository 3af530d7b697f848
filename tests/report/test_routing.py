"""The picture of whom a router takes for whom."""

from __future__ import annotations

import pytest

from hatcl.errors import ConfigError
from hatcl.report.heatmap import MOST_NUMBERS
from hatcl.report.routing import draw_routing


@pytest.mark.parametrize("size", [1, 3, MOST_NUMBERS + 1])
def test_a_picture_of_any_number_of_tasks(size):
    pytest.importorskip("matplotlib")
    confusion = [[(i + 2 * j) % 5 for j in range(size)] for i in range(size)]
    assert draw_routing(confusion, [f"task {t}" for t in range(size)]).startswith(b"\x89PNG")


def test_tasks_without_inputs_are_drawn():
    pytest.importorskip("matplotlib")
    assert draw_routing([[0, 0], [1, 3]], ["a", "b"]).startswith(b"\x89PNG")


@pytest.mark.parametrize(("confusion", "names"), [([[1, 2]], ["a"]), ([], []), ([[1]], ["a", "b"])])
def test_a_matrix_of_another_shape(confusion, names):
    with pytest.raises(ConfigError, match="confusion: got shape"):
        draw_routing(confusion, names)
