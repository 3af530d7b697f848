"""A ridge classifier on random features, and the sums over examples that determine it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = torch.logspace(-8, 2, 41, dtype=torch.float64)
"""The ridge strengths that are tried, in units of the mean eigenvalue of the sums."""


def projection(features: int, width: int, seed: int, space: int) -> Tensor:
    """P, `[F, M]` float32: independent normal numbers of variance 1 / F, the same for the same seed and space."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + space)
    return torch.randn(features, width, generator=generator) / max(features, 1) ** 0.5


def lifted(features: Tensor, p: Tensor) -> Tensor:
    """`phi = [relu(h P), 1]`, float64 on the CPU. Shapes: features `[B, F]`, p `[F, M]`, phi `[B, M + 1]`."""
    h = features.detach().to("cpu", torch.float64)
    return torch.cat([(h @ p.double()).relu(), h.new_ones(len(h), 1)], 1)


@dataclass(frozen=True)
class Sums:
    """Sums over one task's examples in one space: `S = sum phi phi^T` and `C = sum phi onehot(y)^T`, in float64.

    Attributes:
        gram: S, `[(M + 1)(M + 2) / 2]`, its lower triangle row by row; or the diagonal d of `d + V V^T`, `[M + 1]`.
        low: V, `[M + 1, k]`, where S is kept as diagonal plus low rank.
        classes: C, `[M + 1, K]`, a column for each class that has examples.
    """

    gram: Tensor
    classes: Tensor
    low: Tensor | None = None

    @classmethod
    def of(cls, gram: Tensor, classes: Tensor, rank: int | None) -> Sums:
        """rank: keep only this many of the strongest directions of S, and its diagonal; None = all of S."""
        if rank is None:
            rows, columns = torch.tril_indices(len(gram), len(gram))
            return cls(gram[rows, columns], classes)
        values, vectors = torch.linalg.eigh(gram)
        low = vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()
        return cls((gram.diagonal() - low.square().sum(1)).clamp(min=0), classes, low)

    def whole(self) -> Tensor:
        """S, `[M + 1, M + 1]`."""
        if self.low is not None:
            return self.gram.diag() + self.low @ self.low.T
        size = len(self.classes)
        out = self.gram.new_zeros(size, size)
        rows, columns = torch.tril_indices(size, size)
        out[rows, columns] = self.gram
        out[columns, rows] = self.gram
        return out


def ridge(every: Sequence[Sums], examples: int) -> Tensor:
    """`W = (sum_b S_b + lambda n I)^-1 [C_1 | C_2 | ...]`, `[M + 1, all classes]`; lambda by generalised
    cross-validation (Golub, Heath and Wahba 1979, Technometrics 21(2), eq. 1.4), summed over the classes:

        GCV(lambda) = n |Y - phi W|^2 / (n - tr phi (S + lambda n I)^-1 phi^T)^2

    Args:
        examples: n, the number of examples in the sums. Each has one class, so `|Y|^2 = n`.
    """
    gram = every[0].whole()
    for sums in every[1:]:
        gram += sums.whole()
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    targets = vectors.T @ torch.cat([sums.classes for sums in every], 1)
    weight = targets.square().sum(1)
    grid = (STRENGTHS * values.mean()).unsqueeze(1)
    kept = values / (values + grid)
    error = examples - ((2 - kept) * weight / (values + grid)).sum(1)
    free = examples - kept.sum(1)
    strength = grid[(error.clamp(min=0) / free.square()).argmin()]
    return vectors @ (targets / (values + strength).unsqueeze(1))
