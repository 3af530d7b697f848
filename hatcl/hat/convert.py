"""From any module to a HAT model: plan, check, then swap."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase
from torch.nn.parameter import is_lazy

from ..calls import OutputError, call, device_of, seeded, shapes, tensors_of, values_of
from ..config import HATConfig
from ..errors import ConfigError, ConversionError
from ..functional import same_bits
from ..map.lora import is_factor, merged_layer
from ..map.trace import trace
from ..map.units import UnitMap, resolve
from ..shards import check_whole, is_sharded
from ..sources import source_of
from . import layers as _layers  # registers the HAT layers
from .certify import RANDOM, attack, attacked_outputs, difference, difference_of, named_outputs
from .distributed import check_forward, leave_out
from .gates import Gates, Units
from .guard import refresh_copy
from .layers.gated import Axis, Binding, HATLayer, ParameterPlan, task_class
from .layers.norm import kind_of_norm
from .layers.state import STATES, Watch, classes_kept, copied, copy_of, hold, state_attributes
from .registry import layer_for

log = logging.getLogger(__name__)
GATES = "hat_gates"
Classes = int | Sequence[int]
Head = list[tuple[str, str, str]]  # path of the module, name there and name in the map of each parameter of a head
assert _layers


def convert(
    model: nn.Module,
    num_tasks: int | None = None,
    example_inputs: Any = None,
    *,
    num_classes: Classes | Mapping[str, Classes] | None = None,
    config: HATConfig | Mapping[str, Any] | None = None,
    verify: bool = True,
    unit_map: UnitMap | None = None,
) -> nn.Module:
    """A HAT model that computes what `model` computes, bit for bit, while no task is active. `model` stays as it was.

    Args:
        num_tasks: how many tasks to make room for; default: the config's.
        example_inputs: what the model's forward takes: a tensor, a tuple (positional) or a dict (keywords).
        num_classes: how many classes the tasks have, a number or one per task: the head's copies get these widths. Of a
            model with several heads name those that are meant: `{"cls": [3, 7]}`; the others stay as they are.
        config: options; a `HATConfig` or a mapping of them.
        verify: run the certificate's attack once with random gates before handing the model over (M7).
        unit_map: a map found earlier, instead of tracing.

    Raises:
        ConversionError: the forward fails on the example inputs, or the model cannot be converted; names the module.
    """
    config = config if isinstance(config, HATConfig) else HATConfig.from_dict(config or {})
    if num_tasks is not None:
        config = config.replace(num_tasks=num_tasks)
    _check_modules(model)
    _check_names(model)
    check_whole(model, "convert", "convert the model first, and then call fully_shard on it and its blocks")
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
    widths = _widths(num_classes, config.num_tasks)
    try:
        source = copy_of(model)
    except Exception as error:
        raise ConversionError(
            f"{_not_copied(model)}: it cannot be copied ({error}), so the model cannot be converted without changing "
            "it; remove it, or give its class a __deepcopy__"
        ) from error
    if unit_map is None:
        unit_map = map_of(source, example_inputs)
    heads = _heads(source, unit_map, widths)
    made = build(copy.deepcopy(source), unit_map, config)
    if any(p.is_meta for p in source.parameters()):
        log.info("%s is on the meta device: mapped and not verified", type(model).__name__)
    elif verify and example_inputs is not None:
        with classes_kept(source):
            _check_plain(made, source, example_inputs)
            made = _verified(made, source, unit_map, config, example_inputs)
    for head, numbers in heads:
        _widen(made, head, numbers)
    made.get_submodule(GATES).source = source_of(source)  # type: ignore[assignment]
    return made


def _check_names(model: nn.Module) -> None:
    """Names that HAT layers use must be free."""
    for path, module in model.named_modules():
        for name in ("_hat", "hat_tasks", STATES):
            if not isinstance(module, HATLayer) and (name in vars(module) or name in module._modules):
                raise ConversionError(
                    f"{path or type(model).__name__}: it has an attribute {name!r}, which hatcl uses; rename it"
                )
        layer = layer_for(type(module))
        for name, value in vars(module).items():
            made = {f"{name}_g", f"{name}_v"} <= module._parameters.keys() or f"{name}_mask" in module._buffers
            if isinstance(value, Tensor) and (made or isinstance(getattr(layer, name, None), property)):
                raise ConversionError(
                    f"{path or type(model).__name__}.{name}: it is no parameter but a tensor that is made anew before "
                    "every forward (the old torch.nn.utils.weight_norm or spectral_norm, or torch.nn.utils.prune), "
                    "which cannot be copied per task; use torch.nn.utils.parametrizations, or make it a parameter "
                    "again (remove_weight_norm, remove_spectral_norm, prune.remove)"
                )


def _check_modules(model: nn.Module) -> None:
    """What holds no weights that could be gated and learned element by element is refused by its name."""
    for path, module in model.named_modules():
        where = path or type(model).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise ConversionError(
                f"{where}: it is compiled by torch.jit, and what it does inside cannot be seen; convert the module "
                "that it was made from, and compile the converted model with torch.compile"
            )
        if type(module).__module__.startswith(("torch.ao.nn.", "torch.nn.quantized")) and not any(
            True for _ in module.parameters()
        ):
            raise ConversionError(
                f"{where}: it is quantised ({type(module).__name__}), so nothing in it can be learned; convert the "
                "model as it was before torch.ao.quantization.convert or quantize_dynamic"
            )
        if isinstance(module, FakeQuantizeBase) and bool(module.observer_enabled.any()):
            raise ConversionError(
                f"{where}: it observes what it quantises, in evaluation too, so a forward changes the next one; call "
                "model.apply(torch.ao.quantization.disable_observer) after calibration, and convert then"
            )
        if isinstance(module, nn.EmbeddingBag) and module.sparse:
            raise ConversionError(
                f"{where}: its gradients are sparse, and gradients of elements that are frozen must be zero one by "
                "one; set its attribute sparse to False"
            )
        for name, x in (*module._parameters.items(), *module._buffers.items()):
            if is_lazy(x):
                raise ConversionError(
                    f"{where}.{name}: it has no shape yet; run the model once on the example inputs, and convert then"
                )
            if x is not None and x.layout != torch.strided:
                raise ConversionError(
                    f"{where}.{name}: its layout is {str(x.layout).removeprefix('torch.')}, and hatcl gates, compares "
                    "and saves tensors element by element; hold it as a dense tensor and make it sparse in the forward "
                    "(to_sparse)"
                )


def _not_copied(model: nn.Module) -> str:
    """The first attribute of a module, or parameter or buffer, of which no copy can be made."""
    for path, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k not in ("_modules", "_parameters", "_buffers")}
        for name, value in {**own, **module._parameters, **module._buffers}.items():
            try:
                copy.deepcopy(value)
            except Exception:
                return f"{path}.{name}".removeprefix(".")
    return type(model).__name__


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
    trial = copy_of(model)  # a forward may change what the model keeps
    watch = Watch(trial)
    try:
        with classes_kept(model):
            with seeded(device=device_of(model)):
                found = trace(trial, example_inputs, norms=lambda m: layer_for(type(m)).hat_is_norm)
            buffers, states = _moving(model, trial, watch, example_inputs)
    except ConversionError:
        raise
    except OutputError as error:
        raise ConversionError(f"{type(model).__name__}: {error}") from error
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
    unit_map.buffers, unit_map.states = buffers, states
    return unit_map


Names = dict[str, tuple[str, ...]]


def _moving(model: nn.Module, trial: nn.Module, watch: Watch, inputs: Any) -> tuple[Names, Names]:
    """Module path -> the buffers that a forward writes (running statistics, counters, power iterations) and that no
    registered layer says are the task's, and whatever else it changes (see `hat/layers/state.py`): in evaluation, which
    `trial`, a copy of the model, has been through, and in training. All buffers, where that fails.

    Raises:
        ConversionError: a forward writes to a parameter, or changes what cannot be copied.
    """
    watch.look()
    changed = dict(watch.changed)
    try:
        with torch.no_grad(), seeded(device=device_of(model)):
            call(trial.train(), inputs)
        watch.look()
        changed = watch.changed
    except Exception as error:
        log.info("a training forward failed (%s): each task gets its own copy of every buffer", error)
        changed |= {(path, n): None for path, m in model.named_modules() for n, b in m._buffers.items() if _float(b)}
    by_torch = {id(m._parameters["weight"]) for m in trial.modules() if getattr(m, "max_norm", None) is not None}
    for (name, p), was in zip(trial.named_parameters(), model.parameters(), strict=True):
        if id(p) not in by_torch and not p.is_meta and not same_bits(p.detach(), was.detach()):
            raise ConversionError(
                f"{name}: the forward itself writes to this parameter, which would change what sealed tasks use; keep "
                "what it computes in a variable, or in a buffer"
            )
    buffers: dict[str, list[str]] = {}
    states: dict[str, list[str]] = {}
    for path, name in changed:
        module, after = model.get_submodule(path), trial.get_submodule(path)._buffers.get(name)
        if name in layer_for(type(module)).hat_task_buffers:
            continue
        before = module._buffers.get(name)
        as_it_was = (
            before is not None and after is not None and (before.shape, before.dtype) == (after.shape, after.dtype)
        )
        (buffers if as_it_was else states).setdefault(path, []).append(name)
        if not as_it_was:
            try:
                copied(getattr(module, name, None))
            except Exception as error:
                raise ConversionError(
                    f"{path or type(model).__name__}.{name}: the forward changes it, and it cannot be copied "
                    f"({error}), so tasks cannot each have their own; keep there what can be copied: tensors, "
                    "numbers, containers of them"
                ) from error
    return {p: tuple(n) for p, n in buffers.items()}, {p: tuple(n) for p, n in states.items()}


def _float(b: Tensor | None) -> bool:
    return b is not None and b.is_floating_point()


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
    stateful: dict[str, tuple[nn.Module, tuple[str, ...]]] = {}
    for path, m in model.named_modules():
        norm = unit_map.norms.get(path)
        layer = layer_for(type(m), norm.kind if norm is not None else "")
        own = {n: p for n, p in m._parameters.items() if p is not None}
        moving, states = unit_map.buffers.get(path, ()), unit_map.states.get(path, ())
        known = any(m._buffers.get(b) is not None for b in layer.hat_task_buffers)
        if not (own or norm is not None or known or moving or states or layer.hat_always):
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
        plan.append((m, task_class(layer, type(m), tuple(own), moving, state_attributes(states)), hat))
        if states:
            stateful[path] = (m, states)
    hold(model, stateful)
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
    gates.sharded = is_sharded(model)  # type: ignore[union-attr]
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


def _check_plain(made: nn.Module, source: nn.Module, inputs: Any) -> None:
    """Without a task the model must compute what the source does, bit for bit, in evaluation and in training.

    Raises:
        ConversionError: names the first module whose output differs.
    """
    for training in (False, True):
        mode = "training" if training else "evaluation"
        try:
            want = _plain_outputs(source, inputs, training)
        except Exception as error:
            if not training:
                raise
            log.info("%s: a training forward failed (%s), so it is not compared", type(source).__name__, error)
            return
        try:
            got = _plain_outputs(made, inputs, training)
            where = difference_of(want, got)[1]
        except Exception as error:
            got, where = {}, f"{type(error).__name__}: {error}"
        if not where:
            continue
        random = difference_of(want, _plain_outputs(source, inputs, training))[1]
        if random and training:
            log.info("%s: its training forward cannot be seeded, so it is not compared", type(source).__name__)
            return
        if random:
            raise ConversionError(f"{type(source).__name__}: {RANDOM.format(where=random)}")
        path = _first_that_differs(made, source, inputs, training)
        raise ConversionError(
            f"{path or type(source).__name__}: without a task, in {mode} mode, the converted module computes something "
            f"else than the source ({where}). Conversion gives a module a class that is derived from its own: a "
            "forward that compares classes (type(m) is nn.Linear) must use isinstance, and names that begin with "
            "hat_ or _hat_ belong to hatcl"
        )


def _plain_outputs(model: nn.Module, inputs: Any, training: bool) -> dict[str, Tensor]:
    trial = copy_of(model, share=True).train(training)
    with torch.no_grad(), seeded(device=device_of(model)):
        return {path: x.clone() for path, x in values_of(call(trial, inputs)).items()}


def _first_that_differs(made: nn.Module, source: nn.Module, inputs: Any, training: bool) -> str:
    """The path of the first module, in the order in which they end, whose output is another one in the converted
    model."""

    def run(model: nn.Module) -> list[tuple[str, list[Tensor]]]:
        trial, seen = copy_of(model, share=True).train(training), []

        def note(path: str) -> Any:
            return lambda m, args, out: seen.append((path, [x.detach().clone() for x in tensors_of(out)]))

        for path, m in trial.named_modules():
            if path in paths:
                m.register_forward_hook(note(path))
        with contextlib.suppress(Exception), torch.no_grad(), seeded(device=device_of(model)):
            call(trial, inputs)
        return seen

    paths = {path for path, _ in source.named_modules()}
    for (path, a), (other, b) in zip(run(source), run(made), strict=False):
        if path != other or len(a) != len(b) or not all(map(same_bits, a, b)):
            return path
    return ""


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
        "copies per task. If the forward takes them from parameters(), named_parameters(), state_dict() or "
        "torch.func.stack_module_state, which give those of the plain model, let it read them as attributes "
        "(module.weight); else please report the model, or pass verify=False to convert without the guarantee"
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
        _set_cut(gates, False)  # what the folds of the map alone give: this is what proves the map
        with torch.no_grad():
            want = named_outputs(trial, inputs, 0)
            groups = [names]
            while groups:
                group = groups.pop()
                with attack(trial, 0, only=None if group is names else set(group)):
                    got = attacked_outputs(trial, inputs, 0)
                if _same_numbers(want, got):
                    continue
                if exact and (where := difference_of(want, named_outputs(trial, inputs, 0))[1]):
                    raise ConversionError(f"{type(model).__name__}: {RANDOM.format(where=where)}")
                exact = False
                if len(group) == 1:
                    found[group[0]] = None
                elif group:
                    groups += [group[: len(group) // 2], group[len(group) // 2 :]]
            _set_cut(gates, True)
            if exact and not _same_numbers(want, got := named_outputs(trial, inputs, 0)):
                diff, where = difference_of(want, got)
                raise ConversionError(
                    f"{type(model).__name__}: cut down to half of its units it computes another {where} (by "
                    f"{diff:.2g}) than gated to them, so its map is not right; please report the model, or pass "
                    "verify=False to convert without the guarantee"
                )
    return None if exact else list(found) or names


def _set_cut(gates: Gates, cut: bool) -> None:
    gates.cut = cut
    gates.epoch += 1


def _same_numbers(want: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> bool:
    """The same bits, but for the sign of zeros: without the cut a zero is a product, and has its sign."""
    return want.keys() == got.keys() and all(difference(x + 0, got[path] + 0) == 0 for path, x in want.items())


def _stirred(model: nn.Module, inputs: Any) -> nn.Module:
    """A copy with noise on every parameter: biases and scales that start at zero would hide what gets out through
    them."""
    trial = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trial.parameters():
            if (p.is_floating_point() or p.is_complex()) and p.numel():
                fan_in = p.numel() / p.shape[0] if p.dim() > 1 else 25.0
                size = max(0.5 * float(p.std()) if p.numel() > 1 else 0.0, 0.5 / math.sqrt(fan_in))
                dtype = torch.complex64 if p.is_complex() else torch.float32
                p.add_((torch.randn(p.shape, generator=generator, dtype=dtype) * size).to(p))
        finite = all(bool(torch.isfinite(x).all()) for x in named_outputs(trial, inputs, None).values())
    if not finite:
        log.info("%s overflows with noise on its parameters; attacked with its own values", type(model).__name__)
    return trial if finite else copy.deepcopy(model).eval()


def _widths(num_classes: Any, num_tasks: int) -> dict[str | None, list[int]]:
    """Path of a head (None: of all) -> one number of classes per task."""
    if num_classes is None:
        return {}
    found: dict[str | None, list[int]] = {}
    for path, given in (num_classes if isinstance(num_classes, Mapping) else {None: num_classes}).items():
        where = f"num_classes[{path!r}]" if isinstance(num_classes, Mapping) else "num_classes"
        many = isinstance(given, Sequence) and not isinstance(given, str)
        numbers = list(given) if many else [given] * num_tasks
        if len(numbers) != num_tasks:
            raise ConfigError(f"{where}: got {len(numbers)} numbers for {num_tasks} tasks; pass one per task")
        if wrong := [n for n in numbers if type(n) is not int or n < 1]:
            raise ConfigError(
                f"{where}: got {wrong[0]!r}; expected a whole number of 1 or more, or a list of one per task"
            )
        found[path] = numbers
    return found


def _heads(model: nn.Module, unit_map: UnitMap, widths: Mapping[str | None, list[int]]) -> list[tuple[Head, list[int]]]:
    """The heads that get other widths, and which. What writes the same classes is one head: a weight and its bias, two
    modules that share a parameter or whose outputs are added, a factor per class.

    Raises:
        ConfigError: there is no such head, it is not said which, or its width cannot differ.
    """
    if not widths:
        return []
    kind, names = type(model).__name__, {id(p): n for n, p in model.named_parameters()}
    heads: dict[str, Head] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None and (entry := unit_map.entries[names[id(p)]]).head:
                heads.setdefault(entry.classes, []).append((path, name, entry.name))
    if not heads:
        raise ConfigError(f"num_classes: {kind} has no head whose width could differ per task; pass None")
    by_path: dict[str | None, Head] = {path: head for head in heads.values() for path, _, _ in head}
    shapes_of = {name: unit_map.entries[name].shape for head in heads.values() for _, _, name in head}
    first = [max(head, key=lambda part: math.prod(shapes_of[part[2]])) for head in heads.values()]
    of_each = {path: shapes_of[name][0] for path, _, name in first}
    if None in widths:
        if len(set(of_each.values())) > 1:
            raise ConfigError(
                f"num_classes: {kind} has several heads of different widths, "
                f"{', '.join(f'{path} ({n})' for path, n in of_each.items())}; name the one that is meant, such as "
                f"num_classes={{{first[0][0]!r}: {widths[None]}}}"
            )
        widths = dict.fromkeys(of_each, widths[None])
    found: dict[str, tuple[Head, list[int]]] = {}
    for path, numbers in widths.items():
        if path not in by_path:
            raise ConfigError(f"num_classes: got {path!r}, which is no head; the model has {', '.join(of_each)}")
        head = by_path[path]
        if head[0][2] in found:
            raise ConfigError(f"num_classes: {', '.join(map(repr, widths))} write the same classes; name one of them")
        for _, _, name in head:
            if not unit_map.entries[name].copied:
                raise ConfigError(
                    f"num_classes: {path}: {name} belongs to all tasks, so its width cannot differ; give the head a "
                    "weight of its own (of a language model: tie_word_embeddings=False), or pass None"
                )
        found[head[0][2]] = head, numbers
    return list(found.values())


def _widen(model: nn.Module, head: Head, num_classes: Sequence[int]) -> None:
    """Give each task's copy of a head its own number of classes, drawn by the layer's initialiser."""
    drawn: dict[tuple[str, int], Tensor] = {}
    for path, name, entry in head:
        module: Any = model.get_submodule(path)
        for task, n in enumerate(num_classes):
            if n != module._parameters[name].shape[0]:
                own = module.hat_tasks[task]._parameters
                if (entry, task) not in drawn:  # what is one parameter in two modules is drawn once
                    drawn[entry, task] = module._hat_redrawn(rows=n)[name].to(own[name])
                own[name] = nn.Parameter(drawn[entry, task].clone())
