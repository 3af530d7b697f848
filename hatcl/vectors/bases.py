"""What task vectors were taken from: digests of a base's tensors, and tied tensors under one name."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import VectorError
from ..functional import digest_of
from .tensors import RUNNING, Lazy, kinds_of, named_tensors, pick


def digests_of(base: Mapping[str, Tensor]) -> Mapping[str, str]:
    """Of every tensor; of files only when asked for, since it means to read them."""
    if isinstance(base, Lazy):
        return Lazy(base.kinds, functools.cache(lambda name: digest_of(base[name])))
    return {name: digest_of(t) for name, t in base.items()}


def one_base(a: Mapping[str, str] | None, b: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """The base of two vectors; one that is not known may be the other's.

    Raises:
        VectorError: they are two (where a vector is read from files: when a digest is asked for).
    """
    if a is None or b is None or a is b:
        return a if b is None else b

    x, y = a, b  # neither is None
    for side in (a, b):
        if isinstance(side, Lazy):
            return Lazy(side.kinds, lambda name: same_digest(name, x[name], y[name]))
    return {name: same_digest(name, a[name], b[name]) for name in a}


def joined_bases(bases: Iterable[Mapping[str, str] | None]) -> Mapping[str, str] | None:
    """The digests of several bases as one; None where one is not known.

    Raises:
        VectorError: two that differ.
    """
    out: dict[str, str] = {}
    for base in bases:
        if base is None:
            return None
        for name, x in base.items():
            same_digest(name, out.setdefault(name, x), x)
    return out


def same_digest(name: str, a: str, b: str) -> str:
    """The digest of a tensor in two bases. Raises `VectorError` where they differ."""
    if a != b:
        raise VectorError(f"{name}: the vectors were taken from different bases; both must start from one model")
    return a


def known_as(side: Mapping[str, Tensor], tied: Mapping[str, str], skip: set[str]) -> Mapping[str, Tensor]:
    """Tied tensors once, under the name that stands first in either model, whichever names this side stored."""
    names: dict[str, list[str]] = {}
    for name in side:
        if name not in skip:
            names.setdefault(tied.get(name, name), []).append(name)

    def read(first: str) -> Tensor:
        tensor, *others = (side[n] for n in names[first])
        for n, other in zip(names[first][1:], others, strict=True):
            if not torch.equal(tensor, other):
                raise VectorError(
                    f"{names[first][0]} and {n} are one tensor in one of the models and differ in the other; untie "
                    "them in both, or tie them in both"
                )
        return tensor

    if all(stored == [first] for first, stored in names.items()):
        return pick(side, list(names))
    kinds = kinds_of(side)
    once: Lazy[Tensor] = Lazy({first: kinds[stored[0]] for first, stored in names.items()}, read)
    return once if isinstance(side, Lazy) else dict(once)


def refuse_integers(pretrained: Any, finetuned: Any) -> None:
    """Raise where two models in memory differ in integers only: their vector would be zero without a word."""
    ours, theirs = named_tensors(pretrained), named_tensors(finetuned)
    for name, x in ours.items():
        counter = name.rpartition(".")[2] in RUNNING
        if not x.dtype.is_floating_point and name in theirs and not counter and not torch.equal(x, theirs[name]):
            raise VectorError(
                f"the two models differ in integers only, such as {name} ({x.dtype}, {list(x.shape)}); a task vector "
                "holds floating-point parameters: dequantise both first"
            )
