"""Measures: accuracy, predictions for labelled examples and their calibration, and the measures of continual learning
over the accuracy matrix R.

`R[i, j]` is the accuracy on task j's test set after task i was learned; NaN where it was not measured (a task that is
not learned yet has no gates to test with). T is the number of tasks, counted from 0. Other shapes: `B` examples in a
batch, `n` in all, `C` classes, `M` bins.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calls import Batches, Head, check_answers, outputs, split_batch
from ..errors import ConfigError
from ..lend import Evaluating

BINS = 15  # the number that Guo et al. 2017 use for all their figures
LogitsFn = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]

# ---- accuracy --------------------------------------------------------------------------------------------------------


def top1(logits: Tensor, labels: Tensor) -> float:
    """The share of rows whose largest logit is at the label."""
    return float((logits.argmax(-1) == labels.to(logits.device)).double().mean())


def commonest_share(answers: Sequence[Hashable]) -> float:
    """The accuracy of always giving the most common answer; NaN if there are no answers."""
    return max(Counter(answers).values()) / len(answers) if len(answers) else math.nan


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation over the rows of `[n, d]`: `sum (x - mean x)(y - mean y)`, divided by the square root of
    `sum (x - mean x)^2 sum (y - mean y)^2`. 0 if x or y is constant, so that a model with a constant answer scores
    0."""
    x, y = (z.double() - z[:1].double() for z in (x, y))  # exact zeros where constant, which x - mean x need not give
    x, y = x - x.mean(0), y - y.mean(0)
    scale = float((x * x).sum() * (y * y).sum()) ** 0.5
    return float((x * y).sum()) / scale if scale > 0 else 0.0


def accuracy(model: nn.Module, batches: Batches, head: Head | None = None) -> float:
    """The share of examples whose largest logit is at the label, in evaluation mode (the former mode is restored).

    Raises:
        ConfigError: there are no examples, or some have no labels.
    """
    right, total = counts(model, batches, head)
    return float(right.sum()) / float(total.sum())


def accuracy_per_class(model: nn.Module, batches: Batches, head: Head | None = None) -> Tensor:
    """The accuracy on each class, `[C]`; NaN for a class without examples."""
    right, total = counts(model, batches, head)
    return right / total


def counts(model: nn.Module, batches: Batches, head: Head | None = None) -> tuple[Tensor, Tensor]:
    """The number of correct answers and of examples per class, `[C]` float64 each."""
    right = total = torch.zeros(0, dtype=torch.float64)
    for logits, labels in answers(model, batches, lambda model, batch: _logits_and_labels(model, batch, head)):
        labels = labels.to(logits.device)
        hits = (logits.argmax(-1) == labels).double()
        classes = max(logits.shape[-1], len(right))
        right = _plus(right, torch.bincount(labels, hits, classes).cpu())
        total = _plus(total, torch.bincount(labels, minlength=classes).double().cpu())
    if not total.sum() > 0:
        raise ConfigError(
            "accuracy: the batches hold no examples; perhaps an iterator is exhausted; pass a list or a DataLoader"
        )
    return right, total


@torch.no_grad()
def answers(model: nn.Module, batches: Batches, logits_fn: LogitsFn | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits `[B, C]` and labels `[B]` of each batch, in evaluation mode (each module's mode is restored).

    Args:
        batches: read once. logits_fn: `(model, batch) -> (logits, labels)`; by default a batch is a pair of inputs and
            labels, or a mapping with `labels`, and the model gives logits or an output that has them.

    Raises:
        ConfigError: a batch has no labels, or logits and labels have other shapes.
    """
    with Evaluating(model):
        for batch in batches:
            logits, labels = (logits_fn or _logits_and_labels)(model, batch)
            check_answers(logits, labels)
            yield logits, labels


def _logits_and_labels(model: nn.Module, batch: Any, head: Head | None = None) -> tuple[Tensor, Any]:
    inputs, labels = split_batch(batch)
    return outputs(model, inputs, head), labels


def _plus(a: Tensor, b: Tensor) -> Tensor:
    n = max(len(a), len(b))
    return nn.functional.pad(a, (0, n - len(a))) + nn.functional.pad(b, (0, n - len(b)))


# ---- predictions and calibration -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Calibration:
    """Confidence and accuracy in M bins of equal width, `((m-1)/M, m/M]` (Guo et al. 2017, arXiv 1706.04599, eq. 1-3).

    Attributes:
        edges: `[M+1]`, from 0 to 1. count: `[M]`, examples per bin.
        confidence, accuracy: `[M]`, means over a bin's examples; NaN for a bin without any.
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error: `sum_m |B_m|/n |acc(B_m) - conf(B_m)|` (eq. 3)."""
        share = self.count.double() / self.count.sum()
        return float((share * self._gaps()).sum())

    @property
    def mce(self) -> float:
        """Maximum calibration error: the largest `|acc(B_m) - conf(B_m)|` (eq. 5)."""
        return float(self._gaps().max())

    def to_dict(self) -> dict[str, list[float | None]]:
        """The bins as JSON-able values; None for the means of an empty bin."""
        fields = {name: getattr(self, name).tolist() for name in ("edges", "count", "confidence", "accuracy")}
        return {name: [None if v != v else v for v in values] for name, values in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Sequence[float | None]]) -> Calibration:
        """Read the result of `to_dict`."""
        values = {name: [math.nan if v is None else v for v in fields[name]] for name in fields}
        count = torch.tensor(values.pop("count"), dtype=torch.int64)
        return cls(count=count, **{name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()})

    def _gaps(self) -> Tensor:
        return (self.accuracy - self.confidence).abs().nan_to_num(0.0)  # an empty bin weighs nothing


@dataclass(frozen=True, eq=False)
class Predictions:
    """A model's predictions for labelled examples.

    Attributes:
        probabilities: `[n, C]`, float64 on the CPU. labels: `[n]`, int64.

    Raises:
        ConfigError: the shapes differ, there are no examples, a label is not a class, or a probability is not finite.
    """

    probabilities: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        p, y = self.probabilities, self.labels
        if p.dim() != 2 or y.dim() != 1 or len(p) != len(y) or not p.numel():
            raise ConfigError(
                f"predictions: got probabilities {list(p.shape)} and labels {list(y.shape)}, expected [n, C] and [n] "
                "with at least one example"
            )
        if not p.isfinite().all():
            wrong = int((~p.isfinite().all(1)).sum())
            raise ConfigError(
                f"predictions: {wrong} of {len(p)} examples have no finite probabilities; the model's weights have "
                "diverged, or its inputs are not finite"
            )
        if y.is_floating_point() or y.min() < 0 or y.max() >= p.shape[1]:
            raise ConfigError(
                f"predictions: got {y.dtype} labels from {y.min().item()} to {y.max().item()}, expected whole numbers "
                f"from 0 to {p.shape[1] - 1}, the model's classes"
            )

    @property
    def predicted(self) -> Tensor:
        """The most probable class, `[n]`."""
        return self.probabilities.argmax(1)

    @property
    def accuracy(self) -> float:
        """The share of examples whose most probable class is the label."""
        return float((self.predicted == self.labels).double().mean())

    @property
    def f1(self) -> float:
        """`2 tp / (2 tp + fp + fn)`: with two classes for class 1, as in GLUE; with more classes the mean over those
        that are a label or a prediction. 0 where it is undefined (class 1 is neither a label nor predicted)."""
        said, true = self.predicted, self.labels
        classes = self.probabilities.shape[1]
        right = torch.bincount(true[said == true], minlength=classes).double()
        every = torch.bincount(said, minlength=classes) + torch.bincount(true, minlength=classes)
        scores = 2 * right / every.clamp(min=1)
        return float(scores[1] if classes == 2 else scores[every > 0].mean())

    def calibration(self, bins: int = BINS) -> Calibration:
        """How well the probability of the predicted class matches how often it is right."""
        return calibration(self.probabilities.amax(1), self.predicted == self.labels, bins)


def calibration(confidence: Tensor, right: Tensor, bins: int = BINS) -> Calibration:
    """Bin predictions by their confidence.

    Args:
        confidence: `[n]`, the predicted class's probability. right: `[n]` bool. bins: M.

    Raises:
        ConfigError: the shapes differ, there are no examples or bins, or a confidence lies outside 0 to 1.
    """
    if bins < 1:
        raise ConfigError(f"bins: got {bins}, expected at least 1")
    if confidence.dim() != 1 or confidence.shape != right.shape or not len(confidence):
        raise ConfigError(
            f"calibration: got {list(confidence.shape)} confidences and {list(right.shape)} answers, expected one of "
            "each per example, and at least one example"
        )
    confidence = confidence.double()
    if not bool(((confidence >= 0) & (confidence <= 1)).all()):  # a softmax never exceeds 1
        raise ConfigError("calibration: got a confidence outside 0 to 1; expected probabilities, not logits")
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    at = torch.bucketize(confidence, edges[1:-1])  # right-closed; 0 falls into the first bin
    count = torch.bincount(at, minlength=bins)
    sums = [torch.bincount(at, v, minlength=bins) for v in (confidence, right.double())]
    return Calibration(edges, count, sums[0] / count, sums[1] / count)  # 0/0 is NaN


def predictions_of(model: nn.Module, batches: Batches, logits_fn: LogitsFn | None = None) -> Predictions:
    """A model's predictions for labelled examples, in evaluation mode; for the arguments see `answers`.

    Raises:
        ConfigError: there are no batches, a batch has no labels, or a logit is not finite.
    """
    found = [(x.cpu().double().softmax(-1), y.cpu()) for x, y in answers(model, batches, logits_fn)]
    if not found:
        raise ConfigError("batches: got none, expected at least one with labelled examples")
    return Predictions(torch.cat([x for x, _ in found]), torch.cat([y for _, y in found]))


def agreement(a: Predictions, b: Predictions) -> float:
    """The share of examples for which two models predict the same class, right or wrong.

    Raises:
        ConfigError: the predictions are for different examples.
    """
    if a.labels.shape != b.labels.shape or not torch.equal(a.labels, b.labels):
        raise ConfigError(
            f"agreement: got predictions for {len(a.labels)} and {len(b.labels)} examples that are not the same; "
            "take both from the same batches in the same order"
        )
    return float((a.predicted == b.predicted).double().mean())


def gain_kept(pretrained: float, finetuned: float, grafted: float) -> float:
    """`(grafted - pretrained) / (finetuned - pretrained)`: the share of fine-tuning's gain that a graft keeps.

    Above 1 the graft is better than the fine-tuned model, below 0 worse than the pretrained one. NaN if fine-tuning
    gained nothing: the share is then undefined, and a table of several tasks should not fail for one of them.
    """
    gain = finetuned - pretrained
    return (grafted - pretrained) / gain if gain > 0 else float("nan")


# ---- tasks one after another -----------------------------------------------------------------------------------------


def matrix(rows: Sequence[Sequence[float]], tasks: int | None = None) -> np.ndarray:
    """The rows as R, `[T, T]`, with NaN where a row has no entry.

    Args:
        tasks: T; None = the number of rows.

    Raises:
        ConfigError: a row is too long, or there are too many rows.
    """
    size = len(rows) if tasks is None else tasks
    if len(rows) > size:
        raise ConfigError(f"accuracy matrix: got {len(rows)} rows, expected at most {size}")
    out = np.full((size, size), np.nan)
    for i, row in enumerate(rows):
        if len(row) > size:
            raise ConfigError(f"accuracy matrix: row {i} has {len(row)} entries, expected at most {size}")
        out[i, : len(row)] = row
    return out


def average_accuracy(r: np.ndarray) -> float:
    """Mean accuracy over all tasks at the end: `1/T sum_j R[T-1, j]` (Lopez-Paz and Ranzato 2017)."""
    return float(_square(r)[-1].mean())


def forgetting(r: np.ndarray) -> float:
    """The mean loss of the earlier tasks since their best accuracy: `1/(T-1) sum_{j<T-1} max_{j<=i<T-1} R[i, j] -
    R[T-1, j]` (Chaudhry et al. 2018). 0 if nothing was forgotten, and for a single task."""
    r = _square(r)
    losses = [r[j:-1, j].max() - r[-1, j] for j in range(len(r) - 1)]
    return float(np.mean(losses)) if losses else 0.0


def backward_transfer(r: np.ndarray) -> float:
    """The effect of later learning on earlier tasks: `1/(T-1) sum_{j<T-1} R[T-1, j] - R[j, j]` (Lopez-Paz and Ranzato
    2017). 0 for a single task."""
    r = _square(r)
    gains = [r[-1, j] - r[j, j] for j in range(len(r) - 1)]
    return float(np.mean(gains)) if gains else 0.0


def forward_transfer(r: np.ndarray, baseline: np.ndarray) -> float:
    """The effect of earlier learning on a task before it is learned: `1/(T-1) sum_{j>0} R[j-1, j] - baseline[j]`, with
    `baseline[j]` the accuracy of an untrained model (Lopez-Paz and Ranzato 2017). NaN where `R[j-1, j]` was not
    measured, as with hard attention, where a task cannot be tested before it is learned."""
    r = _square(r)
    if len(baseline) != len(r):
        raise ConfigError(f"forward transfer: got {len(baseline)} baselines, expected one for each of {len(r)} tasks")
    gains = [r[j - 1, j] - baseline[j] for j in range(1, len(r))]
    return float(np.mean(gains)) if gains else 0.0


def zero_shot_transfer(r: np.ndarray) -> float:
    """Forward transfer without a baseline: `1/(T-1) sum_{j>0} R[j-1, j]`, each task's score just before it is learned
    (reported as FWT by TaSL's evaluation; Feng et al. 2024, arXiv 2408.05200). 0 for a single task."""
    return forward_transfer(r, np.zeros(len(r)))


def joint_goal_accuracy(turns: Sequence[Hashable], hits: Sequence[bool]) -> float:
    """Joint goal accuracy of dialogue state tracking: the share of turns whose every slot is right.

    Args:
        turns: for each slot, the turn that it belongs to (dialogue, turn and service). hits: for each slot, whether its
            value was predicted.

    Raises:
        ConfigError: there are no slots, or the lists differ in length.
    """
    if len(turns) != len(hits) or not turns:
        raise ConfigError(
            f"joint goal accuracy: got {len(turns)} turns and {len(hits)} hits, expected one of each per slot"
        )
    whole: dict[Hashable, bool] = {}
    for turn, hit in zip(turns, hits, strict=True):
        whole[turn] = whole.get(turn, True) and bool(hit)
    return sum(whole.values()) / len(whole)


def _square(r: np.ndarray) -> np.ndarray:
    if r.ndim != 2 or r.shape[0] != r.shape[1] or len(r) == 0:
        raise ConfigError(f"accuracy matrix: got shape {list(r.shape)}, expected T x T (task learned x task tested)")
    return r
