"""Kinds of problems that a head can solve, each with its targets, loss and measures.

    classification    one of several classes: cross-entropy; accuracy
    multilabel        any of several labels: binary cross-entropy of each; mean average precision, micro F1
    regression        numbers: mean squared error; R2, Pearson's correlation

Shapes: outputs `[n, C]`. Labels: `[n]` class indices; `[n, C]` of 0 and 1; `[n, C]` numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import one_of
from ..errors import ConfigError
from .measures import correlation, top1

Scored = Callable[[Tensor, Tensor], float]  # (outputs, targets), each for all examples
CLASSES, LABELS, NUMBERS = "classification", "multilabel", "regression"


@dataclass(frozen=True)
class Problem:
    """One kind of problem.

    Attributes:
        name: its name in options. labels: the form of its labels, in words. fits: whether labels have this form.
        loss: the mean loss of outputs and targets. measures: by name; the first is the default.
        targets: from labels and the training labels, the targets of the loss.
    """

    name: str
    labels: str
    fits: Callable[[np.ndarray], bool]
    loss: Callable[[Tensor, Tensor], Tensor]
    measures: Mapping[str, Scored]
    targets: Callable[[np.ndarray, np.ndarray], Tensor] = field(default=lambda y, known: torch.from_numpy(y))

    def measure(self, name: str | None) -> Scored:
        """The measure of that name; None = the problem's default.

        Raises:
            ConfigError: the problem has no measure of that name.
        """
        chosen = next(iter(self.measures)) if name is None else name
        one_of(f"measured_by, of a {self.name}", chosen, list(self.measures))
        return self.measures[chosen]


def average_precision(outputs: Tensor, targets: Tensor) -> float:
    """`sum_k (R_k - R_(k-1)) P_k` over the thresholds k of one label's outputs, where precision P and recall R count
    the examples at or above k, as in scikit-learn. Shapes: `[n]` both."""
    order = outputs.argsort(descending=True)
    score, true = outputs[order], targets[order].double()
    last = torch.cat([score[1:] != score[:-1], torch.ones(1, dtype=torch.bool)])  # the last of equal outputs
    hits = true.cumsum(0)
    precision = hits / torch.arange(1, len(true) + 1)
    recall = hits / true.sum()
    steps = recall[last].diff(prepend=torch.zeros(1, dtype=torch.float64))
    return float((steps * precision[last]).sum())


def mean_average_precision(outputs: Tensor, targets: Tensor) -> float:
    """The mean of `average_precision` over the labels that some example has; 0 if no example has any."""
    some = [c for c in range(targets.shape[1]) if bool(targets[:, c].any())]
    return sum(average_precision(outputs[:, c], targets[:, c]) for c in some) / len(some) if some else 0.0


def micro_f1(outputs: Tensor, targets: Tensor) -> float:
    """`2 tp / (2 tp + fp + fn)` over all examples and labels, where a label is predicted if its output is above 0 (a
    probability above 1/2); 0 if there is no label and no prediction."""
    said, true = outputs > 0, targets > 0.5
    hits = int((said & true).sum())
    return 2 * hits / max(int(said.sum()) + int(true.sum()), 1)


def r_squared(outputs: Tensor, targets: Tensor) -> float:
    """`1 - sum (y - f)^2 / sum (y - mean y)^2`, the mean over the outputs; below 0 if it is worse than predicting the
    mean. For an output with constant targets, 1 if it is exact and 0 otherwise, as in scikit-learn."""
    f, y = outputs.double(), targets.double()
    wrong = (y - f).square().sum(0)
    spread = (y - y.mean(0)).square().sum(0)
    constant = (y == y[:1]).all(0)
    return float(torch.where(constant, (wrong == 0).double(), 1 - wrong / spread).mean())


def pearson(outputs: Tensor, targets: Tensor) -> float:
    """The correlation of outputs and targets, averaged over the outputs; 0 if one of them is constant."""
    columns = zip(outputs.split(1, dim=1), targets.split(1, dim=1), strict=True)
    found = [correlation(f, y) for f, y in columns]
    return sum(found) / len(found)


def _in_deviations(y: np.ndarray, known: np.ndarray) -> Tensor:
    """Targets minus the training targets' mean, divided by their deviation, so that a rate fits targets of any
    scale."""
    deviation = known.std(0)
    return torch.from_numpy((y - known.mean(0)) / np.where(deviation > 0, deviation, 1)).float()


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            CLASSES, "whole numbers, one label per example",
            lambda y: y.ndim == 1 and y.dtype.kind in "ui", F.cross_entropy, {"accuracy": top1},
        ),
        Problem(
            LABELS, "a 0 or 1 for each example and label, [N, labels]",
            lambda y: y.ndim == 2 and y.shape[1] > 0 and bool(np.isin(y, (0, 1)).all()),
            F.binary_cross_entropy_with_logits,
            {"mean_average_precision": mean_average_precision, "micro_f1": micro_f1},
            lambda y, known: torch.from_numpy(y).float(),
        ),
        Problem(
            NUMBERS, "finite numbers, [N] or [N, outputs]",
            lambda y: y.ndim == 2 and y.shape[1] > 0 and y.dtype.kind in "uif" and bool(np.isfinite(y).all()),
            F.mse_loss, {"r2": r_squared, "pearson": pearson}, _in_deviations,
        ),
    )
}  # fmt: skip
MEASURED_BY = tuple(name for problem in PROBLEMS.values() for name in problem.measures)


def problem_named(name: str) -> Problem:
    """The kind of problem.

    Raises:
        ConfigError: there is none of that name; the text has the nearest one.
    """
    one_of("problem", name, list(PROBLEMS))
    return PROBLEMS[name]


def likely_problem(y: np.ndarray) -> str:
    """The likeliest problem for some labels: fractions mean a regression, rows of 0 and 1 several labels."""
    if y.ndim == 2:
        return LABELS if PROBLEMS[LABELS].fits(y) else NUMBERS
    return NUMBERS if y.dtype.kind == "f" and not bool((y == np.round(y)).all()) else CLASSES


def check_problem_labels(where: str, problem: str, y: np.ndarray, count: int, outputs: int) -> None:
    """Raise `ConfigError` if labels have another form than the problem's, or another number than the examples; `where`
    names them."""
    kind = problem_named(problem)
    if len(y) != count or not kind.fits(y):
        rows = y[:, None] if y.ndim == 1 else y
        other = next((f"; a {p.name} has such labels (--problem)" for p in PROBLEMS.values() if p.fits(rows)), "")
        raise ConfigError(
            f"{where} is {y.dtype}{list(y.shape)}, expected {count} for a {problem}: {kind.labels}"
            f"{other if len(y) == count else ''}"
        )
    if problem == CLASSES and (y.min() < 0 or y.max() >= outputs):
        raise ConfigError(f"{where} holds labels from {y.min()} to {y.max()}, expected 0 to {outputs - 1}")
    if problem != CLASSES and y.shape[1] != outputs:
        raise ConfigError(f"{where} has {y.shape[1]} columns, expected {outputs}")
