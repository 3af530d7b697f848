"""Starting a task from a sealed one, its source. The task's mask (a *fork*) shares most of the source's units and
replaces some by others, which receive copies of the replaced units' weights. So the task has the source's knowledge
from the first step, and frozen elements stay unchanged.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HATError
from ..keeper import Kept, StoredWeights, unwrapped
from .binding import Binding, UnitAxis, Units
from .gates import gates_of, groups_of
from .given import hold_gates
from .heads import head_ids
from .held import Held, held, live_for
from .layers.gated import HATLayer
from .lineage import has_forked, inherit
from .tasks import tasks


@dataclass(frozen=True)
class Fork:
    """The start of a task.

    Attributes:
        source: the sealed task. masks: per gates `[U]` bool, the new task's units. phi: per gates `[U]`, the source's
            unit that each of the new task's units replaces; a shared unit itself; -1 if it replaces none. Entries of
            other units have no meaning.
    """

    source: int
    masks: tuple[Tensor, ...]
    phi: tuple[Tensor, ...]


@contextlib.contextmanager
def begun(
    model: nn.Module, task: int, source: int | None, locked: Sequence[int], optimizers: Sequence[Any], again: bool
) -> Iterator[None]:
    """Begin a task from a source, or from none. Inside the block the task already has its gates; on leaving, the
    weights are written and the lineage is recorded. An error inside leaves everything unchanged. again: the task
    continues with its own weights."""
    plan = None
    if source is not None:
        every = gates_of(model)
        wished = bool(every[0].given_until[task]) and not has_forked(model, task)
        given = [g.given[task].clone() for g in every] if wished else None
        plan = fork(model, task, source, locked, given)
        if given is None:
            groups = [(name, m[a:b]) for (name, g, a, b) in groups_of(model) for m in [plan.masks[every.index(g)]]]
            hold_gates(model, task, dict(groups), every[0].config.start_hold)
    try:
        yield
    except BaseException:
        if plan is not None and given is None:
            hold_gates(model, task, None)
        raise
    if plan is not None:
        transplant(model, task, plan, locked, optimizers)
    if not again:
        inherit(model, task, source, forked=plan is not None and given is None)


# ---- which units -----------------------------------------------------------------------------------------------------


def fork(
    model: nn.Module, task: int, source: int, locked: Sequence[int], masks: Sequence[Tensor] | None = None
) -> Fork:
    """Choose a task's units from those of a sealed one, the source.

    Units of one kind can replace each other. For each kind, `ceil(free / tasks left)` of the source's units are
    replaced by others, and the rest are shared. The replacements are the units with the fewest frozen elements towards
    the source's units, so free units come first.

    Args:
        locked: the sealed tasks whose elements are frozen. masks: per gates, the new task's units if they are already
            given: its units that the source lacks then replace the source's units that it lacks.

    Raises:
        HATError: the model was saved before hatcl recorded which units can replace each other.
    """
    every = gates_of(model)
    left = every[0].num_tasks - len(tasks(model))
    crowded = None if masks is not None else _crowded(model, source, locked)
    chosen, phi = [], []
    for i, (g, kinds) in enumerate(zip(every, _alike(model), strict=True)):
        mine, stands_for = g.masks[source].clone(), torch.arange(g.num_units, device=g.masks.device)
        if masks is not None:
            mine = masks[i].to(mine)
        used = g.used(without=task)
        for kind in range(int(kinds.max()) + 1 if len(kinds) else 0):
            here = kinds == kind
            theirs = (here & g.masks[source]).nonzero().flatten()
            if crowded is None:
                hosts = (here & mine & ~g.masks[source]).nonzero().flatten()
                gone = theirs[~mine[theirs]]
            else:
                others = (here & ~g.masks[source]).nonzero().flatten()
                free = int((here & ~used).sum())
                count = min(math.ceil(free / max(left, 1)), len(theirs), len(others))
                hosts = others[crowded[i][others].argsort(stable=True)[:count]]
                gone = theirs[_spread(len(theirs), count, task)]
            pairs = min(len(hosts), len(gone))
            mine[gone] = False
            mine[hosts] = True
            stands_for[hosts[:pairs]] = gone[:pairs]
            stands_for[hosts[pairs:]] = -1  # it replaces no unit and keeps its weights
        chosen.append(mine)
        phi.append(stands_for)
    return Fork(source, tuple(chosen), tuple(phi))


def _spread(n: int, count: int, task: int) -> Tensor:
    """Which of `n` units are replaced: drawn with the task's number as seed, so processes agree and tasks differ."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(task))[:count].sort().values


def _alike(model: nn.Module) -> list[Tensor]:
    """Per gates, `[U]`: the kind of each unit. Units of the same kind can replace each other: they occur at the same
    places (see `UnitMap.places`), and equally often along every axis of every parameter.

    Raises:
        HATError: see `fork`.
    """
    every = gates_of(model)
    kinds = []
    for g in every:
        if g.unit_map is not None and g.unit_map.places is None:
            raise HATError(
                "start_from: this model was saved before hatcl knew which units can stand in for each other (heads of "
                "an attention, groups of a convolution); convert the plain model again, or leave start_from out"
            )
        kinds.append(torch.as_tensor(g.unit_map.places) if g.unit_map is not None else torch.zeros(g.num_units).long())
    at = {id(g): i for i, g in enumerate(every)}
    for _, axis in _axes(model):
        i, n = at[id(axis.units.gates)], axis.units.gates.num_units
        count = torch.bincount(torch.as_tensor(axis.units.numbers), minlength=n + 1)[1:]
        kinds[i] = torch.stack([kinds[i], count]).unique(dim=1, return_inverse=True)[1]
    return [k.to(g.masks.device) for k, g in zip(kinds, every, strict=True)]


def _axes(model: nn.Module) -> Iterator[tuple[str, UnitAxis]]:
    """Every axis of every parameter, and those of norms without parameters."""
    for path, module in model.named_modules():
        hat: Binding | None = module.__dict__.get("_hat") if isinstance(module, HATLayer) else None
        for name, plan in hat.params.items() if hat is not None else ():
            for axis in plan.axes:
                yield f"{path}.{name}", axis


def _crowded(model: nn.Module, source: int, locked: Sequence[int]) -> list[Tensor]:
    """Per gates, `[U]`: how many of a unit's elements towards the source's units are frozen."""
    every = gates_of(model)
    at = {id(g): i for i, g in enumerate(every)}
    crowded = [torch.zeros(g.num_units + 1, dtype=torch.float64, device=g.masks.device) for g in every]
    for h in _on_the_map(model):
        assert h.plan is not None
        live = live_for(h, locked)
        if live is None:
            continue
        frozen = live.view(h.plan.view).double()
        for axis in h.plan.axes:
            towards = frozen
            for other in h.plan.axes:
                if other is not axis:
                    towards = towards * other.units.on(source).view(_shape(other)).double()
            shape = _shape(axis)
            per_index = towards.sum_to_size(shape).flatten()
            numbers = torch.as_tensor(axis.units.numbers, device=per_index.device)
            crowded[at[id(axis.units.gates)]].index_add_(0, numbers, per_index)
    return [c[1:] for c in crowded]


def _on_the_map(model: nn.Module) -> list[Held]:
    return [h for h in held(model) if h.task is None and not h.plain and h.plan is not None and h.plan.axes]


def _shape(axis: UnitAxis) -> tuple[int, ...]:
    """The shape in which an axis broadcasts, with -1 replaced by its length."""
    return tuple(len(axis.units) if n == -1 else n for n in axis.shape)


# ---- which values ----------------------------------------------------------------------------------------------------


def transplant(model: nn.Module, task: int, plan: Fork, locked: Sequence[int], optimizers: Sequence[Any] = ()) -> int:
    """Write `W[a, b] <- W[phi(a), phi(b)]` for every element that is live under the new mask and not frozen. Do the
    same for the task's own copies: parameters and running statistics of norms. Its head stays unchanged. Optimizers'
    moments of written elements are set to zero. Returns the number of shared elements written.

    Everything is computed before anything is written.
    """
    phi = {id(g): p for g, p in zip(gates_of(model), plan.phi, strict=True)}
    masks = {id(g): m for g, m in zip(gates_of(model), plan.masks, strict=True)}
    writes: list[tuple[Tensor, Tensor, Tensor | None, str]] = []  # (tensor, new values, where, name)
    for h in _on_the_map(model):
        assert h.plan is not None
        live = torch.ones((), dtype=torch.bool, device=h.param.device)
        moved = torch.zeros_like(live)
        for axis in h.plan.axes:
            on, changed = _on_and_moved(axis.units, masks, phi)
            live, moved = live & on.view(_shape(axis)), moved | changed.view(_shape(axis))
        new = (live & moved).expand(h.plan.view).reshape(h.param.shape)
        frozen = live_for(h, locked)
        where = new if frozen is None else new & ~frozen
        if bool(where.any()):
            writes.append((h.param, _through(h.param.detach(), h.plan.view, h.plan.axes, phi), where, h.name))
    count = sum(int(which.sum()) for _, _, which, _ in writes if which is not None)
    heads = head_ids(model)
    for module in model.modules():
        if isinstance(module, HATLayer) and "hat_tasks" in module._modules:
            writes += _of_its_own(module, task, plan.source, masks, phi, heads)
    written = [Kept(x, which, name) for x, _, which, name in writes if isinstance(x, nn.Parameter)]
    stored = [StoredWeights(o, written) for o in map(unwrapped, optimizers)]
    for s in stored:
        s.look()  # stored weights are recognised by their similarity to the parameters, before these change
    with torch.no_grad():
        for x, value, which, _ in writes:
            x.copy_(value if which is None else torch.where(which, value, x))
    for s in stored:
        s.begin_again()
    return count


def _on_and_moved(units: Units, masks: dict[int, Tensor], phi: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Two masks over the entries of an axis: entries that are on for the new task and have a source, and entries whose
    values come from another unit."""
    mask, stands_for = masks[id(units.gates)], phi[id(units.gates)]
    numbers = torch.as_tensor(units.numbers, device=mask.device)
    at, always = (numbers - 1).clamp(min=0), numbers == 0
    on = (mask[at] & (stands_for[at] >= 0)) | always
    return on, (stands_for[at] != at) & ~always


def _sources(units: Units, phi: dict[int, Tensor]) -> Tensor:
    """Per entry of an axis, the index of the entry that it copies: the same occurrence of the unit that it replaces."""
    stands_for = phi[id(units.gates)].cpu()
    numbers = torch.as_tensor(units.numbers)
    order = numbers.argsort(stable=True)
    count = torch.bincount(numbers, minlength=len(stands_for) + 1)
    first = count.cumsum(0) - count
    occurrence = torch.empty_like(numbers)
    occurrence[order] = torch.arange(len(numbers)) - first[numbers[order]]
    target = torch.cat([torch.zeros(1, dtype=torch.long), stands_for.clamp(min=0) + 1])[numbers]
    fits = occurrence < count[target]
    found = order[(first[target] + occurrence).clamp(max=max(len(order) - 1, 0))]
    return torch.where(fits & (numbers > 0), found, torch.arange(len(numbers)))


def _through(value: Tensor, view: Sequence[int], axes: Sequence[UnitAxis], phi: dict[int, Tensor]) -> Tensor:
    """`value[phi(a), phi(b)]`."""
    index = [
        torch.arange(n, device=value.device).view([n if d == i else 1 for i in range(len(view))])
        for d, n in enumerate(view)
    ]
    for axis in sorted(axes, key=lambda axis: axis.owner):  # the owner comes last, so it decides the group
        shape = _shape(axis)
        dims = [d for d, n in enumerate(shape) if n != 1]
        if dims:
            sources = _sources(axis.units, phi).to(value.device)
            for d, at in zip(dims, torch.unravel_index(sources, [shape[d] for d in dims]), strict=True):
                index[d] = at.view(shape)
    return value.view(view)[tuple(index)].reshape(value.shape)


def _of_its_own(
    module: Any, task: int, source: int, masks: dict[int, Tensor], phi: dict[int, Tensor], heads: set[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, str]]:
    """The writes that copy the source's own tensors of a module, except heads, to the task's, through phi."""
    hat: Binding = module._hat
    mine, theirs = module.hat_tasks[task], module.hat_tasks[source]
    stage = hat.gates.stages[source]  # the source may have the sizes from before a growth
    for name, p in mine._parameters.items():
        if id(module._parameters[name]) in heads:
            continue
        value, plan = module._hat_grown(name, theirs._parameters[name].detach(), stage), hat.params[name]
        if value.shape == p.shape:
            new = _through(value, plan.view, plan.axes, phi)
            on = [_on_and_moved(a.units, masks, phi)[0].view(_shape(a)).expand(plan.view) for a in plan.axes]
            yield p, new, torch.stack(on).all(0).reshape(p.shape) if on else None, f"{hat.path}.{name}"
    per_unit = hat.norm or hat.output or next(
        ((0, a.units) for plan in hat.params.values() for a in plan.axes if a.owner), None
    )  # fmt: skip
    for name, b in mine._buffers.items():
        value = None if theirs._buffers[name] is None else module._hat_grown(name, theirs._buffers[name], stage)
        if b is None or value is None or value.shape != b.shape:
            continue
        if per_unit is not None and b.shape == (len(per_unit[1]),):
            new = value[_sources(per_unit[1], phi).to(value.device)]
            yield b, new, _on_and_moved(per_unit[1], masks, phi)[0], f"{hat.path}.{name}"
        else:
            yield b, value, None, f"{hat.path}.{name}"
