"""EMR-merging: elect, mask, rescale. Huang et al. 2024, arXiv 2405.17461."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..task_vector import TaskVector
from .blocks import blockwise, weighted
from .registry import merge_method


@merge_method("emr", paper="Huang et al. 2024, arXiv 2405.17461")
def emr(vectors: Sequence[TaskVector]) -> TaskVector:
    """The elected vector, with the sign that has more mass and the largest magnitude among those that have it (3.2):

        gamma = sign(sum_t tau_t),   tau = gamma * max over {t : sign(tau_t) = gamma} of |tau_t|

    Needs no data. All tasks share this vector; by itself it is larger than any task's, and the paper does not use it
    alone: each task has its mask and its scale, see `emr_parts`. Where both signs have the same mass the result is 0,
    by the paper's formula (the authors' code takes the negative sign).
    """
    return blockwise(vectors, lambda _, taus: unified(taus))


def unified(taus: Sequence[Tensor]) -> Tensor:
    """One tensor of `emr`."""
    sign = weighted(taus, [1.0] * len(taus)).sign().to(taus[0].dtype)
    largest = torch.zeros_like(sign)
    for tau in taus:
        largest = torch.maximum(largest, (tau * sign).to(largest))
    return largest * sign


def emr_parts(vectors: Sequence[TaskVector]) -> list[tuple[float, TaskVector]]:
    """Each task's scale and masked part of the elected vector tau (3.2):

        m_t = 1[tau_t * tau > 0],   lambda_t = sum |tau_t| / sum |m_t * tau|

    `lambda_t * (m_t * tau)` is the task's own vector. As a graft (`hatcl.grafts.task_grafts`) it takes one bit per
    element and one number in addition to tau. Reads every tensor once. The sums are over all elements, as in the paper;
    the authors' code sums the means of the tensors, so that a bias counts as much as a matrix.
    """
    kinds = vectors[0]._map(lambda _, d, *others: d, *vectors[1:]).kinds
    mass: list[list[float]] = [[] for _ in vectors]
    kept: list[list[float]] = [[] for _ in vectors]
    for name, kind in kinds.items():
        taus = [v[name] if name in v else torch.zeros(kind.shape, dtype=kind.dtype) for v in vectors]
        tau = unified(taus)
        for task, own in enumerate(taus):
            mass[task].append(float(own.double().abs().sum()))
            kept[task].append(float(_agreeing(own, tau).double().abs().sum()))
    scales = [math.fsum(m) / math.fsum(k) if math.fsum(k) else 1.0 for m, k in zip(mass, kept, strict=True)]
    return [(scale, _own_part(vectors, task)) for task, scale in enumerate(scales)]


def _own_part(vectors: Sequence[TaskVector], task: int) -> TaskVector:
    return blockwise(vectors, lambda _, taus: _agreeing(taus[task], unified(taus)))


def _agreeing(own: Tensor, tau: Tensor) -> Tensor:
    return torch.where(own.sign() == tau.sign(), tau, 0)  # their product would underflow
