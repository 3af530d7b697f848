from __future__ import annotations

import json
import subprocess

import torch
from command_parts import call


def test_certify_says_each_task_is_exact(run, capsys):
    code, out, _ = call(capsys, "certify", run, "--device", "cpu")
    assert code == 0
    assert [f"task {t}: exact, outputs bit-equal to those at sealing" in out for t in range(3)] == [True] * 3


def test_certify_works_without_the_data_and_on_a_plain_model(run, tmp_path, capsys):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    config = json.loads((copy / "config.json").read_text())
    config["options"]["task"] = [f"x={tmp_path / 'gone.npz'}"]
    (copy / "config.json").write_text(json.dumps(config))
    code, out, _ = call(capsys, "certify", copy)
    assert code == 0 and "gone.npz does not exist" in " ".join(out.split()) and "task 2: exact" in out
    code, out, _ = call(capsys, "certify", copy / "model")
    assert code == 0 and "no finished run's records here" in " ".join(out.split()) and "task 2: exact" in out


def test_certify_notices_a_moved_task(run, tmp_path, capsys):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    metrics = json.loads((copy / "metrics.json").read_text())
    metrics["facts"][1]["outputs_sha256"] = "0" * 64
    (copy / "metrics.json").write_text(json.dumps(metrics))
    code, out, _ = call(capsys, "certify", copy)
    assert code == 1 and "task 1: exact, outputs MOVED since sealing" in out
    assert "task 0: exact, outputs bit-equal" in out


def test_a_folder_without_a_model(tmp_path, capsys):
    for command in (["certify"], ["describe"], ["forget", "--task", "0"]):
        code, _, err = call(capsys, *command, tmp_path)
        assert code == 2 and "holds no model with gates; expected the folder of a run" in err


def test_a_truncated_or_tampered_model_is_refused(run, tmp_path, capsys):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    (weights,) = (copy / "model").glob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-64])
    code, _, err = call(capsys, "certify", copy)
    assert code == 2 and weights.name in err
    torch.save({"weights": 1}, weights)
    code, _, err = call(capsys, "describe", copy)
    assert code == 2 and weights.name in err
