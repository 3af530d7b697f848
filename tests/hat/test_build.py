"""A HAT model on a map."""

from __future__ import annotations

import copy

import parts
import pytest
import torch
from torch import nn

import hatcl
from hatcl.hat.convert import map_of


def test_a_map_found_earlier_needs_no_inputs():
    source = parts.plain("vit")
    found = map_of(copy.deepcopy(source), parts.images("vit"))
    model = hatcl.convert(source, 2, unit_map=found)
    assert torch.equal(parts.logits(model, None, parts.images("vit")), source.eval()(parts.images("vit")))
    with pytest.raises(
        hatcl.ConversionError, match=r"the map says shape \[.*\], it has \[.*\]; trace this model again"
    ):
        hatcl.convert(parts.vit(embed_dim=16), 2, unit_map=found)


def test_a_module_used_twice_is_one_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            x = torch.relu(self.first(x))
            return self.head(torch.relu(self.again(torch.relu(self.again(x)))))

    x = torch.randn(8, 12)
    source = Twice()
    model = hatcl.convert(source, 3, x)
    assert torch.equal(parts.logits(model, None, x), source(x))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    want = {}
    for t in range(3):
        parts.train(model, t, optimizer, parts.problem((12,), t), 6)
        want[t] = parts.logits(model, t, x)
        assert all(torch.equal(parts.logits(model, e, x), want[e]) for e in want)
    assert hatcl.certify(model, x).exact
