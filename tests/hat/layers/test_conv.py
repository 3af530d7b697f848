"""Convolutions put together by hand, and layers that do not fit."""

from __future__ import annotations

import copy

import parts
import pytest
import torch
from torch import nn

import hatcl
from hatcl.hat.layers import conv

CONVS = {
    "1d": (hatcl.HATConv1d, nn.Conv1d, (3, 12)),
    "2d": (hatcl.HATConv2d, nn.Conv2d, (3, 6, 6)),
    "3d": (hatcl.HATConv3d, nn.Conv3d, (3, 4, 4, 4)),
    "transposed1d": (hatcl.HATConvTranspose1d, nn.ConvTranspose1d, (3, 8)),
    "transposed2d": (hatcl.HATConvTranspose2d, nn.ConvTranspose2d, (3, 5, 5)),
    "transposed3d": (hatcl.HATConvTranspose3d, nn.ConvTranspose3d, (3, 3, 3, 3)),
}


class Pool(nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(-1)


@pytest.mark.parametrize("kind", CONVS)
def test_layers_by_hand_learn_exactly_without_the_converter(kind):
    cls, plain, shape = CONVS[kind]
    first = cls(3, 12, 2, num_tasks=3)
    second = cls(12, 10, 2, num_tasks=3, reads=first)
    head = hatcl.TaskIndexedLinear(10, parts.CLASSES, num_tasks=3, reads=second)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), Pool(), head)
    assert isinstance(first, plain) and repr(first)
    parts.exact_and_learning(model, [parts.problem(shape, t) for t in range(3)])


def six(**options):
    return hatcl.HATLinear(3, 6, num_tasks=1, **options)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: hatcl.HATLinear(5, 4, reads=six()), "gate has 6 units, input has 5; pass reads= .* 5 output"),
        (lambda: hatcl.HATLinear(6, 4, units=six()), "gate has 6 units, output has 4; pass units= .* 4 output"),
        (lambda: hatcl.TaskIndexedLayerNorm(5, units=six()), "gate has 6 units, output has 5"),
        (lambda: hatcl.HATLinear(3, 4, units=nn.Linear(3, 4)), "Linear has no units; pass a HAT layer that has gates"),
        (
            lambda: hatcl.HATConv2d(6, 6, 3, groups=2, reads=hatcl.HATConv2d(3, 6, 3, num_tasks=1)),
            "groups=2: reads= is for groups=1; leave it out .* or use hatcl.convert",
        ),
        (
            lambda: hatcl.HATConvTranspose2d(6, 6, 3, groups=2, num_tasks=1),
            "groups=2 by hand is not known; use hatcl.convert",
        ),
    ],
)
def test_layers_that_do_not_fit_say_so(make, text):
    with pytest.raises(hatcl.ConfigError, match=text):
        make()


@pytest.mark.filterwarnings("ignore:task 0")
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("places", [2, 12])
def test_where_few_places_are_computed_the_output_is_gated_instead_of_the_weight(places, padding_mode, monkeypatch):
    torch.manual_seed(0)
    layer = hatcl.HATConv2d(6, 8, 3, padding=1, padding_mode=padding_mode, num_tasks=1).double()
    x = torch.randn(2, 6, places, places, dtype=torch.float64)
    got = {}
    for way in ("by output", "by weight"):
        made = copy.deepcopy(layer)
        if way == "by weight":
            monkeypatch.setattr(conv._Conv, "_hat_by_output", lambda self, x: None)
        optimizer = torch.optim.SGD(made.parameters(), 0.1)
        with hatcl.learn(made, 0, optimizer, steps=2):
            if way == "by output":
                assert (made._hat_by_output(x) is not None) == (places == 2)
            out = made(x)
            out.square().sum().backward()
            got[way] = [out.detach(), *(p.grad for p in made.parameters())]
    for a, b in zip(*got.values(), strict=True):  # in float64: 3e-15 was seen
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
