"""An interrupted run ends as an uninterrupted one, bit for bit, and goes on with nothing else."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from continual_parts import (  # noqa: E402
    CHANGED,
    METHODS,
    QUICK,
    Kill,
    adapted,
    bert,
    files,
    killer,
    made,
    plain,
    run,
    same,
    state,
    text_tasks,
    vector_task,
)
from safetensors.torch import load_file  # noqa: E402

from hatcl.continual import folder as kept  # noqa: E402
from hatcl.continual import learn_sequence, list_continual_methods  # noqa: E402
from hatcl.errors import IntegrityError, SkillError  # noqa: E402
from hatcl.skills.scores import SkillScores  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("method, at", [*((m, "learning") for m in METHODS), ("tasl", "scoring")])
def test_killed_in_the_second_task_it_ends_as_if_it_had_not_been(method, at, tmp_path):
    whole, expected = run(method, tmp_path / "whole")
    stage = 0 if method == "joint" else 1
    with pytest.raises(Kill):
        run(method, tmp_path / "killed", until=(stage, at))
    assert not (tmp_path / "killed" / "metrics.json").exists()
    resumed, result = run(method, tmp_path / "killed")
    assert np.array_equal(result.matrix, expected.matrix, equal_nan=True)
    assert same(state(whole), state(resumed))
    a, b = (files(tmp_path / name) for name in ("whole", "killed"))
    assert a.pop("seconds.json") and b.pop("seconds.json")
    assert a == b


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_killed_in_the_middle_of_a_task_it_goes_on_there(method, step, tmp_path):
    """In its first or second pass over the examples, of two steps each; a checkpoint is written after every step."""
    whole, expected = run(method, tmp_path / "whole", seconds=0)
    stage = 0 if method == "joint" else 1
    with pytest.raises(Kill):
        run(method, tmp_path / "killed", until=(stage, "learning"), step=step, seconds=0)
    told = []
    resumed = made(method)
    result = learn_sequence(
        resumed, text_tasks(bert()), method, {**QUICK, "checkpoint_seconds": 0}, method_options=CHANGED.get(method),
        folder=tmp_path / "killed", on_progress=told.append,
    )  # fmt: skip
    assert next(at.step for at in told if at.doing == "learning") == step + 1
    assert np.array_equal(result.matrix, expected.matrix, equal_nan=True)
    assert same(state(whole), state(resumed))
    a, b = (files(tmp_path / name) for name in ("whole", "killed"))
    assert a.pop("seconds.json") and b.pop("seconds.json")
    assert a == b


@pytest.mark.parametrize("method", ["tasl", "replay", "ilora"])
def test_twin_without_what_its_steps_changed_it_ends_elsewhere(method, tmp_path, monkeypatch):
    run(method, tmp_path / "whole", seconds=0)
    with pytest.raises(Kill):
        run(method, tmp_path / "killed", until=(1, "learning"), step=3, seconds=0)
    monkeypatch.setattr(list_continual_methods()[method], "load_state", lambda self, state: None)
    run(method, tmp_path / "killed", seconds=0)
    a, b = (files(tmp_path / name) for name in ("whole", "killed"))
    assert a.pop("seconds.json") and b.pop("seconds.json")
    assert a != b


def test_a_method_that_does_not_tell_its_state_begins_the_task_again(tmp_path, monkeypatch):
    whole, _ = run("tasl", tmp_path / "whole")
    monkeypatch.setattr(list_continual_methods()["tasl"], "state", lambda self: None)
    with pytest.raises(Kill):
        run("tasl", tmp_path / "killed", until=(1, "learning"), step=3, seconds=0)
    assert not list((tmp_path / "killed").glob("learning_*"))
    resumed, _ = run("tasl", tmp_path / "killed", seconds=0)
    assert same(state(whole), state(resumed))


def test_twin_a_method_that_keeps_nothing_does_not_end_the_same(tmp_path, monkeypatch):
    """What is compared above depends on what TaSL saves beside the model."""
    _, _ = run("tasl", tmp_path / "whole")
    kind = list_continual_methods()["tasl"]
    with pytest.raises(Kill):
        run("tasl", tmp_path / "killed", until=(2, "learning"))

    def forgets(self, folder, model):
        first = SkillScores.load(tmp_path / "killed" / "tasks" / "0_task_0" / "scores.safetensors")
        self.cumulative = first.normalised()

    monkeypatch.setattr(kind, "load", forgets)
    run("tasl", tmp_path / "killed")
    a, b = (load_file(tmp_path / n / "checkpoint" / "model.safetensors") for n in ("whole", "killed"))
    assert not same(a, b)


@pytest.mark.parametrize("method", ["tasl", "ilora"])
def test_a_finished_run_is_read(method, tmp_path):
    model, expected = run(method, tmp_path / "run")
    before = files(tmp_path / "run")
    again = adapted()
    _, result = run(method, tmp_path / "run", model=again, until=(0, "learning"))  # would raise if it learned
    assert np.array_equal(result.matrix, expected.matrix, equal_nan=True)
    assert result.seconds == expected.seconds
    assert same(state(model), state(again))
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("method", ["sequential", "replay", "joint", "tasl"])
def test_full_fine_tuning_goes_on_too(method, tmp_path):
    """A model without LoRA, with running statistics: they are part of what a run goes on from."""
    tasks = [vector_task(f"v{i}", i, classes=2 + i % 2) for i in range(3)]
    options = {"grain": "matrix"} if method == "tasl" else CHANGED.get(method)

    def learn(model, folder, until=None):
        return learn_sequence(
            model, tasks, method, QUICK, method_options=options, folder=folder, on_progress=killer(until)
        )

    whole, resumed = plain(), plain()
    learn(whole, tmp_path / "whole")
    with pytest.raises(Kill):
        learn(plain(), tmp_path / "killed", until=(0 if method == "joint" else 1, "learning"))
    learn(resumed, tmp_path / "killed")
    assert same(state(whole), state(resumed))
    last = tmp_path / "whole" / "tasks" / "2_v2" / "adapter" / "weights.safetensors"
    assert set(load_file(last)) == {n for n, _ in whole.named_parameters()}
    with pytest.raises(SkillError, match="another base model"):
        learn(plain(1), tmp_path / "whole")


def test_a_damaged_checkpoint(tmp_path):
    with pytest.raises(Kill):
        run("tasl", tmp_path / "run", until=(1, "learning"))
    path = tmp_path / "run" / "checkpoint" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    with pytest.raises(IntegrityError, match="cannot be read"):
        run("tasl", tmp_path / "run")
    path.write_bytes(content)
    run("tasl", tmp_path / "run")


@pytest.mark.parametrize("keeps", [True, False], ids=["as it is", "twin: without the folder beside"])
def test_killed_while_a_task_is_written(tmp_path, monkeypatch, keeps):
    """What a finished task leaves is there as a whole or not at all."""
    whole, _ = run("tasl", tmp_path / "whole")
    inner = kept.write_adapter

    def dies(model, folder, names=None):
        inner(model, folder, names)
        if "1_task_1" in str(folder):
            raise Kill

    @contextlib.contextmanager
    def in_place(target):
        target.mkdir(parents=True)
        yield target

    with monkeypatch.context() as m:
        m.setattr(kept, "write_adapter", dies)
        if not keeps:
            m.setattr(kept, "replaced_folder", in_place)
        with pytest.raises(Kill):
            run("tasl", tmp_path / "killed")
    folders = sorted(p.name for p in (tmp_path / "killed" / "tasks").iterdir())
    assert (folders == ["0_task_0"]) is keeps
    if keeps:
        resumed, _ = run("tasl", tmp_path / "killed")
        assert same(state(whole), state(resumed))
        a, b = (files(tmp_path / name) for name in ("whole", "killed"))
        assert a.pop("seconds.json") and b.pop("seconds.json")
        assert a == b
