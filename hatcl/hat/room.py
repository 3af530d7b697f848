"""Room, counted in weights: the elements that no sealed task holds, and how many of them another task could use."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CapacityError
from ..functional import share_switched_on
from ..map.lora import is_factor
from .binding import ParameterPlan, UnitAxis
from .gates import Gates, gates_of, groups_of
from .held import held, live_for
from .layers.gated import HATLayer
from .own_copies import CHOSEN
from .tasks import locked_tasks, tasks


@dataclass(frozen=True)
class Room:
    """Shared elements that a task could learn.

    Attributes:
        elements: layer -> number of shared elements that write its units; elements that write no unit (factors of LoRA
            pairs) count for the layer whose units they read. free: layer -> number of these elements that no sealed
            task holds; under `reuse="none"`, counted only between units that no sealed task uses.
        task_size: number of elements of a task of the expected size: per layer the average over sealed tasks; before
            the first one, the share that `init` switches on; for given gates, their own size.
        task_free: number of these elements that are free.
        tasks_left: an estimate of how many more such tasks fit without sharing: `free / task_size`; under
            `reuse="none"` counted in units, in the fullest layer; with given gates the number of tasks left.
    """

    elements: dict[str, int]
    free: dict[str, int]
    task_size: int
    task_free: int
    tasks_left: int

    @property
    def closed(self) -> list[str]:
        """Layers without free elements."""
        return [name for name, n in self.elements.items() if n and not self.free[name]]

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "closed": self.closed}

    def __str__(self) -> str:
        free, total = sum(self.free.values()), sum(self.elements.values())
        return (
            f"room: {free:,} of {total:,} shared elements are free; of the {self.task_size:,} of a task of the "
            f"expected size, {self.task_free:,} would be; {self.tasks_left} more such tasks fit without sharing"
            + (f"; closed: {', '.join(self.closed)}" if self.closed else "")
        )


def room_of(model: nn.Module) -> Room:
    """The elements that sealed tasks leave free, and the part that a task of the expected size could use."""
    gates = gates_of(model)
    sealed = tasks(model)
    expected = {id(g): _expected(g, sealed) for g in gates}
    elements = dict.fromkeys((name for name, *_ in groups_of(model)), 0)
    layer = {(id(g), n): name for name, g, start, stop in groups_of(model) for n in range(start + 1, stop + 1)}
    free, size, found = dict(elements), 0.0, 0.0
    for plan, mask in _free(model, sealed, lambda g: _allowed(g, None)):
        axis = plan.main
        names = [layer.get((id(axis.units.gates), n), "") for n in axis.units.numbers.tolist()]
        share = torch.ones((), device=mask.device)
        for a in plan.axes:
            share = share * _of_units(a, expected[id(a.units.gates)]).view(a.shape)
        size += float(share.mean()) * mask.numel()
        found += float((share * mask).sum(dtype=torch.float64))
        over = [d for d, n in enumerate(axis.shape) if n == 1]
        each = mask.sum(over).flatten().tolist() if over else mask.flatten().tolist()
        per_unit = mask.numel() // len(names)
        for name, n in zip(names, each, strict=True):
            if name:
                elements[name] += per_unit
                free[name] += int(n)
    return Room(elements, free, round(size), round(found), _tasks_left(model, sealed, free, size, expected))


def check_room(model: nn.Module, task: int) -> None:
    """Raise `CapacityError` if a task could learn only its head: sealed tasks hold all elements that it may use.

    Warns:
        UserWarning: under `reuse="none"` a layer has no unit left, so its output is zero; sealed tasks hold all
            elements, and the task can only learn its own norms and its head.
    """
    gates = gates_of(model)
    allowed = {id(g): _allowed(g, task) for g in gates}
    if gates[0].config.reuse == "none":
        shut = [
            name for name, g, a, b in groups_of(model) if not bool(allowed[id(g)][a:b].any()) and not is_factor(name)
        ]
        if shut and len(shut) < sum(1 for _ in groups_of(model)):
            warnings.warn(
                f"task {task}: under reuse='none' {', '.join(shut[:5])}{' ...' if len(shut) > 5 else ''} have no unit "
                "left, so nothing passes there; forget a task (hatcl.forget_task), or use a wider model",
                stacklevel=4,
            )
    if any(bool((allowed[id(g)] & ~g.used(without=task)).any()) for g in gates):
        return  # no sealed task uses this unit, so all elements that write it are free
    shared = False
    for _, mask in _free(model, locked_tasks(model), lambda g: allowed[id(g)]):
        shared = True
        if bool(mask.any()):
            return
    if not shared:
        return
    closed = [name for name, *_ in groups_of(model)]
    held_by = f"sealed tasks hold every element of {', '.join(closed[:5])}{' ...' if len(closed) > 5 else ''} that it"
    remedy = (
        "forget a task (hatcl.forget_task), grow the network (hatcl.grow), raise HATConfig.penalty_weight (now "
        f"{gates[0].config.penalty_weight:g}) or HATConfig.embedding_lr_scale (now "
        f"{gates[0].config.embedding_lr_scale:g}) for earlier tasks, or use a wider model"
    )
    if any(e.why == CHOSEN for g in gates if g.unit_map is not None for e in g.unit_map.entries.values()):
        return  # it can learn its own copies
    if gates[0].config.reuse == "none" or not _own_norms(model, task):
        raise CapacityError(f"task {task}: no room left, {held_by} could learn; {remedy}")
    warnings.warn(
        f"task {task}: {held_by} could share, so it learns with its own norms and its head alone, over features that "
        f"others learned; {remedy}",
        stacklevel=4,
    )


def _own_norms(model: nn.Module, task: int) -> bool:
    """Has a task its own parameters in norms, which scale and shift the outputs of frozen weights?"""
    layers = (m for m in model.modules() if isinstance(m, HATLayer) and m.hat_is_norm and "hat_tasks" in m._modules)
    return any(p.requires_grad for m in layers for p in m.hat_tasks[task].parameters())


def _allowed(g: Gates, task: int | None) -> Tensor:
    """`[U]` bool: the units that a task may use."""
    if task is not None and g.is_given(task):
        return g.given[task]
    there = torch.ones_like(g.masks[0]) if task is None else g.within(task)
    return there if g.config.reuse == "all" else there & ~g.used(without=task)


def _free(
    model: nn.Module, sealed: Sequence[int], allowed: Callable[[Gates], Tensor]
) -> Iterator[tuple[ParameterPlan, Tensor]]:
    """Every shared parameter's plan, with a bool mask of its free elements in the plan's view."""
    device = gates_of(model)[0].masks.device  # not the parameter's, which may be the meta device
    for h in held(model):
        if h.task is not None or h.plain or h.plan is None or not h.plan.axes:
            continue
        frozen = live_for(h, sealed)
        mask = torch.ones((), dtype=torch.bool, device=device)
        for axis in h.plan.axes:
            mask = mask & _of_units(axis, allowed(axis.units.gates)).view(axis.shape)
        mask = mask.expand(h.plan.view)
        yield h.plan, mask if frozen is None else mask & ~frozen.view(h.plan.view)


def _of_units(axis: UnitAxis, values: Tensor) -> Tensor:
    """Values `[U]` for the entries of an axis; 1 where an entry is always on."""
    numbers = torch.as_tensor(axis.units.numbers, device=values.device)
    return torch.where(numbers == 0, torch.ones((), dtype=values.dtype, device=values.device), values[numbers - 1])


def _expected(g: Gates, sealed: Sequence[int]) -> Tensor:
    """`[U]`: the probability that a task uses each unit."""
    left = [t for t in range(g.num_tasks) if t not in sealed]
    given = [t for t in left if g.is_given(t)]
    if given:
        return g.given[given[0]].float()
    share = torch.zeros(g.num_units, device=g.masks.device)
    if not sealed:
        return share + share_switched_on(g.config)
    for _, start, stop in g.layers:
        if stop > start:
            share[start:stop] = g.masks[list(sealed), start:stop].float().mean()
    return share


def _tasks_left(
    model: nn.Module, sealed: Sequence[int], free: dict[str, int], size: float, expected: dict[int, Tensor]
) -> int:
    gates = gates_of(model)[0]
    left = [t for t in range(gates.num_tasks) if t not in sealed]
    if gates.config.array is not None:
        return gates.config.array**2 - len(sealed)
    if gates.config.masks in ("given", "all"):
        return sum(gates.is_given(t) for t in left)
    if gates.config.reuse == "none":
        units = [
            int((~g.used())[a:b].sum()) / max(float(expected[id(g)][a:b].sum()), 1.0) for _, g, a, b in groups_of(model)
        ]
        return int(min(units, default=0.0))
    return int(sum(free.values()) / max(size, 1.0))
