"""For each command that writes runs: the page of a run, and its figures for a comparison."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path
from typing import Any

from ..continual.result import SequenceResult
from ..engine import folder as runs
from ..functional import own_measure, score_text, score_unit
from ..hat.lineage import spoken
from ..report.html import paragraph
from ..report.page import (
    Told,
    atlas_parts,
    finetune_parts,
    graft_parts,
    learning_parts,
    learning_top,
    made_parts,
)
from ._console import percent
from ._shown import SHOWN, certificate_line, no_better, seconds_of, without_forgotten


def learning_page(run: Path, metrics: dict[str, Any]) -> Told:
    """The page of a run of `hatcl train`."""
    left, gone = without_forgotten(metrics)
    result = SequenceResult.from_dict(left)
    numbers = [i for i in range(len(metrics["tasks"])) if i not in gone]
    proved = certificate_line(result, numbers).plain if "exact" in result.details else ""
    finished = (run / runs.METRICS).exists()
    notes = [*no_better(result, numbers), *([f"forgotten since: {spoken(gone)}"] if gone else [])]
    if not finished:
        notes.append(f"{len(result.rows)} of {len(result.tasks)} tasks are learned; the run is not finished")
    parts = learning_parts(run, left, numbers, proved.removeprefix("certificate: "))
    here = shlex.quote(str(run))
    go_on = [f"hatcl show {here}"]
    if not finished and (runs.stored_config(run) or {}).get("command") == "train":  # learn_sequence is no command
        go_on = [f"hatcl train --resume --output {here}"]
    elif finished and (run / "model").exists():
        go_on = [f"hatcl describe {here}", f"hatcl certify {here}"]
        for t in numbers[:1]:
            go_on += [
                f"hatcl forget {here} --task {t} --dry-run", f"hatcl extract {here} --task {t} --output small",
            ]  # fmt: skip
    figures = {"method": result.method, "tasks": str(len(result.tasks))}
    own = own_measure(result.scored_by)
    figures |= {f"{name} {'' if own else '%'}".strip(): score_text(left.get(key), own) for name, key in SHOWN.items()}
    figures["seconds"] = f"{seconds_of(run):.0f}"
    top = learning_top(left) + "".join(paragraph(note, "bad") for note in notes)
    return Told(top, parts + made_parts(run, go_on), figures)


def finetune_page(run: Path, metrics: dict[str, Any]) -> Told:
    """The page of a run of `hatcl finetune`."""
    score, measure = metrics["score"], metrics["measure"]
    figures = {"task": metrics["task"], "measure": measure}
    unit = score_unit([measure])
    figures |= {f"{n} {part}, {unit}": score_text(v, measure) for n, by in score.items() for part, v in by.items()}
    figures["seconds"] = f"{metrics['seconds']:.0f}"
    return Told("", finetune_parts(run, metrics) + made_parts(run, [f"hatcl graft {shlex.quote(str(run))}"]), figures)


def graft_page(run: Path, metrics: dict[str, Any]) -> Told:
    """The page of a run of `hatcl graft`."""
    figures = {f"{name} %": percent(metrics[name]["accuracy"]) for name in ("pretrained", "finetuned")}
    figures |= {f"{row['by']} {row['sparsity']:g} %": percent(row["accuracy"]) for row in metrics["grafts"]}
    tuned = (runs.stored_config(run) or {"options": {}})["options"].get("run", "RUN")
    words = ("hatcl", "graft", str(tuned), "--sparsity", "0.001", "--by", "magnitude", "--resume", "--output", str(run))
    go_on = [shlex.join(words)]
    return Told("", graft_parts(run, metrics) + made_parts(run, go_on), figures)


def atlas_page(run: Path, metrics: dict[str, Any]) -> Told:
    """The page of a run of the `hatcl atlas` commands that learn."""
    with (run / "coefficients.csv").open() as f:
        rows = list(csv.reader(f))[1:]
    last = metrics["accuracy"].get("composed", {})
    figures = {"procedure": metrics["procedure"]}
    figures |= {f"composed, {task} %": percent(by.get("test")) for task, by in last.items()}
    figures["seconds"] = f"{metrics['seconds']:.0f}"
    return Told("", atlas_parts(run, metrics, rows) + made_parts(run, [f"hatcl show {shlex.quote(str(run))}"]), figures)
