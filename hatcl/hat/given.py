"""Given gates: a task learns with hard gates chosen in advance, instead of learning its gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import number
from ..errors import ConfigError, TaskError, nearest
from ..map.lora import is_factor
from ..shards import check_whole
from .gates import Gates, gates_of, groups_of
from .tasks import check_task

Masks = Callable[[int, str, int], Tensor] | Sequence[Mapping[str, Tensor]]


def masks_of(model: nn.Module, task: int) -> dict[str, Tensor]:
    """A sealed task's hard gates: name of a layer, as in `describe`, -> `[U]` bool.

    Raises:
        TaskError: no such task, or it is not sealed.
    """
    task = check_task(model, task, sealed=True)
    return {name: g.masks[task, start:stop].clone() for name, g, start, stop in groups_of(model)}


def hold_gates(model: nn.Module, task: int, masks: Mapping[str, Tensor] | None, until: float = 1.0) -> None:
    """Give a task hard gates. `hatcl.learn` then holds the task to them: nothing is annealed, no gate is soft,
    `penalty()` is 0, and the task's embeddings get no gradient and do not change. Sealing records these gates.
    `state_dict`, `save_pretrained` and copies keep them until the task is forgotten.

    Args:
        task: a task that is not sealed.
        masks: for every layer, name as in `hatcl.describe` -> `[U]` bool, the units that are on. None: the task's gates
            are learned, like those of any other task.
        until: the share of the task's steps during which it is held, above 0 and at most 1. Below 1 the gates are
            learned afterwards, starting from these, with the scale annealed over the remaining steps.

    Raises:
        TaskError: no such task, it is sealed, or a task is being learned; masks that do not fit, or with no unit of a
            layer on (names the layer). ConfigError: `until` out of range, or below 1 if `HATConfig.masks` makes tasks
            keep their given gates.
    """
    check_whole(model, "hold_gates")
    task = check_task(model, task, sealed=False)
    gates = gates_of(model)
    if gates[0].learning is not None:
        raise TaskError(
            f"hold_gates: task {gates[0].learning} is being learned; leave its hatcl.learn block before task {task} is "
            "given gates"
        )
    until = number("until", until, 0, 1, without="low", what="a share")
    plan = gates[0].config.masks
    if until < 1 and plan != "learned":
        raise ConfigError(
            f"until: got {until}, in a model of masks={plan!r}, whose tasks keep the gates that they are given; pass "
            "1, or convert the model with masks='learned'"
        )
    rows = None if masks is None else _row_of_each(model, masks)
    if rows is not None and any(bool((rows[id(g)] & ~g.within(task)).any()) for g in gates):
        raise TaskError(
            f"masks: task {task} is reopened and was sealed before the network grew, so it keeps the sizes of then; "
            "switch off the units that came since, or forget the task and learn it again"
        )
    for g in gates:
        g.give(task, None if rows is None else rows[id(g)], until)


def given_by(model: nn.Module, masks: Masks) -> Sequence[Mapping[str, Tensor]]:
    """The masks of each task of a converted model, from the argument of `hatcl.convert`."""
    count = gates_of(model)[0].num_tasks
    if callable(masks):
        sizes = {name: stop - start for name, _, start, stop in groups_of(model)}
        return [{name: masks(t, name, n) for name, n in sizes.items()} for t in range(count)]
    if isinstance(masks, Mapping) or not isinstance(masks, Sequence) or len(masks) != count:
        found = f"{len(masks)} masks" if isinstance(masks, Sequence) else type(masks).__name__
        raise ConfigError(
            f"masks: got {found}, expected one mapping of layers' names to bool tensors for each of {count} tasks, or "
            "a function of (task, layer, units) that gives a bool tensor"
        )
    return masks


def hold_all(model: nn.Module, masks: Masks | None = None) -> None:
    """Give all tasks their gates: those passed to `hatcl.convert`, or those that the config plans. Tasks that are
    sealed, or that already have given gates, keep theirs.

    Raises:
        TaskError: masks that do not fit; names task and layer.
    """
    g = gates_of(model)[0]
    if masks is not None:
        rows = []
        for t, given in enumerate(given_by(model, masks)):
            try:
                rows.append(_row_of_each(model, given)[id(g)])
            except TaskError as error:
                raise TaskError(f"task {t}: {error}") from None
    else:
        rows = g.planned(g.growths)
    for t, row in enumerate(rows):
        if not g.is_given(t) and not bool(g.sealed[t]):
            g.give(t, row.to(g.masks.device))


def _row_of_each(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """For each of the model's gates, by its id, `[U]` bool."""
    if not isinstance(masks, Mapping):
        raise TaskError(
            f"masks: got {type(masks).__name__}, expected a mapping of layers' names to bool tensors, or None"
        )
    groups = {name: (g, start, stop) for name, g, start, stop in groups_of(model)}
    for name in masks:
        if name not in groups:
            raise TaskError(
                f"masks: got {name!r}, which is no layer with units; did you mean "
                f"{nearest(str(name), list(groups))!r}? hatcl.describe(model) lists them"
            )
    if missing := [name for name in groups if name not in masks]:
        raise TaskError(
            f"masks: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''} missing; give a task gates of all "
            "layers, all ones where every unit is on"
        )
    rows = {id(g): torch.zeros_like(g.masks[0]) for g in gates_of(model)}
    for name, (g, start, stop) in groups.items():
        rows[id(g)][start:stop] = _mask_of_units(name, masks[name], stop - start)
    return rows


def _mask_of_units(name: str, mask: Any, units: int) -> Tensor:
    found = f"{str(mask.dtype)[6:]} of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != (units,):
        raise TaskError(f"masks[{name!r}]: got {found}, expected a bool tensor of shape [{units}], one per unit")
    if not bool(mask.any()) and not is_factor(name):  # a LoRA layer without pairs still has its base
        raise TaskError(f"masks[{name!r}]: no unit is on, so nothing would pass there; switch at least one on")
    return mask


def check_given(model: nn.Module, task: int) -> None:
    """Raise `TaskError` if a task cannot be learned with its given gates, or needs given gates and has none."""
    config = gates_of(model)[0].config
    if config.masks != "learned" and not gates_of(model)[0].is_given(task):
        raise TaskError(
            f"task {task}: it is given no gates, and masks={config.masks!r} has them given; call "
            f"hatcl.hold_gates(model, {task}, masks)"
        )
    for name, g, start, stop in groups_of(model):
        if g.config.reuse != "none" or not float(g.given_until[task]):
            continue
        shared = g.given[task, start:stop] & g.used(without=task)[start:stop]
        if bool(shared.any()):
            raise TaskError(
                f"task {task}: the gates that it is given have {int(shared.sum())} units of {name} on that sealed "
                f"tasks {_users(g, shared, start, stop)} use, and under reuse='none' tasks share none; give it other "
                "gates (hatcl.hold_gates), or convert the model with reuse='all'"
            )


def _users(g: Gates, shared: Tensor, start: int, stop: int) -> list[int]:
    return (g.sealed & (g.masks[:, start:stop] & shared).any(1)).nonzero().flatten().tolist()
