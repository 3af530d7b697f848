"""Scores of every element, from which a graft is made: the logits that `learn_graft` learns, or any others."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import GraftError, IntegrityError
from ..vectors.select import largest
from ..vectors.tensors import Kind, Lazy
from . import files
from .checks import size_of
from .graft import Graft

STRIDE = 61  # of the sample from which `top` estimates the k-th value; prime, so that it covers all columns
INFINITE = 0x7F800000  # float32's bits of infinity; as integers, the bits of smaller numbers are smaller


@dataclass(frozen=True, eq=False)
class GraftScores:
    """A score per element; elements with higher scores enter a graft first.

    Attributes:
        values: name -> the scores, float32 of the tensor's shape, on the CPU; for a learned graft the logits L, where
        `gamma = sigmoid(L)`.
        base: name -> digest of the pretrained model's tensor; None = unknown.

    Raises:
        GraftError: there is no tensor, or scores are not finite floating-point numbers.
    """

    values: dict[str, Tensor]
    base: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if not self.values:
            raise GraftError("scores of no tensors; which tensors take part?")
        for name, x in self.values.items():
            if not x.dtype.is_floating_point:
                raise GraftError(
                    f"{name}: got {str(x.dtype).removeprefix('torch.')}, expected floating-point scores; "
                    "Graft.from_masks makes a graft from bits"
                )
            bad = int((~torch.isfinite(x)).sum())
            if bad:
                raise GraftError(f"{name}: {bad} of {x.numel()} scores are NaN or infinite, expected finite numbers")
        object.__setattr__(self, "values", {n: x.detach().to("cpu", torch.float32) for n, x in self.values.items()})

    def graft(self, sparsity: float | None = None, threshold: float | None = None) -> Graft:
        """The elements with the highest scores, as bits.

        Args:
            sparsity: take exactly `int(sparsity * N)`; ties are resolved as in `vectors.select.largest`.
            threshold: take all above this; if neither is given, 0 (for a logit, gamma = 1/2).

        Raises:
            GraftError: both are given, or they select nothing or everything.
        """
        if sparsity is not None and threshold is not None:
            raise GraftError("got sparsity and threshold; pass one of them")
        numel = sum(x.numel() for x in self.values.values())
        if sparsity is not None:
            masks = highest(self.values, size_of(sparsity, numel))
        else:
            threshold = 0.0 if threshold is None else threshold
            masks = {n: x > threshold for n, x in self.values.items()}
            k = sum(int(m.sum()) for m in masks.values())
            if not 0 < k < numel:
                scores = [x for x in self.values.values() if x.numel()]
                low, high = min(float(x.min()) for x in scores), max(float(x.max()) for x in scores)
                raise GraftError(
                    f"threshold: {threshold!r} selects {'all' if k else 'none'} of {numel:,} elements, whose scores go "
                    f"from {low:g} to {high:g}; pass another, or a sparsity"
                )
        graft = Graft.from_masks(masks)
        return Graft(graft.shapes, graft.indices, None, self.base)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one `.safetensors` file that declares that it holds scores.

        Raises:
            GraftError: the path has another suffix. IntegrityError: the disk is full or not writable.
        """
        return files.write(path, files.SCORES, self.values, {"base": self.base})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> GraftScores:
        """Read a file written by `save`.

        Raises:
            IntegrityError: the file is missing or damaged. GraftError: it holds bits, or something else.
        """
        tensors, about = files.read(path, files.SCORES)
        try:
            return GraftScores(tensors, about["base"])
        except (KeyError, GraftError) as error:
            raise IntegrityError(f"{path}: its parts do not fit each other ({error}); save them again") from error


def highest(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Bool masks of the k highest scores over all tensors, signs included; exactly k, ties as in
    `vectors.select.largest`, which orders magnitudes and therefore gets non-negative numbers in the same order.

    Args:
        scores: float32, finite.
    """
    positive = sum(int((x > 0).sum()) for x in scores.values())

    def shifted(name: str) -> Tensor:
        x = scores[name].detach().to(torch.float32)
        if k <= positive:
            return x.clamp(min=0)
        # all positive scores, and of the others those nearest to zero
        below = INFINITE - 1 - x.abs().contiguous().view(torch.int32)
        return torch.where(x > 0, math.inf, below.view(torch.float32))

    order = Lazy({n: Kind(tuple(x.shape), torch.float32) for n, x in scores.items()}, shifted)
    cut = largest(order, k)
    return {name: cut.mask(name, order[name]) for name in scores}


def top(values: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Flat indices, on the CPU, of the k highest values over all tensors; ties as in `highest`. To save memory and
    time, a bound that slightly more than k values reach is estimated from a sample, and only these values are gathered
    and ordered."""
    sample = torch.cat([values[n].reshape(-1)[::STRIDE].cpu() for n in values])
    # k plus five standard deviations of a random sample's estimate, a twentieth, and a few
    wanted = k + k // 20 + STRIDE * (20 + 5 * math.isqrt(k // STRIDE))
    while True:
        rank = wanted // STRIDE
        bound = float(sample.topk(rank, sorted=False).values.min()) if rank < len(sample) else -math.inf
        found = {}
        for n in sorted(values):  # the order in which `highest` resolves ties
            x = values[n].reshape(-1)
            at = (x >= bound).nonzero().view(-1)
            if len(at):
                found[n] = as_small(at, Kind(tuple(x.shape), x.dtype)).cpu(), x.index_select(0, at).cpu()
        if sum(len(at) for at, _ in found.values()) >= k:
            break
        wanted *= 2
    on = highest({"": torch.cat([part for _, part in found.values()])}, k)[""]  # faster than many small tensors
    parts = on.split([len(at) for at, _ in found.values()])
    return {n: at[part] for (n, (at, _)), part in zip(found.items(), parts, strict=True) if bool(part.any())}


def as_small(at: Tensor, kind: Kind) -> Tensor:
    """Indices as int32 if they fit."""
    return at.to(torch.int32) if math.prod(kind.shape) < 2**31 else at
