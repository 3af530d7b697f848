from __future__ import annotations

import json
import shutil

import pytest
import torch
from command_parts import FAST, call, given, write_tasks

import hatcl


@pytest.fixture
def copied(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def said(folder, task):
    """What a sealed task of a saved model computes."""
    model = hatcl.from_pretrained(folder)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with hatcl.task(model, task), torch.no_grad():
        return model(x)


def test_a_finished_run_grows_and_its_tasks_stay(copied, capsys):
    want = [said(copied / "model", t) for t in range(3)]
    before = json.loads(call(capsys, "describe", copied, "--json")[1])
    code, out, _ = call(capsys, "grow", copied, "--add-tasks", "2", "--num-classes", "7", "--factor", "2", "--json")
    told = json.loads(out)
    assert code == 0 and told["grown"]["units_before"] == before["units"] < told["grown"]["units"]
    assert told["added"]["tasks"] == [3, 4] and list(told["added"]["classes"].values()) == [[7, 7]]
    assert all(torch.equal(said(copied / "model", t), want[t]) for t in range(3))
    assert hatcl.from_pretrained(copied / "model").hat_gates.num_tasks == 5
    metrics = json.loads((copied / "metrics.json").read_text())
    assert metrics["details"]["units"] == told["grown"]["units"]
    code, out, _ = call(capsys, "certify", copied)
    assert code == 0 and "task 2: exact, outputs bit-equal to those at sealing" in out
    assert call(capsys, "show", copied)[0] == call(capsys, "describe", copied)[0] == 0
    assert call(capsys, "forget", copied, "--task", "1")[0] == 0
    assert torch.equal(said(copied / "model", 2), want[2])


def test_a_layer_into_another_folder(run, tmp_path, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    name = next(x["name"] for x in json.loads(call(capsys, "describe", run, "--json")[1])["layers"] if x["units"] > 1)
    code, out, err = call(capsys, "grow", run, "--layer", f"{name}=2", "--output", tmp_path / "wide")
    assert code == 0, err
    assert "tasks None, 0, 1, 2 are bit-equal" in out and f"written to {tmp_path / 'wide'}" in out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert torch.equal(said(tmp_path / "wide", 1), said(run / "model", 1))
    code, _, err = call(capsys, "grow", run, "--add-tasks", "1", "--output", tmp_path / "wide")
    assert code == 2 and "a model is there already; add --replace, or name another folder" in err
    code, out, _ = call(capsys, "grow", tmp_path / "wide", "--add-tasks", "1", "--json")
    assert code == 0 and json.loads(out)["grown"] is None and json.loads(out)["added"]["tasks"] == [3]


def test_a_run_that_is_full_grows_and_learns_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    # the first task takes every unit, and no later one may share them
    full = ["--set", "init=constant", "--set", "init_value=6", "--set", "reuse=none"]
    small = ["--model-kwargs", "channels=[8,8,8,8]", "--model-kwargs", "stem_width=8"]
    line = ["train", *given(write_tasks(tmp_path, 2)), "--output", run, *FAST, *full, *small]
    code, _, err = call(capsys, *line)
    assert code == 2 and "task 1: no room left" in err and "hatcl.grow" in err
    (run / "learning_1.pt").write_bytes(b"of the sizes of before")
    code, out, _ = call(capsys, "grow", run)  # by one and a half
    assert code == 0 and "learned from its beginning (learning_1.pt is dropped)" in out
    want = said(run / "checkpoint" / "model", 0)
    code, _, err = call(capsys, "train", "--resume", "--output", run)
    assert code == 0, err
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["details"]["exact"] and metrics["details"]["bit_equal"] and len(metrics["matrix"]) == 2
    assert torch.equal(said(run / "model", 0), want) and hatcl.tasks(hatcl.from_pretrained(run / "model")) == [0, 1]
    assert call(capsys, "train", "--resume", "--output", run)[0] == 0  # it is finished, and read


def test_bad_input(copied, run, tmp_path, capsys):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    for args, text in (
        (["--factor", "0.5"], "factor: got 0.5"),
        (["--factor", "2", "--layer", "a=1"], "--factor, --layer: got both"),
        (["--layer", "nowhere=1"], "nowhere"),
        (["--layer", "conv1.0=few"], "--layer: got conv1.0=few, expected a whole number of new units"),
        (["--num-classes", "3"], "--num-classes belongs to the tasks that --add-tasks makes room for"),
        (["--add-tasks", "0"], "count: got 0, expected at least 1"),
        (["--add-tasks", "2", "--num-classes", "1", "--num-classes", "2", "--num-classes", "3"], "got 3 numbers for 2"),
        (["--output", str(run)], "a run is there; name another folder"),
        (["--output", str(copied / "model"), "--replace"], "which is to stay as it is; name another folder"),
    ):
        code, _, err = call(capsys, "grow", copied, *args)
        assert code == 2 and text in err, err
    after = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file() and path.name != ".lock"}
    assert {p: b for p, b in before.items() if p.name != ".lock"} == after
    code, _, err = call(capsys, "grow", tmp_path)
    assert code == 2 and "holds no model" in err


def test_what_a_run_that_stopped_cannot_have(copied, capsys):
    (copied / "model").rename(copied / "kept")
    (copied / "metrics.json").unlink()
    (copied / "checkpoint").mkdir()
    (copied / "kept").rename(copied / "checkpoint" / "model")
    code, _, err = call(capsys, "grow", copied, "--add-tasks", "1")
    assert (
        code == 2 and "is not finished, so its tasks are still those that it was started with; finish it first" in err
    )
    (copied / "checkpoint" / "optimizer.pt").write_bytes(b"")
    code, _, err = call(capsys, "grow", copied)
    assert code == 2 and "optimizer.pt" in err
