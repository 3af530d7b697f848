"""`learn`: the block in which a task is learned, and at whose end it is sealed."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import guard as guards
from ..config import HATConfig
from ..errors import HATError, TaskError
from ..functional import scale_at
from ..gates import Gates, check_room, check_task, gates_of
from ..layers.gated import HATLayer
from ..map.lora import is_factor

log = logging.getLogger(__name__)


class Learning:
    """A task being learned. What `hatcl.learn` yields.

    Attributes:
        task: its index. step: optimizer steps done. steps: steps in all. scale: the current s.
    """

    def __init__(self, model: nn.Module, task: int, steps: int, epochs: int, start: int) -> None:
        self.model, self.task, self.steps, self.step = model, task, steps, start
        self.gates = gates_of(model)
        self.epochs = epochs

    @property
    def config(self) -> HATConfig:
        return self.gates[0].config

    @property
    def scale(self) -> float:
        return float(self.gates[0].scale)

    def penalty(self) -> Tensor:
        """The sparsity penalty, `config.penalty_weight` times HAT's eq. 5; add it to the loss."""
        total = [g.penalty() for g in self.gates if g.num_units]
        return torch.stack(total).mean() if total else torch.zeros(())

    @contextlib.contextmanager
    def soft(self) -> Iterator[None]:
        """Inside, evaluation too computes with the soft gates at the current scale (for measuring what hardening
        costs)."""
        for g in self.gates:
            g.soft = True
        try:
            yield
        finally:
            for g in self.gates:
                g.soft = False

    def _advance(self) -> None:
        self.step += 1
        settled = self.gates[0].settled
        self._set_scale()
        if self.gates[0].settled and not settled and self.step < self.steps:
            # norms average anew over what the hard gates give
            for name, count in guards.own_buffers(self.model, self.task):
                if name.endswith("num_batches_tracked"):
                    count.zero_()

    def _set_scale(self) -> None:
        cycles = self.config.cycles or self.epochs
        length = max(-(-self.steps // cycles), 1)
        at = min(self.step, self.steps - 1)
        value = scale_at(at % length, length, self.config.max_scale, self.config.schedule)
        for g in self.gates:
            g.scale.fill_(value)
            g.settled = self.step >= self.steps * (1 - self.config.settle)


@contextlib.contextmanager
def learn(
    model: nn.Module, task: int, optimizer: Any, steps: int, epochs: int = 1, start: int = 0
) -> Iterator[Learning]:
    """Learn a task: inside the block the model computes with its soft gates, the scale follows the optimizer's steps,
    and what sealed tasks use is held bit for bit. Leaving the block hardens the gates and seals the task; leaving it by
    an exception seals nothing and leaves sealed tasks as they were. The task stays the active one after sealing.

    Args:
        model: a HAT model.
        task: the index of a task that is not sealed.
        optimizer: the optimizer, or a list of all that are stepped. Built once for all tasks or anew for each.
        steps: optimizer steps in all, over which the scale is annealed.
        epochs: annealing cycles within them (HAT anneals once per epoch), unless `HATConfig.cycles` says otherwise.
        start: steps already done, to go on with an interrupted task.

    Raises:
        TaskError: no such task, or it is sealed already. GuardError: an optimizer that cannot be guarded.
        CapacityError: no units are left. IntegrityError: a sealed task changed since it was sealed.
        NonFiniteLossError: the loss became NaN or infinite.
    """
    task = check_task(model, task, sealed=False)
    if steps < 1 or epochs < 1 or not 0 <= start <= steps:
        raise TaskError(
            f"steps: got steps={steps}, epochs={epochs}, start={start}; expected steps and epochs of at least 1, "
            f"start from 0 to steps"
        )
    gates = gates_of(model)
    if any(g.learning is not None for g in gates):
        raise TaskError(f"task {gates[0].learning} is being learned; leave its hatcl.learn block first")
    _check_layers(model)
    check_room(model, task)
    guards.check(model)
    sealed = guards.sealed_tasks(model)
    locked = [t for t in sealed if gates[0].config.locked is None or t in gates[0].config.locked]
    learning = Learning(model, task, steps, epochs, start)
    optimizers: Sequence[Any] = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    guard = guards.Guard(model, task, optimizers, locked, learning._advance)
    before = [(g, g.task) for g in gates]
    for g in gates:
        g.task = g.learning = task
    learning._set_scale()
    try:
        with guard:
            yield learning
            guard.check_finite()
    except BaseException:
        repaired = guard.repair(model)
        if repaired:
            log.warning("task %d: values that were not finite are set to zero in %s", task, ", ".join(repaired))
        _leave(before)
        raise
    if guard.repair(model):
        _leave(before)
        raise guards.NonFiniteLossError(
            f"task {task}: shared weights are no longer finite; nothing was sealed, earlier tasks are as they were"
        )
    try:
        guards.check(model, locked)
    except HATError:
        _leave(before)
        raise
    for g in gates:
        g.learning, g.settled = None, False
        g.seal(task)
        empty = [
            name
            for name, start, stop in g.layers
            if stop > start and not bool(g.masks[task, start:stop].any()) and not is_factor(name)
        ]  # past a LoRA layer without pairs goes its base
        if empty:
            warnings.warn(
                f"task {task} uses no unit of {', '.join(empty[:5])}{' ...' if len(empty) > 5 else ''}, so nothing "
                "passes there; lower HATConfig.penalty_weight, start denser (init), or use a wider model",
                stacklevel=3,
            )
    for t in [task, *(t for t in sealed if t not in locked)]:
        guards.record(model, t)


def _leave(before: list[tuple[Gates, int | None]]) -> None:
    for g, t in before:
        g.learning, g.task, g.settled = None, t, False


def _check_layers(model: nn.Module) -> None:
    for path, module in model.named_modules():
        # frozen batch norms have running statistics too, but no momentum: they are constants
        moving = module._buffers.get("running_mean") is not None and hasattr(module, "momentum")
        if moving and not isinstance(module, HATLayer):
            if not path.split(".")[-1].isdigit() or "hat_tasks" not in path:
                raise HATError(
                    f"{path}: {type(module).__name__} has running statistics that all tasks would share; "
                    "use its TaskIndexed kin, or hatcl.convert for the whole model"
                )


def task_parameters(model: nn.Module, task: int) -> list[nn.Parameter]:
    """What only this task has: its embeddings, heads and norms. For `optimizer.add_param_group` after `add_tasks`."""
    task = check_task(model, task)
    return [h.param for h in guards.held(model) if h.task == task]


def add_tasks(model: nn.Module, count: int) -> None:
    """Make room for `count` more tasks, in place. Optimizers built earlier do not hold their parameters; add them with
    `optimizer.add_param_group({"params": hatcl.task_parameters(model, t)})`."""
    if count < 1:
        raise TaskError(f"count: got {count}, expected at least 1")
    for g in gates_of(model):
        g.add(count)
    for module in model.modules():
        if isinstance(module, HATLayer) and "hat_tasks" in module._modules:
            module.hat_tasks.extend(module._hat_new_copy() for _ in range(count))
