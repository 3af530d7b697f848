"""Call a function at every step of an optimizer, with a hook, so that it works in any loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..errors import SkillError


def at_steps(
    optimizer: torch.optim.Optimizer,
    tensors: Sequence[Tensor],
    what: str,
    act: Callable[[Tensor | None], object],
    before: bool = False,
) -> RemovableHandle:
    """Call `act` after (or before) each step; steps that a GradScaler skips do not count.

    Args:
        tensors: the optimizer must have some of them. what: the error's name for them.
        act: receives the factor by which gradients are still scaled, or None.

    Raises:
        SkillError: the optimizer has none of the tensors.
    """
    inner: Any = optimizer
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer  # accelerate's wrapper has no hooks
    held = {id(p) for group in inner.param_groups for p in group["params"]}
    if not any(id(p) in held for p in tensors):
        raise SkillError(
            f"{type(inner).__name__} holds none of the {len(tensors)} tensors {what}; build it over this model's "
            "parameters, after the adapter was added"
        )

    def hook(stepped: Any, args: Any, kwargs: Any) -> None:
        # a fused optimizer is always called and skips by itself; afterwards the gradients are unscaled
        skipped, scale = getattr(stepped, "found_inf", None), getattr(stepped, "grad_scale", None)
        if skipped is None or not bool(skipped):
            act(scale if before else None)

    return inner.register_step_pre_hook(hook) if before else inner.register_step_post_hook(hook)
