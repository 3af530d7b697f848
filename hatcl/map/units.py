"""The map: for every element of every parameter, the unit that owns it and the unit that it reads from.

A parameter's entry is a product of *factors*: one vector of unit numbers per dimension that carries units (0 = always
on), broadcast over the parameter. An element is live for a task when the gates of all its factors are 1. Units are
numbered from 1 in the order of the parameters that write them, so the same model gets the same numbers in every
process.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .coupling import Trace
from .labels import Ints
from .lora import is_factor

NORM = "norm"  # why a parameter is copied


@dataclass(frozen=True)
class Factor:
    """The units along one axis of a parameter.

    Attributes:
        units: `[n]` unit numbers, 0 = always on.
        shape: the shape in which they broadcast over `Entry.view`.
        owner: whether the axis is written (else read).
    """

    axis: int | str
    units: Ints
    shape: tuple[int, ...]
    owner: bool

    def to_json(self) -> dict[str, Any]:
        """JSON-able, with the units as runs."""
        return {"axis": self.axis, "units": runs(self.units), "shape": list(self.shape), "owner": self.owner}


@dataclass(frozen=True)
class Entry:
    """One parameter on the map.

    Attributes:
        copied: no unit owns it, so each task has its own copy (M5). why: the reason, if so.
        head: its first dimension is the model's output (classes).
        classes: for a head, the first parameter that writes the same classes.
        lost: the share of its elements whose reader is unknown.
        standardised: its rows are normalised over their inputs before use.
    """

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    factors: tuple[Factor, ...]
    copied: bool
    why: str = ""
    head: bool = False
    lost: float = 0.0
    standardised: bool = False
    classes: str = ""

    @property
    def unexplained(self) -> bool:
        """Is it copied per task because nothing is known about it? (Copies of norms and heads are intended.)"""
        return self.copied and self.why != NORM and not self.head

    @property
    def known(self) -> float:
        """Share of the elements whose owner and reader are both known."""
        if self.unexplained:
            return 0.0
        owned = (
            1.0 if self.copied else max((float((f.units != 0).mean()) for f in self.factors if f.owner), default=0.0)
        )
        return owned * (1 - self.lost)

    def live(self, on: Tensor) -> Tensor:
        """Which elements are live: `[*shape]` bool from `on`, `[U + 1]` bool with `on[0]` = True (always on)."""
        mask = torch.ones((), dtype=torch.bool, device=on.device)
        for f in self.factors:
            mask = mask & on[torch.as_tensor(f.units, device=on.device)].view(f.shape)
        return mask.expand(self.view).reshape(self.shape)


@dataclass(frozen=True)
class NormInput:
    """The input of a norm.

    Attributes:
        dim: the dimension that carries units. units: their numbers along it.
        clean: whether off units are exactly zero there.
        across: whether the norm takes its statistics across units.
        kind: see `hatcl.register_layer`.
    """

    dim: int
    units: Ints
    clean: bool
    across: bool
    kind: str = ""


@dataclass
class UnitMap:
    """The map of a network.

    Attributes:
        num_units: U.
        layers: (name, start, stop) of each layer's units, by the parameter that first writes them; 1-based, stop
            excluded.
        entries: one per parameter name.
        folds: for (module path, parameter name), the factors to multiply by the gate where that module uses it.
        outputs: for module path, the units whose gate multiplies its output instead of its weight.
        norms: for module path, the norm's input.
        notes: by module path, what the trace could not follow and what it did instead.
        buffers: for module path, the buffers that a forward writes, so that every task has its own.
        states: for module path, other state that a forward changes (see `hat/layers/state.py`).
        places: `[U]`; units with different numbers are computed apart (heads of an attention, groups of a convolution),
            so that one cannot replace the other. None: the map was written by a version that did not record this.
    """

    num_units: int
    layers: list[tuple[str, int, int]]
    entries: dict[str, Entry]
    folds: dict[tuple[str, str], tuple[int | str, ...]]
    outputs: dict[str, Ints]
    norms: dict[str, NormInput]
    notes: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    states: dict[str, tuple[str, ...]] = field(default_factory=dict)
    places: Ints | None = None

    @property
    def known(self) -> float:
        """Share of the parameters' elements whose owner and reader are both known. Either can be always on: the image
        that is read, the classes that a head writes."""
        total = sum(math.prod(e.shape) for e in self.entries.values())
        return sum(math.prod(e.shape) * e.known for e in self.entries.values()) / max(total, 1)

    def with_copies(self, names: Collection[str], why: str) -> UnitMap:
        """The map on which every task also has its own copy of these parameters."""
        entries = {name: replace(e, copied=True, why=why) if name in names else e for name, e in self.entries.items()}
        return replace(self, entries=entries)

    def to_json(self) -> dict[str, Any]:
        """JSON-able, compact (runs instead of lists); `from_json` reads it back."""

        def entry(e: Entry) -> dict[str, Any]:
            return {
                "name": e.name,
                "shape": list(e.shape),
                "view": list(e.view),
                "factors": [f.to_json() for f in e.factors],
                "copied": e.copied,
                "why": e.why,
                "head": e.head,
                "lost": e.lost,
                "standardised": e.standardised,
                "classes": e.classes,
            }

        def norm(n: NormInput) -> dict[str, Any]:
            return {"dim": n.dim, "units": runs(n.units), "clean": n.clean, "across": n.across, "kind": n.kind}

        return {
            "num_units": self.num_units,
            "layers": [list(x) for x in self.layers],
            "entries": [entry(e) for e in self.entries.values()],
            "folds": [[path, name, list(axes)] for (path, name), axes in self.folds.items()],
            "outputs": {path: runs(u) for path, u in self.outputs.items()},
            "norms": {path: norm(n) for path, n in self.norms.items()},
            "notes": self.notes,
            "buffers": {path: list(names) for path, names in self.buffers.items()},
            "states": {path: list(names) for path, names in self.states.items()},
            "places": None if self.places is None else runs(self.places),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> UnitMap:
        """The map that `to_json` wrote."""

        def factor(f: dict[str, Any]) -> Factor:
            return Factor(f["axis"], unrun(f["units"]), tuple(f["shape"]), f["owner"])

        def entry(e: dict[str, Any]) -> Entry:
            factors = tuple(map(factor, e["factors"]))
            return Entry(**{**e, "shape": tuple(e["shape"]), "view": tuple(e["view"]), "factors": factors})

        return cls(
            data["num_units"],
            [(n, a, b) for n, a, b in data["layers"]],
            {e["name"]: entry(e) for e in data["entries"]},
            {(path, name): tuple(axes) for path, name, axes in data["folds"]},
            {path: unrun(u) for path, u in data["outputs"].items()},
            {p: NormInput(**{**n, "units": unrun(n["units"])}) for p, n in data["norms"].items()},
            data["notes"],
            {path: tuple(names) for path, names in data["buffers"].items()},
            {path: tuple(names) for path, names in data.get("states", {}).items()},
            None if data.get("places") is None else unrun(data["places"]),
        )


def runs(values: Ints) -> list[list[int]]:
    """The values as runs [first, count, step], constant or consecutive: step is 0 or 1."""
    out: list[list[int]] = []
    for v in values.tolist():
        if out:
            first, count, step = out[-1]
            if count == 1 and v in (first, first + 1):
                out[-1] = [first, 2, v - first]
                continue
            if count > 1 and v == first + count * step:
                out[-1][1] += 1
                continue
        out.append([v, 1, 0])
    return out


def unrun(segments: Iterable[Sequence[int]]) -> Ints:
    """The values of `runs`."""
    parts = [np.arange(n) * step + first for first, n, step in segments]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


def resolve(found: Trace, model: nn.Module, copied: Collection[str] = ()) -> UnitMap:
    """Number the units of a trace and write every parameter's entry.

    In a model with LoRA adapters, parameters that are not trained (`requires_grad=False`) are the base and belong to no
    task: the units that they own are always on, and they are never copied. The remaining units are those of the
    adapters' pairs.

    Args:
        copied: parameters that belong to the task whichever unit owns them (the affine parameters of norms).
    """
    labels = found.labels
    roots = labels.find(np.arange(len(labels.parent)))
    read = labels.any_in_component("read")
    in_output = np.zeros(len(roots), dtype=bool)
    in_output[roots[found.outputs]] = True
    # Labels that only the output sees (the logits of a head) are not units: every task needs all of them.
    is_unit = labels.any_in_component("carried") & ~(in_output[roots] & ~read)
    is_unit &= ~labels.any_in_component("whole")
    is_unit[0] = False
    names = [n for n, _ in model.named_parameters()]
    # without adapters, the parameters that are not trained may be just a table of positions
    adapted = any(map(is_factor, names))
    fixed = {n for n in names if not model.get_parameter(n).requires_grad} if adapted else set()
    base = np.zeros(len(roots), dtype=bool)  # the components that the base owns
    for (name, d), first in found.first.items():
        if name in fixed:
            here = slice(first, first + model.get_parameter(name).shape[d])
            base[roots[here][labels.flags["owns"][here]]] = True
    is_unit &= ~base[roots]
    counts = ~(labels.flags["forced"] | labels.flags["dropped"])
    held = np.zeros(len(roots), dtype=bool)
    held[roots[counts]] = True
    is_unit &= held[roots]  # else no parameter would have the unit
    leaders = np.flatnonzero(is_unit & (roots == np.arange(len(roots))))
    number = np.zeros(len(roots), dtype=np.int64)
    number[leaders] = np.arange(1, len(leaders) + 1)
    unit_of = np.where(is_unit, number[roots], 0)
    found.units = unit_of
    counted = np.where(counts, unit_of, 0)

    entries: dict[str, Entry] = {}
    classes: dict[int, str] = {}  # the component of a head's first class -> the first parameter that writes it
    for name, p in model.named_parameters():
        view, joint_shape = tuple(p.shape), None
        if name in found.joint:
            view, joint_shape, start = found.joint[name]
        factors, owned, adds, kept = [], False, False, 1.0
        for d, n in enumerate(p.shape):
            if (name, d) not in found.first:
                continue
            first = found.first[name, d]
            units = counted[first : first + n]
            wrote = labels.flags["owns"][first : first + n]
            owned |= bool((units[wrote] != 0).any())
            adds |= bool(base[roots[first : first + n][wrote]].any())
            if (units != 0).any():
                factors.append(Factor(d, units, _broadcast(tuple(p.shape), view, d), bool(wrote.any())))
            if joint_shape is None and not wrote.any():
                kept *= 1 - float(labels.flags["dropped"][first : first + n].mean())
        if joint_shape is not None:
            n = int(np.prod(joint_shape))
            units = counted[start : start + n]
            if (units != 0).any():
                factors.append(Factor("joint", units, joint_shape, False))
        why = ""
        if name in fixed:
            pass
        elif name in copied:
            why = NORM
        elif adds and any(bool((f.units != 0).all()) for f in factors):
            pass  # it writes units of the base; the units that it reads decide (B of a LoRA pair)
        elif not owned:
            why = "no unit owns it" if name in found.seen else "not used by the forward pass"
        start0 = found.first.get((name, 0))
        head = start0 is not None and bool(in_output[roots[start0]] and not is_unit[start0])
        entries[name] = Entry(
            name, tuple(p.shape), view, tuple(factors), bool(why), why, head, 1 - kept, name in found.standardised,
            classes.setdefault(int(roots[start0]), name) if head else "",
        )  # fmt: skip

    folds: dict[tuple[str, str], set[Any]] = {}
    outputs: dict[str, Ints] = {}
    for path, axis in sorted([*found.folds, *found.read_dirty], key=str):
        factor = next((f for f in entries[axis[0]].factors if f.axis == axis[1]), None)
        if factor is None:
            continue
        if len(axis) > 2:  # a weight that is normalised before use: the gate acts on the layer's output
            outputs[path] = factor.units
        else:
            folds.setdefault((path, axis[0]), set()).add(axis[1])

    norms: dict[str, NormInput] = {}
    for path, seen in found.norms.items():
        for dim, ids in seen.ids.items():
            units = unit_of[ids]
            if (units != 0).any() and (dim in seen.over or not seen.over):
                norms[path] = NormInput(dim, units, seen.clean, seen.across, seen.kind)
    layers: list[tuple[str, int, int]] = []
    writers, sizes = np.unique(np.searchsorted(labels.starts, leaders, side="right") - 1, return_counts=True)
    stops = 1 + np.cumsum(sizes)
    for at, start, stop in zip(writers, (stops - sizes).tolist(), stops.tolist(), strict=True):
        name = labels.axes[at][0]
        if layers and layers[-1][0] == name:
            start = layers.pop()[1]
        layers.append((name, start, stop))
    return UnitMap(
        len(leaders), layers, entries,
        {key: tuple(sorted(axes, key=str)) for key, axes in folds.items()},
        outputs, norms, dict(found.notes), places=_places(found.places, unit_of, len(leaders)),
    )  # fmt: skip


def _places(met: Sequence[tuple[Ints, Ints]], unit_of: Ints, units: int) -> Ints:
    """One number per unit; units have the same number if they were met at the same index of all dimensions computed
    apart."""
    places = np.zeros(units, dtype=np.int64)
    for labels, index in met:
        first = np.full(units + 1, np.iinfo(np.int64).max)
        np.minimum.at(first, unit_of[labels], index)
        index = np.unique(first[1:], return_inverse=True)[1]
        places = np.unique(places * (units + 1) + index, return_inverse=True)[1]  # for pairs, numpy would sort bytes
    return places


def _broadcast(shape: tuple[int, ...], view: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """The shape in which a vector along `dim` of the parameter broadcasts over its view (dimension 0 split in two)."""
    if view == shape:
        return tuple(n if d == dim else 1 for d, n in enumerate(shape))
    if dim == 0:
        return (view[0], view[1], *[1] * (len(view) - 2))
    return tuple(n if d == dim + 1 else 1 for d, n in enumerate(view))
