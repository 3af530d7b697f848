"""Spherical linear interpolation. Shoemake 1985, doi 10.1145/325165.325242; on networks' weights as in mergekit
(Goddard et al. 2024, arXiv 2403.13257)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config import number
from ...errors import ConfigError
from ..task_vector import TaskVector
from .blocks import blockwise
from .registry import merge_method

PARALLEL = 0.9995  # beyond this cosine the angle's sine is too small to divide by (mergekit's threshold)


@merge_method("slerp", paper="Shoemake 1985; Goddard et al. 2024, arXiv 2403.13257")
def slerp(vectors: Sequence[TaskVector], *, t: float = 0.5) -> TaskVector:
    """Between two vectors along the arc, tensor by tensor, w the angle between the two:

        tau = sin((1 - t) w) / sin(w) tau_1 + sin(t w) / sin(w) tau_2

    Needs no data. It interpolates the task vectors, not the weights (whose angle is next to nothing). If the two are
    nearly parallel or opposite (|cos w| > 0.9995), it is `(1 - t) tau_1 + t tau_2`; if one is zero, a right angle is
    assumed. Symmetric at t = 0.5; otherwise exchanging the vectors exchanges t and 1 - t.

    Raises:
        ConfigError: not two vectors, or t outside 0 to 1.
    """
    if len(vectors) != 2:
        raise ConfigError(f"slerp: got {len(vectors)} vectors, expected 2; for more take mean, karcher or multislerp")
    at = number("t", t, 0, 1)

    def one(_: str, taus: list[Tensor]) -> Tensor:
        a, b = (tau.double().reshape(-1) for tau in taus)
        return arc(a, b, at, PARALLEL).reshape(taus[0].shape)

    return blockwise(vectors, one)


def arc(a: Tensor, b: Tensor, t: float, parallel: float) -> Tensor:
    """Between two tensors along the arc, for each row along the last dimension; straight where `|cos|` is above
    `parallel`."""
    unit_a, unit_b = (x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) for x in (a, b))
    cosine = (unit_a * unit_b).sum(-1, keepdim=True).clamp(-1, 1)
    straight = cosine.abs() > parallel
    angle = torch.acos(torch.where(straight, 0, cosine))
    first, second = (torch.sin(s * angle) / torch.sin(angle) for s in (1 - t, t))
    return torch.where(straight, 1 - t, first) * a + torch.where(straight, t, second) * b
