"""Adapters and tied tensors. An adapter on one of several layers that share a tensor changes only that layer; a task
vector changes the tensor and therefore all of the layers. If the two differ, the adapter is refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from ..errors import VectorError
from .parameters import configuration_of
from .tensors import Kind, tied_names

LOOKUPS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared", "embeddings")
HEADED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining", "LMModel")
UNTIE = (
    "untie them in a copy of the base (in transformers: config.tie_word_embeddings=False, and the head's weight a "
    "clone), and take the vector from that, or leave the layer out of the adapter"
)


def tied_in(model: nn.Module) -> dict[str, str]:
    """`tied_names` of the model that a peft model wraps, under that model's own names."""
    out: dict[str, str] = {}
    firsts: dict[str, str] = {}
    for name, first in tied_names(model).items():
        parts = [p for p in name.split(".") if p not in ("base_layer", "original_module")]
        if not any(p.startswith("lora_") or p == "modules_to_save" for p in parts):
            plain = ".".join(parts)
            out[plain] = firsts.setdefault(first, plain)
    return out


def joined_ties(
    changed: Collection[str], tied: Mapping[str, str], same: Callable[[str, str], bool], together: bool
) -> dict[str, str]:
    """The tensors that an adapter changes, each tied one once: its name in the base -> a name in the adapter.

    Args:
        tied: name in the base -> the first name of the shared tensor. same: whether the adapter changes two of them in
            the same way. together: whether the adapter's configuration says that it keeps the ties.

    Raises:
        VectorError: the adapter changes only some of several tied tensors, or changes them in different ways.
    """
    members: dict[str, list[str]] = {}
    for name, first in tied.items():
        members.setdefault(first, []).append(name)
    out: dict[str, str] = {}
    for name in changed:
        every = members.get(tied.get(name, name), [name])
        here = [n for n in every if n in changed]
        rest = [n for n in every if n not in changed]
        if rest and not together:
            raise VectorError(
                f"the adapter changes {name} but not {rest[0]}; in the pretrained model the two are tied, so a task "
                f"vector would change both: {UNTIE}"
            )
        other = next((n for n in here[1:] if not same(here[0], n)), None)
        if other is not None:
            raise VectorError(
                f"the adapter changes {here[0]} and {other} in different ways; in the pretrained model {other} is tied "
                f"to {here[0]}: {UNTIE}"
            )
        out.setdefault(tied.get(name, name), here[0])
    return out


def refuse_unknown_tie(name: str, shape: tuple[int, ...], base: Mapping[str, Kind], pretrained: Any) -> None:
    """Raise if files do not show whether an adapter's table is tied to a head but it may be. Files hold tied tensors
    once, under one name.

    Args:
        base: the pretrained model's tensors, with those that the adapter changes. pretrained: their source.
    """
    if len(shape) != 2 or any(n != name and k.shape == shape for n, k in base.items()):
        return  # there is a separate head
    config = configuration_of(pretrained)
    config = {**config, **(config.get("text_config") or {})}
    says, built, size = config.get("tie_word_embeddings"), config.get("architectures"), config.get("vocab_size")
    if says is False or (size is not None and size != shape[0]):
        return
    if built and not any(str(a).endswith(HEADED) for a in built):
        return
    why = "its config.json says that they are tied" if says else "files do not show whether they are tied"
    there = (
        "no pretrained model is given"
        if pretrained is None
        else "the pretrained model's files hold no head in addition"
    )
    raise VectorError(
        f"the adapter changes {name}, and {there}; {why}, and a task vector would "
        f"change the head too. Pass the pretrained model as a module where no head is tied, or {UNTIE}"
    )
