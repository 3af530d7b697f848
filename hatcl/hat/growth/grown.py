"""The effect of a growth on the map: every unit is kept and followed by its new units, wherever it appears.

New units follow the unit that they belong to, in the numbering and along every axis. So a row of a head, of a group or
of a residual stream stays one row, and old units keep their order. A head that cannot become wider is followed by whole
new heads: its units are a block.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ConversionError
from ...map.labels import Ints
from ...map.units import Entry, Factor, NormInput, UnitMap, runs, unrun


@dataclass(frozen=True)
class Growth:
    """One growth of a network. JSON-able.

    Attributes:
        counts: `[U]`, the number of units that each unit becomes: itself and the new ones that follow it.
        widths: `[U]`, the number of units in its block, which new blocks follow as a whole; 1 for most units.
        sizes: module path -> attribute -> its value after the growth.
        buffers: name of a buffer -> (the dimension that carries units, their numbers before the growth).
    """

    counts: Ints
    widths: Ints
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    buffers: dict[str, tuple[int, Ints]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": runs(self.counts),
            "widths": runs(self.widths),
            "sizes": self.sizes,
            "buffers": {name: [dim, runs(units)] for name, (dim, units) in self.buffers.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Growth:
        buffers = {name: (dim, unrun(units)) for name, (dim, units) in data["buffers"].items()}
        return cls(unrun(data["counts"]), unrun(data["widths"]), data["sizes"], buffers)

    @cached_property
    def bounds(self) -> Ints:
        """`[U + 1]`: the cumulative number of units after the growth; `bounds[u]` includes the first u old units."""
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)

    @cached_property
    def first(self) -> Ints:
        """`[U + 1]`: the first unit of each unit's block."""
        out = np.arange(len(self.counts) + 1)
        at = 1
        for unit in (np.flatnonzero(self.widths > 1) + 1).tolist():
            if unit >= at:
                at = unit + int(self.widths[unit - 1])
                out[unit:at] = unit
        return out

    @cached_property
    def number(self) -> Ints:
        """`[U + 1]`: each unit's number after the growth; 0 (always on) stays 0."""
        unit = np.arange(1, len(self.counts) + 1)
        first = self.first[1:]
        return np.concatenate([[0], self.bounds[first - 1] + 1 + unit - first]).astype(np.int64)

    def along(self, units: Ints, rows: int = 1) -> Grown:
        """An axis with these units after the growth. A unit, or a block, with several consecutive entries is followed
        by the same number of entries for each new one. rows: the number of equal rows of the axis; each row grows
        separately.

        Raises:
            ConversionError: a block is incomplete somewhere on the axis.
        """
        starts = self._starts(units)
        head = units[starts[:-1]]
        row = starts[:-1] * rows // max(len(units), 1)
        edge = np.flatnonzero((np.diff(head) != 0) | (np.diff(row) != 0)) + 1
        new, places, parents = [], [], []
        size = 0
        for a, b in zip([0, *edge.tolist()], [*edge.tolist(), len(head)], strict=True):
            start, stop, unit = int(starts[a]), int(starts[b]), int(head[a]) if len(head) else 0
            times = int(self.counts[unit - 1]) if unit else 1
            width = (stop - start) // max(b - a, 1)
            apart = width if unit else 0  # distance from a block to the next one
            mine = self.number[units[start:stop]]
            new.append((mine[None, :] + apart * np.arange(times)[:, None]).reshape(-1))
            places.append(np.arange(size, size + stop - start))
            parents.append(np.tile(np.arange(start, stop), times))
            size += times * (stop - start)
        return Grown(*(np.concatenate(x).astype(np.int64) for x in (new, places, parents)))

    def _starts(self, units: Ints) -> Ints:
        """The start of each unit or block, and the end of the axis."""
        widths = np.concatenate([[1], self.widths])[units]
        if (widths == 1).all():
            return np.arange(len(units) + 1)
        starts, at = [], 0
        while at < len(units):
            unit, width = int(units[at]), int(widths[at])
            if width > 1 and not np.array_equal(units[at : at + width], np.arange(width) + self.first[unit]):
                raise ConversionError("a head would get another one after it in places where it is not whole")
            starts.append(at)
            at += width
        return np.array([*starts, at])


@dataclass(frozen=True)
class Grown:
    """An axis after a growth.

    Attributes:
        units: the unit of each entry. places: the new index of each old entry. parents: for each new entry, the old
            entry that it equals or follows.
    """

    units: Ints
    places: Ints
    parents: Ints


@dataclass
class Spread:
    """The places of a former tensor's entries in the current one.

    Attributes:
        shape: the former shape. view: the current shape that dimensions refer to.
        places: dimension -> the current index of each former entry. parents: dimension -> for each current entry, the
            former entry that it equals or follows.
    """

    shape: tuple[int, ...]
    view: tuple[int, ...]
    places: dict[int, Tensor] = field(default_factory=dict)
    parents: dict[int, Tensor] = field(default_factory=dict)

    def of_before(self, x: Tensor) -> Tensor:
        """The former entries of a current tensor, in its former shape and memory format, so that the same kernels
        run."""
        lined = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        value = self._viewed(x)
        for dim, at in self.places.items():
            value = value.index_select(dim, at.to(x.device))
        value = value.reshape(*self._rows(x, self.shape), *self.shape[1:])
        return value.contiguous(memory_format=torch.channels_last) if lined else value

    def grown(self, x: Tensor, new: Tensor | None = None) -> Tensor:
        """A former tensor in the current size. new: a tensor with the values of new entries; default: each new entry
        has the value of the one that it follows."""
        if new is None:
            for dim, at in self.parents.items():
                x = x.index_select(dim, at.to(x.device))
            return x.clone()
        made = new.to(x).clone(memory_format=torch.contiguous_format)
        made.view(-1)[self.flat(made)] = x.reshape(-1)
        lined = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return made.contiguous(memory_format=torch.channels_last) if lined else made

    def flat(self, now: Tensor) -> Tensor:
        """The flat index of each former element in a current tensor."""
        at = self._viewed(torch.arange(now.numel(), device=now.device).view(now.shape))
        for dim, places in self.places.items():
            at = at.index_select(dim, places.to(now.device))
        return at.reshape(-1)

    def shape_of(self, x: Tensor, now: Sequence[int]) -> tuple[int, ...]:
        """The current shape of a former tensor. A head keeps its own number of classes."""
        return (*self._rows(x, now), *now[1:])

    def then(self, later: Spread) -> Spread:
        """This spread combined with a later growth's."""
        made = Spread(self.shape, later.view, dict(later.places), dict(later.parents))
        for dim, at in self.places.items():
            made.places[dim] = later.places[dim][at] if dim in later.places else at
            mine = self.parents[dim]
            made.parents[dim] = mine[later.parents[dim]] if dim in later.parents else mine
        return made

    def _viewed(self, x: Tensor) -> Tensor:
        return x if len(self.view) == x.dim() else x.reshape(self.view)

    def _rows(self, x: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
        """The number of rows; a head has one row per class of its task."""
        return (shape[0] if 0 in self.places or len(self.view) != len(self.shape) else x.shape[0],)


@dataclass
class GrownAxes:
    """A parameter after a growth: its shape and view, the units of its axes and the shapes in which they broadcast."""

    shape: tuple[int, ...]
    view: tuple[int, ...]
    axes: list[tuple[Ints, tuple[int, ...]]]
    spread: Spread


def grown_axes(
    growth: Growth, shape: tuple[int, ...], view: tuple[int, ...], axes: Sequence[tuple[Ints, tuple[int, ...], bool]]
) -> GrownAxes:
    """A parameter with these axes (units, shape over the view, owner) after the growth.

    Raises:
        ConversionError: the groups of a weight would grow in different ways.
    """
    grouped, new_view = view != shape, list(view)
    made: list[tuple[Ints, tuple[int, ...]]] = []
    places: dict[int, Tensor] = {}
    parents: dict[int, Tensor] = {}
    for units, over, owner in axes:
        dim = (1 if owner else 2) if grouped and over[0] == view[0] else next(d for d, n in enumerate(over) if n > 1)
        rows = over[0] if grouped and dim > 0 and over[0] == view[0] else 1
        new = growth.along(units, rows)
        width = len(new.units) // rows
        of_rows = new.places.reshape(rows, -1) - np.arange(rows)[:, None] * width
        if len(new.units) % rows or (of_rows != of_rows[0]).any():
            raise ConversionError("the groups of a weight would grow in different ways; report the model")
        new_view[dim] = width
        made.append((new.units, tuple(width if d == dim else n for d, n in enumerate(over))))
        if len(new.units) != len(units):
            places[dim] = torch.from_numpy(of_rows[0].copy())
            parents[dim] = torch.from_numpy(new.parents[:width].copy())
    new_shape = (new_view[0] * new_view[1], *new_view[2:]) if grouped else tuple(new_view)
    return GrownAxes(new_shape, tuple(new_view), made, Spread(shape, tuple(new_view), places, parents))


def grown_map(unit_map: UnitMap, growth: Growth) -> UnitMap:
    """The map of the grown network.

    Raises:
        ConversionError: see `grown_axes`.
    """

    def entry(e: Entry) -> Entry:
        new = grown_axes(growth, e.shape, e.view, [(f.units, f.shape, f.owner) for f in e.factors])
        factors = (Factor(f.axis, u, s, f.owner) for f, (u, s) in zip(e.factors, new.axes, strict=True))
        return dataclasses.replace(e, shape=new.shape, view=new.view, factors=tuple(factors))

    def norm(n: NormInput) -> NormInput:
        return dataclasses.replace(n, units=growth.along(n.units).units)

    return dataclasses.replace(
        unit_map,
        num_units=int(growth.bounds[-1]),
        layers=[(name, int(growth.bounds[a - 1]) + 1, int(growth.bounds[b - 1]) + 1) for name, a, b in unit_map.layers],
        entries={name: entry(e) for name, e in unit_map.entries.items()},
        outputs={path: growth.along(units).units for path, units in unit_map.outputs.items()},
        norms={path: norm(n) for path, n in unit_map.norms.items()},
        places=None if unit_map.places is None else _grown_places(unit_map.places, growth),
    )


def _grown_places(places: Ints, growth: Growth) -> Ints:
    """New units have the places of the units that they follow; whole new heads are new places."""
    grown = growth.along(np.arange(1, len(places) + 1))
    width, after = growth.widths[grown.parents], grown.units - growth.number[1:][grown.parents]
    head = np.where(width > 1, after // width, 0)
    return np.unique(np.stack([places[grown.parents], head]), axis=1, return_inverse=True)[1].reshape(-1)


def sizes_after(growths: Sequence[Growth]) -> dict[str, dict[str, Any]]:
    """Module path -> attribute -> its value, for attributes that growths changed since the conversion."""
    out: dict[str, dict[str, Any]] = {}
    for growth in growths:
        for path, sizes in growth.sizes.items():
            out.setdefault(path, {}).update(sizes)
    return out


def key_of(growths: Sequence[Growth]) -> Tensor:
    """`[16]` uint8: a hash of the growths, so that a state of a model that grew differently is not loaded."""
    text = json.dumps([g.to_json() for g in growths], sort_keys=True)
    return torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()[:16]), dtype=torch.uint8)
