"""Couple labels while the model runs: the state of one trace, and the operations with which rules change it.

Labels that turn out to be the same channel are *coupled*. A parameter's label *owns* the unit that it writes and
*reads* the unit that it multiplies. A label that meets "always on" is *forced*; one used in a way that no rule covers
is *dropped*. A *fold* is a place where a parameter is multiplied by its units' gate.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .labels import Ints, Labels
from .shadow import ParameterAxis, Shadow, Shadows, Slot, flat_ids, placed, settle, side_by_side, small, varying, vector

Use = tuple[str, ParameterAxis]  # (path of the module at work, axis)


@dataclass
class NormSeen:
    """The input of a norm module.

    Attributes:
        ids: for each dimension that carries units, the labels along it.
        clean: whether off units were zero.
        across: whether the norm takes its statistics across units. over: the dimensions of those units.
        ndim: the number of dimensions.
        kind: see `hatcl.register`.
    """

    ids: dict[int, Ints]
    clean: bool
    across: bool = False
    over: frozenset[int] = frozenset()
    ndim: int = 0
    kind: str = ""

    @classmethod
    def of(cls, shadow: Shadow) -> NormSeen:
        """The record of an input with this shadow, before any statistics are taken."""
        ids = {d: vector(slot.ids, d).numpy().copy() for slot in shadow.slots for d in varying(slot.ids)}
        ndim = shadow.slots[0].ids.dim() if shadow.slots else 0
        return cls(ids, all(slot.clean for slot in shadow.slots), ndim=ndim)


@dataclass
class Trace:
    """The results of one run of the model.

    Attributes:
        labels: every label, coupled, with its roles.
        first: for each axis of a parameter, its first label.
        joint: for the weight of each grouped convolution: its view by groups, the shape in which the labels that it
            reads broadcast over that view, and the first of those labels.
        folds: where a parameter is multiplied by the gate of the unit that it writes.
        read_dirty: where a weight reads a unit that is not zero when off. The weight is multiplied there by that unit's
            gate.
        outputs: the labels that the model's outputs carry.
        norms: the input of each norm.
        mixing: the input of every other module without children that reduces over units, and so may be a norm.
        seen: the parameters that the forward used.
        standardised: the weights that a batch norm of their own normalises before use.
        notes: by module path, what the trace could not follow and what it did instead.
        places: pairs of labels and the place where each label was met, for dimensions whose indices are computed apart.
        units: the unit number of each label, once `resolve` has numbered the units.
    """

    labels: Labels = field(default_factory=Labels)
    first: dict[ParameterAxis, int] = field(default_factory=dict)
    joint: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = field(default_factory=dict)
    folds: set[Use] = field(default_factory=set)
    read_dirty: set[Use] = field(default_factory=set)
    outputs: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    norms: dict[str, NormSeen] = field(default_factory=dict)
    mixing: dict[str, NormSeen] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    standardised: set[str] = field(default_factory=set)
    notes: dict[str, str] = field(default_factory=dict)
    places: list[tuple[Ints, Ints]] = field(default_factory=list)
    units: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


class Coupling:
    """The state of one trace. found: the results so far. Labels live on the CPU, on whatever device the model is."""

    def __init__(self, model: nn.Module, norms: Callable[[nn.Module], bool]) -> None:
        self.found = Trace()
        self.labels = self.found.labels
        self.shadows = Shadows()
        self.remade: set[str] = set()  # norms that multiply by something other than their weight, such as 1 + weight
        self._modules = dict(model.named_modules())
        self._is_norm = norms
        self._entered: dict[str, Shadow] = {}
        self._path: list[str] = [""]
        for name, p in model.named_parameters():
            slots = []
            for d, n in enumerate(p.shape):
                if n > 1:
                    start = self.labels.new(n, (name, d))
                    self.found.first[name, d] = start
                    shape = [n if i == d else 1 for i in range(p.dim())]
                    ids = torch.arange(start, start + n, device="cpu").view(shape).expand(p.shape)
                    slots.append(Slot(ids, True, frozenset({(name, d)})))
            self.shadows[p] = Shadow(tuple(slots), frozenset({name}))

    # ---- the module at work ------------------------------------------------------------------------------------

    @property
    def here(self) -> str:
        """The path of the module at work."""
        return self._path[-1]

    @property
    def in_norm(self) -> bool:
        """Is the module at work a norm layer that gates its own output?"""
        return self._is_norm(self._modules[self.here])

    def enter(self, path: str, args: Sequence[Any]) -> None:
        """Called when a module begins: record the input of a norm, and remember that of a module without children."""
        self._path.append(path)
        shadow = self.shadow(next((a for a in args if isinstance(a, Tensor)), None))
        if shadow is not None and self.in_norm:
            self.found.norms[path] = NormSeen.of(shadow)
        elif shadow is not None and not self._modules[path]._modules:
            self._entered[path] = shadow

    def leave(self) -> None:
        """Called when the module at work ends."""
        self._path.pop()

    def note(self, what: str) -> None:
        """Record what fell back in the module at work; a module keeps its first note."""
        self.found.notes.setdefault(self.here, what)

    # ---- shadows -----------------------------------------------------------------------------------------------

    def shadow(self, x: Any) -> Shadow | None:
        """The shadow of a tensor; None for constants and for anything that is not a tensor."""
        return self.shadows.get(x)

    def keep(self, x: Tensor, shadow: Shadow) -> None:
        """Give a new tensor its shadow."""
        if x not in self.shadows:
            self.shadows[x] = shadow if shadow.of_parameters else self._distinct(shadow)

    def _distinct(self, shadow: Shadow) -> Shadow:
        """Remove slots without information: duplicates, and a slot with one unit for the whole tensor if the tensor is
        not zero when that unit is off. Such a unit becomes always on."""
        kept: list[Slot] = []
        for slot in shadow.slots:
            if not varying(slot.ids) and (not slot.clean or not bool(small(slot.ids).any())):
                self.mark("whole", slot.ids)
            elif not any(_say_the_same(slot, other) for other in kept):
                kept.append(slot)
        return shadow if len(kept) == len(shadow.slots) else replace(shadow, slots=tuple(kept))

    def commit(self, shadow: Shadow | None) -> None:
        """Apply the pending folds of this value, because an operation reads it gated."""
        if shadow is not None:
            self.found.folds |= shadow.pending

    # ---- roles -------------------------------------------------------------------------------------------------

    def mark(self, role: str, ids: Tensor) -> None:
        """Give the labels a role (see `Labels.ROLES`)."""
        self.labels.mark(role, flat_ids(ids))

    def place(self, ids: Tensor, dims: Collection[int]) -> None:
        """Record that labels at different indices of these dimensions are computed apart (heads of an attention, groups
        of a convolution), so that none can replace one at another index."""
        apart, few = [d for d in varying(ids) if d in dims], small(ids)
        if apart:
            index = torch.zeros((), dtype=torch.long)
            for d in apart:
                index = index * few.shape[d] + placed(torch.arange(few.shape[d]), d, few.shape)
            self.found.places.append((flat_ids(ids), index.expand(few.shape).reshape(-1).numpy()))

    def drop(self, slot: Slot) -> None:
        """Drop a parameter that no rule covers here: it is never frozen one-sided; each task gets its own copy
        instead."""
        self.mark("dropped", slot.ids)

    def own(self, param: Slot, ids: Tensor) -> None:
        """The parameter's labels take the units they meet; where they meet "always on" they are forced on."""
        p, a = side_by_side(param.ids, ids)
        self.couple(param.ids, ids)
        self.labels.mark("owns", p)
        self.labels.mark("forced", p[a == 0])

    def carry(self, p: Slot) -> tuple[Slot, set[Use]]:
        """The slot of a contraction's output, which carries the weight's own labels, and the folds that become
        pending."""
        self.mark("owns", p.ids)
        self.mark("carried", p.ids)
        axes = self.axes_of(p)
        if p.folds is None:  # weight standardisation would cancel the gate, so it acts on the module's output
            self.note("the gate would cancel in the weight's own normalisation: it acts on the layer's output")
            axes = frozenset((*a, "output") for a in axes)
        return Slot(p.ids, True), {(self.here, a) for a in axes}

    def read(self, p: Slot, inputs: Sequence[Slot]) -> None:
        """The parameter's labels along the contracted dimension read the activation's units."""
        if not inputs:
            self.mark("forced", p.ids)
        for x in inputs:
            self.couple(x.ids, p.ids)
            a, b = side_by_side(x.ids, p.ids)
            self.labels.mark("forced", b[a == 0])
            self.labels.mark("read", b)
            if not x.clean:
                self.read_dirty(b)

    def read_dirty(self, labels: Ints) -> None:
        """Record that the module at work reads, through these labels, units that are not zero when off."""
        self.found.read_dirty |= {(self.here, axis) for axis in self.labels.axes_of(labels)}

    def as_activation(self, slots: Sequence[Slot], dims: set[int]) -> list[Slot]:
        """A parameter that is used as data (learned queries): its labels along `dims` are units that it writes."""
        kept = [s for s in slots if dims & set(varying(s.ids))]
        for slot in kept:
            self.mark("owns", slot.ids)
            self.mark("carried", slot.ids)
            if slot.folds is not None:
                self.fold(slot)
        return [replace(slot, clean=slot.folds is not None, folds=None) for slot in kept]

    def fold(self, slot: Slot) -> None:
        """Multiply the parameters from which this value is computed by the gate, along this slot."""
        self.found.folds |= self.uses_of(slot)

    def uses_of(self, slot: Slot) -> set[Use]:
        """The folds with which the module at work would gate this parameter value."""
        return {(self.here, a) for a in self.axes_of(slot)}

    def axes_of(self, slot: Slot) -> frozenset[ParameterAxis]:
        """The axes of the parameters from which the slot's values are computed."""
        return slot.folds if slot.folds is not None else frozenset(self.labels.axes_of(flat_ids(slot.ids)))

    def across(self, seen: NormSeen, ids: Tensor) -> None:
        """Record that a norm takes its statistics across these units."""
        units = np.unique(self.labels.find(flat_ids(ids)))
        seen.across = True
        seen.over |= {d for d, at in seen.ids.items() if np.isin(self.labels.find(at), units).any()}

    def mixes(self, what: str, ids: Tensor) -> None:
        """Record a reduction over these units: a norm takes statistics across them, any other module loses track of
        them."""
        if self.here in self.found.norms:
            self.across(self.found.norms[self.here], ids)
            return
        self.note(f"{what} over differing units forgets them")
        if self.here in self._entered:
            self.across(self.found.mixing.setdefault(self.here, NormSeen.of(self._entered[self.here])), ids)

    # ---- labels that meet --------------------------------------------------------------------------------------

    def couple(self, left: Tensor, right: Tensor) -> None:
        """Couple the labels that meet in the same element: they are one channel. Nothing is coupled with "always
        on"."""
        self.labels.union(*self._pairs(left, right))

    def couple_along(self, ids: Tensor, dims: Sequence[int]) -> Tensor:
        """Couple the labels that differ only along `dims` into one unit."""
        first = ids
        for d in dims:
            first = first.narrow(d, 0, 1)
        self.couple(ids, first)
        return self.canonical(first.expand(ids.shape))

    def canonical(self, ids: Tensor) -> Tensor:
        """The slot with coupled labels made equal, and with stride 0 along dimensions that became constant."""
        return settle(torch.from_numpy(self.labels.find(small(ids).numpy())).expand(ids.shape))

    def adopt(self, ids: Tensor, slots: Sequence[Slot]) -> Slot | None:
        """The parameter's slot that runs along the activation's labels, if any; of several, the one whose coupling
        would merge the fewest of the activation's units."""
        dims = set(varying(ids))
        options = [s for s in slots if dims & set(varying(s.ids))]
        if len(options) < 2:
            return options[0] if options else None
        return min(options, key=lambda s: self._spread(ids, s.ids))

    def _pairs(self, left: Tensor, right: Tensor) -> tuple[Ints, Ints]:
        """The pairs of labels that meet, each pair once."""
        a, b = side_by_side(left, right)
        keys = np.sort(a * len(self.labels.parent) + b)
        keys = keys[np.diff(keys, prepend=-1) != 0]  # np.unique's hashing takes seconds where most keys differ
        return np.divmod(keys, len(self.labels.parent))

    def _spread(self, act: Tensor, param: Tensor) -> int:
        """How many of the activation's units coupling would merge into one: the most labels that one parameter label
        meets."""
        a, b = self._pairs(act, param)
        b = b[(a != 0) & (b != 0)]
        return int(np.unique(b, return_counts=True)[1].max()) if b.size else 1 << 30


def _say_the_same(a: Slot, b: Slot) -> bool:
    """Do two slots hold the same information?"""
    return a.clean == b.clean and a.ids.stride() == b.ids.stride() and torch.equal(small(a.ids), small(b.ids))
