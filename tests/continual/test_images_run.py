from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import timm
import torch

import hatcl
from hatcl.continual.images_run import RunResult, TrainOptions, Watcher, logits_digest, train
from hatcl.engine import folder as checkpoints
from hatcl.errors import ConfigError, IntegrityError, NonFiniteLossError

OPTIONS = TrainOptions(epochs=2, batch_size=8, lr=3e-3, size=32, checkpoint_seconds=1e9)


def new_model(tasks):
    torch.manual_seed(0)
    classes = [task.num_classes for task in tasks]
    return timm.create_model("hat_test_resnet", num_tasks=len(tasks), num_classes=classes)


class Stop(Exception):
    pass


class StopAt(Watcher):
    """Stops a run at step `step` of task `task`."""

    def __init__(self, task: int, step: int) -> None:
        self.at = (task, step)

    def stepped(self, task: int, step: int, loss: float, penalty: float, scale: float) -> None:
        if (task, step) == self.at:
            raise Stop


class Recorder(Watcher):
    def __init__(self) -> None:
        self.events: list[tuple] = []

    def started(self, tasks, steps, result) -> None:
        self.events.append(("started", list(steps), len(result.records)))

    def learning(self, task, step) -> None:
        self.events.append(("learning", task, step))

    def stepped(self, task, step, loss, penalty, scale) -> None:
        self.events.append(("stepped", task, step))
        assert np.isfinite([loss, penalty, scale]).all()

    def sealed(self, task, result) -> None:
        self.events.append(("sealed", task))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run, shared by the tests that only look at it."""
    from hatcl.data.images import ImageData

    rng = np.random.default_rng(0)
    tasks = []
    for t in range(3):
        classes = 2 + t % 2
        labels = np.arange(24) % classes
        images = rng.integers(0, 120, (24, 16, 16), dtype=np.uint8)
        images[np.arange(24), :8, :8] += (100 * labels[:, None, None] / classes).astype(np.uint8)
        tasks.append(ImageData(f"blobs{t}", images, labels, images, labels, classes))
    folder = tmp_path_factory.mktemp("run")
    model, recorder = new_model(tasks), Recorder()
    result = train(model, tasks, OPTIONS, folder=folder, watcher=recorder)
    return tasks, folder, model, result, recorder


def test_a_run_ends_with_every_task_bit_equal(finished):
    tasks, folder, model, result, _ = finished
    assert hatcl.tasks(model) == [0, 1, 2]
    assert result.finished and result.exact and result.bit_equal
    assert result.max_abs_diff == {"0": 0.0, "1": 0.0, "2": 0.0}
    assert [len(row) for row in result.rows] == [1, 2, 3]
    assert result.rows[2][0] == result.rows[0][0] and result.rows[2][1] == result.rows[1][1]
    for record, task in zip(result.records, tasks, strict=True):
        assert (record.name, record.classes, record.steps) == (task.name, task.num_classes, 6)
        assert 0 < record.units_used <= result.units and record.seconds > 0


def test_the_folder_tells_the_same(finished):
    _, folder, model, result, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "model"]
    content = checkpoints.read_json(folder / "metrics.json")
    assert content["bit_equal"] is True and content["exact"] is True and content["finished"] is True
    assert content["forgetting"] == 0.0 == content["backward_transfer"]
    assert content["average_accuracy"] == pytest.approx(np.mean(result.rows[-1]))
    assert RunResult.from_dict(content).to_dict() == content
    again = hatcl.from_pretrained(folder / "model")
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for t in range(3):
        with hatcl.task(model.eval(), t), hatcl.task(again.eval(), t), torch.no_grad():
            assert torch.equal(model(x), again(x))


def test_the_watcher_hears_everything_in_order(finished):
    events = finished[4].events
    assert events[0] == ("started", [6, 6, 6], 0)
    assert [event for event in events if event[0] in ("learning", "sealed")] == [
        (word, *rest) for t in range(3) for word, rest in (("learning", (t, 0)), ("sealed", (t,)))
    ]
    assert [event[2] for event in events if event[0] == "stepped"] == 3 * [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def uninterrupted():
    """Results of whole runs by optimizer, filled by the test that first asks."""
    return {}


@pytest.mark.parametrize("stop", [(0, 1), (0, 6), (1, 3), (2, 5)])
@pytest.mark.parametrize("opt", ["adamw", "sgd"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, three_tasks, uninterrupted, stop, opt):
    options = dataclasses.replace(OPTIONS, optimizer=opt, flip=True, crop=1, checkpoint_seconds=0.0)
    if opt not in uninterrupted:
        uninterrupted[opt] = train(new_model(three_tasks), three_tasks, options)
    whole = uninterrupted[opt]
    with pytest.raises(Stop):
        train(new_model(three_tasks), three_tasks, options, folder=tmp_path, watcher=StopAt(*stop))
    checkpoint = checkpoints.load_checkpoint(tmp_path, torch.device("cpu"))
    if checkpoint is None:
        model = new_model(three_tasks)
    else:
        model = checkpoint.model
    resumed = train(model, three_tasks, options, folder=tmp_path, checkpoint=checkpoint)
    assert resumed.finished and resumed.exact and resumed.bit_equal
    assert [record.logits_sha256 for record in resumed.records] == [record.logits_sha256 for record in whole.records]
    assert resumed.rows == whole.rows


def test_a_run_may_go_on_with_another_rate_and_precision(tmp_path, three_tasks):
    options = dataclasses.replace(OPTIONS, schedule="constant", checkpoint_seconds=0.0)
    with pytest.raises(Stop):
        train(new_model(three_tasks), three_tasks, options, folder=tmp_path, watcher=StopAt(1, 3))
    checkpoint = checkpoints.load_checkpoint(tmp_path, torch.device("cpu"))
    assert checkpoint.training["optimizer"]["param_groups"][0]["lr"] == options.lr
    slower = dataclasses.replace(options, lr=options.lr / 4, amp="fp16", clip=1.0)
    with pytest.raises(Stop):
        train(checkpoint.model, three_tasks, slower, folder=tmp_path, checkpoint=checkpoint, watcher=StopAt(2, 2))
    checkpoint = checkpoints.load_checkpoint(tmp_path, torch.device("cpu"))
    assert checkpoint.training["optimizer"]["param_groups"][0]["lr"] == options.lr / 4
    result = train(checkpoint.model, three_tasks, slower, folder=tmp_path, checkpoint=checkpoint)
    assert result.exact and result.bit_equal


def test_other_data_are_refused_on_resume(tmp_path, three_tasks):
    options = dataclasses.replace(OPTIONS, checkpoint_seconds=0.0)
    with pytest.raises(Stop):
        train(new_model(three_tasks), three_tasks, options, folder=tmp_path, watcher=StopAt(1, 2))
    checkpoint = checkpoints.load_checkpoint(tmp_path, torch.device("cpu"))
    three_tasks[2].x_test[0, 0, 0] ^= 1
    with pytest.raises(IntegrityError, match=r"the data of the tasks \(blobs2\) are not those the run started with"):
        train(checkpoint.model, three_tasks, options, folder=tmp_path, checkpoint=checkpoint)


def test_nan_in_the_middle_of_a_task_changes_nothing_learned(three_tasks):
    model = new_model(three_tasks)

    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = {}

    class Spoil(Watcher):
        def sealed(self, task, result):
            model.eval()
            with hatcl.task(model, task), torch.no_grad():
                before[task] = model(x).clone()

        def stepped(self, task, step, loss, penalty, scale):
            if (task, step) == (1, 3):
                self.hook = model.register_forward_hook(lambda *parts: parts[-1] * float("nan"))

    watcher = Spoil()
    with pytest.raises(
        NonFiniteLossError,
        match=r"task 1 \(blobs1\): epoch 2, step 4: the loss is nan. Nothing of it was.*Lower",
    ):
        train(model, three_tasks, OPTIONS, watcher=watcher)
    watcher.hook.remove()
    assert hatcl.tasks(model) == [0]
    model.eval()
    with hatcl.task(model, 0), torch.no_grad():
        assert torch.equal(model(x), before[0])


@pytest.mark.parametrize("change", [{"amp": "bf16"}, {"amp": "fp16"}, {"fresh_optimizer": True, "clip": 1.0}])
def test_other_ways_to_train_are_exact_too(three_tasks, change):
    result = train(new_model(three_tasks[:2]), three_tasks[:2], dataclasses.replace(OPTIONS, **change))
    assert result.exact and result.bit_equal


@pytest.mark.slow
def test_compiled_training_is_exact(three_tasks):
    result = train(new_model(three_tasks[:2]), three_tasks[:2], dataclasses.replace(OPTIONS, compile=True))
    assert result.exact and result.bit_equal


def test_options_are_checked_and_survive_json():
    assert TrainOptions.from_dict(OPTIONS.to_dict()) == OPTIONS
    for change, text in (
        ({"epochs": 0}, "epochs: got 0, expected an integer of at least 1"),
        ({"epochs": 2.5}, "epochs: got 2.5"),
        ({"flip": "no"}, "flip: got 'no', expected True or False"),
        ({"schedule": "cosin"}, "schedule: got 'cosin'.*did you mean 'cosine'"),
        ({"fit": "pads"}, "fit: got 'pads'.*did you mean 'pad'"),
        ({"optimizer": "adamq"}, "optimizer: got 'adamq'.*did you mean 'adam"),
        ({"lr": float("nan")}, "lr: got nan, expected a number above 0"),
        ({"weight_decay": -1.0}, "weight_decay: got -1.0"),
        ({"amp": "fp8"}, "amp: got 'fp8', expected one of none, bf16, fp16"),
        ({"warmup": 1.0}, "warmup: got 1.0, expected a share"),
    ):
        with pytest.raises(ConfigError, match=text):
            dataclasses.replace(OPTIONS, **change)
    with pytest.raises(IntegrityError, match="field 'records' is missing"):
        RunResult.from_dict({})


def test_a_digest_sees_every_bit():
    logits = torch.zeros(3, 2)
    other = logits.clone()
    other[1, 1] = -0.0
    assert logits_digest(logits) == logits_digest(logits.clone()) != logits_digest(other)
