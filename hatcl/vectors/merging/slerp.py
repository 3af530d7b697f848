"""Spherical linear interpolation. Shoemake 1985, doi 10.1145/325165.325242; on networks' weights as in mergekit
(Goddard et al. 2024, arXiv 2403.13257)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ...config import number
from ...errors import ConfigError
from ..task_vector import TaskVector
from .blocks import blockwise, weighted
from .registry import merge_method

PARALLEL = 0.9995  # beyond this cosine the angle's sine is too small to divide by (mergekit's threshold)


@merge_method("slerp", paper="Shoemake 1985; Goddard et al. 2024, arXiv 2403.13257")
def slerp(vectors: Sequence[TaskVector], *, t: float = 0.5) -> TaskVector:
    """Between two vectors along the arc, tensor by tensor, w the angle between the two:

        tau = sin((1 - t) w) / sin(w) tau_1 + sin(t w) / sin(w) tau_2

    Needs no data. It interpolates the task vectors, not the weights (whose angle is next to nothing). Where the two are
    nearly parallel or opposite (|cos w| > 0.9995) or one is zero, `(1 - t) tau_1 + t tau_2`. Symmetric at t = 0.5; else
    exchanging the vectors exchanges t and 1 - t.

    Raises:
        ConfigError: not two vectors, or t outside 0 to 1.
    """
    if len(vectors) != 2:
        raise ConfigError(f"slerp: got {len(vectors)} vectors, expected 2; for more take mean, ties or tsv")
    at = number("t", t, 0, 1)
    return blockwise(vectors, lambda _, taus: weighted(taus, _weights(taus[0], taus[1], at)))


def _weights(a: Tensor, b: Tensor, t: float) -> tuple[float, float]:
    a, b = a.double().flatten(), b.double().flatten()
    norms = float(a.norm() * b.norm())
    cosine = float(a @ b) / norms if norms else 1.0
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
