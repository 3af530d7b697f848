"""The bases of task vectors: digests of a base's tensors, and tied tensors under one name."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import VectorError
from ..functional import digest_of
from .tensors import RUNNING, Kind, Lazy, kinds_of, named_tensors, pick


def digests_of(base: Mapping[str, Tensor]) -> Mapping[str, str]:
    """The digest of every tensor; for files only on demand, since it needs to read them."""
    if isinstance(base, Lazy):
        return Lazy(base.kinds, functools.cache(lambda name: digest_of(base[name])))
    return {name: digest_of(t) for name, t in base.items()}


def joined_kinds(vectors: Sequence[tuple[Mapping[str, Kind], bool]]) -> dict[str, Kind]:
    """The tensors that any of several vectors changes, with their shapes. This is the rule for missing tensors: in an
    adapter's vector (and any other that is `partial`) they count as zeros, in others they are refused.

    Args:
        vectors: for each vector its tensors, and whether it is partial.

    Raises:
        VectorError: a vector that is not partial lacks tensors that others change, or shapes differ.
    """
    out: dict[str, Kind] = {}
    first: dict[str, int] = {}
    for i, (kinds, _) in enumerate(vectors):
        for name, kind in kinds.items():
            if out.setdefault(name, kind).shape != kind.shape:
                raise VectorError(
                    f"{name} is {list(out[name].shape)} in vector {first[name]}, {list(kind.shape)} in vector {i}; "
                    "take the vectors from models of one architecture and vocabulary"
                )
            first.setdefault(name, i)
    for i, (kinds, partial) in enumerate(vectors):
        lacks = [] if partial else [name for name in out if name not in kinds]
        if lacks:
            raise VectorError(
                f"vector {i} lacks {len(lacks)} tensors that vector {first[lacks[0]]} has: {', '.join(lacks[:5])}"
                f"{' ...' if len(lacks) > 5 else ''}. Take both from models of one architecture (in an adapter, or "
                "a vector made with partial=True, missing tensors count as zeros)"
            )
    return out


def joined_bases(bases: Sequence[Mapping[str, str] | None], names: Iterable[str]) -> Mapping[str, str] | None:
    """The digests of some tensors, each from the bases that know it; None if no base knows one of them.

    Raises:
        VectorError: two bases differ (for files: when a digest is computed).
    """
    known = [base for base in bases if base is not None]
    where = {name: [base for base in known if name in base] for name in names}
    if not all(where.values()):
        return None

    def one(name: str) -> str:
        return functools.reduce(lambda a, b: same_digest(name, a, b), (base[name] for base in where[name]))

    if any(isinstance(base, Lazy) for base in known):
        return Lazy(dict.fromkeys(where, Kind((), torch.uint8)), one)
    return {name: one(name) for name in where}


def same_digest(name: str, a: str, b: str) -> str:
    """The digest of a tensor in two bases. Raises `VectorError` if they differ."""
    if a != b:
        raise VectorError(f"{name}: the vectors were taken from different bases; both must start from one model")
    return a


def known_as(side: Mapping[str, Tensor], tied: Mapping[str, str], skip: set[str]) -> Mapping[str, Tensor]:
    """Tied tensors once, under the first name in either model, whichever names this side stored."""
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
    """Raise if two models in memory differ only in integers: their vector would silently be zero."""
    ours, theirs = named_tensors(pretrained), named_tensors(finetuned)
    for name, x in ours.items():
        counter = name.rpartition(".")[2] in RUNNING
        if not x.dtype.is_floating_point and name in theirs and not counter and not torch.equal(x, theirs[name]):
            raise VectorError(
                f"the two models differ in integers only, such as {name} ({x.dtype}, {list(x.shape)}); a task vector "
                "holds floating-point parameters: dequantise both first"
            )
