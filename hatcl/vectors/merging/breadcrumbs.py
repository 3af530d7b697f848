"""Model Breadcrumbs. Davari and Belilovsky 2023, arXiv 2312.06795."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...config import flag, number
from ..select import largest
from ..task_vector import TaskVector
from .blocks import PerVector, blockwise, each, rescaled, rescaling, shares, summed
from .registry import merge_method
from .ties import election

CRUMBS_PAPER = "Davari and Belilovsky 2023, arXiv 2312.06795"


@merge_method("breadcrumbs", paper=CRUMBS_PAPER)
def breadcrumbs(
    vectors: Sequence[TaskVector],
    *,
    density: PerVector = 0.15,
    outliers: PerVector = 0.006,
    scale: float = 0.2,
    weights: PerVector | None = None,
    normalise: bool = False,
    rescale: str = "none",
) -> TaskVector:
    """`tau = scale * sum_t w_t m_t tau_t`, where the mask of a layer drops both tails of its magnitudes: the share
    `outliers` of the largest ones, and all but the share `density` of those that follow.

    Needs no data. The defaults are the start of the authors' search. A layer is a tensor here, as in the
    paper's text; the authors' code masks each row of it. Tensors without dimensions are kept. If the two shares sum to
    more than 1, fewer of the largest are dropped, so that the density holds.

    Args:
        density, outliers: one for all vectors, or one per vector. weights: one per vector, default 1 each.
        normalise: divide by the sum of the weights. rescale: `l1` gives each tensor the sum of magnitudes that it had.

    Raises:
        ConfigError: a share outside 0 to 1.
    """
    flag("normalise", normalise)
    factor, w = number("scale", scale), shares(weights, vectors)
    crumbs = banding(vectors, density, outliers, rescale)
    return blockwise(vectors, lambda _, taus: summed(crumbs(taus), w, normalise) * factor)


@merge_method("breadcrumbs_ties", paper=f"{CRUMBS_PAPER}; Yadav et al. 2023, arXiv 2306.01708; together in mergekit")
def breadcrumbs_ties(
    vectors: Sequence[TaskVector],
    *,
    density: PerVector = 0.15,
    outliers: PerVector = 0.006,
    scale: float = 1.0,
    weights: PerVector | None = None,
    normalise: bool = True,
    rescale: str = "none",
    undecided: str = "zero",
) -> TaskVector:
    """The masks of `breadcrumbs`, merged by the elected signs of `ties`. Needs no data.

    Args:
        density, outliers, rescale: as in `breadcrumbs`. weights, normalise, undecided: as in `ties`.

    Raises:
        ConfigError: a share outside 0 to 1.
    """
    factor, w, elect = number("scale", scale), shares(weights, vectors), election(normalise, undecided)
    crumbs = banding(vectors, density, outliers, rescale)
    return blockwise(vectors, lambda _, taus: elect(crumbs(taus), w) * factor)


def banding(
    vectors: Sequence[TaskVector], density: PerVector, outliers: PerVector, rescale: str
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """A function that applies the masks to a tensor of each vector and rescales it. Raises `ConfigError`."""
    keep, top = each("density", density, vectors, 0, 1), each("outliers", outliers, vectors, 0, 1)
    how = rescaling(rescale, ("l1", "none"))

    def crumbs(taus: Sequence[Tensor]) -> list[Tensor]:
        return [rescaled(_band(tau, k, t), tau, how) for tau, k, t in zip(taus, keep, top, strict=True)]

    return crumbs


def _band(tau: Tensor, keep: float, top: float) -> Tensor:
    if not tau.dim():
        return tau
    count = int(keep * tau.numel())
    skipped = min(int(top * tau.numel()), tau.numel() - count)
    over = largest({"": tau}, skipped).mask("", tau)
    held = largest({"": tau}, skipped + count).mask("", tau)
    return torch.where(held & ~over, tau, 0)
