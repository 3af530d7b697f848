from __future__ import annotations

import csv
import sys
from types import ModuleType, SimpleNamespace

import pytest

from hatcl.engine import folder
from hatcl.engine.folder import RunFolder, drop_steps
from hatcl.engine.logs import LOGS, check_logs
from hatcl.errors import ConfigError


@pytest.fixture
def fake(monkeypatch):
    """Modules in the place of wandb and mlflow, which note what is asked of them."""
    calls: list[tuple] = []

    def noting(name, gives=None):
        def note(*args, **options):
            calls.append((name, args, options))
            return gives

        return note

    run = SimpleNamespace(id="w1", log=noting("wandb.log"), finish=noting("wandb.finish"))
    wandb, mlflow = ModuleType("wandb"), ModuleType("mlflow")
    wandb.init = noting("wandb.init", run)
    mlflow.start_run = noting("mlflow.start_run", SimpleNamespace(info=SimpleNamespace(run_id="m1")))
    for name in ("log_params", "log_metrics", "end_run"):
        setattr(mlflow, name, noting(f"mlflow.{name}"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return calls


def test_tensorboard_has_what_was_told_and_goes_on_after_an_interruption(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFolder(tmp_path / "run", "train", {}, log=["tensorboard"])
    with run.claimed():
        for step in (1, 2, 3):
            run.tell(stage=0, step=step, name="a", loss=1.0 / step, scale=float("nan") if step == 2 else 1.0)
        run.mark(**{"score/a": 0.5})
        run.close()
        again = RunFolder(tmp_path / "run", "train", {}, log=["tensorboard"])
        again.tell(stage=0, step=3, name="a", loss=9.0)  # done again from a checkpoint after step 2
        again.close()
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert [e.step for e in found.Scalars("scale")] == [1]  # NaN is left out, step 3 was done again without it
    assert "name" not in found.Tags()["scalars"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_others_are_called_as_they_are_meant_to(tmp_path, fake, name):
    options = {"lr": 0.1, "task": ["a"]}
    for steps in ((1, 2), (3,)):
        run = RunFolder(tmp_path / "run", "train", options, log=[name])
        with run.claimed():
            for step in steps:
                run.tell(stage=0, step=step, name="a", loss=0.5)
            run.mark(**{"score/a": 0.75})
            run.close()
    start, end = {"wandb": ("wandb.init", "wandb.finish"), "mlflow": ("mlflow.start_run", "mlflow.end_run")}[name]
    begun = [options for called, _, options in fake if called == start]
    assert [called for called, *_ in fake].count(end) == 2 == len(begun)
    if name == "wandb":
        assert begun[0]["project"] == "hatcl" and begun[0]["config"] == options and "id" not in begun[0]
        assert begun[1]["id"] == "w1" and begun[1]["resume"] == "allow"
    else:
        assert begun == [{"run_name": "run"}, {"run_id": "m1"}]
        assert [args for called, args, _ in fake if called == "mlflow.log_params"] == [
            ({"lr": "0.1", "task": "['a']"},)
        ]
    logged = [(args[0], kw["step"]) for called, args, kw in fake if called in ("wandb.log", "mlflow.log_metrics")]
    assert logged[0] == ({"stage": 0.0, "step": 1.0, "loss": 0.5}, 1)
    assert [step for _, step in logged] == [1, 2, 2, 3, 3]
    assert logged[2][0] == {"score/a": 0.75}


def test_what_cannot_be_written_to_is_said_before_a_folder_is_made(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--log: got 'tensorbord', expected .*did you mean 'tensorboard'"):
        RunFolder(tmp_path / "run", "train", {}, log=["tensorbord"])
    for name in LOGS:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=f"--log: {name} is not installed; run: pip install {name}"):
            RunFolder(tmp_path / "run", "train", {}, log=[name])
    assert not (tmp_path / "run").exists()


def test_a_writer_named_twice(fake):
    with pytest.raises(ConfigError, match="--log: got wandb twice, expected each once"):
        check_logs(["wandb", "wandb"])


def test_the_steps_as_a_table(tmp_path):
    run = RunFolder(tmp_path, "train", {})
    run.close()  # nothing was told
    assert not (tmp_path / "metrics.csv").exists()
    run.tell(stage=0, step=1, name="a, b", loss=0.5)
    run.tell(stage=1, step=1, name="c", loss=float("nan"), penalty=2.0)
    run.close()
    with (tmp_path / "metrics.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert rows[0] == {"stage": "0", "step": "1", "name": "a, b", "loss": "0.5", "penalty": ""}
    assert rows[1] == {"stage": "1", "step": "1", "name": "c", "loss": "", "penalty": "2.0"}
    drop_steps(tmp_path, 1)  # a task that is forgotten
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1:] == ['0,1,"a, b",0.5']


@pytest.mark.parametrize(("task", "told"), [
    ("SST-2 (v1) [x]", "score/SST-2 _v1_ _x_"), ("a//b/../é:c.d", "score/a/_/b/_/é:c.d"),
    ("x" * 300, "score/" + "x" * 244),
])  # fmt: skip
def test_names_that_mlflow_would_refuse(tmp_path, fake, task, told):
    run = RunFolder(tmp_path / "run", "train", {}, log=["mlflow"])
    with run.claimed():
        run.mark(**{f"score/{task}": 0.5})
        run.close()
    assert [args for called, args, _ in fake if called == "mlflow.log_metrics"] == [({told: 0.5},)]


def test_a_table_that_cannot_be_written_leaves_no_writer_open(tmp_path, fake, monkeypatch):
    def full(path):
        raise OSError("the disk is full")

    monkeypatch.setattr(folder, "write_steps_table", full)
    run = RunFolder(tmp_path / "run", "train", {}, log=["wandb"])
    with run.claimed():
        run.tell(step=1, loss=0.5)
    with pytest.raises(OSError, match="the disk is full"):
        run.close()
    assert fake[-1][0] == "wandb.finish"
