"""The largest of many elements that need not fit into memory at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DIGIT = 16  # bits that one pass over the tensors settles


@dataclass(frozen=True)
class Cut:
    """Which elements are among the k largest: those with a key above `key`, and of those equal to it each tensor's
    first `ties[name]`."""

    key: int
    ties: dict[str, int]

    def mask(self, name: str, x: Tensor) -> Tensor:
        """Bool, of x's shape."""
        keys = _magnitudes(x)
        chosen = keys > self.key
        if self.ties.get(name):
            at = (keys == self.key).view(-1).nonzero().view(-1)[: self.ties[name]]
            chosen.view(-1)[at] = True
        return chosen


def largest(tensors: Mapping[str, Tensor], k: int) -> Cut:
    """The k elements of largest magnitude over all tensors, exactly k: of equal ones the first are taken, tensors in
    the order of their names (files have them in another order than models).

    A radix selection on the bits of the magnitude as float32: three passes over the tensors, one of which is in memory
    at a time.
    """
    total = sum(t.numel() for t in tensors.values()) if k else 0
    if k <= 0 or k >= total:
        return Cut(-1, {}) if k > 0 else Cut((1 << 31) - 1, {})
    high, above = _digit(tensors, k, None)
    low, above_low = _digit(tensors, k - above, high)
    key = (high << DIGIT) | low
    left, ties = k - above - above_low, {}
    for name in sorted(tensors):
        here = min(left, int((_magnitudes(tensors[name]) == key).sum()))
        ties[name] = here
        left -= here
    return Cut(key, ties)


def _digit(tensors: Mapping[str, Tensor], k: int, high: int | None) -> tuple[int, int]:
    """The digit of the k-th largest key (the upper one, or the lower one below `high`), and how many lie above it."""
    counts = torch.zeros(1 << DIGIT, dtype=torch.long)
    for t in tensors.values():
        keys = _magnitudes(t).view(-1)
        if high is not None:
            keys = keys[keys >> DIGIT == high]
        digits = keys & ((1 << DIGIT) - 1) if high is not None else keys >> DIGIT
        counts += torch.bincount(digits, minlength=1 << DIGIT).cpu()
    from_top = counts.flip(0).cumsum(0)
    at = int(torch.searchsorted(from_top, k))
    return (1 << DIGIT) - 1 - at, int(from_top[at - 1]) if at else 0


def _magnitudes(x: Tensor) -> Tensor:
    """The magnitude's bits: as integers they are ordered as the magnitudes are."""
    return x.detach().abs().to(torch.float32).contiguous().view(torch.int32)
