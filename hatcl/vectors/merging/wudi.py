"""WUDI-merging. Cheng et al. 2025, arXiv 2503.08099."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config import number, whole
from ..task_vector import TaskVector
from .blocks import as_matrix, average, blockwise, weighted
from .registry import merge_method

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Adam's usual ones, which the paper keeps


@merge_method("wudi", paper="Cheng et al. 2025, arXiv 2503.08099")
def wudi(vectors: Sequence[TaskVector], *, steps: int = 300, lr: float = 1e-5, convs: bool = False) -> TaskVector:
    """Each linear layer's merged update interferes as little as possible with the inputs of each task, for which the
    task's own update stands in (the rows of an update are combinations of its inputs):

        loss(tau) = sum_t ||(tau - tau_t) tau_t'||_F^2 / ||tau_t||_F^2

    by Adam, from the sum of the updates. Needs no data. Tensors that are no matrices are averaged. The loss is
    quadratic, so its gradient is taken in closed form: `2 (tau B - C)`, `B = sum_t tau_t' tau_t / ||tau_t||^2`,
    `C = sum_t tau_t tau_t' tau_t / ||tau_t||^2`: one product per step instead of two per task.

    Args:
        lr: an element moves by at most about `steps * lr`; as published it suits updates of about 1e-3 per element.
        convs: also filters, flattened to `[out, in * kernel]` (not in the paper, which has transformers).

    Raises:
        ConfigError: no steps, or a negative learning rate.
    """
    steps, rate = whole("steps", steps), number("lr", lr, 0)

    def one(_: str, taus: list[Tensor]) -> Tensor:
        matrices = [m for tau in taus if (m := as_matrix(tau, convs)) is not None]
        if not matrices:
            return average(taus)
        wide = torch.promote_types(matrices[0].dtype, torch.float32)
        return _descended([m.to(wide) for m in matrices], steps, rate).view(taus[0].shape)

    return blockwise(vectors, one)


def _descended(taus: Sequence[Tensor], steps: int, lr: float) -> Tensor:
    out = weighted(taus, [1.0] * len(taus)).to(taus[0].dtype)
    b, c = torch.zeros(out.shape[1], out.shape[1]).to(out), torch.zeros_like(out)
    for tau in taus:
        mass = tau.square().sum()
        if mass > 0:  # an update of zeros interferes with nothing
            gram = tau.T @ tau / mass
            b += gram
            c += tau @ gram
    first, second = torch.zeros_like(out), torch.zeros_like(out)
    for step in range(1, steps + 1):
        gradient = (out @ b).sub_(c).mul_(2)
        first.lerp_(gradient, 1 - BETA1)
        second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        spread = second.sqrt().div_((1 - BETA2**step) ** 0.5).add_(EPS)
        out.addcdiv_(first, spread, value=-lr / (1 - BETA1**step))
    return out
