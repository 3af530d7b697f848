"""Multi-SLERP: a weighted mean of directions in the tangent space. mergekit (Goddard et al. 2024, arXiv 2403.13257)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config import flag
from ...errors import ConfigError, VectorError
from ..task_vector import TaskVector
from .blocks import PerVector, blockwise, shares, weighted
from .registry import merge_method

LEAST = 1e-8  # added to norms that are divided by (mergekit's)


@merge_method("multislerp", paper="mergekit; Goddard et al. 2024, arXiv 2403.13257")
def multislerp(
    vectors: Sequence[TaskVector], *, weights: PerVector | None = None, normalise: bool = True
) -> TaskVector:
    """Tensor by tensor: with `u_t = tau_t / |tau_t|` and m the direction of `sum_t w_t u_t`, the tangents
    `u_t - <u_t, m> m` are averaged by the weights, and the mean v is followed from m along the sphere:

        tau = (sum_t w_t |tau_t|) (cos|v| m + sin|v| v / |v|)

    Needs no data.

    Args:
        weights: one per vector, default 1 each. normalise: divide them by their sum.

    Raises:
        ConfigError: weights that sum to 0. VectorError: directions that cancel out (where asked for, if from files),
            but for two vectors, which are then added by the weights.
    """
    flag("normalise", normalise)
    w = shares(weights, vectors)
    total = sum(w) if normalise else 1.0
    if not total:
        raise ConfigError("weights: they sum to 0; pass others, or normalise=False")
    w = [x / total for x in w]

    def one(name: str, taus: list[Tensor]) -> Tensor:
        if len(taus) == 1 or not any(bool(tau.any()) for tau in taus):
            return taus[0]
        flat = [tau.double().reshape(-1) for tau in taus]
        norms = [float(x.norm()) for x in flat]
        units = [x / (n + LEAST) for x, n in zip(flat, norms, strict=True)]
        mean = weighted(units, w)
        size = float(mean.norm())
        if size < LEAST:
            if len(taus) == 2:
                return weighted(taus, w)
            raise VectorError(f"{name}: the directions cancel each other out; choose other weights")
        mean /= size
        way = weighted([u - torch.dot(u, mean) * mean for u in units], w)
        length = way.norm() + LEAST
        point = torch.cos(length) * mean + torch.sin(length) / length * way
        return (point * sum(x * n for x, n in zip(w, norms, strict=True))).reshape(taus[0].shape)

    return blockwise(vectors, one)
