"""Mean, task arithmetic, SLERP, MagMax and Breadcrumbs against numbers worked out by hand."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn

from hatcl import ConfigError, IntegrityError
from hatcl.vectors.merging import merge
from hatcl.vectors.merging.arithmetic import GRID, search_scale
from hatcl.vectors.task_vector import TaskVector


def vectors(*rows):
    return [TaskVector({"w": torch.tensor(r)}) for r in rows]


def merged(rows, method, **options):
    return merge(vectors(*rows), method, **options)["w"].tolist()


def test_mean():
    assert merged([[1.0, 2.0], [3.0, -6.0], [2.0, 1.0]], "mean") == [2.0, -1.0]


def test_arithmetic():
    assert merged([[1.0, 2.0], [3.0, -6.0]], "arithmetic", scale=0.5) == [2.0, -2.0]
    assert merged([[1.0, 2.0], [3.0, -6.0]], "arithmetic") == torch.tensor([1.6, -1.6]).tolist()


def test_arithmetic_searches_the_scale_on_what_evaluate_says(caplog):
    two = vectors([1.0], [3.0])
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
    with pytest.raises(IntegrityError, match="weight is not what this vector was taken from"):
        merge([vector], "arithmetic", model=other, evaluate=lambda m: 0.0)


def test_arithmetic_refuses():
    two = vectors([1.0], [3.0])
    with pytest.raises(ConfigError, match="scale: got 0.5 beside evaluate, which searches for it"):
        merge(two, "arithmetic", scale=0.5, evaluate=lambda v: 0.0)
    for option, value in (("scales", [0.5]), ("model", nn.Linear(1, 1))):
        with pytest.raises(ConfigError, match=f"{option}: is for the search of the scale; pass evaluate="):
            merge(two, "arithmetic", **{option: value})
    with pytest.raises(ConfigError, match="scales: got none, expected at least one"):
        merge(two, "arithmetic", evaluate=lambda v: 0.0, scales=[])
    with pytest.raises(ConfigError, match="scales: got 'a', expected a finite number"):
        merge(two, "arithmetic", evaluate=lambda v: 0.0, scales=[0.1, "a"])
    with pytest.raises(ConfigError, match="evaluate: got nan at scale 0.1, expected a finite score"):
        merge(two, "arithmetic", evaluate=lambda v: float("nan"), scales=[0.1])


def test_magmax():
    assert merged([[1.0, -5.0, 2.0], [3.0, 4.0, -2.0]], "magmax") == [3.0, -5.0, 2.0]
    assert merged([[1.0, -5.0], [3.0, 4.0], [-4.0, 0.0]], "magmax", scale=0.5) == [-2.0, -2.5]


def test_breadcrumbs():
    row = [10.0, -8.0, 6.0, -4.0, 2.0, 1.0, 0.5, 0.25, 0.1, 0.05]
    got = merged([row], "breadcrumbs", outliers=0.2, density=0.3, scale=0.5)
    assert got == [0.0, 0.0, 3.0, -2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    got = merged([row, row[::-1]], "breadcrumbs", outliers=0.1, density=0.2, scale=1.0)
    assert got == [0.0, -8.0, 6.0, 0.0, 0.0, 0.0, 0.0, 6.0, -8.0, 0.0]
    assert merged([row], "breadcrumbs", outliers=0.0, density=0.0) == [0.0] * 10


def test_breadcrumbs_masks_each_layer_by_itself():
    vector = TaskVector(
        {"large": torch.tensor([400.0, 300.0, 200.0, 100.0]), "small": torch.tensor([4.0, 3.0, 2.0, 1.0])}
    )
    got = merge([vector], "breadcrumbs", outliers=0.25, density=0.5, scale=1.0)
    assert got["large"].tolist() == [0.0, 300.0, 200.0, 0.0]
    assert got["small"].tolist() == [0.0, 3.0, 2.0, 0.0]


def close(got, want):
    # the angle's functions round in float64: one float32 rounding of numbers below 8
    assert torch.allclose(torch.tensor(got), torch.tensor(want), rtol=0, atol=5e-7), (got, want)


def test_slerp():
    half = math.sqrt(0.5)
    close(merged([[1.0, 0.0], [0.0, 1.0]], "slerp"), [half, half])
    close(merged([[1.0, 0.0], [0.0, 1.0]], "slerp", t=1 / 3), [math.sqrt(0.75), 0.5])
    close(merged([[2.0, 0.0], [0.0, 4.0]], "slerp"), [2 * half, 4 * half])
    s = math.sin(math.pi / 3)
    close(merged([[1.0, 0.0], [0.5, s]], "slerp"), [math.cos(math.pi / 6), 0.5])  # 60 degrees: the middle is at 30


def test_slerp_is_linear_where_there_is_no_angle():
    assert merged([[1.0, 0.0], [3.0, 0.0]], "slerp", t=0.25) == [1.5, 0.0]
    assert merged([[1.0, 0.0], [-3.0, 0.0]], "slerp", t=0.25) == [0.0, 0.0]
    assert merged([[0.0, 0.0], [-3.0, 1.0]], "slerp") == [-1.5, 0.5]
    nearly = [math.cos(0.01), math.sin(0.01)]
    close(merged([[1.0, 0.0], nearly], "slerp"), [(1 + nearly[0]) / 2, nearly[1] / 2])


def test_slerp_ends_and_exchange():
    a, b = torch.randn(5).tolist(), torch.randn(5).tolist()
    assert merged([a, b], "slerp", t=0.0) == a and merged([a, b], "slerp", t=1.0) == b
    assert merged([a, b], "slerp", t=0.25) == merged([b, a], "slerp", t=0.75)


@pytest.mark.parametrize("count", [1, 3])
def test_slerp_takes_two(count):
    with pytest.raises(ConfigError, match=f"slerp: got {count} vectors, expected 2"):
        merge(vectors(*[[1.0]] * count), "slerp")
