"""`hatcl merge`: merge checkpoints file to file, by arguments, a recipe, or a recipe of mergekit."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import known_options
from ..errors import ConfigError
from ..files import keys_of_json, refuse_run
from ..vectors.mergekit import follow_recipe
from ..vectors.merging.registry import merge_info
from ..vectors.stream import compose_files
from ._command import command
from ._console import Bar, say
from ._options import absolute_path, read_options

RECIPES = (".yaml", ".yml", ".json")
# options of merging methods that take functions, modules, or tensors
IN_PYTHON = ("model", "batches", "forward", "fishers", "grams", "evaluate", "scales")
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The content of a recipe's file.

    Args:
        base: the pretrained checkpoint. parts: checkpoints, task vectors or adapters; a list of paths (PATH:COEFFICIENT
        if needed), or a mapping from paths to coefficients.
        coefficients: for a list of parts, in its order.
        method: a merging method instead of the sum. options: its options.
        only, skip, embeddings, dtype, tokenizer: as the command's options of the same names.
    """

    base: str
    parts: Any
    coefficients: Any = None
    method: str | None = None
    options: Mapping[str, Any] | None = None
    only: Any = None
    skip: Any = None
    embeddings: str | None = None
    dtype: str | None = None
    tokenizer: str | None = None


@command("merge")
def merge_command(
    base: Annotated[
        Path,
        typer.Argument(
            metavar="BASE",
            help="The pretrained checkpoint: a safetensors file, or a folder of shards. Or, alone, a recipe: a "
            ".yaml or .json file with base, parts, and optionally coefficients, method, options, only, skip, "
            "embeddings, dtype and tokenizer; or a recipe of mergekit.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="A folder, or a file that ends in .safetensors.")],
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PART[:COEFFICIENT]]...",
            help="Fine-tuned checkpoints, saved task vectors or folders of LoRA adapters, such as cars/:0.4; the "
            "default coefficient is 1.",
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="A merging method, such as ties, instead of the sum.")] = None,
    set_: Annotated[
        Mapping[str, Any] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of --method, such as density=0.2; repeatable."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="PATTERN", help="Merge only these tensors, such as '*.mlp.*'; repeatable."),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", metavar="PATTERN", help="Leave these tensors as BASE has them; repeatable."),
    ] = None,
    embeddings: Annotated[
        str,
        typer.Option(
            metavar="equal|common", help="common: if a PART's vocabulary has another size, merge the common rows."
        ),
    ] = "equal",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Store bfloat16, float16, float32 or float64; by default like BASE.")
    ] = None,
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", metavar="base|PART", help="Whose tokenizer the result gets.")
    ] = "base",
    shard_size: Annotated[str, typer.Option(help="How large a file may become: 100MB, 2GB, ...")] = "100MB",
    vector: Annotated[bool, typer.Option("--vector", help="Write the task vector instead of the checkpoint.")] = False,
    buffers: Annotated[
        bool, typer.Option("--buffers", help="Merge running statistics too; otherwise they are taken from BASE.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Refuse task vectors that were taken from another base.")
    ] = True,
) -> dict[str, Any]:
    """Add what fine-tuning changed to a checkpoint: BASE + sum of COEFFICIENT * (PART - BASE), file to file.

    The memory needed is that of one shard and a few tensors. After an interruption, the same command resumes where it
    stopped. If BASE is a folder of transformers, so is the result, with config, tokenizer and a model card.
    """
    _refuse_hatcl(output)
    size, alone = _bytes("--shard-size", shard_size), base.suffix in RECIPES
    if alone and parts:
        raise ConfigError(
            f"merge: {base} is a recipe, which names its parts; also got {parts[0]}; write it in the recipe"
        )
    content = read_options(base) if alone else {}
    if "merge_method" in content:
        told = {"--method": method, "--set": set_, "--only": only, "--skip": skip, "--dtype": dtype, "--vector": vector}
        told |= {"--buffers": buffers, "--tokenizer": tokenizer != "base", "--embeddings": embeddings != "equal"}
        given = next((name for name, value in told.items() if value), None)
        if given is not None:
            raise ConfigError(f"{given}: {base} is a recipe of mergekit, which holds all options; write it there")
        with Bar(None, "bytes", "merging") as bar:
            follow_recipe(
                content, output, folder=base.parent, text=base.read_text(), shard_bytes=size,
                progress=lambda done, total: bar.says("merging", completed=done, total=total),
            )  # fmt: skip
        say(f"{output}: {base}")
        return {"output": absolute_path(output), "recipe": content}
    words = dict(set_ or {})
    by_words: dict[str, Any] = {"method": method, "only": only, "skip": skip, "dtype": dtype}
    by_words |= {"embeddings": embeddings} if embeddings != "equal" else {}
    by_words |= {"tokenizer": tokenizer} if tokenizer != "base" else {}
    chosen = by_words
    if alone:
        recipe = _recipe(base, content)
        start, pairs = base.parent / recipe.base, _weighted_parts(base, recipe)
        options, chosen = {**(recipe.options or {}), **words}, _either(base, recipe, by_words)
    else:
        start, pairs, options = base, [_part(text) for text in parts or ()], words
    if not pairs:
        raise ConfigError("merge: no parts; give at least one PART, or a recipe that ends in .yaml or .json")
    if chosen["method"] is not None:
        _refuse_data(chosen["method"], options)
    flags = {f"--{name}": value for name, value in by_words.items()} | {"--buffers": buffers, "--no-check": not check}
    card = _words(base, [] if alone else pairs, flags, words)
    if alone:
        card = base.read_text() + (f"\n# {card}" if words or any(flags.values()) else "")
    with Bar(None, "bytes", "merging") as bar:
        compose_files(
            start, pairs, output, options=options, vector=vector, buffers=buffers, check=check, card=card,
            shard_bytes=size, **{name: value for name, value in chosen.items() if value},
            progress=lambda done, total: bar.says("merging", completed=done, total=total),
        )  # fmt: skip
    say(f"{output}: {start} and {len(pairs)} part{'s' * (len(pairs) > 1)}")
    return {
        "output": absolute_path(output), "base": absolute_path(start), "method": chosen["method"], "options": options,
        "parts": [{"path": absolute_path(path), "coefficient": c} for path, c in pairs],
    }  # fmt: skip


def _words(base: Path, pairs: list[tuple[Path, float]], told: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """The command as a model card shows it.

    Args:
        told: flag -> what was given: a value, several, or True for a switch. options: of the method.
    """
    words = ["hatcl", "merge", str(base), *(f"{path}:{c!r}" for path, c in pairs)]
    for flag, value in told.items():
        each = value if isinstance(value, list) else [value] if value else []
        words += [w for v in each for w in ([flag] if v is True else [flag, str(v)])]
    return shlex.join([*words, *(w for k, v in options.items() for w in ("--set", f"{k}={json.dumps(v)}"))])


def _recipe(path: Path, content: Mapping[str, Any]) -> Recipe:
    known_options(Recipe, content)
    missing = [name for name in ("base", "parts") if not content.get(name)]
    if missing:
        raise ConfigError(f"{path}: the recipe lacks {' and '.join(missing)}; it needs base and parts")
    recipe = Recipe(**content)
    if not isinstance(recipe.options or {}, Mapping):
        raise ConfigError(f"{path}: options is {recipe.options!r}, expected a mapping")
    for name in ("only", "skip"):
        value = getattr(recipe, name)
        if not all(isinstance(p, str) for p in (value if isinstance(value, list) else [value or ""])):
            raise ConfigError(f"{path}: {name} is {value!r}, expected a pattern of names, or a list of them")
    for name in ("method", "embeddings", "dtype", "tokenizer"):
        value = getattr(recipe, name)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{path}: {name} is {value!r}, expected a text")
    return recipe


def _either(path: Path, recipe: Recipe, told: Mapping[str, Any]) -> dict[str, Any]:
    """The options that both the command line and the recipe may give, taken from whichever has them.

    Raises:
        ConfigError: the two differ.
    """
    out = dict(told)
    for name in ("method", "only", "skip", "embeddings", "dtype", "tokenizer"):
        own, value = getattr(recipe, name), told.get(name)
        if name in ("only", "skip") and isinstance(own, str):
            own = [own]
        if None not in (own, value) and own != value:
            raise ConfigError(f"--{name}: got {value}, but {path} has the {name} {own}; leave one of them out")
        if value is None:
            at_home = name == "tokenizer" and own not in (None, "base")
            out[name] = str(path.parent / own) if at_home else own
    return out


def _refuse_data(method: str, options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a method or an option that takes values that a command line cannot pass."""
    info = merge_info(method)
    needed = [o for o in info.needs if o in IN_PYTHON]
    asked = needed or [o for o in options if o in IN_PYTHON and o in info.options]
    if asked:
        raise ConfigError(
            f"{'--method' if needed else '--set'}: {method} {'needs' if needed else 'takes'} {' and '.join(asked)} in "
            f"Python only: hatcl.merge(vectors, {method!r}, {', '.join(f'{o}=...' for o in asked)}), see "
            "docs/merging.md. The commands that use data are `hatcl atlas add`, which learns how much of each part "
            "every tensor gets, and `hatcl atlas sweep`, which tries scales"
        )


def _weighted_parts(path: Path, recipe: Recipe) -> list[tuple[Path, float]]:
    """The parts and their coefficients; relative paths start at the recipe's folder."""
    parts, given = recipe.parts, recipe.coefficients
    if isinstance(parts, Mapping):
        if given is not None:
            raise ConfigError(f"{path}: parts has coefficients already; leave out coefficients")
        pairs = list(parts.items())
    elif isinstance(parts, list) and given is None:
        return [_part(str(part), path.parent) for part in parts]
    elif isinstance(parts, list) and isinstance(given, list) and len(parts) == len(given):
        pairs = list(zip(parts, given, strict=True))
    else:
        raise ConfigError(
            f"{path}: expected parts as a list of paths and as many coefficients, or as a mapping from paths to "
            "coefficients"
        )
    wrong = next((c for _, c in pairs if isinstance(c, bool) or not isinstance(c, (int, float))), None)
    if wrong is not None:
        raise ConfigError(f"{path}: the coefficient {wrong!r} is not a number")
    return [(path.parent / str(part), float(c)) for part, c in pairs]


def _part(text: str, folder: Path = Path()) -> tuple[Path, float]:
    """Read `path` or `path:coefficient`."""
    path, colon, number = text.rpartition(":")
    if not colon or (folder / text).exists():
        return folder / text, 1.0
    try:
        return folder / path, float(number)
    except ValueError:
        raise ConfigError(
            f"{text}: no such file, and {number!r} is not a coefficient; expected PATH or PATH:COEFFICIENT"
        ) from None


def _refuse_hatcl(output: Path) -> None:
    """Raise `ConfigError` if writing here would overwrite a run's config or the weights of a model with tasks."""
    refuse_run(output)
    if {"fingerprint", "map"} <= set(keys_of_json(output / "config.json")):
        raise ConfigError(f"--output {output}: a model with tasks is there; name another folder")


def _bytes(flag: str, text: str) -> int:
    found = re.fullmatch(r"([\d.]+) *([KMG]?I?B)", text.strip().upper())
    try:
        size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    except (ValueError, KeyError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{flag}: got {text!r}, expected a size such as 100MB or 2GB")
    return size
