from __future__ import annotations

import json

import pytest

from hatcl import files
from hatcl.engine import folder as checkpoints
from hatcl.engine.folder import RunFolder, check_same_run, drop_steps, read_steps
from hatcl.engine.records import made_with
from hatcl.errors import ConfigError, IntegrityError


def test_json_is_replaced_whole_and_strict(tmp_path):
    path = tmp_path / "metrics.json"
    checkpoints.write_json(path, {"a": [1.0, float("nan")], "b": (1, 2)})
    assert json.loads(path.read_text()) == {"a": [1.0, None], "b": [1, 2]}
    with pytest.raises(TypeError):
        checkpoints.write_json(path, {"a": object()})
    assert json.loads(path.read_text())["b"] == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
    path.write_text('{"a": [1')
    with pytest.raises(IntegrityError, match="metrics.json cannot be read as JSON.*Copy it again"):
        checkpoints.read_json(path)


# --- one run's folder ---

OPTIONS = {"lr": 0.1, "set_": {"grain": "row"}, "task": ["a=/a.npz"], "device": "cpu"}


def test_a_run_from_the_claim_to_its_end(tmp_path):
    run = RunFolder(tmp_path / "run", "train", OPTIONS)
    assert not run.begun and not run.path.exists()  # looking writes nothing
    with run.claimed(inputs={"a": "0"}):
        assert run.begun and not run.finished
        stored = json.loads((run.path / "config.json").read_text())
        assert stored.pop("made_with") == made_with()
        assert stored == {"command": "train", "options": OPTIONS, "inputs": {"a": "0"}}
        (run.path / "checkpoint").mkdir()
        assert run.finish({"accuracy": float("nan")}) == {"accuracy": None}
    assert run.finished and sorted(p.name for p in run.path.iterdir()) == ["config.json", "metrics.json"]
    assert RunFolder(run.path, "train", OPTIONS).metrics == {"accuracy": None}


def failing(run, *files):
    with pytest.raises(ConfigError, match="a late mistake"), run.claimed(light={"heads"}):
        for name in files:
            (run.path / name).touch()
        raise ConfigError("a late mistake")


def test_an_error_that_leaves_no_more_than_the_claim_takes_it_back(tmp_path):
    failing(RunFolder(tmp_path / "run", "train", OPTIONS), "heads")
    assert list(tmp_path.iterdir()) == []
    failing(RunFolder(tmp_path / "run", "train", OPTIONS), "heads", "checkpoint.pt")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "heads", "checkpoint.pt"}
    other = RunFolder(tmp_path / "other", "train", OPTIONS)
    with pytest.raises(KeyboardInterrupt), other.claimed():  # whoever stops a run may go on with it
        raise KeyboardInterrupt
    failing(RunFolder(tmp_path / "other", "train", OPTIONS))
    assert [p.name for p in other.path.iterdir()] == ["config.json"]  # it was begun before


def test_twin_a_claim_that_is_not_taken_back(tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "_unclaim", lambda self, light: None)
    with pytest.raises(AssertionError):
        test_an_error_that_leaves_no_more_than_the_claim_takes_it_back(tmp_path)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"command": "atlas add"}, "holds a run of hatcl train, not of hatcl atlas add; name another folder"),
        ({"resume": False}, "already holds a run; add --resume to continue it, or name another folder"),
        (
            {"options": {**OPTIONS, "lr": 0.2}},
            "was started with lr=0.1, now got 0.2; give the same value to continue it",
        ),
        ({"options": {**OPTIONS, "set_": {}}}, "was started with set_.grain=row, now got nothing"),
        ({"options": {**OPTIONS, "task": ["a" * 99]}}, r"now got .'a{57}…; give the same"),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path, changes, text):
    with RunFolder(tmp_path / "run", "train", OPTIONS).claimed():
        pass
    given = {"command": "train", "options": OPTIONS, **changes}
    with pytest.raises(ConfigError, match=text):
        RunFolder(tmp_path / "run", **given)
    assert RunFolder(tmp_path / "run", "train", {**OPTIONS, "device": "cuda"}, free={"device"}).begun


@pytest.mark.parametrize("was", ["0.0.1", None])
def test_an_unfinished_run_of_another_version_is_refused(tmp_path, was):
    run = RunFolder(tmp_path / "run", "train", OPTIONS)
    with run.claimed():
        stored = json.loads((run.path / "config.json").read_text())
    made = {} if was is None else {"made_with": {"versions": {"hatcl": was}}}  # earlier ones did not note it
    checkpoints.write_json(run.path / "config.json", {**stored, "made_with": {}, **made})
    text = "was started by hatcl 0.0.1 and" if was else "was started by an earlier hatcl and"
    with pytest.raises(ConfigError, match=f"{text} is not finished; resume it with that version"):
        RunFolder(run.path, "train", OPTIONS)
    checkpoints.write_json(run.path / "metrics.json", {})
    assert RunFolder(run.path, "train", OPTIONS).finished  # its results can be read
    with pytest.raises(
        ConfigError, match=r"was made by .*with other options \(.*new=nothing.*\); hatcl show .* reads it"
    ):
        RunFolder(run.path, "train", {**OPTIONS, "new": 1})


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"hidden_size": 3}')
    for name, text in (
        ("file", "file is a file, expected a folder"),
        ("notes", r"holds something other than a run of hatcl \(todo.txt, and no config.json\)"),
        ("model", "the config.json in .*model does not belong to a run of hatcl; name another folder"),
    ):
        with pytest.raises(ConfigError, match=text):
            RunFolder(tmp_path / name, "train", OPTIONS)


def test_another_process_in_the_folder(tmp_path):
    run = RunFolder(tmp_path / "run", "train", OPTIONS)
    with run.claimed():
        with pytest.raises(ConfigError, match="run: another process is working in this folder; wait until it ends"):
            with RunFolder(tmp_path / "run", "train", OPTIONS).claimed():
                raise AssertionError
        assert (run.path / ".lock").exists()
    with run.claimed():
        pass
    assert [p.name for p in run.path.iterdir()] == ["config.json"]


def test_inputs_that_changed(tmp_path):
    (tmp_path / "a.npz").write_text("a")
    run = RunFolder(tmp_path / "run", "train", OPTIONS)
    with run.claimed(inputs=run.same_inputs([tmp_path / "a.npz"])):
        assert list(run.same_inputs([tmp_path / "a.npz"])) == [str(tmp_path / "a.npz")]
    (tmp_path / "a.npz").write_text("b")
    with pytest.raises(IntegrityError, match="a.npz has changed since the run in .*run was started; restore it"):
        run.same_inputs([tmp_path / "a.npz"])


def test_steps_that_are_done_again_replace_their_lines(tmp_path):
    run = RunFolder(tmp_path, "train", {})
    for task, step in ((0, 1), (0, 2), (1, 1), (1, 2)):
        run.tell(task=task, step=step, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"task": 1, "st')  # cut by a kill
    run._lines = None  # as in another process
    run.tell(task=1, step=2, loss=2.0)
    run.tell(task=1, step=3, loss=float("nan"))
    told = [(line["task"], line["step"], line["loss"]) for line in read_steps(tmp_path)]
    assert told == [(0, 1, 1.0), (0, 2, 1.0), (1, 1, 1.0), (1, 2, 2.0), (1, 3, None)]


def test_the_lines_of_a_stage_go(tmp_path):
    run = RunFolder(tmp_path, "train", {})
    for stage in range(3):
        run.tell(stage=stage, step=1)
    drop_steps(tmp_path, 1)
    assert [line["stage"] for line in read_steps(tmp_path)] == [0, 2]


def test_a_finished_run_loses_what_interruptions_left(tmp_path):
    for name in ("checkpoint", ".checkpoint.old", "model", ".model.old", ".other.old"):
        (tmp_path / name).mkdir()
    (tmp_path / f".model.{files._machine()}-{2**22 + 1}-0123abcd.new").mkdir()  # of no process
    checkpoints.tidy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.old", "model"]  # nothing took the other's place


def test_the_first_difference_is_named():
    check_same_run("x", {"a": (1, 2), "b": {"c": 1}}, {"a": [1, 2], "b": {"c": 1}})
    with pytest.raises(ConfigError, match=r"the run in x was started with b.c=1, now got 2.*\(--output\)"):
        check_same_run("x", {"a": 1, "b": {"c": 1}}, {"a": 1, "b": {"c": 2}})
