"""A run and a model as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ..functional import score_text, score_unit


def matrix_table(
    rows: Sequence[Sequence[float]],
    names: Sequence[str],
    numbers: Sequence[int] | None = None,
    commonest: Sequence[float] = (),
    scored_by: Sequence[str] = (),
) -> Table:
    """The accuracy matrix: a row per task learned, a column per task tested; NaN was not measured.

    Args:
        numbers: the tasks' numbers; None = 0, 1, 2, ... commonest: each task's score of always giving the most common
        answer.
        scored_by: the tasks' measures.
    """
    numbers = range(len(names)) if numbers is None else numbers
    by = [*scored_by, *[""] * (len(names) - len(scored_by))]
    table = Table(
        title=f"score {score_unit(by)} (row: learned, column: tested)", box=box.SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("after learning")
    for j in numbers:
        table.add_column(f"task {j}", justify="right")
    for i, row in enumerate(rows):
        cells = [
            Text("·", style="dim") if math.isnan(value) else Text(score_text(value, measure), style=_shade(value))
            for value, measure in zip(row, by, strict=False)
        ]
        cells += [Text("·", style="dim")] * (len(names) - len(row))
        table.add_row(f"{numbers[i]} {names[i]}", *cells)
    if any(not math.isnan(value) for value in commonest):
        table.add_section()
        cells = [Text("·" if math.isnan(value) else f"{100 * value:.1f}", style="dim") for value in commonest]
        table.add_row("always the most common answer", *cells, style="dim")
    return table


def tasks_table(
    names: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    *,
    running: Mapping[str, Any] | None = None,
    numbers: Sequence[int] | None = None,
    scored_by: Sequence[str] = (),
) -> Table:
    """One line per stage: its loss and score, and under hard attention the penalty, the scores with soft and hard
    gates, the units used, and whether its outputs moved since sealing.

    Args:
        records: the results of the finished stages: `score`, `loss`, and `Method.facts` of `hat`.
        running: `loss`, for `hat` also `penalty` and `scale`, of the current stage. numbers: the stages' numbers; None
            = 0, 1, 2, ... scored_by: the measures of their scores.
    """
    numbers = range(len(names)) if numbers is None else numbers
    by = [*scored_by, *[""] * (len(names) - len(scored_by))]
    gates = any("penalty" in known for known in (*records, running or {}))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)  # fits 80 columns
    table.add_column("task", no_wrap=True, overflow="ellipsis", max_width=24)
    kinds = ("soft %", "hard %") if score_unit(by) == "in %" else ("soft", "hard")
    columns = ("loss", "penalty", "scale", *kinds, "units", "outputs") if gates else ("loss", "score")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for t, name in enumerate(names):
        if t < len(records):
            cells, style = _gates_cells(records[t], by[t]) if gates else _plain_cells(records[t]), ""
        elif t == len(records) and running is not None:
            shown = ("loss:.3f", "penalty:.3f", "scale:.1f") if gates else ("loss:.3f",)
            cells, style = [f"{{{key}}}".format(**running) for key in shown], "bold"
        else:
            cells, style = [], "dim"
        table.add_row(Text(f"{numbers[t]} {name}", style=style), *cells, *[""] * (len(columns) - len(cells)))
    return table


def _plain_cells(known: Mapping[str, Any]) -> list[str | Text]:
    return [f"{known['loss']:.3f}", f"{known['score']:.4f}"]


def _gates_cells(known: Mapping[str, Any], measure: str) -> list[str | Text]:
    used, units = known["units_used"], known["units"]
    return [
        f"{known['loss']:.3f}",
        f"{known['penalty']:.3f}",
        "sealed",
        score_text(known["soft_score"], measure),
        score_text(known["score"], measure),
        f"{used:.0f} ({100 * used / units:.0f}%)" if units else f"{used:.0f}",
        _moved_text(known.get("bit_equal")),
    ]


def units_table(description: Mapping[str, Any]) -> Table:
    """Units per layer and how many of them each task uses (`Description.to_dict()`)."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer")
    table.add_column("units", justify="right")
    sealed = sorted({int(task) for layer in description["layers"] for task in layer["used"]})
    for task in sealed:
        table.add_column(f"task {task}", justify="right")
    for layer in description["layers"]:
        used = {int(task): count for task, count in layer["used"].items()}
        table.add_row(layer["name"], str(layer["units"]), *[str(used.get(task, 0)) for task in sealed])
    use = {int(task): count for task, count in description["use"].items()}
    table.add_section()
    table.add_row("all", str(description["units"]), *[str(use.get(task, 0)) for task in sealed])
    return table


def _shade(value: float) -> str:
    return "green" if value >= 0.9 else "yellow" if value >= 0.7 else "red"


def _moved_text(bit_equal: bool | None) -> Text:
    if bit_equal is None:
        return Text("")
    return Text("bit-equal", style="green") if bit_equal else Text("MOVED", style="bold red")


def known_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """Models that are known to convert, by family."""
    families: dict[str, list[str]] = {}
    for name, row in models.items():
        families.setdefault(row["family"], []).append(name)
    table = Table(title=f"{len(models)} models proved, {len(families)} families", box=box.SIMPLE_HEAD)
    table.add_column("family", no_wrap=True)
    table.add_column("known", justify="right")
    table.add_column("models")
    for family, members in sorted(families.items()):
        known = min(models[name]["known"] for name in members)
        table.add_row(family, f"{100 * known:.1f} %", ", ".join(members))
    return table


def zoo_line(name: str, row: Mapping[str, Any]) -> Text:
    """One model's proof in a line."""
    if not row["passed"]:
        return Text.assemble((f"{name}: ", "bold red"), row["failure"])
    words = f"exact, {row['units']:,} units, {100 * row['known']:.1f} % known, {row['seconds']:.0f} s"
    return Text.assemble((f"{name}: ", "green"), words)


def accuracy_table(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Accuracies on test images and, in brackets, on held-out ones, in percent.

    Args:
        rows: name of the measurement -> task -> part (`test`, `validation`) -> accuracy.
    """
    table = Table(title="accuracy in %: test (held out)", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("task", no_wrap=True, overflow="ellipsis", max_width=24)
    for row in rows:
        table.add_column(row, justify="right")
    tasks = list(dict.fromkeys(name for row in rows.values() for name in row))
    for name in tasks:
        table.add_row(name, *[_both(row.get(name, {})) for row in rows.values()])
    if len(tasks) > 1:
        table.add_section()
        table.add_row("mean", *[_both(_mean_of_parts(list(row.values()))) for row in rows.values()])
    return table


def number_table(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], *, digits: int = 3
) -> Table:
    """A matrix of numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for name, row in zip(rows, values, strict=True):
        table.add_row(name, *[f"{value:.{digits}f}" for value in row])
    return table


def _both(parts: Mapping[str, float]) -> str:
    shown = [f"{100 * parts['test']:.1f}"] if "test" in parts else []
    return " ".join([*shown, *([f"({100 * parts['validation']:.1f})"] if "validation" in parts else [])])


def _mean_of_parts(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    shared = [part for part in ("test", "validation") if all(part in row for row in rows)]
    return {part: sum(row[part] for row in rows) / len(rows) for part in shared}
