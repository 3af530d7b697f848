"""TIES: trim, elect sign, merge. Yadav et al. 2023, arXiv 2306.01708."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...config import flag, number, one_of
from ..select import Cut, largest
from ..task_vector import TaskVector
from ..tensors import Lazy
from .blocks import PerVector, blockwise, each, rescaled, rescaling, shares, weighted
from .registry import merge_method


@merge_method("ties", paper="Yadav et al. 2023, arXiv 2306.01708")
def ties(
    vectors: Sequence[TaskVector],
    *,
    density: PerVector = 0.2,
    scale: float = 1.0,
    weights: PerVector | None = None,
    normalise: bool = True,
    rescale: str = "none",
    undecided: str = "zero",
) -> TaskVector:
    """Keep the share `density` of largest magnitude of each whole vector, give each element the sign that has more
    mass, and average the kept elements that have it:

        gamma = sign(sum_t w_t tau'_t)
        tau = scale * sum of {w_t tau'_t : sign(w_t tau'_t) = gamma} / sum of their w_t

    Needs no data. Exactly `int(density * N)` elements are kept (but one if that is 0 and the density is not); of equal
    ones the first by name and place. The paper has no weights (each is 1) and averages.

    Args:
        density: one for all vectors, or one per vector. weights: one per vector, default 1 each.
        normalise: divide by the weights of those that agree; False gives their sum.
        rescale: `l1` restores each trimmed tensor's sum of magnitudes; `none` is the paper's.
        undecided: the result where both signs have the same mass. `zero`: the result is 0, by the paper's formula (the
            authors' code takes the sign of most elements of the whole model, which a single tensor does not show);
            `positive`: the positive ones count, as in mergekit.

    Raises:
        ConfigError: a density outside 0 to 1, or another word than these.
    """
    factor, w, elect = number("scale", scale), shares(weights, vectors), election(normalise, undecided)
    how = rescaling(rescale, ("l1", "none"))
    cuts = [
        cut(v, v.__getitem__, share) for v, share in zip(vectors, each("density", density, vectors, 0, 1), strict=True)
    ]

    def one(name: str, taus: list[Tensor]) -> Tensor:
        kept = trimmed(name, taus, cuts)
        return elect([rescaled(k, tau, how) for k, tau in zip(kept, taus, strict=True)], w) * factor

    return blockwise(vectors, one)


def cut(vector: TaskVector, read: Callable[[str], Tensor], share: float) -> Cut:
    """The share of largest magnitude of all that `read` gives by the vector's names. Which of equal elements come
    first is settled by the names, as files and models list their tensors in different orders."""
    by_name: Lazy[Tensor] = Lazy({n: vector.kinds[n] for n in sorted(vector.kinds)}, read)
    return largest(by_name, max(int(share * vector.numel), 1) if share else 0)


def trimmed(name: str, taus: Sequence[Tensor], cuts: Sequence[Cut]) -> list[Tensor]:
    """The tensors with zeros outside the cuts."""
    return [torch.where(c.mask(name, tau), tau, 0) for c, tau in zip(cuts, taus, strict=True)]


Elect = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
UNDECIDED = ("zero", "positive")


def election(normalise: bool, undecided: str) -> Elect:
    """`elected` with these options, checked. Raises `ConfigError`."""
    flag("normalise", normalise)
    one_of("undecided", undecided, UNDECIDED)
    return functools.partial(elected, normalise=normalise, positive=undecided == "positive")


def elected(
    taus: Sequence[Tensor], weights: Sequence[float], *, normalise: bool = True, positive: bool = False
) -> Tensor:
    """The weighted mean, or sum, over those elements that have the elected sign, as float64; 0 where none has.

    Args:
        positive: the sign where both have the same mass; otherwise there is none.
    """
    sign = weighted(taus, weights).sign_()
    if positive:
        sign[sign == 0] = 1
    total, held = torch.zeros_like(sign), torch.zeros_like(sign)
    for w, tau in zip(weights, taus, strict=True):
        agrees = (tau.sign() * math.copysign(1, w) == sign) & (sign != 0) & (w != 0)
        total += torch.where(agrees, tau.double() * w, 0)
        held += agrees.double() * w
    if not normalise:
        return total
    held[held == 0] = 1
    return total / held
