"""RAM, reinforced agent merging. arXiv 2601.13572, as in mergekit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config import number
from ..task_vector import TaskVector
from .blocks import blockwise, weighted
from .registry import merge_method

FEWEST = 1e-5  # what a vector's own elements are counted as at least (mergekit's)


@merge_method("ram", paper="2026, arXiv 2601.13572")
def ram(vectors: Sequence[TaskVector], *, epsilon: float = 1e-5, rescue: float = 0.0, most: float = 0.2) -> TaskVector:
    """An element that only one vector changes is kept; one that several change becomes their mean:

        tau = sum_t l_t c_t tau_t / max(1, C),   c_t = [|tau_t| > epsilon],   C = sum_t c_t

    where `l_t = 1 + rescue * min(rho_t, most)` on the elements of one vector alone, with rho_t the number of its shared
    elements over that of its own within the tensor, compensates a vector for its loss through the mean (RAM+;
    mergekit's `ramplus_tl`, with rescue 0.1); elsewhere, and by default, `l_t = 1`. Needs no data.

    Args:
        epsilon: changes up to it count as none.

    Raises:
        ConfigError: a negative number.
    """
    least, gain, limit = (
        number(name, value, 0) for name, value in (("epsilon", epsilon), ("rescue", rescue), ("most", most))
    )

    def one(_: str, taus: list[Tensor]) -> Tensor:
        changed = [tau.abs() > least for tau in taus]
        count = sum((c.long() for c in changed), torch.zeros(taus[0].shape, dtype=torch.long, device=taus[0].device))
        shared = count > 1
        parts = []
        for tau, c in zip(taus, changed, strict=True):
            rho = float((c & shared).sum()) / max(float((c & ~shared).sum()), FEWEST)
            parts.append(torch.where(c, tau.double() * torch.where(shared, 1.0, 1 + gain * min(rho, limit)), 0))
        return weighted(parts, [1.0] * len(parts)) / count.clamp(min=1)

    return blockwise(vectors, one)
