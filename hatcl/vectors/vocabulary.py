"""One vocabulary for models whose tokenizers differ, as in mergekit's `tokenizer_source`. It is read from and written
to tokenizer.json, the format of the tokenizers library."""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, IntegrityError
from ..files import read_json
from .merging.layers import layer_of
from .recipe import MergekitRecipe, TokenSource
from .tensors import Kind, Lazy, kinds_of

TOKENIZER_FILE = "tokenizer.json"
POSITIONS = re.compile(r"wpe|position|token_type")  # their number of rows may equal the vocabulary's by chance


@dataclass(frozen=True)
class Vocabulary:
    """The result's vocabulary.

    Attributes:
        tokens: token -> its row. rows: the number of embeddings. source: the folder of the tokenizer's other files.
            content: its tokenizer.json. base: the model whose embedding a token gets if others lack it. ids: model ->
            token -> row. sizes: model -> its own number of rows. asked: token -> the model and row of the embedding
            that the recipe assigns, None = zeros. forced: tokens for which every model gets this embedding.
    """

    tokens: Mapping[str, int]
    rows: int
    source: Path
    content: Mapping[str, Any]
    base: str
    ids: Mapping[str, Mapping[str, int]]
    sizes: Mapping[str, int]
    asked: Mapping[str, tuple[str, int] | None] = field(default_factory=dict)
    forced: frozenset[str] = frozenset()


def joint_vocabulary(recipe: MergekitRecipe, folders: Mapping[str, Path]) -> Vocabulary | None:
    """The vocabulary that a recipe requests; None if it requests none.

    Raises:
        ConfigError: a source is not one of the models, or lacks a token. IntegrityError: a tokenizer cannot be read.
    """
    source = recipe.tokenizer_source
    if source is None:
        return None
    base = recipe.donor
    if source not in ("base", "union", *folders):
        raise ConfigError(f"tokenizer_source: got {source!r}, expected base, union or one of {', '.join(folders)}")
    sizes = {m: read_json(f / "config.json").get("vocab_size") for m, f in folders.items()}
    unknown = next((m for m, size in sizes.items() if not isinstance(size, int)), None)
    if unknown is not None:
        raise IntegrityError(f"{folders[unknown] / 'config.json'} has no vocab_size, which tokenizer_source needs")
    contents = {m: read_json(f / TOKENIZER_FILE) for m, f in folders.items() if (f / TOKENIZER_FILE).exists()}
    chosen = base if source in ("base", "union") else source
    if chosen not in contents:
        raise IntegrityError(
            f"{folders[chosen]} has no {TOKENIZER_FILE}; save its tokenizer again with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    ids = {m: _tokens(contents.get(m, contents[chosen]), sizes[m]) for m in folders}
    content, tokens = copy.deepcopy(contents[chosen]), dict(ids[chosen])
    if source == "union":
        for m in recipe.models:
            for token, _ in sorted(ids[m].items(), key=operator.itemgetter(1)):
                if token not in tokens:
                    tokens[token] = max(tokens.values()) + 1
                    content.setdefault("added_tokens", []).append(_added_tokens(token, tokens[token], contents[m]))
    for token in recipe.tokens:
        if token not in tokens:
            having = next((m for m in contents if token in ids[m]), chosen)
            tokens[token] = max(tokens.values()) + 1
            content.setdefault("added_tokens", []).append(_added_tokens(token, tokens[token], contents[having]))
    rows, multiple = max(tokens.values()) + 1, recipe.pad_to_multiple_of or 1
    rows = -(-rows // multiple) * multiple
    asked = {token: _row_asked(token, source, ids, sizes) for token, source in recipe.tokens.items()}
    forced = frozenset(token for token, source in recipe.tokens.items() if source.force)
    return Vocabulary(tokens, rows, folders[chosen], content, base, ids, sizes, asked, forced)


def _row_asked(
    token: str, source: TokenSource, ids: Mapping[str, Mapping[str, int]], sizes: Mapping[str, int]
) -> tuple[str, int] | None:
    if source.model is None:
        return None
    if source.model not in ids:
        raise ConfigError(f"tokenizer.tokens.{token}: got {source.model!r}, expected one of {', '.join(ids)}")
    row = ids[source.model].get(source.token or token) if source.token_id is None else source.token_id
    if row is None or row >= sizes[source.model]:
        what = f"token {source.token or token!r}" if source.token_id is None else f"row {source.token_id}"
        raise ConfigError(f"tokenizer.tokens.{token}: {source.model} has no {what}; name another one")
    return source.model, row


def _tokens(content: Mapping[str, Any], size: int) -> dict[str, int]:
    """Token -> id in a tokenizer.json, for tokens with an embedding."""
    vocab = content.get("model", {}).get("vocab", {})
    own = {token: i for i, (token, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    own |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return {token: i for token, i in own.items() if i < size}


def _added_tokens(token: str, row: int, content: Mapping[str, Any]) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    known = next((t for t in content.get("added_tokens", []) if t["content"] == token), plain)
    return {**known, "id": row, "content": token}


def aligned_to(
    vocabulary: Vocabulary, model: str, tensors: Mapping[str, Tensor], models: Mapping[str, Mapping[str, Tensor]]
) -> Lazy[Tensor]:
    """A model's tensors with the vocabulary's rows. A token that the model lacks gets the row that the recipe assigns,
    else that of the only model that has it, else the base's, else the mean of those that have it; zeros if no model has
    it.

    Args:
        models: all of them, as they are.
    """
    kinds = kinds_of(tensors)
    mine = {n for n, k in kinds.items() if _speaks_of_tokens(n, k, vocabulary.sizes[model])}

    def read(name: str) -> Tensor:
        if name not in mine:
            return tensors[name]
        every = {m: t[name] for m, t in models.items() if name in t}
        own = every[model]
        out = own.new_zeros(vocabulary.rows, *own.shape[1:])
        known = vocabulary.ids[model]
        both = [(row, known[token]) for token, row in vocabulary.tokens.items() if token in known]
        out[[row for row, _ in both]] = own[[at for _, at in both]]
        for token, row in vocabulary.tokens.items():
            if token in vocabulary.asked and (token not in known or token in vocabulary.forced):
                place = vocabulary.asked[token]
                out[row] = 0 if place is None else every[place[0]][place[1]]
            elif token not in known:
                out[row] = _borrowed(vocabulary, token, every, out[row])
        filled = max(vocabulary.tokens.values()) + 1
        out[filled:] = out[:filled].double().mean(0).to(out.dtype)  # the rows for padding, as in mergekit
        return out

    shapes = {n: Kind((vocabulary.rows, *k.shape[1:]), k.dtype) if n in mine else k for n, k in kinds.items()}
    return Lazy(shapes, read)


def _borrowed(vocabulary: Vocabulary, token: str, every: Mapping[str, Tensor], none: Tensor) -> Tensor:
    having = {m: t[vocabulary.ids[m][token]] for m, t in every.items() if token in vocabulary.ids[m]}
    if not having:
        return none
    if vocabulary.base in having and len(having) > 1:
        return having[vocabulary.base]
    return torch.stack([x.double() for x in having.values()]).mean(0).to(none.dtype)


def _speaks_of_tokens(name: str, kind: Kind, size: int) -> bool:
    outside = layer_of(name) is None and not POSITIONS.search(name)
    return outside and bool(kind.shape) and kind.shape[0] == size and kind.dtype.is_floating_point
