"""The cut: choose the units to keep, and build the smaller network from them."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ...calls import device_of
from ...errors import ConversionError
from ...map.labels import Ints
from ...map.units import Entry, UnitMap
from ..binding import over_some
from ..registry import layer_for
from .plain import tidy_up
from .trace import Footprint

ALIGNMENT = 8  # elements of two bytes in 16 bytes
INNER = "norm"  # the smaller norm inside of one that selects the units that are on
# attributes that do not count units
NO_SIZE = re.compile(
    "heads|^n_?head$|groups|window|patch|kernel|stride|padding|dilation|depth|layers?$|img|image|grid|resolution|"
    "length|position|vocab|class|index|input_size|level|token|prefix|axis|bucket"
)


@dataclass
class Shaping:
    """The differences, apart from tensors, between the smaller network and one made by its class. JSON-able.

    Attributes:
        sizes: module path -> attribute -> its value.
        norms: path of a norm that takes its statistics over only some of its units -> the dimension, the places of
            these units (for each group of a group norm), the number of units present, and the number that its class
            declares.
    """

    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    norms: dict[str, dict[str, Any]] = field(default_factory=dict)


class Cutter:
    """Cuts one plain model. keep: the units of the smaller network; one that is kept although it is off is zero
    everywhere."""

    def __init__(
        self,
        plain: nn.Module,
        weights: Mapping[tuple[str, str], Tensor],
        unit_map: UnitMap,
        seen: Footprint,
        on: Tensor,
    ) -> None:
        self.unit_map, self.seen, self.on = unit_map, seen, on
        self.fill(plain, weights)
        self.left: set[type] = set()  # classes with unchanged attributes
        self.rooted: set[type] = set()  # classes that divide by the root of a width read from a shape
        self.scaled: set[str] = set()  # modules with scaled rows
        self.rows = [*seen.rows, *self._grouped_rows()]

    def fill(self, plain: nn.Module, weights: Mapping[tuple[str, str], Tensor]) -> None:
        """From now on, cut this network, which is the same network with other values."""
        self.plain, self.weights = plain, weights
        self.modules = dict(plain.named_modules())
        self.names = {id(p): n for n, p in plain.named_parameters()}

    # ---- the units to keep ---------------------------------------------------------------------------------------

    def _entry(self, path: str, name: str) -> Entry:
        return self.unit_map.entries[self.names[id(self.modules[path]._parameters[name])]]

    def _grouped_rows(self) -> list[Ints]:
        """Rows for constraints: every axis keeps at least one unit, and the groups of a convolution stay equally
        wide."""
        rows = []
        for entry in self.unit_map.entries.values():
            for f in entry.factors:
                if f.axis == "joint":
                    rows.append(f.units.reshape(f.shape[0], -1))
                else:
                    rows.append(f.units.reshape(1, -1))
                    if f.owner and entry.view != entry.shape:
                        rows.append(f.units.reshape(entry.view[0], -1))
        for path, m in self.modules.items():
            if isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None:
                found = [f.units for f in self._entry(path, "in_proj_weight").factors]  # all have one width
                rows.append(np.concatenate([u.reshape(-1, m.embed_dim) for u in found]))
            groups = getattr(m, "groups", 1)
            if isinstance(groups, int) and groups > 1 and isinstance(m._parameters.get("weight"), nn.Parameter):
                entry = self._entry(path, "weight")
                for f in entry.factors:
                    if f.owner and f.axis == 0 and entry.shape[0] != groups and entry.shape[0] % groups == 0:
                        rows.append(f.units.reshape(groups, -1))
        return rows

    def alike_rows(self) -> list[Ints]:
        """The rows written by layers of one kind, whose parameters have the same names except for numbers. A config has
        one width for all of them."""
        found: dict[tuple[str, int], dict[bytes, Ints]] = {}
        for entry in self.unit_map.entries.values():
            for f in entry.factors:
                if f.owner and type(f.axis) is int:
                    kind = re.sub(r"\d+", "#", entry.name), len(f.units)
                    found.setdefault(kind, {})[f.units.tobytes()] = f.units
        return [np.stack(list(rows.values())) for rows in found.values() if len(rows) > 1]

    def settled(self, held: Tensor) -> Tensor:
        """`[U + 1]` bool: the units that are on, those held at full width, and the further units needed to keep rows
        equally long."""
        keep = (self.on | held).numpy().copy()
        keep[self.seen.whole] = keep[0] = True
        homes = self._homes(len(keep))
        changed = True
        while changed:
            changed = False
            for rows in self.rows:
                count = keep[rows].sum(1)
                want = max(int(count.max()), 1)
                for row in rows[count < want]:
                    changed |= _fill_row(keep, row, want, homes)
            for units in self.seen.aligned:
                off = units[~keep[units]]
                short = min(-int(keep[units].sum()) % ALIGNMENT, len(off))
                keep[off[:short]] = True
                changed |= short > 0
        return torch.from_numpy(keep)

    def _homes(self, size: int) -> list[Ints | None]:
        """Unit -> the shortest row (head, group) that contains it, among the rows that must be equally long."""
        out: list[Ints | None] = [None] * size
        for rows in sorted((r for r in self.rows if len(r) > 1), key=lambda r: -r.shape[1]):
            for row in rows:
                for unit in row:
                    out[unit] = row
        return out

    # ---- the smaller network -----------------------------------------------------------------------------------

    def cut(self, keep: Tensor) -> tuple[nn.Module, Shaping]:
        """The network with only these units."""
        shared = {id(p): p for p in self.plain.parameters()}
        made = copy.deepcopy(self.plain, shared)
        shaping = Shaping()
        tied: dict[int, nn.Parameter] = {}
        for path, module in self.modules.items():
            small = {n: self._cut_parameter(path, n, p, keep) for n, p in module._parameters.items() if p is not None}
            norm = self._norm(path, keep)
            if norm is not None:
                shaping.norms[path] = norm
            else:
                if sizes := self._sizes(path, small, keep):
                    shaping.sizes[path] = sizes
            if isinstance(module, nn.TransformerEncoderLayer):  # its fused form would bypass its norms
                shaping.sizes.setdefault(path, {})["activation_relu_or_gelu"] = 0
            elif isinstance(module, nn.TransformerEncoder):
                shaping.sizes.setdefault(path, {})["use_nested_tensor"] = False
            target = made.get_submodule(path)
            for name, p in ((n, p) for n, p in module._parameters.items() if p is not None):
                value, known = small[name], tied.get(id(p))
                if known is not None and known.shape == value.shape and torch.equal(known, value):
                    target._parameters[name] = known
                else:
                    fresh = nn.Parameter(value, requires_grad=p.requires_grad)
                    tied.setdefault(id(p), fresh)
                    target._parameters[name] = fresh
            for name, b in module._buffers.items():
                if b is not None:
                    target._buffers[name] = self._cut_buffer(path, name, b, keep)
        self._scale_queries(made, shaping, keep)
        return shaped(made, shaping), shaping

    def _index(self, units: Ints, keep: Tensor) -> Tensor:
        return keep[torch.from_numpy(units)].nonzero().flatten()

    def _cut_parameter(self, path: str, name: str, p: nn.Parameter, keep: Tensor) -> Tensor:
        value = self.weights.get((path, name), p.detach())
        entry = self._entry(path, name)
        if any(f.axis == "joint" for f in entry.factors):
            return self._cut_grouped(value, entry, keep)
        on = torch.ones((), dtype=torch.bool)
        for f in entry.factors:
            if isinstance(f.axis, int) and value.shape[f.axis] == len(f.units):
                stays = self._index(f.units, keep)
                value = value.index_select(f.axis, stays.to(value.device))
                if not f.owner:
                    on = on & self._is_on(
                        f.units[stays.numpy()], [-1 if d == f.axis else 1 for d in range(value.dim())]
                    )
        return self._filled(value, on, entry, 1).clone()

    def _is_on(self, units: Ints, shape: Sequence[int]) -> Tensor:
        return self.on[torch.from_numpy(units)].view(*shape)

    def _filled(self, value: Tensor, on: Tensor, entry: Entry, rows: int) -> Tensor:
        """A weight whose rows are standardised over all units that they read, including those that are off."""
        if not entry.standardised or bool(on.all()):
            return value
        return over_some(value, on.to(value) * torch.ones_like(value[(slice(1),) * rows]), rows)

    def _cut_grouped(self, value: Tensor, entry: Entry, keep: Tensor) -> Tensor:
        """Per group, the rows and columns to keep; for a depthwise convolution with several outputs, whole groups."""
        groups, rows = entry.view[:2]
        full = value.reshape(groups, rows, value.shape[1], *value.shape[2:])
        owner = next((keep[torch.from_numpy(f.units)].view(groups, rows) for f in entry.factors if f.axis == 0), None)
        joint = next(f for f in entry.factors if f.axis == "joint")
        reads = keep[torch.from_numpy(joint.units)].view(groups, -1)
        parts = []
        for g in range(groups):
            part = full[g]
            if owner is not None:
                part = part[owner[g]]
            part = part[:, reads[g]] if part.shape[1] == reads.shape[1] else part
            on = self.on[torch.from_numpy(joint.units)].view(groups, -1)[g][reads[g]]
            on = (
                on.view(1, -1, *[1] * (part.dim() - 2)) if len(on) == part.shape[1] else torch.ones(1, dtype=torch.bool)
            )
            parts.append(self._filled(part, on, entry, 1))
        return torch.cat(parts).clone()

    def _cut_buffer(self, path: str, name: str, b: Tensor, keep: Tensor) -> Tensor:
        norm = self.unit_map.norms.get(path)
        if norm is not None and b.dim() == 1 and len(b) == len(norm.units):
            return b.index_select(0, self._index(norm.units, keep).to(b.device))
        full = f"{path}.{name}" if path else name
        if full in self.seen.buffers:
            dim, units = self.seen.buffers[full]
            return b.index_select(dim, self._index(units, keep).to(b.device))
        return b.clone()

    def _norm(self, path: str, keep: Tensor) -> dict[str, Any] | None:
        """The description of a norm that has off units among those it normalises, or whose parameters cannot make them
        zero."""
        norm = self.unit_map.norms.get(path)
        if norm is None or not (norm.across or self.modules[path]._parameters.get("weight") is None):
            return None
        stays = self._index(norm.units, keep)
        on = self.on[torch.from_numpy(norm.units)][stays]
        if not on.any():
            raise ConversionError(
                f"{path}: the task has none of the {len(norm.units)} units on that this norm normalises, so nothing "
                "passes through the network and there is nothing to extract; learn the task with a smaller "
                "HATConfig.penalty_weight"
            )
        ndim = self.seen.norm_dims.get(path, 0)
        dim = norm.dim if norm.dim == 1 or not ndim else norm.dim - ndim
        groups = getattr(self.modules[path], "num_groups", 1)
        if groups > 1:
            of_group = (stays * groups) // len(norm.units)
            counts = torch.bincount(of_group[on], minlength=groups)
            if bool(on.all()) and len(set(counts.tolist())) == 1:
                return None
            places = [(on & (of_group == g)).nonzero().flatten().tolist() for g in range(groups)]
        elif bool(on.all()):
            return None
        else:
            places = [on.nonzero().flatten().tolist()]
        return {"dim": dim, "places": [p for p in places if p], "width": len(stays), "known": len(norm.units)}

    def _sizes(self, path: str, small: Mapping[str, Tensor], keep: Tensor) -> dict[str, Any]:
        """The attributes whose size has changed: those known for the kind of layer, and those that equal a size in the
        module's operations."""
        module = self.modules[path]
        norm = self.unit_map.norms.get(path)
        if norm is not None:
            return norm_sizes(module, len(norm.units), int(keep[torch.from_numpy(norm.units)].sum()))
        shapes = {n: tuple(x.shape) for n, x in small.items()}
        groups = getattr(module, "groups", 1)
        if type(groups) is int and groups > 1 and isinstance(module._parameters.get("weight"), nn.Parameter):
            entry = self._entry(path, "weight")
            if entry.view == entry.shape and entry.shape[0] == groups:  # depthwise
                groups = shapes["weight"][0]
        try:
            known: dict[str, Any] = layer_for(type(module)).hat_sizes(shapes, groups)
        except KeyError:  # a parametrized layer has its weight elsewhere
            known = {}
        sizes = {**(self.resizes(path, keep) if type(module) not in self.left else {}), **known}
        return {n: v for n, v in sizes.items() if getattr(module, n, v) != v}

    def resizes(self, path: str, keep: Tensor) -> dict[str, Any]:
        """Attributes that equal a size in a module's operations, where that size has changed."""
        module = self.modules[path]
        options: dict[int, list[int]] = {}
        for x in self.seen.work.get(path, ()):
            for old, new in x.sizes(keep):
                known = options.setdefault(old, [])
                if new in known:
                    known.remove(new)
                known.insert(0, new)  # the last size seen comes first
        splits = {
            tuple(n for n, _ in pieces): [n if x is None else next(x.sizes(keep))[1] for n, x in pieces]
            for pieces in self.seen.splits.get(path, ())
        }
        sizes: dict[str, Any] = {}
        for name, value in vars(module).items():
            if name.startswith("_") or name == "training" or NO_SIZE.search(name.lower()):
                continue
            exact = splits.get(tuple(value)) if _are_sizes(value) else None
            resized: Any = _resized(value, options) if exact is None else exact
            if resized != (list(value) if isinstance(value, tuple) else value):
                sizes[name] = resized
        return sizes

    def _scale_queries(self, made: nn.Module, shaping: Shaping, keep: Tensor) -> None:
        """Scale the queries, since attention divides by the root of its width, which has changed."""
        done: set[tuple[str, int]] = set()
        self.scaled.clear()
        rooted = {p: x for p, x in self.seen.products.items() if type(self.modules[p]) in self.rooted}
        for path, found in {**rooted, **self.seen.queries}.items():
            for size, rows in found:
                for name, at in rows.items():
                    self._scale_rows(made, shaping, keep, path, size, name, at, done)

    def _scale_rows(
        self, made: nn.Module, shaping: Shaping, keep: Tensor, path: str, size: int, name: str, at: Ints,
        done: set[tuple[str, int]],
    ) -> None:  # fmt: skip
        entry = self.unit_map.entries[name]
        owner = next((f for f in entry.factors if f.axis == 0), None)
        if owner is None or not len(at):
            return
        stays = keep[torch.from_numpy(owner.units)]
        mine = np.zeros(len(owner.units), dtype=bool)
        mine[at] = True
        new = int((stays.numpy() & mine).sum()) * size // len(at)
        if new == size or new == 0:
            return
        places = torch.from_numpy(mine)[stays]
        holder, _, leaf = name.rpartition(".")
        if (name, size) in done:
            return
        done.add((name, size))
        module = made.get_submodule(holder)
        self.scaled.add(holder)
        factor = (new / size) ** 0.5
        with torch.no_grad():
            for n, p in module._parameters.items():
                if p is not None and len(p) == len(places) and (n == leaf or p.dim() == 1):
                    p[places.to(p.device)] *= factor
        attention = self.modules[path]
        for n, value in vars(attention).items():
            if type(value) is float and abs(value - size**-0.5) < 1e-12:
                shaping.sizes.setdefault(path, {})[n] = new**-0.5


def _fill_row(keep: Any, row: Ints, want: int, homes: Sequence[Ints | None]) -> bool:
    """Keep more units of a row, starting with the heads or groups that have the fewest."""
    of_home: dict[int, list[int]] = {}
    count: dict[int, int] = {}
    for unit in dict.fromkeys(row[~keep[row]].tolist()):
        home = homes[unit]
        of_home.setdefault(id(home), []).append(unit)
        count.setdefault(id(home), 0 if home is None else int(keep[home].sum()))
    filled = False
    while of_home and int(keep[row].sum()) < want:
        least = min(of_home, key=lambda h: count[h])
        keep[of_home[least].pop(0)] = filled = True
        count[least] += 1
        if not of_home[least]:
            del of_home[least]
    return filled


def _are_sizes(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and bool(value) and all(type(x) is int for x in value)


def _resized(value: Any, options: Mapping[int, list[int]]) -> Any:
    if type(value) is int and value > 1 and value in options:
        return options[value][0]
    if _are_sizes(value):
        new = [_resized(x, options) for x in value]
        return new
    return value


def shaped(model: nn.Module, shaping: Shaping) -> nn.Module:
    """Give a network its sizes and its norms over some of the units, in place. The caller sets its tensors."""
    for path, sizes in shaping.sizes.items():
        module = model.get_submodule(path)
        for name, value in sizes.items():
            old = getattr(module, name, None)
            setattr(module, name, type(old)(value) if isinstance(value, list) and isinstance(old, tuple) else value)
        tidy_up(module)
    for path, norm in shaping.norms.items():
        parent, _, leaf = path.rpartition(".")
        selecting = _selecting(model.get_submodule(path), **norm).to(device_of(model))
        setattr(model.get_submodule(parent), leaf, selecting)
    for module in model.modules():
        tidy_up(module)
    return model


def _selecting(norm: nn.Module, dim: int, places: Sequence[Sequence[int]], width: int, known: int) -> fx.GraphModule:
    """A norm over some of the entries along `dim`; the others become zero. Each group has its own norm. The result is a
    graph of torch modules only, without hatcl."""
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    parts = []
    for g, at in enumerate(places):
        small = _narrowed(norm, known, width, at)
        root.add_module(f"{INNER}{g}" if len(places) > 1 else INNER, small)
        root.register_buffer(f"places{g}", torch.tensor(at))
        picked = graph.call_function(torch.index_select, (x, dim, graph.get_attr(f"places{g}")))
        parts.append(graph.call_module(f"{INNER}{g}" if len(places) > 1 else INNER, (picked,)))
    zero = graph.call_function(torch.zeros_like, (graph.call_function(torch.narrow, (parts[0], dim, 0, 1)),))
    every = [i for at in places for i in at]
    back = torch.full((width,), len(every))
    back[torch.tensor(every)] = torch.arange(len(every))
    root.register_buffer("back", back)
    joined = graph.call_function(torch.cat, ([*parts, zero], dim))
    graph.output(graph.call_function(torch.index_select, (joined, dim, graph.get_attr("back"))))
    made = fx.GraphModule(root, graph)
    return made.train(norm.training)


def _narrowed(norm: nn.Module, known: int, width: int, places: Sequence[int]) -> nn.Module:
    """A norm whose class was made for `known` units, with tensors of `width`, over only the units at some places."""
    small = copy.deepcopy(norm)
    at = torch.tensor(places)
    for name, value in norm_sizes(small, known, len(places)).items():
        old = getattr(small, name)
        setattr(small, name, tuple(value) if isinstance(old, tuple) else value)
    if hasattr(small, "num_groups"):
        vars(small)["num_groups"] = 1
    for name, x in [*small.named_parameters(recurse=False), *small.named_buffers(recurse=False)]:
        if x.dim() and len(x) == width:
            few = x.detach().index_select(0, at.to(x.device))
            if isinstance(x, nn.Parameter):
                small._parameters[name] = nn.Parameter(few, x.requires_grad)
            else:
                small._buffers[name] = few
    return small


def norm_sizes(norm: nn.Module, old: int, new: int) -> dict[str, Any]:
    """The attributes of a norm that hold its number of units, changed from `old` to `new`."""
    sizes: dict[str, Any] = {}
    for name, value in vars(norm).items():
        if type(value) is int and value == old != new and name != "num_groups":
            sizes[name] = new
        elif isinstance(value, tuple) and value and value[0] == old != new:
            sizes[name] = [new, *value[1:]]
    return sizes
