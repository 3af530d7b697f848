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
    """A task for a causal language model (transformers' AutoModelForCausalLM): its logits of the label words' tokens
    for the position after the template.

    Args:
        words: label -> word, one token each; default: the labels themselves. Class i is the i-th of them. template: a
        text with `{text}` (and `{text2}`); `{mask}` may be last, and a space before it means that words start with a
        space (this is also the default without `{mask}`). max_length, cut: see `PromptReader`.
        bounds: (low, high) for a regression, see `word_task`. measure: see `FinetuneTask`.

    For GPT-2, the published code counts the last norm as part of the head; here the head is the output embeddings.

    Raises:
        ConfigError: words, template, tokenizer or model do not fit; see `label_tokens`, `PromptReader`.
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
