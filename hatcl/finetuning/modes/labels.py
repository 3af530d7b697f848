"""The nearest label word, for encoders without a masked-word head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...continual.label_words import SCALE, LabelWords, check_words, label_embeddings, words_of_labels
from ...data.texts import TextData
from ..forwards import CosineForward, embedding_names, open_copy, with_forward
from ..options import TaskOptions
from ..prompts import PromptReader, check_length
from ..tasks import FinetuneTask
from ..texts import text_task
from .registry import finetune_mode


def labels_task(
    data: TextData,
    model: nn.Module,
    tokenizer: Any,
    *,
    words: Mapping[str, str] | None = None,
    template: str | None = None,
    max_length: int = 128,
    cut: str = "end",
    scale: float = SCALE,
    name: str = "task",
    measure: str | None = None,
) -> FinetuneTask:
    """A task for a bare encoder (transformers' AutoModel): `scale cos(mean hidden state of the text, that of the
    label's word or phrase)`; the labels' vectors come from the pretrained model and stay fixed. There is no head to
    train.

    Args:
        words: label -> word or phrase, of any number of tokens. template: a text with `{text}`, without a mask.

    Raises:
        ConfigError: words, template, tokenizer or model do not fit.
    """
    found = words_of_labels(name, data, words)
    check_words(name, found)
    read = PromptReader(tokenizer, template, max_length=max_length, cut=cut, at=None)
    alone = PromptReader(tokenizer, None, max_length=max_length, cut=cut, at=None)
    check_length(model, max_length)
    out = open_copy(model)
    anchors = label_embeddings(out, alone, list(found.values()), name)
    head = LabelWords(anchors, scale, {y: i for i, y in enumerate(found)})
    with_forward(out, CosineForward(out, head))
    return text_task(name, "labels", found, data, out, tokenizer, read, embedding_names(out), (), measure=measure)


@finetune_mode(
    "labels",
    loads="AutoModel",
    paper="label words' embeddings as a fixed head, see hatcl.continual",
    own=("words", "scale"),
)
def _labels(options: TaskOptions, data: TextData, model: nn.Module, tokenizer: Any, seed: int) -> FinetuneTask:
    return labels_task(
        data, model, tokenizer, words=options.words, template=options.template, max_length=options.length,
        cut=options.cut, scale=options.scale, name=options.name, measure=options.measure,
    )  # fmt: skip
