from __future__ import annotations

import pytest
import torch

from hatcl.engine.schedule import make_optimizer, make_scheduler
from hatcl.errors import ConfigError


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lion", "lamb"])
def test_timm_makes_the_optimizer(opt):
    model = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(model, opt, 0.01, 0.05)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert all(group["lr"] == 0.01 for group in optimizer.param_groups)


def test_the_schedule_depends_on_the_number_of_updates_only():
    optimizer = make_optimizer(torch.nn.Linear(3, 2), "sgd", 0.1, 0.0)
    schedule = dict(epochs=4, steps_per_epoch=5, warmup_epochs=1)
    first = make_scheduler(optimizer, "cosine", **schedule)
    first.step_update(0)
    rates = []
    for step in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        first.step_update(step + 1)
    assert rates[0] < rates[3] < rates[5] and rates[-1] < 0.01
    second = make_scheduler(optimizer, "cosine", **schedule)  # the next task, or a resumed one
    second.step_update(7)
    assert optimizer.param_groups[0]["lr"] == rates[7]
    assert make_scheduler(optimizer, "none", **schedule) is None


def test_unknown_names():
    optimizer = make_optimizer(torch.nn.Linear(3, 2), "sgd", 0.1, 0.0)
    with pytest.raises(ConfigError, match="--opt: timm makes no optimizer 'adamq'"):
        make_optimizer(torch.nn.Linear(3, 2), "adamq", 0.1, 0.0)
    for name in ("cosinus", "plateau"):
        with pytest.raises(ConfigError, match=f"--sched: timm makes no schedule '{name}'"):
            make_scheduler(optimizer, name, epochs=4, steps_per_epoch=5, warmup_epochs=0)
