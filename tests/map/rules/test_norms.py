"""Norms: of weights, next to units, and known ones that make another weight of theirs."""

from __future__ import annotations

from dataclasses import replace

import parts
import pytest
import torch
from map_parts import Between, units
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl.hat.convert import map_of
from hatcl.hat.gates import gates_of
from hatcl.hat.held import held as held_by
from hatcl.hat.layers.gated import HATLayer
from hatcl.map.labels import Labels
from hatcl.map.rules import TRACE_RULES, Rule
from hatcl.map.shadow import varying

# ---- weight norm ----------------------------------------------------------------------------------


def weight_normed():
    torch.manual_seed(0)
    made = Between(nn.ReLU())
    made.second = nn.utils.parametrizations.weight_norm(made.second, dim=0)
    return made.eval()


GAIN, DIRECTION = (f"second.parametrizations.weight.original{i}" for i in (0, 1))


def test_weight_norm_keeps_its_owner_and_holds_whole_rows():
    """What a row's element is divided by depends on the whole row, so whoever has the row on holds all of it."""
    source, x = weight_normed(), torch.randn(4, 5)
    found = map_of(source, x)
    mine = units(found, "head.weight", False)
    assert units(found, DIRECTION, True) == mine and len(set(mine)) == 7
    assert units(found, DIRECTION, False) is None and not found.entries[DIRECTION].copied
    model = parts.pretend(hatcl.convert(source, 3, x))
    assert [parts.leaks(model, x, t) for t in range(3)] == [None] * 3
    (held,) = [h for h in held_by(model) if h.name == DIRECTION]
    on = gates_of(model)[0].masks[0][torch.tensor(mine) - 1]
    assert torch.equal(held.live(0), on.unsqueeze(1).expand(7, 12)) and on.any() and not on.all()
    assert torch.equal(parts.logits(model, None, x), source(x))


def test_the_gain_of_a_weight_norm_is_its_rows():
    found = map_of(weight_normed(), torch.randn(4, 5))
    assert units(found, GAIN, True) == units(found, DIRECTION, True) and not found.entries[GAIN].copied


def test_twin_rows_of_a_weight_norm_that_are_held_in_part_leak(monkeypatch):
    plain = TRACE_RULES["_weight_norm_interface"]

    def by_element(call, coupling):
        (moved,) = plain.apply(call, coupling)
        columns = (s for s in call.shadows[0].slots if varying(s.ids) == (1,))
        return [replace(moved, slots=(*moved.slots, *columns))]

    monkeypatch.setitem(TRACE_RULES, "_weight_norm_interface", Rule(by_element))
    monkeypatch.setattr(Labels, "mark", _unless_dropped(Labels.mark))
    monkeypatch.setattr(HATLayer, "_hat_cut", HATLayer._hat_by_folds)  # or nothing foreign is ever computed with
    x = torch.randn(4, 5)
    model = parts.pretend(hatcl.convert(weight_normed(), 3, x, verify=False))
    assert units(gates_of(model)[0].unit_map, DIRECTION, False) is not None
    assert any(parts.leaks(model, x, t) is not None for t in range(3))


def _unless_dropped(mark):
    return lambda self, flag, labels: None if flag == "dropped" else mark(self, flag, labels)


# ---- a norm next to units --------------------------------------------------------------------------


class MixTokens(nn.Module):
    """Units along the tokens, a layer norm over the channels, and a layer that mixes the tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.mix, self.head = nn.Linear(5, 12), nn.Linear(12, 7), nn.Linear(7, 3)
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x):  # [B, 8 channels, 5 positions]
        x = self.first(x).transpose(1, 2)  # [B, 12 tokens, 8]
        x = tf.layer_norm(x, (8,), self.weight, self.bias).transpose(1, 2)
        return self.head(torch.relu(self.mix(x))).flatten(1)


CHANNELS = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(0))


def after_the_bias_moved(**options):
    """Two tasks with random gates, each task's bias away from the zero at which it starts."""
    torch.manual_seed(0)
    model = hatcl.convert(MixTokens().eval(), 2, CHANNELS, **options)
    with torch.no_grad():
        for module in (model, *model.hat_tasks):
            module._parameters["bias"].normal_()
    return parts.pretend(model)


def test_a_layer_norm_does_not_make_clean_what_runs_beside_it():
    """A token that is off leaves the norm as its bias, not as zero: the layer that mixes tokens has to multiply it by
    zero."""
    model = after_the_bias_moved()
    found = gates_of(model)[0].unit_map
    assert units(found, "first.weight", True) == units(found, "mix.weight", False) == list(range(1, 13))
    assert 1 in found.folds["mix", "mix.weight"] and not found.entries["mix.weight"].copied
    assert [parts.leaks(model, CHANNELS, t) for t in range(2)] == [None, None]


def test_twin_were_it_clean_other_tasks_would_get_in_with_the_bias(monkeypatch):
    monkeypatch.setitem(TRACE_RULES, "native_layer_norm", clean_beside_a_norm(TRACE_RULES["native_layer_norm"]))
    monkeypatch.setattr(HATLayer, "_hat_cut", HATLayer._hat_by_folds)  # or nothing foreign is ever computed with
    model = after_the_bias_moved(verify=False)
    assert 1 not in gates_of(model)[0].unit_map.folds["mix", "mix.weight"]
    assert None not in [parts.leaks(model, CHANNELS, t) for t in range(2)]


def clean_beside_a_norm(rule):
    """The rule as it once was: what a layer norm puts out is zero where what it read was."""

    def layer_norm(call, coupling):
        (moved,) = rule.apply(call, coupling)
        return [replace(moved, slots=tuple(replace(slot, clean=True) for slot in moved.slots))]

    return Rule(layer_norm)


# ---- known norms that make another weight of theirs -------------------------------------------------


class OneMore(nn.LayerNorm):
    """Multiplies by 1 + weight (`LayerNorm1P` of Nemotron)."""

    def forward(self, x):
        return tf.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class OneMoreRMS(nn.RMSNorm):
    def forward(self, x):
        return tf.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)


class OneMoreBatch(nn.BatchNorm1d):
    def forward(self, x):
        return tf.batch_norm(x, self.running_mean, self.running_var, self.weight + 1, self.bias, self.training)


@pytest.mark.parametrize("norm", [OneMore, OneMoreRMS, OneMoreBatch])
def test_a_norm_that_makes_another_weight_of_its_own_is_gated_by_what_it_does(norm):
    """The gate folded into the weight would be `1 + 0`. With all units on a task computes what the plain model does,
    with some what the network cut down to them does, and nobody gets in."""
    torch.manual_seed(0)
    source, x = Between(norm(12)).eval(), torch.randn(4, 5)
    with torch.no_grad():
        for p in source.between.parameters():
            p.uniform_(-0.5, 0.5)
    found = map_of(source, x)
    assert found.norms["between"].kind == {OneMore: "centred", OneMoreRMS: "rms", OneMoreBatch: ""}[norm]
    assert units(found, "first.weight", True) == units(found, "second.weight", False) == list(range(1, 13))
    model = parts.pretend(hatcl.convert(source, 3, x), own=False)
    assert not {"first.weight", "second.weight"} & set(hatcl.describe(model).copies)
    assert [parts.leaks(model, x, t) for t in range(3)] == [None] * 3
    gates = gates_of(model)[0]
    on = torch.zeros(13, dtype=torch.bool)
    on[[0, 1, 3, 4, 7, 8, 11]] = True
    gates.masks[0] = torch.cat([on[1:], torch.ones(len(gates.masks[0]) - 12, dtype=torch.bool)])
    gates.epoch += 1
    cut = Between(norm(6))
    for name, p in source.state_dict().items():
        keep = on[1:] if name.startswith(("first", "between")) and p.shape[:1] == (12,) else slice(None)
        value = p[keep] if p.dim() else p
        value = value[:, on[1:]] if name == "second.weight" else value
        path, _, last = name.rpartition(".")
        store = cut.get_submodule(path)
        (store._parameters if last in store._parameters else store._buffers)[last] = (
            nn.Parameter(value) if last in store._parameters else value
        )
    torch.testing.assert_close(parts.logits(model, 0, x), cut.eval()(x), rtol=1e-4, atol=1e-5)
