"""A masked language model fills in a label's word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...data.texts import TextData
from ..options import TaskOptions
from ..prompts import MASK_TEMPLATE
from ..tasks import FinetuneTask
from ..texts import word_task
from .registry import finetune_mode


def prompt_task(
    data: TextData,
    model: nn.Module,
    tokenizer: Any,
    *,
    words: Mapping[str, str] | None = None,
    template: str = MASK_TEMPLATE,
    max_length: int = 128,
    cut: str = "end",
    name: str = "task",
    bounds: tuple[float, float] | None = None,
    measure: str | None = None,
) -> FinetuneTask:
    """A task for a masked language model (transformers' AutoModelForMaskedLM): its logits of the label words' tokens at
    the mask.

    Args:
        words: label -> word, one token each; default: the labels themselves. Class i is the i-th of them. template: a
        text with `{text}` (and `{text2}`) and `{mask}`. max_length, cut: see `PromptReader`.
        bounds: (low, high) for a regression, see `word_task`. measure: see `FinetuneTask`.

    Raises:
        ConfigError: words, template, tokenizer or model do not fit; see `label_tokens`, `PromptReader`.
    """
    return word_task("prompt", "mask", data, model, tokenizer, words, template, max_length, cut, name, bounds, measure)


@finetune_mode("prompt", loads="AutoModelForMaskedLM", paper="Gao et al. 2021, arXiv 2012.15723", own=("words",))
def _prompt(options: TaskOptions, data: TextData, model: nn.Module, tokenizer: Any, seed: int) -> FinetuneTask:
    return prompt_task(
        data, model, tokenizer, words=options.words, template=options.template or MASK_TEMPLATE,
        max_length=options.length, cut=options.cut, name=options.name, bounds=options.bounds,
        measure=options.measure,
    )  # fmt: skip
