"""Room for more tasks in a model that has learned some, with heads of their own widths."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ConfigError, TaskError
from ..shards import check_whole
from .distributed import leave_out
from .gates import Gates, gates_of, roots_of
from .given import hold_all
from .heads import Classes, class_counts, draw_heads, heads_of, widen
from .held import held
from .layers.gated import HATLayer
from .tasks import check_task


@dataclass(frozen=True)
class AddedTasks:
    """The room that `add_tasks` made.

    Attributes:
        tasks: the indices of the new tasks. classes: path of a head with its own widths -> one width per new task.
            elements: the number of parameter elements that belong only to each new task (embeddings, heads, norms).
    """

    tasks: list[int]
    classes: dict[str, list[int]]
    elements: dict[int, int]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"new tasks: {', '.join(map(str, self.tasks))}"]
        lines += [f"{path or 'head'}: classes {', '.join(map(str, numbers))}" for path, numbers in self.classes.items()]
        lines += [f"task {t}: {n:,} elements of its own" for t, n in self.elements.items()]
        return "\n".join(lines)


def task_parameters(model: nn.Module, task: int) -> list[nn.Parameter]:
    """The parameters that only this task has: its embeddings, heads and norms. For `optimizer.add_param_group` after
    `add_tasks`."""
    task = check_task(model, task)
    return [h.param for h in held(model) if h.task == task]


def add_tasks(model: nn.Module, count: int, num_classes: Classes | Mapping[str, Classes] | None = None) -> AddedTasks:
    """Make room for `count` more tasks, in place. Optimizers built earlier do not hold their parameters; add them with
    `optimizer.add_param_group({"params": hatcl.task_parameters(model, t)})`.

    Args:
        num_classes: the number of classes of the new tasks, one number or one per new task; default: the plain model's.
            For a model with several heads name the heads: `{"cls": [3, 7]}`.

    Raises:
        TaskError: the count is below 1. ConfigError: there is no such head, or its width cannot differ; nothing is
        added.
        HATError: parameters are shards.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise TaskError(f"count: got {count!r}, expected at least 1")
    check_whole(model, "add_tasks")
    gates = gates_of(model)
    first = gates[0].num_tasks
    root = next((m for m in model.modules() if any(isinstance(g, Gates) for g in m._modules.values())), model)
    heads = []
    if widths := class_counts(num_classes, count, "new "):
        if gates[0].unit_map is None:
            raise ConfigError(
                f"num_classes: got {num_classes!r} for a model that was put together by hand, where nothing says which "
                "layers are heads; pass None, or convert the plain module with hatcl.convert"
            )
        heads = heads_of(root, gates[0].unit_map, widths)
    for g in gates:
        g.add(count)
    for module in model.modules():
        if isinstance(module, HATLayer) and "hat_tasks" in module._modules:
            module.hat_tasks.extend(module._hat_new_copy() for _ in range(count))
    hold_all(model)
    for head, numbers in heads:
        widen(root, head, numbers, first)
    draw_heads(model, range(first, first + count))
    for owner in roots_of(model):
        leave_out(owner)
    new = list(range(first, first + count))
    return AddedTasks(
        new,
        {path: list(numbers) for head, numbers in heads for path in [head[0][0]]},
        {t: sum(p.numel() for p in task_parameters(model, t)) for t in new},
    )
