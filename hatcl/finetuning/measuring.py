"""Score a fine-tuned model by the measure that a task's papers report.

accuracy    share of right answers
f1          2 tp / (2 tp + fp + fn) for the second of two classes, as in GLUE for MRPC and QQP
mcc Matthews' correlation, as in GLUE for CoLA: the correlation of labels and predictions as indicators, for any number
of classes (Gorodkin 2004, R_K) pearson     the correlation of scores and predictions, as in GLUE for STS-B
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calls import Batches
from ..engine.measures import Predictions, answers, correlation
from ..errors import ConfigError


@dataclass(frozen=True)
class Measure:
    """One measure of predictions. `of_scores`: labels are soft, `[n, 2]`, instead of classes, `[n]`."""

    of: Callable[[Tensor, Tensor], float]
    of_scores: bool = False


def _mcc(probabilities: Tensor, labels: Tensor) -> float:
    classes = probabilities.shape[1]
    return correlation(F.one_hot(probabilities.argmax(1), classes), F.one_hot(labels, classes))


MEASURES = {
    "accuracy": Measure(lambda p, y: Predictions(p, y).accuracy),
    "f1": Measure(lambda p, y: Predictions(p, y).f1),
    "mcc": Measure(_mcc),
    "pearson": Measure(lambda p, y: correlation(p[:, 1:], y[:, 1:]), of_scores=True),
}


def constant_answer(measure: str, labels: Tensor, classes: int) -> float:
    """The score of always giving the most common answer, or the mean score if labels are scores."""
    kind, labels = MEASURES[measure], labels.cpu()
    if kind.of_scores:
        return kind.of(labels.double().mean(0).expand(len(labels), -1), labels)
    guess = F.one_hot(torch.bincount(labels, minlength=classes).argmax(), classes).double()
    return kind.of(guess.expand(len(labels), -1), labels)


def measured_by(measure: str, model: nn.Module, batches: Batches) -> float:
    """A model's score on labelled batches, in evaluation mode.

    Raises:
        ConfigError: there are no examples.
    """
    found = [(x.cpu().double().softmax(-1), y.cpu()) for x, y in answers(model, batches)]
    if not found:
        raise ConfigError(f"{measure}: the batches hold no examples")
    return MEASURES[measure].of(torch.cat([x for x, _ in found]), torch.cat([y for _, y in found]))
