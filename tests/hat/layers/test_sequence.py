"""torch's recurrent and transformer layers: the fast paths that pass over their submodules."""

from __future__ import annotations

import layer_zoo as zoo
import parts
import pytest
import torch
from torch import nn

import hatcl
from hatcl.hat.convert import map_of
from hatcl.hat.layers import sequence


@pytest.mark.parametrize("name", [n for n in zoo.ZOO if n.startswith("encoder")])
def test_the_fused_encoder_layer_computes_what_the_layer_does(name):
    """Training and evaluation agree: torch's fused layer would take its norms over all units."""
    model = parts.pretend(hatcl.convert(zoo.make(name), 3, zoo.data(name)[0])).eval()
    x, _ = zoo.data(name)
    for t in range(3):
        with hatcl.task(model, t):
            want = model(x).detach()
        # the kernels of attention with and without gradients differ by 1.8e-7 (measured)
        assert torch.allclose(parts.logits(model, t, x), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["encoder", "encoder_gelu"])
def test_twin_the_fused_encoder_layer_does_not(name, monkeypatch):
    monkeypatch.setattr(sequence._EncoderLayer, "activation_relu_or_gelu", 1 if name == "encoder" else 2)
    model = parts.pretend(hatcl.convert(zoo.make(name), 3, zoo.data(name)[0])).eval()
    x, _ = zoo.data(name)
    with hatcl.task(model, 0):
        want = model(x).detach()
    assert not torch.allclose(parts.logits(model, 0, x), want, atol=1e-3)


class Padded(nn.Module):
    """An encoder whose input has padding, which torch turns into nested tensors on its fast path."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, parts.CLASSES)

    def forward(self, index):
        padding = index == 0
        x = self.encoder(self.words(index), src_key_padding_mask=padding)
        return self.head(x[:, 0])


def test_padding_and_nested_tensors():
    index, _ = zoo.data("encoder")
    index[::2, 4:] = 0
    source = Padded()
    model = hatcl.convert(source, 2, index)
    with torch.no_grad():
        assert torch.equal(model.eval()(index), source.eval()(index))
    parts.pretend(model)
    with hatcl.task(model, 0):
        want = model(index).detach()
    assert torch.allclose(parts.logits(model, 0, index), want, atol=1e-6, rtol=0)
    assert parts.leaks(model, index, 0) is None


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_read_what_the_active_task_sees(cls):
    name = cls.__name__
    model = parts.pretend(hatcl.convert(zoo.make(name), 2, zoo.data(name)[0]))
    layer, x = model.middle, torch.randn(2, 6, 16)
    outs = []
    for t in (0, 1, None):
        with torch.no_grad(), hatcl.task(model, t):
            assert all(w is getattr(layer, n) or torch.equal(w, getattr(layer, n)) for w, n in zip(
                layer._flat_weights, layer._flat_weights_names, strict=True))  # fmt: skip
            outs.append(layer(x)[0])
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])
    layer.to(torch.float64)
    assert layer._flat_weights[0].dtype == torch.float64


def test_rows_beyond_max_norm_are_scaled_over_the_units_that_are_on():
    torch.manual_seed(0)
    words = hatcl.HATEmbedding(5, 8, max_norm=1.0, num_tasks=1)
    before = words._parameters["weight"].detach().clone()
    parts.pretend(words, [0], 0.5)
    on = words._hat.gates.masks[0]
    with hatcl.task(words, 0):
        got = words(torch.arange(5)).detach()
    rows = before[:, on]
    want = rows * (1.0 / (rows.norm(dim=-1, keepdim=True) + 1e-7)).clamp(max=1.0)
    assert torch.allclose(got[:, on], want, atol=1e-6) and bool((got[:, ~on] == 0).all())
    assert torch.equal(words._parameters["weight"], before)  # torch would have scaled the table itself


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=["plain", "two ways"])
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_is_mapped_whole(cell, options):
    layer = cell(5, 6, batch_first=True, **options)
    found = map_of(Words(layer), torch.randn(2, 7, 5))
    recurrent = [e for name, e in found.entries.items() if name.startswith("layer.")]
    assert recurrent and all(e.known == 1.0 and not e.copied for e in recurrent), recurrent
    assert not found.notes


class Words(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6 * (2 if layer.bidirectional else 1), 3)

    def forward(self, x):
        return self.head(self.layer(x)[0].mean(1))
