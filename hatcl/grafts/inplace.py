"""Write a graft's values into a module's own tensors, and restore the old ones bit for bit."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraftError
from ..functional import bits_of, same_bits


@dataclass(frozen=True)
class Overwritten:
    """Elements of one tensor: flat indices, int64 `[M]`, the old values and the written ones."""

    at: Tensor
    old: Tensor
    new: Tensor


@dataclass(frozen=True, eq=False)
class Applied:
    """A graft (or another writer) that was written into a module, and its places there."""

    by: Any
    places: dict[str, Overwritten]


_APPLIED: weakref.WeakKeyDictionary[nn.Module, list[Applied]] = weakref.WeakKeyDictionary()


def take(t: Tensor, at: Tensor) -> Tensor:
    """Elements at flat indices (int64, in row order), for any memory layout."""
    b = bits_of(t)
    return (b.view(-1).index_select(0, at) if b.is_contiguous() else b[torch.unravel_index(at, b.shape)]).view(t.dtype)


def put(t: Tensor, at: Tensor, values: Tensor) -> None:
    """Write values of the tensor's own dtype into some elements."""
    b = bits_of(t)
    if b.is_contiguous():
        b.view(-1).scatter_(0, at, bits_of(values))  # takes a fifth of an assignment's time
    else:
        b[torch.unravel_index(at, b.shape)] = bits_of(values)


def write_in(model: nn.Module, by: Any, what: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    """Write values into some of a module's tensors and keep the old ones.

    Args:
        what: name -> the tensor, flat indices, and the values in the tensor's dtype.
    """
    places = {name: Overwritten(at, take(t, at), new) for name, (t, at, new) in what.items()}
    for t, at, new in what.values():
        put(t, at, new)
    _APPLIED.setdefault(model, []).append(Applied(by, places))


def original(model: Any, name: str, t: Tensor) -> Tensor:
    """A tensor of a module as it was before anything was written into it."""
    stack = _APPLIED.get(model, []) if isinstance(model, nn.Module) else []
    places = [a.places[name] for a in stack if name in a.places]
    if not places:
        return t
    t = t.detach().clone()
    for place in reversed(places):
        _put_back(t, place)
    return t


def _put_back(t: Tensor, place: Overwritten) -> None:
    put(t, place.at.to(t.device), place.old.to(t))  # the module may have been moved or cast since


def take_out(model: nn.Module, by: Any, tensors: Mapping[str, Tensor], check: bool) -> None:
    """Restore the values from before the last `write_in` of the same `by`.

    Raises:
        GraftError: there was none, a later one holds some of the elements, a tensor is gone, or (with `check`) elements
            have changed since.
    """
    stack = _APPLIED.get(model, [])
    i = next((i for i in reversed(range(len(stack))) if stack[i].by is by), None)
    if i is None:
        raise GraftError(
            f"this graft is not applied to this {type(model).__name__}; remove_ works only after apply_ on the same "
            "module (a copy, or a module made by apply_to, has nothing to restore)"
        )
    for later in stack[i + 1 :]:
        for name in later.places.keys() & stack[i].places.keys():
            both = int(torch.isin(stack[i].places[name].at.cpu(), later.places[name].at.cpu()).sum())
            if both:
                raise GraftError(
                    f"{name}: {both} elements of this graft are also in a graft that was applied later; remove that "
                    "first"
                )
    gone = next((name for name in stack[i].places if name not in tensors), None)
    if gone is not None:
        raise GraftError(
            f"{gone}: this {type(model).__name__} no longer has it; undo the replacement or renaming of the module "
            "since the graft was applied"
        )
    if check:
        for name, place in stack[i].places.items():
            now = take(tensors[name], place.at.to(tensors[name].device))
            if not same_bits(now, place.new.to(now.device)):
                raise GraftError(
                    f"{name}: elements of this graft changed since it was applied; train on the result of apply_to, "
                    "or pass check=False to restore the old values anyway"
                )
    for name, place in stack[i].places.items():
        _put_back(tensors[name], place)
    del stack[i]
