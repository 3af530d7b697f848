"""The files next to the weights in a folder of transformers: config, generation config, tokenizer, model card. A merge
writes them, so that `from_pretrained` loads its result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, IntegrityError, nearest
from ..files import read_json, write_files
from .chat import TEMPLATE_FILE, TOKENIZER_CONFIG
from .files import refuse_left_overs
from .recipe import MergekitRecipe
from .vocabulary import TOKENIZER_FILE, Vocabulary

CONFIG_FILE, CARD, CODE = "config.json", "README.md", "*.py"
BESIDE = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    CODE,
)  # fmt: skip
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "spiece.model", "sentencepiece*.model", "*.tiktoken",
)  # fmt: skip
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype of a name such as `bfloat16` or `torch.float16`. Raises `ConfigError` for other names."""
    short = name.removeprefix("torch.") if name is not None else None
    if short is not None and short not in DTYPES:
        raise ConfigError(
            f"dtype: got {name!r}, expected one of {', '.join(DTYPES)}; did you mean {nearest(short, DTYPES)!r}?"
        )
    return None if short is None else DTYPES[short]


def transformers_config(path: Path) -> dict[str, Any]:
    """The config of a folder of transformers; empty for other paths. Raises `IntegrityError` for a damaged one."""
    return read_json(path / CONFIG_FILE) if path.is_dir() and (path / CONFIG_FILE).is_file() else {}


def result_config(recipe: MergekitRecipe, configs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The config of a recipe's result: the donor's, with the number of layers that are put together, and what it lists
    for each of them (such as `layer_types`) from where each comes from.

    Args:
        configs: model -> its config, which may be empty.
    """
    config = configs[recipe.donor]
    if recipe.slices[0].sources[0].layer_range is None or not config:
        return config
    key = next((k for k in LAYER_COUNTS if isinstance(config.get(k), int)), None)
    if key is None:
        raise ConfigError(
            f"{recipe.donor}: its {CONFIG_FILE} has none of {', '.join(LAYER_COUNTS)}, so the number of the "
            "result's layers is unknown"
        )
    lists = {k: v for k, v in config.items() if isinstance(v, list) and ("layer" in k or "block" in k)}
    listed: dict[str, list[Any]] = {k: [] for k, v in lists.items() if len(v) == config[key]}
    count = 0
    for part in recipe.slices:
        first = part.sources[0]
        start, stop = first.layer_range or (0, 0)
        count += stop - start
        own = configs[first.model]
        for name, values in listed.items():
            values += own.get(name, config[name])[start:stop]
    return {**config, key: count, **listed}


def refuse_others(
    out: Path,
    base: Path,
    config: Mapping[str, Any],
    *,
    tokenizer: Path | None = None,
    vocabulary: Vocabulary | None = None,
    template: str | None = None,
) -> None:
    """Raise `ConfigError` where `out` holds files of another model that `complete_folder`, given the same, would leave
    there and `from_pretrained` would read: a tokenizer's, a generation config, ..."""
    if config and out.is_dir():
        own = {*_from_others(base, tokenizer, vocabulary), *((TOKENIZER_FILE,) if vocabulary is not None else ())}
        own |= {TEMPLATE_FILE} if template is not None else set()
        refuse_left_overs(out, [p for p in (*BESIDE, *TOKENIZER) if p != CODE], own)


def complete_folder(
    out: Path,
    base: Path,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    vocabulary: Vocabulary | None = None,
    template: str | None = None,
    models: Sequence[str] = (),
    recipe: str = "",
) -> None:
    """Write the files next to the weights in `out`. Does nothing if the base is not a folder of transformers.

    Args:
        base: the source of the generation config. config: the result's config; empty if it is not such a folder. dtype:
        the weights' dtype.
        tokenizer: the folder of the tokenizer, by default the base. vocabulary: a joint vocabulary to write instead.
        template: a chat template instead of the tokenizer's own.
        models, recipe: the card's entries.

    Raises:
        IntegrityError: the disk is full or not writable.
    """
    if not config:
        return
    config = dict(config)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if vocabulary is not None:
        config["vocab_size"] = vocabulary.rows
    copied = sorted(_from_others(base, tokenizer, vocabulary).items())
    contents: dict[Path, bytes | Callable[[Path], object]] = {out / name: _copying(file) for name, file in copied}
    if template is not None:  # transformers reads the file, before version 4.50 the tokenizer's config
        about = read_json(dict(copied)[TOKENIZER_CONFIG]) if TOKENIZER_CONFIG in dict(copied) else {}
        contents[out / TOKENIZER_CONFIG] = json.dumps({**about, "chat_template": template}, indent=2).encode()
        contents[out / TEMPLATE_FILE] = template.encode()
    if vocabulary is not None:
        contents[out / TOKENIZER_FILE] = json.dumps(vocabulary.content, ensure_ascii=False).encode()
    contents[out / CARD] = card(out.name, models, recipe).encode()
    contents[out / CONFIG_FILE] = json.dumps(config, indent=2).encode()
    write_files(contents)


def _from_others(base: Path, tokenizer: Path | None, vocabulary: Vocabulary | None) -> dict[str, Path]:
    texts = vocabulary.source if vocabulary is not None else tokenizer or base
    return _matching(base, BESIDE) | _matching(texts, TOKENIZER)


def _copying(file: Path) -> Callable[[Path], object]:
    return lambda new: shutil.copyfile(file, new)


def _matching(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    return {f.name: f for pattern in patterns for f in folder.glob(pattern) if f.is_file()}


def tokenizer_folder(which: str, base: Path, parts: Sequence[Path]) -> Path:
    """The folder of `--tokenizer`: `base`, or one of the parts.

    Raises:
        ConfigError: it is neither. IntegrityError: it holds no tokenizer.
    """
    known = {"base": base, **{str(p): p for p in parts}}
    if which not in known:
        raise ConfigError(
            f"tokenizer: got {which!r}, expected base or one of the parts; did you mean {nearest(which, known)!r}?"
        )
    if not known[which].is_dir() or not _matching(known[which], TOKENIZER):
        raise IntegrityError(f"{known[which]} holds no tokenizer; use another part's, or leave --tokenizer out")
    return known[which]


def card(name: str, models: Sequence[str], recipe: str) -> str:
    """A model card as hubs show it."""
    listed = "\n".join(f"- `{m}`" for m in models)
    return (
        f"---\nlibrary_name: transformers\ntags:\n- merge\n- hatcl\n---\n\n# {name}\n\n"
        f"Merged with hatcl from\n\n{listed}\n\nby this recipe:\n\n```\n{recipe.strip()}\n```\n"
    )
