"""Task vectors of peft's LoRA adapters: per layer the exact product `scaling * B A`, so that sums of adapters have no
cross terms. peft's `add_weighted_adapter(combination_type="linear")` adds the factors instead."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IntegrityError, VectorError
from ..files import read_json
from ..map.lora import PARTNER, factor_in
from .delta import Delta, delta_between
from .pairing import grew, with_rows_of
from .tensors import RUNNING, Kind, Lazy, kinds_of, named_tensors, tied_names
from .ties import LOOKUPS, joined_ties, refuse_unknown_tie, tied_in

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# starts of A and B that leave the base's weights as they are; others (PiSSA, OLoRA, ...) subtract from them
KEEP_THE_BASE = ("gaussian", "eva", "orthogonal")
MERGE = "merge it into its base first (peft's merge_and_unload) and pass that model"

NO_PRODUCT = "{} is a grouped convolution, whose LoRA is not a product of two matrices; leave it out of target_modules"


@dataclass(frozen=True)
class LoraPair:
    """One layer's factors.

    Attributes:
        a, b: their shapes. read: returns them. lookup: whether they belong to an embedding. turned: whether the layer
            holds its weight as [in, out].
    """

    a: tuple[int, ...]
    b: tuple[int, ...]
    read: Callable[[], tuple[Tensor, Tensor]]
    scaling: float
    lookup: bool
    turned: bool = False

    def shape(self, turned: bool) -> tuple[int, ...]:
        return (*self.a[1:], self.b[0]) if turned else (self.b[0], *self.a[1:])

    def same(self, other: LoraPair) -> bool:
        """Whether it is the same product, even if the layers hold their weights in different ways."""
        (a, b), (c, d) = self.read(), other.read()
        if self.turned != other.turned:
            c, d = d.T, c.T
        return self.scaling == other.scaling and torch.equal(a, c) and torch.equal(b, d)


@dataclass(frozen=True)
class Full:
    """A tensor that was trained fully in addition to the pairs, or a copy that peft saved with them.

    Attributes:
        read: returns it. start: its value before training, if the adapter's model knows it.
    """

    kind: Kind
    read: Callable[[], Tensor]
    start: Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """The changes of a LoRA adapter, under the base model's names.

    Attributes:
        tied: names that share a tensor in the model that it was trained on; None = unknown from its files. together:
            whether it keeps these ties. lazy: whether it is read on demand.
    """

    pairs: Mapping[str, LoraPair]
    full: Mapping[str, Full]
    tied: Mapping[str, str] | None
    together: bool
    lazy: bool


def is_adapter(source: Any) -> bool:
    """Whether this is a model with peft adapters, or the folder of an adapter."""
    if isinstance(source, nn.Module):
        return bool(getattr(source, "peft_config", None))
    return isinstance(source, (str, os.PathLike)) and (Path(source) / CONFIG).is_file()


def lora_deltas(
    source: Any, base: Mapping[str, Tensor] | None, pretrained: Any = None, embeddings: str = "equal"
) -> Mapping[str, Any]:
    """The tensors that the active LoRA adapter adds, under the base model's names.

    Args:
        base: the base's parameters, for modules that were fully trained in addition to the adapter (`modules_to_save`).
        pretrained: their source. A module also shows how its layers hold their weights, and which layers share one.
        embeddings: see `paired`, for tables with added tokens.

    Raises:
        VectorError: the adapter is not LoRA, or its change is not a sum (DoRA); a layer is tied to another that the
            adapter does not change; or a vocabulary has another size.
    """
    found = _of_model(source) if isinstance(source, nn.Module) else _of_folder(Path(source), base, pretrained)
    known = None if base is None else kinds_of(base)
    changes: dict[str, LoraPair | Full] = {**found.pairs, **found.full}

    def same(a: str, b: str) -> bool:
        x, y = changes[a], changes[b]
        if isinstance(x, Full) and isinstance(y, Full):
            return torch.equal(x.read(), y.read())
        return isinstance(x, LoraPair) and isinstance(y, LoraPair) and x.same(y)

    names = joined_ties(list(changes), _ties(found, known, pretrained), same, found.together)
    names = _without_tied_copies(names, changes, known, same)
    if found.tied is None and not isinstance(pretrained, nn.Module):
        beside = {**(known or {}), **{n: _kind_of(c) for n, c in changes.items()}}
        for name in names.values():
            change = changes[name]
            if change.lookup if isinstance(change, LoraPair) else not set(LOOKUPS).isdisjoint(name.split(".")):
                refuse_unknown_tie(name, _kind_of(change).shape, beside, pretrained)
    unknown = [] if known is None else [n for n in names if n not in known]
    if unknown:
        shape = _kind_of(changes[names[unknown[0]]]).shape
        twin = next((n for n, k in (known or {}).items() if k.shape == shape and len(shape) == 2), None)
        may = f" (it may be tied to {twin} there)" if twin else ""
        raise VectorError(
            f"the adapter changes {unknown[0]}, which the pretrained model lacks{may} ({len(unknown)} such tensors); "
            "pass the model that the adapter was trained on"
        )
    kinds = {n: _kind_in_base(n, changes[s], known, embeddings) for n, s in names.items()}

    def read(name: str) -> Tensor | Delta:
        change = changes[names[name]]
        if isinstance(change, LoraPair):
            return _product(*change.read(), change.scaling, change.turned)
        start = change.start if base is None else base[name]
        assert start is not None
        now = change.read()
        return delta_between(start, now if now.shape == start.shape else with_rows_of(start, now))

    return Lazy(kinds, read) if found.lazy else {name: read(name) for name in kinds}


def _ties(found: Adapter, known: Mapping[str, Kind] | None, pretrained: Any) -> Mapping[str, str]:
    """The names that share a tensor: in the pretrained model, or, if that lacks the name, in the adapter's own."""
    tied = tied_names(pretrained)
    if found.tied is None or isinstance(pretrained, nn.Module):
        return tied
    own = {n: first for n, first in found.tied.items() if known is None or n == first or n not in known}
    return {**own, **tied}


def _without_tied_copies(
    names: Mapping[str, str],
    changes: Mapping[str, LoraPair | Full],
    known: Mapping[str, Kind] | None,
    same: Callable[[str, str], bool],
) -> dict[str, str]:
    """Without a tensor that the base's files do not hold and that is an equal copy of another: a tied head."""
    if known is None:
        return dict(names)
    there = [n for n in names if n in known]
    return {n: s for n, s in names.items() if n in known or not any(same(names[m], s) for m in there)}


def _kind_of(change: LoraPair | Full) -> Kind:
    return change.kind if isinstance(change, Full) else Kind(change.shape(change.turned), torch.float32)


def _kind_in_base(name: str, change: LoraPair | Full, known: Mapping[str, Kind] | None, embeddings: str) -> Kind:
    """Raise `VectorError` if the base has another shape there."""
    kind = _kind_of(change)
    ours = kind if known is None else known[name]
    if isinstance(change, Full):
        kind = kind._replace(dtype=torch.promote_types(torch.promote_types(kind.dtype, ours.dtype), torch.float32))
    if ours.shape == kind.shape:
        return kind
    text = f"{name} is {list(ours.shape)} in the pretrained model, {list(kind.shape)} in the adapter"
    if ours.shape[1:] != kind.shape[1:]:
        raise VectorError(f"{text}; pass the model that the adapter was trained on")
    if embeddings != "common" or isinstance(change, LoraPair):
        raise VectorError(f"{text}: {grew(ours.shape[0], kind.shape[0])}")
    return Kind(ours.shape, kind.dtype)


def _refuse(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise VectorError(f"the adapter is {config.get('peft_type')}, expected LORA; {MERGE}")
    for option, why in (
        ("use_dora", "DoRA rescales the base's weights, which is not a sum"),
        ("lora_bias", "it has its own biases"),
        ("target_parameters", "it changes parameters instead of layers"),
        ("trainable_token_indices", "it changes single tokens"),
        ("use_qalora", "QALoRA pools the inputs"),
        ("megatron_config", "it is split across devices"),
        ("use_bdlora", "it is split across devices"),
        ("alora_invocation_tokens", "it acts on some tokens only"),
        ("arrow_config", "it chooses among adapters per token"),
        ("monteclora_config", "it draws its weights at random"),
        ("kasa_config", "it has its own singular values and cuts those of the base"),
        ("layer_replication", "its layers are copies of the base's"),
    ):
        if config.get(option):
            raise VectorError(f"the adapter has {option}: {why}; {MERGE}")
    if config.get("bias") not in (None, "none"):
        raise VectorError(f"the adapter has bias={config['bias']!r}, biases trained in addition; {MERGE}")
    start = config.get("init_lora_weights", True)
    if not (start is None or isinstance(start, bool) or start in KEEP_THE_BASE):
        raise VectorError(
            f"the adapter has init_lora_weights={start!r}, which changes the base's weights before training; save it "
            f"with peft's path_initial_model_for_weight_conversion, or {MERGE}"
        )


def _of_model(model: Any) -> Adapter:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    of_peft = isinstance(model, PeftModel)
    active = model.active_adapters if of_peft else model.active_adapters()  # transformers' own add_adapter
    if len(active) != 1:
        raise VectorError(f"{len(active)} adapters are active ({', '.join(active)}), expected one; call set_adapter")
    adapter = active[0]
    _refuse({**model.peft_config[adapter].to_dict(), "peft_type": model.peft_config[adapter].peft_type.value})
    pairs: dict[str, LoraPair] = {}
    full: dict[str, Full] = {}
    inner = model.base_model.model if of_peft else model
    for path, module in inner.named_modules():
        path = path.replace(".base_layer", "")
        if isinstance(module, LoraLayer) and adapter in module.scaling:
            if module.merged:
                raise VectorError(f"{path}: the adapter is merged into its base; call unmerge_adapter() first")
            if isinstance(module.get_base_layer(), nn.MultiheadAttention):
                raise VectorError(f"{path} is a MultiheadAttention, whose LoRA has no weight of its own; {MERGE}")
            if getattr(module.get_base_layer(), "groups", 1) > 1:
                raise VectorError(NO_PRODUCT.format(path))
            lookup = adapter in module.lora_embedding_A
            a, b = (
                (module.lora_embedding_A[adapter], module.lora_embedding_B[adapter])
                if lookup
                else (module.lora_A[adapter].weight, module.lora_B[adapter].weight)
            )
            _refuse_empty(path, a, b)
            turned = lookup or getattr(module, "fan_in_fan_out", False)
            read = functools.partial(_given, (a.detach(), b.detach()))
            shapes = tuple(a.shape), tuple(b.shape)
            pairs[f"{path}.weight"] = LoraPair(*shapes, read, module.scaling[adapter], lookup, turned)
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            for name, p in module.modules_to_save[adapter].named_parameters():
                _refuse_empty(f"{path}.{name}", p)
                start, now = module.original_module.get_parameter(name).detach(), p.detach()
                full[f"{path}.{name}"] = Full(Kind(tuple(now.shape), now.dtype), functools.partial(_given, now), start)
    return Adapter(pairs, full, tied_in(inner), _together(model.peft_config[adapter].to_dict()), lazy=False)


def _together(config: Mapping[str, Any]) -> bool:
    return bool(config.get("ensure_weight_tying"))


def _refuse_empty(name: str, *tensors: Any) -> None:
    if any(not all(t.shape) for t in tensors):
        raise VectorError(
            f"{name}: the adapter's tensors are empty; under DeepSpeed's ZeRO-3 each process holds a part. Save it "
            "with the gathered state dict: save_pretrained(folder, state_dict=accelerator.get_state_dict(model))"
        )


def _of_folder(folder: Path, base: Mapping[str, Tensor] | None, pretrained: Any) -> Adapter:
    config = read_json(folder / CONFIG)
    _refuse(config)
    tensors = named_tensors(folder / WEIGHTS)
    stored = kinds_of(tensors)
    keys: dict[str, tuple[str, str]] = {}  # the layer's weight -> the names of its A and B
    full: dict[str, str] = {}
    adapters: set[str] = set()
    for key, kind in stored.items():
        parts = key.removeprefix("base_model.model.").split(".")
        at = factor_in(parts)
        _refuse_empty(key, kind)
        if at is not None:
            adapters.add(".".join(p for p in parts[at + 1 :] if p != "weight") or "the plain names")
            first = next((f for f, second in PARTNER.items() if parts[at] in (f, second)))
            start = key.removesuffix(".".join(parts[at:]))
            ends = ".".join(["", *parts[at + 1 :]]).rstrip(".")
            keys[".".join(parts[:at]) + ".weight"] = (start + first + ends, start + PARTNER[first] + ends)
        elif any(p.startswith("lora_") for p in parts):
            raise VectorError(f"{folder} holds {key}, which is not a factor of a plain LoRA; {MERGE}")
        elif "original_module" not in parts:  # the module before training, which the base has
            name = ".".join(p for p in parts if p != "modules_to_save")
            full[name] = key
    if len(adapters) > 1:
        raise VectorError(
            f"{folder}: its keys belong to {len(adapters)} adapters ({', '.join(sorted(adapters))}); save one of "
            "them with "
            "model.save_pretrained(folder, selected_adapters=[name])"
        )
    # copies of targeted embeddings, which peft saves next to the pairs without having trained them, and counters
    full = {n: key for n, key in full.items() if n.replace(".base_layer", "") not in keys}
    full = {n: key for n, key in full.items() if n.rpartition(".")[2] not in RUNNING or n in (base or {})}
    lost = [key for pair in keys.values() for key in pair if key not in stored]
    if lost or not stored:
        raise IntegrityError(f"{folder}: lacks {lost[0] if lost else 'its tensors'}; save the adapter again")
    if full and base is None:
        raise VectorError(
            f"the adapter holds the fully trained {next(iter(full))}; pass the pretrained model it started from"
        )
    pairs = {
        name: LoraPair(
            stored[a].shape, stored[b].shape, functools.partial(_factors, tensors, a, b),
            _scaling(config, name.removesuffix(".weight"), stored[a].shape[0]), "lora_embedding_A" in a,
        )
        for name, (a, b) in keys.items()
    }  # fmt: skip
    grouped = [n for n, pair in pairs.items() if not pair.lookup and pair.b[1] != pair.a[0]]
    if grouped:
        raise VectorError(NO_PRODUCT.format(grouped[0].removesuffix(".weight")))
    model = pretrained if isinstance(pretrained, nn.Module) else None
    turned = _turned(pairs, kinds_of(base or {}), model, bool(config.get("fan_in_fan_out")))
    return Adapter(
        {n: replace(pair, turned=turned[n]) for n, pair in pairs.items()},
        {n: Full(stored[key], functools.partial(tensors.__getitem__, key)) for n, key in full.items()},
        None, _together(config), lazy=True,
    )  # fmt: skip


def _given(x: Any) -> Any:
    return x


def _factors(tensors: Mapping[str, Tensor], a: str, b: str) -> tuple[Tensor, Tensor]:
    return tensors[a], tensors[b]


def _product(a: Tensor, b: Tensor, scaling: float, turned: bool) -> Tensor:
    """`scaling * B A` as a weight `[out, in, ...]` (`[in, out]` if turned), of A `[rank, in, ...]` and B `[out, rank]`
    (`[out, rank, 1, ...]` for convolutions), in float32."""
    product = (b.float().flatten(1) @ a.float().flatten(1)) * scaling
    return product.T.contiguous() if turned else product.view(b.shape[0], *a.shape[1:])


def _scaling(config: Mapping[str, Any], path: str, stored: int) -> float:
    from peft.utils.other import get_pattern_key

    def of(patterns: Mapping[str, Any], default: Any) -> Any:
        return patterns.get(get_pattern_key(list(patterns), path), default)

    rank = of(config.get("rank_pattern") or {}, config.get("r"))
    alpha = of(config.get("alpha_pattern") or {}, config.get("lora_alpha"))
    if rank != stored or isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise IntegrityError(
            f"{path}: its factors have the rank {stored}, but {CONFIG} says rank {rank!r} and alpha {alpha!r}; the "
            "two files do not belong together, save the adapter again"
        )
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _turned(
    pairs: Mapping[str, LoraPair], base: Mapping[str, Kind], model: nn.Module | None, flag: bool
) -> dict[str, bool]:
    """Whether a layer holds its weight as [in, out]: embeddings do, and layers such as GPT-2's Conv1D. The adapter's
    config has one flag for all layers, which peft sets to the last one's; so the base's layers decide first, then
    shapes, and for a square layer the biases of its namesakes and neighbours.

    Raises:
        VectorError: there are layers of both kinds, and a square one that nothing decides.
    """
    if model is not None:
        straight_ones = (nn.Linear, nn.modules.conv._ConvNd)
        layers = dict(model.named_modules())
        return {n: not isinstance(layers.get(n.removesuffix(".weight")), straight_ones) for n in pairs}
    out: dict[str, bool] = {}
    differs, square = False, []
    for name, pair in pairs.items():
        straight, turned = pair.shape(False), pair.shape(True)
        if pair.lookup:
            out[name] = True
        elif name in base and straight != turned and base[name].shape in (straight, turned):
            out[name] = base[name].shape == turned
            differs = differs or out[name] != flag
        elif len(pair.a) == 2 and (told := _turned_near(name, base)) is not None:
            out[name] = told
        else:
            out[name] = flag and len(pair.a) == 2
            square += [name] * (straight == turned)
    if differs and square:
        raise VectorError(
            "the adapter is on layers that hold [out, in] and on others that hold [in, out]; its folder does not "
            f"show which kind {square[0]} is. Pass the pretrained model as a module"
        )
    return out


def _turned_near(name: str, base: Mapping[str, Kind]) -> bool | None:
    """How the layers that are called as this one (`h.0.mlp.c_proj` and `h.0.attn.c_proj`), or else its neighbours,
    hold their weights: a bias has the length of a layer's outputs. None if no layer shows it."""
    layer = name.removesuffix(".weight")
    place, _, own = layer.rpartition(".")
    called, near = set(), set()
    for other, kind in base.items():
        path = other.removesuffix(".weight")
        bias = base.get(f"{path}.bias")
        if path == other or bias is None or len(kind.shape) != 2 or kind.shape[0] == kind.shape[1]:
            continue
        if len(bias.shape) == 1 and bias.shape[0] in kind.shape:
            turned = bias.shape[0] == kind.shape[1]
            called |= {turned} if path.rpartition(".")[2] == own else set()
            near |= {turned} if path.rpartition(".")[0] == place else set()
    return next((next(iter(told)) for told in (called, near) if len(told) == 1), None)
