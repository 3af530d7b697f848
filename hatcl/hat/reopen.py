"""Reopening: continue learning a sealed task from its sealed state."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import CapacityError, TaskError
from ..shards import check_whole
from .active import is_chosen
from .copies import let_go
from .digests import check_sealed
from .gates import gates_of
from .held import held, live_for
from .tasks import check_none_reopened, check_task, locked_tasks


@dataclass(frozen=True)
class ReopenReport:
    """The report of a reopened task.

    Attributes:
        own: number of shared elements that are live for the task and for no other locked task. held: number of those
            that other locked tasks use too, which stay frozen. copies: number of elements of its own copies (head,
            norms), which it can change too. units: number of units that it starts with.
    """

    task: int
    own: int
    held: int
    copies: int
    units: int

    @property
    def share_held(self) -> float:
        """Share of the task's shared elements that stays frozen because other tasks hold it."""
        return self.held / max(self.held + self.own, 1)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "share_held": self.share_held}

    def __str__(self) -> str:
        return (
            f"task {self.task}: reopened with {self.units:,} units; {self.own:,} shared elements and {self.copies:,} "
            f"of its own can change, {self.share_held:.1%} of its shared elements stay frozen, other tasks use them"
        )


def reopen_task(model: nn.Module, task: int) -> ReopenReport:
    """Reopen a sealed task, in place, to continue learning it: `hatcl.learn(model, task, ...)` then continues from its
    weights, head, norms and units, and seals the result. The task may take further units. Elements that other sealed
    tasks share with it stay frozen, and those tasks stay bit-equal.

    The embeddings start again from the sealed gates: +e for units that were on and -e for others, with
    e = |`HATConfig.init_value`|, or 1 if that is 0. The scale starts at s_max, falls and rises again
    (`HATConfig.schedule="cosine"`), instead of rising from almost 0, so the task starts out as it was sealed.

    A reopened task is not sealed: it cannot be evaluated, and its elements are not frozen. So no other task can be
    learned or forgotten until it is sealed again, by `hatcl.learn`, or unchanged by `hatcl.seal(model, task)`.

    If the network has grown since the task was sealed, the task keeps its former sizes, without the new units: with
    them an attention would divide by another width, so the task would not start out as it was sealed.

    Raises:
        TaskError: no such task, or it is not sealed; a task is being learned, or another one is reopened; a `with
            hatcl.task(...)` block of this context has the task active. CapacityError: other sealed tasks hold every
            shared element that the task uses, so it could learn nothing. IntegrityError: a sealed task changed.
    """
    check_whole(model, "reopen_task")
    task = check_task(model, task, sealed=True)
    gates = gates_of(model)
    if gates[0].learning is not None:
        raise TaskError(
            f"task {gates[0].learning} is being learned; leave its hatcl.learn block before reopening task {task}"
        )
    check_none_reopened(model, f"reopen_task: task {task}")
    if any(is_chosen(g.key) for g in gates) and gates[0].task == task:
        raise TaskError(f"task {task} is active in a `with hatcl.task(...)` block; leave it before reopening the task")
    check_sealed(model)
    report = _report(model, task)
    if not report.own:
        others = [t for t in locked_tasks(model) if t != task]
        raise CapacityError(
            f"task {task}: all {report.held:,} shared elements that it uses are held by other sealed tasks ({others}), "
            f"so reopening leaves it nothing of its own; learn what is new as another task, or forget one of these"
        )
    for g in gates:
        g.unseal(task, reopened=True)
        if g.default == task:
            g.task = None
    let_go(model, task)
    return report


def _report(model: nn.Module, task: int) -> ReopenReport:
    others = [t for t in locked_tasks(model) if t != task]
    own = shared = copies = 0
    for h in held(model):
        if h.task == task:
            copies += h.param.numel()
        elif h.task is None and not h.plain and h.plan is not None:
            live, theirs = h.live(task), live_for(h, others)
            both = 0 if theirs is None else int((live & theirs).sum())
            own, shared = own + int(live.sum()) - both, shared + both
    gates = gates_of(model)
    copies -= sum(g.embeddings[task].numel() for g in gates)
    return ReopenReport(task, own, shared, copies, sum(int(g.masks[task].sum()) for g in gates))
