"""Merge only weights of two models that are close to each other. alchemonaut 2024 (the model QuartetAnemoi-70B-t0.0001,
named by mergekit, Goddard et al. 2024, arXiv 2403.13257)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config import number
from ...errors import ConfigError
from ..task_vector import TaskVector
from .blocks import blockwise
from .registry import merge_method


@merge_method("nearswap", paper="alchemonaut 2024, as in Goddard et al. 2024, arXiv 2403.13257")
def nearswap(vectors: Sequence[TaskVector], *, t: float = 1e-4, floor: float = 0.0) -> TaskVector:
    """Element by element `w tau` with `w = min(1, t / max(|tau|, floor))`: changes of up to t are kept, larger ones are
    cut to t with their sign.

    Needs no data. It takes one vector, since in mergekit it pulls one model to a base.

    Args:
        t: how far an element may move. floor: smaller changes count as this (mergekit has 1e-6, which matters if t is
            smaller).

    Raises:
        ConfigError: more than one vector, or a negative t or floor.
    """
    if len(vectors) != 1:
        raise ConfigError(f"nearswap: got {len(vectors)} vectors, expected 1; merge the others first")
    far, least = number("t", t, 0), number("floor", floor, 0)

    def one(_: str, taus: list[Tensor]) -> Tensor:
        size = taus[0].double().abs().clamp_(min=max(least, torch.finfo(torch.float64).tiny))
        return taus[0] * (far / size).clamp_(max=1)

    return blockwise(vectors, one)
