"""A task's adapter in peft's form, made from gates over LoRA pairs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TaskError
from ..map.lora import is_factor
from .gates import gates_of
from .held import held
from .saving.writers import given_back
from .tasks import check_task, task


@contextlib.contextmanager
def as_adapter(model: nn.Module, index: int) -> Iterator[None]:
    """Inside, the shared tensors hold one task: pairs that it does not use are zero, heads and running statistics are
    its copies. So peft writes an ordinary adapter that computes the same as the task:

        with hatcl.as_adapter(model, 0):
            model.save_pretrained("adapters/first")

    Outside the block `model.save_pretrained` writes the model with all its tasks. Afterwards every bit is as before.

    Args:
        model: a peft model converted by `hatcl.convert`. index: a sealed task.

    Raises:
        TaskError: there is no such sealed task, or the gates cover more than LoRA pairs.

    Warns:
        UserWarning: batch norms whose running statistics are the task's own, which peft writes only for
            `modules_to_save`.
    """
    chosen = check_task(model, index, sealed=True)
    if any(g.growths for g in gates_of(model)):
        raise TaskError(
            f"{type(model).__name__} has grown, and peft's config says the rank of before; use hatcl.extract_task, "
            "whose model has the task's own ranks"
        )
    gated = [h for h in held(model) if h.task is None and h.plan is not None and not h.plain and h.plan.axes]
    beside = next((h.name for h in gated if not is_factor(h.name)), None)
    if beside is not None or not gated:
        raise TaskError(
            f"{beside or type(model).__name__} is gated and no LoRA factor, so that no adapter computes what a task "
            "does; as_adapter is for what hatcl.convert made of a peft model with LoRA"
        )
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if "hat_tasks" in m._modules}
    outside = [n for n, m in layers.items() if "modules_to_save" not in n.split(".") and m.hat_tasks[chosen]._buffers]
    if outside:
        warnings.warn(
            f"{outside[0]}: the running statistics of {len(outside)} layers are each task's own, and peft writes them "
            "with an adapter only where LoraConfig(modules_to_save=...) names the layers",
            stacklevel=3,
        )
    kept: list[tuple[Tensor, Tensor]] = [(h.param, h.param.clone()) for h in gated]
    copies = [(m, m._modules.pop("hat_tasks")) for m in layers.values()]  # not part of this adapter
    try:
        with task(model, None), given_back(model):
            with torch.no_grad():
                for h in gated:
                    h.param.masked_fill_(~h.live(chosen), 0)
                for module, of_tasks in copies:
                    for held_by in ("_parameters", "_buffers"):
                        for name, own in getattr(of_tasks[chosen], held_by).items():
                            shared = getattr(module, held_by)[name]
                            kept.append((shared, shared.clone()))
                            shared.copy_(own)
            yield
    finally:
        for module, of_tasks in copies:
            module._modules["hat_tasks"] = of_tasks
        with torch.no_grad():
            for p, before in kept:
                p.copy_(before)
