"""How the commands read options that several of them have."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ConfigError, nearest


def key_values(flag: str, pairs: Sequence[str] | None) -> dict[str, Any]:
    """`key=value` pairs, values read as Python literals where they are ones (true and false too) and as text otherwise.

    Raises:
        ConfigError: something else.
    """
    values: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"{flag}: got {pair!r}, expected key=value")
        try:
            values[key] = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        except (ValueError, SyntaxError):
            values[key] = text
    return values


def usable_device(device: str) -> str:
    """The device of this name; for `auto` a GPU where there is one.

    Raises:
        ConfigError: it cannot be used here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device: {device!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return device


def chosen(flag: str, value: str, choices: Sequence[str]) -> str:
    """The value, if it is one of the choices.

    Raises:
        ConfigError: it is not; with the nearest one.
    """
    if value not in choices:
        near = nearest(value, choices)
        many = f"expected one of {', '.join(choices)}; " if len(choices) < 12 else ""
        raise ConfigError(f"{flag}: got {value!r}, {many}did you mean {near!r}?")
    return value
