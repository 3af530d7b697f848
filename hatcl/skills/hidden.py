"""The hidden states of a model, and the distance between those of two adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..errors import SkillError


@dataclass(frozen=True)
class Hidden:
    """The hidden states of one stack of layers.

    Attributes:
        states: one tensor per layer, `[N, ..., d]`. mask: the positions that count, in the shape of the states' first
            dimensions (`[N, L]`); None = all.
    """

    states: Sequence[Tensor]
    mask: Tensor | None = None


def hidden_states_of(model: Any, batch: Any) -> list[Hidden]:
    """The hidden states of a transformers model and their padding: `attention_mask` for a single encoder or decoder;
    for a decoder after an encoder, `decoder_attention_mask` or else the labels that are not masked (-100).

    Raises:
        SkillError: the batch is not a mapping, or the model does not return hidden states.
    """
    if not isinstance(batch, Mapping):
        raise SkillError(
            f"the batch is a {type(batch).__name__}, expected a mapping for model(**batch); for other models pass "
            "hidden_states=, a function that returns a list of tensors for a model and a batch"
        )
    out = model(**{**batch, "output_hidden_states": True, "return_dict": True})
    mask = batch.get("attention_mask")
    encoder, decoder = getattr(out, "encoder_hidden_states", None), getattr(out, "decoder_hidden_states", None)
    if encoder is not None and decoder is not None:
        targets, labels = batch.get("decoder_attention_mask"), batch.get("labels")
        if targets is None and labels is not None:
            targets = labels != -100
        return [Hidden(encoder, mask), Hidden(decoder, targets)]
    states = getattr(out, "hidden_states", None)
    if states is None:
        raise SkillError(
            f"{type(model).__name__} returned no hidden_states; pass hidden_states=, a function that returns a list "
            "of tensors for a model and a batch"
        )
    return [Hidden(states, mask)]


def masked_mse(plastic: Tensor, stable: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error in float32 over the positions in the mask."""
    if plastic.shape != stable.shape:
        raise SkillError(f"hidden states of {list(plastic.shape)} (plastic) and {list(stable.shape)} (stable) differ")
    if mask is not None:
        if mask.shape != plastic.shape[: mask.dim()] or mask.dim() >= plastic.dim():
            raise SkillError(
                f"the mask is {list(mask.shape)}, the hidden states are {list(plastic.shape)}; expected a mask of "
                "their first dimensions (give Hidden(states, mask) from hidden_states=)"
            )
        keep = mask.bool()
        plastic, stable = plastic[keep], stable[keep]
    if not plastic.numel():
        raise SkillError("the batch has only padding: attention_mask is all 0, or all labels are masked (-100)")
    return F.mse_loss(plastic.float(), stable.float())
