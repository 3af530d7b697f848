"""What a model computes with while its graft is learned, and that all of it is given back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hatcl.functional import bits_of
from hatcl.grafts.selection import candidates
from hatcl.grafts.weights import HardWeights, SoftWeights

OURS = torch.tensor([[1.0, -0.0, 3.0], [4.0, float("nan"), 6.0]])
THEIRS = torch.tensor([[1.5, 7.0, 3.0], [0.1, 5.0, -6.0]])
MEMBERS = {"weight": torch.tensor([1, 3], dtype=torch.int32)}


def linear(weight):
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data.copy_(weight)
    return layer


@pytest.fixture
def model():
    return linear(OURS)


def test_hard_gamma_shows_the_members_and_puts_every_bit_back(model):
    weights = HardWeights(candidates(model, linear(THEIRS)))
    before = model.weight.detach().clone()
    weights.compute_with(MEMBERS, {})
    want = before.clone().view(-1)
    want[[1, 3]] = THEIRS.view(-1)[[1, 3]]
    assert torch.equal(bits_of(model.weight).view(-1), bits_of(want))
    delta = weights.delta("weight").view(-1)
    assert torch.equal(delta[[0, 1, 3]], (THEIRS - OURS).view(-1)[[0, 1, 3]])  # of what is pretrained, also of members
    weights.show({"weight": torch.tensor([5], dtype=torch.int32)})
    assert model.weight.view(-1)[5] == -6 and model.weight.view(-1)[3] == 4
    weights.close()
    assert torch.equal(bits_of(model.weight), bits_of(before))


def test_soft_gamma_is_between_and_puts_every_bit_back(model):
    weights = SoftWeights(candidates(model, linear(THEIRS)))
    before = model.weight.detach().clone()
    weights.compute_with(MEMBERS, {"weight": torch.zeros(2, 3)})
    assert model.weight.view(-1)[:2].tolist() == [1.25, 3.5]  # sigmoid(0) = 1/2
    assert weights.delta("weight").view(-1)[1] == 7
    weights.show(MEMBERS)
    assert model.weight.view(-1)[[0, 1, 3]].tolist() == [1.0, 7.0, pytest.approx(0.1)]
    weights.close()
    assert torch.equal(bits_of(model.weight), bits_of(before))


@pytest.mark.parametrize("kind", [HardWeights, SoftWeights])
def test_twin_without_closing_the_model_keeps_them(model, kind):
    weights = kind(candidates(model, linear(THEIRS)))
    weights.show(MEMBERS)
    assert model.weight.view(-1)[1] == 7
