"""A task's adapter out of gates over LoRA pairs, as peft knows it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .errors import TaskError
from .gates import check_task, task
from .guard import held
from .layers.gated import HATLayer
from .map.lora import is_factor


@contextlib.contextmanager
def as_adapter(model: nn.Module, index: int) -> Iterator[None]:
    """Inside, the shared tensors are a task's own: pairs that it does not use are zero, heads are its copies. So what
    peft writes is an ordinary adapter that computes what the task computes:

        with hatcl.as_adapter(model, 0):
            model.save_pretrained("adapters/first")

    Without it peft writes the tensors of all tasks, which is no task's adapter. Afterwards every bit is as before.

    Args:
        model: what `hatcl.convert` made of a peft model. index: a sealed task.

    Raises:
        TaskError: no such sealed task, or gates over more than LoRA pairs.
    """
    chosen = check_task(model, index, sealed=True)
    gated = [h for h in held(model) if h.task is None and h.plan is not None and not h.plain and h.plan.axes]
    beside = next((h.name for h in gated if not is_factor(h.name)), None)
    if beside is not None or not gated:
        raise TaskError(
            f"{beside or type(model).__name__} is gated and no LoRA factor, so that no adapter computes what a task "
            "does; as_adapter is for what hatcl.convert made of a peft model with LoRA"
        )
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for module in model.modules():
            copies = getattr(module, "hat_tasks", None) if isinstance(module, HATLayer) else None
            for name, own in copies[chosen].named_parameters() if copies is not None else ():
                shared = module.get_parameter(name)
                kept.append((shared, shared.clone()))
                shared.copy_(own)
        for h in gated:
            kept.append((h.param, h.param.clone()))
            h.param.masked_fill_(~h.live(chosen), 0)
    try:
        with task(model, None):
            yield
    finally:
        with torch.no_grad():
            for p, before in kept:
                p.copy_(before)
