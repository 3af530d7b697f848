"""Parts of a graft that do not fit each other or a model are named."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hatcl.errors import GraftError
from hatcl.grafts.checks import checked_indices, checked_values, dtype_name, found_in, size_of


def test_sizes():
    assert [size_of(s, 1000) for s in (0.001, 0.0019, 0.5, 0.9999)] == [1, 1, 500, 999]


@pytest.mark.parametrize(
    "sparsity, numel, text",
    [
        (-0.1, 10, "sparsity: got -0.1, expected a share of the elements between 0 and 1"),
        (math.nan, 10, "sparsity: got nan"),
        (1e-4, 26, "sparsity: 0.0001 of 26 elements selects none; use at least 1/26"),
        (1.0, 26, "sparsity: 1.0 of 26 elements selects all; that is the fine-tuned model"),
    ],
)
def test_a_size_of_none_or_all(sparsity, numel, text):
    with pytest.raises(GraftError, match=text):
        size_of(sparsity, numel)


def test_indices_and_values_are_brought_to_the_cpu_in_few_bytes():
    assert checked_indices("w", torch.tensor([0, 5]), 6).dtype == torch.int32
    assert checked_indices("w", torch.tensor([2**31]), 2**31 + 1).dtype == torch.int64
    values = nn.Parameter(torch.ones(2))
    assert not checked_values("w", torch.tensor([0, 5]), {"w": values}).requires_grad
    assert dtype_name(torch.bfloat16) == "bfloat16"


def test_tied_tensors_are_found_under_their_first_name():
    net = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    net["b"].weight = net["a"].weight
    assert found_in(net, {"b.weight": (2, 2)}, "the model") == {"b.weight": "a.weight"}
    with pytest.raises(GraftError, match="b.weight and a.weight are one tensor in the model and two in the graft"):
        found_in(net, {"a.weight": (2, 2), "b.weight": (2, 2)}, "the model")
    with pytest.raises(GraftError, match=r"c is \[1\], the model has no such tensor"):
        found_in(net, {"c": (1,)}, "the model")
    with pytest.raises(GraftError, match="n is int64 in the file, expected float16 or wider"):
        found_in({"n": torch.ones(1, dtype=torch.long)}, {"n": (1,)}, "the file")
