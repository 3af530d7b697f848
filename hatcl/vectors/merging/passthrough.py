"""One vector as it is. mergekit (Goddard et al. 2024, arXiv 2403.13257)."""

from __future__ import annotations

from collections.abc import Sequence

from ...config import number
from ...errors import ConfigError
from ..task_vector import TaskVector
from .blocks import blockwise, weighted
from .registry import merge_method


@merge_method("passthrough", paper="mergekit; Goddard et al. 2024, arXiv 2403.13257")
def passthrough(vectors: Sequence[TaskVector], *, scale: float = 1.0) -> TaskVector:
    """`tau = scale * tau_1`: recipes use it to copy layers of one model. Needs no data.

    Raises:
        ConfigError: more than one vector.
    """
    if len(vectors) != 1:
        raise ConfigError(f"passthrough: got {len(vectors)} vectors, expected 1; for more take mean")
    factor = number("scale", scale)
    return blockwise(vectors, lambda _, taus: weighted(taus, [factor]))
