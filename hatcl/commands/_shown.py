"""The output of `hatcl train` and `hatcl show` about a run: progress while it learns, and its results."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..continual import folder as kept
from ..continual.result import SequenceResult
from ..engine import folder as runs
from ..engine.loop import Progress
from ..errors import ConfigError
from ..files import write_files
from ..functional import own_measure, score_text, score_unit
from ..hat.lineage import spoken
from ..report.picture import draw_run
from ..report.skills import draw_overlap, draw_skills
from ..report.tables import matrix_table, tasks_table
from ..skills.scores import SkillScores, localize
from ._console import Bar, out, say

SKILLS, OVERLAP = "skills.png", "overlap.png"
SHOWN = {
    "average score": "average_accuracy",
    "forgetting": "forgetting",
    "FWT": "forward_transfer",
    "BWT": "backward_transfer",
    "zero-shot": "zero_shot_transfer",
}
SHARE = 0.2  # share of the units, for the picture of the overlap


class Display:
    """A progress bar with a table that fills while tasks are learned; without a terminal, one line per task.

    Args:
        folder: its metrics.jsonl gets a line per step. names: the stages. steps: the number of steps of each stage.
            scored_by: the measures of their scores.
    """

    def __init__(
        self, folder: runs.RunFolder, names: Sequence[str], steps: Sequence[int], scored_by: Sequence[str] = ()
    ) -> None:
        self.folder, self.names, self.steps = folder, list(names), list(steps)
        self.scored_by = list(scored_by)
        self.bar = Bar(sum(steps), "steps", "starting")
        self.live = Live(console=out, auto_refresh=False, transient=True)
        self.done: list[dict[str, float]] = []
        self.running: dict[str, float] | None = None
        self.drawn = 0.0
        self.first = ""  # a line that is printed once the method has found nothing wrong

    def __enter__(self) -> Display:
        if out.is_terminal and not out.quiet:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def tell(self, at: Progress) -> None:
        """Take in a progress report of the loop."""
        if self.first:
            say(self.first)
            self.first = ""
        if at.doing == "learning":
            self.running = {"loss": at.value, **at.measured}
            self.folder.tell(stage=at.stage, step=at.step, name=at.task, **self.running)
            self.bar.says(f"{at.stage} {at.task}", completed=sum(self.steps[: at.stage]) + at.step)
            self._draw()
        elif at.doing == "stage":
            self.done.append({"score": at.value, **at.measured})
            self.running = None
            self.bar.says(f"{at.stage} {at.task}", completed=sum(self.steps[: at.stage + 1]))
            self._draw(force=True)
            self.bar.line(f"stage {at.stage}, {at.task}: {_stage_line(at)}")
        elif at.doing == "scoring":
            self.folder.mark(**{f"score/{at.task}": at.value})
            if at.stage < 0:
                self.bar.line(f"before learning, {at.task}: score {at.value:.4f}")

    def _draw(self, force: bool = False) -> None:
        """Draw at most ten times a second: drawing must not cost more than learning."""
        now = time.monotonic()
        if self.live.is_started and (force or now - self.drawn > 0.1):
            table = tasks_table(self.names, self.done, running=self.running, scored_by=self.scored_by)
            self.live.update(Group(table, self.bar.progress), refresh=True)
            self.drawn = now


def _stage_line(at: Progress) -> str:
    known = at.measured
    if "soft_score" not in known:
        return f"score {at.value:.4f}, loss {known['loss']:.4f}"
    return (
        f"score {at.value:.4f} with hard gates ({known['soft_score']:.4f} with soft ones), "
        f"{known['units_used']:.0f} of {known['units']:.0f} units"
    )


# --- the results of a run ---


def show_learning(run: Path, metrics: Mapping[str, Any]) -> None:
    """Print the results of a finished or unfinished run and draw its pictures, without the forgotten tasks."""
    left, gone = without_forgotten(metrics)
    result = SequenceResult.from_dict(left)
    numbers = [i for i in range(len(metrics["tasks"])) if i not in gone]  # as every command counts the tasks
    if result.tasks:
        out.print(matrix_table(result.rows, result.tasks, numbers, result.commonest, result.scored_by))
    for j, name in zip(numbers, result.tasks, strict=True):
        say(f"task {j}  {name}", "dim")
    finished = len(result.rows) == len(result.tasks) and (run / runs.METRICS).exists()
    if finished and result.tasks:
        out.print(_measures_table(result))
    elif not finished:
        say(f"{len(result.rows)} of {len(result.tasks)} tasks are learned; the run is not finished", "yellow")
    for line in no_better(result, numbers):
        say(line, "yellow")
    if gone:
        say(f"forgotten since: {spoken(gone)}", "yellow")
    if any("units_used" in known for known in result.facts):
        scores = [result.rows[i][i] for i in range(len(result.facts))]
        records = [{"score": score, **known} for score, known in zip(scores, result.facts, strict=True)]
        out.print(tasks_table(result.tasks, records, numbers=numbers, scored_by=result.scored_by))
        if result.details:
            say(certificate_line(result, numbers))
        draw_into(run / runs.PICTURE, lambda: draw_run(result.to_dict(), numbers))
    show_skills(run, SHARE)
    say(f"{seconds_of(run):.0f} s", "dim")


def seconds_of(run: Path) -> float:
    """How many seconds a run has spent on learning and scoring."""
    seconds = runs.read_json(run / kept.SECONDS, list) if (run / kept.SECONDS).exists() else []
    return float(sum(sum(stage.values()) for stage in seconds))


def no_better(result: SequenceResult, numbers: Sequence[int]) -> list[str]:
    """A sentence for each task that was learned no better than always giving the most common answer."""
    scores = [row[i] for i, row in enumerate(result.rows)]  # just after each was learned
    return [
        f"task {number}  {name}: {100 * score:.1f} % just after learning is no better than always giving the most "
        f"common answer ({100 * guess:.1f} %), so nothing shows that it was learned; try more steps (--max-steps), "
        "another rate (--lr), or more examples"
        for number, name, score, guess in zip(numbers, result.tasks, scores, result.commonest, strict=False)
        if score <= guess
    ]


def without_forgotten(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """A run's metrics without the tasks that have been forgotten, and which tasks those are."""
    gone = list(metrics.get("forgotten", ()))
    stay = [i for i in range(len(metrics["tasks"])) if i not in gone]
    done = [i for i in stay if i < len(metrics["matrix"])]
    details = dict(metrics["details"])
    if "layers" in details:
        details["layers"] = [
            {**x, "used": {str(k): x["used"][str(i)] for k, i in enumerate(stay)}} for x in details["layers"]
        ]
    if "overlap" in details:
        details["overlap"] = [[details["overlap"][i][j] for j in stay] for i in stay]
    left = {
        **metrics,
        "tasks": [metrics["tasks"][i] for i in stay],
        "matrix": [[metrics["matrix"][i][j] for j in stay] for i in done],
        "baseline": [metrics["baseline"][i] for i in stay] if metrics["baseline"] else [],
        "losses": [metrics["losses"][i] for i in done] if gone else metrics["losses"],
        "facts": [metrics["facts"][i] for i in done] if gone else metrics["facts"],
        "commonest": [metrics["commonest"][i] for i in stay] if metrics.get("commonest") else [],
        "details": details,
        "scored_by": [metrics["scored_by"][i] for i in stay] if metrics.get("scored_by") else [],
    }
    return left, gone


def _measures_table(result: SequenceResult) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=f"{result.method}, {score_unit(result.scored_by)}", title_justify="left")
    for name in SHOWN:
        table.add_column(name, justify="right")
    own = own_measure(result.scored_by)
    table.add_row(*(score_text(result.measures[measure], own) for measure in SHOWN.values()))
    return table


def certificate_line(result: SequenceResult, numbers: Sequence[int]) -> Text:
    """The certificate of a run as one line."""
    if not result.facts:
        return Text("no task is left", style="yellow")
    moved = [str(t) for t, known in zip(numbers, result.facts, strict=False) if not known["bit_equal"]]
    leaks = [f"task {t} by {diff:g}" for t, diff in result.details["max_abs_diff"].items() if diff != 0]
    if result.details["exact"] and not moved:
        return Text(
            f"certificate: exact. The outputs of all {len(result.facts)} sealed tasks are bit-equal to those at "
            "sealing, and stay so when everything that does not belong to them is overwritten.",
            style="green",
        )
    return Text(
        f"certificate: NOT exact. Outputs moved since sealing: {', '.join(moved) or 'none'}; moved when everything "
        f"that does not belong to them was overwritten: {', '.join(leaks) or 'none'}.",
        style="bold red",
    )


def show_skills(run: Path, share: float) -> None:
    """Draw the units' scores and how far the tasks' skills overlap, if the method has scored units.

    Args:
        share: the share of the units that counts as a task's skill.
    """
    found = sorted((run / kept.TASKS).glob("*/scores.safetensors"), key=lambda p: int(p.parent.name.split("_")[0]))
    scores = {path.parent.name.partition("_")[2]: SkillScores.load(path) for path in found}
    if not scores:
        return
    skills = {name: localize(s, share) for name, s in scores.items()}
    draw_into(run / SKILLS, lambda: draw_skills(scores))
    draw_into(run / OVERLAP, lambda: draw_overlap(skills))


def draw_into(path: Path, draw: Any) -> None:
    try:
        write_files({path: draw()})
        say(path, "dim")
    except ConfigError as error:
        say(f"no picture: {error}", "yellow")
