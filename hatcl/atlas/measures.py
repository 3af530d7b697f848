"""Accuracy: absolute, per class, and as a share of the fine-tuned model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..vectors.compose import Composer


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
