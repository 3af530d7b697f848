"""Tensors by patterns of their names; the k largest of all elements, exactly k."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hatcl.errors import ConfigError
from hatcl.vectors.select import chosen_names, largest

# few values, so that ties are the rule; subnormals and both zeros among them
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 1e-45, 3e38, -1e-20])


def chosen(tensors, k):
    cut = largest(tensors, k)
    return {name: cut.mask(name, t) for name, t in tensors.items()}


@st.composite
def some_tensors(draw):
    values = st.floats(width=32, allow_nan=False, allow_infinity=False) | VALUES
    lists = draw(st.lists(st.lists(values, min_size=0, max_size=9), min_size=1, max_size=4))
    tensors = {f"t{i}": torch.tensor(x, dtype=torch.float32) for i, x in enumerate(lists)}
    return tensors, draw(st.integers(0, sum(map(len, lists))))


@given(some_tensors())
@settings(max_examples=200, deadline=None)
def test_as_torch_topk(case):
    tensors, k = case
    masks = chosen(tensors, k)
    flat, mask = torch.cat(list(tensors.values())).abs(), torch.cat(list(masks.values()))
    assert int(mask.sum()) == k
    assert torch.equal(flat[mask].sort().values, flat.topk(k).values.sort().values)


def test_of_equal_ones_the_first_are_taken():
    masks = chosen({"a": torch.tensor([1.0, -1.0, 3.0]), "b": torch.tensor([[1.0, 1.0]])}, 3)
    assert masks["a"].tolist() == [True, True, True] and masks["b"].tolist() == [[False, False]]
    masks = chosen({"a": torch.tensor([1.0, -1.0, 3.0]), "b": torch.tensor([[1.0, 1.0]])}, 4)
    assert masks["b"].tolist() == [[True, False]]
    masks = chosen({"b": torch.tensor([1.0, 1.0]), "a": torch.tensor([1.0])}, 2)  # by name, not as they come
    assert masks["a"].all() and masks["b"].tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_of_any_floating_point(dtype):
    torch.manual_seed(0)
    x = torch.randn(500).to(dtype)
    mask = chosen({"x": x}, 100)["x"]
    assert int(mask.sum()) == 100
    assert x[mask].abs().min() >= x[~mask].abs().max()


def test_none_and_all():
    x = torch.tensor([0.0, -0.0, 1.0])
    assert chosen({"x": x}, 0)["x"].sum() == 0 and chosen({"x": x}, 3)["x"].all() and chosen({"x": x}, 99)["x"].all()


def test_tensors_of_any_layout():
    x = torch.arange(12.0).view(3, 4).T
    assert torch.equal(chosen({"x": x}, 5)["x"], x >= 7)


def test_passes_over_the_tensors():
    class Counting(dict):
        passes = 0

        def items(self):
            self.passes += 1
            return super().items()

        def values(self):
            self.passes += 1
            return super().values()

    tensors = Counting(a=torch.randn(50))
    largest(tensors, 10)
    assert tensors.passes <= 4  # their sizes, twice half of the bits, and the ties


def test_patterns_choose_tensors_by_any_of_their_names():
    names = {"a.weight": ["a.weight", "head.weight"], "a.bias": ["a.bias"], "b.weight": ["b.weight"]}
    assert chosen_names(names) == list(names)
    assert chosen_names(names, only="*.weight") == ["a.weight", "b.weight"]
    assert chosen_names(names, only=["*.weight"], skip=("head.*",)) == ["b.weight"]
    assert chosen_names(names, skip="?.weight") == ["a.bias"]
    with pytest.raises(ConfigError, match="only: 'A.*' matches none of 3 tensors; did you mean 'a.bias'"):
        chosen_names(names, only="A.*")
    with pytest.raises(ConfigError, match="leave none of 3 tensors; leave out fewer"):
        chosen_names(names, only="a.bias", skip="a.*")
