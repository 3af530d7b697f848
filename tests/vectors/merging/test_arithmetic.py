"""Task arithmetic and the search of its scale, by hand."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from vector_parts import merged_rows, of_rows

from hatcl import ConfigError, IntegrityError
from hatcl.vectors.merging import merge
from hatcl.vectors.merging.arithmetic import GRID, search_scale
from hatcl.vectors.task_vector import TaskVector


def test_arithmetic():
    assert merged_rows([[1.0, 2.0], [3.0, -6.0]], "arithmetic", scale=0.5) == [2.0, -2.0]
    assert merged_rows([[1.0, 2.0], [3.0, -6.0]], "arithmetic") == torch.tensor([1.6, -1.6]).tolist()


def test_arithmetic_searches_the_scale_on_what_evaluate_says(caplog):
    two = of_rows([1.0], [3.0])
    seen = []

    def near(vector):
        seen.append(vector["w"].item())
        return -abs(vector["w"].item() - 1.3)

    with caplog.at_level(logging.INFO):
        found = merge(two, "arithmetic", evaluate=near, scales=[0.0, 0.25, 0.5, 0.3])
    assert seen == [0.0, 1.0, 2.0, torch.tensor(1.2).item()]
    assert torch.equal(found["w"], merge(two, "arithmetic", scale=0.3)["w"])
    assert "scale 0.3" in caplog.text
    flat = merge(two, "arithmetic", evaluate=lambda v: 1.0, scales=[0.5, 0.25])
    assert flat["w"].item() == 2.0  # the first of equal ones
    assert list(search_scale(two[0], near)) == list(GRID) and len(GRID) == 21 and (GRID[0], GRID[-1]) == (0, 1)


def test_arithmetic_scores_models_where_one_is_given():
    base, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    base.weight.data.fill_(1.0)
    other.weight.data.fill_(3.0)
    vector = TaskVector.between(base, other)
    x = torch.ones(1, 1)
    found = merge([vector], "arithmetic", model=base, evaluate=lambda m: -abs(m(x).item() - 2.5), scales=[0.5, 0.75])
    assert found.apply_to(base)(x).item() == 2.5 and base(x).item() == 1.0
    with pytest.raises(IntegrityError, match="weight differs from this vector's base"):
        merge([vector], "arithmetic", model=other, evaluate=lambda m: 0.0)


def test_arithmetic_refuses():
    two = of_rows([1.0], [3.0])
    with pytest.raises(ConfigError, match="scale: got 0.5 together with evaluate, which searches for it"):
        merge(two, "arithmetic", scale=0.5, evaluate=lambda v: 0.0)
    for option, value in (("scales", [0.5]), ("model", nn.Linear(1, 1))):
        with pytest.raises(ConfigError, match=f"{option} is for the search of the scale; pass evaluate="):
            merge(two, "arithmetic", **{option: value})
    with pytest.raises(ConfigError, match="scales: got none, expected at least one"):
        merge(two, "arithmetic", evaluate=lambda v: 0.0, scales=[])
    with pytest.raises(ConfigError, match="scales: got 'a', expected a finite number"):
        merge(two, "arithmetic", evaluate=lambda v: 0.0, scales=[0.1, "a"])
    with pytest.raises(ConfigError, match="evaluate: got nan at scale 0.1, expected a finite score"):
        merge(two, "arithmetic", evaluate=lambda v: float("nan"), scales=[0.1])
