"""Conflicts of signs: elements that task vectors move in opposite directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import VectorError
from .bases import joined_kinds
from .task_vector import TaskVector

COMPARED_AT_ONCE = 1 << 18  # elements that are compared at a time


@dataclass(frozen=True)
class SignConflicts:
    """Shares of elements whose signs disagree, among those that at least two vectors change (Yadav et al. 2023, TIES,
    arXiv 2306.01708, section 3.2; which takes the share of the elements left after trimming).

    Attributes:
        whole: over all elements. blocks: tensor -> over its elements. pairs: `[T][T]`, of two vectors; symmetric.
    """

    whole: float
    blocks: dict[str, float]
    pairs: tuple[tuple[float, ...], ...]

    def __str__(self) -> str:
        width = max(len("whole"), *(len(n) for n in self.blocks), len(f"vector {len(self.pairs) - 1}"))
        lines = [f"{'signs disagree':<{width}}", "-" * (width + 9)]
        lines += [f"{n:<{width}}  {share:>7.2%}" for n, share in [*self.blocks.items(), ("whole", self.whole)]]
        lines += ["", f"{'pairs':<{width}}" + "".join(f"  {i:>7}" for i in range(len(self.pairs)))]
        for i, row in enumerate(self.pairs):
            lines.append(f"{f'vector {i}':<{width}}" + "".join(f"  {share:>7.2%}" for share in row))
        return "\n".join(lines)


def sign_conflicts(vectors: Sequence[TaskVector]) -> SignConflicts:
    """Count sign conflicts among vectors, one tensor of each in memory at a time. A tensor that an
    adapter's vector lacks counts as zeros.

    Raises:
        VectorError: fewer than two vectors, or vectors that differ in names or shapes (`joined_kinds`).
    """
    if len(vectors) < 2:
        raise VectorError(f"sign_conflicts: got {len(vectors)} vectors, expected at least two")
    count = len(vectors)
    shapes = joined_kinds([(v.kinds, v.partial) for v in vectors])
    blocks: dict[str, float] = {}
    differ_all, both_all = torch.zeros(2, dtype=torch.long)
    differ_pairs, both_pairs = torch.zeros(2, count, count, dtype=torch.float64)
    for name in shapes:
        signs = [v[name].sign().to(torch.int8).reshape(-1).cpu() if name in v else None for v in vectors]
        differ, both = torch.zeros(2, dtype=torch.long)
        for piece in _pieces(signs):
            changed = piece != 0
            differ += ((piece > 0).any(0) & (piece < 0).any(0)).sum()
            both += (changed.sum(0) > 1).sum()
            s, c = piece.double(), changed.double()
            together = c @ c.T
            both_pairs += together
            differ_pairs += (together - s @ s.T) / 2
        blocks[name] = _share(differ, both)
        differ_all += differ
        both_all += both
    pairs = tuple(
        tuple(_share(d, b) for d, b in zip(*rows, strict=True)) for rows in zip(differ_pairs, both_pairs, strict=True)
    )
    return SignConflicts(_share(differ_all, both_all), blocks, pairs)


def _pieces(signs: Sequence[Tensor | None]) -> list[Tensor]:
    """`[T, CHUNK]` int8 each."""
    some = next(s for s in signs if s is not None)
    every = torch.stack([torch.zeros_like(some) if s is None else s for s in signs])
    return list(every.split(COMPARED_AT_ONCE, 1))


def _share(part: Tensor, of: Tensor) -> float:
    return float(part) / float(of) if of else 0.0
