"""Places: which units could stand in for each other (`UnitMap.places`)."""

from __future__ import annotations

import json

import numpy as np
import parts
import pytest
import torch
from torch import nn
from torch.nn import functional as tf

from hatcl.hat.convert import map_of
from hatcl.map.units import UnitMap


def places(found, name, owner=True):
    """Of the units that a parameter writes (or reads), renumbered by first occurrence."""
    (units,) = [f.units for f in found.entries[name].factors if f.owner == owner]
    every = found.places[units - 1].tolist()
    return [sorted(set(every), key=every.index).index(p) for p in every]


class Attention(nn.Module):
    """Two heads of width 4; fused: by torch's own operation."""

    def __init__(self, fused, rotated=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))
        self.out, self.head = nn.Linear(8, 5), nn.Linear(5, 2)
        self.fused, self.rotated = fused, rotated
        self.register_buffer("angles", torch.linspace(0.1, 1, 4))

    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.rotated:
            q, k = q * self.angles.cos(), k * self.angles.cos()
        if self.fused:
            h = tf.scaled_dot_product_attention(q, k, v)
        else:
            h = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return self.head(torch.relu(self.out(h.transpose(1, 2).flatten(2)))).mean(1)


TOKENS = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fused", [False, True])
def test_heads_are_places(fused):
    found = map_of(Attention(fused).eval(), TOKENS)
    for name in ("q.weight", "k.weight", "v.weight"):
        assert places(found, name) == [0, 0, 0, 0, 1, 1, 1, 1], name
    assert places(found, "out.weight") == [0] * 5


@pytest.mark.parametrize("fused", [False, True])
def test_what_meets_numbers_of_its_own_has_a_place_of_its_own(fused):
    found = map_of(Attention(fused, rotated=True).eval(), TOKENS)
    assert places(found, "q.weight") == list(range(8)) and places(found, "v.weight") == [0, 0, 0, 0, 1, 1, 1, 1]


def test_numbers_that_are_equal_make_no_places():
    model = Attention(False, rotated=True).eval()
    model.angles.fill_(0.5)
    assert places(map_of(model, TOKENS), "q.weight") == [0, 0, 0, 0, 1, 1, 1, 1]


def test_groups_of_a_convolution_and_of_a_norm_are_places():
    source = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(), nn.Conv2d(8, 12, 1), nn.GroupNorm(3, 12), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 4, 2),
    )  # fmt: skip
    found = map_of(source.eval(), torch.randn(2, 3, 4, 4))
    assert places(found, "0.weight") == [0, 0, 0, 1, 1, 1]
    assert places(found, "2.weight") == places(found, "4.weight") == [0] * 4 + [1] * 4
    assert places(found, "6.weight") == [0] * 4 + [1] * 4 + [2] * 4


def test_what_an_operation_forgets_stays_where_it_is():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)).cummax(-1).values)

    assert places(map_of(Sorted().eval(), torch.randn(3, 5)), "first.weight") == list(range(6))


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_elsewhere_there_is_one_place(name):
    found = map_of(parts.plain(name), parts.images(name, 2))
    assert len(found.places) == found.num_units and not found.places.any()


def test_places_are_written_and_read():
    found = map_of(Attention(False).eval(), TOKENS)
    again = UnitMap.from_json(json.loads(json.dumps(found.to_json())))
    assert np.array_equal(again.places, found.places)
    before = {k: v for k, v in found.to_json().items() if k != "places"}
    assert UnitMap.from_json(before).places is None
