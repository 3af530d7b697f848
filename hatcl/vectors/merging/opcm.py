"""OPCM: merge models one by one as they arrive, by orthogonal projection. Tang et al. 2025, arXiv 2501.09522."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import number
from ..task_vector import TaskVector
from .blocks import as_matrix, blockwise
from .registry import merge_method
from .tsv import thin_svd


@dataclass(frozen=True)
class Continual:
    """The state of `opcm` after some tasks: the next one needs no vector of an earlier task.

    Attributes:
        total: `lambda_t` times the merged vector, before it is brought to size. norms: of the vectors so far.
    """

    total: TaskVector
    norms: tuple[float, ...]

    @property
    def vector(self) -> TaskVector:
        """The merged vector, of the mean norm of those that went into it."""
        size = self.total.norm()
        factor = math.fsum(self.norms) / len(self.norms) / size if size else 1.0
        return blockwise([self.total], lambda _, taus: taus[0] * factor)


@merge_method("opcm", paper="Tang et al. 2025, arXiv 2501.09522", symmetric=False)
def opcm(vectors: Sequence[TaskVector], *, alpha: float = 0.5, convs: bool = False) -> TaskVector:
    """Each vector is added to the merged one without its part in that one's leading directions, and the result is
    scaled to the mean norm of the vectors so far (eq. 6 to 9). D_1 = tau_1, and for each matrix

        D_(t-1) = U S V',   P(tau) = tau - U_r U_r' tau V_r V_r' - sum_(i > r) (u_i' tau v_i) u_i v_i'
        D_t = D_(t-1) + P(tau_t),   tau = D_T * mean_t ||tau_t|| / ||D_T||   (lambda_t = ||D_t|| / mean norm)

    with r the number of leading singular values whose share of their sum is at most alpha. Needs no data. Other tensors
    are added. The order of the vectors matters; with models that come one at a time, `opcm_step` does one step.

    P is that of the authors' code (fusion_bench, method/opcm), which removes the leading block and the diagonal and
    keeps the maps between leading and other directions. Directions that D does not have (rounding errors) keep their
    diagonal; in that code they depend on arbitrary vectors of the decomposition. Every tensor is read once more, for
    the norms.

    Args:
        alpha: 0 to 1, the paper's 0.5. convs: also filters, flattened to `[out, in * kernel]`.

    Raises:
        ConfigError: alpha outside 0 to 1.
    """
    share = number("alpha", alpha, 0, 1)

    def one(_: str, taus: list[Tensor]) -> Tensor:
        total = taus[0]
        for tau in taus[1:]:
            total = _added(total, tau, share, convs)
        return total

    return Continual(blockwise(vectors, one), tuple(v.norm() for v in vectors)).vector


def opcm_step(before: Continual | None, vector: TaskVector, *, alpha: float = 0.5, convs: bool = False) -> Continual:
    """One step of `opcm`, which needs memory for two vectors: `state = opcm_step(state, vector)`, from None;
    `state.vector` is what is merged so far. Arguments and errors are those of `opcm`."""
    share = number("alpha", alpha, 0, 1)
    if before is None:
        return Continual(vector, (vector.norm(),))
    total = blockwise([before.total, vector], lambda _, taus: _added(taus[0], taus[1], share, convs))
    return Continual(total, (*before.norms, vector.norm()))


def _added(total: Tensor, tau: Tensor, alpha: float, convs: bool) -> Tensor:
    d, x = as_matrix(total, convs), as_matrix(tau, convs)
    if d is None or x is None:
        return total + tau
    wide = torch.promote_types(d.dtype, torch.float32)  # bfloat16 has no SVD
    d, x = d.to(wide), x.to(wide)
    u, s, vh = thin_svd(d)
    if len(s):
        seen = u.T @ x @ vh.T
        r = int((s.cumsum(0) / s.sum() <= alpha).sum())
        out = torch.diag_embed(seen.diagonal())
        out[:r, :r] = seen[:r, :r]
        x = x - u @ out @ vh
    return (d + x).to(total.dtype).view(total.shape)
