"""Accuracy: absolute, per class, and as a share of the fine-tuned model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..lend import Evaluating
from ..vectors.compose import Composer
from .tasks import Batches, Head, outputs


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


def normalised(composed: float, finetuned: float) -> float:
    """`composed / finetuned`: the share of the fine-tuned model's accuracy that is kept (Ilharco et al. 2023).

    Raises:
        ConfigError: a fine-tuned model without any accuracy.
    """
    if not finetuned > 0:
        raise ConfigError(f"finetuned: got {finetuned!r}, expected an accuracy above 0")
    return composed / finetuned


def sweep(composer: Composer, scales: Sequence[float], measure: Callable[[], float]) -> Tensor:
    """What `measure()` says with one vector at a time at each of the scales, all of its groups alike: `[T, S]`.

    With vectors fine-tuned on single classes this is the paper's sweep of class vectors. The coefficients are put
    back.
    """
    before = composer.coefficients.detach().clone()
    out = torch.zeros(len(before), len(scales), dtype=torch.float64)
    try:
        with torch.no_grad():
            for i in range(len(before)):
                for k, scale in enumerate(scales):
                    composer.coefficients.zero_()
                    composer.coefficients[i] = scale
                    out[i, k] = measure()
    finally:
        composer.coefficients.data.copy_(before)
    return out


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
