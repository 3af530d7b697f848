from __future__ import annotations

import html
import json
import shlex
import shutil
from contextlib import nullcontext

import pytest
from command_parts import call
from rich.errors import MarkupError

from hatcl.commands import COMMANDS, _console, app, show
from hatcl.engine import folder as runs


def test_a_finished_run_and_its_picture(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "picture.png").unlink(missing_ok=True)
    code, out, err = call(capsys, "show", copy)
    shown = " ".join(out.split())
    assert code == 0 and "certificate: exact" in shown and "row: learned, column: tested" in shown, err
    assert pytest.importorskip("matplotlib") and (copy / "picture.png").read_bytes()[:4] == b"\x89PNG"
    code, out, _ = call(capsys, "show", copy, "--json")
    assert code == 0 and json.loads(out) == json.loads((copy / "metrics.json").read_text())


def test_a_run_that_is_not_finished(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    metrics = json.loads((copy / "metrics.json").read_text())
    (copy / "metrics.json").unlink()
    code, _, err = call(capsys, "show", copy)
    assert code == 2 and f"has nothing to show yet; continue with: hatcl train --resume --output {copy}" in err
    (copy / "checkpoint").mkdir()
    runs.write_json(copy / "checkpoint" / "progress.json", {"result": {**metrics, "details": {}}})
    code, out, err = call(capsys, "show", copy)
    assert code == 0 and "3 tasks are learned; the run is not finished" in " ".join(out.split()), err


def test_a_run_all_of_whose_tasks_are_forgotten_is_finished(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    metrics = json.loads((copy / "metrics.json").read_text())
    runs.write_json(copy / "metrics.json", {**metrics, "forgotten": [0, 1, 2], "details": {}})
    code, out, err = call(capsys, "show", copy)
    assert code == 0 and "forgotten since: tasks 0, 1, 2" in out and "not finished" not in out, err


def test_what_is_no_run(tmp_path, capsys):
    code, _, err = call(capsys, "show", tmp_path)
    assert code == 2 and "holds no run of hatcl (it has no config.json of a run); name the folder of a run" in err
    runs.write_json(tmp_path / "config.json", {"command": "cook", "options": {}})
    code, _, err = call(capsys, "show", tmp_path)
    assert code == 2 and "holds no run of hatcl" in err
    code, _, err = call(capsys, "show", tmp_path / "nowhere")
    assert code == 2 and "nowhere: no such folder; name the folder of a run" in err
    code, _, err = call(capsys, "show", tmp_path, "--share", "1")
    assert code == 2 and "--share: got 1.0, expected a share between 0 and 1, without these" in err


app()  # finds the commands
SHOWN = [name for name, it in COMMANDS.items() if it.show is not None]


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("metrics", [{"other": 1}, {"tasks": ["a"], "matrix": 3}, {"tasks": 1, "measure": 1}, [1]])
def test_what_another_program_left_is_one_clean_message(tmp_path, capsys, monkeypatch, name, metrics):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        runs.write_json(tmp_path / place / "config.json", {"command": name, "options": {}})
        runs.write_json(tmp_path / place / "metrics.json", metrics)
    for places in (["a"], ["a", "b"]):
        code, _, err = call(capsys, "show", *(tmp_path / place for place in places))
        assert code == 2 and err.startswith(f"error: {tmp_path / 'a'}"), err
        assert ("lacks a part that is needed to show it" in err) == isinstance(metrics, dict)
        assert "Copy the whole folder of the run again" in err or "Copy it again" in err
    monkeypatch.setattr(show, "_understood", lambda run: nullcontext())  # twin
    with pytest.raises((LookupError, TypeError, AttributeError)) if isinstance(metrics, dict) else nullcontext():
        call(capsys, "show", tmp_path / "a")


def test_half_a_checkpoint_is_one_clean_message(tmp_path, capsys):
    runs.write_json(tmp_path / "config.json", {"command": "train", "options": {}})
    (tmp_path / "checkpoint").mkdir()
    runs.write_json(tmp_path / "checkpoint" / "progress.json", {})
    code, _, err = call(capsys, "show", tmp_path)
    assert code == 2 and "lacks a part that is needed to show it" in err and "KeyError: 'result'" in err


def test_a_saved_model_is_no_run(run, capsys):
    code, _, err = call(capsys, "show", run / "model")
    assert code == 2 and "--output" not in err
    assert f"it holds a model, which hatcl describe {run / 'model'} shows" in err
    assert call(capsys, "describe", run / "model")[0] == 0


def test_a_task_that_learned_nothing_is_said(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    metrics = json.loads((copy / "metrics.json").read_text())
    assert metrics["commonest"] == [0.5, 0.5, 0.5]
    metrics["matrix"] = [[0.9] * 3 for _ in range(3)]
    (copy / "metrics.json").write_text(json.dumps(metrics))
    shown = " ".join(call(capsys, "show", copy)[1].split())
    assert "always the most common answer" in shown and "no better than" not in shown
    metrics["matrix"][1][1] = 0.5
    (copy / "metrics.json").write_text(json.dumps(metrics))
    shown = " ".join(call(capsys, "show", copy)[1].split())
    assert (
        "task 1 t1: 50.0 % just after learning is no better than always giving the most common answer (50.0 %), so "
        "nothing shows that it was learned; try more steps (--max-steps)"
    ) in shown and shown.count("no better than") == 1
    del metrics["commonest"]  # a run of an earlier hatcl
    (copy / "metrics.json").write_text(json.dumps(metrics))
    code, out, _ = call(capsys, "show", copy)
    assert code == 0 and "commonest" not in out


def test_the_page_of_a_run(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    code, out, err = call(capsys, "show", copy)
    assert code == 0 and str(copy / "report.html") in out.replace("\n", ""), err
    text = (copy / "report.html").read_text()
    for title in ("Scores", "Learning", "Certificate", "Units by layer", "Overlap of tasks", "Configuration"):
        assert f"<h2>{title}</h2>" in text
    for words in ("share of units on", "scale of the gates", "norm of the gradient", ">free<", "all 3 sealed tasks"):
        assert words in text
    assert f"hatcl forget {copy} --task 0 --dry-run" in text
    metrics = json.loads((copy / "metrics.json").read_text())
    shared, layers = metrics["details"]["overlap"], metrics["details"]["layers"]
    for t in range(3):
        assert shared[t][t] == metrics["facts"][t]["units_used"] == sum(x["used"][str(t)] for x in layers)
        assert all(shared[t][s] == shared[s][t] <= shared[t][t] for s in range(3))
    assert call(capsys, "forget", copy, "--task", "1")[0] == 0
    assert not (copy / "report.html").exists()  # it had the task
    assert call(capsys, "show", copy, "--output", tmp_path / "other.html")[0] == 0
    after = (tmp_path / "other.html").read_text()
    assert "t2" in after and "t1" not in after.partition("Configuration")[0] and ">free<" not in after
    assert not (copy / "report.html").exists() and "forgotten since: task 1" in after


def test_the_page_of_a_run_that_is_not_finished(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    metrics = json.loads((copy / "metrics.json").read_text())
    (copy / "metrics.json").unlink()
    (copy / "checkpoint").mkdir()
    left = {"details": {}, "matrix": metrics["matrix"][:1], "facts": metrics["facts"][:1]}
    runs.write_json(copy / "checkpoint" / "progress.json", {"result": {**metrics, **left}})
    assert call(capsys, "show", copy)[0] == 0
    text = (copy / "report.html").read_text()
    assert "1 of 3 tasks are learned; the run is not finished" in text
    assert f"hatcl train --resume --output {copy}" in text and "<h2>Certificate</h2>" not in text


def test_several_runs_beside_each_other(run, tmp_path, capsys):
    one, two = (shutil.copytree(run, tmp_path / name) for name in ("one", "two"))
    config = json.loads((two / "config.json").read_text())
    runs.write_json(two / "config.json", {**config, "options": {**config["options"], "lr": 0.5}})
    code, out, err = call(capsys, "show", one, two)
    shown = " ".join(out.split())
    assert code == 0 and "average score %" in shown and "options that differ" in shown and "0.5" in shown, err
    assert not (one / "report.html").exists()
    code, out, _ = call(capsys, "show", one, two, "--output", tmp_path / "both.html", "--json")
    metrics = json.loads((one / "metrics.json").read_text())
    assert code == 0 and json.loads(out) == {str(one): metrics, str(two): metrics}
    text = (tmp_path / "both.html").read_text()
    assert (
        f"<h2>{one}: Scores</h2>" in text
        and f"<h2>{two}: Scores</h2>" in text
        and "<h2>Options that differ</h2>" in text
    )
    code, _, err = call(capsys, "show", one, one)
    assert code == 2 and "is named twice; name each run once" in err
    code, _, err = call(capsys, "show", one, "--output", tmp_path / "page.txt")
    assert code == 2 and "expected a file that ends in .html" in err


HOSTILE = ["[/x] $\\foo$ :smile:", "<script>alert('\"')</script>", "a [red]name " + "with many words " * 20]


@pytest.fixture
def hostile(run, tmp_path):
    """The run, with names of tasks that a terminal, a picture and a page could take for something else."""
    pytest.importorskip("matplotlib")
    copy = shutil.copytree(run, tmp_path / "a run [/b] of '$\\x$'")
    metrics = json.loads((copy / "metrics.json").read_text())
    runs.write_json(copy / "metrics.json", {**metrics, "tasks": HOSTILE})
    return copy


def test_names_are_shown_as_they_are(hostile, capsys):
    code, out, err = call(capsys, "show", hostile)
    assert code == 0 and HOSTILE[0] in out and f"task 2  {HOSTILE[2]}" in out and str(hostile) in out, err
    text = (hostile / "report.html").read_text()
    assert "<script" not in text and "&lt;script&gt;alert(&#x27;&quot;&#x27;)&lt;/script&gt;" in text
    line = next(line for line in html.unescape(text).splitlines() if line.startswith("hatcl certify"))
    assert shlex.split(line) == ["hatcl", "certify", str(hostile)]
    assert call(capsys, "show", hostile, hostile.parent / "." / hostile.name / "")[0] == 2  # named twice
    other = shutil.copytree(hostile, hostile.with_name("[b]"))
    code, out, err = call(capsys, "show", hostile, other)
    assert code == 0 and str(other)[-11:] in out, err


def test_twin_markup_takes_names_for_styles(hostile, capsys, monkeypatch):
    monkeypatch.setattr(_console.out, "_markup", True)
    with pytest.raises(MarkupError):
        call(capsys, "show", hostile)


def test_the_commands_of_a_page_name_a_task_that_is_left(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    metrics = json.loads((copy / "metrics.json").read_text())
    runs.write_json(copy / "metrics.json", {**metrics, "forgotten": [0]})
    assert call(capsys, "show", copy)[0] == 0
    text = (copy / "report.html").read_text()
    assert f"hatcl forget {copy} --task 1 --dry-run" in text and "--task 0" not in text
    runs.write_json(copy / "metrics.json", {**metrics, "forgotten": [0, 1, 2]})
    assert call(capsys, "show", copy)[0] == 0
    assert "hatcl forget" not in (copy / "report.html").read_text()


def test_how_a_run_of_the_function_is_resumed(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    runs.write_json(copy / "config.json", {**config, "command": "learn_sequence"})
    (copy / "metrics.json").unlink()
    code, _, err = call(capsys, "show", copy)
    assert code == 2 and "has nothing to show yet; continue by calling learn_sequence again" in err
