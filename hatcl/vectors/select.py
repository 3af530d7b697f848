"""Select tensors by patterns of their names, and the largest elements of tensors that do not fit into memory at
once."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, nearest

DIGIT = 16  # bits that one pass over the tensors determines

Patterns = str | Sequence[str]


def chosen_names(names: Mapping[str, Sequence[str]], only: Patterns = (), skip: Patterns = ()) -> list[str]:
    """The tensors that patterns of names choose, in their order.

    Args:
        names: a tensor's name -> all its names, such as those of tied tensors.
        only: patterns (`fnmatch`: `*`, `?`, `[...]`; case counts), of which one must match; none = every tensor.
        skip: patterns of tensors to leave out, such as `*.inv_freq` or `lm_head.*`.

    Raises:
        ConfigError: a pattern matches no tensor (the text has the nearest name), or no tensor is left.
    """
    inside = _matched("only", only, names) if only else set(names)
    outside = _matched("skip", skip, names)
    kept = [name for name in names if name in inside and name not in outside]
    if not kept:
        raise ConfigError(f"only={only!r} and skip={skip!r} leave none of {len(names)} tensors; leave out fewer")
    return kept


def left_by(names: Iterable[str], only: Patterns = (), skip: Patterns = ()) -> list[str]:
    """The names that patterns leave, possibly none: like `chosen_names`, but a pattern need not match."""

    def matches(name: str, patterns: Patterns) -> bool:
        return any(fnmatch.fnmatchcase(name, p) for p in ([patterns] if isinstance(patterns, str) else patterns))

    return [n for n in names if (not only or matches(n, only)) and not matches(n, skip)]


def applicable(patterns: Patterns, names: Iterable[str]) -> list[str]:
    """The patterns that match at least one of these names."""
    known = list(names)
    every = [patterns] if isinstance(patterns, str) else patterns
    return [pattern for pattern in every if left_by(known, pattern)]


def _matched(option: str, patterns: Patterns, names: Mapping[str, Sequence[str]]) -> set[str]:
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {first for first, every in names.items() if any(fnmatch.fnmatchcase(n, pattern) for n in every)}
        if not hits:
            near = nearest(pattern, [n for every in names.values() for n in every])
            raise ConfigError(f"{option}: {pattern!r} matches none of {len(names)} tensors; did you mean {near!r}?")
        found |= hits
    return found


@dataclass(frozen=True)
class Cut:
    """The k largest elements: those with a key above `key`, and of those equal to it each tensor's first
    `ties[name]`."""

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
    """The k elements of largest magnitude over all tensors, exactly k: of equal ones the first are taken, with tensors
    in the order of their names (files order them differently from models).

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
    """The digit of the k-th largest key (the upper digit, or the lower one below `high`), and the number of keys above
    it."""
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
    """The bits of the magnitudes; as integers they have the same order."""
    return x.detach().abs().to(torch.float32).contiguous().view(torch.int32)
