"""One tensor of a task vector: the difference, and the base with it put back, exactly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Delta(NamedTuple):
    """One tensor of a task vector. `value` alone does not always give the fine-tuned tensor back: where a weight ends
    much closer to zero than the way it went, their sum rounds to something else, and the sum of opposite numbers has
    no sign. For these elements the remainder is kept, so that `restore` is exact.

    Attributes:
        value: the difference, float32 or wider. at: flat indices `[M]`, int32 where they fit. rest: `[M]`, what
            `value` lacks there; -0.0 where the sum is a zero that should be negative.
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
    """`finetuned - base`, with the remainders that `restore` needs to give `finetuned` back bit for bit: signs of
    zeros and subnormal numbers included (unless `torch.set_flush_denormal` is on). A difference beyond the largest
    float is the one thing it has no number for; `TaskVector` refuses it."""
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
    return Delta(value, lost.to(torch.int32 if value.numel() < 2**31 else torch.int64), rest.to(kind))


def restore(
    base: Tensor, deltas: Delta | Iterable[tuple[float | Tensor, Delta]], dtype: torch.dtype | None = None
) -> Tensor:
    """`base + sum_i c_i tau_i` of one tensor, summed in float64 and rounded once, to `dtype` (base's own).

    Terms whose coefficient is 0 are left out, so that without any the base comes back bit for bit; with a single one of
    coefficient 1 the fine-tuned tensor does.

    Args:
        deltas: one delta (coefficient 1) or pairs of a coefficient, a number or a tensor that broadcasts, and a delta;
            they are asked for one by one.
    """
    dtype = dtype or base.dtype
    out: Tensor | None = None
    for c, delta in [(1.0, deltas)] if isinstance(deltas, Delta) else deltas:
        if not (bool((c != 0).any()) if isinstance(c, Tensor) else c):
            continue
        if out is None:
            out = base.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        scaled = delta.value.to(torch.float64, copy=True)
        out += scaled.mul_(c.to(scaled) if isinstance(c, Tensor) else c)
        del scaled  # so that the next delta finds its memory free
        if delta.at is not None and delta.rest is not None:
            at, rest = delta.at.long(), delta.rest.to(torch.float64)
            rest = rest * (c.expand(out.shape).reshape(-1)[at] if isinstance(c, Tensor) else c)
            flat = out.view(-1)
            sums = flat[at] + rest
            flat[at] = torch.where(sums == 0, sums.copysign(rest), sums)
    return base.to(dtype, copy=True) if out is None else out.to(dtype)
