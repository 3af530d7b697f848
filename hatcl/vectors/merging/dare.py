"""DARE: drop and rescale. Yu et al. 2024, arXiv 2311.03099."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...config import number, whole
from ...functional import hashed
from ..task_vector import TaskVector
from .blocks import blockwise, weighted
from .registry import merge_method
from .ties import cut, elected_mean, trimmed

PAPER = "Yu et al. 2024, arXiv 2311.03099"
LOW_BITS = 0xFFFFFFFF
HASHED_AT_ONCE = 1 << 20  # elements hashed at a time: the 64-bit numbers of a whole tensor would be many times its size


@merge_method("dare_linear", paper=PAPER, symmetric=False)
def dare_linear(vectors: Sequence[TaskVector], *, drop: float = 0.9, scale: float = 0.4, seed: int = 0) -> TaskVector:
    """`tau = scale * sum_t m_t tau_t / (1 - p)`, each element dropped (`m = 0`) with probability p = `drop`: task
    arithmetic of sparse vectors whose expectation is the vectors themselves.

    Needs no data. What is dropped depends on the seed, the vector's place in the list and the tensor's name alone (see
    `kept`).

    Raises:
        ConfigError: `drop` outside 0 to 1, 1 excluded.
    """
    p, factor, seed = number("drop", drop, 0, 1, without="high"), number("scale", scale), whole("seed", seed, 0)
    return blockwise(
        vectors, lambda name, taus: weighted(_dropped(name, taus, p, seed), [1.0] * len(taus)) * (factor / (1 - p))
    )


@merge_method("dare_ties", paper=PAPER, symmetric=False)
def dare_ties(
    vectors: Sequence[TaskVector], *, drop: float = 0.9, density: float = 1.0, scale: float = 1.0, seed: int = 0
) -> TaskVector:
    """`ties` of vectors of which each element was dropped with probability p = `drop`, the rest divided by `1 - p`.

    Needs no data.

    Args:
        density: the share of each whole vector that is kept after dropping. Trimming is off by default, since dropping
            leaves `1 - p` already.

    Raises:
        ConfigError: `drop` outside 0 to 1, 1 excluded, or a density outside 0 to 1.
    """
    p, factor, seed = number("drop", drop, 0, 1, without="high"), number("scale", scale), whole("seed", seed, 0)
    share = number("density", density, 0, 1)

    def left(i: int) -> Callable[[str], Tensor]:
        return lambda name: _drop(vectors[i][name], p, seed, i, name)

    cuts = [cut(v, left(i), share) for i, v in enumerate(vectors)] if share < 1 else None

    def one(name: str, taus: list[Tensor]) -> Tensor:
        rest = _dropped(name, taus, p, seed)
        return elected_mean(rest if cuts is None else trimmed(name, rest, cuts)) * (factor / (1 - p))

    return blockwise(vectors, one)


def kept(shape: Sequence[int], p: float, seed: int, vector: int, name: str) -> Tensor:
    """Which elements survive dropping with probability p: bool, of this shape.

    Counter-based: element i is kept if a 32-bit hash of its index, keyed by the seed, the vector's place and the
    tensor's name, is at least `p * 2^32`. So a tensor read alone is dropped as in the whole, in any order, on any
    device.
    """
    key = hashlib.sha256(f"{seed}:{vector}:{name}".encode()).digest()
    first, second = (int.from_bytes(key[i : i + 4], "little") for i in (0, 4))
    out = torch.empty(tuple(shape), dtype=torch.bool)
    flat, below = out.view(-1), round(p * (LOW_BITS + 1))
    for start in range(0, flat.numel(), HASHED_AT_ONCE):
        i = torch.arange(start, min(start + HASHED_AT_ONCE, flat.numel()))
        # two rounds with two keys: after one, the masks of two tensors would be permutations of each other
        h = hashed((hashed((i & LOW_BITS) ^ first) + second + (i >> 32)) & LOW_BITS)
        flat[start : start + len(i)] = h >= below
    return out


def _drop(tau: Tensor, p: float, seed: int, vector: int, name: str) -> Tensor:
    return torch.where(kept(tau.shape, p, seed, vector, name).to(tau.device), tau, 0)


def _dropped(name: str, taus: Sequence[Tensor], p: float, seed: int) -> list[Tensor]:
    return [_drop(tau, p, seed, i, name) for i, tau in enumerate(taus)]
