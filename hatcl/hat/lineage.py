"""Lineage: which task carries what was transplanted from which (M13).

`Gates.lineage` is `[T, T]` uint8. In row t, column s: `CARRIES` where task t, or one that it was started from, was
started from task s; `FORGOTTEN` where that task s has been forgotten since. So a row has all ancestors, and a task that
takes a number again that was freed is none of them. On the diagonal `BEGUN` says that a task was started from
another, or was sealed, so that it can be continued, and `FORKED` that it has the gates of its start.
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
    """Task -> the tasks whose knowledge was transplanted into it, directly or by way of others; those that have any.
    Tasks that have begun and are not sealed are among them."""
    return _marked(model, CARRIES)


def forgotten_lineage(model: nn.Module) -> dict[int, list[int]]:
    """Task -> the numbers that tasks had whose knowledge it carries and that have been forgotten since."""
    return _marked(model, FORGOTTEN)


def _marked(model: nn.Module, mark: int) -> dict[int, list[int]]:
    rows = (gates_of(model)[0].lineage & mark).cpu()
    return {t: row.nonzero().flatten().tolist() for t, row in enumerate(rows) if bool(row.any())}


def descendants_of(model: nn.Module, task: int) -> list[int]:
    """The tasks that carry what was transplanted from this one."""
    return [t for t, ancestors in lineage(model).items() if task in ancestors]


def inherit(model: nn.Module, task: int, source: int | None, forked: bool = False) -> None:
    """Record that a task begins, from a source or from none. Whatever it is started from, it can take elements that an
    unfinished task had been given, so it carries what that one carries. forked: its gates are those of its start."""
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
    """Are the gates that a task is given those of an earlier start of it, and nobody's wish?"""
    return bool(gates_of(model)[0].lineage[task, task] & FORKED)


def disinherit(model: nn.Module, forgotten: Sequence[int]) -> None:
    """Tasks are forgotten: they carry nothing, and who carries what they knew carries what was forgotten."""
    for g in gates_of(model):
        for t in forgotten:
            g.lineage[t] = 0
        for t in forgotten:
            carries = (g.lineage[:, t] & (CARRIES | FORGOTTEN)) != 0
            g.lineage[:, t] = carries.to(g.lineage) * FORGOTTEN


def to_forget(model: nn.Module, task: int, descendants: str) -> list[int]:
    """The tasks that are forgotten with one: itself, and what descends from it where `descendants` says so.

    Raises:
        ConfigError: another word than `DESCENDANTS`. TaskError: there are descendants, and they are to be refused.
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
    """Forgetting is not complete."""
    if carriers:
        warnings.warn(
            f"forget_task: {spoken(carriers)} started from task {task} and keep what was transplanted from it, so it "
            "is forgotten in part only; pass descendants='forget' to forget them as well, 'refuse' to be stopped here",
            stacklevel=3,
        )


def spoken(numbers: Sequence[int]) -> str:
    """Tasks by their numbers, in a sentence."""
    return f"task{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
