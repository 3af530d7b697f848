from __future__ import annotations

import math

import pytest
import torch

from hatcl.engine.options import RATE_SCHEDULES, LoopOptions
from hatcl.engine.schedule import Schedule, make_optimizer
from hatcl.errors import ConfigError


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "lamb", "lookahead_adam"])
def test_timm_makes_the_optimizer(name):
    model = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(model, LoopOptions(optimizer=name, lr=0.01, weight_decay=0.05))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert all(group["lr"] == 0.01 for group in optimizer.param_groups)


def test_momentum_of_sgd():
    def group(momentum):
        options = LoopOptions(optimizer="sgd", momentum=momentum)
        return make_optimizer(torch.nn.Linear(3, 2).parameters(), options).param_groups[0]

    assert (group(None)["momentum"], group(None)["nesterov"]) == (0.9, True)
    assert (group(0.5)["momentum"], group(0.5)["nesterov"]) == (0.5, False)
    assert (group(0.0)["momentum"], group(0.0)["nesterov"]) == (0.0, False)


def rates(steps=20, **options):
    chosen = LoopOptions(optimizer="sgd", lr=0.1, **options)
    optimizer = make_optimizer(torch.nn.Linear(3, 2), chosen)
    schedule = Schedule(optimizer, chosen, [0.1] * len(optimizer.param_groups))
    return [schedule.set(step, steps) for step in range(steps)]


@pytest.mark.parametrize("name", RATE_SCHEDULES)
def test_the_rate_depends_on_the_step_alone(name):
    whole = rates(schedule=name, warmup=0.25)
    assert whole[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert whole[5] == pytest.approx(0.1) and all(a >= b for a, b in zip(whole[5:], whole[6:], strict=False))
    assert (whole[-1] < whole[5]) == (name != "constant")
    chosen = LoopOptions(optimizer="sgd", lr=0.1, schedule=name, warmup=0.25)
    other = Schedule(make_optimizer(torch.nn.Linear(3, 2), chosen), chosen, [0.1])  # of a run that goes on
    assert other.set(17, 20) == whole[17]


def test_rates_by_hand():
    assert rates(4, schedule="cosine") == pytest.approx([0.05 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])
    assert rates(4, schedule="linear") == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert rates(10, schedule="step") == pytest.approx([0.1] * 3 + [0.01] * 3 + [0.001] * 3 + [0.0001])


def test_groups_keep_their_own_rates_and_epochs_count_as_steps_do():
    options = LoopOptions(schedule="linear", warmup=0.5)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.5)]
    optimizer = make_optimizer(groups, options)
    schedule = Schedule(optimizer, options, [1.0, 0.5])
    found = []
    for epoch in range(2):  # of two steps each
        for part in (0.0, 0.5):
            schedule.set(epoch + part, 2, 0.5)
            found.append([group["lr"] for group in optimizer.param_groups])
    assert found == [[0.5, 0.25], [1.0, 0.5], [1.0, 0.5], [0.5, 0.25]]


def test_an_optimizer_that_cannot_be_made():
    options = LoopOptions(optimizer="nesterov", momentum=0.0)
    with pytest.raises(ConfigError, match="optimizer: timm makes no 'nesterov' with lr=0.001.*Nesterov"):
        make_optimizer(torch.nn.Linear(3, 2), options)
