"""The Karcher mean on the sphere. Karcher 1977, doi 10.1002/cpa.3160300502; on networks' weights in mergekit
(arXiv 2603.04972)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config import number, whole
from ..task_vector import TaskVector
from .blocks import blockwise, weighted
from .registry import merge_method


@merge_method("karcher", paper="Karcher 1977; arXiv 2603.04972")
def karcher(vectors: Sequence[TaskVector], *, steps: int = 10, tolerance: float = 1e-5) -> TaskVector:
    """Tensor by tensor: the point of the unit sphere whose squared distances along the sphere to all directions
    `u_t = tau_t / |tau_t|` sum to the least, times the mean norm. From the mean of the directions, until the way is
    shorter than `tolerance`:

        v = sum_t w_t (a_t / sin a_t) (u_t - cos(a_t) m),   m <- cos|v| m + sin|v| v / |v|,   a_t the angle to u_t

    Needs no data. Vectors with a norm below `tolerance` have no direction and count in the mean norm only.

    Args:
        steps: at most so many.

    Raises:
        ConfigError: no steps, or a negative tolerance.
    """
    steps, least = whole("steps", steps), number("tolerance", tolerance, 0)

    def one(_: str, taus: list[Tensor]) -> Tensor:
        if len(taus) == 1:
            return taus[0]
        flat = [tau.double().reshape(-1) for tau in taus]
        norms = [float(x.norm()) for x in flat]
        units = [x / n for x, n in zip(flat, norms, strict=True) if n > least]
        if not units:
            return torch.zeros_like(taus[0])
        return (karcher_centre(units, steps, least) * (sum(norms) / len(norms))).reshape(taus[0].shape)

    return blockwise(vectors, one)


def karcher_centre(units: Sequence[Tensor], steps: int, least: float) -> Tensor:
    """The Karcher mean of vectors of length 1, `[N]` each, with equal weights."""
    mean = weighted(units, [1 / len(units)] * len(units))
    size = mean.norm()
    mean = mean / size if float(size) >= least else units[0].clone()
    for _ in range(steps):
        way = torch.zeros_like(mean)
        for u in units:
            cosine = torch.dot(mean, u).clamp(-1, 1)
            angle = torch.arccos(cosine)
            if float(angle) >= least:
                way += (angle / torch.sin(angle) / len(units)) * (u - cosine * mean)
        length = way.norm()
        if float(length) < least:
            break
        mean = torch.cos(length) * mean + torch.sin(length) / length * way
        mean /= mean.norm()
    return mean
