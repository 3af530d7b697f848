"""What the modes for texts share: labels, pairs to batches, and tasks of a language model's label words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..continual.label_words import words_of_labels
from ..data.texts import Pair, TextData
from ..errors import ConfigError
from .forwards import WordForward, embedding_names, language_head_names, open_copy, with_forward
from .prompts import PromptReader, check_length, label_tokens
from .tasks import FinetuneTask, LabelledBatch


def _words_of(name: str, data: TextData, words: Any) -> dict[str, str]:
    """label -> word, in the order of `words`, for language models.

    Raises:
        ConfigError: as `words_of_labels`; a label without a word, or one that would stand for itself and has no letter.
    """
    if words is None:
        found = words_of_labels(name, data)
        mute = [w for w in found if not any(c.isalpha() for c in w)]
        if mute:
            raise ConfigError(
                f"task {name}: the label {mute[0]!r} says nothing of what it means; give words for labels, such as "
                f"words={{{next(iter(found))!r}: 'terrible', ...}} (--word {next(iter(found))}=terrible)"
            )
        return found
    return words_of_labels(name, data, words)


def word_task(
    mode: str,
    at: str,
    data: TextData,
    model: nn.Module,
    tokenizer: Any,
    words: Mapping[str, str] | None,
    template: str,
    max_length: int,
    cut: str,
    name: str,
) -> FinetuneTask:
    """A task of a language model's logits over the label words' tokens.

    Args:
        at: where the logits are read, see `PromptReader`.
    """
    found = _words_of(name, data, words)
    read = PromptReader(tokenizer, template, max_length=max_length, cut=cut, at=at)
    tokens = label_tokens(tokenizer, found, "mask" in read.template.spaced)
    check_length(model, max_length)
    out = open_copy(model)
    with_forward(out, WordForward(out, tokens))
    return text_task(name, mode, found, data, out, tokenizer, read, embedding_names(out), language_head_names(out))


def text_task(
    name: str,
    mode: str,
    labels: dict[str, str],
    data: TextData,
    model: nn.Module,
    tokenizer: Any,
    read: PromptReader,
    embeddings: tuple[str, ...],
    head: tuple[str, ...],
    *,
    fresh: tuple[str, ...] = (),
    fixed_head: bool = True,
) -> FinetuneTask:
    """A task of pairs of a text and a label."""
    place = {y: i for i, y in enumerate(labels)}

    def collate(pairs: list[Pair]) -> LabelledBatch:
        strange = next((p for p in pairs if p[1] not in place), None)
        if strange is not None:  # of other data than the task's own, which was checked
            raise ConfigError(
                f"task {name}: {strange[0][:40]!r} has the label {strange[1]!r}, expected one of {', '.join(place)}"
            )
        return read([x for x, _ in pairs]), torch.tensor([place[y] for _, y in pairs])

    def length(pair: Pair) -> int:
        return read.length(pair[0])

    return FinetuneTask(
        name, mode, tuple(labels), model.eval(), data.train, data.validation, data.test, collate, length, embeddings,
        head, fresh, fixed_head, tokenizer,
    )  # fmt: skip
