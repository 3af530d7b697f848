"""Convolutions and linear layers put together by hand."""

from __future__ import annotations

import layer_zoo as zoo
import parts
import pytest
import torch
from torch import nn

import hatcl
from hatcl.hat import guard

CONVS = {
    "1d": (hatcl.HATConv1d, nn.Conv1d, (3, 12)),
    "2d": (hatcl.HATConv2d, nn.Conv2d, (3, 6, 6)),
    "3d": (hatcl.HATConv3d, nn.Conv3d, (3, 4, 4, 4)),
    "transposed1d": (hatcl.HATConvTranspose1d, nn.ConvTranspose1d, (3, 8)),
    "transposed2d": (hatcl.HATConvTranspose2d, nn.ConvTranspose2d, (3, 5, 5)),
    "transposed3d": (hatcl.HATConvTranspose3d, nn.ConvTranspose3d, (3, 3, 3, 3)),
}


def exact_and_learning(model, data, tasks=3, lr=1e-2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    x = data[0][0]
    want = {}
    for t in range(tasks):
        losses = parts.train(model, t, optimizer, data[t], 12)
        assert min(losses[-2:]) < max(losses[:2])
        want[t] = parts.logits(model, t, x)
        for e in want:
            assert torch.equal(parts.logits(model, e, x), want[e])
    certificate = hatcl.certify(model, x, strict=True)
    assert certificate.exact and min(certificate.overwritten.values()) > 0
    assert len({tuple(o.flatten().tolist()) for o in want.values()}) == tasks


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
    exact_and_learning(model, [parts.problem(shape, t) for t in range(3)])


def test_linear_layers_by_hand():
    first = hatcl.HATLinear(12, 16, num_tasks=3)
    second = hatcl.HATLinear(16, 16, num_tasks=3, reads=first, bias=False)
    third = hatcl.HATLinear(16, 16, reads=second)
    head = hatcl.TaskIndexedLinear(16, parts.CLASSES, reads=third)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU(), head)
    exact_and_learning(model, [parts.problem((12,), t) for t in range(3)])


def test_shared_units_gate_a_residual():
    """`units=layer` writes into the same units, so that their sum is off where they are."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = hatcl.HATLinear(12, 16, num_tasks=3)
            self.inner = hatcl.HATLinear(16, 24, num_tasks=3, reads=self.first)
            self.back = hatcl.HATLinear(24, 16, units=self.first, reads=self.inner)
            self.norm = hatcl.TaskIndexedLayerNorm(16, units=self.first)
            self.head = hatcl.TaskIndexedLinear(16, parts.CLASSES, reads=self.first)

        def forward(self, x):
            x = self.first(x)
            x = x + self.back(torch.relu(self.inner(x)))
            return self.head(self.norm(x))

    model = Residual()
    assert len(hatcl.gates.gates_of(model)) == 2
    exact_and_learning(model, [parts.problem((12,), t) for t in range(3)])


def test_embeddings_and_free_parameters_by_hand():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = hatcl.HATEmbedding(20, 16, num_tasks=3)
            self.place = hatcl.TaskIndexedParameter(torch.randn(6, 16), 3)
            self.middle = hatcl.HATLinear(16, 16, reads=self.words)
            self.head = hatcl.TaskIndexedLinear(16, parts.CLASSES, reads=self.middle)

        def forward(self, index):
            return self.head(self.middle(self.words(index) + self.gate(self.place())).relu().mean(1))

        def gate(self, x):
            units = self.words._hat.output[1].gate()
            return x if units is None else x * units

    exact_and_learning(Words(), [zoo.data("embedding", t) for t in range(3)], lr=3e-2)


def test_without_reads_freezing_is_by_the_output_unit_alone():
    first = hatcl.HATLinear(4, 6, num_tasks=2)
    blind = hatcl.HATLinear(6, 5, num_tasks=2)
    model = nn.Sequential(first, nn.ReLU(), blind, hatcl.TaskIndexedLinear(5, 2, reads=blind))
    parts.pretend(model, tasks=[0], share=0.5)
    live = next(h for h in guard.held(model) if h.param is blind._parameters["weight"]).live(0)
    assert torch.equal(live, blind._hat.gates.masks[0][:, None].expand(5, 6))


def test_no_task_is_the_plain_layer():
    layer = hatcl.HATLinear(4, 6, num_tasks=2)
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), nn.functional.linear(x, layer._parameters["weight"], layer._parameters["bias"]))


@pytest.mark.parametrize("rows", [1, 64])
def test_gating_the_output_or_the_weight_is_the_same_number(rows):
    """With few rows the output takes the gate, with many the weight: no difference once gates are hard."""
    layer = hatcl.HATLinear(32, 16, num_tasks=1)
    parts.pretend(layer, [0], 0.5)
    x = torch.randn(rows, 32)
    with hatcl.task(layer, 0):
        free = layer(x).detach()
        with torch.no_grad():
            assert torch.equal(layer(x), free)


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
    with pytest.raises(ValueError, match=text):
        make()
