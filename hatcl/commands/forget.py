"""`hatcl forget`: erase a task."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

import hatcl

from ..continual import folder as kept
from ..continual.result import SequenceResult
from ..engine import folder as runs
from ..engine.state import kept_whole
from ..errors import ConfigError
from ..report.page import REPORT
from ._command import RunArgument, command
from ._console import say
from ._routing import about, drop_routed, load_router


@command("forget")
def forget_command(
    run: RunArgument,
    task: Annotated[int, typer.Option(help="The task to forget, counted from 0.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what would be erased.")] = False,
    descendants: Annotated[
        str,
        typer.Option(
            help="How to treat tasks that started from this task and carry its knowledge: keep, refuse (forget "
            "nothing while there are any) or forget (forget them as well)."
        ),
    ] = "keep",
) -> dict[str, Any]:
    """Erase everything that only this task holds; every other task stays as it is, bit for bit.

    In a run, the task is also removed from the metrics and the folder.
    """
    folder = kept.find_model(run)
    of_a_run = (run / runs.CONFIG).exists() and folder != run
    if of_a_run and not dry_run:
        if not (run / runs.METRICS).exists():
            raise ConfigError(f"{run} is not finished; finish it with: hatcl train --resume --output {run}")
        with kept_whole(run / runs.METRICS):  # before anything is erased
            SequenceResult.from_dict(runs.read_json(run / runs.METRICS))
        runs.tidy(run)  # no older copy may keep the task that is to be forgotten
    model = hatcl.from_pretrained(folder)
    if of_a_run and not dry_run and about(run) is not None:
        load_router(run, model, asked=False)  # or an error, before anything is erased
    report = hatcl.forget_task(model, task, dry_run=dry_run, descendants=descendants)
    if of_a_run and not dry_run:
        kept.save_model(run, model, runs.read_json(run / runs.METRICS), without=report.forgotten)
        for gone in report.forgotten:
            drop_routed(run, model, gone)
            kept.drop_task(run, gone)
        for shown in (runs.PICTURE, REPORT):  # they show the task; hatcl show draws them again without it
            (run / shown).unlink(missing_ok=True)
    elif not dry_run:
        hatcl.save_pretrained(model, folder)
    say(str(report))
    return dataclasses.asdict(report)
