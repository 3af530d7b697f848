"""Breadcrumbs, by hand."""

from __future__ import annotations

import torch
from vector_parts import merged_rows

from hatcl.vectors.merging import merge
from hatcl.vectors.task_vector import TaskVector


def test_breadcrumbs():
    row = [10.0, -8.0, 6.0, -4.0, 2.0, 1.0, 0.5, 0.25, 0.1, 0.05]
    got = merged_rows([row], "breadcrumbs", outliers=0.2, density=0.3, scale=0.5)
    assert got == [0.0, 0.0, 3.0, -2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    got = merged_rows([row, row[::-1]], "breadcrumbs", outliers=0.1, density=0.2, scale=1.0)
    assert got == [0.0, -8.0, 6.0, 0.0, 0.0, 0.0, 0.0, 6.0, -8.0, 0.0]
    assert merged_rows([row], "breadcrumbs", outliers=0.0, density=0.0) == [0.0] * 10


def test_breadcrumbs_masks_each_layer_by_itself():
    vector = TaskVector(
        {"large": torch.tensor([400.0, 300.0, 200.0, 100.0]), "small": torch.tensor([4.0, 3.0, 2.0, 1.0])}
    )
    got = merge([vector], "breadcrumbs", outliers=0.25, density=0.5, scale=1.0)
    assert got["large"].tolist() == [0.0, 300.0, 200.0, 0.0]
    assert got["small"].tolist() == [0.0, 3.0, 2.0, 0.0]


def test_signs_are_elected_among_the_crumbs():
    rows = [[9.0, 1.0, 0.1, -2.0], [-1.0, -9.0, 0.1, 3.0]]
    given = {"density": 0.5, "outliers": 0.25}
    # left of each: [. 1 . -2] and [-1 . . 3]; both of the last would be -2 and 3: the 3
    assert merge([TaskVector({"w": torch.tensor(r)}) for r in rows], "breadcrumbs_ties", **given)["w"].tolist() == [
        -1.0, 1.0, 0.0, 3.0,
    ]  # fmt: skip


def test_a_density_beside_many_outliers_holds():
    v = TaskVector({"w": torch.tensor([1.0, 2.0, 3.0, 4.0])})
    assert merge([v], "breadcrumbs", density=0.75, outliers=0.5, scale=1.0)["w"].tolist() == [1.0, 2.0, 3.0, 0.0]
    assert merge([v], "breadcrumbs", density=1.0, outliers=0.5, scale=1.0)["w"].tolist() == [1.0, 2.0, 3.0, 4.0]
