"""SCE: select, calculate, erase. Wan et al. 2024, arXiv 2408.07990 (FuseChat)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config import number, one_of
from ..select import largest
from ..task_vector import TaskVector
from .blocks import blockwise, weighted
from .registry import merge_method
from .ties import UNDECIDED

LEAST_SHARE = 1e-6  # the least divisor (mergekit's)


@merge_method("sce", paper="Wan et al. 2024, arXiv 2408.07990")
def sce(
    vectors: Sequence[TaskVector], *, density: float = 1.0, floor: float = 0.0, undecided: str = "zero"
) -> TaskVector:
    """Of each tensor: *select* the share `density` of those elements that differ between the vectors, by their
    variance; *calculate* a weight for each vector, its share of the selected elements' squares; *erase* the elements
    whose sign is not that of the sum; and average what is left by the weights.

        w_t = mean(tau_t^2) / sum_s mean(tau_s^2),   tau = sum_t w_t e_t tau_t / sum_t w_t e_t

    Needs no data.

    Args:
        density: 1 selects all (mergekit's `select_topk`).
        floor: where the mean squares sum to less, all vectors count the same (mergekit has 1e-6, below which whole
            tensors of careful fine-tunings lie).
        undecided: as in `ties`.

    Raises:
        ConfigError: a density outside 0 to 1, a negative floor, or another word.
    """
    share, least = number("density", density, 0, 1), number("floor", floor, 0)
    one_of("undecided", undecided, UNDECIDED)

    def one(_: str, taus: list[Tensor]) -> Tensor:
        stack = [tau.double() for tau in taus]
        if share < 1:
            middle = sum(stack, torch.zeros_like(stack[0])) / len(stack)
            spread = sum(((x - middle) ** 2 for x in stack), torch.zeros_like(middle))
            chosen = largest({"": spread}, int(share * int(spread.count_nonzero()))).mask("", spread)
            stack = [torch.where(chosen, x, 0) for x in stack]
        sizes = [float(x.square().mean()) if x.numel() else 0.0 for x in stack]
        total = sum(sizes)
        w = [s / total for s in sizes] if total > least else [1 / len(stack)] * len(stack)
        sign = weighted(stack, [1.0] * len(stack)).sign_()
        if undecided == "positive":
            sign[sign == 0] = 1
        agrees = [(x.sign() == sign) & (sign != 0) for x in stack]
        held = weighted(agrees, w).clamp_(min=LEAST_SHARE)
        return weighted([torch.where(a, x, 0) for a, x in zip(agrees, stack, strict=True)], w) / held

    return blockwise(vectors, one)
