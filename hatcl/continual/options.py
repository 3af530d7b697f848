"""How a model is trained on each task of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Changeable, flag, number, one_of, whole
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
            whole(name, getattr(self, name))
        number("lr", self.lr, 0, without="low")
        for name in ("weight_decay", "clip_grad"):
            number(name, getattr(self, name), 0)
        number("warmup", self.warmup, 0, 1, without="high", what="a share")
        flag("baseline", self.baseline)
        one_of("schedule", self.schedule, RATES)
        one_of("evaluate", self.evaluate, EVALUATE)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0, 1, ... of a task's `steps`, see `hatcl.functional.rate_at`."""
        return rate_at(step, steps, self.lr, self.schedule, self.warmup)
