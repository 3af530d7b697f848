"""The active task of a model, and its sealed tasks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor, nn

from ..errors import TaskError
from . import active
from .gates import Gates, gates_of


def tasks(model: nn.Module) -> list[int]:
    """The sealed tasks."""
    return gates_of(model)[0].sealed.nonzero().flatten().tolist()


def locked_tasks(model: nn.Module) -> list[int]:
    """The sealed tasks whose elements are frozen while another is learned (`HATConfig.locked`)."""
    chosen = gates_of(model)[0].config.locked
    return [t for t in tasks(model) if chosen is None or t in chosen]


def set_task(model: nn.Module, task: int | None) -> None:
    """Make `task` the model's default in every thread: 0, 1, ... computes with that task's gates, None is the plain
    model. `with hatcl.task(...)` chooses a task for one thread and one block.

    Raises:
        TaskError: there is no such task, or it is neither sealed nor being learned; inside `with hatcl.task(...)`,
            where the default has no effect; from a thread other than the one that is learning a task.
    """
    gates = gates_of(model)
    task = _usable(gates, model, task)
    if any(active.is_chosen(g.key) for g in gates):
        raise TaskError(
            f"set_task: got task {task} inside a `with hatcl.task(...)` block of the same model, which keeps its own "
            "task active; leave the block first, or put another `with hatcl.task(...)` into it"
        )
    if gates[0].learning is not None and gates[0].learner != threading.get_ident():
        raise TaskError(
            f"set_task: got task {task} while another thread is learning task {gates[0].learning}, whose steps would "
            "be taken under the wrong task; evaluate inside `with hatcl.task(model, ...)`, which belongs to a thread"
        )
    for g in gates:
        g.task = task


@contextlib.contextmanager
def task(model: nn.Module, task: int | None) -> Iterator[nn.Module]:
    """`with hatcl.task(model, 2): ...` computes with task 2's gates inside the block, only in this thread (or asyncio
    task). So several threads can serve several tasks of one model:

        def answer(task, x):
            with hatcl.task(model, task), torch.no_grad():
                return model(x)

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(answer, ids, batches))

    Raises:
        TaskError: there is no such task, or it is neither sealed nor being learned.
    """
    gates = gates_of(model)
    task = _usable(gates, model, task)
    for g in gates:
        g.choose()
    with active.choose([g.key for g in gates], task):
        yield model


def _usable(gates: Sequence[Gates], model: nn.Module, task: int | None) -> int | None:
    """The task, if it has gates to compute with."""
    for g in gates:
        g.notice()
    if task is None or (not isinstance(task, Tensor) and gates[0].is_open(task)):
        return task
    return check_task(model, task, sealed=True)


def check_task(model: nn.Module, task: int | None, *, sealed: bool | None = None) -> int:
    """The task as an int, or `TaskError`. sealed: require that it is (True) or is not (False) sealed."""
    gates = gates_of(model)
    count = min(g.num_tasks for g in gates)
    if isinstance(task, bool) or not isinstance(task, (int, np.integer)):
        raise TaskError(f"task: got {task!r}, expected an integer from 0 to {count - 1}")
    if not 0 <= task < count:
        raise TaskError(
            f"task: got {task}, the model has tasks 0 to {count - 1}; hatcl.add_tasks(model, n) makes room for more"
        )
    is_sealed = bool(gates[0].sealed[task])
    if sealed and int(task) in gates[0].reopened():
        raise TaskError(
            f"task {task} is reopened and not sealed, so it has no hard gates; learn it on with hatcl.learn(model, "
            f"{task}, ...), or hatcl.seal(model, {task}) seals it as it is"
        )
    if sealed and not is_sealed:
        done = gates[0].sealed.nonzero().flatten().tolist()
        raise TaskError(
            f"task {task} is not sealed, so it has no hard gates yet; sealed are {done}. Learn it with hatcl.learn"
        )
    if sealed is False and is_sealed:
        raise TaskError(
            f"task {task} is sealed and cannot be learned again; hatcl.reopen_task(model, {task}) opens it to learn it "
            f"on, hatcl.forget_task(model, {task}) frees it, or learn another"
        )
    return int(task)


def check_none_reopened(model: nn.Module, what: str, task: int | None = None) -> None:
    """Raise `TaskError` if a task other than this one is reopened, since its elements would not be frozen.

    Args:
        what: the planned action, as the beginning of the error.
    """
    others = [t for t in gates_of(model)[0].reopened() if t != task]
    if others:
        raise TaskError(
            f"{what} would be free to overwrite what task {others[0]} uses, which is reopened and not sealed; learn "
            f"it first (hatcl.learn(model, {others[0]}, ...)), or hatcl.seal(model, {others[0]}) seals it as it is"
        )
