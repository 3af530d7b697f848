from __future__ import annotations

import io

from rich.console import Console

from hatcl.report.tables import matrix_table, tasks_table, units_table

RECORD = {
    "loss": 0.1234,
    "penalty": 0.05,
    "soft_score": 0.99,
    "score": 0.985,
    "units_used": 25,
    "units": 100,
    "bit_equal": None,
}


def text(table, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_matrix_is_lower_triangular():
    shown = text(matrix_table([[0.9], [0.9, 1.0]], ["a", "b"]))
    assert "90.0" in shown and "100.0" in shown and "·" in shown and "0 a" in shown


def test_tasks_while_learning_and_at_the_end():
    names = ["digits 0-1", "digits 2-3", "digits 4-5"]
    running = {"loss": 0.5, "penalty": 0.25, "scale": 123.4}
    shown = text(tasks_table(names, [RECORD], running=running))
    assert "98.5" in shown and "25 (25%)" in shown and "123.4" in shown and "…" not in shown
    assert "bit-equal" not in shown
    ended = [{**RECORD, "bit_equal": True}, {**RECORD, "bit_equal": False}, RECORD]
    shown = text(tasks_table(names, ended))
    assert shown.count("bit-equal") == 1 and shown.count("MOVED") == 1 and "…" not in shown


def test_stages_of_methods_without_gates():
    shown = text(tasks_table(["a", "b", "c"], [{"loss": 0.25, "score": 0.5}], running={"loss": 0.75}))
    assert shown.split() == [
        "task",
        "loss",
        "score",
        "─" * len(shown.split()[3]),
        *"0 a 0.250 0.5000 1 b 0.750 2 c".split(),
    ]


def test_units_per_layer():
    layers = [{"name": "conv1", "units": 16, "used": {0: 3, "1": 16}}, {"name": "fc", "units": 8, "used": {}}]
    shown = text(units_table({"layers": layers, "units": 24, "use": {0: 3, 1: 16}}))
    assert "conv1" in shown and "task 1" in shown
    assert [line.split() for line in shown.splitlines() if line.strip().startswith("all")] == [["all", "24", "3", "16"]]


def test_scores_that_are_no_shares_are_told_as_they_are():
    by = ["r2", "accuracy"]
    shown = text(matrix_table([[-0.25], [-0.25, 0.5]], ["a", "b"], scored_by=by))
    assert "-0.250" in shown and "50.0" in shown and "-25.0" not in shown and "score by r2" in shown
    known = {"loss": 1.0, "penalty": 0.1, "soft_score": 0.875, "score": 0.5, "units_used": 1, "units": 2}
    shown = text(tasks_table(["a"], [known], scored_by=["r2"]))
    assert "0.875" in shown and "0.500" in shown and "%" not in shown.replace("(50%)", "")
    assert "score in %" in text(matrix_table([[0.5]], ["a"], scored_by=["micro_f1"]))
