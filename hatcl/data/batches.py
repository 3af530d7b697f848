"""Batches of several tasks side by side, and batches repeated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any

from ..calls import Batches, endless


class Zipped:
    """A batch of each of several tasks per step. The epoch ends with the shortest, or with the first, and then the
    others start over when they run out."""

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
    """The batches, so often that an epoch has at least `steps` of them."""

    def __init__(self, batches: Batches, steps: int) -> None:
        self.loaders = [batches]
        self.times = max(1, -(-steps // max(lengths([batches]), 1)))

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.times):
            yield from self.loaders[0]

    def __len__(self) -> int:
        return self.times * lengths(self.loaders)


def lengths(loaders: Sequence[Batches]) -> int:
    """The length of the shortest. Raises `TypeError` where one has none."""
    sizes = [len(x) for x in loaders if isinstance(x, Sized)]
    if len(sizes) < len(loaders):
        raise TypeError("batches without a length")
    return min(sizes)
