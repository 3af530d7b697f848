"""Lineage: which task carries weights that were transplanted from which task (M13).

`Gates.lineage` is `[T, T]` uint8. Row t, column s: `CARRIES` if task t, or a task that it was started from, was started
from task s; `FORGOTTEN` if that task s has been forgotten since. So a row marks all ancestors, and a new task with a
freed number does not count as one. On the diagonal, `BEGUN` marks a task that was started from another, or was sealed,
so that it can be continued; `FORKED` marks a task that has the gates of its start.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from ..config import one_of
from ..errors import TaskError
from .gates import gates_of
from .tasks import tasks

CARRIES, FORGOTTEN, BEGUN, FORKED = 1, 2, 4, 8
DESCENDANTS = ("keep", "refuse", "forget")


def lineage(model: nn.Module) -> dict[int, list[int]]:
    """Task -> the tasks whose weights were transplanted into it, directly or through others. It lists only tasks with
    such ancestors, also tasks that have begun and are not sealed."""
    return _marked(model, CARRIES)


def forgotten_lineage(model: nn.Module) -> dict[int, list[int]]:
    """Task -> the former numbers of forgotten tasks whose knowledge it carries."""
    return _marked(model, FORGOTTEN)


def _marked(model: nn.Module, mark: int) -> dict[int, list[int]]:
    rows = (gates_of(model)[0].lineage & mark).cpu()
    return {t: row.nonzero().flatten().tolist() for t, row in enumerate(rows) if bool(row.any())}


def descendants_of(model: nn.Module, task: int) -> list[int]:
    """The tasks that carry weights transplanted from this one."""
    return [t for t, ancestors in lineage(model).items() if task in ancestors]


def inherit(model: nn.Module, task: int, source: int | None, forked: bool = False) -> None:
    """Record that a task begins, from a source or from none. In either case it can use elements that were transplanted
    into an unfinished task, so it inherits the lineage of all unfinished tasks. forked: its gates are those of its
    start."""
    sealed = set(tasks(model))
    for g in gates_of(model):
        unfinished = [t for t in range(g.num_tasks) if t not in sealed and t != task]
        own = g.lineage[task, task].clone()
        for t in [*unfinished, *([] if source is None else [source])]:
            g.lineage[task] |= g.lineage[t] & (CARRIES | FORGOTTEN)
        g.lineage[task, task] = own
        if source is not None:
            g.lineage[task, source] |= CARRIES
            g.lineage[task, task] = BEGUN | (FORKED if forked else 0)


def mark_sealed(model: nn.Module, task: int) -> None:
    """Record that a task was sealed."""
    for g in gates_of(model):
        g.lineage[task, task] |= BEGUN


def has_begun(model: nn.Module, task: int) -> bool:
    """Whether the task can be continued: it was started from another and left unfinished, or sealed and reopened."""
    return bool(gates_of(model)[0].lineage[task, task] & BEGUN)


def has_forked(model: nn.Module, task: int) -> bool:
    """Do a task's given gates come from an earlier start, and not from a caller?"""
    return bool(gates_of(model)[0].lineage[task, task] & FORKED)


def disinherit(model: nn.Module, forgotten: Sequence[int]) -> None:
    """Record that tasks are forgotten: clear their rows, and mark them as `FORGOTTEN` in the rows of tasks that carry
    their knowledge."""
    for g in gates_of(model):
        for t in forgotten:
            g.lineage[t] = 0
        for t in forgotten:
            carries = (g.lineage[:, t] & (CARRIES | FORGOTTEN)) != 0
            g.lineage[:, t] = carries.to(g.lineage) * FORGOTTEN


def to_forget(model: nn.Module, task: int, descendants: str) -> list[int]:
    """The tasks that are forgotten with one: itself, and its descendants under `descendants="forget"`.

    Raises:
        ConfigError: `descendants` is none of `DESCENDANTS`. TaskError: there are descendants under `refuse`.
    """
    one_of("descendants", descendants, DESCENDANTS)
    carriers = descendants_of(model, task)
    if carriers and descendants == "refuse":
        raise TaskError(
            f"forget_task: {spoken(carriers)} started from task {task} and would keep what was transplanted; nothing "
            "was forgotten. Forget them first, or pass descendants='forget' to forget them as well, descendants='keep' "
            "to leave them"
        )
    return [task, *carriers] if descendants == "forget" else [task]


def warn_of_descendants(task: int, carriers: Sequence[int]) -> None:
    """Warn that forgetting is incomplete, because these tasks carry transplanted weights."""
    if carriers:
        warnings.warn(
            f"forget_task: {spoken(carriers)} started from task {task} and keep what was transplanted from it, so it "
            "is forgotten in part only; pass descendants='forget' to forget them as well, 'refuse' to be stopped here",
            stacklevel=3,
        )


def spoken(numbers: Sequence[int]) -> str:
    """Task numbers as text for a sentence."""
    return f"task{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
