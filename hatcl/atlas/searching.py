"""Starts for a fit: coefficients found without gradients, and refined from a coarser grain to a finer one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError, VectorError
from ..lend import Evaluating
from ..map.grains import Grain
from ..vectors.merging.arithmetic import GRID
from .fitting import Fitted, Select
from .linear import Composed

SCALES = GRID


@torch.no_grad()
def search(composer: Composed, select: Select, scales: Sequence[float] = SCALES) -> Fitted:
    """Task arithmetic: the best of several scales shared by all vectors, `theta0 + s sum_i tau_i` (Ilharco et al. 2023,
    arXiv 2212.04089). The composer then holds it. Of equal scores the first is kept.

    Args:
        select: measures the composer in its current state; a higher `score` is better, `-inf` is never kept (as for
        `fit`).
        scales: tried in this order; for negation below 0.

    Raises:
        ConfigError: there are no scales, or none may be kept.
    """
    if not scales:
        raise ConfigError("scales: none; expected at least one number, such as 0.3")
    lam = composer.coefficients
    before, best = lam.detach().clone(), Fitted(lam.detach().clone())
    try:
        for i, scale in enumerate(scales):
            lam.fill_(scale)
            with Evaluating(composer):
                said = {k: float(v) for k, v in select().items()}
            best.history.append({"scale": float(scale), **said})
            if said["score"] > (-math.inf if math.isnan(best.score) else best.score):
                best.coefficients, best.score, best.epoch = lam.detach().clone(), said["score"], i
        if math.isnan(best.score):
            raise ConfigError(f"search: none of the {len(scales)} scales may be kept; add 0, the pretrained model")
        before = best.coefficients
    finally:
        lam.copy_(before)
    return best


def refine(coefficients: Tensor, coarse: Grain, fine: Grain) -> Tensor:
    """Convert coefficients of a coarse grain to a finer one, for the same composition: `[T, G']`.

    So `block` starts from `global`, and `partition:20` from `partition:5` (parts are a hash modulo K, so K splits into
    its multiples).

    Args:
        coefficients: `[T, G]`, of `coarse`.

    Raises:
        VectorError: the coefficients have another grain, or a group of `fine` spans several of `coarse`.
    """
    if coefficients.dim() != 2 or coefficients.shape[1] != coarse.size:
        raise VectorError(
            f"coefficients of shape {list(coefficients.shape)}; expected [vectors, {coarse.size}] of {coarse.name}"
        )
    group = torch.full((fine.size,), -1, dtype=torch.long)
    for name in fine.shapes:
        if name not in coarse.shapes:
            raise VectorError(f"{name}: the grain {fine.name} covers it, {coarse.name} does not")
        into, of = torch.broadcast_tensors(fine.index[name](), coarse.index[name]())
        known = group[into].clone()  # a number as index gives a view
        group[into.reshape(-1)] = of.reshape(-1)
        if bool((group[into] != of).any()) or bool(((known >= 0) & (known != of)).any()):
            raise VectorError(
                f"{name}: groups of {fine.name} reach over several of {coarse.name}; it is not a refinement"
            )
    return coefficients.detach()[:, group.to(coefficients.device).clamp(min=0)].clone()
