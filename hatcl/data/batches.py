"""Batches that combine several tasks, and repeated batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any

from ..calls import Batches, endless


class Zipped:
    """Per step, one batch of each of several tasks. The epoch ends with the shortest task, or with the first; in that
    case the others start again when they run out."""

    def __init__(self, loaders: Sequence[Batches], *, follow_first: bool = False) -> None:
        self.loaders = list(loaders)
        self.follow_first = follow_first

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        if self.follow_first:
            return zip(self.loaders[0], *(endless(x, "batches") for x in self.loaders[1:]), strict=False)
        return zip(*self.loaders, strict=False)

    def __len__(self) -> int:
        return lengths(self.loaders[:1] if self.follow_first else self.loaders)


class Repeated:
    """The batches, repeated so that an epoch has at least `steps` of them."""

    def __init__(self, batches: Batches, steps: int) -> None:
        self.loaders = [batches]
        self.times = max(1, -(-steps // max(lengths([batches]), 1)))

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.times):
            yield from self.loaders[0]

    def __len__(self) -> int:
        return self.times * lengths(self.loaders)


def lengths(loaders: Sequence[Batches]) -> int:
    """The length of the shortest. Raises `TypeError` if one has no length."""
    sizes = [len(x) for x in loaders if isinstance(x, Sized)]
    if len(sizes) < len(loaders):
        raise TypeError("batches without a length")
    return min(sizes)
