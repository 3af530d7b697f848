"""Convolutions whose weight is computed from the input."""

from __future__ import annotations

import parts
import pytest
import torch
from map_parts import units
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl.hat.convert import map_of


class Computed(nn.Module):
    """The input says what the weight of a `dims`-dimensional convolution is."""

    def __init__(self, dims):
        super().__init__()
        self.dims, self.convolve = dims, getattr(tf, f"conv{dims}d")
        self.first = getattr(nn, f"Conv{dims}d")(3, 6, 3, padding=1)
        self.make, self.head = nn.Linear(6, 4 * 6), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        weight = self.make(x.flatten(2).mean((0, 2))).view(4, 6, *[1] * self.dims)
        return self.head(self.convolve(x, weight).flatten(2).mean(-1))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_channels_are_one_unit_with_those_of_a_weight_that_is_computed(dims):
    torch.manual_seed(0)
    source, x = Computed(dims).eval(), torch.randn(2, 3, *[4] * dims)
    found = map_of(source, x)
    mine = units(found, "first.weight", True)
    assert len(set(mine)) == 6 and units(found, "make.weight", True) == mine * 4
    assert "whose weight is computed from the input forgets which units it writes" in found.notes[""]
    model = parts.pretend(hatcl.convert(source, 3, x))
    assert [parts.leaks(model, x, t) for t in range(3)] == [None] * 3
