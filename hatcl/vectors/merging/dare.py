"""DARE: drop and rescale. Yu et al. 2024, arXiv 2311.03099."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...config import flag, number, whole
from ...functional import hashed
from ..task_vector import TaskVector
from .blocks import PerVector, blockwise, each, rescaled, rescaling, shares, summed
from .registry import merge_method
from .ties import cut, election, trimmed

PAPER = "Yu et al. 2024, arXiv 2311.03099"
LOW_BITS = 0xFFFFFFFF
HASHED_AT_ONCE = 1 << 20  # elements hashed at a time: the 64-bit numbers of a whole tensor would be many times its size


@merge_method("dare_linear", paper=PAPER, symmetric=False)
def dare_linear(
    vectors: Sequence[TaskVector],
    *,
    drop: PerVector = 0.9,
    scale: float = 0.4,
    weights: PerVector | None = None,
    normalise: bool = False,
    rescale: str = "expected",
    seed: int = 0,
) -> TaskVector:
    """`tau = scale * sum_t w_t m_t tau_t / (1 - p)`, each element dropped (`m = 0`) with probability p = `drop`: task
    arithmetic of sparse vectors whose expectation is the vectors themselves.

    Needs no data. The dropped elements depend only on the seed, the vector's place in the list and the tensor's name
    (see `kept`).

    Args:
        drop: one for all vectors, or one per vector. weights: one per vector, default 1 each.
        normalise: divide by the sum of the weights.
        rescale: `expected` divides the rest by 1 - p (the paper's); `l1` restores each tensor's sum of magnitudes
            (mergekit's); `none` does nothing.

    Raises:
        ConfigError: `drop` outside 0 to 1, 1 excluded.
    """
    flag("normalise", normalise)
    factor, w = number("scale", scale), shares(weights, vectors)
    left = dropping(vectors, drop, seed, rescale)
    return blockwise(vectors, lambda name, taus: summed(left(name, taus), w, normalise) * factor)


@merge_method("dare_ties", paper=PAPER, symmetric=False)
def dare_ties(
    vectors: Sequence[TaskVector],
    *,
    drop: PerVector = 0.9,
    density: PerVector = 1.0,
    scale: float = 1.0,
    weights: PerVector | None = None,
    normalise: bool = True,
    rescale: str = "expected",
    undecided: str = "zero",
    seed: int = 0,
) -> TaskVector:
    """`ties` of vectors whose elements were dropped with probability p = `drop` and the rest divided by `1 - p`.

    Needs no data.

    Args:
        density: the share of each whole vector that is kept after dropping. Trimming is off by default, since dropping
            leaves `1 - p` already. drop, rescale: as in `dare_linear`. weights, normalise, undecided: as in `ties`.

    Raises:
        ConfigError: `drop` outside 0 to 1, 1 excluded, or a density outside 0 to 1.
    """
    factor, w, elect = number("scale", scale), shares(weights, vectors), election(normalise, undecided)
    left, densities = dropping(vectors, drop, seed, rescale), each("density", density, vectors, 0, 1)

    def reader(i: int) -> Callable[[str], Tensor]:
        return lambda name: left(name, [vectors[i][name]], i)[0]

    cuts = [cut(v, reader(i), densities[i]) for i, v in enumerate(vectors)] if min(densities) < 1 else None

    def one(name: str, taus: list[Tensor]) -> Tensor:
        rest = left(name, taus)
        return elect(rest if cuts is None else trimmed(name, rest, cuts), w) * factor

    return blockwise(vectors, one)


def dropping(vectors: Sequence[TaskVector], drop: PerVector, seed: int, rescale: str) -> Callable[..., list[Tensor]]:
    """A function (name, tensors, place of the first vector) that drops elements of each vector's tensor and rescales
    the rest. Raises `ConfigError`."""
    rates = each("drop", drop, vectors, 0, 1, without="high")
    how, seed = rescaling(rescale), whole("seed", seed, 0)

    def left(name: str, taus: Sequence[Tensor], first: int = 0) -> list[Tensor]:
        out = []
        for i, tau in enumerate(taus, first):
            stays = kept(tau.shape, rates[i], seed, i, name).to(tau.device)
            out.append(rescaled(torch.where(stays, tau, 0), tau, how, 1 - rates[i]))
        return out

    return left


def kept(shape: Sequence[int], p: float | Tensor, seed: int, vector: int, name: str) -> Tensor:
    """The elements that survive dropping with probability p: bool, of this shape.

    Counter-based: element i is kept if a 32-bit hash of its index, keyed by the seed, the vector's place and the
    tensor's name, is at least `p * 2^32`. So the result does not depend on the order in which tensors are read, or on
    the device.

    Args:
        p: a number, or one for each element.
    """
    key = hashlib.sha256(f"{seed}:{vector}:{name}".encode()).digest()
    first, second = (int.from_bytes(key[i : i + 4], "little") for i in (0, 4))
    out = torch.empty(tuple(shape), dtype=torch.bool)
    flat, rate = out.view(-1), torch.as_tensor(p, dtype=torch.float64).expand(tuple(shape)).reshape(-1)
    for start in range(0, flat.numel(), HASHED_AT_ONCE):
        i = torch.arange(start, min(start + HASHED_AT_ONCE, flat.numel()))
        # two rounds with two keys: after one, the masks of two tensors would be permutations of each other
        h = hashed((hashed((i & LOW_BITS) ^ first) + second + (i >> 32)) & LOW_BITS)
        flat[start : start + len(i)] = h >= (rate[start : start + len(i)] * (LOW_BITS + 1)).round()
    return out
