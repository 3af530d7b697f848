"""Forwards that return logits `[B, C]`, which replace a model's own on a copy of it. Its parameters keep their names,
so that task vectors and grafts fit the model as its library loads it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..continual.label_words import LabelWords
from ..errors import ConfigError

HEAD = "head"  # the name of a new head
# besides nn.Embedding: modules and parameters of the input, including their content (BERT's norm)
INPUT = ("embeddings", "patch_embed", "pos_embed", "cls_token", "reg_token", "dist_token")


class Own:
    """Calls a model with its class's own forward. It is an object, not a function, so that copies of the model refer to
    themselves."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        return type(self.model).forward(self.model, *args, **inputs)

    def parameters(self) -> Any:
        return self.model.parameters()


class HeadForward(Own):
    """The head's logits for the hidden state at each example's position."""

    def __call__(self, *args: Any, place: Tensor, **inputs: Any) -> Tensor:
        hidden = getattr(super().__call__(*args, **inputs), "last_hidden_state", None)
        if hidden is None:
            raise ConfigError(
                f"{type(self.model).__name__} returns no last_hidden_state; mode finetune needs a bare encoder or "
                "decoder (transformers' AutoModel)"
            )
        rows = torch.arange(len(place), device=place.device)
        found: Tensor = self.model.get_submodule(HEAD)(hidden[rows, place])
        return found


class WordForward(Own):
    """The language model's logits of the label words at each example's position.

    The model's head sees only the hidden state of this position: logits of all positions, times the vocabulary, would
    cost more than the rest of a small model. A model without an inner base model computes all logits.
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
    """Cosines of a text with the label words, as in `hatcl.continual.label_words`."""

    def __init__(self, model: nn.Module, head: LabelWords) -> None:
        super().__init__(model)
        self.head = head

    def __call__(self, *args: Any, **inputs: Any) -> Tensor:
        own: Any = Own(self.model)
        return self.head.logits(own, inputs)


def open_copy(model: nn.Module) -> nn.Module:
    """A copy whose forward may be replaced.

    Raises:
        ConfigError: the model's forward was replaced already; the copy would use its class's own.
    """
    if "forward" in vars(model):
        raise ConfigError(
            f"{type(model).__name__}: its forward was replaced on the instance (by a task, or hatcl.atlas.encoder); "
            "pass the model as it was loaded"
        )
    return copy.deepcopy(model)


def with_forward(model: nn.Module, forward: Any) -> nn.Module:
    """Set the model's forward, and return the model."""
    model.forward = forward
    return model


def embedding_names(model: nn.Module) -> tuple[str, ...]:
    """The parameters that are embeddings, by their first names: tables, and everything in modules with such names,
    including the norm."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return tuple(
        n for n, p in model.named_parameters() if id(p) in tables or any(part in INPUT for part in n.split("."))
    )


def language_head_names(model: nn.Module) -> tuple[str, ...]:
    """The parameters of a language model's head, by their first names: all outside the base model, and its output
    embeddings, even if they are tied to the input's."""
    base = getattr(model, "base_model", model)
    inside = set() if base is model else {id(p) for p in base.parameters()}
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    own = {id(p) for p in output.parameters()} if isinstance(output, nn.Module) else set()
    return tuple(n for n, p in model.named_parameters() if id(p) in own or (inside and id(p) not in inside))
