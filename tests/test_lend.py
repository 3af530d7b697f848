"""A lent model comes back as it was: modes, gradients, what requires them, and buffers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hatcl.lend import Evaluating, lent


def model():
    made = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    made[2].eval()  # a mode of its own
    made[0].weight.grad = torch.ones(6, 4)
    made[3].bias.requires_grad_(False)
    return made


def state(m):
    modes = [child.training for child in m.modules()]
    gradients = [None if p.grad is None else (id(p.grad), p.grad.clone().tolist()) for p in m.parameters()]
    return modes, gradients, [p.requires_grad for p in m.parameters()], [b.tolist() for b in m.buffers()]


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_gets_its_own_mode_back(fails):
    m = model()
    before = state(m)
    try:
        with Evaluating(m):
            assert not any(child.training for child in m.modules())
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert state(m) == before and m.training and not m[2].training


def use(m, trained):
    with lent(m, trained):
        assert [p.requires_grad for p in m.parameters()] == [any(p is q for q in trained) for p in m.parameters()]
        assert all(p.grad is None for p in m.parameters()) and not m.training
        m.train()
        m(torch.randn(8, 4)).sum().backward()  # moves the running statistics
        m[1].running_mean = torch.full((6,), 7.0)  # and another tensor in the place of one
        assert m[3].weight.grad is not None


def test_a_lent_model_comes_back_as_it_was():
    m = model()
    before, mean = state(m), m[1].running_mean
    use(m, [m[3].weight])
    assert state(m) == before and m[1].running_mean is mean


def test_an_error_inside_gives_it_back_too():
    m = model()
    before = state(m)
    with pytest.raises(ZeroDivisionError), lent(m, [m[0].weight]):
        m.train()
        m(torch.randn(8, 4))
        raise ZeroDivisionError
    assert state(m) == before


def test_buffers_that_are_to_move_do():
    m = model()
    moved = [m[1].running_var]
    with lent(m, [], moved=moved):
        m.train()
        with torch.no_grad():
            m(torch.randn(8, 4))
    assert not torch.equal(m[1].running_var, torch.ones(6)) and torch.equal(m[1].running_mean, torch.zeros(6))
