from __future__ import annotations

import json

import pytest
import timm
import torch

import hatcl
from hatcl import files
from hatcl.engine import folder as checkpoints
from hatcl.engine.folder import Checkpoint
from hatcl.errors import IntegrityError

CPU = torch.device("cpu")


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


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("hat_test_resnet", num_tasks=2, num_classes=[2, 3])


def some_training(model):
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    return {"optimizer": optimizer.state_dict(), "scaler": {}, "step": 3}


def test_a_checkpoint_comes_back(tmp_path, model):
    assert checkpoints.load_checkpoint(tmp_path, CPU) is None
    saved = Checkpoint(model, some_training(model), {"task": 1, "step": 7})
    checkpoints.save_checkpoint(tmp_path, saved)
    loaded = checkpoints.load_checkpoint(tmp_path, CPU)
    assert loaded.progress == saved.progress
    ours, theirs = model.state_dict(), loaded.model.state_dict()
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours if isinstance(ours[name], torch.Tensor)
    )
    state = loaded.training["optimizer"]["state"]
    assert torch.equal(state[0]["exp_avg"], saved.training["optimizer"]["state"][0]["exp_avg"])


def test_damaged_checkpoints_are_refused_by_name(tmp_path, model):
    def fresh():
        checkpoints.save_checkpoint(tmp_path, Checkpoint(model, some_training(model), {"task": 0}))
        return tmp_path / "checkpoint"

    path = fresh() / "training.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(IntegrityError, match="training.pt cannot be read as tensors and plain values"):
        checkpoints.load_checkpoint(tmp_path, CPU)
    path = fresh() / "training.pt"
    torch.save({"optimizer": tmp_path}, path)  # a pickled object, not a tensor
    with pytest.raises(IntegrityError, match="training.pt cannot be read as tensors and plain values"):
        checkpoints.load_checkpoint(tmp_path, CPU)
    (fresh() / "progress.json").unlink()
    with pytest.raises(IntegrityError, match="progress.json cannot be read"):
        checkpoints.load_checkpoint(tmp_path, CPU)
    (path,) = (fresh() / "model").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(hatcl.errors.HATError, match="safetensors"):
        checkpoints.load_checkpoint(tmp_path, CPU)


def test_the_newest_model_of_a_run_is_found(tmp_path, model):
    with pytest.raises(IntegrityError, match="holds no model; expected the folder of a run"):
        checkpoints.find_model(tmp_path)
    hatcl.save_pretrained(model, tmp_path / "plain")
    assert checkpoints.find_model(tmp_path / "plain") == tmp_path / "plain"
    checkpoints.save_checkpoint(tmp_path, Checkpoint(model, some_training(model), {}))
    assert checkpoints.find_model(tmp_path) == tmp_path / "checkpoint" / "model"
    checkpoints.save_model(tmp_path, model)
    assert checkpoints.find_model(tmp_path) == tmp_path / "model"
    (tmp_path / "model").rename(tmp_path / ".model.old")  # killed between the two moves
    for name in ("metrics.json", "model"):
        (tmp_path / f".{name}.{files._machine()}-{2**22 + 1}-0123abcd.new").mkdir()  # of no process
    checkpoints.tidy(tmp_path)
    assert checkpoints.find_model(tmp_path) == tmp_path / ".model.old"
    assert not (tmp_path / "checkpoint").exists()
    checkpoints.save_model(tmp_path, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "plain"]
