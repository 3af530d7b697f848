"""Options: made from the fields of dataclasses, read from texts and files, and kept as config.json has them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from ..config import help_of
from ..errors import ConfigError, IntegrityError
from ..files import read_json

# field -> option, where the two names differ
SPELLED = {"words": "word"}


@dataclasses.dataclass(frozen=True)
class Either:
    """Marks a parameter that is a mapping of the given options, whose names are fields of several dataclasses."""

    kinds: tuple[type, ...]


# --- from fields to options ---


def fields_as_options(kinds: tuple[type, ...], default: Any, taken: Collection[str]) -> list[inspect.Parameter]:
    """One option per field. Fields of the same name in several dataclasses share one option without a default."""
    found: dict[str, inspect.Parameter] = {}
    for kind in kinds:
        hints, said = typing.get_type_hints(kind, include_extras=True), help_of(kind)
        for f in dataclasses.fields(kind):
            name = SPELLED.get(f.name, f.name)
            if name in taken:
                continue
            first = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            value = getattr(default, f.name) if type(default) is kind else first
            hint, text = hints[f.name], said[f.name]
            if len(kinds) > 1:
                before, own = _said(found.get(name)), f"{text} (default {value})"
                if before.startswith(f"{text} (default"):  # where the words are the same, only the defaults are added
                    own = before if before == own else f"{before[:-1]} / {value})"
                    before = ""
                text = " / ".join(t for t in (before, own) if t)
                hint, value = _optional(hint), None
            if f.name == "device":
                value, text = "auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."
            value = inspect.Parameter.empty if value is dataclasses.MISSING else value
            annotation = spelled_hint(name, hint, value, text)
            if _is_mapping(hint) or _is_tuple(hint):
                value = None
            found[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation)
    return list(found.values())


def made(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass made from the options named like its fields. Raises the errors of its constructor."""
    hints, out = typing.get_type_hints(kind), {}
    for f in dataclasses.fields(kind):
        name = SPELLED.get(f.name, f.name)
        if name in values and not (values[name] is None and (_is_mapping(hints[f.name]) or _is_tuple(hints[f.name]))):
            out[f.name] = values[name]
    return kind(**out)


def options_of(kind: Any) -> set[str]:
    """The names of the options of a dataclass's fields."""
    return {SPELLED.get(f.name, f.name) for f in dataclasses.fields(kind)}


def spelled(options: Any) -> dict[str, Any]:
    """The fields of a dataclass's instance by the names of their options."""
    return {SPELLED.get(name, name): value for name, value in dataclasses.asdict(options).items()}


def _said(p: inspect.Parameter | None) -> str:
    return "" if p is None else str(typing.get_args(p.annotation)[1].help)


def spelled_hint(name: str, hint: Any, default: Any, text: str = "") -> Any:
    """The annotation that typer reads, for a parameter that may have one already."""
    inside, *marks = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    option = next((m for m in marks if isinstance(m, typer.models.ParameterInfo)), None)
    if option is None:
        flag = "--" + name.rstrip("_").replace("_", "-")
        if bool in (inside, *typing.get_args(inside)):
            flag = f"{flag}/--no-{flag[2:]}"
        option = typer.Option(flag, help=text, metavar="KEY=VALUE" if _is_mapping(inside) else None)
    if _is_mapping(inside):
        texts = typing.get_args(_bare(inside))[1:] == (str,)
        return Annotated[list[str] | None, option, label_texts if texts else key_values]
    if _is_tuple(inside):
        return Annotated[list[str] | None, option, _several]
    return Annotated[inside, option]


def _bare(hint: Any) -> Any:
    """A hint without its None."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        left = [a for a in typing.get_args(hint) if a is not type(None)]
        return left[0] if len(left) == 1 else hint
    return hint


def _optional(hint: Any) -> Any:
    return typing.Optional[_bare(hint)]  # noqa: UP007, UP045


def _is_mapping(hint: Any) -> bool:
    return typing.get_origin(_bare(hint)) in (Mapping, dict)


def _is_tuple(hint: Any) -> bool:
    return typing.get_origin(_bare(hint)) is tuple


def either_of(hint: Any) -> Either | None:
    marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    return next((m for m in marks if isinstance(m, Either)), None)


# --- from texts to values, and back ---


def read_value(annotation: Any, name: str, value: Any) -> Any:
    """A value as the body receives it, read by the last mark of its annotation: `key=value` texts become a mapping."""
    marks = typing.get_args(annotation)[2:]
    readers = [m for m in marks if callable(m)]
    flag = "--" + name.rstrip("_").replace("_", "-")
    return readers[0](flag, value) if readers and value is not None else value


def key_values(flag: str, pairs: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` pairs. Values that are Python literals (or true, false) are read as such, others as text.

    Raises:
        ConfigError: a text has another form.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"{flag}: got {pair!r}, expected key=value")
        try:
            values[key] = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        except (ValueError, SyntaxError):
            values[key] = text
    return values


def label_texts(flag: str, pairs: Sequence[str]) -> dict[str, str]:
    """Read `key=text` pairs.

    Raises:
        ConfigError: a text has another form, or a key appears twice.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (key and equals and text):
            raise ConfigError(f"{flag}: got {pair!r}, expected KEY=VALUE")
        if key in values:
            raise ConfigError(f"{flag}: got {key!r} twice, expected each once")
        values[key] = text
    return values


def _several(flag: str, values: Sequence[str]) -> tuple[str, ...]:
    return tuple(values)


def absolute_path(path: Path | str) -> str:
    """A path as config.json holds it."""
    return str(Path(path).absolute())


def stored_value(value: Any) -> Any:
    """A value as config.json holds it."""
    if isinstance(value, Path):
        return absolute_path(value)
    return [stored_value(v) for v in value] if isinstance(value, (list, tuple)) else value


def usable_device(device: str) -> str:
    """The device of this name; for `auto` a GPU if there is one.

    Raises:
        ConfigError: the device cannot be used here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device: {device!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return device


def as_texts(value: Any, many: bool) -> Any:
    """A value as the texts that the command line would have passed."""
    if isinstance(value, Mapping):
        return [f"{k}={_literal(v)}" for k, v in value.items()]
    if many:
        values = value if isinstance(value, (list, tuple)) else [value]
        return [json.dumps(v) if isinstance(v, Mapping) else str(v) for v in values]
    return value if isinstance(value, bool) else str(value)


def _literal(value: Any) -> str:
    if not isinstance(value, str):
        return repr(value)
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return repr(value)  # a text that looks like a number


# --- from files ---


def read_options(path: Path) -> dict[str, Any]:
    """Read options from a YAML or JSON file. For a run's config.json these are its `options`, plus `command`.

    Raises:
        IntegrityError: the file cannot be read. ConfigError: it does not hold options.
    """
    if path.suffix == ".json":
        content = read_json(path, object)
    else:
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise IntegrityError(f"{path} cannot be read as YAML ({error}); is the path right?") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}, expected a mapping from options to values")
    if isinstance(content.get("options"), dict) and "command" in content:
        return {**content["options"], "command": content["command"]}
    return content
