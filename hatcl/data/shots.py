"""Reproducible random samples, as indices drawn by a seed: a number of each class, a held-out share, or a number of
all."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import whole
from ..errors import ConfigError


def same_few(count: int, at_most: int | None, seed: int = 0) -> list[int]:
    """Ascending indices of `at_most` out of `count`, or of all if there are no more."""
    if at_most is None or at_most >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), at_most))


def draw(
    keys: Sequence[Hashable], labels: Sequence[Hashable], k: int, seed: int, classes: Sequence[Hashable], part: str
) -> list[int]:
    """Indices of k examples of each class with different keys, in their own order (`sample_shots`).

    Raises:
        ConfigError: k is below 1, or a class, which the text names, has too few.
    """
    whole("k", k)
    first: dict[Hashable, int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    ids = list(first.values())
    counts = Counter(labels[i] for i in ids)
    for c in classes:
        if counts[c] < k:
            left = " besides those drawn for train" if part == "validation" else ""
            raise ConfigError(
                f"k-shot: class {c!r} has {counts[c] or 'no'} different examples for {part}{left}, expected {k}; give "
                "a smaller k, or more data"
            )
    place = {c: i for i, c in enumerate(classes)}
    ids = [i for i in ids if labels[i] in place]
    found = sample_shots([place[labels[i]] for i in ids], k, seed=seed, num_classes=len(classes))
    return [ids[i] for i in found.tolist()]


def sample_shots(
    labels: Tensor | Sequence[int],
    shots: int | float,
    *,
    seed: int = 0,
    num_classes: int | None = None,
    at_most: bool = False,
) -> Tensor:
    """Indices of a few examples: `shots` of each class, or a fraction of all. The same seed gives the same examples;
    with one seed, fewer shots are a subset of more shots.

        loader = DataLoader(Subset(dataset, sample_shots(labels, 4)), batch_size=128, shuffle=True)

    Args:
        shots: an integer, or a fraction between 0 and 1. seed: seeds the choice without touching global random numbers.
        num_classes: the task's number of classes; None = the largest label + 1.
        at_most: take all of a class that has fewer, instead of raising.

    Raises:
        ConfigError: a class has no examples or (unless `at_most`) too few, or `shots` is neither form.
    """
    y = torch.as_tensor(labels).cpu().long()
    if y.dim() != 1 or not len(y):
        raise ConfigError(f"labels: got shape {list(y.shape)}, expected one label per example, [N]")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    if isinstance(shots, float):
        if not 0 < shots <= 1 or int(shots * len(y)) < 1:
            raise ConfigError(f"shots: got the fraction {shots!r} of {len(y)} examples, expected one that gives any")
        return order[: int(shots * len(y))].sort().values
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise ConfigError(f"shots: got {shots!r}, expected an integer of at least 1 or a fraction")
    chosen = []
    for c in range(int(y.max()) + 1 if num_classes is None else num_classes):
        of_class = order[y[order] == c]
        if not len(of_class):
            raise ConfigError(f"class {c} has no examples; pass num_classes= or relabel, so that every class has some")
        if len(of_class) < shots and not at_most:
            raise ConfigError(
                f"class {c} has {len(of_class)} examples, expected {shots} shots; ask for fewer, or pass at_most=True"
            )
        chosen.append(of_class[:shots])
    return torch.cat(chosen).sort().values


def held_out(labels: np.ndarray, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to keep and indices held out: the share of each class, rounded down, drawn by the seed.

    Raises:
        ConfigError: the share is outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ConfigError(f"validation: got {share!r}, expected a share of at least 0 and below 1")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    y = torch.from_numpy(labels)[order]
    out = torch.zeros(len(labels), dtype=torch.bool)
    for c in y.unique():
        of_class = order[y == c]
        out[of_class[: int(share * len(of_class))]] = True
    return (~out).nonzero().view(-1), out.nonzero().view(-1)
