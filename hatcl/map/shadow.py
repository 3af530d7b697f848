"""Shadows: what a tensor's elements belong to, carried beside the tensor while the model runs.

A shadow is a list of *slots*. A slot is an integer tensor of the tensor's shape that holds a label per element, kept
with stride 0 where it is constant. A slot is *clean* when the element is exactly zero whenever its unit is off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Axis = tuple[Any, ...]  # (parameter name, dimension or "joint"[, "output": gate the layer's output instead])


@dataclass(frozen=True)
class Slot:
    """ids: labels, of the tensor's shape. clean: zero where the unit is off. folds: for what is computed from
    parameters alone, the axes to multiply by the gate so that the value is scaled by it once (None: no such axes)."""

    ids: Tensor
    clean: bool = True
    folds: frozenset[Axis] | None = None

    def map(self, view: Callable[[Tensor], Tensor]) -> Slot:
        return replace(self, ids=view(self.ids))


@dataclass(frozen=True)
class Shadow:
    """slots: the units an element belongs to. sources: parameters this value is computed from alone (empty for an
    activation). pending: axes to fold if anything but a batch norm reads this value."""

    slots: tuple[Slot, ...] = ()
    sources: frozenset[str] = frozenset()
    pending: frozenset[tuple[str, Axis]] = field(default=frozenset())

    @property
    def of_parameters(self) -> bool:
        return bool(self.sources)

    def map(self, view: Callable[[Tensor], Tensor]) -> Shadow:
        return replace(self, slots=tuple(s.map(view) for s in self.slots))


def varying(ids: Tensor) -> tuple[int, ...]:
    """The dimensions along which a slot is not constant by its strides."""
    return tuple(d for d in range(ids.dim()) if ids.size(d) > 1 and ids.stride(d) != 0)


def small(ids: Tensor) -> Tensor:
    """The slot with its constant dimensions narrowed to size 1."""
    for d in range(ids.dim()):
        if ids.size(d) > 1 and ids.stride(d) == 0:
            ids = ids.narrow(d, 0, 1)
    return ids


def settle(ids: Tensor) -> Tensor:
    """Give stride 0 to every dimension along which the labels are in fact equal."""
    shape, ids = ids.shape, small(ids)
    for d in range(ids.dim()):
        if ids.size(d) > 1 and bool((ids == ids.narrow(d, 0, 1)).all()):
            ids = ids.narrow(d, 0, 1)
    return ids.expand(shape)


def reshape(ids: Tensor, shape: Sequence[int]) -> Tensor:
    """`ids.reshape(shape)` that keeps stride 0 for every group of dimensions in which the ids are constant."""
    old, new = list(ids.shape), list(shape)
    if -1 in new:
        known = 1
        for n in new:
            known *= n if n != -1 else 1
        new[new.index(-1)] = ids.numel() // max(known, 1)
    if ids.numel() == 0:
        return ids.reshape(new)
    live = set(varying(ids))
    kept_old: list[int] = []
    kept_new: list[int] = []
    i = j = 0
    source = ids
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        a = old[i] if i < len(old) else 1
        b = new[j] if j < len(new) else 1
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while a != b:
            if a < b:
                a *= old[i]
                i += 1
            else:
                b *= new[j]
                j += 1
        if live.isdisjoint(range(i0, i)):
            for d in range(i0, i):
                source = source.narrow(d, 0, 1)
            kept_old += [1] * (i - i0)
            kept_new += [1] * (j - j0)
        else:
            kept_old += old[i0:i]
            kept_new += new[j0:j]
    return source.reshape(kept_new).expand(new)


def apply_as_is(func: Any, args: tuple, kwargs: dict, ids: Sequence[Tensor]) -> Any:
    """Run a view-like operation on ids. Some kernels know no integers; float64 holds every label exactly."""
    try:
        return func(*args, **kwargs)
    except (RuntimeError, NotImplementedError):
        double = {id(t): t.double() for t in ids}

        def swap(x: Any) -> Any:
            return double.get(id(x), x) if isinstance(x, Tensor) else x

        out = torch.utils._pytree.tree_map(lambda x: swap(x), (args, kwargs))
        result = func(*out[0], **out[1])
        return torch.utils._pytree.tree_map(lambda x: x.long() if isinstance(x, Tensor) else x, result)
