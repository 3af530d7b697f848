"""Masks over input features: learned per task, exactly zero where off, and isolated like any other gate."""

from __future__ import annotations

import copy

import parts
import pytest
import torch
from torch import nn

import hatcl
from hatcl.hat.gates import gates_of

FEATURES = 12


def built(tasks=2, by_hand=False, **options):
    torch.manual_seed(0)
    config = hatcl.HATConfig(**options)
    mask = hatcl.HATMask(FEATURES, num_tasks=tasks, config=config)
    if by_hand:
        first = hatcl.HATLinear(FEATURES, 16, reads=mask)
        return nn.Sequential(mask, first, nn.ReLU(), hatcl.TaskIndexedLinear(16, parts.CLASSES, reads=first))
    net = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, parts.CLASSES))
    return nn.Sequential(mask, hatcl.convert(net, tasks, torch.randn(2, FEATURES), config=config))


def data(task, count=64):
    """Only the first four features say anything of task 0's classes, the next four of task 1's."""
    generator = torch.Generator().manual_seed(task)
    x = torch.randn(count, FEATURES, generator=generator)
    return x, x[:, 4 * task : 4 * task + 4].argmax(1)


@pytest.mark.parametrize("by_hand", [False, True])
def test_tasks_learn_which_features_they_need_and_stay_exact(by_hand):
    model = built(by_hand=by_hand, penalty_weight=0.5, init="dense", init_value=0.5, max_scale=50.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.1)
    x = data(0)[0]
    want = {}
    for t in range(2):
        parts.train(model, t, optimizer, data(t, 256), 60)
        want[t] = parts.logits(model, t, x)
        assert all(torch.equal(parts.logits(model, e, x), want[e]) for e in want)
        on = model[0].gates.masks[t]
        needed = torch.arange(FEATURES) // 4 == t
        assert on[needed].all() and int(on[~needed].sum()) <= 2
    assert hatcl.certify(model, x, strict=True).exact
    assert [row["name"] for row in hatcl.describe(model).layers][0] == "0"
    report = hatcl.forget_task(model, 0)
    assert report.units_freed > 0 and torch.equal(parts.logits(model, 1, x), want[1])


def test_a_feature_that_is_off_is_exactly_zero_whatever_stands_there():
    mask = parts.pretend(hatcl.HATMask(FEATURES, num_tasks=1)).eval()
    on = mask.gates.masks[0]
    assert 0 < int(on.sum()) < FEATURES
    x = torch.randn(3, FEATURES)
    with hatcl.task(mask, 0):
        y = mask(torch.where(on, x, torch.tensor([torch.inf, -torch.inf, torch.nan] * 4)))
        assert torch.equal(y, torch.where(on, x, 0.0)) and not bool(torch.signbit(y[:, ~on]).any())
    with hatcl.task(mask, None):
        assert torch.equal(mask(x), x)


def test_along_another_dimension_and_through_copies_and_states():
    mask = parts.pretend(hatcl.HATMask(3, num_tasks=1, dim=1), share=0.5).eval()
    x = torch.randn(2, 3, 4, 4)
    with hatcl.task(mask, 0):
        want = mask(x)
    assert torch.equal(want, x * mask.gates.masks[0].view(1, 3, 1, 1))
    again = hatcl.HATMask(3, num_tasks=1, dim=1).eval()
    again.load_state_dict(mask.state_dict())
    for other in (again, copy.deepcopy(mask)):
        with hatcl.task(other, 0):
            assert torch.equal(other(x), want)


def test_while_learning_the_gate_is_soft_and_has_a_gradient():
    mask = hatcl.HATMask(FEATURES, num_tasks=1)
    x = torch.randn(4, FEATURES)
    optimizer = torch.optim.SGD(mask.parameters(), 0.1)
    with hatcl.learn(mask, 0, optimizer, 5) as learning:
        for _ in range(5):
            optimizer.zero_grad()
            (mask(x).square().mean() + learning.penalty()).backward()
            assert gates_of(mask)[0].embeddings[0].grad is not None
            optimizer.step()


def test_what_does_not_fit():
    for wrong in (0, True, (1, 28, 28)):
        with pytest.raises(
            hatcl.ConfigError, match="features: got .*expected an integer of at least 1; flatten images"
        ):
            hatcl.HATMask(wrong)
    mask = hatcl.HATMask(FEATURES)
    for shape in ((2, 5), ()):
        with pytest.raises(hatcl.ConfigError, match=r"HATMask: got an input of shape .*expected 12 features along dim"):
            mask(torch.randn(shape))
    assert repr(mask).startswith("HATMask(\n  12, dim=-1")
