"""Model Breadcrumbs. Davari and Belilovsky 2023, arXiv 2312.06795."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config import number
from ..select import largest
from ..task_vector import TaskVector
from .blocks import blockwise, weighted
from .registry import merge_method


@merge_method("breadcrumbs", paper="Davari and Belilovsky 2023, arXiv 2312.06795")
def breadcrumbs(
    vectors: Sequence[TaskVector], *, density: float = 0.15, outliers: float = 0.006, scale: float = 0.2
) -> TaskVector:
    """`tau = scale * sum_t m_t tau_t`, where the mask of a layer drops both tails of its magnitudes: the share
    `outliers` of largest ones, and all but the share `density` of what follows.

    Needs no data. The defaults are the point from which the authors' search starts. A layer is a tensor here, as in the
    paper's text; the authors' code masks each row of it. Tensors without dimensions are kept whole.

    Raises:
        ConfigError: a share outside 0 to 1.
    """
    keep, top, factor = number("density", density, 0, 1), number("outliers", outliers, 0, 1), number("scale", scale)
    return blockwise(
        vectors, lambda _, taus: weighted([_band(tau, keep, top) for tau in taus], [1.0] * len(taus)) * factor
    )


def _band(tau: Tensor, keep: float, top: float) -> Tensor:
    if not tau.dim():
        return tau
    skipped = int(top * tau.numel())
    over = largest({"": tau}, skipped).mask("", tau)
    held = largest({"": tau}, skipped + int(keep * tau.numel())).mask("", tau)
    return torch.where(held & ~over, tau, 0)
