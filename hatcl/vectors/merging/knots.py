"""KnOTS: merging LoRA's updates in a basis that they share. Stoica et al. 2025, arXiv 2410.19735."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config import number
from ..task_vector import TaskVector
from .blocks import as_matrix, average, blockwise
from .registry import merge_method
from .ties import ties
from .tsv import thin_svd


@merge_method("knots", paper="Stoica et al. 2025, arXiv 2410.19735")
def knots(
    vectors: Sequence[TaskVector], *, density: float = 0.2, scale: float = 1.0, convs: bool = False
) -> TaskVector:
    """KnOTS-TIES (3.2): the concatenated updates of each matrix have one basis U of outputs, and `ties` merges the
    tasks' coordinates in it instead of the weights:

        [tau_1 ... tau_T] = U S [V_1' ... V_T'],   tau = scale * U * ties(S V_1', ..., S V_T')

    Each task's whole representation, all its `S V_t'`, is trimmed to the share `density`. Needs no data. Tensors that
    are no matrices are averaged (times the scale); the authors' code leaves them out by default. Their scale is chosen
    on validation data.

    Made for LoRA: the representations (rank times width, per task and matrix) are kept in memory, which for updates of
    full rank is as much as the vectors. The rank counts singular values above float32's rounding errors, in their code
    above 1e-5.

    Args:
        convs: also filters, flattened to `[out, in * kernel]`.

    Raises:
        ConfigError: a density outside 0 to 1.
    """
    share, factor = number("density", density, 0, 1), number("scale", scale)
    bases: dict[str, Tensor] = {}
    parts: list[dict[str, Tensor]] = [{} for _ in vectors]

    def tied(name: str, taus: list[Tensor]) -> Tensor:
        matrices = [m for tau in taus if (m := as_matrix(tau, convs)) is not None]
        if matrices:
            u, s, vh = thin_svd(torch.cat(matrices, 1).double(), rounding=torch.float32)
            bases[name] = u
            for part, own in zip(parts, vh.split(matrices[0].shape[1], 1), strict=True):
                part[name] = (s[:, None] * own).float()
        return taus[0]

    blockwise(vectors, tied).in_memory()
    merged = ties([TaskVector(part) for part in parts], density=share) if bases else {}

    def one(name: str, taus: list[Tensor]) -> Tensor:
        if name not in bases:
            return average(taus) * factor
        return (bases[name] @ merged[name].double() * factor).view(taus[0].shape)

    return blockwise(vectors, one)
