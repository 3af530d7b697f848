"""The attack on itself at conversion, and the comparison with the source."""

from __future__ import annotations

import copy

import parts
import pytest
import torch
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl.hat import convert as converting
from hatcl.hat import verify
from hatcl.hat.convert import map_of
from hatcl.hat.gates import gates_of
from hatcl.hat.layers.gated import HATLayer


def test_a_parameter_through_which_the_attack_gets_out_becomes_a_copy_per_task():
    """A map with holes: where a gate should act it does not."""
    source, x = parts.plain("mlp"), parts.images("mlp")
    holes = map_of(copy.deepcopy(source).eval(), x)
    holes.folds = {key: axes for key, axes in holes.folds.items() if key[1] not in ("1.weight", "1.bias")}
    holed = parts.pretend(hatcl.convert(source, 2, x, unit_map=copy.deepcopy(holes), verify=False))
    assert parts.leaks(holed, x, 0) is None  # a hard gate cuts also what the folds of the map leave
    gates_of(holed)[0].cut = False
    assert parts.leaks(holed, x, 0) is not None
    model = hatcl.convert(source, 2, x, unit_map=holes)
    copies = hatcl.describe(model).copies
    assert {n for n, why in copies.items() if why == "the attack got out through it"} >= {"1.weight", "1.bias"}
    assert parts.leaks(parts.pretend(model), x, 0) is None


def test_a_leak_that_copies_cannot_close_is_refused():
    class Sneaky(nn.Linear):
        """Keeps its weight where no attribute finds it."""

        def __init__(self, *args):
            super().__init__(*args)
            self.__dict__["secret"] = [self.weight]

        def forward(self, x):
            return tf.linear(x, self.__dict__["secret"][0], self.bias)

    source = nn.Sequential(nn.Flatten(), Sneaky(48, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(hatcl.ConversionError, match="other tasks reach a task's output through .*1.weight"):
        hatcl.convert(source, 2, parts.images("mlp"))


class Hidden(nn.Module):
    """A branch that adds nothing yet: its scale starts at zero."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.out, self.head = (nn.Linear(*n) for n in ((48, 16), (16, 12), (12, 16), (16, 4)))
        self.scale = nn.Parameter(torch.zeros(16))

    def forward(self, x):
        x = torch.relu(self.stem(x.flatten(1)))
        return self.head(x + self.scale * self.out(torch.relu(self.inner(x))))


def with_a_hole(source, x):
    """Converted on a map in which the gate of the branch's inner layer is missing."""
    holes = map_of(copy.deepcopy(source), x)
    holes.folds = {key: axes for key, axes in holes.folds.items() if not key[1].startswith("inner.")}
    return hatcl.convert(source, 2, x, unit_map=holes)


def leaks_once_the_scale_has_moved(model, x):
    with torch.no_grad():
        model._parameters["scale"].fill_(0.5)
    parts.pretend(model)
    gates_of(model)[0].cut = False  # by its folds alone, as while it learns
    return [parts.leaks(model, x, t) is not None for t in range(2)]


def blamed(model):
    return {n for n, why in hatcl.describe(model).copies.items() if why == "the attack got out through it"}


def test_a_leak_that_zeros_at_the_start_would_hide_is_found_at_conversion():
    x = parts.images("mlp")
    source = Hidden()
    model = with_a_hole(source, x)
    assert blamed(model) >= {"inner.weight", "inner.bias"}
    assert torch.equal(model.scale, torch.zeros(16)) and torch.equal(parts.logits(model, None, x), source(x))
    assert leaks_once_the_scale_has_moved(model, x) == [False, False]


def test_twin_without_the_stir_it_is_not_found(monkeypatch):
    monkeypatch.setattr(verify, "stir", lambda *args: None)
    x = parts.images("mlp")
    model = with_a_hole(Hidden(), x)
    assert blamed(model) == set()
    assert leaks_once_the_scale_has_moved(model, x) == [True, True]


def test_stirring_moves_every_parameter_of_a_copy():
    model = parts.converted("vit")
    before = parts.snapshot(model)
    trial = verify.stirred(model, parts.images("vit"))
    assert parts.same(before, model.state_dict()) and not trial.training and model.training
    kept = dict(model.named_parameters())
    assert all(not torch.equal(p, kept[n]) for n, p in trial.named_parameters())
    assert parts.same(dict(model.named_buffers()), dict(trial.named_buffers()))


def test_a_model_that_noise_makes_overflow_is_attacked_as_it_is():
    class Steep(nn.Linear):
        def forward(self, x):
            return super().forward(x).mul(1e30).exp()

    model = hatcl.convert(nn.Sequential(nn.Flatten(), Steep(48, 4)), 2, torch.zeros(2, 48), verify=False)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    trial = verify.stirred(model, torch.zeros(2, 48))
    assert parts.same(dict(model.named_parameters()), dict(trial.named_parameters()))


class Asks(nn.Module):
    def __init__(self, ask):
        super().__init__()
        self.stem, self.body, self.ask = nn.Linear(12, 16), Inner(ask), ask

    def forward(self, x):
        return self.body(torch.relu(self.stem(x)))


class Inner(nn.Module):
    def __init__(self, ask):
        super().__init__()
        self.fc, self.ask = nn.Linear(16, 4), ask

    def forward(self, x):
        return self.fc(x) if self.ask(self) else 2 * self.fc(x)


ASKS = {
    "the class": (lambda m: type(m.fc) is nn.Linear, "evaluation"),
    "the name of the class": (lambda m: m.fc._get_name() == "Linear", "evaluation"),
    "in training": (lambda m: type(m.fc) is nn.Linear or not m.training, "training"),
    "an attribute of hatcl": (lambda m: not hasattr(m.fc, "hat_direct"), "evaluation"),
}


@pytest.mark.parametrize("what", ASKS)
def test_a_model_that_would_compute_something_else_without_a_task_is_refused(what):
    ask, mode = ASKS[what]
    x = torch.randn(4, 12)
    text = f"body: without a task, in {mode} mode, the converted module computes something else .*must use isinstance"
    source = Asks(ask)
    parts.unchanged(source, lambda: hatcl.convert(source, 2, x), hatcl.ConversionError, text)
    assert hatcl.convert(Asks(lambda m: isinstance(m.fc, nn.Linear)), 2, x)


def test_twin_without_the_comparison_it_would_be_converted(monkeypatch):
    ask, x = ASKS["the class"][0], torch.randn(4, 12)
    monkeypatch.setattr(converting, "check_plain", lambda *args: None)
    source = Asks(ask)
    model = hatcl.convert(source, 2, x)
    assert not torch.equal(model(x), source(x))


def test_a_training_forward_that_cannot_be_seeded_is_not_compared():
    import numpy

    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.generator = parts.mlp(), numpy.random.default_rng()

        def forward(self, x):
            fresh = numpy.random.default_rng().random() if self.training else 1.0
            return self.body(x) * fresh

    assert hatcl.convert(Noise(), 2, parts.images("mlp"))


def test_random_state_is_as_it_was():
    before = torch.get_rng_state()
    source = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    torch.set_rng_state(before)
    made = verify._plain_outputs(source, parts.images("mlp"), True)
    assert torch.equal(before, torch.get_rng_state()) and made


def test_a_cut_that_computes_something_else_is_refused(monkeypatch):
    plain = HATLayer._hat_cut

    def wrong(self, name, raw, plan, task):
        return plain(self, name, raw, plan, task) * 1.001

    monkeypatch.setattr(HATLayer, "_hat_cut", wrong)
    text = "Sequential: cut down to half of its units it computes another output .* than gated to them"
    with pytest.raises(hatcl.ConversionError, match=text):
        hatcl.convert(parts.plain("mlp"), 2, parts.images("mlp"))
