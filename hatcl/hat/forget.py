"""Forgetting: redraw the elements that only one task uses; everything else stays bit-identical (M8)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TaskError
from ..map.lora import starts_at_zero
from ..shards import check_whole
from .active import is_chosen
from .digests import check_sealed, record
from .gates import gates_of
from .growth.apply import brought_up
from .heads import drawn_heads
from .held import held, live_for
from .layers.gated import HATLayer
from .layers.state import forget_states
from .lineage import descendants_of, disinherit, spoken, to_forget, warn_of_descendants
from .tasks import check_none_reopened, check_task, tasks


@dataclass(frozen=True)
class ForgetReport:
    """The report of forgetting a task.

    Attributes:
        erased: parameter -> number of shared elements that are live for the task and for no other sealed task.
        own: number of elements of its copies.
        kept: number of shared elements that stay because other sealed tasks use them too.
        units_freed: number of units that no sealed task uses any more.
        descendants: tasks that were started from this one, directly or through others. forgotten: the tasks that the
            numbers cover: this one, and its descendants if they are forgotten too.
        changed: sealed tasks that are not locked and lose elements that they shared with the forgotten ones.
    """

    task: int
    dry_run: bool
    erased: dict[str, int]
    kept: int
    own: int
    units_freed: int
    descendants: tuple[int, ...] = ()
    forgotten: tuple[int, ...] = ()
    changed: tuple[int, ...] = ()

    @property
    def total_erased(self) -> int:
        return sum(self.erased.values())

    @property
    def share_kept(self) -> float:
        """Share of the task's shared elements that stays because other tasks hold it."""
        return self.kept / max(self.kept + self.total_erased, 1)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "total_erased": self.total_erased, "share_kept": self.share_kept}

    def __str__(self) -> str:
        verb = "would erase" if self.dry_run else "erased"
        kept = [t for t in self.descendants if t not in self.forgotten]
        gone = self.forgotten or (self.task,)
        its = "its" if len(gone) == 1 else "their"
        lineage = f"; {spoken(kept)} started from it and still know what was transplanted" if kept else ""
        return (
            f"{spoken(gone)}: {verb} {self.total_erased:,} shared elements and {self.own:,} of {its} own; "
            f"{self.units_freed:,} units are free again; {self.share_kept:.1%} of {its} shared elements stay, other "
            f"tasks use them{lineage}"
            + (f"; it takes elements away from {spoken(self.changed)}, not locked" if self.changed else "")
        )


def forget_task(
    model: nn.Module,
    task: int,
    *,
    locked: Sequence[int] | None = None,
    dry_run: bool = False,
    descendants: str = "keep",
) -> ForgetReport:
    """Forget a sealed task: the layers' own initialisers redraw every element that is live for it and for no other
    sealed task. (Factors of LoRA pairs that peft starts at zero become zero.) Its gates, copies and head are dropped,
    and its index can be learned again. Every other task stays bit-identical. If the task is the default, the plain
    model becomes the default. Nothing of the task is left in the model: its cached values and the gradients of erased
    elements are removed too. Delete what is stored elsewhere yourself: checkpoints and saved models, metrics and logs
    of the task, its data, the state of optimizers that trained it, and its statistics in a router
    (`TaskRouter.remove_task`).

    Args:
        locked: the sealed tasks that stay unchanged; default: all others. A task left out loses the elements that it
            shares with the forgotten one, which is then erased completely, and is sealed with its remaining elements.
        dry_run: only report; the report then lists exactly what a real run would erase.
        descendants: what happens to tasks that were started from this one (`hatcl.learn(start_from=)`) and carry its
            knowledge. Forgetting is complete only if they are forgotten too. `keep`: they stay, with a warning that
            names them. `refuse`: an error if there are any. `forget`: they are forgotten with it.

    Raises:
        TaskError: no such task, it is not sealed, `locked` names a task that is forgotten or not sealed, a task is
            being learned, another one is reopened, a `with hatcl.task(...)` block of this context has the task active,
            or there are descendants under `refuse`. ConfigError: an unknown value of `descendants`. IntegrityError: a
            sealed task changed.

    Warns:
        UserWarning: descendants keep transplanted weights.
    """
    check_whole(model, "forget_task")
    task = check_task(model, task, sealed=True)
    gates = gates_of(model)
    if gates[0].learning is not None:
        raise TaskError(
            f"task {gates[0].learning} is being learned; leave its hatcl.learn block before forgetting task {task}"
        )
    gone = to_forget(model, task, descendants)
    if any(is_chosen(g.key) for g in gates) and gates[0].task in gone:
        raise TaskError(
            f"task {gates[0].task} is active in a `with hatcl.task(...)` block; leave it before forgetting the task"
        )
    check_none_reopened(model, f"forget_task: forgetting task {task}")
    check_sealed(model)
    others = [t for t in tasks(model) if t not in gone]
    keep = others if locked is None else sorted({check_task(model, t, sealed=True) for t in locked})
    if wrong := sorted({*keep} & {*gone}):
        raise TaskError(f"locked: got {keep}, with {spoken(wrong)}, which is to be forgotten; leave it out")
    left, changed = [t for t in others if t not in keep], set()
    plan: dict[int, tuple[str, Tensor]] = {}
    kept = own = 0
    for h in held(model):
        if h.task in gone:
            own += h.param.numel()
        elif h.task is None and not h.plain and h.plan is not None:
            live, needed = live_for(h, gone), live_for(h, keep)
            assert live is not None
            needed = torch.zeros_like(live) if needed is None else needed
            plan[id(h.param)] = (h.name, live & ~needed)
            changed |= {t for t in left if bool((live & ~needed & h.live(t)).any())}
            kept += int((live & needed).sum())
    freed = sum(int((g.masks[gone].any(0) & ~g.masks[others].any(0)).sum()) for g in gates)
    carriers = tuple(descendants_of(model, task))
    report = ForgetReport(
        task, dry_run, {name: n for name, mask in plan.values() if (n := int(mask.sum()))}, kept, own, freed,
        carriers, tuple(gone), tuple(sorted(changed)),
    )  # fmt: skip
    warn_of_descendants(task, [t for t in carriers if t not in gone])
    if dry_run:
        return report
    with brought_up(model, gone):  # a task that is learned next under these indices may use all units
        writes = _draw(model, gone, plan)  # everything is drawn before anything is written
    with torch.no_grad():
        for x, new in writes:
            x.copy_(new)
            x.grad = None
    for t in gone:
        forget_states(model, t)
        for g in gates:
            g.unseal(t)
            if g.default == t:
                g.task = None
            g.embeddings[t].grad = None
    disinherit(model, gone)
    for module in model.modules():
        if isinstance(module, HATLayer) and "_hat" in module.__dict__:
            module._hat.clear()
    for t in report.changed:
        record(model, t)
    return report


def _draw(model: nn.Module, gone: Sequence[int], plan: dict[int, tuple[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a tensor and its new values."""
    writes: list[tuple[Tensor, Tensor]] = []
    done: set[int] = set()
    drawn = drawn_heads(model)
    for module in [m for m in model.modules() if isinstance(m, HATLayer)]:
        mine = {n: p for n, p in module._parameters.items() if p is not None and id(p) in plan and id(p) not in done}
        fresh = module._hat_redrawn() if mine else {}
        for name, p in mine.items():
            full_name, erased = plan[id(p)]
            new = torch.zeros_like(p) if starts_at_zero(full_name) else fresh[name].to(p)
            writes.append((p, torch.where(erased, new, p.detach())))
            done.add(id(p))
        for task in gone if "hat_tasks" in module._modules else ():
            old, first = module.hat_tasks[task], module._hat_new_copy()
            start = dict(first.named_parameters())
            for name, p in old.named_parameters():  # written in place, since an optimizer may hold p
                same = p.shape == start[name].shape and id(module._parameters[name]) not in drawn
                writes.append((p, (start[name] if same else module._hat_redrawn({name: p.shape})[name]).detach()))
            writes += list(zip(old.buffers(), first.buffers(), strict=True))
    return writes
