"""The result of learning a sequence of tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engine.measures import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    matrix,
    zero_shot_transfer,
)


@dataclass
class SequenceResult:
    """The score matrix R and its measures; T tasks, counted from 0.

    Attributes:
        method: the method's name. tasks: the tasks' names.
        rows: `rows[i][j]` is task j's score after task i, NaN where it was not measured. A method that learns all tasks
        at once measures only the last row.
        baseline: each task's score before anything was learned, NaN where it was not measured.
        seconds: the time spent on each task: learning, the method's work at its end, and scoring.
        losses: the mean training loss of the first and of the last tenth of each stage's steps.
        facts: the method's results for each stage (`Method.facts`). details: its results for the whole run
        (`Method.finish`); empty until the run is finished.
        commonest: each task's score of always giving the most common answer, NaN where that is meaningless.
        scored_by: the measure of each task's score, empty if it is not named.
    """

    method: str
    tasks: list[str]
    rows: list[list[float]] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    commonest: list[float] = field(default_factory=list)
    scored_by: list[str] = field(default_factory=list)

    @property
    def matrix(self) -> np.ndarray:
        """R as an array `[T, T]`."""
        return matrix(self.rows, len(self.tasks))

    @property
    def average_accuracy(self) -> float:
        """`1/T sum_j R[T-1, j]`."""
        return average_accuracy(self.matrix)

    @property
    def backward_transfer(self) -> float:
        """BWT: `1/(T-1) sum_{j<T-1} R[T-1, j] - R[j, j]`."""
        return backward_transfer(self.matrix)

    @property
    def forward_transfer(self) -> float:
        """FWT: `1/(T-1) sum_{j>0} R[j-1, j] - baseline[j]`."""
        return forward_transfer(self.matrix, np.asarray(self.baseline))

    @property
    def zero_shot_transfer(self) -> float:
        """FWT as in TaSL, without the baseline: `1/(T-1) sum_{j>0} R[j-1, j]`."""
        return zero_shot_transfer(self.matrix)

    @property
    def forgetting(self) -> float:
        """`1/(T-1) sum_{j<T-1} max_i R[i, j] - R[T-1, j]`."""
        return forgetting(self.matrix)

    @property
    def measures(self) -> dict[str, float]:
        """All five measures."""
        return {
            "average_accuracy": self.average_accuracy,
            "forgetting": self.forgetting,
            "forward_transfer": self.forward_transfer,
            "backward_transfer": self.backward_transfer,
            "zero_shot_transfer": self.zero_shot_transfer,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; numbers that were not measured are None. Without `seconds`, so that two runs write the same."""
        return {
            "method": self.method,
            "tasks": self.tasks,
            "matrix": [[_known(v) for v in row] for row in self.rows],
            "baseline": [_known(v) for v in self.baseline],
            "losses": [[_known(v) for v in pair] for pair in self.losses],
            "facts": self.facts,
            "details": self.details,
            "commonest": [_known(v) for v in self.commonest],
            "scored_by": self.scored_by,
            **({n: _known(v) for n, v in self.measures.items()} if len(self.rows) == len(self.tasks) else {}),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> SequenceResult:
        """Read the result of `to_dict`."""

        def read(values: list[float | None]) -> list[float]:
            return [math.nan if v is None else float(v) for v in values]

        return cls(
            content["method"],
            list(content["tasks"]),
            [read(row) for row in content["matrix"]],
            read(content["baseline"]),
            losses=[read(pair) for pair in content["losses"]],
            facts=[dict(stage) for stage in content["facts"]],
            details=dict(content["details"]),
            commonest=read(content.get("commonest", [])),
            scored_by=list(content.get("scored_by", [])),
        )


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
