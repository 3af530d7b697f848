"""Task arithmetic. Ilharco et al. 2023, arXiv 2212.04089."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ...config import flag, number
from ...errors import ConfigError
from ..task_vector import TaskVector
from .blocks import PerVector, blockwise, shares, summed
from .registry import merge_method

log = logging.getLogger(__name__)
GRID = tuple(i / 20 for i in range(21))  # the paper's: 0.0, 0.05, ..., 1.0


@merge_method("arithmetic", paper="Ilharco et al. 2023, arXiv 2212.04089")
def arithmetic(
    vectors: Sequence[TaskVector],
    *,
    scale: float | None = None,
    weights: PerVector | None = None,
    normalise: bool = False,
    evaluate: Callable[[Any], float] | None = None,
    scales: Sequence[float] | None = None,
    model: nn.Module | None = None,
) -> TaskVector:
    """`tau = scale * sum_t w_t tau_t`.

    Needs no data, or a validation set: with `evaluate` the scale is the one of the grid that scores highest.

    Args:
        scale: default 0.4, which Yadav et al. 2023 report as the authors' advice without validation.
        weights: one per vector, default 1 each. normalise: divide by their sum.
        evaluate: scores a candidate on a validation set; higher is better. It receives the model with the candidate
        applied if `model` is given, otherwise the candidate vector.
        scales: the grid, default 0, 0.05, ..., 1. model: the base.

    Raises:
        ConfigError: `scale` is given with `evaluate`, or `scales` or `model` without it; there are no scales; or a
            score is not a finite number.
    """
    flag("normalise", normalise)
    w = shares(weights, vectors)
    if evaluate is None:
        for option, value in (("scales", scales), ("model", model)):
            if value is not None:
                raise ConfigError(f"{option} is for the search of the scale; pass evaluate= as well")
        factor = number("scale", 0.4 if scale is None else scale)
        return blockwise(vectors, lambda _, taus: summed(taus, w, normalise) * factor)
    if scale is not None:
        raise ConfigError(f"scale: got {scale!r} together with evaluate, which searches for it; pass one of them")
    total = blockwise(vectors, lambda _, taus: summed(taus, w, normalise))
    scores = search_scale(total, evaluate, GRID if scales is None else scales, model)
    best = max(scores, key=lambda s: scores[s])  # of equal ones the first
    log.info("arithmetic: scale %g scores %g; all: %s", best, scores[best], scores)
    return blockwise(vectors, lambda _, taus: summed(taus, w, normalise) * best)


def search_scale(
    vector: TaskVector,
    evaluate: Callable[[Any], float],
    scales: Sequence[float] = GRID,
    model: nn.Module | None = None,
) -> dict[float, float]:
    """Scale -> score of `scale * vector`, in the grid's order. Arguments and errors are those of `arithmetic`."""
    grid = [number("scales", s) for s in scales]
    if not grid:
        raise ConfigError("scales: got none, expected at least one scale to try")
    if model is not None:
        vector = vector.in_memory()  # a model is in memory anyway
    scores: dict[float, float] = {}
    for i, s in enumerate(grid):
        # one check of the base is enough
        candidate = vector * s if model is None else vector.apply_to(model, s, check=i == 0)
        score = float(evaluate(candidate))
        if not math.isfinite(score):
            raise ConfigError(f"evaluate: got {score} at scale {s:g}, expected a finite score, the higher the better")
        scores[s] = score
    return scores
