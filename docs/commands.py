"""The command reference, made from the commands themselves.

    python docs/commands.py     # writes docs/commands.md

A test compares the page with what this gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from hatcl import commands

PAGE = Path(__file__).with_name("commands.md")


def leaves(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its words."""
    if hasattr(command, "commands"):  # a group
        for name, child in sorted(command.commands.items()):
            yield from leaves(child, f"{path} {name}")
    else:
        yield path, command


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def row(option: Any) -> str:
    """An option's names, its default and its help."""
    if option.param_type_name == "argument":
        names, default = f"`{option.metavar or option.name.upper()}`", ""
    else:
        names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
        value = option.default if not callable(option.default) else None
        shown = getattr(value, "value", value)
        default = "" if shown is None or shown is False or shown in ("", [], ()) else f"`{cell(str(shown))}`"
    return f"| {names} | {default} | {cell(getattr(option, 'help', None) or '')} |"


def section(path: str, command: Any) -> str:
    text = inspect.cleandoc(command.help or "")
    rows = [row(option) for option in command.params if not getattr(option, "hidden", False)]
    table = ["| option | default | meaning |", "|---|---|---|", *rows] if rows else []
    return "\n".join([f"## {path}", "", text, "", *table])


def page() -> str:
    root = typer.main.get_command(commands.app())
    found = list(leaves(root, "hatcl"))
    contents = [f"- [{path}](#{path.replace(' ', '-')})" for path, _ in found]
    head = (
        "Written by `python docs/commands.py` from the commands themselves; `hatcl COMMAND --help` prints the same. "
        "`hatcl --version --verbose` prints what a bug report needs."
    )
    return "\n\n".join(["# Commands", head, "\n".join(contents), *(section(*one) for one in found)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
