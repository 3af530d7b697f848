"""Measures of continual learning over the accuracy matrix R.

`R[i, j]` is the accuracy on task j's test set after task i was learned; NaN where it was not measured (a task that is
not learned yet has no gates to be tested with). T is the number of tasks, counted from 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..calls import Head, outputs
from ..data.batches import Batches
from ..errors import ConfigError
from ..lend import Evaluating


def top1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of rows whose largest logit is at the label."""
    return float((logits.argmax(-1) == labels.to(logits.device)).double().mean())


def matrix(rows: list[list[float]]) -> np.ndarray:
    """Rows of growing length as a square matrix, NaN above the diagonal. Raises `ConfigError` if a row is too long."""
    out = np.full((len(rows), len(rows)), np.nan)
    for i, row in enumerate(rows):
        if len(row) > len(rows):
            raise ConfigError(f"accuracy matrix: row {i} has {len(row)} entries, expected at most {len(rows)}")
        out[i, : len(row)] = row
    return out


def average_accuracy(r: np.ndarray) -> float:
    """Mean accuracy over all tasks at the end: `1/T sum_j R[T-1, j]` (Lopez-Paz and Ranzato 2017)."""
    return float(_square(r)[-1].mean())


def forgetting(r: np.ndarray) -> float:
    """How much the earlier tasks lost since their best: `1/(T-1) sum_{j<T-1} max_{j<=i<T-1} R[i, j] - R[T-1, j]`
    (Chaudhry et al. 2018). 0 where nothing was forgotten, also for a single task."""
    r = _square(r)
    losses = [r[j:-1, j].max() - r[-1, j] for j in range(len(r) - 1)]
    return float(np.mean(losses)) if losses else 0.0


def backward_transfer(r: np.ndarray) -> float:
    """What later learning did to earlier tasks: `1/(T-1) sum_{j<T-1} R[T-1, j] - R[j, j]` (Lopez-Paz and Ranzato 2017).
    0 for a single task."""
    r = _square(r)
    gains = [r[-1, j] - r[j, j] for j in range(len(r) - 1)]
    return float(np.mean(gains)) if gains else 0.0


def forward_transfer(r: np.ndarray, baseline: np.ndarray) -> float:
    """What earlier learning gave to a task before it was learned: `1/(T-1) sum_{j>0} R[j-1, j] - baseline[j]`, with
    `baseline[j]` the accuracy of an untrained model (Lopez-Paz and Ranzato 2017). NaN where `R[j-1, j]` was not
    measured, as under hard attention, whose tasks cannot be tested before they are learned."""
    r = _square(r)
    if len(baseline) != len(r):
        raise ConfigError(f"forward transfer: got {len(baseline)} baselines, expected one for each of {len(r)} tasks")
    gains = [r[j - 1, j] - baseline[j] for j in range(1, len(r))]
    return float(np.mean(gains)) if gains else 0.0


def zero_shot_transfer(r: np.ndarray) -> float:
    """Forward transfer without a baseline: `1/(T-1) sum_{j>0} R[j-1, j]`, each task's score just before it is learned
    (what TaSL's evaluation reports as FWT; Feng et al. 2024, arXiv 2408.05200). 0 for a single task."""
    return forward_transfer(r, np.zeros(len(r)))


def joint_goal_accuracy(turns: Sequence[Hashable], hits: Sequence[bool]) -> float:
    """Joint goal accuracy of dialogue state tracking: the share of turns of which every slot is right.

    Args:
        turns: for each slot, which turn it belongs to (dialogue, turn and service). hits: for each slot, whether its
            value was predicted.

    Raises:
        ConfigError: no slots, or lists of different length.
    """
    if len(turns) != len(hits) or not turns:
        raise ConfigError(
            f"joint goal accuracy: got {len(turns)} turns and {len(hits)} hits, expected one of each slot"
        )
    whole: dict[Hashable, bool] = {}
    for turn, hit in zip(turns, hits, strict=True):
        whole[turn] = whole.get(turn, True) and bool(hit)
    return sum(whole.values()) / len(whole)


def _square(r: np.ndarray) -> np.ndarray:
    if r.ndim != 2 or r.shape[0] != r.shape[1] or len(r) == 0:
        raise ConfigError(f"accuracy matrix: got shape {list(r.shape)}, expected T x T (task learned x task tested)")
    return r


def accuracy(model: nn.Module, batches: Batches, head: Head | None = None) -> float:
    """Share of examples whose largest logit is at the label, in evaluation mode (the mode is put back).

    Raises:
        ConfigError: no examples.
    """
    right, total = counts(model, batches, head)
    return float(right.sum()) / float(total.sum())


def accuracy_per_class(model: nn.Module, batches: Batches, head: Head | None = None) -> Tensor:
    """`[C]`; NaN for a class without examples."""
    right, total = counts(model, batches, head)
    return right / total


@torch.no_grad()
def counts(model: nn.Module, batches: Batches, head: Head | None = None) -> tuple[Tensor, Tensor]:
    """Right answers and examples per class, `[C]` float64."""
    right = total = torch.zeros(0, dtype=torch.float64)
    with Evaluating(model):
        for inputs, labels in batches:
            logits = outputs(model, inputs, head)
            labels = labels.to(logits.device)
            hits = (logits.argmax(-1) == labels).double()
            classes = max(logits.shape[-1], len(right))
            right = _plus(right, torch.bincount(labels, hits, classes).cpu())
            total = _plus(total, torch.bincount(labels, minlength=classes).double().cpu())
    if not total.sum() > 0:
        raise ConfigError("accuracy: the batches hold no examples; is an iterator used up? Pass a list or a DataLoader")
    return right, total


def _plus(a: Tensor, b: Tensor) -> Tensor:
    n = max(len(a), len(b))
    return nn.functional.pad(a, (0, n - len(a))) + nn.functional.pad(b, (0, n - len(b)))
