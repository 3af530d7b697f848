"""Elementwise operations: zero, whatever the sign of the others."""

from __future__ import annotations

import parts
import pytest
import torch
from map_parts import Between
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl.map.rules import pointwise


class Kinked(nn.Module):
    """An activation that is not 0 at 0, by a constant below it (`xielu` of Apertus)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("eps", torch.tensor(-0.1))

    def forward(self, h):
        return torch.expm1(torch.minimum(h, self.eps)) - h


class Floored(nn.Linear):
    """A weight that is kept from falling below a bound."""

    def forward(self, x):
        return tf.linear(x, torch.maximum(self.weight, self.weight.new_tensor(-0.05)), self.bias)


@pytest.mark.parametrize(
    "make", [lambda: Between(Kinked()), lambda: Between(Floored(12, 12))], ids=["activation", "weight"]
)
def test_what_is_zero_for_positive_numbers_alone_is_not_taken_for_zero(make):
    torch.manual_seed(0)
    source, x = make().eval(), torch.randn(4, 5)
    model = hatcl.convert(source, 3, x)
    assert not {"first.weight", "second.weight"} & set(hatcl.describe(model).copies)
    parts.pretend(model)
    assert [parts.leaks(model, x, t) for t in range(3)] == [None] * 3


def test_twin_tried_on_positive_numbers_alone_it_gets_out(monkeypatch):
    torch.manual_seed(0)
    source, x = Between(Kinked()).eval(), torch.randn(4, 5)
    real = pointwise._tried
    monkeypatch.setattr(pointwise, "_tried", lambda call, zero, seed: real(call, zero, seed % 2))
    model = hatcl.convert(source, 3, x)
    assert hatcl.describe(model).copies["second.weight"] == "the attack got out through it"
