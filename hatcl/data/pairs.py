"""Records as pairs of an input and an output: one function for each common format.

messages                        conversations: each assistant answer is an output, everything before it the input
instruction, [input], output    Alpaca's
input, output                   also prompt and answer, completion or response
text, text2, label              pairs of sentences, such as premise and hypothesis
text, label                     also sentence and label
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from .records import PAIRED, Records

Pair = tuple[str, str]
SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant"}  # role names of ShareGPT and others
Turns = tuple[tuple[str, str], ...]


class Sentences(str):
    """An input of two parts that a template may use in any order: `{text}` and `{text2}`. As a plain text it is both,
    one line each.

    Attributes:
        parts: the two.
    """

    parts: tuple[str, str]

    def __new__(cls, first: str, second: str) -> Sentences:
        made = super().__new__(cls, f"{first}\n{second}")
        made.parts = (first, second)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Sentences, self.parts


class Chat(str):
    """An input made of the turns of a conversation, for the tokenizer's chat template. As a plain text it has one line
    per turn.

    Attributes:
        turns: (role, content), in their order.
    """

    turns: Turns

    def __new__(cls, turns: Sequence[tuple[str, str]]) -> Chat:
        made = super().__new__(cls, "\n".join(f"{role}: {content}" for role, content in turns))
        made.turns = tuple((role, content) for role, content in turns)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Chat, (self.turns,)


def text_form(records: Records) -> Callable[[str], list[Pair]] | None:
    """The function that makes the pairs of a part, chosen by the columns; None if no format fits.

    Raises:
        ConfigError: the user names a column that does not exist."""
    at = {role: records.called(role) for role in ("messages", "instruction", "input", "output", "text", "label")}
    if at["messages"]:
        column = at["messages"]
        return lambda part: _conversations(records, part, column)
    said = at["instruction"] or at["input"]
    if said and at["output"] and at["output"] != at["label"]:
        more = at["input"] if at["instruction"] else None
        return lambda part: _answered(records, part, said, more, str(at["output"]))
    texts = _sentences(records)
    if texts and at["label"]:
        return lambda part: _labelled(records, part, texts, str(at["label"]))
    return None


def strata_of(records: Records) -> str | None:
    """The column of the labels, if the outputs are labels."""
    generated = records.called("messages") or (
        (records.called("instruction") or records.called("input")) and records.called("output")
    )
    return None if generated else records.called("label")


def pairs_of(records: Records, part: str) -> list[Pair]:
    """The pairs of a part.

    Raises:
        ConfigError: the columns are not texts with outputs, or a row lacks one of them.
    """
    form = text_form(records)
    if form is None:
        raise ConfigError(
            f"{records.where} has the columns {', '.join(records.columns)}, which are not texts with outputs; expected "
            "text and label, sentence1, sentence2 and label, input and output, prompt and answer, instruction, input "
            "and output, or messages. Assign columns with other names (--column text=NAME --column label=NAME)"
        )
    return form(part)


def _sentences(records: Records) -> tuple[str, ...]:
    """The columns of the text, or of both texts."""
    columns = set(records.columns)
    if not {"text", "text2"} & set(records.named):
        pair = next((pair for pair in PAIRED if set(pair) <= columns), None)
        if pair is not None:
            return pair
    found = records.called("text"), records.called("text2")
    return tuple(name for name in found if name is not None)


def _labelled(records: Records, part: str, texts: tuple[str, ...], label: str) -> list[Pair]:
    columns, labels = [words_in(records, part, name) for name in texts], words_in(records, part, label)
    inputs = columns[0] if len(columns) == 1 else [Sentences(a, b) for a, b in zip(*columns, strict=True)]
    return list(zip(inputs, labels, strict=True))


def words_in(records: Records, part: str, column: str) -> list[str]:
    """A column's values as texts; class numbers become names, if the table has them.

    Raises:
        ConfigError: a value is neither a text nor a number, or a number has no name.
    """
    values, names = records.values(part, column), records.classes.get(column)
    wrong = next((v for v in values if not isinstance(v, (str, int, float))), None)
    if wrong is not None:
        raise ConfigError(
            f"{records.where}: {str(wrong)[:40]!r} in the column {column!r} is a {type(wrong).__name__}, expected a "
            "text or a number"
        )
    if names is None:
        return [str(v) for v in values]
    unknown = next((v for v in values if not 0 <= v < len(names)), None)
    if unknown is not None:
        raise ConfigError(
            f"{records.where} has the label {unknown} in {part or 'its rows'}, expected 0 to {len(names) - 1} "
            f"({', '.join(names[:5])}); leave such rows out"
        )
    return [names[v] for v in values]


def _answered(records: Records, part: str, said: str, more: str | None, output: str) -> list[Pair]:
    before, after = words_in(records, part, said), words_in(records, part, output)
    if more is None:
        return list(zip(before, after, strict=True))
    rows = records.parts[part]
    further = ["" if row.get(more) is None else str(row[more]) for row in rows]  # optional in Alpaca's format
    inputs = [Sentences(a, b) if a and b else a or b for a, b in zip(before, further, strict=True)]
    return list(zip(inputs, after, strict=True))


def _conversations(records: Records, part: str, column: str) -> list[Pair]:
    found: list[Pair] = []
    for i, said in enumerate(records.values(part, column)):
        turns = _turns_of(f"{records.where}: {part or 'row'}[{i}]", said)
        answers = [k for k, (role, _) in enumerate(turns) if role == "assistant" and k]
        if not answers:
            raise ConfigError(
                f"{records.where}: {part or 'row'}[{i}] has the roles {', '.join(role for role, _ in turns)}; "
                "expected an assistant's answer after another role"
            )
        found += [(Chat(turns[:k]), turns[k][1]) for k in answers]
    return found


def _turns_of(where: str, said: Any) -> list[tuple[str, str]]:
    turns = []
    for turn in said if isinstance(said, Sequence) and not isinstance(said, str) else [said]:
        keys = ("from", "value") if isinstance(turn, Mapping) and "from" in turn else ("role", "content")
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in keys):
            raise ConfigError(
                f"{where}: {str(turn)[:60]!r} is not a message; expected an object with role and content, both texts"
            )
        role = str(turn[keys[0]])
        turns.append((SPEAKERS.get(role, role), str(turn[keys[1]])))
    return turns
