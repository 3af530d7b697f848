"""From any module to a HAT model: plan, check, then swap."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import layers as _layers  # registers the HAT layers
from .certify import attack, difference, outputs_of
from .config import HATConfig
from .distributed import check_forward, leave_out
from .errors import ConfigError, ConversionError
from .gates import Gates, Units
from .guard import refresh_copy
from .layers.gated import Axis, Binding, ParameterPlan, task_class
from .layers.norm import kind_of_norm
from .map.lora import is_factor, merged_layer
from .map.trace import call, tensors_of, trace
from .map.units import Entry, UnitMap, resolve
from .registry import layer_for, source_of

log = logging.getLogger(__name__)
GATES = "hat_gates"
assert _layers


def convert(
    model: nn.Module,
    num_tasks: int | None = None,
    example_inputs: Any = None,
    *,
    num_classes: int | Sequence[int] | None = None,
    config: HATConfig | Mapping[str, Any] | None = None,
    verify: bool = True,
    unit_map: UnitMap | None = None,
) -> nn.Module:
    """A HAT model that computes what `model` computes, bit for bit, while no task is active. `model` stays as it was.

    Args:
        num_tasks: how many tasks to make room for; default: the config's.
        example_inputs: what the model's forward takes: a tensor, a tuple (positional) or a dict (keywords).
        num_classes: classes per task, where tasks differ: the head's copies get these widths.
        config: options; a `HATConfig` or a mapping of them.
        verify: run the certificate's attack once with random gates before handing the model over (M7).
        unit_map: a map found earlier, instead of tracing.

    Raises:
        ConversionError: the forward fails on the example inputs, or the model cannot be converted; names the module.
    """
    config = config if isinstance(config, HATConfig) else HATConfig.from_dict(config or {})
    if num_tasks is not None:
        config = config.replace(num_tasks=num_tasks)
    if any(isinstance(m, Gates) for m in model.modules()):
        raise ConversionError(
            f"{type(model).__name__} is a HAT model already; hatcl.add_tasks(model, n) makes room for more"
        )
    if hasattr(model, GATES):
        raise ConversionError(f"{type(model).__name__} has an attribute {GATES!r}, where its gates would go; rename it")
    _check_adapters(model)
    if unit_map is None and example_inputs is None:
        raise ConversionError(
            "example_inputs: got None; pass an input of the model's forward: a tensor, a tuple or a dict"
        )
    if isinstance(num_classes, Sequence) and len(num_classes) != config.num_tasks:
        raise ConfigError(
            f"num_classes: got {len(num_classes)} numbers for {config.num_tasks} tasks; pass one per task"
        )
    try:
        source = copy.deepcopy(model)
    except Exception as error:
        raise ConversionError(
            f"{type(model).__name__}: it cannot be copied ({error}), so it cannot be converted without changing it; "
            "remove what cannot be copied (the old torch.nn.utils.weight_norm: use torch.nn.utils.parametrizations)"
        ) from error
    if unit_map is None:
        unit_map = map_of(source, example_inputs)
    made = build(copy.deepcopy(source), unit_map, config)
    if any(p.is_meta for p in source.parameters()):
        log.info("%s is on the meta device: mapped and not verified", type(model).__name__)
    elif verify and example_inputs is not None:
        made = _verified(made, source, unit_map, config, example_inputs)
    if isinstance(num_classes, Sequence):
        _widen_heads(made, num_classes)
    made.get_submodule(GATES).source = source_of(source)  # type: ignore[assignment]
    return made


def _check_adapters(model: nn.Module) -> None:
    """Of a model with LoRA the pairs are gated: they must be there to be computed with, and to be learned."""
    factors = [p for n, p in model.named_parameters() if is_factor(n)]
    merged = merged_layer(model)
    if factors and merged is not None:
        raise ConversionError(f"{merged}: the adapter is merged into its base; call unmerge_adapter() first")
    if factors and not any(p.requires_grad for p in factors):
        raise ConversionError(
            f"{type(model).__name__}: none of its LoRA tensors requires a gradient, so no pair could be learned; load "
            "the adapter with is_trainable=True, or call set_adapter on it"
        )


def map_of(model: nn.Module, example_inputs: Any) -> UnitMap:
    """The map of a plain model (see `hatcl.map`)."""
    names = {id(p): n for n, p in model.named_parameters()}
    copied = [
        names[id(p)]
        for m in model.modules()
        for n, p in m._parameters.items()
        if p is not None and n in layer_for(type(m)).hat_copied
    ]
    try:
        found = trace(
            model,
            example_inputs,
            norms=lambda m: layer_for(type(m)).hat_is_norm,
        )
    except ConversionError:
        raise
    except Exception as error:
        raise ConversionError(
            f"{type(model).__name__}: its forward failed on example_inputs = {shapes(example_inputs)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    for path, seen in found.mixing.items():
        module = model.get_submodule(path)
        for dim, ids in [(d, ids) for d, ids in seen.ids.items() if d in seen.over]:
            kind = kind_of_norm(module, seen.ndim, dim, len(ids))
            if kind:
                found.norms[path] = dataclasses.replace(seen, across=True, kind=kind, ids={dim: ids})
                found.notes.pop(path, None)
                copied += [names[id(p)] for p in module._parameters.values() if p is not None]
    unit_map = resolve(found, model, copied)
    unit_map.buffers = moving_buffers(model, example_inputs)
    return unit_map


def moving_buffers(model: nn.Module, inputs: Any) -> dict[str, tuple[str, ...]]:
    """Module path -> the buffers that a training forward writes (running statistics, power iterations) and that no
    registered layer says are the task's. All of a module's, where such a forward fails. The model is put back."""
    unknown = {
        path: {n: b for n, b in m._buffers.items() if b is not None and n not in layer_for(type(m)).hat_task_buffers}
        for path, m in model.named_modules()
    }
    unknown = {path: {n: b for n, b in bs.items() if b.is_floating_point()} for path, bs in unknown.items()}
    if not any(unknown.values()):
        return {}
    before = [(m, n, b, b.clone()) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    modes = [(m, m.training) for m in model.modules()]
    moved: dict[str, tuple[str, ...]] = {}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            call(model.train(), inputs)
        for path, bs in unknown.items():
            m = model.get_submodule(path)
            old = {n: was for other, n, _, was in before if other is m}
            moved[path] = tuple(n for n in bs if not _same(m._buffers[n], old[n]))
    except Exception as error:
        log.info("a training forward failed (%s): each task gets its own copy of every buffer", error)
        moved = {path: tuple(bs) for path, bs in unknown.items()}
    finally:
        for m, n, b, was in before:
            b.copy_(was)
            m._buffers[n] = b
        for m, training in modes:
            m.training = training
    return {path: names for path, names in moved.items() if names}


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and difference(a, b) == 0


def shapes(x: Any) -> str:
    """Inputs in words, for messages."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{k}: {shapes(v)}" for k, v in x.items()) + "}"
    if isinstance(x, (list, tuple)):
        return "(" + ", ".join(map(shapes, x)) + ")"
    return type(x).__name__


def build(model: nn.Module, unit_map: UnitMap, config: HATConfig) -> nn.Module:
    """Turn `model` into a HAT model on this map, in place. Everything is planned before anything is swapped."""
    some = next(model.parameters(), torch.zeros(()))
    with torch.device("cpu" if some.is_meta else some.device):
        layers = [(n.removesuffix(".weight"), a - 1, b - 1) for n, a, b in unit_map.layers]
        gates = Gates(unit_map.num_units, config, layers)
    made: dict[bytes, Units] = {}

    def units(numbers: np.ndarray) -> Units:
        return made.setdefault(numbers.tobytes(), Units(gates, numbers))

    names = {id(p): n for n, p in model.named_parameters()}
    holders: dict[str, set[str]] = {}
    for path, m in model.named_modules():
        for p in m._parameters.values():
            if p is not None:
                holders.setdefault(names[id(p)], set()).add(path)
    plan: list[tuple[nn.Module, type, Binding]] = []
    for path, m in model.named_modules():
        norm = unit_map.norms.get(path)
        layer = layer_for(type(m), norm.kind if norm is not None else "")
        own = {n: p for n, p in m._parameters.items() if p is not None}
        moving = unit_map.buffers.get(path, ())
        known = any(m._buffers.get(b) is not None for b in layer.hat_task_buffers)
        if not (own or norm is not None or known or moving or layer.hat_always):
            continue
        hat = Binding(gates, buffers=moving, path=path)
        for name, p in own.items():
            entry = unit_map.entries[names[id(p)]]
            hat.shapes[name] = entry.shape
            if entry.shape != tuple(p.shape):
                raise ConversionError(
                    f"{path}.{name}: the map says shape {list(entry.shape)}, it has {list(p.shape)}; "
                    "trace this model anew"
                )
            fold_axes = set(unit_map.folds.get((path, entry.name), ()))
            elsewhere = {
                a for (user, other), axes in unit_map.folds.items() for a in axes
                if other == entry.name and user not in holders[entry.name]
            }  # fmt: skip
            hat_fold_output = layer.hat_fold_output and not elsewhere
            if path in unit_map.outputs or hat_fold_output:
                owners = {f.axis for f in entry.factors if f.owner}
                if hat_fold_output and fold_axes & owners:
                    hat.output = (layer.hat_output_dim, units(next(f.units for f in entry.factors if f.owner)))
                fold_axes -= owners
            fold_axes |= elsewhere
            if norm is not None and norm.across and layer.hat_is_norm:
                # the weight carries the factor of the statistics; of a class that is not known, the output does
                fold_axes = set() if norm.kind else fold_axes | {f.axis for f in entry.factors}
            axes_ = tuple(Axis(units(f.units), f.shape, f.owner) for f in entry.factors)
            fold = tuple(i for i, f in enumerate(entry.factors) if f.axis in fold_axes)
            hat.params[name] = ParameterPlan(entry.view, axes_, fold, entry.copied, entry.standardised)
        if path in unit_map.outputs:
            hat.output = (layer.hat_output_dim, units(unit_map.outputs[path]))
        if norm is not None:
            across = norm.across or not hasattr(layer, "eps")
            if across:
                hat.norm = (norm.dim, units(norm.units))
            else:
                hat.output = (norm.dim, units(norm.units))
            hat.dirty = not norm.clean
        plan.append((m, task_class(layer, type(m), tuple(own), moving), hat))
    for m, cls, hat in plan:
        m.__class__ = cls
        m._hat_attach(hat, config.num_tasks)  # type: ignore[operator]
    model.add_module(GATES, gates)
    gates.bound = tuple(hat.path for _, _, hat in plan)
    model.register_forward_pre_hook(_before_forward)
    model.register_load_state_dict_pre_hook(_take_plain_weights)
    gates.unit_map = unit_map
    gates.train(model.training)
    leave_out(model)
    return model


def _before_forward(model: nn.Module, args: Any) -> None:
    """A copy that is averaged with a model that is learning keeps what is frozen as the model has it."""
    if torch.compiler.is_compiling():
        return
    gates = model._modules[GATES]
    if gates is not None and gates.origin is not None:
        refresh_copy(model)
    check_forward(model)


def _take_plain_weights(model: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """A plain model's state dict fits as long as no task is sealed: every task's copies start from its values."""
    gates = model.get_submodule(GATES)
    assert isinstance(gates, Gates)
    if any(f"{GATES}." in name or "hat_tasks." in name for name in state) or bool(gates.sealed.any()):
        return
    for name, value in model.state_dict(prefix=prefix).items():
        path, _, rest = name.rpartition("hat_tasks.")
        if name not in state and (rest != name or name.startswith(f"{prefix}{GATES}.")):
            plain = state.get(path + rest.partition(".")[2])
            state[name] = plain if plain is not None and plain.shape == value.shape else value


def _verified(model: nn.Module, source: nn.Module, unit_map: UnitMap, config: HATConfig, inputs: Any) -> nn.Module:
    """Attack with random gates. A parameter through which the attack gets out becomes a copy per task (M5)."""
    blamed: list[str] = []
    for _ in range(8):
        leaks = _leaks(model, inputs)
        if leaks is None:
            return model
        if not leaks:
            break
        blamed += leaks
        for name in leaks:
            entry = unit_map.entries[name]
            unit_map.entries[name] = dataclasses.replace(entry, copied=True, why="the attack got out through it")
            log.info("%s: reachable by other tasks, so each task gets its own copy", name)
        model = build(copy.deepcopy(source), unit_map, config)
    names = ", ".join(list(dict.fromkeys(blamed))[:5])
    raise ConversionError(
        f"{type(source).__name__}: other tasks reach a task's output through {names} even as "
        "copies per task; please report the model, or pass verify=False to convert without the guarantee"
    )


def _leaks(model: nn.Module, inputs: Any) -> list[str] | None:
    """Shared parameters whose non-live elements reach the output under random gates or under their complement, so that
    every unit is off once (all that are left, where no one does by itself); None where nothing gets out."""
    trial = _stirred(model, inputs)
    gates: Gates = getattr(trial, GATES)
    mask = torch.rand(gates.num_units, generator=torch.Generator().manual_seed(0)) < 0.5
    gates.sealed[0] = True
    names = [n for n, e in gates.unit_map.entries.items() if not e.copied]
    found: dict[str, None] = {}
    exact = True
    for on in (mask, ~mask):
        gates.masks[0] = on.to(gates.masks.device)
        gates.epoch += 1
        with torch.no_grad():
            want = outputs_of(trial, inputs, 0)
            groups = [names]
            while groups:
                group = groups.pop()
                with attack(trial, 0, only=None if group is names else set(group)):
                    got = outputs_of(trial, inputs, 0)
                if all(difference(a, b) == 0 for a, b in zip(want, got, strict=True)):
                    continue
                exact = False
                if len(group) == 1:
                    found[group[0]] = None
                elif group:
                    groups += [group[: len(group) // 2], group[len(group) // 2 :]]
    return None if exact else list(found) or names


def _stirred(model: nn.Module, inputs: Any) -> nn.Module:
    """A copy with noise on every parameter: biases and scales that start at zero would hide what gets out through
    them."""
    trial = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trial.parameters():
            if p.is_floating_point() and p.numel():
                fan_in = p.numel() / p.shape[0] if p.dim() > 1 else 25.0
                size = max(0.5 * float(p.std()) if p.numel() > 1 else 0.0, 0.5 / math.sqrt(fan_in))
                p.add_((torch.randn(p.shape, generator=generator) * size).to(p))
        finite = all(bool(torch.isfinite(x).all()) for x in tensors_of(call(trial, inputs)) if x.is_floating_point())
    if not finite:
        log.info("%s overflows with noise on its parameters; attacked with its own values", type(model).__name__)
    return trial if finite else copy.deepcopy(model).eval()


def _widen_heads(model: nn.Module, num_classes: Sequence[int]) -> None:
    """Give each task's copy of the head its own number of classes, drawn by the layer's initialiser."""
    entries: dict[str, Entry] = model.get_submodule(GATES).unit_map.entries  # type: ignore[assignment,union-attr]
    heads = {n.rpartition(".")[0] for n, e in entries.items() if e.head}
    if not heads:
        raise ConfigError(
            f"num_classes: {type(model).__name__} has no head whose width could differ per task; pass one number"
        )
    for path in heads:
        module: Any = model.get_submodule(path)
        width = module._parameters["weight"].shape[0]
        for task, n in enumerate(num_classes):
            if n != width:
                own = module.hat_tasks[task]._parameters
                for name, value in module._hat_redrawn(rows=n).items():
                    own[name] = nn.Parameter(value.to(own[name]))
