"""Shadows: the units to which a tensor's elements belong, tracked next to the tensor while the model runs.

A shadow is a list of *slots*. A slot is an integer tensor of the tensor's shape with a label per element, and with
stride 0 along constant dimensions. A slot is *clean* if each element is exactly zero whenever its unit is off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .labels import Ints

ParameterAxis = tuple[Any, ...]  # (parameter name, dimension or "joint"[, "output": gate the layer's output instead])


@dataclass(frozen=True)
class Slot:
    """One label per element of a tensor.

    Attributes:
        ids: the labels, of the tensor's shape.
        clean: whether elements are zero where their unit is off.
        folds: for a value computed from parameters alone, the axes to multiply by the gate so that it scales the value
            once; None: there are none.
    """

    ids: Tensor
    clean: bool = True
    folds: frozenset[ParameterAxis] | None = None

    def map(self, view: Callable[[Tensor], Tensor]) -> Slot:
        """The slot of a view of the tensor."""
        return replace(self, ids=view(self.ids))


@dataclass(frozen=True)
class Shadow:
    """The units of a tensor's elements.

    Attributes:
        slots: the units to which an element belongs.
        sources: for a value computed from parameters alone, these parameters; empty for an activation.
        pending: the axes to fold if anything but a batch norm reads this value.
    """

    slots: tuple[Slot, ...] = ()
    sources: frozenset[str] = frozenset()
    pending: frozenset[tuple[str, ParameterAxis]] = field(default=frozenset())

    @property
    def of_parameters(self) -> bool:
        """Is the value computed from parameters alone?"""
        return bool(self.sources)

    def map(self, view: Callable[[Tensor], Tensor]) -> Shadow:
        """The shadow of a view of the tensor."""
        return replace(self, slots=tuple(s.map(view) for s in self.slots))

    def slot(self, at: int, shape: Sequence[int]) -> Slot:
        """A slot by its index; if there are fewer, "always on" for a tensor of this shape."""
        return self.slots[at] if at < len(self.slots) else Slot(always_on(shape))


class Shadows:
    """The shadow of each tensor that is alive. Views of one storage share writes: a write increments the version of the
    base, and a view with an older version takes its shadow from the base again."""

    def __init__(self) -> None:
        self._of = WeakTensorKeyDictionary()
        self._version = WeakTensorKeyDictionary()

    def __contains__(self, x: Tensor) -> bool:
        return x in self._of

    def __setitem__(self, x: Tensor, shadow: Shadow) -> None:
        self._of[x] = shadow

    def alive(self) -> list[Shadow]:
        """The shadows of all tensors that are alive."""
        return list(self._of.values())

    def get(self, x: Any) -> Shadow | None:
        """The shadow of a tensor; None for constants and for anything that is not a tensor."""
        if not isinstance(x, Tensor):
            return None
        found = self._of.get(x)
        base = x._base
        if base is not None and base in self._version and self._version[base] != self._version.get(x):
            found = self._of[base].map(lambda ids: _window(_like_storage(ids, base), x, base))
            self._of[x] = found
            self._version[x] = self._version[base]
        return found

    def write(self, x: Tensor, shadow: Shadow | None) -> None:
        """Store the shadow that an in-place operation gave `x`; for a view, also write it through to the base."""
        base, new = x._base, shadow or Shadow()
        if base is None or not base.numel():
            self._of[x] = new
            return
        old = self.get(base) or Shadow()
        slots = []
        for i in range(max(len(old.slots), len(new.slots))):
            whole, part = old.slot(i, base.shape), new.slot(i, x.shape)
            ids = _like_storage(whole.ids, base)
            _window(ids, x, base).copy_(part.ids)
            slots.append(Slot(settle(ids), whole.clean and part.clean))
        self._of[base] = Shadow(tuple(slots), pending=old.pending | new.pending)
        self._of[x] = new
        self._version[base] = self._version.get(base, 0) + 1
        self._version[x] = self._version[base]


def _like_storage(ids: Tensor, base: Tensor) -> Tensor:
    """A copy of the labels with the strides of their tensor."""
    return torch.empty_strided(base.size(), base.stride(), dtype=torch.long).copy_(ids)


def _window(ids: Tensor, x: Tensor, base: Tensor) -> Tensor:
    """The part of a base's labels (with the base's strides) that its view `x` sees."""
    return ids.as_strided(x.size(), x.stride(), x.storage_offset() - base.storage_offset())


def always_on(shape: Sequence[int]) -> Tensor:
    """The label 0 for every element."""
    return torch.zeros((), dtype=torch.long).expand(tuple(shape))


def varying(ids: Tensor) -> tuple[int, ...]:
    """The dimensions with a stride other than 0, along which a slot may vary."""
    return tuple(d for d in range(ids.dim()) if ids.size(d) > 1 and ids.stride(d) != 0)


def small(ids: Tensor) -> Tensor:
    """The slot with its constant dimensions narrowed to size 1."""
    for d in range(ids.dim()):
        if ids.size(d) > 1 and ids.stride(d) == 0:
            ids = ids.narrow(d, 0, 1)
    return ids


def flat_ids(ids: Tensor) -> Ints:
    """The labels of a slot as a vector, with constant dimensions reduced to one entry."""
    return small(ids).reshape(-1).numpy()


def side_by_side(left: Tensor, right: Tensor) -> tuple[Ints, Ints]:
    """The labels of two slots element by element, as vectors."""
    a, b = torch.broadcast_tensors(small(left), small(right))
    return a.reshape(-1).numpy(), b.reshape(-1).numpy()


def settle(ids: Tensor) -> Tensor:
    """Give stride 0 to every dimension along which the labels are equal."""
    shape, ids = ids.shape, small(ids)
    for d in range(ids.dim()):
        if ids.size(d) > 1 and bool((ids == ids.narrow(d, 0, 1)).all()):
            ids = ids.narrow(d, 0, 1)
    return ids.expand(shape)


def vector(ids: Tensor, dim: int) -> Tensor:
    """`[n]` labels along one dimension, at the first index of every other."""
    for d in reversed(range(ids.dim())):
        if d != dim:
            ids = ids.select(d, 0)
    return ids


def placed(ids: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """The reverse of `vector`: `[n]` labels along dimension `dim` of a tensor of this shape."""
    return ids.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(tuple(shape))


def reshape(ids: Tensor, shape: Sequence[int]) -> Tensor:
    """`ids.reshape(shape)`, but with stride 0 kept for every group of dimensions in which the ids are constant."""
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
    """Run a view-like operation on ids. Some kernels do not support integers; float64 holds every label exactly."""
    try:
        return func(*args, **kwargs)
    except (RuntimeError, NotImplementedError):
        double = {id(t): t.double() for t in ids}

        def swap(x: Any) -> Any:
            return double.get(id(x), x) if isinstance(x, Tensor) else x

        out = torch.utils._pytree.tree_map(lambda x: swap(x), (args, kwargs))
        result = func(*out[0], **out[1])
        return torch.utils._pytree.tree_map(lambda x: x.long() if isinstance(x, Tensor) else x, result)
