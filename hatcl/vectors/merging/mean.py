"""The mean. Wortsman et al. 2022, arXiv 2203.05482 (uniform soup)."""

from __future__ import annotations

from collections.abc import Sequence

from ...config import flag
from ..task_vector import TaskVector
from .blocks import PerVector, blockwise, shares, summed
from .registry import merge_method


@merge_method("mean", paper="Wortsman et al. 2022, arXiv 2203.05482")
def mean(vectors: Sequence[TaskVector], *, weights: PerVector | None = None, normalise: bool = True) -> TaskVector:
    """`tau = sum_t w_t tau_t / sum_t w_t`: the mean of the fine-tuned models. Needs no data.

    Args:
        weights: one per vector, default 1 each. normalise: divide by their sum, unless that is 0 (mergekit's
            rule).

    Raises:
        ConfigError: weights are not numbers, or not one per vector.
    """
    flag("normalise", normalise)
    w = shares(weights, vectors)
    return blockwise(vectors, lambda _, taus: summed(taus, w, normalise))
