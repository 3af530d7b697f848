"""Norms, and weights that are normalised before use."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from torch import Tensor

from ..coupling import Coupling
from ..shadow import Shadow, Slot, placed, varying, vector
from .registry import Call, Moved, rule


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_no_update", "_batch_norm_with_update", "batch_norm", "miopen_batch_norm", reads=False,
)  # fmt: skip
def batch_norm(call: Call, coupling: Coupling) -> Moved:
    """A batch norm takes the gate into its own weight and bias and would cancel a factor in front of it. So the folds
    that are pending on its input need not act."""
    given, (w, b) = call.args[0], (coupling.shadow(a) for a in call.args[1:3])
    x = coupling.shadow(given) or Shadow()
    w, b = (s and s.map(lambda ids: placed(ids, 1, given.shape)) for s in (w, b))
    if x.of_parameters:
        return [_standardised(coupling, x, w, b)]
    slots = []
    for slot in x.slots:
        if 1 not in varying(slot.ids):
            slots.append(replace(slot, clean=False))
            coupling.commit(x)
            continue
        clean = _takes_gate(coupling, slot, (w, b)) and coupling.here not in coupling.remade
        if not clean and not coupling.in_norm:
            coupling.commit(x)
        elif not clean and coupling.here not in coupling.remade:
            clean = True  # a norm layer without affine parameters gates its output itself
        slots.append(replace(slot, clean=clean))
    return [Shadow(tuple(slots))]


def _takes_gate(coupling: Coupling, slot: Slot, affine: tuple[Shadow | None, ...]) -> bool:
    """Fold the gate into the weight and the bias that meet these units. Returns whether there is a weight or a bias to
    fold it into."""
    found = False
    for s in affine:
        mine = coupling.adopt(slot.ids, s.slots) if s is not None and s.of_parameters else None
        if mine is not None:
            coupling.own(mine, slot.ids)
            coupling.fold(mine)
            found = True
    return found


def _standardised(coupling: Coupling, x: Shadow, w: Shadow | None, b: Shadow | None) -> Shadow:
    """A weight normalised by `F.batch_norm`: scaling it cancels, scaling its gain does not."""
    # with a task, it is normalised over those of its inputs that are on (`ParameterPlan.standardised`)
    alone = len(x.sources) == 1 and all(slot.folds is not None for slot in x.slots)
    if alone:
        coupling.found.standardised |= x.sources
    kept = []
    for slot in x.slots:
        if varying(slot.ids) == (1,):
            gain = coupling.adopt(slot.ids, w.slots) if w is not None and b is None else None
            if gain is not None:
                coupling.couple(gain.ids, slot.ids)
                coupling.mark("owns", gain.ids)
            kept.append(Slot(slot.ids, True, gain.folds if gain is not None else None))
        elif alone:
            kept.append(replace(slot, folds=None))
        else:
            coupling.drop(slot)
    return Shadow(tuple(kept), x.sources.union(*[s.sources for s in (w, b) if s is not None]))


@rule("native_group_norm")
def group_norm(call: Call, coupling: Coupling) -> Moved:
    """A group norm takes its statistics over channels and positions; its affine parameters run along the channels."""
    shape = call.args[0].shape
    w, b = (coupling.shadow(a) for a in call.args[1:3])
    for slot in (coupling.shadow(call.args[0]) or Shadow()).slots:
        if 1 in varying(slot.ids):
            coupling.place(vector(slot.ids, 1).view(call.args[6], -1), {0})
    return _normalised(call, coupling, range(1, len(shape)), w, b, lambda ids: placed(ids, 1, shape))


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(call: Call, coupling: Coupling) -> Moved:
    """A layer norm takes its statistics over the last dimensions, and its affine parameters run along them. An RMS norm
    has no bias."""
    shape = call.args[0].shape
    w, b = coupling.shadow(call.args[2]), coupling.shadow(call.args[3]) if call.name == "native_layer_norm" else None
    over = range(len(shape) - len(call.args[1]), len(shape))
    return _normalised(call, coupling, over, w, b, lambda ids: ids.expand(shape))


def _normalised(
    call: Call, coupling: Coupling, over: Collection[int], w: Shadow | None, b: Shadow | None,
    place: Callable[[Tensor], Tensor],
) -> list[Shadow]:  # fmt: skip
    """A norm with statistics over the dimensions `over`. place: gives an affine parameter's labels over the input."""
    x, own, over = coupling.shadow(call.args[0]) or Shadow(), coupling.in_norm, set(over)
    if x.of_parameters:
        x = Shadow(tuple(coupling.as_activation(x.slots, over)))
    w, b = (s and s.map(place) for s in (w, b))
    slots = []
    for slot in x.slots:
        if not set(varying(slot.ids)) & over:  # zero where a unit is off, unless a bias is added
            slots.append(replace(slot, clean=slot.clean and b is None))
            continue
        if own and coupling.here in coupling.found.norms:
            coupling.across(coupling.found.norms[coupling.here], slot.ids)
        takes = _takes_gate(coupling, slot, (w, b))
        if not own:
            coupling.note(f"{call.name} outside a known norm layer: its statistics are over all units")
        slots.append(replace(slot, clean=takes or own or call.name == "_fused_rms_norm"))
    return [Shadow(tuple(slots))]


@rule("_weight_norm_interface")
def weight_norm(call: Call, coupling: Coupling) -> Moved:
    """`g * v / |v|` with one norm per index of `dim`: all elements of an index depend on each other, whichever units
    they read."""
    v, g = (coupling.shadow(a) or Shadow() for a in call.args[:2])
    dim = call.args[2] if len(call.args) > 2 else 0
    kept = []
    for slot in v.slots:
        gain = next((s for s in g.slots if dim in varying(s.ids)), None)
        if varying(slot.ids) == (dim,) and gain is not None:
            coupling.couple(slot.ids, gain.ids)
            coupling.mark("owns", gain.ids)
            kept.append(replace(slot, folds=gain.folds))
        else:
            coupling.drop(slot)
    return [Shadow(tuple(kept), v.sources | g.sources)]
