"""Model Stock. Jang et al. 2024, arXiv 2403.19522."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from ...config import flag, number
from ...errors import ConfigError
from ..task_vector import TaskVector
from .blocks import average, blockwise
from .registry import merge_method

SINGULAR = 1e-6  # a denominator nearer to zero than this has no answer (mergekit's)


@merge_method("model_stock", paper="Jang et al. 2024, arXiv 2403.19522")
def model_stock(vectors: Sequence[TaskVector], *, rows: bool = False, floor: float = 0.0) -> TaskVector:
    """The mean, drawn towards the pretrained weights by the angle between the vectors:

        tau = r mean_t tau_t,   r = N cos(a) / (1 + (N - 1) cos(a)),   cos(a) the mean over pairs of vectors

    tensor by tensor (the paper's layer). Needs no data. Where the denominator is 0 (opposite vectors) the pretrained
    weights stay.

    Args:
        rows: an angle for each row (along the last dimension) instead, mergekit's `filter_wise`.
        floor: products of two norms are taken to be at least this. mergekit has 1e-6, which exceeds those of many
            tensors in light fine-tunings and pulls them to the pretrained weights.

    Raises:
        ConfigError: fewer than two vectors, or a negative floor.
    """
    flag("rows", rows)
    least = number("floor", floor, 0)
    if len(vectors) < 2:
        raise ConfigError(f"model_stock: got {len(vectors)} vector, expected two or more: it takes the angles of pairs")

    def one(_: str, taus: list[Tensor]) -> Tensor:
        flat = [tau.double() if rows and tau.dim() else tau.double().reshape(-1) for tau in taus]
        norms = [x.norm(dim=-1) for x in flat]
        cosines = []
        for i, j in combinations(range(len(flat)), 2):
            size = (norms[i] * norms[j]).clamp(min=least)
            cosines.append(torch.where(size > 0, (flat[i] * flat[j]).sum(-1) / size, 0).clamp_(-1, 1))
        cosine = torch.stack(cosines).mean(0).unsqueeze(-1)
        below = 1 + (len(flat) - 1) * cosine
        ratio = torch.where(below.abs() < SINGULAR, 0, len(flat) * cosine / below)
        return (ratio * average(flat)).reshape(taus[0].shape)

    return blockwise(vectors, one)
