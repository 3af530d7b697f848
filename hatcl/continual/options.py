"""How a model is trained on each task of a sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import Changeable, one_of
from ..errors import ConfigError
from ..functional import RATES, rate_at

EVALUATE = ("next", "all")


@dataclass(frozen=True)
class LearnOptions(Changeable):
    """How `learn_sequence` trains: AdamW, made anew for every task.

    Args:
        epochs: passes over a task's examples. batch_size: examples per step.
        lr: the highest learning rate. weight_decay: decoupled, on all that is trained.
        schedule: after the warm-up `constant`, or `linear` or `cosine` down to 0 at a task's last step.
        warmup: share of a task's steps in which the learning rate rises linearly from 0.
        clip_grad: clip the gradient's norm to this, 0 = off.
        evaluate: after each task, score the tasks learned so far and the `next` one, which is what the measures need,
            or `all`.
        baseline: score every task before anything is learned, for forward transfer.

    Raises:
        ConfigError: a value outside its range.
    """

    epochs: int = 1
    batch_size: int = 16
    lr: float = 3e-4
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.1
    clip_grad: float = 1.0
    evaluate: str = "next"
    baseline: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}: got {value!r}, expected an integer of at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr: got {self.lr!r}, expected a number above 0")
        for name in ("weight_decay", "clip_grad"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}: got {value!r}, expected a number of at least 0")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup: got {self.warmup!r}, expected a share from 0 to below 1")
        one_of("schedule", self.schedule, RATES)
        one_of("evaluate", self.evaluate, EVALUATE)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0, 1, ... of a task's `steps`, see `hatcl.functional.rate_at`."""
        return rate_at(step, steps, self.lr, self.schedule, self.warmup)
