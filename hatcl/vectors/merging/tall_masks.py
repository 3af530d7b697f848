"""TALL-masks and Consensus merging. Wang et al. 2024, arXiv 2405.07813."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config import number, whole
from ...errors import ConfigError
from ..task_vector import TaskVector
from .blocks import blockwise, weighted
from .registry import merge_method


@merge_method("consensus", paper="Wang et al. 2024, arXiv 2405.07813")
def consensus(
    vectors: Sequence[TaskVector], *, threshold: float = 0.4, agree: int = 2, scale: float = 0.4
) -> TaskVector:
    """The sum of the vectors where at least `agree` tasks need it (eq. 5 and 6): elements that only one task needs
    (selfish) or none (catastrophic) are zero.

        tau = scale * 1[sum_t m_t >= agree] * sum_t tau_t,   m_t: the `tall_masks`

    Needs no data; the paper chooses the scale, and one threshold per task, on validation data. Here there is one
    threshold for all, by default the middle of its grid 0.2 to 0.6.

    Raises:
        ConfigError: a negative threshold, or more tasks to agree than there are.
    """
    least, bound, factor = whole("agree", agree), number("threshold", threshold, 0), number("scale", scale)
    if least > len(vectors):
        raise ConfigError(f"agree: got {least} of {len(vectors)} tasks, expected at most {len(vectors)}")

    def one(_: str, taus: list[Tensor]) -> Tensor:
        total = weighted(taus, [1.0] * len(taus))
        votes = sum((tall_mask(tau, total, bound).int() for tau in taus), torch.zeros((), dtype=torch.int32))
        return torch.where(votes >= least, total * factor, 0)

    return blockwise(vectors, one)


def tall_masks(vectors: Sequence[TaskVector], threshold: float | Sequence[float] = 0.4) -> list[TaskVector]:
    """Each task's own part of the sum of all vectors (eq. 4): `m_t * sum_s tau_s`. Lazy where the vectors are.

        m_t = 1[ |tau_t| > threshold * |sum_s tau_s - tau_t| ]

    As a graft (`hatcl.grafts.task_grafts`) it takes one bit per element in addition to the sum. The inequality is
    strict, as in the authors' code, so that elements that no task changed are in no mask (the paper's text has `>=`).

    Args:
        threshold: one for all tasks or one per task; the paper takes the best of 0.2, 0.3, ..., 0.6 on validation data.
    """
    every = [threshold] * len(vectors) if isinstance(threshold, (int, float)) else list(threshold)
    if len(every) != len(vectors):
        raise ConfigError(f"threshold: got {len(every)}, expected one number or {len(vectors)}, one per vector")
    bounds = [number("threshold", b, 0) for b in every]

    def of(task: int) -> TaskVector:
        def one(_: str, taus: list[Tensor]) -> Tensor:
            total = weighted(taus, [1.0] * len(taus))
            return torch.where(tall_mask(taus[task], total, bounds[task]), total, 0)

        return blockwise(vectors, one)

    return [of(task) for task in range(len(vectors))]


def tall_mask(tau: Tensor, total: Tensor, threshold: float) -> Tensor:
    """Bool: where a task's update is large compared with the sum of the others."""
    return tau.double().abs() > threshold * (total - tau).abs()
