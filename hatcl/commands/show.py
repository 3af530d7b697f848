"""`hatcl show`: show the results of a run, or compare several runs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from ..config import number
from ..continual.folder import STATE
from ..engine import folder as runs
from ..engine.state import kept_whole
from ..errors import ConfigError
from ..files import complete, read_json, write_files
from ..report.page import REPORT, Told, differing, one_page, page_of_several
from ..report.picture import short
from ._command import COMMANDS, command
from ._console import out, say
from ._shown import SHARE, show_skills

ALSO = {"learn_sequence": "train"}  # functions that write runs without a command -> the command that shows them


@command("show")
def show_command(
    run: Annotated[list[Path], typer.Argument(metavar="RUN...", help="The folder of a run; several are compared.")],
    share: Annotated[float, typer.Option(help="Share of the units that count as a task's skill.")] = SHARE,
    output: Annotated[
        Path | None,
        typer.Option(
            help=f"The page to write, an .html file; by default {REPORT} in the folder of a single run, and no page "
            "for several runs."
        ),
    ] = None,
) -> dict[str, Any]:
    """Show a run of any command, finished or not: its scores and measures, its pictures, and a page with all of them.

    The page is one HTML file that needs no network. For several runs, the figures and the options that differ are shown
    side by side.
    """
    number("--share", share, 0, 1, without="both", what="a share")
    if output is not None and output.suffix != ".html":
        raise ConfigError(f"--output: got {output}, expected a file that ends in .html")
    twice = next((r for i, r in enumerate(run) if r in run[:i]), None)
    if twice is not None:
        raise ConfigError(f"{twice} is named twice; name each run once")
    found = {one: _run_of(one) for one in run}
    if len(run) > 1:
        return _compared(found, output)
    where, (name, metrics) = next(iter(found.items()))
    with _understood(where):
        COMMANDS[name].show(where, metrics)  # type: ignore[misc]
    if share != SHARE:
        show_skills(where, share)
    told = _page_of(where, name, metrics)
    page = output or where / REPORT
    write_files({page: one_page(where, where.resolve().name, told.top, told.parts)})
    say(page, "dim")
    return metrics


def _run_of(run: Path) -> tuple[str, dict[str, Any]]:
    """The command that shows a run, and the run's results so far."""
    if not run.exists():
        raise ConfigError(f"{run}: no such folder; name the folder of a run")
    name = _command_of(run)
    if name not in COMMANDS or COMMANDS[name].show is None:
        saved = (run / STATE).exists()
        more = f"; it holds a model, which hatcl describe {run} shows" if saved else "; name the folder of a run"
        raise ConfigError(f"{run} holds no run of hatcl (it has no {runs.CONFIG} of a run){more}")
    return name, _so_far(run, name)


def _page_of(run: Path, name: str, metrics: dict[str, Any]) -> Told:
    page = COMMANDS[name].page
    with _understood(run):
        return Told("", [], {}) if page is None else page(run, metrics)


def _understood(run: Path) -> contextlib.AbstractContextManager[None]:
    """Wraps the use of a folder's content, which may be incomplete or come from another program."""
    return kept_whole(f"{run}: what it says of the run", "to show it", "Copy the whole folder of the run again")


def _compared(found: Mapping[Path, tuple[str, dict[str, Any]]], output: Path | None) -> dict[str, Any]:
    """Compare several runs: print a table, and write a page if requested."""
    pages = {str(run): _page_of(run, name, metrics) for run, (name, metrics) in found.items()}
    figures = {str(run): {"command": name, **pages[str(run)].figures} for run, (name, _) in found.items()}
    options = {str(run): (runs.stored_config(run) or {})["options"] for run in found}
    keys = list(dict.fromkeys(key for told in figures.values() for key in told))
    out.print(_beside("", figures, [[key, *(told.get(key, "·") for told in figures.values())] for key in keys]))
    other = differing(options)
    if other:
        out.print(
            _beside("options that differ", figures, [[k, *(short(str(v), 24) for v in vs)] for k, vs in other.items()])
        )
    if output is not None:
        write_files({output: page_of_several(figures, options, {run: told.parts for run, told in pages.items()})})
        say(output, "dim")
    return {str(run): metrics for run, (_, metrics) in found.items()}


def _beside(title: str, runs_told: Mapping[str, Any], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left")
    table.add_column("")
    for run in runs_told:
        table.add_column(short(run, 24), justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _command_of(run: Path) -> str:
    """The command that shows a run; empty if the folder holds something else."""
    try:
        config = runs.stored_config(run)
    except ConfigError:  # its text is meant for commands that write there
        return ""
    return "" if config is None else ALSO.get(config["command"], config["command"])


def _so_far(run: Path, name: str) -> dict[str, Any]:
    if (run / runs.METRICS).exists():
        found: dict[str, Any] = read_json(run / runs.METRICS)
        return found
    progress = complete(run / runs.CHECKPOINT) / "progress.json"
    if not progress.exists():
        command = (runs.stored_config(run) or {})["command"]
        go_on = f"with: hatcl {name} --resume --output {run}" if command == name else f"by calling {command} again"
        raise ConfigError(f"{run} has nothing to show yet; continue {go_on}")
    with _understood(run):
        so_far: dict[str, Any] = read_json(progress)["result"]
    return so_far
