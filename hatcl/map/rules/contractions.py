"""Contractions: a weight's rows write units of their own, and its columns read the units of its input. If both sides
are activations, the labels along the summed dimension are coupled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from einops import rearrange, repeat
from torch import Tensor

from ..coupling import Coupling, Use
from ..shadow import Shadow, Slot, reshape, settle, varying, vector
from .registry import Call, Moved, rule, unknown


@rule("mm", "bmm", "mv", "dot")
def matmul(call: Call, coupling: Coupling) -> Shadow:
    """A matrix or vector times another."""
    return _multiplied(call, coupling, *call.args[:2])


@rule("addmm", "baddbmm", "addbmm")
def matmul_and_bias(call: Call, coupling: Coupling) -> Shadow:
    """A linear layer."""
    bias, a, b = call.args[:3]
    return with_bias(coupling, _multiplied(call, coupling, a, b), bias, lambda ids: ids.expand(call.out.shape))


def _multiplied(call: Call, coupling: Coupling, a: Tensor, b: Tensor) -> Shadow:
    """`a @ b`, in the common frame `[..., m, k, n]`."""
    frame = (*(a.shape[:-1] or (1,)), a.shape[-1], 1 if b.dim() == 1 else b.shape[-1])
    k = len(frame) - 2

    def left(ids: Tensor) -> Tensor:
        return ids.unsqueeze(-1).expand(frame)

    def right(ids: Tensor) -> Tensor:
        return (ids.unsqueeze(-1) if b.dim() == 1 else ids.unsqueeze(-3)).expand(frame)

    sa, sb = coupling.shadow(a) or Shadow(), coupling.shadow(b) or Shadow()
    result = contract(coupling, sa.map(left), sb.map(right), k)
    return result.map(lambda ids: reshape(ids.narrow(k, 0, 1).squeeze(k), call.out.shape))


def contract(coupling: Coupling, left: Shadow, right: Shadow, k: int) -> Shadow:
    """Multiply and sum over dimension `k` of the common frame."""
    if left.of_parameters and right.of_parameters:  # learned queries: the input of a weight is data
        left = Shadow(tuple(coupling.as_activation(left.slots, {k})))
    if not left.of_parameters and not right.of_parameters:
        for x in (*left.slots, *right.slots):
            coupling.place(x.ids, range(k - 1))
        for x in left.slots:
            for y in right.slots:
                if k in varying(x.ids) and k in varying(y.ids):
                    coupling.couple(x.ids, y.ids)
                    coupling.mark("read", x.ids)
        return Shadow(tuple(s for s in (*left.slots, *right.slots) if k not in varying(s.ids)))
    weight, given = (left, right) if left.of_parameters else (right, left)
    slots: list[Slot] = []
    pending: set[Use] = set()
    readable = [x for x in given.slots if k in varying(x.ids)]
    for p in weight.slots:
        dims = varying(p.ids)
        if k not in dims and dims:
            written, uses = coupling.carry(p)
            slots.append(written)
            pending |= uses
        elif dims == (k,):
            coupling.read(p, readable)
        elif dims:
            coupling.drop(p)
    slots += [replace(x, folds=None) for x in given.slots if k not in varying(x.ids)]
    return Shadow(tuple(slots), pending=frozenset(pending))


def with_bias(coupling: Coupling, result: Shadow, bias: Tensor, place: Callable[[Tensor], Tensor]) -> Shadow:
    """Add a bias: its labels take the units that they meet, and its fold is pending together with the weight's. place:
    gives the bias's labels over the output."""
    s = coupling.shadow(bias)
    if s is None and not bias.is_meta and not bool((bias != 0).any()):
        return result
    mine = s.map(place).slots if s is not None and s.of_parameters else ()
    pending = set(result.pending)
    slots = []
    for slot in result.slots:
        p = coupling.adopt(slot.ids, mine)
        if p is None:
            slots.append(replace(slot, clean=False))
        else:
            coupling.own(p, slot.ids)
            pending |= coupling.uses_of(p)
            slots.append(slot)
    return Shadow(tuple(slots), pending=frozenset(pending))


@rule("_grouped_mm", "grouped_mm_fallback")  # torch's, and the replacement in transformers
def grouped(call: Call, coupling: Coupling) -> Shadow:
    """Rows `[M, K]`, each times its expert's matrix in `[E, K, N]`: for units this is one matmul."""
    x, w = call.args[:2]
    sx, sw = coupling.shadow(x) or Shadow(), coupling.shadow(w) or Shadow()
    if sx.of_parameters or not sw.of_parameters or x.dim() != 2 or w.dim() != 3:
        return unknown(call, coupling)
    frame = (x.shape[0], *w.shape[1:])
    of_experts = replace(sw, slots=tuple(s for s in sw.slots if varying(s.ids) != (0,)))
    right = of_experts.map(lambda ids: ids.select(0, 0).expand(frame))
    result = contract(coupling, sx.map(lambda ids: ids.unsqueeze(-1).expand(frame)), right, 1)
    return result.map(lambda ids: ids.select(1, 0))


@rule("embedding")
def embedding(call: Call, coupling: Coupling) -> Shadow:
    """A table's columns write units; its rows belong to no unit."""
    w = coupling.shadow(call.args[0])
    if w is None:
        return Shadow()
    if not w.of_parameters:
        return unknown(call, coupling)
    slots: list[Slot] = []
    pending: set[Use] = set()
    for p in w.slots:
        if varying(p.ids) == (1,):
            written, uses = coupling.carry(replace(p, ids=p.ids.select(0, 0)))
            slots.append(written.map(lambda ids: ids.expand(call.out.shape)))
            pending |= uses
        elif varying(p.ids) == (0,):
            coupling.mark("forced", p.ids)
        else:
            coupling.drop(p)
    return Shadow(tuple(slots), pending=frozenset(pending))


@rule("mkldnn_rnn_layer")
def lstm(call: Call, coupling: Coupling) -> Moved:
    """All steps of a layer in one operation, on a CPU. Four rows of each weight are one unit, and the second weight
    reads that unit. If these rows are zero, the unit stays zero: its cell is `0.5 c + 0.5 tanh(0)`, starting from 0."""
    x, hidden = call.args[0], call.args[10]
    parts = [coupling.shadow(a) or Shadow() for a in call.args[1:5]]
    state = [coupling.shadow(a) for a in call.args[5:7]]
    if not all(p.of_parameters for p in parts) or any(s is not None and s.slots for s in state):
        return unknown(call, coupling)
    units: Slot | None = None
    pending: set[Use] = set()
    for p in (slot for part in parts for slot in part.slots if varying(slot.ids) == (0,)):
        rows, uses = coupling.carry(replace(p, ids=vector(p.ids, 0)))
        pending |= uses
        units = units or Slot(rows.ids[:hidden])
        coupling.couple(rearrange(rows.ids, "(gate unit) -> gate unit", unit=hidden), units.ids)
    if units is None:
        return unknown(call, coupling)
    last = x.dim() - 1
    given = (coupling.shadow(x) or Shadow()).slots
    inputs = [replace(s, ids=vector(s.ids, last)) for s in given if varying(s.ids) == (last,)]
    for part, what in ((parts[0], inputs), (parts[1], [units])):
        for p in part.slots:
            if varying(p.ids) == (1,):
                coupling.read(replace(p, ids=p.ids.select(0, 0)), what)
    return [
        Shadow((Slot(units.ids.expand(t.shape)),), pending=frozenset(pending))
        if isinstance(t, Tensor) and t.shape[-1:] == (hidden,) else None
        for t in call.outs
    ]  # fmt: skip


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "scaled_dot_product_attention",
)  # fmt: skip
def attention(call: Call, coupling: Coupling) -> Moved:
    """Each channel of a head's queries is one unit with the same channel of its keys; the output carries the units of
    its values."""
    queries = call.args[0]
    last = queries.dim() - 1
    heads = queries.shape[last - 2] if last > 1 else 1

    def one_position(x: Slot) -> Tensor:
        """The labels at every position, for each head of the queries. If there are more query heads than heads of keys
        and values, each of the latter serves several consecutive query heads (grouped-query and multi-query
        attention)."""
        ids = coupling.couple_along(x.ids, [last - 1]).narrow(last - 1, 0, 1)
        if last < 2 or ids.shape[last - 2] == heads:
            return ids
        return settle(repeat(ids, "... head 1 size -> ... (head runs) 1 size", runs=heads // ids.shape[last - 2]))

    q, k, v = (coupling.shadow(x) or Shadow() for x in call.args[:3])
    q, k, v = (Shadow(tuple(coupling.as_activation(s.slots, {last}))) if s.of_parameters else s for s in (q, k, v))
    for x in (*q.slots, *k.slots, *v.slots):
        coupling.place(one_position(x), range(last - 1))
    for x in q.slots:
        for y in k.slots:
            if last in varying(x.ids) and last in varying(y.ids):
                coupling.couple(one_position(x), one_position(y))
                coupling.mark("read", x.ids)  # also where a cache returns the keys
    return [Shadow(tuple(replace(x, ids=one_position(x).expand(call.outs[0].shape)) for x in v.slots))]
