"""Texts in templates, and words for labels: the input of a language model and the position of its answer.

    "{text} It was {mask}."  with  {"0": "terrible", "1": "great"}      (LM-BFF, Gao et al. 2021, arXiv 2012.15723)
    "{text:-}? {mask}, {text2:lower}"  with  {"not_entailment": "No", "entailment": "Yes"}

The parts of a template are tokenised separately, so that a text that is too long loses its own tokens and never the
template's. A space before `{text}` or `{mask}` belongs to the word after it, as in byte-level and SentencePiece
tokenizers: after "It was " the word is " great", one token of RoBERTa or GPT-2.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import one_of
from ..data.pairs import Sentences
from ..errors import ConfigError, nearest
from .options import CUTS, TOKENS

SLOT_NAMES = ("text", "text2", "mask", "sep")
TEXT_FORMS = ("", "-", "lower", "lower-")
MASK_TEMPLATE = "{text} It was {mask}."
CAUSAL_TEMPLATE = "{text} It was {mask}"


@dataclass(frozen=True)
class TemplateSlot:
    """A place in a template.

    Attributes:
        name: `text`, `text2`, `mask` or `sep`. form: for a text, `-` drops its last character, `lower` lowers its first
            letter; or both.
    """

    name: str
    form: str = ""

    @property
    def of_text(self) -> bool:
        return self.name in ("text", "text2")

    def formed(self, text: str) -> str:
        """A text in the form of this slot."""
        text = text[:1].lower() + text[1:] if self.form.startswith("lower") else text
        return text[:-1] if self.form.endswith("-") else text


@dataclass(frozen=True)
class Template:
    """A text with `{text}`, at most one `{mask}`, and `{text2}` if examples are pairs of sentences (`Sentences`).
    `{sep}` is the token that separates two sentences. `{text:-}` is a text without its last character (such as a full
    stop before the template's question mark), `{text2:lower}` begins with a lower-case letter: LM-BFF's `*sent-_0*` and
    `*sentl_1*`. `{{` and `}}` stand for braces.

    Attributes:
        parts: literals and slots in their order. spaced: the slots with a space before them; a mask at the start counts
            as one, as published.

    Raises:
        ConfigError: `{text}` is missing, a slot appears twice or is unknown, or braces do not match.
    """

    source: str
    parts: tuple[str | TemplateSlot, ...] = field(init=False)
    spaced: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        parts: list[str | TemplateSlot] = []
        spaced: set[str] = set()
        try:
            parsed = list(string.Formatter().parse(self.source))
        except ValueError as error:
            raise ConfigError(f"template: {self.source!r} cannot be read ({error}); braces are {{{{ and }}}}") from None
        for literal, name, form, change in parsed:
            if literal and parts and isinstance(parts[-1], str):
                parts[-1] += literal  # an escaped brace ends a literal in between
            elif literal:
                parts.append(literal)
            if name is None:
                continue
            slot = self._slot(name, form or "", change)
            if any(isinstance(p, TemplateSlot) and p.name == name for p in parts):
                raise ConfigError(f"template: {self.source!r} has {{{name}}} twice, expected it once")
            last = parts[-1] if parts else ""
            if isinstance(last, str) and last.endswith(" "):
                parts[-1] = last[:-1]
                spaced.add(name)
            if name == "mask" and not parts:
                spaced.add(name)
            parts.append(slot)
        object.__setattr__(self, "parts", tuple(p for p in parts if p))
        object.__setattr__(self, "spaced", frozenset(spaced))
        if not self.has("text"):
            raise ConfigError(f"template: {self.source!r} has no {{text}}, expected it once")

    def _slot(self, name: str, form: str, change: str | None) -> TemplateSlot:
        if name not in SLOT_NAMES or change:
            raise ConfigError(
                f"template: {self.source!r} has the slot {name!r}, expected {{text}}, {{text2}}, {{mask}} and {{sep}}; "
                f"did you mean {nearest(name, SLOT_NAMES)!r}? Write literal braces as {{{{ and }}}}"
            )
        if form not in (TEXT_FORMS if TemplateSlot(name).of_text else ("",)):
            raise ConfigError(
                f"template: {self.source!r} has {{{name}:{form}}}, expected one of {', '.join(TEXT_FORMS[1:])} with "
                "{text} or {text2}, and nothing with another slot"
            )
        return TemplateSlot(name, form)

    def has(self, name: str) -> bool:
        """Whether there is a slot of that name."""
        return any(isinstance(p, TemplateSlot) and p.name == name for p in self.parts)

    def texts(self, text: str) -> list[str]:
        """The texts for the slots, in the order of the slots, each with the space before it.

        Raises:
            ConfigError: the template has two texts, but the example has one.
        """
        if not self.has("text2"):
            given = {"text": text}
        elif isinstance(text, Sentences):
            given = dict(zip(("text", "text2"), text.parts, strict=True))
        else:
            raise ConfigError(
                f"template: {self.source!r} has {{text2}}, but {text[:60]!r} is one text; give examples as rows of "
                "[text, text2, label]"
            )
        slots = [p for p in self.parts if isinstance(p, TemplateSlot) and p.of_text]
        return [" " * (p.name in self.spaced) + p.formed(given[p.name]) for p in slots]


class PromptReader:
    """Turns texts into tokens, padded on the right to the longest, with the position whose hidden state is read.

    Args:
        template: None = only the text. max_length: tokens, including special ones and the template's.
        cut: the part that a long text loses, its `end` or its `head`. Of two texts, the longer one is cut until both
        are equal.
        at: the position: `cls` (the first token), `mask`, or `last`; with `last` nothing follows the template (no
            end-of-sequence token), and its `{mask}` is left out. None = no position, for models that use all tokens.

    Raises:
        ConfigError: the tokenizer lacks a needed token, the template lacks the mask to read, or it leaves no room for a
            text.
    """

    def __init__(
        self, tokenizer: Any, template: str | None, *, max_length: int = 128, cut: str = "end", at: str | None = "mask"
    ) -> None:
        one_of("cut", cut, CUTS)
        if at is not None:
            one_of("token", at, TOKENS)
        self.tokenizer, self.cut, self.at = tokenizer, cut, at
        self.template = Template("{text}" if template is None else template)
        masked = self.template.has("mask")
        if at == "mask" and not masked:
            raise ConfigError(f"template: {self.template.source!r} has no {{mask}}, whose position must be read")
        if at == "last" and masked and self.template.parts[-1] != TemplateSlot("mask"):
            raise ConfigError(
                f"template: {self.template.source!r} has text after {{mask}}, but a causal model reads only the "
                f"text before its answer: put {{mask}} last, or leave it out"
            )
        if at == "cls" and getattr(tokenizer, "cls_token_id", None) is None:
            raise ConfigError(
                f"token: {type(tokenizer).__name__} has no cls token before a text; give token='last' (--token)"
            )
        mask: Any = getattr(tokenizer, "mask_token_id", None)
        parting: Any = getattr(tokenizer, "sep_token_id", None)
        if at != "last" and masked and mask is None:
            raise ConfigError(
                f"mode, token: {type(tokenizer).__name__} has no mask token; fill masks with a masked language model's "
                "tokenizer, or use mode 'autoregressive' or 'finetune' with token 'cls' or 'last'"
            )
        if self.template.has("sep") and parting is None:
            raise ConfigError(
                f"template: {type(tokenizer).__name__} has no separator token, expected one for {{sep}}; write "
                "words instead (--template)"
            )
        start, end = _frame(tokenizer)
        fixed: list[list[int]] = [list(start)]  # the tokens before each text, and after the last one
        self.mask: tuple[int, int] | None = None  # which of these, and the position in it
        for part in self.template.parts:
            if isinstance(part, str):
                fixed[-1] += _token_ids(tokenizer, part)
            elif part.of_text:
                fixed.append([])
            elif part.name == "sep":
                fixed[-1].append(int(parting))
            elif at != "last":
                self.mask = (len(fixed) - 1, len(fixed[-1]))
                fixed[-1].append(int(mask))
        fixed[-1] += _without_end(tokenizer, end) if at == "last" else end
        self.fixed = fixed
        own = sum(len(ids) for ids in fixed)
        self.room = max_length - own
        if self.room < len(fixed) - 1:
            raise ConfigError(
                f"max_length: got {max_length}, but the template {self.template.source!r} alone takes {own} tokens; "
                "give more (--max-length) or a shorter template"
            )
        self._known: dict[str | tuple[str, str], tuple[list[int], int]] = {}

    def read(self, text: str) -> tuple[list[int], int]:
        """The tokens of a text in its template, and the position to read."""
        known = getattr(text, "parts", text)
        if known not in self._known:
            own = [_token_ids(self.tokenizer, x) for x in self.template.texts(text)]
            lengths = room_shares([len(ids) for ids in own], self.room)
            own = [
                x if n == len(x) else x[:n] if self.cut == "end" else x[len(x) - n :]
                for x, n in zip(own, lengths, strict=True)
            ]
            ids, place = list(self.fixed[0]), 0
            starts = [0]
            for x, after in zip(own, self.fixed[1:], strict=True):
                ids += x
                starts.append(len(ids))
                ids += after
            if self.at == "last":
                place = len(ids) - 1
            elif self.at == "mask" and self.mask is not None:
                place = starts[self.mask[0]] + self.mask[1]
            if not ids:
                raise ConfigError(f"{text!r} has no tokens in the template {self.template.source!r}")
            self._known[known] = (ids, place)
        return self._known[known]

    def length(self, text: str) -> int:
        """The number of these tokens."""
        return len(self.read(text)[0])

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` `[B, L]`, and `place` `[B]` if a position is read."""
        rows = [self.read(x) for x in texts]
        width = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id or 0  # masked, and after every position that is read
        out = {
            "input_ids": torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        }
        return out if self.at is None else {**out, "place": torch.tensor([place for _, place in rows])}


def room_shares(lengths: Sequence[int], room: int) -> list[int]:
    """The number of tokens that each of one or two texts may have to fit together; the longer one is cut first."""
    if sum(lengths) <= room:
        return list(lengths)
    if len(lengths) == 1:
        return [room]
    shorter = min(*lengths, room // 2)
    return [room - shorter, shorter] if lengths[0] >= lengths[1] else [shorter, room - shorter]


def label_tokens(tokenizer: Any, words: Mapping[str, str], spaced: bool = True) -> list[int]:
    """The one token that stands for each label.

    Args:
        words: label -> word. spaced: put a space before the word; byte-level and SentencePiece tokenizers make it part
            of the token, others ignore it.

    Raises:
        ConfigError: a word has several tokens (the text shows them) or is not in the vocabulary, or two labels have the
            same token.
    """
    found: dict[int, str] = {}
    for label, word in words.items():
        ids = _token_ids(tokenizer, " " * spaced + word)
        what = f"words: {word!r} (label {label!r})"
        if len(ids) != 1:
            shown = " ".join(tokenizer.convert_ids_to_tokens(ids)) or "nothing"
            other = _token_ids(tokenizer, " " * (not spaced) + word)
            fits = len(other) == 1 and other[0] != tokenizer.unk_token_id
            hint = f"{'with' if not spaced else 'without'} a space before {{mask}} it would be one; " if fits else ""
            raise ConfigError(
                f"{what} splits into {len(ids)} tokens ({shown}), expected one; {hint}give a word that is one token "
                f"(words={{{label!r}: ...}}, --word {label}=...)"
            )
        if ids[0] == tokenizer.unk_token_id:
            raise ConfigError(f"{what} is not in the tokenizer's vocabulary; give another (--word {label}=...)")
        if ids[0] in found:
            raise ConfigError(f"{what} is the same token as that of label {found[ids[0]]!r}; give each its own")
        found[ids[0]] = label
    return list(found)


def positions_of(model: nn.Module) -> int | None:
    """The number of tokens that a text model has positions for; None = unknown, or no limit."""
    config: Any = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(most, int):
        return None
    tables = [m for n, m in model.named_modules() if n.endswith("position_embeddings") and isinstance(m, nn.Embedding)]
    if tables and tables[0].padding_idx is not None:
        most -= tables[0].padding_idx + 1  # where RoBERTa's positions start
    return most


def check_length(model: nn.Module, max_length: int) -> None:
    """Raise `ConfigError` if a model has fewer positions than `max_length`, instead of failing at a long text."""
    most = positions_of(model)
    if most is not None and max_length > most:
        raise ConfigError(f"max_length: got {max_length}, but the model has {most} positions; give at most that many")


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer adds before and after a text."""
    probe = "a"
    bare, whole = _token_ids(tokenizer, probe), [int(i) for i in tokenizer(probe)["input_ids"]]
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    if at is None or not bare:
        raise ConfigError(
            f"tokenizer: {type(tokenizer).__name__} encodes {probe!r} as {whole}, and as {bare} without special "
            "tokens; expected the second inside the first"
        )
    return whole[:at], whole[at + len(bare) :]


def _without_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """The tokens without end-of-sequence and separator tokens, since a causal model continues from there."""
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id}
    return [i for i in ids if i not in ends]
