"""Isotropic merging in the common subspace. Marczak et al. 2025, arXiv 2502.04959 (Iso-C)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config import number
from ..task_vector import TaskVector
from .blocks import as_matrix, average, blockwise, weighted
from .registry import merge_method
from .tsv import thin_svd

ISO_PAPER = "Marczak et al. 2025, arXiv 2502.04959"


@merge_method("iso_c", paper=ISO_PAPER)
def iso_c(vectors: Sequence[TaskVector], *, scale: float = 1.0, convs: bool = False) -> TaskVector:
    """The sum of each matrix's updates, with all its singular values made equal (Algorithm 1):

        sum_t tau_t = U S V',   tau = scale * mean(S) * U V'

    Needs no data. Tensors that are no matrices are averaged (times the scale), as published. The scale is the paper's
    alpha, which it chooses on validation data.

    Deviation: directions that no update has (singular values that are rounding errors, as are all but a few in sums of
    LoRA's updates) stay zero, and the mean is over the others. The authors' code gives them the mean as well, so its
    result depends on the arbitrary vectors that the decomposition returns there. For matrices of full rank both are the
    same.

    Args:
        convs: also filters, flattened to `[out, in * kernel]` (not in the paper, which has transformers).
    """
    factor = number("scale", scale)

    def one(_: str, taus: list[Tensor]) -> Tensor:
        matrices = [m for tau in taus if (m := as_matrix(tau, convs)) is not None]
        if not matrices:
            return average(taus) * factor
        wide = torch.promote_types(matrices[0].dtype, torch.float32)  # bfloat16 has no SVD
        u, s, vh = thin_svd(weighted(matrices, [1.0] * len(matrices)).to(wide))
        return (u @ vh * (s.mean() * factor if len(s) else 0.0)).view(taus[0].shape)

    return blockwise(vectors, one)
