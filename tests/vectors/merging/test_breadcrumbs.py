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
