"""Optimizers by timm's names, and the learning rate of each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..functional import RATES, rate_at
from .options import LoopOptions


def make_optimizer(
    trained: nn.Module | Iterable[nn.Parameter] | Iterable[Mapping[str, Any]], options: LoopOptions
) -> torch.optim.Optimizer:
    """timm's optimizer of this name.

    Args:
        trained: parameters or groups of them, used as they are; or a model, whose biases and norms get no weight decay.

    Raises:
        ConfigError: the optimizer cannot be made here, or cannot be made with these options.
    """
    from timm.optim import create_optimizer_v2

    name, more = options.optimizer, {}
    if options.momentum is not None:
        name, more = "momentum" if name == "sgd" else name, {"momentum": options.momentum}  # timm's sgd is Nesterov's
    try:
        return create_optimizer_v2(trained, opt=name, lr=options.rate, weight_decay=options.weight_decay, **more)
    except (ValueError, AssertionError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f"optimizer: timm makes no {options.optimizer!r} with lr={options.rate:g}, weight_decay="
            f"{options.weight_decay:g} ({error}); timm.optim.list_optimizers() lists those that it has"
        ) from error


class Schedule:
    """The learning rate of each step, for an optimizer whose groups may have different rates.

    It depends only on the position in the course, so a resumed run needs no state.

    Args:
        rates: the highest rate of each group.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, options: LoopOptions, rates: list[float]) -> None:
        self.optimizer, self.options, self.rates = optimizer, options, rates

    def set(self, done: float, total: float, step: float = 1) -> float:
        """Set every group's rate for the step at `done` of `total`; returns the highest.

        Args:
            step: the length of a step in the unit of `total`.
        """
        name = self.options.course
        rising = round(self.options.warmup * total / step) * step
        for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
            if done < rising:
                group["lr"] = lr * min(done + step, rising) / rising
            elif name in RATES:
                group["lr"] = rate_at((done - rising) / max(step, total - rising), lr, name)
            else:
                group["lr"] = _timm_rate(name, done - rising, max(step, total - rising), lr)
        return max(group["lr"] for group in self.optimizer.param_groups)


def _timm_rate(name: str, done: float, total: float, lr: float) -> float:
    """The rate by timm's schedule of this name; `step` divides it by ten after every 30 % of the course."""
    from timm.scheduler import create_scheduler_v2

    group = {"params": [nn.Parameter(torch.zeros(()))], "lr": lr}
    scheduler, _ = create_scheduler_v2(
        torch.optim.SGD([group]), sched=name, num_epochs=1, step_on_epochs=False, updates_per_epoch=total,
        decay_epochs=0.3,
    )  # fmt: skip
    scheduler.step_update(done)
    return float(scheduler.optimizer.param_groups[0]["lr"])
