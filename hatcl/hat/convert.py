"""From any module to a HAT model: plan, check, then swap."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase
from torch.nn.parameter import is_lazy

from ..calls import OutputError, call, device_of, seeded, shapes
from ..config import HATConfig
from ..errors import ConfigError, ConversionError, nearest
from ..map.lora import is_factor, merged_layer
from ..map.trace import trace
from ..map.units import UnitMap, resolve
from ..shards import check_whole
from ..sources import source_of
from .arrays import array_masks, with_own_ends
from .build import GATES, build
from .certify import few_rows
from .gates import Gates, gates_of
from .given import Masks, hold_all
from .heads import Classes, class_counts, draw_heads, heads_of, widen
from .layers.gated import HATLayer
from .layers.norm import kind_of_norm
from .layers.state import STATES, Watch, classes_kept, copy_of, detached_copy
from .masked import check_masked, mask_inputs_of
from .own_copies import with_own_share
from .registry import layer_for
from .saving.pretrained import write_as_hatcl
from .saving.taken import recipe_of
from .untouched import parameters_unwritten, restored_on_failure
from .verify import check_plain, verified

log = logging.getLogger(__name__)
NAMING = ("hat_owner_dims", "hat_reader_dims", "hat_copied", "hat_task_buffers")
"""Attributes of a layer that name parameters and buffers."""


def convert(
    model: nn.Module,
    num_tasks: int | None = None,
    example_inputs: Any = None,
    *,
    num_classes: Classes | Mapping[str, Classes] | None = None,
    config: HATConfig | Mapping[str, Any] | None = None,
    masks: Masks | None = None,
    mask_inputs: bool = False,
    verify: bool = True,
    unit_map: UnitMap | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Make a HAT model that computes the same as `model`, bit for bit, while no task is active. `model` stays as it
    was.

    Verification runs on the result itself, whose parameters are overwritten in place and restored bit for bit (see
    `hat/altered.py`), so memory holds only one copy of the weights in addition to the source: the result.

    Args:
        num_tasks: the number of tasks to make room for; default: the config's. example_inputs: inputs of the model's
        forward: a tensor, a tuple (positional) or a dict (keywords). num_classes: the number of classes of the tasks,
        one number or one per task: the head's copies get these widths. For a model with several heads name the heads:
        `{"cls": [3, 7]}`; the others stay as they are.
        config: options; a `HATConfig` or a mapping of them.
        masks: gates for the tasks, instead of learned ones (see `hatcl.hold_gates`): for each task a mapping from
        layers' names, as in `hatcl.describe`, to `[U]` bool, or a function of (task, layer, units) that returns one.
        The config then has masks="given".
        mask_inputs: also give each input feature a gate, so that a task learns which features it needs. The result is a
        `MaskedInputs` with the model as its attribute `model`; `made.features_of(task)` returns the features that a
        task uses. Features that the network does not distinguish (the pixels of an image that convolutions read) share
        one gate; for single pixels put a `hatcl.HATMask` in front.
        verify: run the certificate's attack once with random gates before returning the model (M7). Evaluation on all
        of `example_inputs` and training on two rows of them are compared with the source; a random half of the units is
        attacked on all of them and the other half on two rows; the model cut down to each half is run on two rows.
        unit_map: an existing map, instead of tracing.
        inplace: convert `model` itself, without a second copy of its weights, and return it. Its parameters stay the
            same objects, so an optimizer keeps them; add the tasks' own parameters to it as well
            (`optimizer.add_param_group({"params": hatcl.task_parameters(model, task)})`). A failure or an interruption
            leaves the model as it was, bit for bit. No other thread may use it meanwhile.

    Raises:
        ConversionError: the forward fails on the example inputs, or the model cannot be converted; names the module.
        ConfigError: options are invalid, or the network has no room for masks (the text names the layer). TaskError:
            `masks` do not fit; the text names task and layer.
    """
    config = config if isinstance(config, HATConfig) else HATConfig.from_dict(config or {})
    if num_tasks is not None:
        config = config.replace(num_tasks=num_tasks)
    if masks is not None and config.masks != "given":
        if config.masks != "learned":
            raise ConfigError(f"masks: got masks for every task and the option masks={config.masks!r}; leave one out")
        config = config.replace(masks="given")
    elif masks is None and config.masks == "given":
        raise ConfigError("masks: the option masks='given' needs hatcl.convert(..., masks=), which gives them")
    if not isinstance(model, nn.Module):
        raise ConversionError(_no_module(model))
    if "_orig_mod" in model._modules:
        raise ConversionError(
            f"{type(model._modules['_orig_mod']).__name__}: it is compiled by torch.compile; convert the module that "
            "it was made from (its attribute _orig_mod), and compile the converted model"
        )
    _check_modules(model)
    _check_names(model)
    _check_memory(model, inplace)
    check_whole(model, "convert", "convert the model first, and then call fully_shard on it and its blocks")
    if any(isinstance(m, Gates) for m in model.modules()):
        raise ConversionError(
            f"{type(model).__name__} is a HAT model already; hatcl.add_tasks(model, n) makes room for more"
        )
    if hasattr(model, GATES):
        raise ConversionError(f"{type(model).__name__} has an attribute {GATES!r}, where its gates would go; rename it")
    _check_adapters(model)
    if (unit_map is None or mask_inputs) and example_inputs is None:
        raise ConversionError(
            "example_inputs: got None; pass an input of the model's forward: a tensor, a tuple or a dict"
        )
    if mask_inputs:
        model = mask_inputs_of(model, example_inputs, config)
    widths = class_counts(num_classes, config.num_tasks)
    try:
        made = model if inplace else copy_of(model)
        source = copy_of(made, share=True)  # stays plain
    except Exception as error:
        raise ConversionError(
            f"{_not_copied(model)}: it cannot be copied ({error}), so the model cannot be converted without changing "
            "it; remove it, or give its class a __deepcopy__"
        ) from error
    if unit_map is None:
        unit_map = map_of(source, example_inputs)
    if mask_inputs:
        check_masked(unit_map)
    if config.array is not None:
        unit_map = with_own_ends(unit_map, source)
        array_masks(unit_map, config.array, 0)  # raises before anything is built
    if config.own_share:
        unit_map = with_own_share(unit_map, source, config.own_share)
    heads = heads_of(source, unit_map, widths)
    with restored_on_failure(made) as plain:

        def rebuild() -> None:
            plain.restore()
            build(made, unit_map, config)

        build(made, unit_map, config)
        if any(p.is_meta for p in source.parameters()):
            log.info("%s is on the meta device: mapped and not verified", type(model).__name__)
        elif verify and example_inputs is not None:
            with classes_kept(source):
                few = few_rows(example_inputs, lambda x: call(copy_of(source, share=True).eval(), x), source)
                check_plain(made, source, example_inputs, few)
                verified(made, source, unit_map, example_inputs, few, rebuild)
        for head, numbers in heads:
            widen(made, head, numbers)
        draw_heads(made, range(1, config.num_tasks))
        hold_all(made, masks)
        gates = gates_of(made)[0]
        gates.source = source_of(source)
        gates.takes = recipe_of(example_inputs) if example_inputs is not None else None
        return write_as_hatcl(made)


def _no_module(model: Any) -> str:
    """The text of the refusal of something that is no module: it says what to pass instead."""
    if isinstance(model, str):
        return (
            f"model: got the text {model!r}, expected a torch.nn.Module; timm.create_model('hat_{model}', "
            "num_tasks=...) converts a model of timm by its name, one of transformers is loaded first (from_pretrained)"
        )
    if isinstance(model, type):
        return f"model: got the class {model.__qualname__}, expected an instance of it; pass {model.__qualname__}(...)"
    return f"model: got {type(model).__name__}, expected a torch.nn.Module; put what it does into its forward"


def _check_names(model: nn.Module) -> None:
    """Names that HAT layers use must be free."""
    for path, module in model.named_modules():
        for name in ("_hat", "hat_tasks", STATES):
            if not isinstance(module, HATLayer) and (name in vars(module) or name in module._modules):
                raise ConversionError(
                    f"{path or type(model).__name__}: it has an attribute {name!r}, which hatcl uses; rename it"
                )
        layer = layer_for(type(module))
        for name in [n for said in NAMING for n in vars(layer).get(said, ())]:  # what it inherits may be of others
            places = (module._parameters, module._buffers, module.__dict__)
            # its class is asked, not the module: reading a parametrized weight may change it (spectral_norm)
            if not any(name in place for place in places) and not hasattr(type(module), name):
                has = [*module._parameters, *module._buffers]
                raise ConversionError(
                    f"{path or type(model).__name__}: {layer.__name__}, which takes the place of "
                    f"{type(module).__name__}, names {name!r}, and that has no such parameter or buffer; it has "
                    + (f"{', '.join(has)}; did you mean {nearest(name, has)!r}?" if has else "none")
                )
        for name, value in vars(module).items():
            made = {f"{name}_g", f"{name}_v"} <= module._parameters.keys() or f"{name}_mask" in module._buffers
            if isinstance(value, Tensor) and (made or isinstance(getattr(layer, name, None), property)):
                raise ConversionError(
                    f"{path or type(model).__name__}.{name}: it is not a parameter but a tensor that is recomputed "
                    "before every forward (the old torch.nn.utils.weight_norm or spectral_norm, or "
                    "torch.nn.utils.prune), "
                    "which cannot be copied per task; use torch.nn.utils.parametrizations, or make it a parameter "
                    "again (remove_weight_norm, remove_spectral_norm, prune.remove)"
                )


def _check_modules(model: nn.Module) -> None:
    """Refuse modules, by name, whose weights cannot be gated and learned element by element."""
    for path, module in model.named_modules():
        where = path or type(model).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise ConversionError(
                f"{where}: it is compiled by torch.jit, and what it does inside cannot be seen; convert the module "
                "that it was made from, and compile the converted model with torch.compile"
            )
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise ConversionError(
                f"{where}: it is a {type(module).__name__}, which runs copies of the module inside; convert that one "
                "(its attribute module), and put the converted model into DistributedDataParallel"
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


def _check_memory(model: nn.Module, inplace: bool) -> None:
    """Tensors that are overwritten and put back must count their writes, and each element must have its own memory."""
    inside = torch.is_inference_mode_enabled()
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if inside or (inplace and x.is_inference()):
            where = "" if inside else f"{name}: it was made there, and "
            raise ConversionError(
                f"{where}under torch.inference_mode() writes to tensors are not counted, so that the model could not "
                "be attacked and put back, nor be learned; make and convert it outside (torch.no_grad() is no obstacle)"
            )
        if inplace and isinstance(x, nn.Parameter) and any(x.stride(d) == 0 and x.shape[d] > 1 for d in range(x.dim())):
            raise ConversionError(
                f"{name}: several of its elements share one memory (it was expanded), so that they cannot be "
                "overwritten one by one; make it a parameter of its own, nn.Parameter(x.detach().clone()), or leave "
                "out inplace=True"
            )


def _not_copied(model: nn.Module) -> str:
    """The first attribute of a module, or parameter or buffer, that cannot be copied."""
    for path, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k not in ("_modules", "_parameters", "_buffers")}
        for name, value in {**own, **module._parameters, **module._buffers}.items():
            try:
                copy.deepcopy(value)
            except Exception:
                return f"{path}.{name}".removeprefix(".")
    return type(model).__name__


def _check_adapters(model: nn.Module) -> None:
    """Check that a model with LoRA computes with its pairs and can learn them, since they are gated."""
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
    """The map of a plain model (see `hatcl.map`). It is run in evaluation and in training, on copies of everything that
    is not a parameter.

    Raises:
        ConversionError: the forward fails, writes to a parameter, or cannot be followed.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    copied = [
        names[id(p)]
        for m in model.modules()
        for n, p in m._parameters.items()
        if p is not None and n in layer_for(type(m)).hat_copied
    ]
    trial = copy_of(model, share=True)  # a forward may change the model's state
    watch = Watch(trial)
    try:
        with classes_kept(model), parameters_unwritten(trial):
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
    """Module path -> the buffers that a forward writes (running statistics, counters, power iterations), except those
    that a registered layer assigns to the task, and everything else that it changes (see `hat/layers/state.py`): in
    evaluation, which was run on `trial`, a copy of the model, and in training. All buffers if that fails.

    Raises:
        ConversionError: a forward changes something that cannot be copied.
    """
    watch.look()
    changed = dict(watch.changed)
    try:
        with torch.no_grad(), seeded(device=device_of(model)):
            call(trial.train(), inputs)
        watch.look()
        changed = watch.changed
    except ConversionError:
        raise
    except Exception as error:
        log.info("a training forward failed (%s): each task gets its own copy of every buffer", error)
        every = ((path, n, b) for path, m in model.named_modules() for n, b in m._buffers.items() if b is not None)
        changed |= {(path, n): None for path, n, b in every if b.is_floating_point()}
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
                detached_copy(getattr(module, name, None))
            except Exception as error:
                raise ConversionError(
                    f"{path or type(model).__name__}.{name}: the forward changes it, and it cannot be copied "
                    f"({error}), so tasks cannot each have their own; keep there what can be copied: tensors, "
                    "numbers, containers of them"
                ) from error
    return {p: tuple(n) for p, n in buffers.items()}, {p: tuple(n) for p, n in states.items()}
