"""`hatcl list`: list the names of models."""

from __future__ import annotations

from typing import Annotated

import typer

import hatcl

from ..errors import ConfigError
from ._command import command
from ._console import plain


@command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="A name with wildcards, such as 'hat_*resnet*'.")] = "*",
) -> list[str]:
    """List the names that hatcl train --model takes: every timm model with hat_ in front of its name."""
    names = hatcl.list_models(pattern)
    if not names:
        raise ConfigError(f"no model matches {pattern!r}; try a wider pattern such as 'hat_*resnet*'")
    plain("\n".join(names))
    return list(names)
