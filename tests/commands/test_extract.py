from __future__ import annotations

import json
import subprocess

import pytest
import torch
from command_parts import call

import hatcl


def test_a_task_of_a_run_is_written_as_a_smaller_model(run, tmp_path, capsys):
    small = tmp_path / "small"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, out, _ = call(capsys, "extract", run, "--task", "1", "--output", small, "--json")
    report = json.loads(out)
    assert code == 0 and report["task"] == 1 and report["kept"] < report["total"] and report["difference"] < 1e-4
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    made, model = hatcl.load_extracted(small), hatcl.from_pretrained(run / "model")
    x = torch.randn(3, *json.loads((run / "config.json").read_text())["input_shape"])
    with hatcl.task(model, 1), torch.no_grad():
        torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in made.parameters()) == report["kept"]


def test_a_program_is_written_beside_it(run, tmp_path, capsys):
    code, out, _ = call(capsys, "extract", run, "--task", "0", "--output", tmp_path, "--format", "pt2")
    assert code == 0 and "of the task's" in out and [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert torch.export.load(tmp_path / "model.pt2").module() is not None


def test_bad_input(run, tmp_path, capsys):
    code, _, err = call(capsys, "extract", run, "--task", "7", "--output", tmp_path)
    assert code == 2 and "task: got 7, the model has tasks 0 to 2" in err and not list(tmp_path.iterdir())
    code, _, err = call(capsys, "extract", run, "--task", "0", "--output", run)
    assert code == 2 and "a run or a saved model is there; name another folder" in err
    code, _, err = call(capsys, "extract", tmp_path, "--task", "0", "--output", tmp_path / "small")
    assert code == 2 and "holds no model" in err


@pytest.mark.parametrize("form", ["onnx"])
def test_a_forgotten_task_is_refused(run, tmp_path, capsys, form):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    assert call(capsys, "forget", copy, "--task", "1")[0] == 0
    code, _, err = call(capsys, "extract", copy, "--task", "1", "--output", tmp_path / "small", "--format", form)
    assert code == 2 and "task 1 is not sealed" in err and not (tmp_path / "small").exists()


def test_an_earlier_export_is_not_replaced_in_silence(run, tmp_path, capsys):
    small = tmp_path / "small"
    assert call(capsys, "extract", run, "--task", "0", "--output", small)[0] == 0
    before = (small / "model.safetensors").read_bytes()
    code, _, err = call(capsys, "extract", run, "--task", "1", "--output", small)
    assert code == 2 and "an export is there already (model.safetensors); add --replace, or name another" in err
    assert (small / "model.safetensors").read_bytes() == before
    assert call(capsys, "extract", run, "--task", "1", "--output", small, "--replace")[0] == 0
    assert (small / "model.safetensors").read_bytes() != before
