"""The soft gates of the task being learned: computed once for all units, and returned in parts.

A step needs gates once per parameter. Computing them separately would be most of the operations in a small model's
step: a sigmoid, its derivative and a slice for each, and in backward a zero tensor over all units for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled, nn
from torch.compiler import is_compiling

from .. import functional as F
from ..errors import GuardError

_transformed, _traced = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state


class SoftGates:
    """One task's soft gates, for as long as `key` and `made_of` stay the same.

    Attributes:
        all: a, `[U]`, in one autograd graph that backward does not free.
        made_of: the embedding and the config. key: the state of these and of all other dependencies (`soft_key`).
    """

    def __init__(self, key: Any, made_of: tuple[Any, ...], all: Tensor, bounds: Sequence[tuple[int, int]]) -> None:
        self.key, self.made_of, self.all = key, made_of, all
        cuts = sorted({0, len(all), *(i for pair in bounds for i in pair)})
        pairs = list(zip(cuts, cuts[1:], strict=False))
        parts = all.split([stop - start for start, stop in pairs]) if len(pairs) > 1 else (all,)
        self._runs = dict(zip(pairs, parts, strict=True))
        self._made: dict[Any, Any] = {}

    def run(self, where: slice) -> Tensor:
        """The gates of consecutive units."""
        key = (where.start, where.stop)
        if key not in self._runs:
            self._runs[key] = self.all[where]
        return self._runs[key]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result of `make` for these gates, computed once. Backward must not free its graph, so it may only consist
        of views, casts and the functions below."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def soft_key(e: Tensor, scale: Tensor, *more: Any) -> Any:
    """Everything that soft gates depend on; they are recomputed when it changes. None if they cannot be cached: while a
    graph is compiled or traced, under `torch.func`, or for a tensor without a version."""
    if type(e) is not nn.Parameter or is_compiling() or e.is_inference() or _transformed() or _traced() is not None:
        return None
    grad, inference = is_grad_enabled(), is_inference_mode_enabled()
    return (e._version, e.data_ptr(), e.dtype, scale._version, grad, inference, *more)


class _Kept(torch.autograd.Function):
    """`functional.soft_gate` with a graph that backward does not free: all forward and backward passes of a step share
    it. As in any graph, its inputs must not change until backward."""

    @staticmethod
    def forward(
        ctx: Any, e: Tensor, scale: Tensor, hardened: Tensor | None, taken: Tensor | None, options: tuple[Any, ...]
    ) -> Tensor:
        ctx.made_of = [(x, x._version) for x in (e, scale, hardened) if x is not None]
        ctx.arguments = (e, scale, hardened, taken, options)
        gate = F.gate_value(e, scale, hardened)
        return gate if taken is None else torch.where(taken, 0.0, gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        if any(x._version != version for x, version in ctx.made_of):
            raise GuardError(
                "backward: the gate embeddings or their scale were changed since the forward, by a step of the "
                "optimizer or a state that was loaded, so that their gradients would be those of other gates; call "
                "backward before the step"
            )
        e, scale, hardened, taken, options = ctx.arguments
        slope = F.gate_slope(e, scale, hardened, *options)
        return grad * (slope if taken is None else torch.where(taken, 0.0, slope)), None, None, None, None


class _Picked(torch.autograd.Function):
    """Some of the gates, with a graph that backward does not free, like that of `_Kept`."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, index: Tensor, always: Tensor | None) -> Tensor:
        ctx.arguments = (len(gates), index, always)
        picked = gates.index_select(0, index)
        return picked if always is None else torch.where(always, 1.0, picked)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        units, index, always = ctx.arguments
        grad = grad if always is None else torch.where(always, 0.0, grad)
        return grad.new_zeros(units).index_add(0, index, grad), None, None


class _NormGates(torch.autograd.Function):
    """`functional.norm_gates` with a graph that backward does not free, like that of `_Kept`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        ctx.arguments = (gate, groups)
        return F.norm_gates(gate, groups)

    @staticmethod
    def backward(ctx: Any, to_fold: Tensor, to_centring: Tensor) -> tuple[Tensor, None]:
        gate, groups = ctx.arguments
        return F.norm_gates_backward(gate, to_fold, to_centring, groups), None


def kept_gate(
    e: Tensor, scale: Tensor, hardened: Tensor | None, taken: Tensor | None, options: tuple[Any, ...]
) -> Tensor:
    """`functional.soft_gate` with a graph that backward does not free.

    Args:
        taken: bool, units whose gate is 0. options: max_scale, clamp, whether the compensation is exact.
    """
    kept: Tensor = _Kept.apply(e, scale, hardened, taken, options)
    return kept


def picked_gates(gates: Tensor, index: Tensor, always: Tensor | None) -> Tensor:
    """Some of the gates, 1 where `always`, with a graph that backward does not free."""
    picked: Tensor = _Picked.apply(gates, index, always)
    return picked


def kept_norm_gates(gate: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """`functional.norm_gates` with a graph that backward does not free."""
    made: tuple[Tensor, Tensor] = _NormGates.apply(gate, groups)
    return made
