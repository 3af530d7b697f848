"""Operations that move values without computing with them: shadows move with the values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..coupling import Coupling
from ..shadow import ParameterAxis, Shadow, Slot, always_on, reshape, settle, varying
from .registry import Call, Moved, rule, unknown


@rule(
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_empty", "new_full", "new_empty_strided", "empty_strided", "arange", "size", "sym_size", "is_same_size",
    reads=False,
)  # fmt: skip
def fresh(call: Call, coupling: Coupling) -> None:
    """The output takes no values from the inputs, at most their shape."""


@rule(
    "clone", "contiguous", "detach", "alias", "lift_fresh", "_to_copy", "positive", "to", "lift", "_conj", reads=False
)
def identity(call: Call, coupling: Coupling) -> Moved:
    """The output has the values of the input in the same places."""
    return call.shadows[0]


@rule("as_strided", reads=False)
def as_strided(call: Call, coupling: Coupling) -> Moved:
    """The units are known only if nothing but the memory format changes."""
    same_shape = tuple(call.args[1]) == tuple(call.args[0].shape)
    return call.shadows[0] if same_shape else unknown(call, coupling)


@rule("copy", reads=False)
def copy(call: Call, coupling: Coupling) -> Shadow:
    """`target.copy_(source)`."""
    return (coupling.shadow(call.args[1]) or Shadow()).map(lambda ids: ids.expand(call.args[0].shape))


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", reads=False)
def view(call: Call, coupling: Coupling) -> Moved:
    """The same values in another shape. A parameter's labels are settled, since its slots are told apart by their
    dimensions."""
    s = call.shadows[0]
    if s is None:
        return None
    settled = settle if s.of_parameters else lambda ids: ids
    return s.map(lambda ids: settled(reshape(ids, call.out.shape)))


@rule("expand", reads=False)
def expand(call: Call, coupling: Coupling) -> Moved:
    """The same values for every index of a dimension."""
    s = call.shadows[0]
    return s and s.map(lambda ids: ids.expand(call.out.shape))


@rule(
    "permute", "transpose", "t", "slice", "select", "unsqueeze", "squeeze", "unbind", "split", "chunk",
    "split_with_sizes", "flip", "roll", "repeat", "narrow", "diagonal", "unfold", "pixel_shuffle", "pixel_unshuffle",
    "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "repeat_interleave",
    "upsample_nearest1d", "upsample_nearest2d", "rot90", "channel_shuffle", "native_channel_shuffle",
    "_upsample_nearest_exact2d", "movedim", "tril", "triu", "split_copy", "unbind_copy", "permute_copy", "slice_copy",
    "alias_copy", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes", "im2col", reads=False,
)  # fmt: skip
def move(call: Call, coupling: Coupling) -> Moved:
    """The operation moves the labels as it moves the values."""
    s = call.shadows[0]
    if _picks_unknown(call):
        return unknown(call, coupling)
    return s and _for_outputs(call, s, [_on_labels(call, slot) for slot in s.slots])


@rule("index", "gather", "index_select", reads=False)
def index(call: Call, coupling: Coupling) -> Moved:
    """Values selected by an index. Units that only the index carries are lost."""
    if call.shadows[0] is None and not _picks_unknown(call):
        return unknown(call, coupling) if any(s and s.slots for s in call.shadows[1:]) else Shadow()
    return move(call, coupling)


@rule("constant_pad_nd", reads=False)
def pad(call: Call, coupling: Coupling) -> Moved:
    """A border belongs to its channel. It is zero when the unit is off if its value is zero."""
    s = call.shadows[0]
    if s is None:
        return None
    padded = {call.out.dim() - 1 - i // 2 for i, n in enumerate(call.args[1]) if n}
    zero = call.argument(2, "value", 0) == 0
    moved = []
    for slot in s.slots:
        if padded and padded.isdisjoint(varying(slot.ids)):
            ids = slot.ids
            for d in padded:
                ids = ids.narrow(d, 0, 1)
            moved.append([replace(slot, ids=ids.expand(call.out.shape), clean=slot.clean and zero)])
        else:
            moved.append(_on_labels(call, slot))
    return _for_outputs(call, s, moved)


def _picks_unknown(call: Call) -> bool:
    """Does an argument lack values (a meta tensor), so that the selected elements are unknown?"""
    return any(isinstance(x, Tensor) and x.is_meta for x in call.flat[1:])


def _on_labels(call: Call, slot: Slot) -> list[Slot]:
    """A slot of each output, from a slot of the first argument."""
    ids = slot.ids.clone(memory_format=torch.contiguous_format) if call.name == "im2col" else slot.ids
    return [replace(slot, ids=settle(x) if varying(x) else x) for x in call.on_labels(ids)]


def _for_outputs(call: Call, s: Shadow, moved: Sequence[Sequence[Slot]]) -> list[Shadow]:
    """The outputs' shadows. moved: for each slot of the input, the slots of the outputs."""
    return [replace(s, slots=tuple(slots[i] for slots in moved)) for i in range(len(call.outs))]


@rule("index_put", reads=False)
def index_put(call: Call, coupling: Coupling) -> Shadow:
    """Values are written to the places that an index names."""
    target, where, source = call.args[:3]
    x, values = coupling.shadow(target) or Shadow(), coupling.shadow(source) or Shadow()
    where = [None if i is None else i.cpu() for i in where]
    slots = []
    for i in range(max(len(x.slots), len(values.slots))):
        a, b = x.slot(i, target.shape), values.slot(i, source.shape)
        ids = a.ids.clone(memory_format=torch.contiguous_format).index_put(where, b.ids)
        slots.append(Slot(settle(ids), a.clean and b.clean))
    return Shadow(tuple(slots), pending=x.pending | values.pending)


# ---- joining ---------------------------------------------------------------------------------------------------


@rule("stack", reads=False)
def stack(call: Call, coupling: Coupling) -> Shadow:
    """Tensors next to each other along a new dimension."""
    dim = call.argument(1, "dim", 0) % call.out.dim()
    parts = [s and s.map(lambda ids: ids.unsqueeze(dim)) for s in map(coupling.shadow, call.args[0])]
    return _join(coupling, parts, [x.unsqueeze(dim).shape for x in call.args[0]], dim, call.out)


@rule("cat", reads=False)
def cat(call: Call, coupling: Coupling) -> Shadow:
    """Tensors one after another along a dimension."""
    tensors = [x for x in call.args[0] if not (x.dim() == 1 and x.numel() == 0)]
    dim = call.argument(1, "dim", 0) % call.out.dim()
    return _join(coupling, [coupling.shadow(x) for x in tensors], [x.shape for x in tensors], dim, call.out)


@dataclass
class _Row:
    """Slots of the joined tensors that become one slot of the result. dims: the dimensions along which they run."""

    slots: list[Slot | None]
    dims: set[int]


def _join(coupling: Coupling, parts: list[Shadow | None], shapes: list[Sequence[int]], dim: int, out: Tensor) -> Shadow:
    """Concatenate shadows; slots are matched by the dimensions along which they run, except `dim`."""
    given = [s for s in parts if s is not None]
    acts = any(not s.of_parameters for s in given)
    rows = _in_rows([s if s is not None and not (acts and s.of_parameters) else None for s in parts], dim)
    if acts:
        _take_in(coupling, rows, parts, dim)
    slots = tuple(_one_slot(row, shapes, dim, out) for row in rows)
    sources = frozenset() if acts else frozenset().union(*[s.sources for s in given])
    if not acts and not sources:
        return Shadow()
    return Shadow(slots, sources, frozenset().union(*[s.pending for s in given]))


def _in_rows(parts: list[Shadow | None], dim: int) -> list[_Row]:
    """Rows of slots that run along the same dimensions."""
    rows: list[_Row] = []
    for i, s in enumerate(parts):
        for slot in s.slots if s is not None else ():
            dims = set(varying(slot.ids)) or {dim}
            row = next((r for r in rows if r.slots[i] is None and (r.dims & dims or r.dims == dims)), None)
            if row is None:
                row = _Row([None] * len(parts), set())
                rows.append(row)
            row.slots[i] = slot
            row.dims |= dims
    return rows


def _take_in(coupling: Coupling, rows: list[_Row], parts: list[Shadow | None], dim: int) -> None:
    """A parameter that is joined to activations (a class token): its labels along their dimensions become its units."""
    for i, s in enumerate(parts):
        if s is None or not s.of_parameters:
            continue
        for row in rows:
            rest = (row.dims - {dim}) or row.dims
            fits = [p for p in s.slots if set(varying(p.ids)) & rest]
            if fits:
                slot = max(fits, key=lambda p: len(varying(p.ids)))
                row.slots[i] = replace(slot, clean=True, folds=None)
                coupling.mark("owns", slot.ids)
                coupling.fold(slot)


def _one_slot(row: _Row, shapes: list[Sequence[int]], dim: int, out: Tensor) -> Slot:
    """One slot of the output. It is always on in the parts that have no slot."""
    constant = [
        d for d in range(out.dim()) if d != dim and all(f is None or d not in varying(f.ids) for f in row.slots)
    ]
    pieces: list[Tensor] = []
    folds: frozenset[ParameterAxis] | None = frozenset()
    for slot, shape in zip(row.slots, shapes, strict=False):
        ids = slot.ids if slot is not None else always_on(shape)
        for d in constant:
            ids = ids.narrow(d, 0, 1) if ids.size(d) > 1 else ids
        pieces.append(ids)
        if slot is not None:
            folds = folds | slot.folds if slot.folds is not None and folds is not None else None
    clean = all(slot.clean for slot in row.slots if slot is not None)
    return Slot(settle(torch.cat(pieces, dim).expand(out.shape)), clean, folds)
