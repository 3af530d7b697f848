"""One tensor of a task vector: the difference, and the base with it put back, exactly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import VectorError

SUMMED_AT_ONCE = 1 << 17  # elements that a CPU core keeps in its cache


class Delta(NamedTuple):
    """One tensor of a task vector. `value` alone does not always reproduce the fine-tuned tensor: if a weight ends much
    closer to zero than the distance it moved, the sum is rounded to another number, and the sum of opposite numbers has
    no sign. For these elements the remainder is kept, so that `restore` is exact.

    Attributes:
        value: the difference, float32 or wider. at: flat indices `[M]`, int32 where they fit. rest: `[M]`, the
            remainder there; -0.0 where the sum is a zero that should be negative.
    """

    value: Tensor
    at: Tensor | None = None
    rest: Tensor | None = None

    def to(self, device: torch.device | str) -> Delta:
        at, rest = (None if x is None else x.to(device) for x in (self.at, self.rest))
        return Delta(self.value.to(device), at, rest)

    def where(self, keep: Tensor) -> Delta:
        """Zero where `keep` (bool, of the value's shape) is off."""
        value = torch.where(keep, self.value, 0)
        if self.at is None or self.rest is None:
            return Delta(value)
        kept = keep.reshape(-1)[self.at.long()]
        return Delta(value, self.at[kept], self.rest[kept])


def delta_between(base: Tensor, finetuned: Tensor) -> Delta:
    """`finetuned - base`, with the remainders that `restore` needs to reproduce `finetuned` bit for bit, including
    signs of zeros and subnormal numbers (unless `torch.set_flush_denormal` is on). Only a difference beyond the largest
    float cannot be represented; `TaskVector` refuses it."""
    both = torch.promote_types(base.dtype, finetuned.dtype)
    kind = torch.promote_types(both, torch.float32)
    a = finetuned.to(base.device, kind)
    value = a - base.to(kind)
    back = restore(base, Delta(value), dtype=both).to(kind)
    lost = ((back != a) | (back.signbit() != a.signbit())).reshape(-1).nonzero().view(-1)
    if not len(lost):
        return Delta(value)
    goal, start, way = (x.reshape(-1)[lost].double() for x in (a, base, value))
    rest = goal - (start + way)  # the sum is within a rounding of the goal, so this is a float itself (Sterbenz)
    rest = torch.where((goal == 0) & goal.signbit(), goal, rest)
    return Delta(value, lost.to(_index_type(value)), rest.to(kind))


def combine(terms: Iterable[tuple[float | Tensor, Delta]]) -> Delta:
    """`sum_i c_i tau_i` of one tensor: products and sums in float64, in the order of the terms, rounded once, to
    float32 or the widest of the terms' types if that is wider. One term with coefficient 1 is that term.

    If an element of the sum comes from a single term with coefficient 1, it keeps the term's remainder.

    Args:
        terms: at least one pair of a coefficient, a number or a tensor that broadcasts, and a delta; they are read one
            by one.
    """
    total: Tensor | None = None
    only: Delta | None = None
    kind = torch.float32
    rests: list[tuple[float | Tensor, Tensor, Tensor, Tensor]] = []
    for coefficient, given in terms:
        c = coefficient.item() if isinstance(coefficient, Tensor) and coefficient.numel() == 1 else coefficient
        only = given if total is None and not isinstance(c, Tensor) and c == 1 else None
        delta = given if total is None else given.to(total.device)
        kind = torch.promote_types(kind, delta.value.dtype)
        scaled = delta.value.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        scaled.mul_(c.to(scaled).broadcast_to(scaled.shape) if isinstance(c, Tensor) else c)
        total = scaled if total is None else total.add_(scaled)
        del scaled  # frees its memory for the next delta
        if delta.at is not None and delta.rest is not None:
            at = delta.at.long()
            rests.append((c, at, delta.value.reshape(-1)[at], delta.rest))
    if total is None:
        raise VectorError("combine: got no terms, expected at least one")
    if only is not None:
        return only
    value = total.to(kind)
    ats, kept = [], []
    for c, at, own, rest in rests:
        mine = (
            c.to(value.device).broadcast_to(value.shape).reshape(-1)[at]
            if isinstance(c, Tensor)
            else rest.new_tensor(c)
        )
        its_own = (value.reshape(-1)[at] == own.to(kind)) & (mine == 1)
        changes = mine.expand(at.shape) != 0
        ats.append(torch.stack([at, its_own])[:, changes])
        kept.append(rest.to(kind)[changes])
    if not rests:
        return Delta(value)
    (at, its_own), rest = torch.cat(ats, 1), torch.cat(kept)
    _, which, count = at.unique(return_inverse=True, return_counts=True)
    alone = its_own.bool() & (count[which] == 1)  # in `v - v` there are two
    return Delta(value, at[alone].to(_index_type(value)), rest[alone]) if bool(alone.any()) else Delta(value)


def restore(base: Tensor, delta: Delta, dtype: torch.dtype | None = None) -> Tensor:
    """`base + tau` of one tensor, summed in float64 and rounded once, to `dtype` (base's own). For the difference made
    by fine-tuning this is the fine-tuned tensor, bit for bit. An element whose difference is zero keeps the base's
    bits, including the sign of a zero."""
    start, way = base.contiguous().view(-1), delta.value.contiguous().view(-1)
    out = torch.empty(start.shape, dtype=dtype or base.dtype, device=base.device)
    step = SUMMED_AT_ONCE if base.device.type == "cpu" else max(len(start), 1)
    for first in range(0, len(start), step):
        x, d = start[first : first + step], way[first : first + step]
        total = x.to(torch.float64, copy=True).add_(d)
        zero = x == 0
        if bool(zero.any()):
            total.masked_fill_(zero & x.signbit() & (d == 0), -0.0)
        out[first : first + step] = total
    if delta.at is not None and delta.rest is not None:
        at, rest = delta.at.long(), delta.rest.to(torch.float64)
        sums = start[at].double() + way[at].double() + rest
        out[at] = torch.where(sums == 0, sums.copysign(rest), sums).to(out.dtype)
    return out.view(base.shape)


def _index_type(x: Tensor) -> torch.dtype:
    return torch.int32 if x.numel() < 2**31 else torch.int64
