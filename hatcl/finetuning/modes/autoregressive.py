"""A causal language model continues with a label's word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...data.texts import TextData
from ..options import TaskOptions
from ..prompts import CAUSAL_TEMPLATE
from ..tasks import FinetuneTask
from ..texts import word_task
from .registry import finetune_mode


def autoregressive_task(
    data: TextData,
    model: nn.Module,
    tokenizer: Any,
    *,
    words: Mapping[str, str] | None = None,
    template: str = CAUSAL_TEMPLATE,
    max_length: int = 128,
    cut: str = "end",
    name: str = "task",
    bounds: tuple[float, float] | None = None,
    measure: str | None = None,
) -> FinetuneTask:
    """A task for a causal language model (transformers' AutoModelForCausalLM): its logits of the token after the
    template over the label words' tokens.

    Args:
        words: label -> word, one token each; default: the labels in their own words. Class i is the i-th of them.
        template: around `{text}` (and `{text2}`); `{mask}` may stand last, to say by a space in front of it
            that words have one (they also have where it is left out). max_length, cut: see `PromptReader`.
        bounds: (low, high) of a regression, see `word_task`. measure: see `FinetuneTask`.

    Of GPT-2 the published code takes the last norm for part of the head; here the head is the output embeddings.

    Raises:
        ConfigError: words, a template, a tokenizer or a model that do not fit; see `label_tokens`, `PromptReader`.
    """
    if "{mask}" not in template:
        template = template.rstrip(" ") + " {mask}"
    return word_task(
        "autoregressive", "last", data, model, tokenizer, words, template, max_length, cut, name, bounds, measure
    )


@finetune_mode(
    "autoregressive",
    loads="AutoModelForCausalLM",
    paper="Panigrahi et al. 2023, arXiv 2302.06600, as for GPT-2",
    own=("words",),
)
def _autoregressive(options: TaskOptions, data: TextData, model: nn.Module, tokenizer: Any, seed: int) -> FinetuneTask:
    return autoregressive_task(
        data, model, tokenizer, words=options.words, template=options.template or CAUSAL_TEMPLATE,
        max_length=options.length, cut=options.cut, name=options.name, bounds=options.bounds,
        measure=options.measure,
    )  # fmt: skip
