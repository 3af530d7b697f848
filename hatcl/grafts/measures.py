"""What a graft is worth: accuracy, F1, the share of the fine-tuning gain that it keeps, agreement with the fine-tuned
model, and calibration.

Shapes: `n` examples, `C` classes, `M` bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraftError
from ..lend import Evaluating
from ..vectors.merging import batches as reading

BINS = 15  # Guo et al. 2017 report all their figures with these
LogitsFn = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


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
        """The bins as JSON-able values; None for what an empty bin does not have."""
        fields = {name: getattr(self, name).tolist() for name in ("edges", "count", "confidence", "accuracy")}
        return {name: [None if v != v else v for v in values] for name, values in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Sequence[float | None]]) -> Calibration:
        """What `to_dict` gave."""
        values = {name: [math.nan if v is None else v for v in fields[name]] for name in fields}
        count = torch.tensor(values.pop("count"), dtype=torch.int64)
        return cls(count=count, **{name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()})

    def _gaps(self) -> Tensor:
        return (self.accuracy - self.confidence).abs().nan_to_num(0.0)  # an empty bin weighs nothing


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says of labelled examples.

    Attributes:
        probabilities: `[n, C]`, float64 on the CPU. labels: `[n]`, int64.

    Raises:
        GraftError: other shapes, no examples, a label that is no class, or probabilities that are not finite.
    """

    probabilities: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        p, y = self.probabilities, self.labels
        if p.dim() != 2 or y.dim() != 1 or len(p) != len(y) or not p.numel():
            raise GraftError(
                f"predictions: got probabilities {list(p.shape)} and labels {list(y.shape)}, expected [n, C] and [n] "
                "with at least one example"
            )
        if not p.isfinite().all():
            wrong = int((~p.isfinite().all(1)).sum())
            raise GraftError(
                f"predictions: {wrong} of {len(p)} examples have no finite probabilities; the model's weights have "
                "diverged, or its inputs are not finite"
            )
        if y.is_floating_point() or y.min() < 0 or y.max() >= p.shape[1]:
            raise GraftError(
                f"predictions: got {y.dtype} labels from {y.min().item()} to {y.max().item()}, expected whole numbers "
                f"from 0 to {p.shape[1] - 1}, the model's classes"
            )

    @property
    def predicted(self) -> Tensor:
        """The most probable class, `[n]`."""
        return self.probabilities.argmax(1)

    @property
    def accuracy(self) -> float:
        """Share of examples whose most probable class is the label."""
        return float((self.predicted == self.labels).double().mean())

    @property
    def f1(self) -> float:
        """`2 tp / (2 tp + fp + fn)`: with two classes that of class 1, as GLUE has it; with more the mean over the
        classes that are a label or a prediction. 0 where it is not defined (class 1 neither a label nor predicted)."""
        said, true = self.predicted, self.labels
        classes = self.probabilities.shape[1]
        right = torch.bincount(true[said == true], minlength=classes).double()
        every = torch.bincount(said, minlength=classes) + torch.bincount(true, minlength=classes)
        scores = 2 * right / every.clamp(min=1)
        return float(scores[1] if classes == 2 else scores[every > 0].mean())

    def calibration(self, bins: int = BINS) -> Calibration:
        """Does the probability of the predicted class say how often it is right?"""
        return calibration(self.probabilities.amax(1), self.predicted == self.labels, bins)


def calibration(confidence: Tensor, right: Tensor, bins: int = BINS) -> Calibration:
    """Bin predictions by their confidence.

    Args:
        confidence: `[n]`, the predicted class's probability. right: `[n]` bool. bins: M.

    Raises:
        GraftError: other shapes, no examples, a confidence outside 0 to 1, or no bins.
    """
    if bins < 1:
        raise GraftError(f"bins: got {bins}, expected at least 1")
    if confidence.dim() != 1 or confidence.shape != right.shape or not len(confidence):
        raise GraftError(
            f"calibration: got {list(confidence.shape)} confidences and {list(right.shape)} answers, expected one of "
            "each per example, and at least one example"
        )
    confidence = confidence.double()
    if not bool(((confidence >= 0) & (confidence <= 1)).all()):  # softmax divides by a sum that is no smaller
        raise GraftError("calibration: got a confidence outside 0 to 1; expected probabilities, not logits")
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    at = torch.bucketize(confidence, edges[1:-1])  # right-closed, and 0 goes with the first bin
    count = torch.bincount(at, minlength=bins)
    sums = [torch.bincount(at, v, minlength=bins) for v in (confidence, right.double())]
    return Calibration(edges, count, sums[0] / count, sums[1] / count)  # 0/0 is NaN


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[Any], logits_fn: LogitsFn | None = None) -> Predictions:
    """What a model says, in evaluation mode (each module's mode is put back).

    Args:
        batches: read once. logits_fn: `(model, batch) -> (logits [B, C], labels [B])`; by default a batch is a pair of
            inputs and labels, or a mapping with `labels`, and the model gives logits or an output that has them.

    Raises:
        GraftError: no batches, one without labels, or logits that are not finite.
    """
    found: list[Tensor] = []
    labels: list[Tensor] = []
    with Evaluating(model):
        for batch in batches:
            if logits_fn is None:
                inputs, y = reading.split(batch)
                logits = reading.logits(model, inputs)
            else:
                logits, y = logits_fn(model, batch)
            if y is None:
                raise GraftError("batches: got one without labels, expected (inputs, labels)")
            found.append(logits.cpu().double().softmax(-1))
            labels.append(y.cpu())
    if not found:
        raise GraftError("batches: got none, expected at least one with labelled examples")
    return Predictions(torch.cat(found), torch.cat(labels))


def agreement(a: Predictions, b: Predictions) -> float:
    """Share of the examples for which two models say the same, right or wrong.

    Raises:
        GraftError: predictions of different examples.
    """
    if a.labels.shape != b.labels.shape or not torch.equal(a.labels, b.labels):
        raise GraftError(
            f"agreement: got predictions of {len(a.labels)} and of {len(b.labels)} examples that are not the same; "
            "predict both from the same batches in the same order"
        )
    return float((a.predicted == b.predicted).double().mean())


def gain_kept(pretrained: float, finetuned: float, grafted: float) -> float:
    """`(grafted - pretrained) / (finetuned - pretrained)`: the share of what fine-tuning gained that a graft keeps.

    Above 1 the graft is better than the fine-tuned model, below 0 worse than the pretrained one. NaN where fine-tuning
    gained nothing: there is no share of nothing, and a table of several tasks should not fail for one of them.
    """
    gain = finetuned - pretrained
    return (grafted - pretrained) / gain if gain > 0 else float("nan")
