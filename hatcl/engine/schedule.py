"""Optimizers and learning rate schedules by name, from timm's factories."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ..errors import ConfigError


def make_optimizer(model: nn.Module, opt: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """timm's optimizer of this name over all of `model`'s parameters. Raises `ConfigError` on an unknown name."""
    try:
        return create_optimizer_v2(model, opt=opt, lr=lr, weight_decay=weight_decay)
    except (ValueError, AssertionError, TypeError, ImportError) as error:
        raise ConfigError(
            f"--opt: timm makes no optimizer {opt!r} with lr={lr:g}, weight_decay={weight_decay:g} ({error}); "
            "timm.optim.list_optimizers() names those it has"
        ) from error


def make_scheduler(
    optimizer: torch.optim.Optimizer, sched: str, *, epochs: int, steps_per_epoch: int, warmup_epochs: int
) -> Scheduler | None:
    """timm's schedule of this name over one task, None for `none`. It is stepped with the number of updates done, from
    which alone it computes the rate, so a resumed run needs no state of it.

    Raises:
        ConfigError: an unknown name, or `plateau`, which would need a measure after each epoch.
    """
    if sched == "none":
        return None
    try:
        if sched == "plateau":
            raise ValueError("plateau follows a measure, not the number of updates")
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=sched,
            num_epochs=epochs,
            warmup_epochs=warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
        if scheduler is None:  # what timm before 1.0.30 answers to a name it does not know
            raise ValueError("unknown schedule")
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(
            f"--sched: timm makes no schedule {sched!r} over {epochs} epochs with {warmup_epochs} of warm-up "
            f"({error}); expected none, cosine, tanh, step, poly or another of timm's"
        ) from error
    return scheduler
