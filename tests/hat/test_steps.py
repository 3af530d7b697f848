"""A converted container has the steps that it had."""

from __future__ import annotations

import copy
import pickle

import parts
import pytest
import torch
from torch import nn

import hatcl
from hatcl.hat import build
from hatcl.hat.layers import HATLayer


class Net(nn.Sequential):
    """Its forward asks how many steps there are."""

    def forward(self, x):
        for i, step in enumerate(self):
            x = step(x) if i + 1 < len(self) else self[-1](x)
        return x


class Steps(nn.ModuleList):
    def forward(self, x):
        for step in self[:-1]:
            x = step(x).relu()
        return self[-1](x)


class Named(nn.ModuleDict):
    def forward(self, x):
        for key, step in self.items():
            x = step(x) if key == "head" else step(x).relu()
        assert list(self) == list(self.keys()) and len(self) == len(self.values())
        return x


def layers():
    torch.manual_seed(0)
    return [nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)]


MODELS = {
    "Sequential": lambda: nn.Sequential(layers()[0], nn.ReLU(), layers()[1], nn.ReLU(), layers()[2]),
    "Net": lambda: Net(*layers()),
    "Steps": lambda: Steps(layers()),
    "Named": lambda: Named(dict(zip(["stem", "body", "head"], layers(), strict=True))),
}
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def learned(name):
    model = hatcl.convert(MODELS[name]().eval(), 2, X)
    for t in range(2):
        parts.train(model, t, torch.optim.AdamW(model.parameters(), 1e-2), (X, torch.arange(6) % 3))
    return model.eval()


def names_of(container):
    return [str(k) for k in (container if isinstance(container, nn.ModuleDict) else range(len(container)))]


@pytest.mark.parametrize("name", MODELS)
def test_length_iteration_and_indices_are_those_of_the_plain_model(name):
    plain, model = MODELS[name](), learned(name)
    assert len(model) == len(plain) and names_of(model) == names_of(plain)
    assert isinstance(model, type(plain))
    keys = list(plain) if name == "Named" else [*range(len(plain)), -1, -2]
    for key in keys:
        assert isinstance(model[key], type(plain[key])) and isinstance(model[key], HATLayer) == bool(
            len(plain[key]._parameters)
        )
    assert "hat_gates" not in model if name == "Named" else len(list(model)) == len(list(plain))


def features(model):
    """Of the slice without the head, in each task."""
    out = []
    for t in hatcl.tasks(model):
        with hatcl.task(model, t), torch.no_grad():
            out.append(model[:-1](X))
    return out


def test_a_slice_gives_the_features_of_the_active_task():
    model = learned("Sequential")
    for t, h in enumerate(features(model)):
        assert h.shape == (6, 16)
        with hatcl.task(model, t), torch.no_grad():
            assert torch.equal(model[-1](h), model(X))


def test_twin_with_the_class_of_before_a_slice_is_the_whole_network(monkeypatch):
    monkeypatch.setattr(build, "without_gates", lambda model: None)
    model = learned("Sequential")
    assert len(model) == 6 and all(h.shape == (6, 3) for h in features(model))


@pytest.mark.parametrize("name", MODELS)
def test_it_is_copied_pickled_saved_certified_and_extracted(name, tmp_path):
    model = learned(name)
    want = [parts.logits(model, t, X) for t in range(2)]
    hatcl.save_pretrained(model, tmp_path)
    loaded = hatcl.from_pretrained(tmp_path, base=MODELS[name]())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert type(again) is type(model) and len(again) == len(model)
        assert all(torch.equal(parts.logits(again, t, X), want[t]) for t in range(2))
    assert hatcl.certify(model, X, strict=True).exact
    small = hatcl.extract_task(model, 0, X).model
    assert type(small) is type(MODELS[name]())
    assert torch.allclose(small(X), want[0], atol=1e-5)


def test_steps_are_neither_added_nor_removed():
    text = "no step can be added or removed once the model is converted, .* make the converted model a step of another"
    model = learned("Sequential")
    for change in (lambda: model.append(nn.ReLU()), lambda: model.pop(0), lambda: model.__delitem__(0)):
        with pytest.raises(hatcl.ConversionError, match=text):
            change()
    with pytest.raises(hatcl.ConversionError, match=text):
        learned("Named").update({"more": nn.ReLU()})
    assert len(nn.Sequential(model, nn.ReLU())(X)) == 6
