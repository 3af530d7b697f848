from __future__ import annotations

import json
import subprocess

import pytest
from command_parts import call

import hatcl


def test_forget_erases_one_task_and_leaves_the_others(run, tmp_path, capsys):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    before = {path.name: path.read_bytes() for path in (copy / "model").iterdir()}
    code, out, _ = call(capsys, "forget", copy, "--task", "1", "--dry-run")
    assert code == 0 and out.strip()
    assert {path.name: path.read_bytes() for path in (copy / "model").iterdir()} == before
    card = (copy / "model" / "README.md").read_text()
    assert "| 1 | t1 | 2 |" in card and "## Scores" in card and "Exact: with everything" in card
    code, out, _ = call(capsys, "forget", copy, "--task", "1")
    assert code == 0 and out.strip()
    card = (copy / "model" / "README.md").read_text()
    assert "t1" not in card and "| 2 | t2 | 2 |" in card and "Exact" not in card
    assert hatcl.tasks(hatcl.from_pretrained(copy / "model")) == [0, 2]
    metrics = json.loads((copy / "metrics.json").read_text())
    rows, details = metrics["matrix"], metrics["details"]
    assert metrics["forgotten"] == [1] and rows[1] == [None] * 3 and rows[2][1] is None
    assert metrics["facts"][1] == {} and metrics["losses"][1] == [None, None] and "1" not in details["max_abs_diff"]
    assert all("1" not in layer["used"] for layer in details["layers"])
    assert metrics["average_accuracy"] == pytest.approx((rows[2][0] + rows[2][2]) / 2, abs=1e-12)
    assert sorted(path.name for path in (copy / "tasks").iterdir()) == ["0_t0", "2_t2"]
    assert json.loads((copy / "tasks" / "2_t2" / "config.json").read_text())["scores"]["t1"] is None
    assert {json.loads(line)["stage"] for line in (copy / "metrics.jsonl").read_text().splitlines()} == {0, 2}
    assert not (copy / "picture.png").exists()
    shown = call(capsys, "show", copy)[1]
    assert "t0" in shown and "t2" in shown and "t1" not in shown and "forgotten since: task 1" in shown
    # each task has the number by which `forget` and `extract` know it
    assert shown.count("2 t2") == 2 and "task 2  t2" in shown and "1 t2" not in shown and "task 1  t2" not in shown
    code, out, _ = call(capsys, "certify", copy)
    assert code == 0 and "task 1" not in out
    assert "task 2: exact, outputs bit-equal to those at sealing" in out
    code, _, err = call(capsys, "forget", copy, "--task", "1")
    assert code == 2 and "1" in err
    assert call(capsys, "describe", copy)[0] == 0


def test_metrics_that_are_damaged_are_refused_before_anything_is_erased(run, tmp_path, capsys):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    before = (copy / "model" / "model.safetensors").read_bytes()
    (copy / "metrics.json").write_text('{"tasks": []}')
    code, _, err = call(capsys, "forget", copy, "--task", "1")
    assert code == 2 and "metrics.json lacks a part that is needed" in err
    assert (copy / "model" / "model.safetensors").read_bytes() == before


def test_descendants_are_named_refused_or_forgotten_with_it(tmp_path, capsys):
    run = tmp_path / "run"
    code = call(
        capsys, "train", "--set", "start_from=best", "--epochs", "1", "--output", run,
        "--model-kwargs", "channels=[8,8,8,8]", "--model-kwargs", "stem_width=8",
    )[0]  # fmt: skip
    assert code == 0
    lineage = json.loads(call(capsys, "describe", run, "--json")[1])["lineage"]
    assert lineage["1"] == [0] and set(lineage) == {"1", "2", "3", "4"}
    assert "lineage: task 1 carries what was transplanted from task 0" in call(capsys, "describe", run)[1]
    carriers = sorted(int(t) for t, ancestors in lineage.items() if 1 in ancestors)
    descended = ", ".join(map(str, sorted([1, *carriers])))
    code, _, err = call(capsys, "forget", run, "--task", "0", "--descendants", "refuse")
    assert code == 2 and "started from task 0" in err
    code, out, _ = call(capsys, "forget", run, "--task", "1", "--descendants", "forget")
    assert code == 0 and descended in out
    assert hatcl.tasks(hatcl.from_pretrained(run / "model")) == [t for t in range(5) if t not in (1, *carriers)]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["forgotten"] == sorted([1, *carriers])
