"""Heads: the number of classes of each task, and its own copy of the head with that width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..calls import seeded
from ..errors import ConfigError
from ..functional import digest_of
from ..map.units import UnitMap
from .build import GATES
from .gates import Gates, gates_of
from .layers.gated import HATLayer
from .layers.linear import TaskIndexedLinear
from .registry import plain_class

HeadParts = list[tuple[str, str, str]]  # per parameter of a head: (path of its module, name there, name in the map)

Classes = int | Sequence[int]


def class_counts(num_classes: Any, num_tasks: int, which: str = "") -> dict[str | None, list[int]]:
    """Path of a head (None: all heads) -> one number of classes per task. which: an adjective for the tasks in
    errors."""
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
    """The heads that get other widths, and these widths. All parameters that write the same classes are one head: a
    weight and its bias, two modules that share a parameter or whose outputs are added, a factor per class.

    Raises:
        ConfigError: there is no such head, it is ambiguous which one is meant, or its width cannot differ.
    """
    if not widths:
        return []
    kind, names = type(model).__name__, {id(p): n for n, p in model.named_parameters()}
    heads: dict[str, HeadParts] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            entry = None if p is None else unit_map.entries.get(names[id(p)])  # a task's copy has no entry
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
    """Give each task's copy of a head its own number of classes, drawn by the layer's initialiser. first: the task that
    the first number belongs to."""
    drawn: dict[tuple[str, int], Tensor] = {}
    for path, name, entry in head:
        module: Any = model.get_submodule(path)
        for task, n in enumerate(num_classes, first):
            if n != module._parameters[name].shape[0]:
                own = module.hat_tasks[task]._parameters
                if (entry, task) not in drawn:  # a parameter shared by two modules is drawn once
                    shape = (n, *own[name].shape[1:])
                    drawn[entry, task] = module._hat_redrawn({name: shape})[name].to(own[name])
                own[name] = nn.Parameter(drawn[entry, task].clone())


def head_ids(model: nn.Module) -> set[int]:
    """The ids of the plain parameters of heads."""
    found: set[int] = set()
    for root in model.modules():
        gates = root._modules.get(GATES)
        if isinstance(gates, Gates):
            named = dict(root.named_parameters())
            found |= {id(named[e.name]) for e in gates.unit_map.entries.values() if e.head and e.name in named}
        elif isinstance(root, TaskIndexedLinear):
            found |= {id(p) for p in root._parameters.values() if p is not None}
    return found


def is_untrained(module: nn.Module) -> bool:
    """Does a linear layer or a convolution still have the values from torch's own initialiser?

    It draws weight and bias from U(-b, b) with `b = 1 / sqrt(fan_in)`, so their mean square is `b^2 / 3`. A training
    step moves some of the values near b beyond it, and weight decay lowers the mean square. The mean square of n values
    has a standard error of `b^2 sqrt(4 / (45 n))`; the test allows five of them. A small layer after a few steps may
    still count as untrained.
    """
    weight = module._parameters.get("weight")
    ours = (nn.Linear.reset_parameters, _ConvNd.reset_parameters)
    if weight is None or not weight.numel() or getattr(plain_class(type(module)), "reset_parameters", None) not in ours:
        return False
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return False
    values = [p.detach() for p in (weight, module._parameters.get("bias")) if p is not None]
    b = 1 / math.sqrt(max(weight[0].numel(), 1))
    rounded = b * (1 + torch.finfo(weight.dtype).eps)
    if not all(max(-float(v.min()), float(v.max())) <= rounded for v in values):
        return False
    mean_square = float(torch.linalg.vector_norm(values[0], dtype=torch.float64)) ** 2 / weight.numel()
    return abs(mean_square / b**2 - 1 / 3) <= 5 * math.sqrt(4 / 45 / weight.numel())


def drawn_heads(model: nn.Module) -> set[int]:
    """The ids of the plain parameters of heads whose copies each task draws afresh (see `HATConfig.heads`)."""
    config, ids = gates_of(model)[0].config, head_ids(model)
    found: set[int] = set()
    for module in [m for m in model.modules() if isinstance(m, HATLayer) and "hat_tasks" in m._modules]:
        mine = [p for p in module._parameters.values() if p is not None and id(p) in ids and not p.is_meta]
        if mine and (config.heads == "drawn" or (config.heads == "auto" and is_untrained(module))):
            found |= {id(p) for p in mine if p.requires_grad}
    return found


def draw_heads(model: nn.Module, tasks: Iterable[int]) -> None:
    """Draw the start values of these tasks' copies of heads, unless these are the plain model's values.

    All processes draw the same values: the seed depends on the plain model's values and the task. The caller's random
    state is unchanged."""
    heads, drawn = drawn_heads(model), dict[tuple[int, int], Tensor]()
    for module in [m for m in model.modules() if isinstance(m, HATLayer) and "hat_tasks" in m._modules]:
        for name, plain in module._parameters.items():
            if plain is None or id(plain) not in heads:
                continue
            for task in tasks:
                own = module.hat_tasks[task]._parameters.get(name)
                if own is None or own.shape != plain.shape:  # a copy of another width is already drawn
                    continue
                if (id(plain), task) not in drawn:  # a parameter shared by two modules is drawn once
                    with seeded(int(digest_of(plain)[-7:], 16) + task, plain.device):
                        drawn[id(plain), task] = module._hat_redrawn()[name].to(own)
                with torch.no_grad():
                    own.copy_(drawn[id(plain), task])
