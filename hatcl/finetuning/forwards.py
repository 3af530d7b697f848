"""Forwards that give logits `[B, C]`, put in the place of a model's own on a copy of it. Its parameters keep their
names, so that task vectors and grafts fit the model as its maker loads it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..continual.label_words import LabelWords
from ..errors import ConfigError

HEAD = "head"  # the name of a new head
# besides nn.Embedding: modules and parameters that are the input's, with what stands in them (BERT's norm)
INPUT = ("embeddings", "patch_embed", "pos_embed", "cls_token", "reg_token", "dist_token")


class Own:
    """A model with its class's own forward. An object, not a function, so that copies of the model refer to
    themselves."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        return type(self.model).forward(self.model, *args, **inputs)

    def parameters(self) -> Any:
        return self.model.parameters()


class HeadForward(Own):
    """The head's logits of the hidden state at each example's place."""

    def __call__(self, *args: Any, place: Tensor, **inputs: Any) -> Tensor:
        hidden = getattr(super().__call__(*args, **inputs), "last_hidden_state", None)
        if hidden is None:
            raise ConfigError(
                f"{type(self.model).__name__} gives no last_hidden_state; mode finetune needs a bare encoder or "
                "decoder (transformers' AutoModel)"
            )
        rows = torch.arange(len(place), device=place.device)
        found: Tensor = self.model.get_submodule(HEAD)(hidden[rows, place])
        return found


class WordForward(Own):
    """The language model's logits of the label words at each example's place.

    The model's head sees the hidden state of this one place: logits of all places, times the vocabulary, would cost
    more than the rest of a small model. Where a model has no base model of its own inside, it gives all.
    """

    def __init__(self, model: nn.Module, words: list[int]) -> None:
        super().__init__(model)
        self.words = torch.tensor(words)

    def __call__(self, *args: Any, place: Tensor, **inputs: Any) -> Tensor:
        rows = torch.arange(len(place), device=place.device)
        base: Any = getattr(self.model, "base_model", self.model)
        if base is self.model:
            found: Tensor = super().__call__(*args, **inputs).logits[rows, place]
            return found[:, self.words.to(found.device)]

        def pick(module: nn.Module, args: Any, output: Any) -> Any:
            at = output[0][rows, place].unsqueeze(1)
            if isinstance(output, tuple):
                return at, *output[1:]
            output[next(iter(output.keys()))] = at
            return output

        with base.register_forward_hook(pick):
            found = super().__call__(*args, **inputs).logits[:, 0]
        return found[:, self.words.to(found.device)]


class CosineForward(Own):
    """Cosines of a text with its labels' words, as in `hatcl.continual.label_words`."""

    def __init__(self, model: nn.Module, head: LabelWords) -> None:
        super().__init__(model)
        self.head = head

    def __call__(self, *args: Any, **inputs: Any) -> Tensor:
        own: Any = Own(self.model)
        return self.head.logits(own, inputs)


def open_copy(model: nn.Module) -> nn.Module:
    """A copy whose forward may be replaced.

    Raises:
        ConfigError: a model whose forward was replaced already; its class's own would be used.
    """
    if "forward" in vars(model):
        raise ConfigError(
            f"{type(model).__name__}: its forward was replaced on the instance (a task's model, or "
            "hatcl.atlas.encoder); pass the model as it was loaded"
        )
    return copy.deepcopy(model)


def with_forward(model: nn.Module, forward: Any) -> nn.Module:
    """The model itself, which answers with this forward from now on."""
    model.forward = forward
    return model


def embedding_names(model: nn.Module) -> tuple[str, ...]:
    """The parameters that are embeddings, by their first names: tables, and all of what is called so, with its norm."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return tuple(
        n for n, p in model.named_parameters() if id(p) in tables or any(part in INPUT for part in n.split("."))
    )


def language_head_names(model: nn.Module) -> tuple[str, ...]:
    """The parameters of a language model's head, by their first names: all outside the base model, and its output
    embeddings, also where they are tied to the input's."""
    base = getattr(model, "base_model", model)
    inside = set() if base is model else {id(p) for p in base.parameters()}
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    own = {id(p) for p in output.parameters()} if isinstance(output, nn.Module) else set()
    return tuple(n for n, p in model.named_parameters() if id(p) in own or (inside and id(p) not in inside))
