"""Heads: how many classes each task has, and its own copy of the head in that width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from ..map.units import UnitMap

HeadParts = list[tuple[str, str, str]]  # path of the module, name there and name in the map of each parameter of a head

Classes = int | Sequence[int]


def class_counts(num_classes: Any, num_tasks: int, which: str = "") -> dict[str | None, list[int]]:
    """Path of a head (None: of all) -> one number of classes per task. which: how errors call such tasks."""
    if num_classes is None:
        return {}
    found: dict[str | None, list[int]] = {}
    for path, given in (num_classes if isinstance(num_classes, Mapping) else {None: num_classes}).items():
        where = f"num_classes[{path!r}]" if isinstance(num_classes, Mapping) else "num_classes"
        many = isinstance(given, Sequence) and not isinstance(given, str)
        numbers = list(given) if many else [given] * num_tasks
        if len(numbers) != num_tasks:
            raise ConfigError(
                f"{where}: got {len(numbers)} numbers for {num_tasks} {which}tasks; pass one per {which}task"
            )
        if wrong := [n for n in numbers if type(n) is not int or n < 1]:
            raise ConfigError(
                f"{where}: got {wrong[0]!r}; expected a whole number of 1 or more, or a list of one per task"
            )
        found[path] = numbers
    return found


def heads_of(
    model: nn.Module, unit_map: UnitMap, widths: Mapping[str | None, list[int]]
) -> list[tuple[HeadParts, list[int]]]:
    """The heads that get other widths, and which. What writes the same classes is one head: a weight and its bias, two
    modules that share a parameter or whose outputs are added, a factor per class.

    Raises:
        ConfigError: there is no such head, it is not said which, or its width cannot differ.
    """
    if not widths:
        return []
    kind, names = type(model).__name__, {id(p): n for n, p in model.named_parameters()}
    heads: dict[str, HeadParts] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            entry = None if p is None else unit_map.entries.get(names[id(p)])  # none of a task's own copy
            if entry is not None and entry.head:
                heads.setdefault(entry.classes, []).append((path, name, entry.name))
    if not heads:
        raise ConfigError(f"num_classes: {kind} has no head whose width could differ per task; pass None")
    by_path: dict[str | None, HeadParts] = {path: head for head in heads.values() for path, _, _ in head}
    shapes_of = {name: unit_map.entries[name].shape for head in heads.values() for _, _, name in head}
    first = [max(head, key=lambda part: math.prod(shapes_of[part[2]])) for head in heads.values()]
    of_each = {path: shapes_of[name][0] for path, _, name in first}
    if None in widths:
        if len(set(of_each.values())) > 1:
            raise ConfigError(
                f"num_classes: {kind} has several heads of different widths, "
                f"{', '.join(f'{path} ({n})' for path, n in of_each.items())}; name the one that is meant, such as "
                f"num_classes={{{first[0][0]!r}: {widths[None]}}}"
            )
        widths = dict.fromkeys(of_each, widths[None])
    found: dict[str, tuple[HeadParts, list[int]]] = {}
    for path, numbers in widths.items():
        if path not in by_path:
            raise ConfigError(f"num_classes: got {path!r}, which is no head; the model has {', '.join(of_each)}")
        head = by_path[path]
        if head[0][2] in found:
            raise ConfigError(f"num_classes: {', '.join(map(repr, widths))} write the same classes; name one of them")
        for _, _, name in head:
            if not unit_map.entries[name].copied:
                raise ConfigError(
                    f"num_classes: {path}: {name} belongs to all tasks, so its width cannot differ; give the head a "
                    "weight of its own (of a language model: tie_word_embeddings=False), or pass None"
                )
        found[head[0][2]] = head, numbers
    return list(found.values())


def widen(model: nn.Module, head: HeadParts, num_classes: Sequence[int], first: int = 0) -> None:
    """Give each task's copy of a head its own number of classes, drawn by the layer's initialiser. first: the task to
    which the first number belongs."""
    drawn: dict[tuple[str, int], Tensor] = {}
    for path, name, entry in head:
        module: Any = model.get_submodule(path)
        for task, n in enumerate(num_classes, first):
            if n != module._parameters[name].shape[0]:
                own = module.hat_tasks[task]._parameters
                if (entry, task) not in drawn:  # what is one parameter in two modules is drawn once
                    shape = (n, *own[name].shape[1:])
                    drawn[entry, task] = module._hat_redrawn({name: shape})[name].to(own[name])
                own[name] = nn.Parameter(drawn[entry, task].clone())
