"""Two adapters in one model: add one next to the trained one, and compute with it without side effects."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import SkillError, nearest
from ..map.lora import factor_in, merged_layer
from .tensors import skill_tensors

# peft's further parameters per adapter: DoRA's magnitudes, fully trained heads, single tokens
OTHERS = ("lora_magnitude_vector", "modules_to_save", "trainable_tokens_delta")


def check_peft(model: nn.Module) -> None:
    """Raise `SkillError` unless this is a peft model whose adapters can be switched."""
    if not hasattr(model, "peft_config") or not hasattr(model, "set_adapter") or not hasattr(model, "base_model"):
        raise SkillError(
            f"{type(model).__name__} is not a peft model; wrap it with peft.get_peft_model(model, LoraConfig())"
        )
    if callable(getattr(model, "active_adapters", None)):  # in peft it is a property
        raise SkillError(
            f"{type(model).__name__}: its adapters were added by transformers' own add_adapter, which adds and "
            "switches them in another way; wrap the base instead, with peft.get_peft_model(model, LoraConfig())"
        )
    if not isinstance(getattr(model, "active_adapter", None), str):
        raise SkillError(
            f"{type(model).__name__}: several adapters are active at once, expected a PeftModel with one; make it with "
            "peft.get_peft_model(model, LoraConfig())"
        )
    merged = merged_layer(model)
    if merged is not None:
        raise SkillError(f"{merged}: the adapter is merged into its base; call unmerge_adapter() first")


def adapter_tensors(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """All parameters that peft holds for one adapter: `skill_tensors` and, named in the same way, its other parameters
    (`....classifier.modules_to_save.default.weight` -> `....classifier.modules_to_save.weight`).

    Raises:
        SkillError: the adapter matches nothing.
    """
    out = skill_tensors(model, adapter)
    return out | {own: p for n, p in model.named_parameters() if (own := _own(n, adapter)) is not None}


def adapter_buffers(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """The buffers of one adapter's fully trained modules, named likewise."""
    return {own: b for n, b in model.named_buffers() if (own := _own(n, adapter)) is not None}


def of_adapters(name: str) -> bool:
    """Whether this names a tensor of some adapter, or an original that an adapter's copy replaces."""
    parts = name.split(".")
    return factor_in(parts) is not None or any(part in (*OTHERS, "original_module") for part in parts)


def _own(name: str, adapter: str) -> str | None:
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts[:-1]) if part in OTHERS), None)
    return ".".join([*parts[: at + 1], *parts[at + 2 :]]) if at is not None and parts[at + 1] == adapter else None


def pairs(model: nn.Module, plastic: str, stable: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The tensors of two adapters, name by name.

    Raises:
        SkillError: an adapter matches nothing, or the two differ in names or shapes; the text has the first difference.
    """
    ours, theirs = adapter_tensors(model, plastic), adapter_tensors(model, stable)
    for name in dict.fromkeys([*ours, *theirs]):
        shapes = [list(t[name].shape) if name in t else "lacking" for t in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise SkillError(
                f"{name} is {shapes[0]} in the adapter {plastic!r}, {shapes[1]} in {stable!r}; both need the same rank "
                f"and targets: delete_adapter({stable!r}), or name another adapter"
            )
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and scaling.get(plastic) != scaling.get(stable):
            raise SkillError(
                f"adapter {plastic!r} is scaled by {scaling.get(plastic)}, {stable!r} by {scaling.get(stable)}; both "
                "need the same lora_alpha"
            )
    return list(ours.values()), [theirs[name] for name in ours]


def add_copy(model: Any, source: str, name: str) -> None:
    """Add an untrained copy of another adapter, with its options and tensors. Everything else keeps its `requires_grad`
    and its mode, and no random number is drawn.

    Raises:
        SkillError: the source does not exist, or has an option, which the text names, that a model can hold only once.
    """
    if source not in model.peft_config:
        known = list(model.peft_config)
        near = nearest(source, known) if known else None
        raise SkillError(f"no adapter {source!r}; the model has {', '.join(known)}; did you mean {near!r}?")
    config = copy.deepcopy(model.peft_config[source])
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise SkillError(f"adapter {source!r} is {kind}, expected LORA")
    for option, plain in (("bias", ("none", None)), ("layer_replication", (None,))):
        if getattr(config, option, None) not in plain:
            raise SkillError(
                f"adapter {source!r} has {option}={getattr(config, option)!r}, which two adapters of one model would "
                f"share; make it with {option}={plain[0]!r}"
            )
    config.inference_mode = False  # peft would freeze the trained adapter along with this one
    config.init_lora_weights = True  # other kinds compute a start, and some change the base for it; here a copy follows
    adapter_tensors(model, source)  # raises if there is nothing to copy, before anything is added
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modules = set(model.modules())
    devices = {p.device.index or 0 for p, _ in flags if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            model.add_adapter(name, config)
    except ValueError as error:
        raise SkillError(f"peft cannot hold a second adapter in addition to {source!r}: {error}") from error
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for module in set(model.modules()) - modules:
            module.training = model.training
    config.init_lora_weights = model.peft_config[source].init_lora_weights  # as saved: it records how the base changed
    ours, theirs = pairs(model, source, name)
    copied = adapter_buffers(model, source)
    with torch.no_grad():
        for ours_, theirs_ in zip(ours, theirs, strict=True):
            theirs_.requires_grad_(False).copy_(ours_)
        for key, b in adapter_buffers(model, name).items():
            b.copy_(copied[key])


@contextlib.contextmanager
def using(model: Any, adapter: str, *, evaluate: bool = False) -> Iterator[None]:
    """Inside, the model computes with this adapter. Afterwards, even after an exception, the active adapter, every
    `requires_grad` and every module's mode are as before. (peft's `set_adapter` also makes the activated adapter
    trainable and freezes all others.)

    Args:
        evaluate: compute in evaluation mode: without dropout and its random numbers, and without moving running
            statistics.

    Raises:
        SkillError: the model has no such adapter (or no longer).
    """
    if adapter not in model.peft_config:
        raise SkillError(f"no adapter {adapter!r}; the model has {', '.join(model.peft_config)}")
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()] if evaluate else []
    active, inner = model.active_adapter, model.base_model.active_adapter  # peft stores it twice
    same = active == adapter and inner in (adapter, [adapter])
    try:
        if not same:
            model.set_adapter(adapter)
            for p, flag in flags:
                p.requires_grad_(flag)
        if evaluate:
            model.eval()
        yield
    finally:
        if not same:
            model.base_model.set_adapter(inner)
            model.active_adapter = active
            for p, flag in flags:
                p.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
