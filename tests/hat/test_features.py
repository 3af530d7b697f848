"""What enters the head, under a task."""

from __future__ import annotations

import parts
import pytest
import torch
from torch import nn

import hatcl
from hatcl.hat.features import features_of, features_under, head_modules
from hatcl.hat.gates import gates_of


@pytest.mark.parametrize("name", parts.MODELS)
def test_the_head_makes_the_outputs_of_the_features(name):
    model = parts.pretend(parts.converted(name)).eval()
    x = parts.images(name)
    (head,) = head_modules(model).values()
    for t in range(2):
        with hatcl.task(model, t), torch.no_grad():
            assert torch.equal(head(features_of(model, x)), model(x))


@pytest.mark.parametrize("name", parts.MODELS)
def test_features_of_two_tasks_differ_and_units_that_are_off_are_zero(name):
    model = parts.pretend(parts.converted(name)).eval()
    x = parts.images(name)
    a, b = (features_under(model, [x[:3], x[3:]], t) for t in range(2))
    assert a.shape == b.shape and len(a) == len(x) and not torch.equal(a, b)
    gates = gates_of(model)[0]
    (name,) = [e.name for e in gates.unit_map.entries.values() if e.head and len(e.shape) > 1]
    (factor,) = [f for f in gates.unit_map.entries[name].factors if not f.owner]
    off = ~gates.masks[0][torch.as_tensor(factor.units) - 1]
    assert off.any() and bool((a[:, off] == 0).all()) and not bool((b[:, off] == 0).all())


def test_features_leave_the_model_in_its_mode_and_without_hooks():
    model = parts.pretend(parts.converted("mlp")).train()
    features_under(model, [parts.images("mlp")], 0)
    assert model.training and all(not m._forward_pre_hooks for m in head_modules(model).values())


def test_positions_are_averaged():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 10), nn.Linear(10, 3)

        def forward(self, x):
            return self.head(torch.relu(self.body(x)))

    model = hatcl.convert(Tokens(), 1, torch.randn(2, 5, 6))
    x = torch.randn(4, 5, 6)
    assert features_of(model, x).shape == (4, 10)
    convolved = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = hatcl.convert(convolved, 1, torch.randn(2, 3, 8, 8))
    assert features_of(model, torch.randn(4, 3, 8, 8)).shape == (4, 7)


def test_a_model_by_hand():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = hatcl.HATLinear(6, 10, num_tasks=2)
            self.head = hatcl.TaskIndexedLinear(10, 3, reads=self.body)

        def forward(self, x):
            return self.head(torch.relu(self.body(x)))

    assert features_of(Net(), torch.randn(4, 6)).shape == (4, 10)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(hatcl.HATError, match=r"no head was found .* Put the classifier into the model"):
        features_of(hatcl.HATLinear(6, 10, num_tasks=2), torch.randn(4, 6))
