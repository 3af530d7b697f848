"""DELLA: who is kept how often, and that nothing is lost on average."""

from __future__ import annotations

import pytest
import torch

from hatcl import ConfigError
from hatcl.vectors.merging import merge
from hatcl.vectors.merging.dare import kept
from hatcl.vectors.merging.della import chances
from hatcl.vectors.task_vector import TaskVector


def test_the_larger_of_a_row_are_kept_more_often():
    p = chances(torch.tensor([[1.0, -3.0, 2.0], [0.5, 0.1, -0.2]]), 0.5, 0.2)
    assert torch.allclose(p, torch.tensor([[0.3, 0.7, 0.5], [0.7, 0.3, 0.5]], dtype=torch.float64))
    assert chances(torch.tensor([5.0, 1.0]), 0.5, 0.1).tolist() == pytest.approx([0.6, 0.4])
    assert chances(torch.ones(4, 1), 0.5, 0.1).tolist() == [[0.4]] * 4  # a row of one is its own smallest
    assert float(chances(torch.randn(8, 33), 0.4, 0.3).mean()) == pytest.approx(0.4)


@pytest.mark.parametrize("rescale", ["expected", "l1", "none"])
def test_linear_is_what_is_kept_rescaled_and_summed(rescale):
    v = TaskVector({"w": torch.randn(20, 30)})
    merged = merge([v], "della_linear", density=0.6, epsilon=0.3, scale=1.0, seed=3, rescale=rescale)["w"]
    p = chances(v["w"], 0.6, 0.3)
    left = torch.where(kept((20, 30), 1 - p, 3, 0, "w"), v["w"], 0)
    factor = {"expected": 1 / p, "l1": v["w"].abs().sum() / left.abs().sum(), "none": 1.0}[rescale]
    assert torch.allclose(merged, (left * factor).float(), rtol=1e-5, atol=0)  # sums of 600 numbers in float32
    assert 0.5 < float((merged != 0).float().mean()) < 0.7


def test_on_average_nothing_is_lost():
    v, seeds = TaskVector({"w": torch.randn(10, 10)}), 300
    mean = sum(merge([v], "della_linear", scale=1.0, seed=s)["w"].double() for s in range(seeds)) / seeds
    p = chances(v["w"], 0.5, 0.15)
    spread = v["w"].double().abs() * ((1 - p) / p / seeds).sqrt()
    assert float(((mean - v["w"]) / spread).abs().max()) < 5  # of 100 normal deviates


def test_signs_are_elected():
    a, b = TaskVector({"w": torch.full((6, 40), 3.0)}), TaskVector({"w": torch.full((6, 40), -1.0)})
    out = merge([a, b], "della", rescale="none", epsilon=0.0)["w"]
    one, other = (kept((6, 40), 0.5, 0, i, "w") for i in range(2))
    want = torch.where(one, 3.0, torch.where(other, -1.0, 0.0))
    assert torch.equal(out, want) and {*want.unique().tolist()} == {-1, 0, 3}


@pytest.mark.parametrize("given", [{"density": 0.1}, {"density": 0.9}, {"density": [0.5, 0.2], "epsilon": 0.2}])
def test_probabilities_outside_of_0_to_1_are_refused(given):
    v = [TaskVector({"w": torch.ones(2)})] * (2 if isinstance(given["density"], list) else 1)
    for method in ("della", "della_linear"):
        with pytest.raises(ConfigError, match="epsilon: got .* with the density .*, expected density - epsilon and"):
            merge(v, method, **given)
