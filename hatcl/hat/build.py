"""A HAT model on a map: planned, then swapped in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import HATConfig
from ..errors import ConversionError, TaskError
from ..map.lora import is_factor, merged_layer
from ..map.units import NormInput, UnitMap
from ..shards import is_sharded
from . import layers as _layers  # registers the HAT layers
from .binding import Binding, ParameterPlan, UnitAxis, Units
from .copies import refresh_copy
from .distributed import check_forward, leave_out
from .gates import Gates
from .layers.gated import task_class
from .layers.state import keep_per_task, state_attributes
from .registry import layer_for
from .steps import without_gates

GATES = "hat_gates"
assert _layers


class _Plan:
    """The plan of how each module of a plain model is bound to gates on a map. The model is not changed."""

    def __init__(self, model: nn.Module, unit_map: UnitMap, gates: Gates) -> None:
        self.unit_map, self.gates = unit_map, gates
        self._units: dict[bytes, Units] = {}
        self._names = {id(p): n for n, p in model.named_parameters()}
        self._holders: dict[str, set[str]] = {}  # name of a parameter -> paths of the modules that hold it
        for path, m in model.named_modules():
            for p in m._parameters.values():
                if p is not None:
                    self._holders.setdefault(self._names[id(p)], set()).add(path)
        self.classes: list[tuple[nn.Module, type, Binding]] = []
        self.stateful: dict[str, tuple[nn.Module, tuple[str, ...]]] = {}
        for path, m in model.named_modules():
            self._add(path, m)

    def units(self, numbers: np.ndarray) -> Units:
        return self._units.setdefault(numbers.tobytes(), Units(self.gates, numbers))

    def _add(self, path: str, m: nn.Module) -> None:
        norm = self.unit_map.norms.get(path)
        layer = layer_for(type(m), norm.kind if norm is not None else "")
        own = {n: p for n, p in m._parameters.items() if p is not None}
        moving, states = self.unit_map.buffers.get(path, ()), self.unit_map.states.get(path, ())
        known = any(m._buffers.get(b) is not None for b in layer.hat_task_buffers)
        if not (own or norm is not None or known or moving or states or layer.hat_always):
            return
        hat = Binding(self.gates, buffers=moving, path=path)
        for name, p in own.items():
            self._add_parameter(hat, layer, name, p, norm)
        if path in self.unit_map.outputs:
            hat.output = (layer.hat_output_dim, self.units(self.unit_map.outputs[path]))
        if norm is not None:
            over = (norm.dim, self.units(norm.units))
            if norm.across or not hasattr(layer, "eps"):
                hat.norm = over
            else:
                hat.output = over
            hat.dirty = not norm.clean
        cls = task_class(layer, type(m), tuple(own), moving, state_attributes(states))
        self.classes.append((m, cls, hat))
        if states:
            self.stateful[path] = (m, states)

    def _add_parameter(
        self, hat: Binding, layer: type[Any], name: str, p: nn.Parameter, norm: NormInput | None
    ) -> None:
        """Choose the axes of a parameter that fold their gate; other gates multiply the layer's output."""
        entry = self.unit_map.entries[self._names[id(p)]]
        hat.shapes[name] = entry.shape
        if entry.shape != tuple(p.shape):
            raise ConversionError(
                f"{f'{hat.path}.{name}'.removeprefix('.')}: the map says shape {list(entry.shape)}, it has "
                f"{list(p.shape)}; the map is another model's, so trace this one (leave out unit_map=)"
            )
        folds = set(self.unit_map.folds.get((hat.path, entry.name), ()))
        elsewhere = {
            a for (user, other), axes in self.unit_map.folds.items() for a in axes
            if other == entry.name and user not in self._holders[entry.name]
        }  # fmt: skip
        to_output = layer.hat_fold_output and not elsewhere
        if hat.path in self.unit_map.outputs or to_output:
            owners = {f.axis for f in entry.factors if f.owner}
            if to_output and folds & owners:
                hat.output = (layer.hat_output_dim, self.units(next(f.units for f in entry.factors if f.owner)))
            folds -= owners
        folds |= elsewhere
        if norm is not None and norm.across and layer.hat_is_norm:
            # the weight carries the factor of the statistics; of a class that is not known, the output does
            folds = set() if norm.kind else folds | {f.axis for f in entry.factors}
        axes = tuple(UnitAxis(self.units(f.units), f.shape, f.owner) for f in entry.factors)
        fold = tuple(i for i, f in enumerate(entry.factors) if f.axis in folds)
        hat.params[name] = ParameterPlan(entry.view, axes, fold, entry.copied, entry.standardised)


def build(model: nn.Module, unit_map: UnitMap, config: HATConfig) -> nn.Module:
    """Turn `model` into a HAT model on this map, in place. Everything is planned before anything is swapped.

    Raises:
        ConversionError: the map belongs to another model.
    """
    some = next(model.parameters(), torch.zeros(()))
    with torch.device("cpu" if some.is_meta else some.device):
        layers = [(n.removesuffix(".weight"), a - 1, b - 1) for n, a, b in unit_map.layers]
        gates = Gates(unit_map.num_units, config, layers)
    plan = _Plan(model, unit_map, gates)
    keep_per_task(model, plan.stateful)
    for m, cls, hat in plan.classes:
        m.__class__ = cls
        m._hat_attach(hat, config.num_tasks)  # type: ignore[operator]
    model.add_module(GATES, gates)
    without_gates(model)
    gates.bound = tuple(hat.path for _, _, hat in plan.classes)
    model.register_forward_pre_hook(_before_forward)
    if any(map(is_factor, unit_map.entries)):
        model.register_forward_pre_hook(_not_merged)
    model.register_load_state_dict_pre_hook(_take_plain_weights)
    gates.unit_map = unit_map
    gates.train(model.training)
    leave_out(model)
    return model


def _before_forward(model: nn.Module, args: Any) -> None:
    """In a copy that is averaged with a learning model, keep frozen elements as the model has them."""
    if torch.compiler.is_compiling():
        return
    gates = model._modules[GATES]
    if gates is not None and gates.origin is not None:
        refresh_copy(model)
    if gates.sharded != (sharded := is_sharded(model)):  # type: ignore[union-attr]
        gates.sharded = sharded  # type: ignore[union-attr]
    gates.drop_soft_gates()  # type: ignore[union-attr,operator]
    check_forward(model)


def _not_merged(model: nn.Module, args: Any) -> None:
    """Under a task no adapter may be merged into its base, where gates do not reach its pairs."""
    task = None if torch.compiler.is_compiling() else model._modules[GATES].task  # type: ignore[union-attr]
    layer = None if task is None else merged_layer(model)
    if layer is not None:
        raise TaskError(
            f"{layer}: the adapter is merged into its base, where task {task}'s gates do not reach its pairs; call "
            "unmerge_adapter() under the task that it was merged under (none: inside `with hatcl.task(model, None)`)"
        )


def _take_plain_weights(model: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """A plain model's state dict fits as long as no task is sealed: every task's copies start from its values."""
    gates = model.get_submodule(GATES)
    assert isinstance(gates, Gates)
    masks = state.get(f"{prefix}{GATES}.masks")
    if masks is not None and len(masks) != gates.num_tasks:
        args[-1].append(_other_tasks(len(masks), gates.num_tasks))  # the text of torch's error
    if any(f"{GATES}." in name or "hat_tasks." in name for name in state) or bool(gates.order.any()):
        return
    for name, value in model.state_dict(prefix=prefix).items():
        path, _, rest = name.rpartition("hat_tasks.")
        if name not in state and (rest != name or name.startswith(f"{prefix}{GATES}.")):
            plain = state.get(path + rest.partition(".")[2])
            state[name] = plain if plain is not None and plain.shape == value.shape else value


def _other_tasks(stored: int, ours: int) -> str:
    if stored > ours:
        return (
            f"the state belongs to a model with room for {stored} tasks, this one has room for {ours}; call "
            f"hatcl.add_tasks(model, {stored - ours}), and load it then"
        )
    return (
        f"the state belongs to a model with room for {stored} tasks, this one has room for {ours}; load it into a "
        "model "
        f"that was converted with num_tasks={stored}, and call hatcl.add_tasks(model, {ours - stored}) then"
    )
