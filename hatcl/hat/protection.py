"""Protection by degrees: AdaHAT (Wang et al. 2024, doi 10.1007/978-3-031-70352-2_9) and FG-AdaHAT (by the same authors'
implementation, CLArena 1.1.0). They trade exactness for more learning: sealed tasks drift by design, and the drift is
measured.

An element of importance I moves by the share `r / (I + r)` of an optimizer's step, with

    r = alpha / (epsilon + sparsity)          sparsity = sum a (1 - used) / sum (1 - used)   over the units of its layer

(AdaHAT's eq. 8 and 9; a: the gates of the task being learned; the layer: that of the element's owner, or of its reader
if it has no owner). Under `adahat`, I is the number of sealed tasks that use the element at both of its ends. An
element that no sealed task uses moves by the whole step.

Under `fg_adahat` (fine-grained) tasks are weighted: I sums, over the sealed tasks that use both ends, the smaller of
the two ends' importances, and r is divided by `t + 10` when the t-th task is learned. A unit's importance to a task is

    mean_k [ a_k (g_k - min g_k) / (max g_k - min g_k) ] + 0.01       g_k = sum |dL/dw|  over the elements that write it

with the mean over the task's steps k, and minimum and maximum over the units of its layer. This is CLArena's
attribution by input gradients ("IG"), with its step-wise mask, its base values and its importance scheduler
`linear_sparsity_reg`. An end that is always on, or that no learning parameter writes (a frozen layer, an input behind a
mask), has the largest possible importance, 1.01, so that the other end decides.

Deviations. AdaHAT scales the gradient; here the step is scaled. This is the same for SGD without momentum, and also
protects with other optimizers: Adam divides a gradient by its own size, and would take a full step even for a tiny
gradient. AdaHAT uses the smaller of the two ends' own counts for I (FG-AdaHAT: of their sums), and so also protects
elements whose ends were used by different tasks; here a task counts if it uses both (M4). In float32 a step below a
relative 6e-8 of a weight is rounded away, so little moves at AdaHAT's own alpha = 1e-6.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import values_of
from ..functional import sparsity_penalty
from .gates import Gates, gates_of
from .held import Held, held
from .tasks import task as active

FINE = "fg_adahat"
BASE_IMPORTANCE, BASE_TASKS = 0.01, 10.0  # CLArena's b_I and b_L; its b_R is `protection_epsilon`


def by_degrees(model: nn.Module) -> bool:
    """May a later task change elements that a sealed one uses?"""
    return gates_of(model)[0].config.protection != "exact"


@dataclass
class Eased:
    """A parameter that moves by degrees. importance: I, `[*shape]`, 0 where no sealed task uses the element."""

    held: Held
    importance: Tensor

    def share(self, rates: dict[int, Tensor]) -> Tensor:
        """`[*shape]`: the share of a step that each element takes. rates: id of gates -> r per unit, `[U + 1]`."""
        plan, p = self.held.plan, self.held.param
        assert plan is not None
        units = plan.main.units
        r = rates[id(units.gates)][torch.as_tensor(units.numbers, device=p.device)].view(plan.main.shape)
        r = r.expand(plan.view).reshape(p.shape)
        return torch.where(self.importance > 0, r / (self.importance + r), 1.0)


def eased(model: nn.Module, locked: Sequence[int]) -> list[Eased]:
    """The parameters with elements that locked tasks use."""
    out = []
    for h in held(model):
        if h.task is None and not h.plain and h.plan is not None and h.plan.axes:
            importance = torch.zeros(h.param.shape, device=h.param.device)
            for t in locked:
                importance += importance_to(h, t)
            if bool(importance.any()):
                out.append(Eased(h, importance))
    return out


def importance_to(h: Held, task: int) -> Tensor:
    """`[*shape]`: a sealed task's contribution to I of a shared parameter; 0 where it does not use the element."""
    assert h.plan is not None
    if h.plan.axes[0].units.gates.config.protection != FINE:
        return h.live(task)
    least: Tensor | None = None
    for axis in h.plan.axes:
        gates = axis.units.gates
        of_units = (gates.importance[task] + BASE_IMPORTANCE) * gates.masks[task]
        of_all = nn.functional.pad(of_units, (1, 0), value=1 + BASE_IMPORTANCE).to(h.param.device)
        here = of_all[torch.as_tensor(axis.units.numbers, device=h.param.device)].view(axis.shape)
        least = here if least is None else torch.minimum(least, here)
    assert least is not None
    return least.expand(h.plan.view).reshape(h.param.shape)


class Attribution:
    """Keeps each unit's importance to the task being learned in `Gates.importance`, as the mean over the steps so far.
    So a state saved in between holds everything needed to resume.

    Args:
        start: steps already done.
    """

    def __init__(self, model: nn.Module, task: int, start: int) -> None:
        self.task, self.start = task, start
        self.gates = gates_of(model)
        self.parts = [h for h in held(model) if h.task is None and not h.plain and h.plan is not None and h.plan.axes]
        self.fixed = {id(g): torch.ones(g.num_units + 1, dtype=torch.bool, device=g.masks.device) for g in self.gates}
        for main in (h.plan.main for h in self.parts if h.plan is not None and h.param.requires_grad):
            self.fixed[id(main.units.gates)][main.units.numbers] = False
        self.numbers: dict[tuple[int, torch.device], Tensor] = {}  # of each part's units, made once
        for g in self.gates if start == 0 else ():
            g.importance[task] = 0

    @torch.no_grad()
    def of_step(self) -> list[Tensor] | None:
        """Each unit's importance by the current gradients, `[U]` for each gates; None if a gradient is not finite,
        since a gradient scaler then skips the step."""
        sums = [g.importance.new_zeros(g.num_units + 1) for g in self.gates]
        of_gates = {id(g): total for g, total in zip(self.gates, sums, strict=True)}
        for i, h in enumerate(self.parts):
            if h.param.grad is None:
                continue
            assert h.plan is not None
            main = h.plan.main
            over = [d for d, n in enumerate(main.shape) if n == 1]
            size = h.param.grad.abs().view(h.plan.view).float()
            size = size.sum(over) if over else size
            total = of_gates[id(main.units.gates)]
            at = (i, total.device)
            if at not in self.numbers:
                self.numbers[at] = torch.as_tensor(main.units.numbers, device=total.device)
            total.index_add_(0, self.numbers[at], size.flatten().to(total))
        if not all(bool(torch.isfinite(total).all()) for total in sums):
            return None
        for g, total in zip(self.gates, sums, strict=True):
            now = total[1:]
            for _, start, stop in g.layers:
                if stop > start:
                    low, high = now[start:stop].aminmax()
                    now[start:stop] = (now[start:stop] - low) / (high - low).clamp(min=torch.finfo(now.dtype).tiny)
            now[self.fixed[id(g)][1:]] = 1
            now *= g.select(self.task, slice(None)).to(now)
        return [total[1:] for total in sums]

    def add(self, of_step: list[Tensor] | None, taken: int) -> None:
        """Add the `taken`-th step of this block to the mean. Of several optimizers the one that steps most counts, as
        for the scale; `of_step` is computed before it steps, while the gradients still exist."""
        for g, now in zip(self.gates, of_step or (), strict=bool(of_step)):
            mean = g.importance[self.task]
            mean += (now - mean) / (self.start + taken)


@torch.no_grad()
def rates_of(gates: Gates) -> Tensor:
    """r per unit, `[U + 1]`, of the task being learned; entry 0 is for entries that are always on, with sparsity 0."""
    c = gates.config
    assert gates.learning is not None
    a, used = gates.select(gates.learning, slice(None)), gates.used(without=gates.learning)
    sparsity = a.new_zeros(gates.num_units + 1)
    tasks = int(gates.sealed.sum()) + 1 + BASE_TASKS if c.protection == FINE else 1.0
    for _, start, stop in gates.layers:
        if stop > start:
            sparsity[start + 1 : stop + 1] = sparsity_penalty(a[start:stop], used[start:stop])
    return c.protection_alpha / ((c.protection_epsilon + sparsity) * tasks)


Before = list[tuple[Eased, Tensor, Tensor]]  # (parameter, its values before a step, the shares of the step it takes)


@torch.no_grad()
def before_step(parts: Sequence[Eased], ids: set[int], gates: Sequence[Gates]) -> Before:
    """The values before a step of an optimizer that holds the parameters `ids`."""
    mine = [e for e in parts if id(e.held.param) in ids]
    rates = {id(g): rates_of(g) for g in gates} if mine else {}
    return [(e, e.held.param.detach().clone(), e.share(rates)) for e in mine]


@torch.no_grad()
def after_step(was: Before) -> None:
    """Reduce the step just taken to each element's share."""
    for e, old, share in was:
        now = e.held.param.detach()
        now.copy_(torch.where(e.importance > 0, old + share * (now - old), now))


class Drift:
    """Measures how far sealed tasks move while another is learned: the largest change of an output, and the share of
    rows with the same answer (the same largest entry of the first output). It uses the first batch that the model gets
    in the block, a batch of the new task, and keeps it until the block is left."""

    def __init__(self, model: nn.Module, tasks: Sequence[int]) -> None:
        self.model, self.tasks = model, list(tasks)
        self.inputs: Any = None
        self.before: dict[int, dict[str, Tensor]] = {}
        self._hook = model.register_forward_pre_hook(self._first, with_kwargs=True) if self.tasks else None

    @torch._disable_dynamo
    def _first(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.close()
        self.inputs = copy.deepcopy((args, kwargs))
        self.before = self._outputs()

    def _outputs(self) -> dict[int, dict[str, Tensor]]:
        args, kwargs = self.inputs
        training = [m for m in self.model.modules() if m.training]
        out = {}
        try:
            for m in training:
                m.training = False
            for t in self.tasks:
                with torch.no_grad(), active(self.model, t):
                    out[t] = {path: x.detach().clone() for path, x in values_of(self.model(*args, **kwargs)).items()}
        finally:
            for m in training:
                m.training = True
        return out

    def close(self) -> None:
        """Remove the hook."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def note(self) -> None:
        """On leaving the block: record the drift in the gates (see `Gates.drift`)."""
        self.close()
        if not self.before:
            return
        after = self._outputs()
        for t, was in self.before.items():
            pairs = [(x, after[t][path]) for path, x in was.items() if x.is_floating_point() and x.numel()]
            moved = max((float((b - a).abs().max()) for a, b in pairs), default=0.0)
            same = [float((b.argmax(-1) == a.argmax(-1)).float().mean()) for a, b in pairs[:1] if a.dim()]
            drift = gates_of(self.model)[0].drift[t]
            drift[0], drift[1] = max(float(drift[0]), moved), min(float(drift[1]), *same, 1.0)
        self.before, self.inputs = {}, None
