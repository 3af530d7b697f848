"""The content of a run's page: its scores, how it learned, the units of its tasks, how it was made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..continual.folder import TASKS
from ..continual.result import SequenceResult
from ..engine import folder as runs
from ..engine.measures import Calibration
from ..functional import own_measure, score_text, score_unit
from ..skills.scores import SkillScores, localize, skill_overlap
from .html import (
    Part,
    chart,
    charts,
    command_lines,
    folded,
    paragraph,
    percents,
    rows_table,
    shades,
    tiles,
    whole_page,
)
from .skills import heights_of, places_of

REPORT = "report.html"


class Told(NamedTuple):
    """The content of a run's page: HTML below its title, its parts, and figures for comparing runs."""

    top: str
    parts: list[Part]
    figures: dict[str, str]


PER_STEP = {  # key in metrics.jsonl -> the title of its chart; the first two are visible
    "loss": "loss",
    "units_on": "share of units on",
    "penalty": "penalty",
    "scale": "scale of the gates",
    "consistency": "consistency of the two adapters",
    "replay": "loss on the memory",
    "gradient_norm": "norm of the gradient",
    "lr": "learning rate",
}

# --- tasks one after another ---


def learning_parts(run: Path, metrics: Mapping[str, Any], numbers: Sequence[int], certificate: str) -> list[Part]:
    """The parts of the page of a run of `hatcl train`.

    Args:
        metrics: those of the remaining tasks. numbers: the tasks' numbers. certificate: its result as a sentence.
    """
    result = SequenceResult.from_dict(dict(metrics))
    named = [f"{i} {name}" for i, name in zip(numbers, result.tasks, strict=True)]
    heads = [str(i) for i in numbers]
    values = [[*row, *[math.nan] * (len(named) - len(row))] for row in result.rows]
    foot = [["always the most common answer", *percents(result.commonest)]] if result.commonest else []
    by = [*result.scored_by, *[""] * (len(named) - len(result.scored_by))]
    texts = [[score_text(v, m) for v, m in zip(row, by, strict=True)] for row in values]
    matrix = shades(
        named[: len(values)], heads, values, texts,
        f"Score {score_unit(by)}: a row for each task learned, a column for each task tested.",
        corner="after learning", foot=foot, ends=("0", "1") if score_unit(by) != "in %" else ("0 %", "100 %"),
    )  # fmt: skip
    parts = [Part("Scores", matrix if values else ""), Part("Learning", _curves(run, named, numbers))]
    details = metrics["details"]
    if certificate:
        exact = bool(details.get("exact")) and all(known.get("bit_equal") for known in result.facts)
        parts.append(Part("Certificate", paragraph(certificate, "good" if exact else "bad")))
    if details.get("layers"):
        parts.append(Part("Units by layer", _units_by_layer(details["layers"], heads)))
    if details.get("overlap"):
        parts.append(Part("Overlap of tasks", _overlap(details["overlap"], named, heads)))
    return [*parts, *_skills(run)]


def learning_top(metrics: Mapping[str, Any]) -> str:
    """The main figures of a run of `hatcl train`."""
    told = [(metrics.get("average_accuracy"), "average score"), (metrics.get("forgetting"), "forgetting")]
    own = own_measure(metrics.get("scored_by", []))
    shown = [(score_text(v, own) + ("" if own else " %"), n) for v, n in told if v is not None]
    shown.append((f"{len(metrics['matrix'])} of {len(metrics['tasks'])}", "tasks learned"))
    if "exact" in metrics["details"]:
        shown.append(("exact" if metrics["details"]["exact"] else "NOT exact", "certificate"))
    return tiles([*shown, (metrics["method"], "method")])


def _curves(run: Path, named: Sequence[str], numbers: Sequence[int]) -> str:
    """The values of each step in metrics.jsonl: the loss in front, the rest behind a click."""
    lines = runs.read_steps(run)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    alone = len({line.get("stage", 0) for line in lines}) == 1
    names = dict(zip(numbers, named, strict=True)) if not alone or len(named) == 1 else {}
    for at, line in enumerate(lines, 1):
        stage = line.get("stage", 0)
        name = names.get(stage, str(line.get("name", "loss")))
        for key in PER_STEP:
            if line.get(key) is not None:
                found.setdefault(key, {}).setdefault(name, []).append((at, line[key]))
    if "loss" not in found:
        return ""
    every = [chart(found[key], PER_STEP[key], "step of the run") for key in PER_STEP if key in found]
    return charts(every[:2]) + (folded("Further figures of each step", charts(every[2:])) if every[2:] else "")


def _units_by_layer(layers: Sequence[Mapping[str, Any]], heads: Sequence[str]) -> str:
    """A row for each layer, since names of layers are long and tasks are few."""
    free = all("free" in layer for layer in layers)
    rows, texts = [], []
    for layer in layers:
        used = [int(layer["used"].get(str(k), layer["used"].get(k, 0))) for k in range(len(heads))]
        rows.append([n / max(1, layer["units"]) for n in used])
        texts.append([f"{n}" for n in used])
        if free:
            share = layer["free"] / max(1, layer["elements"])
            rows[-1].append(share)
            texts[-1].append(f"{100 * share:.0f} %")
    columns = [*heads, *(["free"] if free else [])]
    told = "How many units of each layer a task uses, shaded by their share of the layer"
    more = "; in the last column the share of its elements that are free for tasks to come" if free else ""
    names = [f"{layer['name']} ({layer['units']})" for layer in layers]
    return shades(names, columns, rows, texts, f"{told}{more}.", corner="layer (units)")


def _overlap(shared: Sequence[Sequence[int]], named: Sequence[str], heads: Sequence[str]) -> str:
    shares = [[n / max(1, shared[j][j]) for j, n in enumerate(row)] for row in shared]
    return shades(
        named[: len(shares)], heads[: len(shares)], shares, [[f"{100 * v:.0f}" for v in row] for row in shares],
        "Share in % of the column's units that the row's task uses too.", corner="task",
    )  # fmt: skip


def _skills(run: Path, share: float = 0.2) -> list[Part]:
    """The places of important units, and the overlap of the tasks' skills, if the method has scored units."""
    found = sorted((run / TASKS).glob("*/scores.safetensors"), key=lambda p: int(p.parent.name.split("_")[0]))
    scores = {path.parent.name.replace("_", " ", 1): SkillScores.load(path) for path in found}
    if not scores:
        return []
    every, heads = list(scores.values()), [name.partition(" ")[0] for name in scores]
    places = places_of(every[0].labels)
    layers = list(dict.fromkeys(f"{p.layer} {p.kind}" for p in places))
    at = np.array([layers.index(f"{p.layer} {p.kind}") for p in places])
    columns = [
        np.bincount(at, heights_of(s, "rank"), len(layers)) / np.bincount(at, minlength=len(layers)) for s in every
    ]
    values = np.stack(columns, 1).tolist()
    where = shades(
        layers, heads, values, [[f"{v:.2f}" for v in row] for row in values],
        "Mean rank of a module's scores among all of the task: 1 is the most important.", corner="module",
        ends=("least", "most"),
    )  # fmt: skip
    skills = [localize(s, share) for s in every]
    common = [[skill_overlap(a, b) if bool(b.on.any()) else None for b in skills] for a in skills]
    texts = [percents(row) for row in common]
    caption = (
        f"Share in % of the column's skill (the {100 * share:.0f} % of units that matter most) that the row's has."
    )
    overlap = shades(list(scores), heads, common, texts, caption, corner="task")
    return [Part("Importance of modules", where), Part("Overlap of skills", overlap)]


# --- one task, grafts, compositions ---


def finetune_parts(run: Path, metrics: Mapping[str, Any]) -> list[Part]:
    """The parts of the page of a run of `hatcl finetune`."""
    told = {**metrics["score"], "commonest": metrics.get("commonest", {})}
    names = {"pretrained": "pretrained", "finetuned": "fine-tuned", "commonest": "always the most common answer"}
    rows = [
        [title, *(score_text(told[key].get(part), metrics["measure"]) for part in ("validation", "test"))]
        for key, title in names.items()
    ]
    moved = metrics["trained"]
    history = metrics["history"]
    validation = [(e["step"], 100 * e["validation"]) for e in history if e.get("validation") is not None]
    steps = [(line["step"], line["loss"]) for line in runs.read_steps(run) if line.get("loss") is not None]
    losses = steps or [(e["step"], e["loss"]) for e in history]
    return [
        Part(
            "Scores",
            rows_table(["", "validation", "test"], rows, f"{metrics['measure']} {score_unit([metrics['measure']])}")
            + paragraph(f"{moved['changed']:,} of {moved['elements']:,} trained elements changed.", "muted"),
        ),
        Part(
            "Learning",
            charts([
                chart({"loss": losses}, "loss", "step"),
                chart({"validation": validation}, f"{metrics['measure']} in % on validation", "step", dots=True),
            ]),
        ),
    ]  # fmt: skip


def graft_parts(run: Path, metrics: Mapping[str, Any]) -> list[Part]:
    """The parts of the page of a run of `hatcl graft`."""
    grafts = metrics["grafts"]
    every = {"pretrained": metrics["pretrained"], "fine-tuned": metrics["finetuned"]}
    every |= {f"{row['by']} {row['sparsity']:g}": row for row in grafts}
    keys = ("accuracy", "f1", "gain_kept", "agreement", "ece")
    head = ["", "elements", "accuracy", "F1", "gain kept", "agreed", "ECE"]
    rows = [
        [name, f"{row['size']:,}" if "size" in row else "", *percents([row.get(k) for k in keys])]
        for name, row in every.items()
    ]
    lines = {
        rule: sorted((row["sparsity"], 100 * row["accuracy"]) for row in grafts if row["by"] == rule)
        for rule in dict.fromkeys(row["by"] for row in grafts)
    }
    ends = [min(r["sparsity"] for r in grafts), max(r["sparsity"] for r in grafts)] if grafts else []
    lines |= {n: [(x, 100 * every[n]["accuracy"]) for x in ends] for n in ("fine-tuned", "pretrained")}
    bins = {name: Calibration.from_dict(row["calibration"]) for name, row in every.items()}
    sure = {
        name: [(100 * x, 100 * y) for x, y in zip(c.confidence.tolist(), c.accuracy.tolist(), strict=True)]
        for name, c in bins.items()
    }
    return [
        Part("Models and grafts", rows_table(head, rows, "in %")),
        Part(
            "Pictures",
            charts([
                chart(lines, "accuracy in %", "share of the elements that the graft holds", log=True, dots=True),
                chart(sure | {"as sure as right": [(0, 0), (100, 100)]}, "accuracy in %", "confidence in %", dots=True),
            ]),
        ),
        Part("Learning", _curves(run, [], [])),
    ]  # fmt: skip


def atlas_parts(run: Path, metrics: Mapping[str, Any], coefficients: Sequence[Sequence[str]]) -> list[Part]:
    """The parts of the page of a run of `hatcl atlas`.

    Args:
        coefficients: rows of vector, block and value.
    """
    tasks = list(dict.fromkeys(name for row in metrics["accuracy"].values() for name in row))
    rows = [
        [name, *(f"{100 * row[t]['test']:.1f}" if "test" in row.get(t, {}) else "·" for t in tasks)]
        for name, row in metrics["accuracy"].items()
    ]
    vectors, blocks = (list(dict.fromkeys(row[i] for row in coefficients)) for i in range(2))
    table = {(vector, block): float(value) for vector, block, value in coefficients}
    values = [[table[v, b] for v in vectors] for b in blocks]
    most = max((abs(v) for row in values for v in row), default=0.0) or 1.0
    heads = [str(i) for i in range(len(vectors))]
    told = ", ".join(f"{i} {name}" for i, name in enumerate(vectors))
    heat = shades(
        blocks, heads, values, [[f"{v:.2f}" for v in row] for row in values],
        f"A row for each block from input to output, a column for each task vector: {told}.", corner="block",
        ends=(f"{-most:.2f}", f"{most:.2f}"), low=-most, high=most,
    )  # fmt: skip
    curves = []
    for key in ("loss", "score"):
        lines = {
            name: [(k, entry[key]) for k, entry in enumerate(fitted["history"], 1) if entry.get(key) is not None]
            for name, fitted in metrics["fitted"].items()
        }
        curves.append(chart(lines, key, "epoch", dots=True))
    return [
        Part("Accuracy", rows_table(["", *tasks], rows, "on test images, in %")),
        Part("Learning", charts(curves)),
        Part("Coefficients", heat),
    ]


# --- every run ---


def made_parts(run: Path, go_on: Sequence[str]) -> list[Part]:
    """How a run was made, and the commands that continue it."""
    config = runs.stored_config(run) or {}
    rows = [[name, _as_text(value)] for name, value in sorted(config.get("options", {}).items())]
    body = rows_table(["option", "value"], rows, f"hatcl {config.get('command', '')}", texts=True)
    made = config.get("made_with", {})
    facts = [[library, number] for library, number in made.get("versions", {}).items()]
    if "commit" in made:
        facts.append(["commit", f"{made['commit']}{', with changes' if made['changed'] else ''}"])
    facts += [[Path(file).name, f"SHA-256 {digest}"] for file, digest in config.get("inputs", {}).items()]
    facts += [
        [f"data of {t['name']}", f"SHA-256 {t['digest']}, {t['examples']} examples"] for t in config.get("tasks", [])
    ]
    more = rows_table(["", ""], facts, "What it was made with", texts=True) if facts else ""
    return [
        Part(
            "Configuration", folded("All options", body) + (folded("Versions, commit and data", more) if more else "")
        ),
        Part("Next commands", command_lines(go_on)),
    ]


def one_page(run: Path, title: str, top: str, parts: Sequence[Part]) -> bytes:
    """The page of a run."""
    config = runs.stored_config(run) or {}
    versions = config.get("made_with", {}).get("versions", {})
    lead = f"hatcl {config.get('command', '')}, {run}"
    return whole_page(title, lead, top, parts, f"Written by hatcl {versions.get('hatcl', '')}".strip() + ".").encode()


def page_of_several(
    runs_told: Mapping[str, Mapping[str, str]],
    options: Mapping[str, Mapping[str, Any]],
    each: Mapping[str, Sequence[Part]],
) -> bytes:
    """One page of several runs: their figures and the options that differ in front, then each run's own parts."""
    names = list(runs_told)
    keys = list(dict.fromkeys(key for told in runs_told.values() for key in told))
    figures = [[key, *(told.get(key, "·") for told in runs_told.values())] for key in keys]
    other = differing(options)
    parts = [
        Part("Figures", rows_table(["", *names], figures, "A column for each run.", texts=True)),
        Part(
            "Options that differ",
            rows_table(
                ["option", *names],
                [[k, *map(_as_text, v)] for k, v in other.items()],
                "A column for each run.",
                texts=True,
            )
            if other
            else paragraph("None: all options are the same."),
        ),
    ]
    for name, own in each.items():
        parts += [Part(f"{name}: {part.title}", part.body) for part in own]
    return whole_page(f"{len(names)} runs", ", ".join(names), "", parts, "Written by hatcl.").encode()


def differing(options: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The options that are not the same in all runs, with the value of each run."""
    keys = sorted({key for given in options.values() for key in given})
    found = {key: [given.get(key) for given in options.values()] for key in keys}
    return {key: values for key, values in found.items() if any(v != values[0] for v in values)}


def _as_text(value: Any) -> str:
    return "-" if value in (None, [], {}) else value if isinstance(value, str) else json.dumps(value)
