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
        ConfigError: the fine-tuned accuracy is not above 0.
    """
    if not finetuned > 0:
        raise ConfigError(f"finetuned: got {finetuned!r}, expected an accuracy above 0")
    return composed / finetuned


def sweep(composer: Composer, scales: Sequence[float], measure: Callable[[], float]) -> Tensor:
    """The values of `measure()` with one vector at a time at each of the scales, the same for all its groups: `[T, S]`.

    With vectors fine-tuned on single classes this is the paper's sweep of class vectors. The coefficients are restored.
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
