"""Array masks: q x q tasks, each with a q-th of every layer's units, where no two tasks share an element that has a
unit at both ends.

A layer's units are dealt in turn to q groups, so that every group has units in every convolution group and every head.
Layers that read each other get different colours. Task `t = i q + j` uses group `(a i + b j) mod q` of a layer whose
colour is (a, b). Colours are (1, 0), (0, 1) and (1, k) for 1 <= k < p, p the smallest prime factor of q: the
determinant of any two of them has an inverse mod q, so two tasks that agree in both have the same i and j. At most one
end of an element is then common to two tasks, unless the element reads the layer that it writes (recurrent weights).

An element with one end would be common to the q tasks of its colour. Biases, layer scales and depthwise kernels are
therefore copied per task. The stem, which reads the input itself, is not: it has the colour (1, 0), which stays the
same over q consecutive tasks, and the first of them learns it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..map.units import Entry, Factor, UnitMap
from .growth.grown import Growth
from .registry import layer_for

ONE_END = "it has a unit at one end only, which tasks share under array masks"
EXEMPT = "reads the layer that it writes, so that tasks share some of its elements under array masks"


def with_own_ends(unit_map: UnitMap, model: nn.Module) -> UnitMap:
    """The map for array masks: every task has its own copy of elements with a unit at only one end, except the stem.
    Elements that read the layer that they write are noted."""
    stem = set(_stem(model))
    own = {name for name, e in unit_map.entries.items() if _one_ended(e) and name not in stem}
    made = unit_map.with_copies(own, ONE_END)
    made.notes = dict(unit_map.notes)
    for name in exempt(made):
        path, _, leaf = name.rpartition(".")
        made.notes[path] = "; ".join(filter(None, [made.notes.get(path), f"{leaf} {EXEMPT}"]))
    return made


def _one_ended(entry: Entry) -> bool:
    return not entry.copied and len({f.owner for f in entry.factors}) == 1


def _stem(model: nn.Module) -> Iterator[str]:
    """Names of the parameters that are multiplied with what they read, or looked up by it: of those that read no unit,
    the ones that read the input, or positions. (A grouped convolution without units to read is a depthwise one.)"""
    names = {id(p): n for n, p in model.named_parameters()}
    for m in model.modules():
        layer = layer_for(type(m))
        for n, p in m._parameters.items():
            reads = n in layer.hat_reader_dims or (layer.hat_fold_output and n in layer.hat_owner_dims)
            if p is not None and reads and getattr(m, "groups", 1) == 1:
                yield names[id(p)]


def array_masks(unit_map: UnitMap, q: int, tasks: int, growths: Sequence[Growth] = ()) -> list[Tensor]:
    """For each task its mask, `[U]` bool.

    Args:
        unit_map: the network's map at conversion. growths: its growths since then. Units keep their groups, and a
            layer's new ones are dealt to all groups in turn.

    Raises:
        ConfigError: a layer or a convolution group has fewer than q units, no element has two ends, or there are too
            few colours; names the layer.
    """
    colours = _coloured(unit_map, q)
    _check_groups(unit_map, q)
    group, bounds = np.zeros(unit_map.num_units, dtype=np.int64), []
    for name, start, stop in unit_map.layers:
        if stop - start < q:
            raise ConfigError(
                f"masks='array:{q}': {_layer_name(name)} has {stop - start} units, which are fewer than {q} groups; "
                "take a smaller q, or a wider model"
            )
        group[start - 1 : stop - 1] = np.arange(stop - start) % q
        bounds.append((start - 1, stop - 1))
    for growth in growths:
        grown = np.full(int(growth.bounds[-1]), -1)
        grown[growth.number[1:] - 1] = group
        bounds = [(int(growth.bounds[start]), int(growth.bounds[stop])) for start, stop in bounds]
        for start, stop in bounds:
            new = start + np.flatnonzero(grown[start:stop] < 0)
            grown[new] = np.arange(len(new)) % q
        group = grown
    rows = [torch.zeros(len(group), dtype=torch.bool) for _ in range(tasks)]
    for (start, stop), (a, b) in zip(bounds, colours, strict=True):
        for t, row in enumerate(rows):
            row[start:stop] = torch.from_numpy(group[start:stop] == (a * (t // q) + b * (t % q)) % q)
    return rows


def exempt(unit_map: UnitMap) -> list[str]:
    """Parameters with elements that read the layer that they write: under array masks tasks share some of them."""
    layer = _layer_numbers(unit_map)
    return [e.name for e in unit_map.entries.values() if not e.copied and set.intersection(*_ends(e, layer))]


def _layer_name(name: str) -> str:
    return name.removesuffix(".weight")


def _layer_numbers(unit_map: UnitMap) -> np.ndarray:
    """`[U + 1]`: the layer of each unit; -1 for elements that are always on."""
    layer = np.full(unit_map.num_units + 1, -1)
    for i, (_, start, stop) in enumerate(unit_map.layers):
        layer[start:stop] = i
    return layer


def _ends(entry: Entry, layer: np.ndarray) -> tuple[set[int], set[int]]:
    """The layers that an entry writes, and those that it reads."""
    found: dict[bool, set[int]] = {True: set(), False: set()}
    for f in entry.factors:
        found[f.owner] |= set(np.unique(layer[f.units]).tolist()) - {-1}
    return found[True], found[False]


def _coloured(unit_map: UnitMap, q: int) -> list[tuple[int, int]]:
    """A colour per layer that differs from those of the layers that it reads and that read it, assigned greedily, first
    where the fewest are left (Brelaz 1979, doi 10.1145/359094.359101)."""
    prime = next(n for n in range(2, q + 1) if q % n == 0)
    palette = [(1, 0), (0, 1), *((1, k) for k in range(1, prime))]
    layer = _layer_numbers(unit_map)
    near: list[set[int]] = [set() for _ in unit_map.layers]
    stems: set[int] = set()
    for e in (e for e in unit_map.entries.values() if not e.copied):
        written, read = _ends(e, layer)
        for i, j in ((i, j) for i in written for j in read if i != j):
            near[i].add(j)
            near[j].add(i)
        if not read:
            stems |= written
    if not any(near):
        raise ConfigError(
            f"masks='array:{q}': no element reads a unit of one layer and writes one of another, so tasks could not be "
            "told apart by both; take masks='learned'"
        )
    colour: dict[int, int] = {}

    def taken(i: int) -> set[int]:
        return {colour[j] for j in near[i] if j in colour}

    for i in sorted(stems):
        if 0 not in taken(i):
            colour[i] = 0
    while len(colour) < len(near):
        i = max((i for i in range(len(near)) if i not in colour), key=lambda i: (len(taken(i)), len(near[i]), -i))
        free = [c for c in range(len(palette)) if c not in taken(i)]
        if not free:
            names = ", ".join(_layer_name(unit_map.layers[j][0]) for j in sorted(near[i])[:6])
            more = _next_prime(q)
            raise ConfigError(
                f"masks='array:{q}': {_layer_name(unit_map.layers[i][0])} reads or is read by layers of all "
                f"{len(palette)} colours that there are for q={q} ({names}{' ...' if len(near[i]) > 6 else ''}), so "
                f"tasks would share its elements; a q without small factors has more (array:{more} has {more + 1}), "
                "else take masks='learned'"
            )
        colour[i] = free[0]
    return [palette[colour[i]] for i in range(len(near))]


def _next_prime(q: int) -> int:
    return next(n for n in range(q + 1, 2 * q + 2) if all(n % d for d in range(2, n)))


def _check_groups(unit_map: UnitMap, q: int) -> None:
    """Every convolution group must have a unit of every group of units, or it would be dead for some tasks."""
    first = np.zeros(unit_map.num_units + 1, dtype=np.int64)
    for _, start, stop in unit_map.layers:
        first[start:stop] = start

    def dead(f: Factor, groups: int) -> bool:
        rows = ((f.units - first[f.units]) % q).reshape(groups, -1)
        return bool((f.units != 0).all()) and any(len(np.unique(row)) < q for row in rows)

    for e in unit_map.entries.values():
        if e.copied or len(e.view) == len(e.shape):
            continue
        for f in e.factors:
            if dead(f, e.view[0]):
                raise ConfigError(
                    f"masks='array:{q}': a convolution group of {_layer_name(e.name)} has {len(f.units) // e.view[0]} "
                    f"{'outputs' if f.owner else 'inputs'}, in which not all of {q} groups of units have one, so it "
                    "would be dead for some tasks; take a smaller q, or a model with wider convolution groups"
                )
