"""Isotropic merging in common and task-specific subspaces. Marczak et al. 2025, arXiv 2502.04959 (Iso-CTS)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config import number
from ..task_vector import TaskVector
from .blocks import as_matrix, average, blockwise, weighted
from .iso_c import ISO_PAPER
from .registry import merge_method
from .tsv import orthogonal, thin_svd


@merge_method("iso_cts", paper=ISO_PAPER)
def iso_cts(
    vectors: Sequence[TaskVector], *, common: float = 0.8, scale: float = 1.0, convs: bool = False
) -> TaskVector:
    """`iso_c`, with the weakest directions of the sum replaced by the strongest of each task (Algorithm 2). Of a matrix
    `[m, n]`, with r = min(m, n) and T tasks:

        sum_t tau_t = U S V';   U_c, S_c, V_c: its k leading ones
        tau_t - U_c U_c' tau_t = U_t S_t V_t';   the s leading ones of each task
        U* = orthogonal([U_1 ... U_T U_c]),  V* likewise  (the nearest ones, as in `tsv`)
        tau = scale * mean(S_1, ..., S_T, S_c) * U* V*'

    Needs no data. As in the authors' code, `s = round((r - int(common * r)) / T)` and `k = r - T s`. Other tensors are
    averaged (times the scale). Directions that a matrix does not have are left out, as in `iso_c`; s is at most
    `floor(r / T)`, where their code would ask for more directions than there are.

    Args:
        common: the share of the common subspace, the paper's 0.8. scale: its alpha, chosen on validation data.
        convs: also filters, flattened to `[out, in * kernel]` (not in the paper, which has transformers).

    Raises:
        ConfigError: a share outside 0 to 1.
    """
    share, factor = number("common", common, 0, 1), number("scale", scale)

    def one(_: str, taus: list[Tensor]) -> Tensor:
        matrices = [m for tau in taus if (m := as_matrix(tau, convs)) is not None]
        if not matrices:
            return average(taus) * factor
        wide = torch.promote_types(matrices[0].dtype, torch.float32)  # bfloat16 has no SVD
        return (_subspaces([m.to(wide) for m in matrices], share) * factor).view(taus[0].shape)

    return blockwise(vectors, one)


def _subspaces(taus: Sequence[Tensor], share: float) -> Tensor:
    full = min(taus[0].shape)
    own = min(round((full - int(full * share)) / len(taus)), full // len(taus))
    u, s, vh = thin_svd(weighted(taus, [1.0] * len(taus)).to(taus[0].dtype))
    k = full - own * len(taus)
    parts = [(u[:, :k], s[:k], vh[:k])]
    for tau in taus if own else ():
        u, s, vh = thin_svd(tau - parts[0][0] @ (parts[0][0].T @ tau), size=tau.norm())
        parts.append((u[:, :own], s[:own], vh[:own]))
    values = torch.cat([s for _, s, _ in parts])
    if not len(values):
        return torch.zeros_like(taus[0])
    left, right = torch.cat([u for u, _, _ in parts], 1), torch.cat([vh for _, _, vh in parts])
    return orthogonal(left) @ orthogonal(right.T).T * values.mean()
