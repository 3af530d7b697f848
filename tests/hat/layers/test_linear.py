"""Linear layers, embeddings and single parameters, put together by hand."""

from __future__ import annotations

import layer_zoo as zoo
import parts
import pytest
import torch
from torch import nn

import hatcl
from hatcl.hat.held import held


def test_linear_layers_by_hand():
    first = hatcl.HATLinear(12, 16, num_tasks=3)
    second = hatcl.HATLinear(16, 16, num_tasks=3, reads=first, bias=False)
    third = hatcl.HATLinear(16, 16, reads=second)
    head = hatcl.TaskIndexedLinear(16, parts.CLASSES, reads=third)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU(), head)
    parts.exact_and_learning(model, [parts.problem((12,), t) for t in range(3)])


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
    assert len(hatcl.hat.gates.gates_of(model)) == 2
    parts.exact_and_learning(model, [parts.problem((12,), t) for t in range(3)])


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

    parts.exact_and_learning(Words(), [zoo.data("embedding", t) for t in range(3)], lr=3e-2)


def test_without_reads_freezing_is_by_the_output_unit_alone():
    first = hatcl.HATLinear(4, 6, num_tasks=2)
    blind = hatcl.HATLinear(6, 5, num_tasks=2)
    model = nn.Sequential(first, nn.ReLU(), blind, hatcl.TaskIndexedLinear(5, 2, reads=blind))
    parts.pretend(model, tasks=[0], share=0.5)
    live = next(h for h in held(model) if h.param is blind._parameters["weight"]).live(0)
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
