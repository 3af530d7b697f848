"""`hatcl show`: what came of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import number
from ..continual.folder import STATE
from ..engine import folder as runs
from ..errors import ConfigError
from ..files import complete, read_json
from ._command import COMMANDS, command
from ._console import say
from ._shown import SHARE, show_skills

ALSO = {"learn_sequence": "train"}  # what writes runs without a command -> the command that shows them


@command("show")
def show_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    share: Annotated[float, typer.Option(help="Share of the units that count as a task's skill.")] = SHARE,
) -> dict[str, Any]:
    """Show a run of any command, finished or not: its scores and measures, and its pictures."""
    number("--share", share, 0, 1, without="both", what="a share")
    if not run.exists():
        raise ConfigError(f"{run}: there is no such folder; name the folder of a run")
    name = _command_of(run)
    if name not in COMMANDS or COMMANDS[name].show is None:
        saved = (run / STATE).exists()
        more = f"; it holds a model, which hatcl describe {run} shows" if saved else "; name the folder of a run"
        raise ConfigError(f"{run}: holds no run of hatcl (no {runs.CONFIG} of one){more}")
    metrics = _so_far(run, name)
    COMMANDS[name].show(run, metrics)  # type: ignore[misc]
    if share != SHARE:
        show_skills(run, share)
    say(run, "dim")
    return metrics


def _command_of(run: Path) -> str:
    """The command that shows a run; empty where the folder holds something else."""
    try:
        config = runs.stored_config(run)
    except ConfigError:  # which speaks to those who would write there
        return ""
    return "" if config is None else ALSO.get(config["command"], config["command"])


def _so_far(run: Path, name: str) -> dict[str, Any]:
    if (run / runs.METRICS).exists():
        found: dict[str, Any] = read_json(run / runs.METRICS)
        return found
    progress = complete(run / runs.CHECKPOINT) / "progress.json"
    if not progress.exists():
        raise ConfigError(f"{run}: has nothing to show yet; go on with: hatcl {name} --resume --output {run}")
    so_far: dict[str, Any] = read_json(progress)["result"]
    return so_far
