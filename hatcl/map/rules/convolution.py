"""Convolutions, including transposed, grouped and depthwise ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import repeat
from torch import Tensor

from ..coupling import Coupling, Use
from ..shadow import Shadow, Slot, flat_ids, placed, varying, vector
from .contractions import with_bias
from .registry import Call, disown, rule


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def convolution(call: Call, coupling: Coupling) -> Shadow:
    """A contraction over channels; all positions of a channel are one unit."""
    x, w, bias, _, _, _, transposed, _, groups = call.args[:9]
    sx, sw = coupling.shadow(x) or Shadow(), coupling.shadow(w) or Shadow()
    if not sw.of_parameters:
        return _computed_weight(coupling, sx, sw, sums=groups == 1 and not transposed)
    if sx.of_parameters:
        disown(sw, coupling)
        return disown(sx, coupling)
    inputs, passing = _what_is_read(call, coupling, sx)
    writes, reads = (1, 0) if transposed else (0, 1)
    depthwise = groups == x.shape[1] == call.out.shape[1] and not transposed
    slots: list[Slot] = []
    pending: set[Use] = set()
    if groups > 1 and not depthwise:
        for slot in inputs:
            coupling.place(slot.ids.view(groups, -1), {0})
    for p in sw.slots:
        dims = varying(p.ids)
        if dims == (writes,):
            rows = vector(p.ids, writes)
            if transposed and groups > 1:
                rows = repeat(rows, "width -> (group width)", group=groups)
            elif groups > 1 and not depthwise:
                coupling.place(rows.view(groups, -1), {0})
            written, uses = coupling.carry(replace(p, ids=rows))
            slots.append(written.map(lambda ids: placed(ids, 1, call.out.shape)))
            pending |= uses
            if depthwise:
                _own_channels(coupling, written, inputs)
            elif groups > 1 and w.shape[1] == 1 and not transposed:
                _read_groups(coupling, w, p, inputs, groups, x.shape[1])
        elif dims == (reads,):
            if groups == 1 or not inputs or transposed:
                coupling.read(replace(p, ids=vector(p.ids, reads)), inputs)
            else:
                _read_groups(coupling, w, p, inputs, groups, x.shape[1])
        elif writes in dims or reads in dims:
            coupling.drop(p)
    result = Shadow((*slots, *passing), pending=frozenset(pending))
    return result if bias is None else with_bias(coupling, result, bias, lambda ids: placed(ids, 1, call.out.shape))


def _computed_weight(coupling: Coupling, sx: Shadow, sw: Shadow, sums: bool) -> Shadow:
    """A convolution of two activations. sums: whether it sums over all channels; then each channel of the input is one
    unit with the same channel of the weight."""

    def channels(ids: Tensor) -> Tensor:
        return ids if ids.dim() == 2 else channels(ids.select(-1, 0))

    for a in sx.slots:
        for b in sw.slots:
            if sums and 1 in varying(a.ids) and 1 in varying(b.ids):
                coupling.couple(channels(a.ids)[:1], channels(b.ids))
    coupling.note("a convolution whose weight is computed from the input forgets which units it writes")
    return Shadow()


def _what_is_read(call: Call, coupling: Coupling, sx: Shadow) -> tuple[list[Slot], list[Slot]]:
    """The labels of the channels that the weight reads, and the units along positions that a 1x1 convolution keeps in
    the output."""
    w, stride = call.args[1], call.args[3]
    by_position = all(n == 1 for n in w.shape[2:]) and all(n == 1 for n in stride)
    inputs: list[Slot] = []
    passing: list[Slot] = []
    for slot in sx.slots:
        dims = varying(slot.ids)
        if 1 in dims:
            ids = coupling.couple_along(slot.ids, [d for d in dims if d != 1]) if len(dims) > 1 else slot.ids
            inputs.append(replace(slot, ids=vector(ids, 1)))
        elif by_position:
            passing.append(replace(slot, ids=slot.ids.narrow(1, 0, 1).expand(call.out.shape), folds=None))
        else:
            coupling.note("a convolution over positions that belong to different units forgets them")
    return inputs, passing


def _own_channels(coupling: Coupling, written: Slot, inputs: Sequence[Slot]) -> None:
    """A depthwise convolution keeps its channels: the unit that it writes is the unit that it reads."""
    for slot in inputs:
        coupling.own(written, slot.ids)
        if not slot.clean:
            coupling.read_dirty(written.ids.numpy())


def _read_groups(coupling: Coupling, w: Tensor, p: Slot, inputs: Sequence[Slot], groups: int, channels: int) -> None:
    """In a grouped convolution, element (o, j) reads input channel `group(o) * width + j`: o and j share one joint
    axis."""
    axes = coupling.labels.axes_of(flat_ids(p.ids))
    if len(axes) != 1:
        coupling.drop(p)
        return
    name, joint = axes[0][0], coupling.found.joint
    if name not in joint:
        width, rest = channels // groups, tuple(w.shape[2:])
        view = (groups, w.shape[0] // groups, width, *rest)
        joint[name] = (view, (groups, 1, width, *[1] * len(rest)), coupling.labels.new(channels, (name, "joint")))
    start = joint[name][2]
    coupling.read(Slot(torch.arange(start, start + channels)), inputs)
    if w.shape[1] > 1:
        coupling.drop(p)
