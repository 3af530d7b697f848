"""How a function becomes a command: put `@command("name")` above it.

typer reads the function's parameters. A parameter that is a dataclass becomes one option per field. A parameter of type
`Asked` marks a command that writes a run and adds --output, --resume and --config. The function prints through
`_console` and returns what --json prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..engine import folder as runs
from ..engine.folder import RunFolder
from ..engine.logs import LOGS
from ..errors import ConfigError, IntegrityError, nearest
from ..files import read_json
from ..report.page import Told
from ._console import print_json, quiet, say
from ._options import (
    SPELLED,
    as_texts,
    either_of,
    fields_as_options,
    made,
    read_options,
    read_value,
    spelled_hint,
    stored_value,
)

RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's folder, or one written by hatcl.save_pretrained.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
RUNS = Path("runs")
META = ("output", "resume", "config", "log", "json_")  # options of the command line, not of the run
Show = Callable[[Path, dict[str, Any]], None]
Page = Callable[[Path, dict[str, Any]], Told]


@dataclasses.dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: words after `hatcl`. body: the function. show: prints the results of a run, for a command that writes one.
            free: options that may differ when its run is resumed. place: from the options, the folder of a run if
            --output is not given. page: the content of a run's page, for a command that writes one.
    """

    name: str
    body: Callable[..., Any]
    show: Show | None = None
    free: frozenset[str] = frozenset()
    place: Callable[[Mapping[str, Any]], Path | None] | None = None
    page: Page | None = None

    @property
    def writes_run(self) -> bool:
        """Whether it has --output, --resume and --config."""
        return self.show is not None


@dataclasses.dataclass
class Answer:
    """The result of a command that ends badly: `content` for --json, and the exit code."""

    content: Any
    code: int = 1


COMMANDS: dict[str, Command] = {}


def command(
    name: str,
    *,
    show: Show | None = None,
    free: Collection[str] = ("device",),
    place: Callable[[Mapping[str, Any]], Path | None] | None = None,
    page: Page | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function the command `hatcl NAME`; see `Command`.

    Raises:
        ConfigError: the name is taken.
    """

    def add(body: Callable[..., Any]) -> Callable[..., Any]:
        if name in COMMANDS:
            raise ConfigError(f"command: {name!r} is taken by {COMMANDS[name].body.__qualname__}")
        COMMANDS[name] = Command(name, body, show, frozenset(free), place, page)
        return body

    return add


@dataclasses.dataclass
class Asked:
    """The request that the command line makes to a command that writes a run.

    Attributes:
        options: all options as config.json holds them; a body may replace paths and defaults by their final form.
        given: the names of the options that were given rather than left at their defaults.
        log: further writers that receive the figures of each step.
    """

    command: Command
    options: dict[str, Any]
    given: set[str]
    output: Path
    resume: bool
    log: tuple[str, ...] = ()
    _folder: RunFolder | None = None

    def folder(self, free: Collection[str] | None = None) -> RunFolder:
        """The run's folder, after checking that it is free or holds this run.

        Args:
            free: options that may differ when the run is resumed; None = those of the command.

        Raises:
            ConfigError: it is neither free nor this run's.
        """
        may_differ = self.command.free if free is None else free
        self._folder = RunFolder(self.output, self.command.name, self.options, self.resume, may_differ, self.log)
        return self._folder

    def close(self) -> None:
        """End the command, whether it succeeded or not."""
        if self._folder is not None:
            self._folder.close()


# --- from a function to a typer command ---


def typed(it: Command) -> Callable[..., None]:
    """The function that typer reads, with one parameter per option."""
    hints = typing.get_type_hints(it.body, include_extras=True)
    groups: dict[str, list[inspect.Parameter]] = {}
    parameters: list[inspect.Parameter] = []
    for name, p in inspect.signature(it.body).parameters.items():
        hint = hints[name]
        either = either_of(hint)
        if hint is Asked:
            continue
        if dataclasses.is_dataclass(hint) or either is not None:
            kinds = (typing.cast(type, hint),) if either is None else either.kinds
            taken = {q.name for q in parameters} | {n for n in inspect.signature(it.body).parameters if n != name}
            groups[name] = fields_as_options(kinds, None if p.default is p.empty else p.default, taken)
            parameters += groups[name]
        else:
            parameters.append(p.replace(annotation=spelled_hint(name, hint, p.default), kind=p.KEYWORD_ONLY))
    parameters += _meta(it)

    def run(context: typer.Context, **values: Any) -> None:
        given = {n for n in values if _was_given(context, n)}
        values = {n: read_value(hints_of.get(n), n, v) for n, v in values.items()}
        asked = {n: v for n, v in values.items() if n not in META}
        arguments = {n: v for n, v in values.items() if n in hints}
        for name, fields in groups.items():
            kind = hints[name]
            if either_of(kind) is not None:
                own = {q.name: values[q.name] for q in fields}
                arguments[name] = {n: v for n, v in own.items() if n in given and v is not None}
            else:
                arguments[name] = made(kind, values)
        for name, hint in hints.items():
            if hint is Asked:
                place = values["output"] or _run_place(it, values, values["resume"])
                options = {n: stored_value(v) for n, v in asked.items()}
                arguments[name] = Asked(it, options, given, place, values["resume"], tuple(values["log"] or ()))
        asks = [a for a in arguments.values() if isinstance(a, Asked)]
        with quiet(values["json_"]), _stoppable(context, arguments), contextlib.ExitStack() as stack:
            for one in asks:
                stack.callback(one.close)
            answer = it.body(**arguments)
        content, code = (answer.content, answer.code) if isinstance(answer, Answer) else (answer, 0)
        if it.show is not None and not values["json_"]:
            folder = asks[0].output
            it.show(folder, content)
            say(folder, "dim")
        if values["json_"]:
            print_json(content)
        if code:
            raise typer.Exit(code)

    hints_of = {p.name: p.annotation for p in parameters}
    first = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    run.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (first, *parameters)}
    run.__doc__ = it.body.__doc__
    run.__name__ = it.body.__name__
    return run


def _meta(it: Command) -> list[inspect.Parameter]:
    """The options that every command has, and those of every command that writes a run."""
    found: list[tuple[str, Any, Any]] = []
    if it.writes_run:
        where = "a new one in runs/" if it.place is None else "one inside of what the command reads"
        found += [
            ("output", Path | None, typer.Option("--output", help=f"The run's folder; by default {where}.")),
            (
                "resume", bool,
                typer.Option(
                    "--resume",
                    help="Resume the run in --output (by default the newest), or show it if it is finished. "
                         "Options that are not given are taken from the run.",
                ),
            ),
            (
                "config", Path | None,
                typer.Option(
                    "--config",
                    help="Options from a YAML or JSON file, such as a run's own config.json; options given on the "
                         "command line override them.",
                ),
            ),
            (
                "log", list[str] | None,
                typer.Option(
                    "--log",
                    help=f"Also send the figures of each step to {', '.join(LOGS)}; repeatable. The folder always "
                         "has them in metrics.jsonl and metrics.csv.",
                ),
            ),
        ]  # fmt: skip
    found.append(("json_", bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")))
    return [
        inspect.Parameter(
            n, inspect.Parameter.KEYWORD_ONLY, default=False if t is bool else None, annotation=Annotated[t, o]
        )
        for n, t, o in found
    ]


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "DEFAULT_MAP")


@contextlib.contextmanager
def _stoppable(context: typer.Context, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Ctrl-C ends a command with a message on how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        run = next((a for a in arguments.values() if isinstance(a, Asked)), None)
        again = f"{context.command_path} --resume --output {run.output}" if run else "the same command"
        raise Stopped(f"stopped. Resume with: {again}") from None


class Stopped(Exception):
    """The user pressed Ctrl-C; the text says how to resume."""


# --- options from files ---


def _run_place(it: Command, options: Mapping[str, Any], resume: bool) -> Path:
    """The folder of a new or resumed run if --output is not given."""
    if it.place is not None and (own := it.place(options)) is not None:
        return own
    numbers = sorted(int(path.name) for path in RUNS.glob("*") if path.name.isdigit())
    if not resume:
        return RUNS / f"{(numbers[-1] if numbers else 0) + 1:03d}"
    for number in reversed(numbers):
        config = RUNS / f"{number:03d}" / runs.CONFIG
        if config.exists() and read_json(config).get("command") == it.name:
            return config.parent
    raise ConfigError(f"--resume: there is no run of hatcl {it.name} in {RUNS}/; name its folder with --output")


class ReadsFiles(TyperCommand):
    """A command whose defaults come from --config and, with --resume, from the run."""

    it: Command

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Look for --config, --resume and --output first, and fill in the defaults that they give."""
        if self.it.writes_run and not {"--help", "-h"} & set(args):
            options, rest, _ = self.make_parser(ctx).parse_args(list(args))
            ctx.default_map = {**self._resumed(options), **self._configured(options)}
        return super().parse_args(ctx, args)

    def _resumed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        if not options.get("resume"):
            return {}
        told = {n: v for n, v in options.items() if isinstance(v, str)}
        folder = Path(options["output"]) if options.get("output") else _run_place(self.it, told, True)
        stored = runs.stored_config(folder)
        if stored is None:
            return {}
        if stored["command"] != self.it.name:
            raise ConfigError(
                f"--output: {folder} holds a run of hatcl {stored['command']}, not of hatcl {self.it.name}; name "
                "another folder"
            )
        return self._checked(stored["options"], str(folder / runs.CONFIG), stored=True)

    def _configured(self, options: Mapping[str, Any]) -> dict[str, Any]:
        if not options.get("config"):
            return {}
        path = Path(options["config"])
        found = read_options(path)
        other = found.pop("command", self.it.name)
        if other != self.it.name:
            raise ConfigError(f"--config: {path} holds options of hatcl {other}, not of hatcl {self.it.name}")
        return self._checked(found, f"--config: {path}")

    def _checked(self, found: Mapping[str, Any], where: str, stored: bool = False) -> dict[str, Any]:
        known = {p.name: p for p in self.params if p.name not in META and p.name != "help"}
        spelled = {n.rstrip("_"): n for n in known} | {n: n for n in known}
        out: dict[str, Any] = {}
        for key, value in found.items():
            text = str(key).replace("-", "_")
            name = spelled.get(SPELLED.get(text, text))
            if name is None and stored:
                raise IntegrityError(f"{where} has the option {key!r}, which hatcl {self.it.name} does not know")
            if name is None:
                raise ConfigError(
                    f"{where}: hatcl {self.it.name} has no option {key!r}; did you mean {nearest(key, spelled)!r}?"
                )
            if value is not None and value != {} and value != []:
                out[name] = as_texts(value, many=bool(known[name].multiple or known[name].nargs != 1))
        return out


def reads_files(it: Command) -> type[TyperCommand]:
    """The class of the typer command, bound to its `Command`."""
    return type("ReadsFiles", (ReadsFiles,), {"it": it})


def words(text: str) -> str:
    """A docstring's text for --help: paragraphs, without line breaks inside them."""
    return "\n\n".join(" ".join(p.split()) for p in re.split(r"\n\s*\n", inspect.cleandoc(text)))
