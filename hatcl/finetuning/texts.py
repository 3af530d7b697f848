"""Shared by the modes for texts: labels, batches of pairs, and tasks with a language model's label words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..config import one_of
from ..continual.label_words import words_of_labels
from ..data.pairs import Pair
from ..data.published import score_in
from ..data.texts import TextData
from ..errors import ConfigError
from .forwards import WordForward, embedding_names, language_head_names, open_copy, with_forward
from .measuring import MEASURES
from .prompts import PromptReader, check_length, label_tokens
from .tasks import FinetuneTask, LabelledBatch


def _words_of(name: str, data: TextData, words: Any) -> dict[str, str]:
    """label -> word, in the order of `words`, for language models.

    Raises:
        ConfigError: as `words_of_labels`; or a label has no word, or stands for itself but has no letter.
    """
    if words is None:
        found = words_of_labels(name, data)
        mute = [w for w in found if not any(c.isalpha() for c in w)]
        if mute:
            raise ConfigError(
                f"task {name}: the label {mute[0]!r} carries no meaning; give words for labels, such as "
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
    bounds: tuple[float, float] | None = None,
    measure: str | None = None,
) -> FinetuneTask:
    """A task that uses a language model's logits of the label words' tokens.

    With `bounds` it is a regression, as in LM-BFF (arXiv 2012.15723, section 4.1): for a score y between low and high
    the model learns `p(second word) = (y - low) / (high - low)` by cross-entropy with these soft labels (the KL
    divergence up to a constant), and predicts `low + (high - low) p`.

    Args:
        at: where the logits are read, see `PromptReader`. bounds: (low, high). measure: see `FinetuneTask`.

    Raises:
        ConfigError: with `bounds`, there are not exactly two words, or a label is not a score.
    """
    if bounds is None:
        found = _words_of(name, data, words)
    else:
        found = dict(words or {})
        if len(found) != 2:
            raise ConfigError(
                f"task {name}: got {len(found)} words, expected two: for the lowest and the highest score"
            )
        for _, y in [*data.train, *data.validation, *data.test]:
            score_in(name, y, bounds)
    read = PromptReader(tokenizer, template, max_length=max_length, cut=cut, at=at)
    tokens = label_tokens(tokenizer, found, "mask" in read.template.spaced)
    check_length(model, max_length)
    out = open_copy(model)
    with_forward(out, WordForward(out, tokens))
    return text_task(
        name, mode, found, data, out, tokenizer, read, embedding_names(out), language_head_names(out), bounds=bounds,
        measure=measure,
    )  # fmt: skip


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
    bounds: tuple[float, float] | None = None,
    measure: str | None = None,
) -> FinetuneTask:
    """A task whose examples pair a text with a label, or with a score between the bounds."""
    place = {y: i for i, y in enumerate(labels)}
    measure = measure or ("accuracy" if bounds is None else "pearson")
    one_of("measure", measure, list(MEASURES))
    if MEASURES[measure].of_scores != (bounds is not None):
        raise ConfigError(
            f"measure: got {measure!r} for {'classes' if bounds is None else 'scores'}, expected one of "
            f"{', '.join(n for n, m in MEASURES.items() if m.of_scores == (bounds is not None))}"
        )

    def collate(pairs: list[Pair]) -> LabelledBatch:
        if bounds is not None:
            high = torch.tensor([score_in(name, y, bounds) for _, y in pairs])
            return read([x for x, _ in pairs]), torch.stack([1 - high, high], 1)
        strange = next((p for p in pairs if p[1] not in place), None)
        if strange is not None:  # from other data; the task's own was checked
            raise ConfigError(
                f"task {name}: {strange[0][:40]!r} has the label {strange[1]!r}, expected one of {', '.join(place)}"
            )
        return read([x for x, _ in pairs]), torch.tensor([place[y] for _, y in pairs])

    def length(pair: Pair) -> int:
        return read.length(pair[0])

    return FinetuneTask(
        name, mode, tuple(labels), model.eval(), data.train, data.validation, data.test, collate, length, embeddings,
        head, fresh, fixed_head, tokenizer, measure,
    )  # fmt: skip
