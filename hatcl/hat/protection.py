"""Protection by degrees: AdaHAT (Wang et al. 2024, doi 10.1007/978-3-031-70352-2_9), for who prefers learning to
exactness. Sealed tasks drift, by choice, and how far is measured.

An element that I sealed tasks use at both of its ends moves by the share `r / (I + r)` of an optimizer's step, with

    r = alpha / (epsilon + sparsity)          sparsity = sum a (1 - used) / sum (1 - used)   over the units of its layer

(eq. 8 and 9; a: the gates of the task being learned, the layer is that of the unit which the element writes, or else of
the one that it reads). An element that no sealed task uses moves as ever.

Deviations. AdaHAT multiplies the gradient. Here it is the step, which is the same for SGD without momentum, and
protects with any other optimizer too: Adam divides a gradient by its own size, and would take a full step however small
it was made. AdaHAT takes the smaller of the two ends' own counts for I, and so also protects elements whose ends were
used by different tasks; I is the number of tasks that use both (M4). In float32 a step below a relative 6e-8 of a
weight is rounded away, so that little moves at alpha = 1e-6, AdaHAT's own.
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


def by_degrees(model: nn.Module) -> bool:
    """May a later task move what a sealed one uses?"""
    return gates_of(model)[0].config.protection != "exact"


@dataclass
class Eased:
    """A parameter that moves by degrees. importance: I, `[*shape]`, 0 where the element is free."""

    held: Held
    importance: Tensor

    def share(self, rates: dict[int, Tensor]) -> Tensor:
        """`[*shape]`: by which share of a step each element moves. rates: of each gates, r per unit, `[U + 1]`."""
        plan, p = self.held.plan, self.held.param
        assert plan is not None
        axes = sorted(plan.axes, key=lambda axis: not axis.owner)
        units = axes[0].units
        r = rates[id(units.gates)][torch.as_tensor(units.numbers, device=p.device)].view(axes[0].shape)
        r = r.expand(plan.view).reshape(p.shape)
        return torch.where(self.importance > 0, r / (self.importance + r), 1.0)


def eased(model: nn.Module, locked: Sequence[int]) -> list[Eased]:
    """The parameters of which locked tasks use elements."""
    out = []
    for h in held(model):
        if h.task is None and not h.plain and h.plan is not None and h.plan.axes:
            importance = torch.zeros(h.param.shape, device=h.param.device)
            for t in locked:
                importance += h.live(t)
            if bool(importance.any()):
                out.append(Eased(h, importance))
    return out


@torch.no_grad()
def rates_of(gates: Gates) -> Tensor:
    """r per unit, `[U + 1]`, of the task being learned; entry 0 is that of what is always on, at sparsity 0."""
    c = gates.config
    assert gates.learning is not None
    a, used = gates.select(gates.learning, slice(None)), gates.used(without=gates.learning)
    sparsity = a.new_zeros(gates.num_units + 1)
    for _, start, stop in gates.layers:
        if stop > start:
            sparsity[start + 1 : stop + 1] = sparsity_penalty(a[start:stop], used[start:stop])
    return c.protection_alpha / (c.protection_epsilon + sparsity)


Before = list[tuple[Eased, Tensor, Tensor]]  # a parameter, its values before a step, and the shares that it will take


@torch.no_grad()
def before_step(parts: Sequence[Eased], ids: set[int], gates: Sequence[Gates]) -> Before:
    """What an optimizer that holds the parameters of these ids steps from."""
    mine = [e for e in parts if id(e.held.param) in ids]
    rates = {id(g): rates_of(g) for g in gates} if mine else {}
    return [(e, e.held.param.detach().clone(), e.share(rates)) for e in mine]


@torch.no_grad()
def after_step(was: Before) -> None:
    """Take the share of the step that was taken."""
    for e, old, share in was:
        now = e.held.param.detach()
        now.copy_(torch.where(e.importance > 0, old + share * (now - old), now))


class Drift:
    """How far sealed tasks move while another is learned: the largest change of an output, and the share of rows with
    the same answer (the same largest entry of the first output), on the first batch that the model is given in the
    block. It is one of the new task, and is kept until the block is left."""

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
        """Look no further."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def note(self) -> None:
        """The task is sealed: write what has moved into the gates (see `Gates.drift`)."""
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
