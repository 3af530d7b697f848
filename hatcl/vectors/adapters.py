"""Task vectors of peft's LoRA adapters: per layer the exact product `scaling * B A`, so that sums of adapters have no
cross terms. peft's `add_weighted_adapter(combination_type="linear")` adds the factors instead."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IntegrityError, VectorError
from ..files import read_json
from .delta import Delta, delta_between
from .tensors import Kind, Lazy, kinds_of, named_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# starts of A and B that leave the base's weights as they are; others (PiSSA, OLoRA, ...) take something out of them
KEEP_THE_BASE = ("gaussian", "eva", "orthogonal")
MERGE = "merge it into its base first (peft's merge_and_unload) and pass that model"

NO_PRODUCT = "{} is a convolution with groups, whose LoRA is no product of two matrices; leave it out of target_modules"


def is_adapter(source: Any) -> bool:
    """Is this a model with peft adapters, or the folder of an adapter?"""
    if isinstance(source, nn.Module):
        return bool(getattr(source, "peft_config", None))
    return isinstance(source, (str, os.PathLike)) and (Path(source) / CONFIG).is_file()


def lora_deltas(source: Any, base: Mapping[str, Tensor] | None, model: nn.Module | None = None) -> Mapping[str, Any]:
    """What the active LoRA adapter adds, under the base model's names.

    Args:
        base: the base's parameters, for modules that were trained in full beside the adapter (`modules_to_save`).
        model: the base as a module, where there is one: its layers tell how they hold their weights.

    Raises:
        VectorError: another kind of adapter than LoRA, or one whose change is no sum (DoRA), by name.
    """
    return _of_model(source) if isinstance(source, nn.Module) else _of_folder(Path(source), base, model)


def _refuse(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise VectorError(f"the adapter is {config.get('peft_type')}, expected LORA; {MERGE}")
    for option, why in (
        ("use_dora", "DoRA rescales the base's weights, which is no sum"),
        ("lora_bias", "it has biases of its own"),
        ("target_parameters", "it changes parameters instead of layers"),
        ("trainable_token_indices", "it changes single tokens"),
        ("use_qalora", "QALoRA pools the inputs"),
        ("megatron_config", "it is split across devices"),
        ("use_bdlora", "it is split across devices"),
        ("alora_invocation_tokens", "it acts on some tokens only"),
        ("arrow_config", "it chooses among adapters per token"),
        ("monteclora_config", "it draws its weights at random"),
        ("kasa_config", "it has singular values of its own and cuts those of the base"),
        ("layer_replication", "its layers are copies of the base's"),
    ):
        if config.get(option):
            raise VectorError(f"the adapter has {option}: {why}; {MERGE}")
    if config.get("bias") not in (None, "none"):
        raise VectorError(f"the adapter has bias={config['bias']!r}, biases trained beside it; {MERGE}")
    start = config.get("init_lora_weights", True)
    if not (start is None or isinstance(start, bool) or start in KEEP_THE_BASE):
        raise VectorError(
            f"the adapter has init_lora_weights={start!r}, which changes the base's weights before training; save it "
            f"with peft's path_initial_model_for_weight_conversion, or {MERGE}"
        )


def _of_model(model: Any) -> dict[str, Any]:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    of_peft = isinstance(model, PeftModel)
    active = model.active_adapters if of_peft else model.active_adapters()  # transformers' own add_adapter
    if len(active) != 1:
        raise VectorError(f"{len(active)} adapters are active ({', '.join(active)}), expected one; call set_adapter")
    adapter = active[0]
    _refuse({**model.peft_config[adapter].to_dict(), "peft_type": model.peft_config[adapter].peft_type.value})
    out: dict[str, Tensor | Delta] = {}
    for path, module in (model.base_model.model if of_peft else model).named_modules():
        path = path.replace(".base_layer", "")
        if isinstance(module, LoraLayer) and adapter in module.scaling:
            if module.merged:
                raise VectorError(f"{path}: the adapter is merged into its base; call unmerge_adapter() first")
            if isinstance(module.get_base_layer(), nn.MultiheadAttention):
                raise VectorError(f"{path} is a MultiheadAttention, whose LoRA has no weight of its own; {MERGE}")
            if getattr(module.get_base_layer(), "groups", 1) > 1:
                raise VectorError(NO_PRODUCT.format(path))
            embedding = adapter in module.lora_embedding_A
            a, b = (
                (module.lora_embedding_A[adapter], module.lora_embedding_B[adapter])
                if embedding
                else (module.lora_A[adapter].weight, module.lora_B[adapter].weight)
            )
            turned = embedding or getattr(module, "fan_in_fan_out", False)
            out[f"{path}.weight"] = _product(a.detach(), b.detach(), module.scaling[adapter], turned)
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            for name, p in module.modules_to_save[adapter].named_parameters():
                out[f"{path}.{name}"] = delta_between(module.original_module.get_parameter(name).detach(), p.detach())
    return out


def _of_folder(folder: Path, base: Mapping[str, Tensor] | None, model: nn.Module | None) -> Lazy[Any]:
    config = read_json(folder / CONFIG)
    _refuse(config)
    tensors = named_tensors(folder / WEIGHTS)
    stored = kinds_of(tensors)
    pairs: dict[str, tuple[str, str]] = {}  # the layer's weight -> the names of its A and B
    full: dict[str, str] = {}
    for key in stored:
        name = key.removeprefix("base_model.model.")
        for a, b in ((".lora_A", ".lora_B"), (".lora_embedding_A", ".lora_embedding_B")):
            if name.endswith((f"{a}.weight", a)):
                pairs[name.removesuffix(".weight").removesuffix(a) + ".weight"] = (key, key.replace(a, b))
                break
        else:
            if ".lora_" not in name:
                full[name] = key
    # copies of targeted embeddings, which peft saves beside the pairs without having trained them
    full = {n: key for n, key in full.items() if n.replace(".base_layer", "") not in pairs}
    lost = [key for pair in pairs.values() for key in pair if key not in stored]
    lost += [n for n in full if base is not None and n not in base]
    if lost or not stored:
        raise IntegrityError(f"{folder}: lacks {lost[0] if lost else 'its tensors'}; save the adapter again")
    if full and base is None:
        raise VectorError(
            f"the adapter holds {next(iter(full))}, trained in full; pass the pretrained model it started from"
        )
    grouped = [n for n, (a, b) in pairs.items() if "embedding_A" not in a and stored[b].shape[1] != stored[a].shape[0]]
    if grouped:
        raise VectorError(NO_PRODUCT.format(grouped[0].removesuffix(".weight")))
    turned = _turned(pairs, stored, kinds_of(base or {}), model, bool(config.get("fan_in_fan_out")))

    def read(name: str) -> Tensor | Delta:
        if name in full:
            assert base is not None
            return delta_between(base[name], tensors[full[name]])
        a, b = (tensors[key] for key in pairs[name])
        return _product(a, b, _scaling(config, name.removesuffix(".weight")), turned[name])

    kinds = {n: Kind(_shape(stored[a].shape, stored[b].shape, turned[n]), torch.float32) for n, (a, b) in pairs.items()}
    kinds |= {n: Kind(stored[key].shape, torch.float32) for n, key in full.items()}
    return Lazy(kinds, read)


def _product(a: Tensor, b: Tensor, scaling: float, turned: bool) -> Tensor:
    """`scaling * B A` as a weight `[out, in, ...]` (`[in, out]` if turned), of A `[rank, in, ...]` and B `[out, rank]`
    (`[out, rank, 1, ...]` for convolutions), in float32."""
    product = (b.float().flatten(1) @ a.float().flatten(1)) * scaling
    return product.T.contiguous() if turned else product.view(b.shape[0], *a.shape[1:])


def _scaling(config: Mapping[str, Any], path: str) -> float:
    from peft.utils.other import get_pattern_key

    def of(patterns: Mapping[str, Any], default: float) -> float:
        return float(patterns.get(get_pattern_key(list(patterns), path), default))

    rank = of(config.get("rank_pattern") or {}, config["r"])
    alpha = of(config.get("alpha_pattern") or {}, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _turned(
    pairs: Mapping[str, tuple[str, str]],
    stored: Mapping[str, Kind],
    base: Mapping[str, Kind],
    model: nn.Module | None,
    flag: bool,
) -> dict[str, bool]:
    """Whether a layer holds its weight as [in, out]: embeddings do, and layers such as GPT-2's Conv1D. The adapter's
    config has one flag for all layers, and peft sets it to the last one's; so the base's layers go first, then its
    shapes. (From files alone, a square layer is taken to be as the others are.)

    Raises:
        VectorError: layers of both kinds, and a square one among them.
    """
    if model is not None:
        straight_ones = (nn.Linear, nn.modules.conv._ConvNd)
        layers = dict(model.named_modules())
        return {n: not isinstance(layers.get(n.removesuffix(".weight")), straight_ones) for n in pairs}
    out, differs = {}, False
    for name, (a, b) in pairs.items():
        straight, turned = (_shape(stored[a].shape, stored[b].shape, t) for t in (False, True))
        if "lora_embedding_A" in a:
            out[name] = True
        elif name in base and straight != turned and base[name].shape in (straight, turned):
            out[name] = base[name].shape == turned
            differs = differs or out[name] != flag
        else:
            out[name] = flag and len(stored[a].shape) == 2
    square = [n for n, (a, b) in pairs.items() if stored[a].shape[1:] == stored[b].shape[:1] and "embedding" not in a]
    if differs and square:
        raise VectorError(
            f"the adapter is on layers that hold [out, in] and on others that hold [in, out]; its folder does not tell "
            f"which {square[0]} is. Pass the pretrained model as a module"
        )
    return out


def _shape(a: tuple[int, ...], b: tuple[int, ...], turned: bool) -> tuple[int, ...]:
    return (*a[1:], b[0]) if turned else (b[0], *a[1:])
