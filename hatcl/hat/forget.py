"""Forgetting: what only one task used is drawn anew, everything else stays bit for bit (M8)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TaskError
from ..map.lora import starts_at_zero
from ..shards import check_whole
from .active import is_chosen
from .digests import check_sealed
from .gates import gates_of
from .grow_apply import brought_up
from .held import held
from .layers.gated import HATLayer
from .layers.state import forget_states
from .tasks import check_task, tasks


@dataclass(frozen=True)
class ForgetReport:
    """What forgetting a task erases.

    Attributes:
        erased: shared elements live for the task and for no other sealed task, per parameter. own: elements of its
            copies.
        kept: shared elements that stay because other sealed tasks use them too.
        units_freed: units that no sealed task uses any more.
    """

    task: int
    dry_run: bool
    erased: dict[str, int]
    kept: int
    own: int
    units_freed: int

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
        return (
            f"task {self.task}: {verb} {self.total_erased:,} shared elements and {self.own:,} of its own; "
            f"{self.units_freed:,} units are free again; {self.share_kept:.1%} of its shared elements stay, other "
            f"tasks use them"
        )


def forget_task(model: nn.Module, task: int, *, dry_run: bool = False) -> ForgetReport:
    """Forget a sealed task: every element live for it and for no other sealed task is drawn anew by its layer's own
    initialiser (by zeros, where it is the factor of a LoRA pair that peft starts at zero), its gates, copies and head
    are dropped, and its index is free to be learned again. Every other task stays bit-identical. If the task is the
    default, the plain model becomes it. Nothing of the task is left in the model: what was kept of it for speed and all
    gradients of what was erased are gone too. What lies elsewhere is for you to delete: checkpoints and saved models,
    metrics and logs of the task, its data, and the state of optimizers that trained it.

    Args:
        dry_run: only report; the report then lists exactly what a real run would erase.

    Raises:
        TaskError: no such task, it is not sealed, a task is being learned, or some `with hatcl.task(...)` of this
            context has the task active. IntegrityError: a sealed task changed.
    """
    check_whole(model, "forget_task")
    task = check_task(model, task, sealed=True)
    gates = gates_of(model)
    if gates[0].learning is not None:
        raise TaskError(
            f"task {gates[0].learning} is being learned; leave its hatcl.learn block before forgetting task {task}"
        )
    if any(is_chosen(g.key) for g in gates) and gates[0].task == task:
        raise TaskError(f"task {task} is active in a `with hatcl.task(...)` block; leave it before forgetting the task")
    check_sealed(model)
    others = [t for t in tasks(model) if t != task]
    plan: dict[int, tuple[str, Tensor]] = {}
    kept = own = 0
    for h in held(model):
        if h.task == task:
            own += h.param.numel()
        elif h.task is None and not h.plain and h.plan is not None:
            live = h.live(task)
            needed = torch.zeros_like(live)
            for t in others:
                needed |= h.live(t)
            plan[id(h.param)] = (h.name, live & ~needed)
            kept += int((live & needed).sum())
    freed = sum(int((g.masks[task] & ~g.used(without=task)).sum()) for g in gates)
    report = ForgetReport(
        task, dry_run, {name: n for name, mask in plan.values() if (n := int(mask.sum()))}, kept, own, freed
    )
    if dry_run:
        return report
    with brought_up(model, task):  # whoever learns with this index next may use all units
        writes = _draw(model, task, plan)  # everything is drawn before anything is written
    with torch.no_grad():
        for x, new in writes:
            x.copy_(new)
            x.grad = None
    forget_states(model, task)
    for g in gates:
        g.unseal(task)
        if g.default == task:
            g.task = None
        g.embeddings[task].grad = None
    for module in model.modules():
        if isinstance(module, HATLayer) and "_hat" in module.__dict__:
            module._hat.clear()
    return report


def _draw(model: nn.Module, task: int, plan: dict[int, tuple[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Tensors, and what takes their place."""
    writes: list[tuple[Tensor, Tensor]] = []
    done: set[int] = set()
    for module in [m for m in model.modules() if isinstance(m, HATLayer)]:
        mine = {n: p for n, p in module._parameters.items() if p is not None and id(p) in plan and id(p) not in done}
        fresh = module._hat_redrawn() if mine else {}
        for name, p in mine.items():
            full_name, erased = plan[id(p)]
            new = torch.zeros_like(p) if starts_at_zero(full_name) else fresh[name].to(p)
            writes.append((p, torch.where(erased, new, p.detach())))
            done.add(id(p))
        if "hat_tasks" in module._modules:
            old, first = module.hat_tasks[task], module._hat_new_copy()
            start = dict(first.named_parameters())
            for name, p in old.named_parameters():  # in place, as an optimizer may hold p
                same = p.shape == start[name].shape
                writes.append((p, (start[name] if same else module._hat_redrawn({name: p.shape})[name]).detach()))
            writes += list(zip(old.buffers(), first.buffers(), strict=True))
    return writes
