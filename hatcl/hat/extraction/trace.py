"""Trace one forward of the plain model for cutting it: the sizes that each module works with, those that must stay
equal, and the units that tensors carry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as tf
from torch.overrides import TorchFunctionMode

from ...calls import OutputError, device_of, seeded, tensors_of, values_of
from ...map.coupling import Coupling
from ...map.labels import Ints
from ...map.rules.registry import Call
from ...map.shadow import settle, small, varying
from ...map.trace import trace
from ...map.units import resolve
from ..layers.state import classes_kept, copy_of
from ..registry import layer_for

ALIGNED = {"_grouped_mm", "grouped_mm_fallback"}  # their operands need rows that are multiples of 16 bytes
SPLITTING = {"view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten"}


@dataclass(frozen=True)
class Carried:
    """A tensor that carries units. ids: for each of its slots, the unit of each element, with size 1 along constant
    dimensions. shape: the tensor's shape."""

    shape: tuple[int, ...]
    ids: tuple[Tensor, ...]

    def kept(self, keep: Tensor) -> Tensor:
        """The elements that the cut tensor keeps: `[*shape]` bool, from `keep`, `[U + 1]` bool."""
        mask = torch.ones((), dtype=torch.bool)
        for ids in self.ids:
            mask = mask & keep[ids]
        return mask.expand(self.shape)

    def sizes(self, keep: Tensor) -> Iterator[tuple[int, int]]:
        """The size of each dimension that carries units, before and after the cut. keep: `[U + 1]`, how many of each
        unit remain."""
        for ids in self.ids:
            on = keep[ids]
            last = max(varying(ids), default=-1)
            for d in varying(ids):
                others = [n for n in range(ids.dim()) if n != d]
                there = on.sum(d).max() if d == last else on.amax(dim=others).sum() if others else on.sum()
                yield ids.shape[d], int(there)


@dataclass
class Footprint:
    """The results of the trace.

    Attributes:
        rows: `[rows, n]` units each. The forward needs rows of equal length, so the cut must keep them equally long.
        work: module path -> the results of its own operations, in order.
        given: module path -> its positional tensor inputs.
        splits: module path -> pieces of different sizes into which it splits a tensor: their old sizes and their units.
        outputs: module path -> the first tensor that it returned. results: path in the model's output -> a tensor
            there.
        buffers: name of a buffer -> the dimension that carries units, and these units.
        queries: path of an attention that itself divides by the root of a head's width -> that width, and which rows of
            which parameters write its queries. products: the same where two activations are multiplied.
        norm_dims: path of a norm -> its input's number of dimensions.
        aligned: groups of units of which the cut keeps as many as fill a multiple of 16 bytes.
        whole: units that must stay because they meet, one by one, values that belong to no unit and are computed during
            the forward (the rotation of a position, the weights of attention).
    """

    units: int = 0
    rows: list[Ints] = field(default_factory=list)
    work: dict[str, list[Carried]] = field(default_factory=dict)
    given: dict[str, list[Carried]] = field(default_factory=dict)
    splits: dict[str, list[list[tuple[int, Carried | None]]]] = field(default_factory=dict)
    outputs: dict[str, Carried] = field(default_factory=dict)
    results: dict[str, Carried] = field(default_factory=dict)
    buffers: dict[str, tuple[int, Ints]] = field(default_factory=dict)
    queries: dict[str, list[tuple[int, dict[str, Ints]]]] = field(default_factory=dict)
    products: dict[str, list[tuple[int, dict[str, Ints]]]] = field(default_factory=dict)
    norm_dims: dict[str, int] = field(default_factory=dict)
    aligned: list[Ints] = field(default_factory=list)
    whole: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def of_one_width(self, path: str) -> list[Ints]:
        """`[rows, n]` units each: for each size n, the units along the dimensions of this size that a module meets."""
        inner = [x for p, x in self.outputs.items() if p.rpartition(".")[0] == path and p]
        found: dict[int, dict[bytes, Ints]] = {}
        for x in (*self.work.get(path, ()), *self.given.get(path, ()), *inner):
            for ids in (i for i in x.ids if len(varying(i)) == 1):
                vector = ids.reshape(-1).numpy()
                found.setdefault(len(vector), {})[vector.tobytes()] = vector
        return [np.stack(list(rows.values())) for rows in found.values() if len(rows) > 1]

    def units_at(self, path: str, inside: bool = False) -> Ints:
        """The units that a module's own operations meet; inside: also those of the modules in it."""
        found = [
            ids.reshape(-1).numpy()
            for where, tensors in self.work.items()
            if where == path or (inside and (not path or where.startswith(f"{path}.")))
            for x in tensors
            for ids in x.ids
        ]
        units = np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)
        return units[units != 0]


class _Watch(TorchFunctionMode):
    """Records each operation of a trace; labels become units when the trace is over."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.coupling: Any = None
        self.steps: list[tuple[str, str, int, int, list[tuple[tuple[int, ...], list[Tensor]]]]] = []
        self.modules: dict[str, tuple[tuple[int, ...], list[Tensor]]] = {}
        self.given: dict[str, list[tuple[tuple[int, ...], list[Tensor]]]] = {}
        self.splits: list[tuple[str, int, list[tuple[int, Any]]]] = []
        self.results: dict[str, tuple[tuple[int, ...], list[Tensor]]] = {}
        self.buffers: dict[str, tuple[int, Tensor]] = {}
        self.queries: list[tuple[str, int, Tensor]] = []
        self.products: list[tuple[str, int, Tensor]] = []
        self.met: list[tuple[Tensor, Tensor | None]] = []
        self._names = {id(b): n for n, b in model.named_buffers()}

    def __call__(self, step: Call, coupling: Coupling) -> None:
        self.coupling = coupling
        outs = [seen for x in step.outs if (seen := self._of(x)) is not None]
        if step.name == "bmm" and not any(s is None or s.of_parameters for s in step.shadows):
            self._note_query(self.products, step.args[0])
        if step.name in ALIGNED:
            self.steps += [(coupling.here, step.name, 0, 0, [g]) for x in step.flat if (g := self._of(x)) is not None]
        if "scaled_dot_product" in step.name:  # an attention bias has one entry per query head
            for x in step.flat[3:]:
                self.met += [(i.reshape(-1, 1), None) for i in (self._of(x) or ((), []))[1] if i.numel() > 1]
        if step.name == "split_with_sizes":
            dim = step.argument(2, "dim", 0) % step.args[0].dim()
            self.splits.append((coupling.here, dim, [(x.shape[dim], self._of(x)) for x in step.outs]))
        if step.name in ("split", "slice") and (given := self._of(step.args[0])) is not None:
            self._note_pieces(step, given)
        if outs:
            self.steps.append((coupling.here, step.name, 0, 0, outs))
        for x, shadow in zip(step.flat, step.shadows, strict=True):
            if shadow is None and isinstance(x, Tensor) and id(x) in self._names and outs:
                self._note_buffer(self._names[id(x)], x, step, outs[0])

        if torch.Tag.pointwise in step.func.tags:
            self._note_meeting(step)

    def _note_meeting(self, step: Call) -> None:
        """Record where one tensor carries units along a dimension and another one of the same length carries none
        there."""
        ndim = max((x.dim() for x in step.outs if isinstance(x, Tensor)), default=0)
        given = [x for x in step.flat if isinstance(x, Tensor) and x.dim() and id(x) not in self._names]
        for x in given:
            for ids in seen[1] if (seen := self._of(x)) is not None else ():
                for y in (y for y in given if y is not x):
                    for d in (d for d in range(-ids.dim(), 0) if ids.shape[d] > 1 and -d <= min(y.dim(), ndim)):
                        if y.shape[d] == x.shape[d]:
                            other = self._of(y)
                            along = [i for i in other[1] if i.shape[d] > 1] if other is not None else []
                            self.met.append((_first(ids, d), _first(along[0], d) if along else None))

    def _of(self, x: Any) -> tuple[tuple[int, ...], list[Tensor]] | None:
        shadow = self.coupling.shadow(x) if isinstance(x, Tensor) else None
        if shadow is None or not shadow.slots:
            return None
        return tuple(x.shape), [small(s.ids) for s in shadow.slots]

    def _note_pieces(self, step: Call, given: tuple[tuple[int, ...], list[Tensor]]) -> None:
        dim = step.argument(2 if step.name == "split" else 1, "dim", 0) % len(given[0])
        n = given[0][dim]
        if step.name == "split":
            size, start = step.args[1], 0
        else:
            start, end, by = (step.argument(i, k, v) for i, k, v in ((2, "start", 0), (3, "end", n), (4, "step", 1)))
            start, end = (x + n if x < 0 else min(x, n) for x in (start or 0, n if end is None else end))
            size = end - start if by == 1 else 0
        if 0 < size < n and n % size == 0 and start % size == 0:
            self.steps.append((self.coupling.here, "pieces", dim, size, [given]))
        elif step.name == "split":  # the last piece is smaller
            self.met += [(_first(ids, dim), None) for ids in given[1] if ids.shape[dim] == n]

    def _note_buffer(self, name: str, b: Tensor, step: Call, out: tuple[tuple[int, ...], list[Tensor]]) -> None:
        shape, slots = out
        for ids in slots:
            for d in (d for d in range(ids.dim()) if ids.shape[d] > 1):
                at = 0 if "convolution" in step.name else d - len(shape) + b.dim()
                if 0 <= at < b.dim() and b.shape[at] == ids.shape[d]:
                    self.buffers.setdefault(name, (at, _first(ids, d)[:, 0]))

    def _note_query(self, where: list[tuple[str, int, Tensor]], query: Tensor) -> None:
        for ids in seen[1] if (seen := self._of(query)) is not None else ():
            if ids.shape[-1] > 1:
                where.append((self.coupling.here, query.shape[-1], ids))

    def leave(self, path: str, given: tuple, out: Any) -> None:
        """Called when a module ends."""
        if self.coupling is None:
            return
        self.given[path] = [seen for x in given if (seen := self._of(x)) is not None]
        try:
            found = tensors_of(out)
            if not path:
                known = {(x.data_ptr(), x.shape, x.stride()): seen for x in found if (seen := self._of(x)) is not None}
                named = {n: known.get((v.data_ptr(), v.shape, v.stride())) for n, v in values_of(out).items()}
                self.results = {n: seen for n, seen in named.items() if seen is not None}
        except OutputError:
            return
        if found and (seen := self._of(found[0])) is not None:
            self.modules[path] = seen

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is tf.scaled_dot_product_attention and kwargs.get("scale") is None and self.coupling is not None:
            self._note_query(self.queries, args[0] if args else kwargs["query"])
        return func(*args, **kwargs)


def _first(ids: Tensor, dim: int) -> Tensor:
    """The labels with one dimension in front, and all others flattened into one."""
    return ids.movedim(dim, 0).reshape(ids.shape[dim], -1)


def footprint(model: nn.Module, inputs: Any) -> Footprint:
    """Run a plain model once and record all that a cut needs. The model stays unchanged."""
    trial = copy_of(model)
    watch = _Watch(trial)
    for path, m in trial.named_modules():
        m.register_forward_hook(lambda m, given, out, path=path: watch.leave(path, given, out))
    with classes_kept(model), seeded(device=device_of(model)), watch:
        found = trace(trial, inputs, lambda m: layer_for(type(m)).hat_is_norm, watch)
    unit_map = resolve(found, trial)
    units = torch.from_numpy(found.units)

    def carried(seen: tuple[tuple[int, ...], list[Tensor]]) -> Carried:
        return Carried(seen[0], tuple(small(settle(units[ids])) for ids in seen[1]))

    made = Footprint(unit_map.num_units)
    made.norm_dims = {path: seen.ndim for path, seen in (*found.norms.items(), *found.mixing.items())}
    rows: dict[bytes, Ints] = {}
    split: dict[tuple[str, int], list[Ints]] = {}
    for path, name, dim, size, outs in watch.steps:
        for x in map(carried, outs):
            if name == "pieces":
                pieces = [i.movedim(dim, -1).reshape(-1, size) for i in x.ids if i.shape[dim] == x.shape[dim]]
                rows.update({g.numpy().tobytes(): g.numpy() for g in pieces if g.any()})
                continue
            made.work.setdefault(path, []).append(x)
            if name in ALIGNED:
                made.aligned += [i.reshape(-1).numpy() for i in x.ids if len(varying(i)) == 1]
            for i in (i for i in x.ids if name in SPLITTING and varying(i)):
                parts = i.reshape(-1, i.shape[max(varying(i))]).numpy()
                split.setdefault((path, parts.shape[1]), []).append(parts)
    for parts_of_one_size in split.values():
        if any(len(parts) > 1 for parts in parts_of_one_size):
            # pieces of one size into which a module splits tensors, by one attribute, must stay equally long
            together = np.unique(np.concatenate(parts_of_one_size), axis=0)
            rows[together.tobytes()] = together
    made.rows = list(rows.values())
    made.whole = _never_cut([(units[a].numpy(), None if b is None else units[b].numpy()) for a, b in watch.met])
    made.outputs = {path: carried(x) for path, x in watch.modules.items()}
    made.given = {path: [carried(x) for x in given] for path, given in watch.given.items()}
    for path, dim, parts_given in watch.splits:
        known = [(n, None if x is None else _carried_along(carried(x), dim)) for n, x in parts_given]
        made.splits.setdefault(path, []).append(known)
    made.results = {path: carried(x) for path, x in watch.results.items()}
    made.buffers = {n: (d, u) for n, (d, ids) in watch.buffers.items() if (u := units[ids].numpy()).any()}
    for path, m in model.named_modules():
        if isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None:
            made.queries[path] = [(m.head_dim, {f"{path}.in_proj_weight".lstrip("."): np.arange(m.embed_dim)})]
    for noted, kept in ((watch.queries, made.queries), (watch.products, made.products)):
        for path, size, ids in noted:
            kept.setdefault(path, []).append((size, _rows_of(found.labels, ids.reshape(-1).numpy())))
    return made


def _carried_along(x: Carried, dim: int) -> Carried | None:
    """The units that a tensor carries along one dimension, if any."""
    ids = [i for i in x.ids if varying(i) == (dim,)]
    return Carried(x.shape, (ids[0],)) if ids else None


def _never_cut(met: list[tuple[Ints, Ints | None]]) -> Ints:
    """The units that meet values of no unit."""
    found = [np.zeros(1, dtype=np.int64)]
    for mine, other in met:
        if (mine == mine[:1]).all():
            continue  # the same unit everywhere: nothing is cut along this dimension
        if other is None or (other == other[:1]).all():
            found.append(mine.reshape(-1))
        elif mine.shape == other.shape:
            found.append(mine[other == 0])
    return np.unique(np.concatenate(found))


def _rows_of(labels: Any, ids: Ints) -> dict[str, Ints]:
    """Parameter -> the rows of it that these labels stand for."""
    out: dict[str, Ints] = {}
    for at in np.unique(np.searchsorted(labels.starts, ids[ids != 0], side="right") - 1):
        name, dim = labels.axes[at]
        stop = labels.starts[at + 1] if at + 1 < len(labels.starts) else len(labels.parent)
        mine = ids[(ids >= labels.starts[at]) & (ids < stop)]
        if dim == 0:
            out[name] = np.unique(mine - labels.starts[at])
    return out
