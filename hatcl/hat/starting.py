"""The choice of the sealed task that a new one starts from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import split_batch
from ..config import BEST, PREVIOUS, check_start
from ..errors import ConfigError, TaskError
from ..shards import check_whole
from .features import features_under
from .gates import gates_of
from .tasks import check_task, tasks

MOST_COMPARED = 2000  # examples that are compared with each other
IN_A_FORWARD = 256  # in one forward


def source_for(model: nn.Module, task: int, start_from: int | str | None, examples: Any = None) -> int | None:
    """The sealed task that `start_from` names; None if it names none, or for "previous" or "best" before any task is
    sealed.

    Raises:
        ConfigError: an unknown word; "best" without examples, or with examples that cannot be compared. TaskError: no
            such task, it is the new one, it is not sealed (or was forgotten), or it uses no unit; the new one is
            reopened and was sealed before a growth.
    """
    start_from = check_start(start_from)
    if start_from is None:
        return None
    check_whole(model, "start_from")
    if gates_of(model)[0].config.reuse == "none":
        raise ConfigError(
            f"start_from: got {start_from!r} in a model of reuse='none', whose tasks share no unit; a task that starts "
            "from another shares most of its units with it. Convert the model with reuse='all', or leave start_from out"
        )
    if gates_of(model)[0].stages[task] != len(gates_of(model)[0].growths):
        raise TaskError(
            f"start_from: task {task} is reopened and was sealed before the network grew, so it keeps its former "
            "sizes and continues with its weights; leave start_from out, or forget the task and learn it again"
        )
    done = [t for t in tasks(model) if t != task and _uses_units(model, t)]
    if start_from == PREVIOUS:
        order = gates_of(model)[0].order
        return max(done, key=lambda t: int(order[t]), default=None)
    if start_from == BEST:
        return _nearest(model, done, examples) if done else None
    assert isinstance(start_from, int)
    if start_from == task:
        raise TaskError(
            f"start_from: got {task}, which is the task that is to be learned; name a sealed one, 'previous' or None"
        )
    check_task(model, start_from)
    if start_from not in tasks(model):
        raise TaskError(
            f"start_from: task {start_from} is not sealed (it was never learned, or it was forgotten), so there is "
            f"nothing to start from; sealed are {tasks(model)}. Name one of these, 'previous' or None"
        )
    if start_from not in done:
        raise TaskError(
            f"start_from: task {start_from} uses no unit, only its own head and copies, so there is nothing to share; "
            "name another task, or None"
        )
    return start_from


def _uses_units(model: nn.Module, task: int) -> bool:
    return any(bool(g.masks[task].any()) for g in gates_of(model))


def _nearest(model: nn.Module, done: list[int], examples: Any) -> int:
    """The task whose features separate the new task's examples best, by leave-one-out classification with the nearest
    neighbour under cosine similarity. Among equals, the task with the higher number."""
    inputs, labels = _gathered_examples(examples)
    scores = {t: nearest_neighbours(features_under(model, inputs, t), labels) for t in done}
    return max(done, key=lambda t: (scores[t], t))


def nearest_neighbours(features: Tensor, labels: Tensor) -> float:
    """The share of examples whose nearest neighbour under cosine similarity has their label. Shapes: features `[B, F]`,
    labels `[B]`."""
    x = torch.nn.functional.normalize(features, dim=1)
    near = x @ x.T
    near.fill_diagonal_(-torch.inf)
    return float((labels[near.argmax(1)] == labels).float().mean())


def _gathered_examples(examples: Any) -> tuple[list[Any], Tensor]:
    """Batches of inputs, and all their labels."""
    remedy = "give hatcl.learn(..., examples=(inputs, labels)), or batches of them, or name a task"
    if examples is None:
        raise ConfigError(
            f"start_from: got {BEST!r} without examples of the new task, which the tasks are compared on; {remedy}"
        )
    inputs: list[Any] = []
    labels: list[Tensor] = []
    for x, y in _batches(examples):
        if not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point() or not len(y):
            found = f"{str(y.dtype)[6:]} of shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise ConfigError(f"examples: got labels {found}, expected [B] integers, one class per example; {remedy}")
        inputs.append(x)
        labels.append(y.cpu())
        if sum(map(len, labels)) >= MOST_COMPARED:
            break
    if sum(map(len, labels)) < 2:
        raise ConfigError(f"examples: got {sum(map(len, labels))}, expected at least two to compare; {remedy}")
    return inputs, torch.cat(labels)


def _batches(examples: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(examples, (tuple, list)) and len(examples) == 2 and isinstance(examples[0], Tensor):
        x, y = examples
        if isinstance(y, Tensor) and len(x) != len(y):
            raise ConfigError(f"examples: got {len(x)} inputs and {len(y)} labels; expected one label per input")
        every = range(0, min(len(x), MOST_COMPARED), IN_A_FORWARD)
        yield from (
            (x[i : min(i + IN_A_FORWARD, MOST_COMPARED)], y[i : min(i + IN_A_FORWARD, MOST_COMPARED)]) for i in every
        )
    elif isinstance(examples, Mapping):
        yield split_batch(examples)
    elif isinstance(examples, Iterable):
        yield from map(split_batch, examples)
    else:
        raise ConfigError(
            f"examples: got {type(examples).__name__}, expected (inputs, labels), or batches of them (a DataLoader)"
        )
