"""MagMax. Marczak et al. 2024, arXiv 2407.06322."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config import number
from ..task_vector import TaskVector
from .blocks import blockwise
from .registry import merge_method


@merge_method("magmax", paper="Marczak et al. 2024, arXiv 2407.06322")
def magmax(vectors: Sequence[TaskVector], *, scale: float = 1.0) -> TaskVector:
    """Each element from the vector in which it is largest in magnitude: `tau = scale * tau_t*, t* = argmax_t |tau_t|`.

    Needs no data. Made for vectors of tasks learned one after another (each still from the first base). Of equal
    magnitudes the positive one is taken, so that the order does not matter; the authors' code takes the last.
    """
    factor = number("scale", scale)

    def one(_: str, taus: list[Tensor]) -> Tensor:
        best = taus[0]
        for tau in taus[1:]:
            larger = (tau.abs() > best.abs()) | ((tau.abs() == best.abs()) & (tau > best))
            best = torch.where(larger, tau, best)
        return best * factor

    return blockwise(vectors, one)
