"""Regularisers that keep coefficients small, and the distance between task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..vectors.task_vector import TaskVector


def penalty(coefficients: Tensor, p: int = 1, weight: float = 0.5) -> Tensor:
    """`weight * mean_j ||lambda_:j||_p`: the norm over vectors, averaged over groups (Zhang et al. 2024; weight 0.5).

    Args:
        coefficients: lambda, `[T, G]`. p: 1 makes most of them zero, 2 drops whole groups.

    Raises:
        ConfigError: p is another number.
    """
    if p not in (1, 2):
        raise ConfigError(f"p: got {p!r}, expected 1 or 2")
    return weight * torch.linalg.vector_norm(coefficients, p, dim=0).mean()


def cosines(vectors: Sequence[TaskVector]) -> Tensor:
    """`[T, T]` cosines between task vectors; 0 off the diagonal = nothing in common (Ilharco et al. 2023, fig. 5)."""
    out = torch.eye(len(vectors), dtype=torch.float64)
    for i, a in enumerate(vectors):
        for k in range(i):
            out[i, k] = out[k, i] = a.cosine(vectors[k])
    return out
