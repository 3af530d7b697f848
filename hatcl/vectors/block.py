"""One composed tensor: `theta0 + sum_i lambda_i tau_i` written in place, and its derivative with respect to the
coefficients.

Shapes: `T` vectors, `g` groups of the tensor's elements, `N` elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Delta, combine

FOLDED_AT_ONCE = 1 << 19  # elements that stay in a CPU core's cache while all vectors are added


@dataclass
class Block:
    """A tensor of the model that the vectors change.

    Attributes:
        theta0: its value without them. deltas: one per vector; zeros for vectors that lack it. changing: numbers of the
            vectors that have it. target: the copy's parameter, into which the composed value is written.
        groups: the groups of the grain that its elements belong to, `[g]`. local: the index among them, in a shape that
        broadcasts over the tensor; None if there is only one.
        slots: the modules and attributes that hold it.
    """

    name: str
    theta0: Tensor
    deltas: list[Delta]
    changing: list[int]
    target: nn.Parameter
    groups: Tensor
    local: Tensor | None
    slots: list[tuple[nn.Module, str]]

    def __post_init__(self) -> None:
        self._each = self._is_each()
        self._lay_out()

    def _lay_out(self) -> None:
        """Give all tensors the target's memory layout (channels last, ...), so that chunks are views."""
        self._order = _memory_order(self.target)
        self.deltas = [
            d._replace(value=_laid_out(d.value, self.target)) if i in self.changing else d
            for i, d in enumerate(self.deltas)
        ]
        if self.local is not None:
            ids = self.local.to(torch.uint8 if len(self.groups) < 2**8 else torch.int32)
            self.local = _laid_out(ids, self.target) if ids.shape == self.target.shape else ids

    def to(self, target: nn.Parameter) -> None:
        """Follow the target to its device and dtype."""
        device = target.device
        self.target, self.theta0 = target, self.theta0.to(device)
        self.deltas, self.groups = [d.to(device) for d in self.deltas], self.groups.to(device)
        self.local = None if self.local is None else self.local.to(device)
        self._lay_out()  # a cast may also have asked for channels last

    def pieces(self) -> Iterator[slice]:
        n = self.theta0.numel()
        step = FOLDED_AT_ONCE if self.theta0.device.type == "cpu" else max(n, 1)
        return (slice(i, i + step) for i in range(0, n, step))

    def coefficients(self, lam: Tensor) -> Iterator[Tensor]:
        """`[T, g]` as one tensor per vector that broadcasts over this one."""
        ids = None if self.local is None else self.local.reshape(-1).int()
        for row in lam:
            if self.local is None or ids is None:
                yield row
            else:  # `row[self.local]` takes four times as long
                yield (row if self._each else row.index_select(0, ids)).view(self.local.shape)

    def combined(self, coefficients: Iterable[float | Tensor]) -> Delta:
        """`sum_i lambda_i tau_i`, exactly rounded: by the rule of `combine`; terms with coefficient 0 are left out."""
        pairs = zip(coefficients, self.deltas, strict=True)
        each = [(c, d) for i, (c, d) in enumerate(pairs) if i in self.changing]
        used = [(c, d) for c, d in each if (bool((c != 0).any()) if isinstance(c, Tensor) else c)]
        return combine(used or each[:1])

    def fold_(self, lam: Tensor | list[float]) -> None:
        """Write `theta0 + sum_i lambda_i tau_i` into the target, summed in float32 or wider; lam `[T, g]`, or T numbers
        where there is one group."""
        out = self.target.data
        kind = torch.promote_types(out.dtype, torch.float32)
        if isinstance(lam, Tensor) and self._broadcasts():
            total = out if out.dtype is kind else torch.empty_like(out, dtype=kind)
            total.copy_(self.theta0)
            for i, c in enumerate(self.coefficients(lam)):
                if i in self.changing:
                    total.addcmul_(c.to(kind), self.deltas[i].value.to(kind))
            if total is not out:
                out.copy_(total)
            return
        flat, start = self._flat(out), self._flat(self.theta0)
        local = None if self.local is None else self._flat(self.local)
        terms: list[tuple[Any, Tensor]] = [
            (lam[i], self._flat(self.deltas[i].value)) for i in self.changing if isinstance(lam, Tensor) or lam[i]
        ]
        whole = local is None and out.dtype is kind and bool(terms)
        for at in self.pieces():
            if whole:  # the first term with the copy
                piece = torch.add(start[at], terms[0][1][at], alpha=terms[0][0], out=flat[at])
            else:
                piece = flat[at].copy_(start[at]) if out.dtype is kind else start[at].to(kind, copy=True)
            ids = None if local is None else local[at].int()
            for c, value in terms[1:] if whole else terms:
                if ids is None:
                    piece.add_(value[at], alpha=c)
                else:
                    piece.addcmul_(c.index_select(0, ids).to(kind), value[at].to(kind))
            if out.dtype is not kind:
                flat[at].copy_(piece)

    def products(self, grad: Tensor) -> Tensor:
        """`<grad, tau_i>` per group, `[T, g]`, in float32, or float64 if the gradient is."""
        if grad.layout is not torch.strided:  # from `nn.Embedding(sparse=True)`
            grad = grad.to_dense()
        kind = torch.promote_types(grad.dtype, torch.float32)
        none = torch.zeros(len(self.groups), dtype=torch.float64, device=grad.device)
        out = [none] * len(self.deltas)
        if self.local is not None and self._broadcasts():
            over = [d for d in range(grad.dim()) if self.local.shape[d] == 1 and grad.shape[d] != 1]
            numbers, grad = self.local.reshape(-1).int(), grad.to(kind)
            for i in self.changing:
                product = grad * self.deltas[i].value.to(kind)
                sums = (product.sum(over) if over else product).reshape(-1).double()
                out[i] = sums if self._each else none.index_add(0, numbers, sums)
            return torch.stack(out).to(kind)
        flat = self._flat(grad)
        local = None if self.local is None else self._flat(self.local)
        values = {i: self._flat(self.deltas[i].value) for i in self.changing}
        for at in self.pieces():
            part = flat[at].to(kind)
            ids = None if local is None else local[at].int()
            for i, value in values.items():
                if ids is None:
                    out[i] = out[i] + torch.dot(part, value[at].to(kind))
                else:
                    out[i] = out[i].index_add(0, ids, (part * value[at].to(kind)).double())
        return torch.stack(out).to(kind)

    def _flat(self, x: Tensor) -> Tensor:
        """x `[N]`, its elements in the target's memory order; a view if x has it already."""
        return x.reshape(-1) if self._order is None else x.permute(self._order).reshape(-1)

    def _is_each(self) -> bool:
        """Whether the n-th number of `local` is n, so that no lookup is needed."""
        if self.local is None:
            return False
        ids = self.local.reshape(-1)
        return len(ids) == len(self.groups) and torch.equal(
            ids, torch.arange(len(ids), device=ids.device).to(ids.dtype)
        )

    def _broadcasts(self) -> bool:
        """Whether its groups are rows (columns, ...) or single elements."""
        return self._each or (self.local is not None and self.local.shape != self.theta0.shape)


def _memory_order(like: Tensor) -> list[int] | None:
    """The dimensions from the slowest to the fastest in memory; None if that is their own order."""
    strides = like.stride()
    return None if like.is_contiguous() else sorted(range(like.dim()), key=lambda d: -strides[d])


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x with the memory layout of `like` (which has no gaps); x itself if it has it already."""
    order = _memory_order(like)
    if (x if order is None else x.permute(order)).is_contiguous():
        return x
    return torch.empty_like(like, dtype=x.dtype, requires_grad=False).copy_(x)
