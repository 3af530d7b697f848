"""Classification by label words, for an encoder without a masked-word head; no task has a head either.

    logits = scale * cos(mean-pooled hidden state of the text, mean-pooled hidden state of the label's word or phrase)

The labels' embeddings are computed once, from the base encoder without adapters, and stay fixed: all tasks share one
model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.pairs import Pair
from ..data.texts import TextData
from ..errors import ConfigError
from ..skills.hidden import Hidden, hidden_states_of
from .tasks import ContinualTask, TextReading

SCALE = 20.0  # the temperature with which sentence transformers trains such encoders


def label_word_task(
    name: str,
    data: TextData,
    encoder: nn.Module,
    tokenizer: Any,
    *,
    labels: Mapping[str, str] | Sequence[str] | None = None,
    max_length: int = 64,
    scale: float = SCALE,
    score_batch: int = 64,
) -> ContinualTask:
    """A task that classifies texts by the nearest label embedding.

    Args:
        data: pairs of a text and a label. encoder: the base encoder, or the peft model (its adapters are switched off
            while the labels are embedded): a module that returns `last_hidden_state`. tokenizer: the encoder's.
        labels: the labels, or label -> the word or phrase that stands for it; default: the labels of the training data
            in their own words.
        max_length: tokens per text; batches are padded to their longest text.
        scale: the factor of the cosines. score_batch: texts per batch of scoring.

    Returns:
        The task. Its score is the accuracy on the test pairs, and `validate` the accuracy on the validation pairs.

    Raises:
        ConfigError: there are fewer than two labels, a label word has no letter, a pair has an unknown label, or the
            encoder returns no hidden states.
    """
    words = words_of_labels(name, data, labels)
    check_words(name, words)
    place = {y: i for i, y in enumerate(words)}
    read = _Reader(tokenizer, max_length)
    anchors = label_embeddings(encoder, read, list(words.values()), name)
    head = LabelWords(anchors, scale, place)

    def collate(pairs: list[Pair]) -> tuple[Any, Tensor]:
        return read([x for x, _ in pairs]), torch.tensor([place[y] for _, y in pairs])

    return ContinualTask(
        name,
        data.train,
        collate,
        head.loss,
        functools.partial(_accuracy, head=head, collate=collate, pairs=data.test, size=score_batch),
        functools.partial(_accuracy, head=head, collate=collate, pairs=data.validation, size=score_batch)
        if data.validation
        else None,
        head.hidden,
        answers=[y for _, y in data.test],
        validation_answers=[y for _, y in data.validation],
        reading=TextReading(read, tuple(words), head.of_output),
    )


def words_of_labels(
    name: str, data: TextData, labels: Mapping[str, str] | Sequence[str] | None = None
) -> dict[str, str]:
    """label -> the word or phrase that stands for it; if none are given, the labels of the training data stand for
    themselves.

    Raises:
        ConfigError: there are fewer than two labels, or a pair has an unknown label.
    """
    words = dict(labels) if isinstance(labels, Mapping) else {y: y for y in labels or data.labels}
    if len(words) < 2:
        raise ConfigError(f"task {name}: got the labels {list(words)}, expected at least two")
    for x, y in [*data.train, *data.validation, *data.test]:
        if y not in words:
            raise ConfigError(f"task {name}: {x[:40]!r} has the label {y!r}, expected one of {', '.join(words)}")
    return words


def check_words(name: str, words: Mapping[str, str]) -> None:
    """Raise `ConfigError` if a label's word has no letter: its embedding would carry no meaning."""
    mute = [w for w in words.values() if not any(c.isalpha() for c in w)]
    if mute:
        raise ConfigError(
            f"task {name}: the label word {mute[0]!r} carries no meaning; give words for labels, such as "
            f"labels={{{next(iter(words))!r}: 'bad', ...}} (--word {name}:{next(iter(words))}=bad)"
        )


@torch.no_grad()
def label_embeddings(encoder: nn.Module, read: Callable[[list[str]], Any], words: list[str], name: str = "") -> Tensor:
    """Unit vectors `[classes, d]` of words or phrases, from the encoder without its adapters in evaluation mode."""
    was_training = encoder.training
    off = getattr(encoder, "disable_adapter", None)
    encoder.eval()
    try:
        with off() if callable(off) else contextlib.nullcontext():
            return F.normalize(pooled(encoder, read(words), name), dim=-1).cpu()
    finally:
        encoder.train(was_training)


def pooled(model: nn.Module, tokens: Mapping[str, Tensor], name: str = "") -> Tensor:
    """The mean of the last hidden states over the tokens that are not padding, `[n, d]`.

    Raises:
        ConfigError: the model returns no `last_hidden_state`.
    """
    device = next(model.parameters()).device
    tokens = {n: t.to(device) for n, t in tokens.items()}
    out = model(**tokens)
    if getattr(out, "last_hidden_state", None) is None:
        raise ConfigError(
            f"task {name}: {type(model).__name__} returns no last_hidden_state; label words need a bare encoder "
            "(transformers' AutoModel)"
        )
    return _mean_hidden(tokens, out)


def _mean_hidden(tokens: Mapping[str, Tensor], out: Any) -> Tensor:
    hidden: Tensor = out.last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden)
    return (hidden * mask).sum(1) / mask.sum(1)


@dataclass(frozen=True, eq=False)
class _Reader:
    """Turns texts into tensors, padded to the longest."""

    tokenizer: Any
    max_length: int

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        length = self.max_length
        out = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return {n: out[n] for n in ("input_ids", "attention_mask", "token_type_ids") if n in out}


@dataclass(frozen=True, eq=False)
class LabelWords:
    """The labels: unit vectors `[classes, d]`, the scale of the cosines, and label -> class."""

    anchors: Tensor
    scale: float
    place: dict[str, int]

    def logits(self, model: nn.Module, tokens: Any) -> Tensor:
        return self._of_pooled(pooled(model, tokens))

    def of_output(self, tokens: Any, out: Any) -> Tensor:
        """The logits computed from the encoder's output for some tokens."""
        return self._of_pooled(_mean_hidden(tokens, out))

    def _of_pooled(self, x: Tensor) -> Tensor:
        x = F.normalize(x, dim=-1)
        return self.scale * x @ self.anchors.to(x).t()

    def loss(self, model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        logits = self.logits(model, batch[0])
        return F.cross_entropy(logits, batch[1].to(logits.device))

    def hidden(self, model: nn.Module, batch: tuple[Any, Tensor]) -> list[Hidden]:
        device = next(model.parameters()).device
        return hidden_states_of(model, {n: t.to(device) for n, t in batch[0].items()})


def _accuracy(
    model: nn.Module, *, head: LabelWords, collate: Callable[[list[Pair]], Any], pairs: Sequence[Pair], size: int
) -> float:
    """The accuracy. Texts of similar length are batched together to save padding."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    hits = 0
    for k in range(0, len(order), size):
        tokens, y = collate([pairs[i] for i in order[k : k + size]])
        hits += int((head.logits(model, tokens).argmax(-1).cpu() == y).sum())
    return hits / len(pairs)
