"""How a model is trained on each task of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config import flag, number, one_of, whole
from ..engine.options import LoopOptions

EVALUATE = ("next", "all")
SCORED_ON = ("test", "validation")
# options that may differ on resuming: where and how often it computes and writes, and those that help against a NaN
# loss
LEAST_STEPS = 100  # for a task without chosen epochs; with fewer an adapter learns nothing from a few hundred texts
FREE = frozenset({"device", "compile", "checkpoint_seconds", "lr", "clip", "amp"})


@dataclass(frozen=True)
class LearnOptions(LoopOptions):
    """How `learn_sequence` trains each task.

    Args:
        epochs: passes over a task's examples. None = one (for images 12), or as many as 100 steps need if there are few
        examples.
        batch_size: the most examples per batch; the batches of an epoch have nearly equal size.
        fresh_optimizer: make a new optimizer for each task, instead of one for all.
        evaluate: after each task, score the tasks learned so far and the `next` one, as the measures need, or `all`.
        baseline: score every task before anything is learned, for forward transfer.
        score_on: the examples to score on: `test`, or `validation` for choosing options and methods.
        checkpoint_seconds: the least time between two checkpoints within a task, for methods that can resume in the
            middle of one (`Method.state`); one is written after each task as well.

    Raises:
        ConfigError: a value is outside its range, see also `LoopOptions`.
    """

    epochs: int | None = None
    schedule: str = "cosine"
    warmup: float = 0.1
    clip: float = 1.0
    batch_size: int = 16
    fresh_optimizer: bool = True
    evaluate: str = "next"
    baseline: bool = True
    score_on: str = "test"
    checkpoint_seconds: float = 60.0
    passes: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("batch_size", self.batch_size)
        for name in ("fresh_optimizer", "baseline"):
            flag(name, getattr(self, name))
        number("checkpoint_seconds", self.checkpoint_seconds, 0)
        one_of("evaluate", self.evaluate, EVALUATE)
        one_of("score_on", self.score_on, SCORED_ON)

    def steps_of(self, batches: int) -> int | None:
        if self.max_steps is not None or self.epochs is not None:
            return super().steps_of(batches)
        per_pass = -(-batches // self.accumulate)
        return max(self.passes, -(-LEAST_STEPS // max(per_pass, 1))) * per_pass
