"""Tasks that generate the output from the input, for encoder-decoders (T5) and causal language models. Greedy
generation is scored; dialogues with turns by joint goal accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import one_of
from ..data.pairs import Chat, Pair, Turns
from ..data.texts import TextData
from ..engine.measures import joint_goal_accuracy
from ..errors import ConfigError
from .tasks import ContinualTask, TextReading
from .text_scores import TEXT_SCORES

MASKED = -100  # transformers ignores labels with this number in the loss


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens: of the input, of the output while learning, and generated at most; and texts per batch of
    scoring."""

    max_input: int
    max_output: int
    score_batch: int


def seq2seq_task(
    name: str,
    data: TextData,
    tokenizer: Any,
    *,
    max_input: int = 256,
    max_output: int = 32,
    score_batch: int = 16,
    measure: str = "match",
) -> ContinualTask:
    """A task for an encoder-decoder: the loss is taken over the output's tokens, given the input.

    Args:
        data: pairs; with `turns` the score is joint goal accuracy, otherwise the share of outputs that match; both
        ignore case and white space.
        max_input: the input's tokens; a longer input loses its beginning, since the question is at its end.
        max_output: the output's tokens, including the end of the sequence; at most as many are generated.
        measure: one of `TEXT_SCORES`, whose mean is the score; `match` with `turns`.

    Raises:
        ConfigError: the measure is another one, or an output has no label to learn from.
    """
    lengths = _lengths(max_input, max_output, score_batch)
    writer = _Seq2Seq(tokenizer, lengths, name)
    return _task(name, data, writer, measure)


def causal_task(
    name: str,
    data: TextData,
    tokenizer: Any,
    *,
    max_input: int = 256,
    max_output: int = 32,
    score_batch: int = 16,
    measure: str = "match",
) -> ContinualTask:
    """A task for a causal language model: the input, then the output, then the end of the sequence; the input's labels
    are masked. A `Chat` and its answer are formatted by the tokenizer's chat template. Arguments and errors are those
    of `seq2seq_task`.

    Raises:
        ConfigError: for a chat, the tokenizer has no template, or its template does not accept the turns.
    """
    lengths = _lengths(max_input, max_output, score_batch)
    writer = _Causal(tokenizer, lengths, name)
    return _task(name, data, writer, measure)


def check_some_label(labels: Tensor, name: str, examples: Sequence[Any]) -> None:
    """Raise `ConfigError` if all labels of a row are masked: its loss would be a mean over nothing."""
    empty = (labels == MASKED).all(-1).nonzero().flatten().tolist()
    if empty:
        raise ConfigError(
            f"task {name}: all labels of {len(empty)} of {len(examples)} examples are masked, the first is "
            f"{str(examples[empty[0]])[:80]!r}; give outputs that are not empty, and max_output of at least 1"
        )


class _Seq2Seq:
    def __init__(self, tokenizer: Any, lengths: Lengths, name: str) -> None:
        self.tokenizer, self.lengths, self.name = tokenizer, lengths, name
        if tokenizer.pad_token_id is None:
            raise ConfigError(f"task {name}: the tokenizer has no token for padding; set tokenizer.pad_token")

    def inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        rows = [_ids(self.tokenizer, x)[-self.lengths.max_input :] for x in texts]
        return self._padded(rows, left=False)

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The inputs of a forward that only reads texts; a decoder gets one token."""
        out = self.inputs(texts)
        return {**out, "decoder_input_ids": torch.full((len(texts), 1), self.tokenizer.pad_token_id)}

    def batch(self, pairs: list[Pair]) -> dict[str, Tensor]:
        out = self.inputs([x for x, _ in pairs])
        rows = [_with_end(self.tokenizer, _ids(self.tokenizer, y), self.lengths.max_output) for _, y in pairs]
        out["labels"] = self._filled(rows, MASKED, left=False)
        check_some_label(out["labels"], self.name, pairs)
        return out

    def written(self, model: nn.Module, texts: Sequence[str]) -> list[str]:
        tokens = _to(self.inputs(texts), model)
        return self._decoded(_generate(model, tokens, self.lengths.max_output, self.tokenizer))

    def _decoded(self, ids: Tensor) -> list[str]:
        return list(self.tokenizer.batch_decode(ids, skip_special_tokens=True))

    def _padded(self, rows: list[list[int]], left: bool) -> dict[str, Tensor]:
        ids = self._filled(rows, self.tokenizer.pad_token_id, left)
        return {"input_ids": ids, "attention_mask": self._filled([[1] * len(r) for r in rows], 0, left)}

    def _filled(self, rows: list[list[int]], value: int, left: bool) -> Tensor:
        width = max(1, *(len(r) for r in rows))
        gaps = [[value] * (width - len(r)) for r in rows]
        return torch.tensor([gap + r if left else r + gap for r, gap in zip(rows, gaps, strict=True)])


class _Causal(_Seq2Seq):
    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of the inputs, without the end-of-sequence token that some tokenizers add."""
        end = self.tokenizer.eos_token_id
        rows = []
        for x in texts:
            if isinstance(x, Chat):  # the template adds all special tokens
                rows.append(_ids(self.tokenizer, self.templated(x.turns), special=False))
                continue
            ids = _ids(self.tokenizer, x)
            rows.append(ids[:-1] if len(ids) > 1 and ids[-1] == end else ids)
        return [r[-self.lengths.max_input :] for r in rows]

    def answer(self, x: str, y: str) -> list[int]:
        """The output's tokens, including the end of the sequence."""
        ids = _ids(self.tokenizer, self.answered(x.turns, y) if isinstance(x, Chat) else y, special=False)
        end = self.tokenizer.eos_token_id
        if isinstance(x, Chat) and end in ids:  # the template ends a turn with it; a line break may follow
            ids = ids[: ids.index(end)]
        return _with_end(self.tokenizer, ids, self.lengths.max_output)

    def templated(self, turns: Turns, *, open_turn: bool = True) -> str:
        """A conversation in the format that the model was trained on."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                f"task {self.name} has chat messages, but the tokenizer has no chat template; use a chat model, or "
                "records of input and output"
            )
        from jinja2 import TemplateError  # the language of transformers' templates

        said = [{"role": role, "content": content} for role, content in turns]
        try:
            return str(self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=open_turn))
        except (TemplateError, ValueError) as error:
            roles = ", ".join(role for role, _ in turns)
            raise ConfigError(
                f"task {self.name}: the tokenizer's chat template does not accept the roles {roles} ({error})"
            ) from error

    def answered(self, turns: Turns, answer: str) -> str:
        """The text that the template puts after the open turn, if it continues the turn; otherwise the answer
        itself."""
        whole, before = self.templated((*turns, ("assistant", answer)), open_turn=False), self.templated(turns)
        return whole[len(before) :] if whole.startswith(before) else answer

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return self._padded(self.prompts(texts), left=False)  # so that positions do not depend on the longest text

    def batch(self, pairs: list[Pair]) -> dict[str, Tensor]:
        before = self.prompts([x for x, _ in pairs])
        after = [self.answer(x, y) for x, y in pairs]
        # padded on the right while learning, where positions count from the first token
        out = self._padded([b + a for b, a in zip(before, after, strict=True)], left=False)
        rows = [[MASKED] * len(b) + a for b, a in zip(before, after, strict=True)]
        out["labels"] = self._filled(rows, MASKED, left=False)
        check_some_label(out["labels"], self.name, pairs)
        return out

    def written(self, model: nn.Module, texts: Sequence[str]) -> list[str]:
        tokens = _to(self._padded(self.prompts(texts), left=True), model)
        ids = _generate(model, tokens, self.lengths.max_output, self.tokenizer)
        return self._decoded(ids[:, tokens["input_ids"].shape[1] :])


def _task(name: str, data: TextData, writer: _Seq2Seq, measure: str) -> ContinualTask:
    one_of("measure", measure, list(TEXT_SCORES))
    if data.turns and measure != "match":
        raise ConfigError(f"measure: got {measure!r} for dialogues, whose joint goal accuracy needs 'match'")
    empty = next((x for x, y in data.train if not y.strip()), None)
    if empty is not None:
        raise ConfigError(f"task {name}: the output of {empty[:80]!r} is empty: all its labels would be masked")

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = model(**_to(batch, model)).loss
        return found

    def score_of(pairs: Sequence[Pair], turns: Sequence[Any]) -> Any:
        def score(model: nn.Module) -> float:
            size = writer.lengths.score_batch
            order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
            hits = [0.0] * len(pairs)
            for k in range(0, len(order), size):
                some = order[k : k + size]
                given = writer.written(model, [pairs[i][0] for i in some])
                for i, text in zip(some, given, strict=True):
                    hits[i] = TEXT_SCORES[measure](pairs[i][0], text, pairs[i][1])
            return joint_goal_accuracy(turns, [hit == 1 for hit in hits]) if turns else sum(hits) / len(hits)

        return score

    validate = score_of(data.validation, []) if data.validation else None
    chosen = measure == "match" and not data.turns  # free texts have no most common answer
    said, held_out = ([y for _, y in pairs] if chosen else [] for pairs in (data.test, data.validation))
    return ContinualTask(
        name, data.train, writer.batch, loss, score_of(data.test, data.turns), validate, shared=True, answers=said,
        validation_answers=held_out, reading=TextReading(writer.tokens, written=writer.written),
    )  # fmt: skip


def _lengths(max_input: int, max_output: int, score_batch: int) -> Lengths:
    found = Lengths(max_input, max_output, score_batch)
    for name in ("max_input", "max_output", "score_batch"):
        if getattr(found, name) < 1:
            raise ConfigError(f"{name}: got {getattr(found, name)}, expected at least 1")
    return found


def _ids(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    return [int(i) for i in tokenizer(text, add_special_tokens=special)["input_ids"]]


def _with_end(tokenizer: Any, ids: list[int], most: int) -> list[int]:
    end = tokenizer.eos_token_id
    if end is None:
        return ids[:most]
    return [*(ids[:-1] if ids and ids[-1] == end else ids)[: most - 1], int(end)]


def _to(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {n: t.to(device) for n, t in batch.items()}


def _generate(model: Any, tokens: dict[str, Tensor], most: int, tokenizer: Any) -> Tensor:
    found: Tensor = model.generate(
        **tokens, max_new_tokens=most, do_sample=False, num_beams=1, pad_token_id=tokenizer.pad_token_id
    )
    return found
