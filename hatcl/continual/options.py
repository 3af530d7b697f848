"""How a model is trained on each task of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import flag, one_of, whole
from ..engine.options import LoopOptions

EVALUATE = ("next", "all")
SCORED_ON = ("test", "validation")


@dataclass(frozen=True)
class LearnOptions(LoopOptions):
    """How `learn_sequence` trains each task. Every task gets a new optimizer.

    Args:
        batch_size: examples per batch.
        evaluate: after each task, score the tasks learned so far and the `next` one, which is what the measures need,
            or `all`.
        baseline: score every task before anything is learned, for forward transfer.
        score_on: the examples to score on: `test`, or `validation` to choose options and methods by.

    Raises:
        ConfigError: a value outside its range, see also `LoopOptions`.
    """

    lr: float = 3e-4
    epochs: int = 1
    schedule: str = "cosine"
    warmup: float = 0.1
    clip: float = 1.0
    batch_size: int = 16
    evaluate: str = "next"
    baseline: bool = True
    score_on: str = "test"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("batch_size", self.batch_size)
        flag("baseline", self.baseline)
        one_of("evaluate", self.evaluate, EVALUATE)
        one_of("score_on", self.score_on, SCORED_ON)
