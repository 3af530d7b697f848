"""Task singular vectors. Gargiulo et al. 2025, arXiv 2412.00081 (TSV-Merge)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config import number
from ..task_vector import TaskVector
from .blocks import as_matrix, average, blockwise
from .registry import merge_method


@merge_method("tsv", paper="Gargiulo et al. 2025, arXiv 2412.00081")
def tsv(vectors: Sequence[TaskVector], *, scale: float = 1.0, convs: bool = False) -> TaskVector:
    """Each matrix's update keeps its `k = floor(min(m, n) / T)` leading singular vectors per task; concatenated and
    made orthogonal across tasks, they form the merged update:

        tau_t ~ U_t S_t V_t',   U = [U_1 ... U_T] = P D Q',   U* = P Q' (the nearest orthogonal one; V likewise)
        tau = scale * U* diag(S_1, ..., S_T) V*'

    Needs no data. Tensors that are no matrices, and matrices with less than T rows or columns, are averaged (times
    the scale). Directions that the updates do not have (beyond the rank of LoRA's, or common to equal tasks) stay zero;
    the paper uses the decomposition's arbitrary vectors there.

    Args:
        convs: also filters, flattened to `[out, in * kernel]` (not in the paper, which has transformers).
    """
    factor = number("scale", scale)

    def one(_: str, taus: list[Tensor]) -> Tensor:
        matrices = [m for tau in taus if (m := as_matrix(tau, convs)) is not None]
        if not matrices or min(matrices[0].shape) < len(taus):
            return average(taus) * factor
        rank = min(matrices[0].shape) // len(taus)
        wide = torch.promote_types(matrices[0].dtype, torch.float32)  # bfloat16 has no SVD
        parts = [thin_svd(m.to(wide)) for m in matrices]
        u = torch.cat([u[:, :rank] for u, _, _ in parts], 1)
        s = torch.cat([s[:rank] for _, s, _ in parts])
        v = torch.cat([vh[:rank].T for _, _, vh in parts], 1)
        return ((orthogonal(u) * s) @ orthogonal(v).T * factor).view(taus[0].shape)

    return blockwise(vectors, one)


def orthogonal(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (Procrustes): `P Q'` of the SVD `P D Q'`. `[m, k]`, k at most m. Of
    columns that depend on each other, the nearest one within the space that they span."""
    p, _, qh = thin_svd(x)
    return p @ qh


def thin_svd(
    x: Tensor, *, rounding: torch.dtype | None = None, size: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`U [m, r], S [r], V' [r, n]` of a matrix of rank r: without the singular values that are rounding errors, whose
    vectors are arbitrary.

    Args:
        rounding: the dtype in which the matrix was rounded; None = its own. size: of the numbers that it comes from,
            if those are larger than its own; None = its largest singular value.
    """
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    least = (s[:1] if size is None else size) * max(x.shape) * torch.finfo(rounding or x.dtype).eps
    rank = int((s > least).sum())
    return u[:, :rank], s[:rank], vh[:rank]
