"""The soft gates of the task that is being learned: those of all units are computed once, and handed out in parts.

A step asks for gates once per parameter. Computed for each by itself they would be most of the operations of a small
model's step: a sigmoid and its derivative, a slice, and in backward a tensor of all units' zeros for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..errors import GuardError


class SoftGates:
    """One task's soft gates, for as long as `key` and `made_of` stay the same.

    Attributes:
        all: a, `[U]`, in one autograd graph that can be gone through more than once.
        made_of: the embedding and the config. key: their state, and that of whatever else they depend on.
    """

    def __init__(self, key: Any, made_of: tuple[Any, ...], all: Tensor, bounds: Sequence[tuple[int, int]]) -> None:
        self.key, self.made_of, self.all = key, made_of, all
        cuts = sorted({0, len(all), *(i for pair in bounds for i in pair)})
        pairs = list(zip(cuts, cuts[1:], strict=False))
        parts = all.split([stop - start for start, stop in pairs]) if len(pairs) > 1 else (all,)
        self._runs = dict(zip(pairs, parts, strict=True))

    def run(self, where: slice) -> Tensor:
        """The gates of consecutive units."""
        key = (where.start, where.stop)
        if key not in self._runs:
            self._runs[key] = self.all[where]
        return self._runs[key]


def soft_key(e: Tensor, scale: Tensor, *more: Any) -> Any:
    """All that soft gates depend on: where any of it has changed, they are computed again. None where nothing may be
    kept: while a graph is compiled or traced, under `torch.func`, of a tensor that has no version."""
    if type(e) is not nn.Parameter or torch.compiler.is_compiling() or e.is_inference():
        return None
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return None
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return (e._version, e.data_ptr(), e.dtype, scale._version, grad, inference, *more)


class _Kept(torch.autograd.Function):
    """`functional.soft_gate` with a graph that backward does not free: the forward passes and the backward passes of
    one step share it. What it is made of must not change until backward, as in any graph."""

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


def kept_gate(
    e: Tensor, scale: Tensor, hardened: Tensor | None, taken: Tensor | None, options: tuple[Any, ...]
) -> Tensor:
    """`functional.soft_gate` in a graph that can be gone through more than once.

    Args:
        taken: bool, units whose gate is 0. options: max_scale, clamp, whether the compensation is exact.
    """
    kept: Tensor = _Kept.apply(e, scale, hardened, taken, options)
    return kept
