"""`describe`: the units of the map, and their use by tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..map.units import NORM
from .gates import gates_of, groups_of
from .held import held
from .lineage import forgotten_lineage, lineage, spoken
from .protection import by_degrees
from .room import Room, room_of
from .tasks import tasks


@dataclass(frozen=True)
class Description:
    """A HAT model in numbers; prints as a table.

    Attributes:
        units: the number of units. use: sealed task -> the number it uses.
        elements: shared_both (owner and reader known; a reader can be the input, which is always on), shared_one (only
        one of them known), own_copy (each task has its own; one copy counted), always_on (neither).
        layers: per layer its units, the number of them that each sealed task uses, its shared elements, and how many of
        those are free. room: the free elements in all, and the number of further tasks that they suffice for.
        lineage: task -> the tasks whose knowledge was transplanted into it. forgotten: the numbers of those that have
        been forgotten.
        drift: sealed task -> how far later tasks have moved it (`moved`: the largest change of an output, `same`: the
            smallest share of rows with the same answer, on a batch of the later task); empty where tasks are exact.
        copies: parameter -> the reason why each task has its own copy. notes: module path -> operations that the trace
            could not follow.
    """

    units: int
    use: dict[int, int]
    elements: dict[str, int]
    layers: list[dict[str, Any]]
    copies: dict[str, str]
    notes: dict[str, str]
    room: Room
    lineage: dict[int, list[int]] = field(default_factory=dict)
    forgotten: dict[int, list[int]] = field(default_factory=dict)
    drift: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def shares(self) -> dict[str, float]:
        """`elements` as shares of all."""
        total = max(sum(self.elements.values()), 1)
        return {k: v / total for k, v in self.elements.items()}

    @property
    def lineage_lines(self) -> list[str]:
        """A sentence for each task that was started from another."""
        lines = []
        for t in sorted({*self.lineage, *self.forgotten}):
            there, gone = self.lineage.get(t, []), self.forgotten.get(t, [])
            sources = ([spoken(there)] if there else []) + ([f"{spoken(gone)}, since forgotten"] if gone else [])
            lines.append(f"lineage: task {t} carries what was transplanted from {' and from '.join(sources)}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        return {
            "units": self.units, "use": dict(self.use), "elements": dict(self.elements), "shares": self.shares,
            "layers": [dict(x) for x in self.layers], "copies": dict(self.copies), "notes": dict(self.notes),
            "lineage": dict(self.lineage), "forgotten": dict(self.forgotten),
            "room": self.room.to_dict(),
            "drift": {t: dict(d) for t, d in self.drift.items()},
        }  # fmt: skip

    def __str__(self) -> str:
        tasks = list(self.use)
        width = max([len("layer"), *(len(x["name"]) for x in self.layers)])
        head = f"{'layer':<{width}}  units    free" + "".join(f"  task {t}" for t in tasks)
        lines = [head, "-" * len(head)]
        every = {key: sum(layer[key] for layer in self.layers) for key in ("elements", "free")}
        for layer in [*self.layers, {"name": "all", "units": self.units, "used": self.use, **every}]:
            cells = "".join(f"{layer['used'][t]:>{len(f'  task {t}')}}" for t in tasks)
            share = layer["free"] / max(layer["elements"], 1)
            lines.append(f"{layer['name']:<{width}}  {layer['units']:>5}{share:>8.1%}{cells}")
        names = {
            "shared_both": "owner and reader known",
            "shared_one": "one end known",
            "own_copy": "own copy per task",
            "always_on": "always on",
        }
        lines.append("elements: " + ", ".join(f"{names[k]} {v:.1%}" for k, v in self.shares.items()))
        lines += self.lineage_lines
        lines.append(str(self.room))
        lines += [
            f"task {t}: protected by degrees, not exactly; later tasks moved its outputs by up to {d['moved']:.3g}, at "
            f"least {d['same']:.1%} of its answers are as they were"
            for t, d in self.drift.items()
        ]
        lines += [f"note: {path or 'model'}: {what}" for path, what in self.notes.items()]
        return "\n".join(lines)


def describe(model: nn.Module) -> Description:
    """Units, owners, shares and use per task of a HAT model."""
    gates = gates_of(model)
    done = tasks(model)
    room = room_of(model)
    layers = [
        {
            "name": name,
            "units": stop - start,
            "used": {t: int(g.masks[t, start:stop].sum()) for t in done},
            "elements": room.elements[name],
            "free": room.free[name],
        }
        for name, g, start, stop in groups_of(model)
    ]
    unit_map = gates[0].unit_map
    elements = dict.fromkeys(("shared_both", "shared_one", "own_copy", "always_on"), 0)
    for h in held(model):
        if h.task is not None:
            continue
        if h.plain:
            elements["own_copy"] += h.param.numel()
            continue
        unit = {True: 0.0, False: 0.0}
        for axis in h.plan.axes if h.plan is not None else ():
            unit[axis.owner] = max(unit[axis.owner], float((axis.units.numbers != 0).mean()))
        reader = 1.0 - unit_map.entries[h.name].lost if unit_map else float(unit[False] or h.param.dim() < 2)
        both = unit[True] * reader
        one = unit[True] * (1 - reader) + (1 - unit[True]) * unit[False]
        n = h.param.numel()
        elements["shared_both"] += round(n * both)
        elements["shared_one"] += round(n * one)
        elements["always_on"] += n - round(n * both) - round(n * one)
    return Description(
        sum(g.num_units for g in gates),
        {t: sum(int(g.masks[t].sum()) for g in gates) for t in done},
        elements,
        layers,
        {e.name: e.why for e in unit_map.entries.values() if e.copied and e.why != NORM} if unit_map else {},
        dict(unit_map.notes) if unit_map else {},
        room,
        lineage(model),
        forgotten_lineage(model),
        {t: {"moved": float(gates[0].drift[t, 0]), "same": float(gates[0].drift[t, 1])} for t in done}
        if by_degrees(model)
        else {},
    )
