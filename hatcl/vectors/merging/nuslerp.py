"""NuSLERP: spherical interpolation by weights, of whole tensors or of their rows. mergekit (Goddard et al. 2024,
arXiv 2403.13257)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ...errors import ConfigError
from ..task_vector import TaskVector
from .blocks import PerVector, blockwise, shares
from .registry import merge_method
from .slerp import arc

ALONG = (None, -1, 0)
COLINEAR = math.sqrt(1 - 1e-16)  # the cosine beyond which there is no angle (mergekit's)
NO_WEIGHT = 1e-6  # weights whose sum is smaller than this are taken as equal (mergekit's)


@merge_method("nuslerp", paper="mergekit; Goddard et al. 2024, arXiv 2403.13257", symmetric=False)
def nuslerp(vectors: Sequence[TaskVector], *, weights: PerVector | None = None, along: int | None = None) -> TaskVector:
    """`slerp` at `t = w_2 / (w_1 + w_2)`, without its threshold: straight only where the two are exactly parallel or
    opposite. Needs no data.

    Args:
        weights: one for each of the two vectors, default 1. along: None = of a tensor as a whole; -1 = of each row of
            it, along its last dimension; 0 = along its first.

    Raises:
        ConfigError: not two vectors, or another dimension.
    """
    if len(vectors) != 2:
        raise ConfigError(f"nuslerp: got {len(vectors)} vectors, expected 2; for more take karcher or multislerp")
    if along not in ALONG or isinstance(along, bool):
        raise ConfigError(
            f"along: got {along!r}, expected None (whole tensors), -1 (the last dimension) or 0 (the first)"
        )
    w = shares(weights, vectors)
    t = 0.5 if abs(sum(w)) < NO_WEIGHT else w[1] / sum(w)

    def one(_: str, taus: list[Tensor]) -> Tensor:
        a, b = (tau.double() for tau in taus)
        if along is None or not a.dim():
            return arc(a.reshape(-1), b.reshape(-1), t, COLINEAR).reshape(a.shape)
        return arc(a.transpose(along, -1), b.transpose(along, -1), t, COLINEAR).transpose(along, -1)

    return blockwise(vectors, one)
