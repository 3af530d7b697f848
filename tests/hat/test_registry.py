"""Which layer takes the place of which class."""

from __future__ import annotations

import runpy
from pathlib import Path

import parts
import pytest
import torch
from torch import nn

import hatcl
from hatcl.hat import registry
from hatcl.hat.gates import gates_of
from hatcl.hat.layers.gated import HATLayer
from hatcl.hat.registry import layer_for


def test_a_layer_of_ones_own_is_registered_with_one_decorator():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    @hatcl.register_layer(Scaled)
    class HATScaled(hatcl.HATLinear, Scaled):
        pass

    source = nn.Sequential(nn.Flatten(), Scaled(48, 16), nn.Sigmoid(), nn.Linear(16, 4))
    x = parts.images("mlp")
    model = hatcl.convert(source, 2, x)
    assert type(model[1]) is HATScaled and type(model[3]) is hatcl.HATLinear
    assert torch.equal(parts.logits(model, None, x), source(x))
    assert parts.leaks(parts.pretend(model), x, 0) is None


def test_a_class_the_registry_does_not_know_keeps_its_forward():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.shift = nn.Parameter(torch.randn(16, 48) / 7), nn.Parameter(torch.randn(16))
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return torch.sigmoid(x @ self.matrix.t() + self.shift) * self.temperature

    source = nn.Sequential(nn.Flatten(), Own(), nn.Linear(16, 4))
    x = parts.images("mlp")
    model = hatcl.convert(source, 3, x)
    assert isinstance(model[1], Own) and torch.equal(parts.logits(model, None, x), source(x))
    entries = gates_of(model)[0].unit_map.entries
    assert entries["1.temperature"].copied and not entries["1.matrix"].copied
    optimizer, want = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1), {}
    for t in range(3):
        parts.train(model, t, optimizer, parts.problem(parts.shape_of("mlp"), t), 6)
        want[t] = parts.logits(model, t, x)
        assert all(torch.equal(parts.logits(model, e, x), want[e]) for e in want)
    assert hatcl.certify(model, x, strict=True).exact


def test_what_hat_layers_add_has_a_prefix():
    from hatcl.hat.registry import registered

    layers = {HATLayer, *registered().values(), *registered("rms").values(), *registered("centred").values()}
    for layer in layers:
        torchs = {n for base in layer.__mro__ if "hatcl" not in base.__module__ for n in dir(base)} | set(
            dir(nn.Module)
        )
        added = {n for base in layer.__mro__ if "hatcl" in base.__module__ for n in vars(base)} - torchs
        bases = [b for b, found in registered().items() if found is layer]
        known = {n for b in bases for n in (*dir(b), *getattr(b, "__annotations__", ()), *own_names(b))}
        odd = {n for n in added - known if not n.startswith(("hat_", "_hat_", "__")) and n != "_hat"}
        assert not odd, (layer, odd)


def own_names(cls):
    """Parameters and attributes that a class of torch gives its instances."""
    return {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "eps"} | {
        "_flat_weights", "use_nested_tensor", "activation_relu_or_gelu", "in_proj_weight", "in_proj_bias",
        "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v", "gain",
    }  # fmt: skip


def test_the_layer_of_the_example_computes_what_the_cut_network_does():
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "own_layer.py"))
    model, x = example["model"], example["x"]
    assert type(model[1]) is not example["MeanAbsNorm"] and isinstance(model[1], example["HATMeanAbsNorm"])
    for t in hatcl.tasks(model):
        on = model.hat_gates.masks[t]
        assert 0 < int(on.sum()) < len(on)
        with hatcl.task(model, t), torch.no_grad():
            got = model(x)
            hidden = nn.functional.linear(x, model[0].weight[on], model[0].bias[on])
            hidden = model[1].hat_tasks[t].weight[on] * hidden / hidden.abs().mean(-1, keepdim=True)
            cut = nn.functional.linear(hidden, model[2].weight[:, on], model[2].bias)
        torch.testing.assert_close(got, cut, rtol=0, atol=1e-4)


def test_what_is_no_module_has_no_layer():
    with pytest.raises(hatcl.ConversionError, match="dict: got a class that is no torch.nn.Module; only modules have"):
        layer_for(dict)


def test_a_slip_in_a_layer_is_an_error_where_it_is_registered(monkeypatch):
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return x * self.weight

    with pytest.raises(hatcl.ConfigError, match="HATOdd has 'hat_ouput_dim', .* did you mean 'hat_output_dim'"):

        @hatcl.register_layer(Scale)
        class HATOdd(hatcl.HATLayer):
            hat_ouput_dim = -1

    with pytest.raises(hatcl.ConfigError, match="Unrelated is no HAT layer; derive it from hatcl.HATLayer"):

        @hatcl.register_layer(Scale)
        class Unrelated(nn.Module):
            pass

    assert layer_for(Scale) is HATLayer  # neither was registered

    @hatcl.register_layer(Scale)
    class HATScale(hatcl.HATLayer):
        hat_output_dim, hat_owner_dims = -1, {"wieght": 0}

    text = "1: HATScale, which takes the place of Scale, names 'wieght', .* it has weight; did you mean 'weight'"
    net, x = nn.Sequential(nn.Linear(4, 6), Scale(), nn.Linear(6, 2)), torch.randn(3, 4)
    with pytest.raises(hatcl.ConversionError, match=text):
        hatcl.convert(net, 2, x)
    HATScale.hat_owner_dims = {"weight": 0}
    assert isinstance(hatcl.convert(net, 2, x)[1], HATScale)
    registry._resolve.cache_clear()
