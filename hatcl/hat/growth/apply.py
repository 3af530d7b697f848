"""Grows a model in place by a verified plan: parameters, gates, bindings, sizes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ...map.labels import Ints
from ...map.lora import starts_at_zero
from ..binding import Binding, ParameterPlan, TaskCopy, UnitAxis, Units
from ..distributed import leave_out
from ..gates import Gates, gates_of, roots_of
from ..layers.gated import HATLayer, shared_buffer, task_size
from ..registry import derive, layer_for, plain_class
from .grown import Growth, Spread, grown_axes, grown_map

OUTGROWN = WeakTensorKeyDictionary()  # a replaced parameter -> its name


@dataclass(frozen=True)
class Replaced:
    """A parameter that replaced another. flat: the flat indices of the old elements in the new parameter."""

    name: str
    old: nn.Parameter
    new: nn.Parameter
    flat: Tensor


class _Units:
    """`Units` objects by their current numbers; layers with the same units share one object."""

    def __init__(self, gates: Gates, growth: Growth) -> None:
        self.gates, self.growth = gates, growth
        self.known: dict[bytes, Units] = {}

    def of(self, numbers: Ints) -> Units:
        return self.known.setdefault(numbers.tobytes(), Units(self.gates, numbers))

    def stay(self, units: Units) -> Units:
        return self.of(self.growth.number[units.numbers])

    def stay_axes(self, plan: ParameterPlan) -> ParameterPlan:
        axes = tuple(dataclasses.replace(axis, units=self.stay(axis.units)) for axis in plan.axes)
        return dataclasses.replace(plan, axes=axes)

    def stay_pair(self, pair: tuple[int, Units] | None) -> tuple[int, Units] | None:
        return None if pair is None else (pair[0], self.stay(pair[1]))

    def grow_pair(self, pair: tuple[int, Units] | None) -> tuple[int, Units] | None:
        return None if pair is None else (pair[0], self.of(self.growth.along(pair[1].numbers).units))


def apply_growth(model: nn.Module, growth: Growth) -> list[Replaced]:
    """Grow a converted model in place. Sealed and reopened tasks keep their sizes, task None keeps those of the
    conversion, and all other tasks get the new sizes.

    Returns the replaced parameters.
    """
    gates = gates_of(model)[0]
    root = next(m for m in model.modules() if gates in m._modules.values())
    new_map = grown_map(gates.unit_map, growth)
    units = _Units(gates, growth)
    embeddings = list(gates.embeddings)
    modules = dict(_placed(root))
    _bind_those_with_sizes(modules, growth, gates)
    plans = {
        path: _grown_binding(path, module, growth, units)
        for path, module in modules.items()
        if "_hat" in module.__dict__
    }
    replaced: list[Replaced] = []
    tied: dict[int, nn.Parameter] = {}
    for path, (hat, former) in plans.items():
        module = modules[path]
        old = module._hat
        _add_former(old, former, hat, units)
        _grow_parameters(path, module, former, replaced, tied)
        for name in growth.buffers:
            holder, _, leaf = name.rpartition(".")
            if holder == path and leaf in module._buffers and leaf not in module._hat_copied_buffers():
                module._buffers[leaf] = former.spreads[leaf].grown(module._buffers[leaf])
        for name, value in growth.sizes.get(path, {}).items():
            was = module.__dict__[name]
            for earlier in old.formers:
                earlier.sizes.setdefault(name, was)
            module.__dict__[name] = tuple(value) if isinstance(was, tuple) else value
    gates.grow(growth, new_map)
    at = torch.from_numpy(growth.number[1:] - 1)
    for t, e in enumerate(embeddings):
        replaced.append(Replaced(f"task {t}'s gate embeddings", e, gates.embeddings[t], at.to(e.device)))
    for t in range(gates.num_tasks):
        if not bool(gates.sealed[t]) and t not in gates.reopened():
            replaced += bring_up(model, t)
    for pair in replaced:
        OUTGROWN[pair.old] = pair.name
    for owner in roots_of(model):
        leave_out(owner)
    return replaced


def _placed(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module of the plain network with its path at conversion, even if it was wrapped since."""
    for path, module in root.named_modules():
        hat = module.__dict__.get("_hat")
        if "hat_tasks" not in path.split(".") and not isinstance(module, Gates):
            yield (path if hat is None else hat.path), module


def _bind_those_with_sizes(modules: dict[str, Any], growth: Growth, gates: Gates) -> None:
    """Give every module with an attribute or buffer that depends on the task a class with properties for these."""
    names: dict[str, list[tuple[str, Any]]] = {p: [(n, task_size) for n in s] for p, s in growth.sizes.items()}
    for full in growth.buffers:
        path, _, name = full.rpartition(".")
        module = modules[path]
        if "_hat" not in module.__dict__ or name not in module._hat_copied_buffers():
            names.setdefault(path, []).append((name, shared_buffer))
    for path, attributes in names.items():
        module = modules[path]
        cls = type(module)
        if "_hat" not in module.__dict__:
            hat = Binding(gates, path=path)
            hat.formers = [Binding(gates, path=path) for _ in gates.growths]
            module.__dict__["_hat"] = hat
        source: Any = cls.__dict__.get("_hat_source") or (
            (cls, plain_class(cls), ()) if issubclass(cls, HATLayer) else (layer_for(cls), cls, ())
        )
        layer, plain, had = source
        more = [a for a in attributes if not isinstance(getattr(cls, a[0], None), property)]
        module.__class__ = derive(layer, plain, (*had, *more))


def _grown_binding(path: str, module: Any, growth: Growth, units: _Units) -> tuple[Binding, Binding]:
    """The new binding, and the former one with the units' new numbers."""
    hat: Binding = module._hat
    now, former = (
        dataclasses.replace(hat, params={}, shapes=dict(hat.shapes), formers=[], spreads={}, sizes={}) for _ in range(2)
    )
    for name, plan in hat.params.items():
        axes = [(axis.units.numbers, axis.shape, axis.owner) for axis in plan.axes]
        new = grown_axes(growth, hat.shapes[name], plan.view, axes)
        of_now = (
            UnitAxis(units.of(numbers), over, axis.owner)
            for axis, (numbers, over) in zip(plan.axes, new.axes, strict=True)
        )
        now.params[name] = dataclasses.replace(plan, view=new.view, axes=tuple(of_now))
        now.shapes[name] = new.shape
        former.params[name] = units.stay_axes(plan)
        if new.spread.places:
            former.spreads[name] = new.spread
    now.output, now.norm = units.grow_pair(hat.output), units.grow_pair(hat.norm)
    former.output, former.norm = units.stay_pair(hat.output), units.stay_pair(hat.norm)
    for full, (dim, numbers) in growth.buffers.items():
        holder, _, leaf = full.rpartition(".")
        if holder == path:
            axis = growth.along(numbers)
            was = list(module._buffers[leaf].shape)  # a buffer with task copies has its shape from conversion
            was[dim] = len(numbers)
            view = [len(axis.units) if d == dim else n for d, n in enumerate(was)]
            at, parents = torch.from_numpy(axis.places), torch.from_numpy(axis.parents)
            former.spreads[leaf] = Spread(tuple(was), tuple(view), {dim: at}, {dim: parents})
    return now, former


def _add_former(hat: Binding, former: Binding, now: Binding, units: _Units) -> None:
    """Store the new binding in the same object, and add the former one to its `formers`."""
    for earlier in hat.formers:
        earlier.params = {name: units.stay_axes(plan) for name, plan in earlier.params.items()}
        earlier.output, earlier.norm = units.stay_pair(earlier.output), units.stay_pair(earlier.norm)
        for name, spread in former.spreads.items():
            known = earlier.spreads.get(name)
            earlier.spreads[name] = known.then(spread) if known is not None else _starting_at(earlier, name, spread)
    hat.params, hat.shapes, hat.output, hat.norm = now.params, now.shapes, now.output, now.norm
    hat.formers.append(former)


def _starting_at(earlier: Binding, name: str, spread: Spread) -> Spread:
    return dataclasses.replace(spread, shape=earlier.shapes.get(name, spread.shape))


def _grow_parameters(
    path: str, module: Any, former: Binding, replaced: list[Replaced], tied: dict[int, nn.Parameter]
) -> None:
    """Give shared parameters new elements; the plain value of a parameter with task copies stays unchanged."""
    hat: Binding = module._hat
    mine = {n: p for n, p in module._parameters.items() if p is not None and n in former.spreads}
    mine = {n: p for n, p in mine.items() if not hat.params[n].copied}
    todo = {n: hat.shapes[n] for n, p in mine.items() if id(p) not in tied}
    drawn = module._hat_redrawn(todo) if todo else {}
    for name, old in mine.items():
        full = f"{path}.{name}" if path else name
        if id(old) not in tied:
            spread = former.spreads[name]
            fresh = torch.zeros(hat.shapes[name]) if starts_at_zero(full) else drawn[name]
            new = nn.Parameter(spread.grown(old.detach(), fresh), requires_grad=old.requires_grad)
            tied[id(old)] = new
            replaced.append(Replaced(full, old, new, spread.flat(new)))
        module._parameters[name] = tied[id(old)]


def bring_up(model: nn.Module, task: int) -> list[Replaced]:
    """Give the copies of an unsealed task the current sizes, since it may use the new units."""
    gates = gates_of(model)[0]
    stage, now = gates.stages[task], len(gates.growths)
    replaced: list[Replaced] = []
    if stage == now:
        return replaced
    copies: list[tuple[Any, TaskCopy]] = []  # all copies are made before the first is stored
    for path, module in _with_copies(model):
        own, former, made = module.hat_tasks[task], module._hat.at(stage), TaskCopy()
        for name, p in own._parameters.items():
            if name not in former.spreads:
                made.register_parameter(name, p)
                continue
            value = module._hat_grown(name, p.detach(), stage)
            new = nn.Parameter(value, requires_grad=p.requires_grad)
            made.register_parameter(name, new)
            full = f"{path}.hat_tasks.{task}.{name}".lstrip(".")
            replaced.append(Replaced(full, p, new, former.spreads[name].flat(value)))
        for name, b in own._buffers.items():
            made.register_buffer(name, module._hat_grown(name, b, stage))
        copies.append((module, made.train(own.training)))
    for module, made in copies:
        module.hat_tasks[task] = made
    gates.set_stages([now if t == task else s for t, s in enumerate(gates.stages)])
    for pair in replaced:
        OUTGROWN[pair.old] = pair.name
    return replaced


@contextlib.contextmanager
def brought_up(model: nn.Module, some: Sequence[int]) -> Iterator[None]:
    """`bring_up` for several tasks; undone if the block raises."""
    gates = gates_of(model)[0]
    stages, copies = gates.stages, [(m, t, m.hat_tasks[t]) for _, m in _with_copies(model) for t in some]
    replaced = [pair for t in some for pair in bring_up(model, t)]
    try:
        yield
    except BaseException:
        for module, task, own in copies:
            module.hat_tasks[task] = own
        gates.set_stages(stages)
        for pair in replaced:
            OUTGROWN.pop(pair.old, None)
        raise


def _with_copies(model: nn.Module) -> list[tuple[str, Any]]:
    return [(path, m) for path, m in model.named_modules() if "hat_tasks" in m._modules]


def take_stages(model: nn.Module, stages: Sequence[int]) -> None:
    """Before a state is loaded: give each task's copies the sizes from after `stages[task]` growths."""
    gates = gates_of(model)[0]
    others = [t for t, stage in enumerate(stages) if stage != gates.stages[t]]
    for t in others:
        bring_up(model, t)
    for _, module in _with_copies(model):
        for t in others:
            own, former = module.hat_tasks[t], module._hat.at(stages[t])
            for name, p in list(own._parameters.items()):
                value = former.placed(name, p.detach()).clone()
                own._parameters[name] = nn.Parameter(value, requires_grad=p.requires_grad)
            for name, b in list(own._buffers.items()):
                own._buffers[name] = former.placed(name, b).clone()
    gates.set_stages(stages)
