"""TIES: trim, elect sign, merge. Yadav et al. 2023, arXiv 2306.01708."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...config import number
from ..select import Cut, largest
from ..task_vector import TaskVector
from ..tensors import Lazy
from .blocks import blockwise, weighted
from .registry import merge_method


@merge_method("ties", paper="Yadav et al. 2023, arXiv 2306.01708")
def ties(vectors: Sequence[TaskVector], *, density: float = 0.2, scale: float = 1.0) -> TaskVector:
    """Keep the share `density` of largest magnitude of each whole vector, give each element the sign that has more
    mass, and average the kept elements that have it:

        gamma = sign(sum_t tau'_t),   tau = scale * mean of {tau'_t : sign(tau'_t) = gamma}

    Needs no data. Exactly `int(density * N)` elements are kept, of equal ones the first by name and place. Where both
    signs have the same mass the result is 0, by the paper's formula; the authors' code takes the sign that more
    elements of the whole model have, which no single tensor knows.

    Raises:
        ConfigError: a density outside 0 to 1.
    """
    share, factor = number("density", density, 0, 1), number("scale", scale)
    cuts = [cut(v, v.__getitem__, share) for v in vectors]
    return blockwise(vectors, lambda name, taus: elected_mean(trimmed(name, taus, cuts)) * factor)


def cut(vector: TaskVector, read: Callable[[str], Tensor], share: float) -> Cut:
    """The share of largest magnitude of all that `read` gives by the vector's names. Which of equal elements come
    first is settled by the names, as files and models list their tensors in different orders."""
    by_name: Lazy[Tensor] = Lazy({n: vector.kinds[n] for n in sorted(vector.kinds)}, read)
    return largest(by_name, int(share * vector.numel))


def trimmed(name: str, taus: Sequence[Tensor], cuts: Sequence[Cut]) -> list[Tensor]:
    """Zero outside of the cuts."""
    return [torch.where(c.mask(name, tau), tau, 0) for c, tau in zip(cuts, taus, strict=True)]


def elected_mean(taus: Sequence[Tensor]) -> Tensor:
    """The mean over those elements that have the elected sign, as float64; 0 where none has."""
    sign = weighted(taus, [1.0] * len(taus)).sign_()
    total, votes = torch.zeros_like(sign), torch.zeros_like(sign)
    for tau in taus:
        agrees = (tau.sign() == sign) & (sign != 0)
        total += torch.where(agrees, tau, 0)
        votes += agrees
    return total / votes.clamp_(min=1)
