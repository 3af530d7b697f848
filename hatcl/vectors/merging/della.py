"""DELLA: drop by magnitude and rescale. Deep et al. 2024, arXiv 2406.11617."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...config import flag, number, whole
from ...errors import ConfigError
from ..task_vector import TaskVector
from .blocks import PerVector, blockwise, each, rescaled, rescaling, shares, summed
from .dare import kept
from .registry import merge_method
from .ties import election

DELLA_PAPER = "Deep et al. 2024, arXiv 2406.11617"


@merge_method("della", paper=DELLA_PAPER, symmetric=False)
def della(
    vectors: Sequence[TaskVector],
    *,
    density: PerVector = 0.5,
    epsilon: PerVector = 0.15,
    scale: float = 1.0,
    weights: PerVector | None = None,
    normalise: bool = True,
    rescale: str = "expected",
    undecided: str = "zero",
    seed: int = 0,
) -> TaskVector:
    """Elements are kept at random, the larger of a row more often, divided by the probability with which they were
    kept, and merged by the elected signs of `ties`:

        p_i = density - epsilon + 2 epsilon (r_i - 1) / (n - 1),   r_i the rank of |tau_i| among the n of its row

    Needs no data. The kept elements depend only on the seed, the vector's place in the list and the tensor's name (see
    `dare.kept`). Of equal magnitudes the first has the lower rank; a one-dimensional tensor is one row, and a filter's
    rows lie along its second dimension (mergekit's choice).

    Args:
        density: the share that is kept; 1 keeps all. epsilon: half the width of the window around it (the paper's
            epsilon is the whole width). rescale: `expected` (the paper's); `l1` gives each tensor the sum of
            magnitudes that it had (mergekit's); `none`. weights, normalise, undecided: as in `ties`.

    Raises:
        ConfigError: a density outside 0 to 1, or one with which a probability would be.
    """
    factor, w, elect = number("scale", scale), shares(weights, vectors), election(normalise, undecided)
    left = pruning(vectors, density, epsilon, seed, rescale)
    return blockwise(vectors, lambda name, taus: elect(left(name, taus), w) * factor)


@merge_method("della_linear", paper=DELLA_PAPER, symmetric=False)
def della_linear(
    vectors: Sequence[TaskVector],
    *,
    density: PerVector = 0.5,
    epsilon: PerVector = 0.15,
    scale: float = 0.4,
    weights: PerVector | None = None,
    normalise: bool = False,
    rescale: str = "expected",
    seed: int = 0,
) -> TaskVector:
    """`scale * sum_t w_t tau'_t` of the pruned vectors of `della`, without an election. Needs no data.

    Args:
        density, epsilon, rescale: as in `della`. scale: as in `arithmetic`. weights: one per vector, default 1 each.
        normalise: divide by their sum.

    Raises:
        ConfigError: as `della`.
    """
    flag("normalise", normalise)
    factor, w = number("scale", scale), shares(weights, vectors)
    left = pruning(vectors, density, epsilon, seed, rescale)
    return blockwise(vectors, lambda name, taus: summed(left(name, taus), w, normalise) * factor)


def pruning(
    vectors: Sequence[TaskVector], density: PerVector, epsilon: PerVector, seed: int, rescale: str
) -> Callable[[str, Sequence[Tensor]], list[Tensor]]:
    """A function that prunes a tensor of each vector and rescales the rest. Raises `ConfigError`."""
    dense, half = each("density", density, vectors, 0, 1), each("epsilon", epsilon, vectors, 0, 1)
    how, seed = rescaling(rescale), whole("seed", seed, 0)
    for d, e in zip(dense, half, strict=True):
        if 0 < d < 1 and not (d - e > 0 and d + e < 1):
            raise ConfigError(
                f"epsilon: got {e:g} with the density {d:g}, expected density - epsilon and density + epsilon "
                "to be between 0 and 1, without these"
            )

    def left(name: str, taus: Sequence[Tensor]) -> list[Tensor]:
        out = []
        for i, tau in enumerate(taus):
            if dense[i] in (0, 1) or not tau.numel():
                out.append(tau * dense[i])
                continue
            p = chances(tau, dense[i], half[i])
            stays = kept(tau.shape, 1 - p, seed, i, name).to(tau.device)
            out.append(rescaled(torch.where(stays, tau, 0), tau, how, p.to(tau.device)))
        return out

    return left


def chances(tau: Tensor, density: float, epsilon: float) -> Tensor:
    """The probability with which each element is kept, float64 of tau's shape."""
    rows = tau.reshape(1, -1) if tau.dim() < 2 else tau
    order = rows.abs().argsort(dim=1, stable=True)
    ranks = order.argsort(dim=1).double()
    along = ranks / max(rows.shape[1] - 1, 1)
    return (density - epsilon + 2 * epsilon * along).reshape(tau.shape).cpu()
