"""The `hatcl` command. Each file or folder here whose name does not start with an underscore holds commands and is
found automatically: to add a command, add a file with a function under `@command("name")`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import hatcl

from ..errors import ConfigError, HATError
from ._command import COMMANDS, Answer, Asked, Command, Stopped, command, reads_files, typed, words
from ._console import Bar, err, fail, out, say
from ._options import Either
from ._version import environment

__all__ = ["COMMANDS", "Answer", "Asked", "Bar", "Command", "Either", "command", "err", "main", "out", "say"]
GROUPS: dict[str, str] = {}  # folders of commands -> their help text


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. Errors that the user can fix are shown as one message, with exit code 2."""
    try:
        app()(args, prog_name="hatcl")
    except Stopped as stopped:
        err.print(f"\n{stopped}", soft_wrap=True)
        raise SystemExit(130) from None
    except (HATError, OSError) as error:
        fail(error)
        raise SystemExit(2) from None


def app() -> typer.Typer:
    """The command line with every registered command, including those of this folder."""
    import_all(__path__, __name__)
    options: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False}
    root = typer.Typer(
        name="hatcl", help="Learn one task after another; what an earlier task learned stays, bit for bit.", **options
    )
    root.callback(invoke_without_command=True)(_print_version)
    groups: dict[str, typer.Typer] = {}
    for name, it in sorted(COMMANDS.items()):
        *above, last = name.split()
        parent = root
        if above:
            group = " ".join(above)
            if group not in groups:
                groups[group] = typer.Typer(name=group, help=GROUPS.get(group), **options)
                root.add_typer(groups[group])
            parent = groups[group]
        parent.command(last, cls=reads_files(it), help=words(it.body.__doc__ or ""))(typed(it))
    return root


def import_all(path: Sequence[str], package: str) -> None:
    """Import every module of a folder and of its subfolders whose name does not start with an underscore."""
    for module in pkgutil.iter_modules(path):
        if not module.name.startswith("_"):
            found = importlib.import_module(f"{package}.{module.name}")
            if module.ispkg:
                GROUPS[module.name] = words(found.__doc__ or "")
                import_all(found.__path__, found.__name__)


def _print_version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="With --version: also print what a bug report needs.")
    ] = False,
) -> None:
    if verbose and not version:
        raise ConfigError("--verbose belongs to --version: hatcl --version --verbose")
    if version:
        lines = [f"{name}: {value}" for name, value in environment().items()] if verbose else [hatcl.__version__]
        out.print("\n".join(lines), highlight=False, soft_wrap=True)
        raise typer.Exit
