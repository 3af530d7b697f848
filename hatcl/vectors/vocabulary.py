"""One vocabulary for models whose tokenizers differ, as mergekit's `tokenizer_source` makes it. Read from and written
to tokenizer.json, the format of the tokenizers library."""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, IntegrityError
from ..files import read_json
from .merging.layers import layer_of
from .recipe import MergekitRecipe
from .tensors import Kind, Lazy, kinds_of

TOKENIZER_FILE = "tokenizer.json"
POSITIONS = re.compile(r"wpe|position|token_type")  # their number of rows may be the vocabulary's by chance


@dataclass(frozen=True)
class Vocabulary:
    """The result's.

    Attributes:
        tokens: token -> its row. rows: of its embeddings. source: the folder that the tokenizer's other files are from.
        content: its tokenizer.json. base: the model whose embedding a token gets where others lack it.
        ids: model -> token -> row. sizes: model -> its own number of rows.
    """

    tokens: Mapping[str, int]
    rows: int
    source: Path
    content: Mapping[str, Any]
    base: str
    ids: Mapping[str, Mapping[str, int]]
    sizes: Mapping[str, int]


def joint_vocabulary(recipe: MergekitRecipe, folders: Mapping[str, Path]) -> Vocabulary | None:
    """The vocabulary that a recipe asks for; None where it asks for none.

    Raises:
        ConfigError: a source that is none of the models. IntegrityError: a tokenizer that cannot be read.
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
    rows, multiple = max(tokens.values()) + 1, recipe.pad_to_multiple_of or 1
    rows = -(-rows // multiple) * multiple
    return Vocabulary(tokens, rows, folders[chosen], content, base, ids, sizes)


def _tokens(content: Mapping[str, Any], size: int) -> dict[str, int]:
    """Token -> id of a tokenizer.json, those that have an embedding."""
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
    """A model's tensors with the vocabulary's rows. A token that the model lacks has the row of the only model that has
    it, else the base's, else the mean of those that have it; one that no model has has zeros.

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
            if token not in known:
                out[row] = _borrowed(vocabulary, token, every, out[row])
        filled = max(vocabulary.tokens.values()) + 1
        out[filled:] = out[:filled].double().mean(0).to(out.dtype)  # what padding adds, as in mergekit
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
