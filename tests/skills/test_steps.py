"""Acting at every step that an optimizer takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hatcl.errors import SkillError
from hatcl.skills.steps import at_steps


def stepped(optimizer, p):
    p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("before", [True, False])
def test_it_acts_before_or_after_a_step_until_it_is_removed(before):
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=1.0)
    seen = []
    with at_steps(optimizer, [p], "of the test", lambda scale: seen.append((float(p), scale)), before):
        stepped(optimizer, p)
    stepped(optimizer, p)
    assert seen == [(0.0 if before else -1.0, None)]


def test_a_wrapped_optimizer_is_found_and_another_is_refused():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    p = nn.Parameter(torch.zeros(1))
    inner = torch.optim.SGD([p], lr=1.0)
    seen = []
    with at_steps(Wrapper(inner), [p], "of the test", seen.append):
        stepped(inner, p)
    assert seen == [None]
    with pytest.raises(SkillError, match="SGD holds none of the 1 tensors of the test; build it over this model"):
        at_steps(inner, [nn.Parameter(torch.zeros(1))], "of the test", seen.append)


def test_a_step_that_a_scaler_skips_does_not_count():
    class Fused(torch.optim.Optimizer):
        def step(self, closure=None):
            pass

    p = nn.Parameter(torch.zeros(1))
    optimizer = Fused([p], {})
    seen = []
    with at_steps(optimizer, [p], "of the test", seen.append, before=True):
        optimizer.found_inf, optimizer.grad_scale = torch.ones(1), torch.tensor(4.0)
        stepped(optimizer, p)  # as a fused optimizer is called, which skips by itself
        optimizer.found_inf = torch.zeros(1)
        stepped(optimizer, p)
    assert seen == [torch.tensor(4.0)]
