"""Elementwise operations: the labels that meet in an element are one unit.

Whether an off unit stays exactly zero through an operation is not listed but tested: the operation runs on single
numbers, with zeros for the off unit.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..coupling import Coupling
from ..shadow import ParameterAxis, Shadow, Slot, small, varying
from .registry import Call, rule

Wide = Sequence[Shadow | None]  # the shadow of each argument, broadcast over the output
FAILS = (RuntimeError, TypeError, IndexError, ValueError)  # single numbers do not fit


@dataclass
class _Meeting:
    """The slots of activations that run along the same dimensions, and the slots of parameters that meet them there, by
    argument. ids: the labels of the output."""

    ids: Tensor
    slots: dict[int, Slot] = field(default_factory=dict)
    owners: dict[int, Slot] = field(default_factory=dict)

    def zero(self) -> set[int]:
        """The arguments that are zero wherever the unit is off."""
        return {
            i for i, slot in self.slots.items()
            if slot.clean and not bool(((small(slot.ids) == 0) & (small(self.ids) != 0)).any())
        }  # fmt: skip


@rule(
    torch.Tag.pointwise, "native_dropout", "dropout", "masked_fill", "where", "relu", "_prelu_kernel", "hardswish",
    "log_sigmoid_forward", "rrelu_with_noise",
)  # fmt: skip
def pointwise(call: Call, coupling: Coupling) -> Shadow:
    """Couple the labels that meet along the same dimensions; a parameter takes the unit that it meets."""
    shape = next(x for x in call.outs if isinstance(x, Tensor)).shape
    wide = [s and s.map(lambda ids: ids.expand(shape)) for s in call.shadows]
    if not any(s is not None and not s.of_parameters for s in wide):
        return _of_parameters(call, coupling, wide)
    meetings = _met(coupling, wide)
    for i, s in enumerate(wide):
        if s is None or not s.of_parameters:
            continue
        for m in meetings:
            slot = coupling.adopt(m.ids, s.slots)
            if slot is not None:
                coupling.own(slot, m.ids)
                m.owners[i] = slot
    slots = []
    for m in meetings:
        for x, s in zip(call.flat, wide, strict=True):
            if isinstance(x, Tensor):
                coupling.place(m.ids, _told_apart(x, s, m.ids))
        clean = _gated(call, coupling, m)
        slots.append(Slot(coupling.canonical(m.ids) if len(varying(m.ids)) > 1 else m.ids, clean))
    return Shadow(tuple(slots))


def _told_apart(x: Tensor, s: Shadow | None, ids: Tensor) -> set[int]:
    """The dimensions along which these labels meet different values of `x` that belong to no unit (the angles of a
    rotation)."""
    own = {d for slot in (s.slots if s is not None else ()) for d in varying(slot.ids)}
    wide = {d: d - ids.dim() for d in varying(ids) if d - ids.dim() >= -x.dim() and d not in own}
    return {d for d, at in wide.items() if x.shape[at] > 1 and (x.is_meta or bool((x != x.narrow(at, 0, 1)).any()))}


def _met(coupling: Coupling, wide: Wide) -> list[_Meeting]:
    """Couple the activations' labels; an element that is always on in one argument belongs to the other's unit."""
    meetings: list[_Meeting] = []
    for i, s in enumerate(wide):
        for slot in s.slots if s is not None and not s.of_parameters else ():
            dims = set(varying(slot.ids))
            m = next((m for m in meetings if dims & set(varying(m.ids)) and i not in m.slots), None)
            if m is None:
                meetings.append(_Meeting(slot.ids, {i: slot}))
                continue
            coupling.couple(m.ids, slot.ids)
            if m.ids is not slot.ids and bool((small(m.ids) == 0).any()):
                m.ids = torch.where(m.ids != 0, m.ids, slot.ids)
            m.slots[i] = slot
    return meetings


def _gated(call: Call, coupling: Coupling, m: _Meeting) -> bool:
    """Is the output zero where its unit is off? Where necessary, this folds the gate into the parameters of the
    operation."""
    zero = m.zero()
    if _stays_zero(call, zero):
        return True
    if m.owners and _stays_zero(call, zero | set(m.owners)):
        for slot in m.owners.values():
            coupling.fold(slot)
        return True
    for slot in m.owners.values():  # folding does not make the output zero: a copy per task
        coupling.drop(slot)
    return False


def _stays_zero(call: Call, zero: Collection[int]) -> bool:
    """Is the output zero where these arguments are zero, for any values of the other arguments?"""
    if not zero:
        return False
    for seed in range(4):  # positive, then negative numbers; booleans alternate
        outs = _tried(call, zero, seed)
        if outs is None or any(bool((x != 0).any()) or not bool(torch.isfinite(x).all()) for x in outs):
            return False
    return True


def _tried(call: Call, zero: Collection[int], seed: int) -> list[Tensor] | None:
    """The operation's outputs on single numbers, with zero for these arguments; None if it does not accept such
    numbers."""
    rng = np.random.default_rng(seed)
    sign = 1 if seed < 2 else -1
    values: list[Any] = []
    for i, x in enumerate(call.flat):
        if not isinstance(x, Tensor):
            values.append(x)
        elif x.dtype == torch.bool:
            values.append(torch.tensor([bool(seed % 2)]))
        elif x.is_floating_point() or x.is_complex():
            values.append(torch.tensor([0.0 if i in zero else sign * rng.uniform(0.5, 2.0)], dtype=x.dtype))
        else:
            values.append(torch.tensor([0 if i in zero else int(rng.integers(1, 4))], dtype=x.dtype))
    try:
        return [x for x in call.on(values) if isinstance(x, Tensor)]
    except FAILS:
        return None


# ---- parameters alone ------------------------------------------------------------------------------------------


def _of_parameters(call: Call, coupling: Coupling, wide: Wide) -> Shadow:
    """Elementwise maths on parameters alone (weight standardisation, gains): the output keeps the labels, and the axes
    along which its value can be scaled."""
    groups: list[list[tuple[int, Slot]]] = []
    for i, s in enumerate(wide):
        for slot in s.slots if s is not None else ():
            dims = set(varying(slot.ids))
            group = next((g for g in groups if set(varying(g[0][1].ids)) == dims and g[-1][0] != i), None)
            if group is None:
                groups.append([(i, slot)])
            else:
                coupling.couple(group[0][1].ids, slot.ids)
                group.append((i, slot))
    slots = []
    for group in groups:
        folds = _folds(call, wide, {i: slot.folds for i, slot in group if slot.folds})
        slots.append(Slot(group[0][1].ids, True, folds))
        if folds is None and coupling.here in coupling.found.norms:
            coupling.remade.add(coupling.here)
    return Shadow(tuple(slots), frozenset().union(*[s.sources for s in wide if s is not None]))


def _folds(call: Call, wide: Wide, axes: dict[int, frozenset[ParameterAxis]]) -> frozenset[ParameterAxis] | None:
    """The axes that scale the output exactly once. axes: those of each argument."""
    folds = None
    for i, mine in axes.items():
        others = frozenset().union(*[s.sources for j, s in enumerate(wide) if s is not None and j != i])
        if not {p for p, _ in mine} & others and _scales(call, {i}):
            folds = mine
    if folds is None and axes and len(axes) == sum(s is not None for s in wide) and _scales(call, set(axes)):
        folds = frozenset().union(*axes.values())
    return folds


def _scales(call: Call, which: Collection[int]) -> bool:
    """f(2x) = 2 f(x) in these arguments, tried on positive and on negative numbers."""
    for sign in (1, -1):
        base = _numbers(call.flat, sign)
        doubled = [x * 2 if i in which else x for i, x in enumerate(base)]
        try:
            two, one = call.on(doubled)[0], call.on(base)[0]
        except FAILS:
            return False
        if not torch.allclose(two, 2 * one, rtol=1e-5, atol=0):
            return False
    return True


def _numbers(flat: list[Any], sign: int) -> list[Any]:
    """A number of this sign for each floating-point tensor, one for every other tensor."""
    rng = np.random.default_rng(3)
    return [
        torch.tensor([sign * rng.uniform(0.5, 2.0)], dtype=x.dtype)
        if isinstance(x, Tensor) and x.is_floating_point()
        else torch.ones(1, dtype=x.dtype) if isinstance(x, Tensor) else x
        for x in flat
    ]  # fmt: skip
