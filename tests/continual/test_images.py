"""Images in `learn_sequence`: by hard attention bit for bit, and by every other method with a plain classifier."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
import timm
import torch
from image_parts import blobs

import hatcl
from hatcl.continual import (
    ImageLearning,
    ImageOptions,
    SequenceResult,
    image_tasks,
    learn_sequence,
    list_continual_methods,
)
from hatcl.continual.methods.hat import outputs_digest
from hatcl.continual.routing import image_examples, image_router, routing_measures
from hatcl.engine import folder as runs
from hatcl.errors import ConfigError, IntegrityError, NonFiniteLossError, SkillError

OPTIONS = ImageLearning(epochs=2, batch_size=8, checkpoint_seconds=1e9)
DENSE = "hat_test_resnet"


def new_model(stream):
    torch.manual_seed(0)
    return timm.create_model(DENSE, num_tasks=len(stream), num_classes=[data.num_classes for data in stream])


def learn(stream, options=OPTIONS, folder=None, tell=None, model=None, **more):
    model = new_model(stream) if model is None else model
    changes = {"flip": True, "crop": 1, **more}
    return model, learn_sequence(model, image_tasks(stream, changes), "hat", options, folder=folder, on_progress=tell)


class Stop(BaseException):
    pass


def stop_at(stage, step):
    def tell(at):
        if (at.doing, at.stage, at.step) == ("learning", stage, step):
            raise Stop

    return tell


@pytest.fixture(scope="module")
def stream():
    return [blobs(f"blobs{seed}", seed, classes=2 + seed % 2) for seed in range(3)]


@pytest.fixture(scope="module")
def finished(stream, tmp_path_factory):
    """One whole run, shared by the tests that only look at it."""
    folder, told = tmp_path_factory.mktemp("run"), []
    model, result = learn(stream, folder=folder, tell=told.append)
    return folder, model, result, told


def test_a_run_ends_with_every_task_bit_equal(finished, stream):
    _, model, result, _ = finished
    assert hatcl.tasks(model) == [0, 1, 2]
    assert result.details["exact"] is True and result.details["bit_equal"] is True
    assert result.details["max_abs_diff"] == {"0": 0.0, "1": 0.0, "2": 0.0}
    r = result.matrix
    assert np.isnan(r[np.triu_indices(3, 1)]).all() and r[2, 0] == r[0, 0] and r[2, 1] == r[1, 1]
    assert result.backward_transfer == 0 == result.forgetting
    for t, known in enumerate(result.facts):
        assert 0 < known["units_used"] <= known["units"] == result.details["units"]
        assert known["units_used"] == sum(layer["used"][t] for layer in result.details["layers"])
        assert (
            known["outputs_sha256"] == known["outputs_sha256_end"] == outputs_digest(model, image_tasks(stream)[t], t)
        )
        assert known["loss"] + known["penalty"] == pytest.approx(result.losses[t][1], rel=1e-6)
        assert 0 <= known["soft_score"] <= 1


@pytest.mark.filterwarnings("ignore:task 1. something else")
def test_twin_without_the_guard_the_digests_move(stream, monkeypatch):
    monkeypatch.setattr("hatcl.keeper.put_back", lambda *args: None)
    monkeypatch.setattr("hatcl.keeper.Kept.put", lambda k: None)
    monkeypatch.setattr("hatcl.keeper._zero", lambda which: lambda p: None)
    monkeypatch.setattr("hatcl.hat.digests.check_sealed", lambda *args: None)
    found = types.SimpleNamespace(exact=False, max_abs_diff={})  # the certificate would raise
    monkeypatch.setattr("hatcl.continual.methods.hat.certify", lambda *args: found)
    _, result = learn(stream[:2])
    assert result.details["bit_equal"] is False and result.facts[0]["bit_equal"] is False


def test_the_folder_tells_the_same_and_is_read_again(finished, stream):
    folder, model, result, _ = finished
    names = {"config.json", "metrics.json", "model", "seconds.json", "tasks"}
    assert {path.name for path in folder.iterdir()} == names
    assert [p.name for p in sorted((folder / "tasks").rglob("*")) if p.is_file()] == ["config.json"] * 3
    content = runs.read_json(folder / "metrics.json")
    assert SequenceResult.from_dict(content).to_dict() == content
    assert content["average_accuracy"] == pytest.approx(np.mean(result.matrix[-1]))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    again, read = learn(stream, folder=folder, tell=stop_at(0, 1))  # would stop if it learned
    assert read.to_dict() == content
    for other in (hatcl.from_pretrained(folder / "model"), again):
        for t in range(3):
            with hatcl.task(model.eval(), t), hatcl.task(other.eval(), t), torch.no_grad():
                assert torch.equal(model(x), other(x))


def test_progress_comes_in_order(finished):
    told = finished[3]
    assert [(at.stage, at.step) for at in told if at.doing == "learning"] == [
        (t, s) for t in range(3) for s in range(1, 7)
    ]
    assert all({"loss", "penalty", "scale"} <= set(at.measured) for at in told if at.doing == "learning")
    stages = [at for at in told if at.doing == "stage"]
    assert [at.stage for at in stages] == [0, 1, 2] and all("soft_score" in at.measured for at in stages)


@pytest.fixture(scope="module")
def uninterrupted():
    """Digests of whole runs by optimizer, filled by the test that first asks."""
    return {}


@pytest.mark.parametrize(("stop", "optimizer"), [((0, 1), "adamw"), ((1, 3), "adamw"), ((2, 5), "sgd")])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, stream, uninterrupted, stop, optimizer):
    options = dataclasses.replace(OPTIONS, optimizer=optimizer, checkpoint_seconds=0.0)
    if optimizer not in uninterrupted:
        uninterrupted[optimizer] = learn(stream, options)[1].to_dict()
    with pytest.raises(Stop):
        learn(stream, options, tmp_path, stop_at(*stop))
    told = []
    _, resumed = learn(stream, options, tmp_path, told.append)
    assert [at.stage for at in told if at.doing == "stage"][: stop[0]] == list(range(stop[0]))  # are told again
    assert next(at.step for at in told if at.doing == "learning") == stop[1] + 1
    assert resumed.to_dict() == uninterrupted[optimizer]


def test_twin_without_the_optimizer_of_the_tasks_before_it_ends_elsewhere(tmp_path, stream, uninterrupted):
    options = dataclasses.replace(OPTIONS, checkpoint_seconds=0.0)
    if "adamw" not in uninterrupted:
        uninterrupted["adamw"] = learn(stream, options)[1].to_dict()
    with pytest.raises(Stop):
        learn(stream, dataclasses.replace(options, checkpoint_seconds=1e9), tmp_path, stop_at(1, 1))
    (tmp_path / "checkpoint" / "optimizer.pt").unlink()
    _, resumed = learn(stream, options, tmp_path)
    expected = uninterrupted["adamw"]["facts"]
    assert resumed.facts[0] == expected[0] and resumed.facts[1]["outputs_sha256"] != expected[1]["outputs_sha256"]


def test_a_run_may_go_on_with_another_rate_and_precision(tmp_path, stream):
    options = dataclasses.replace(OPTIONS, schedule="constant", checkpoint_seconds=0.0)
    with pytest.raises(Stop):
        learn(stream, options, tmp_path, stop_at(1, 3))
    slower = dataclasses.replace(options, lr=options.lr / 4, amp="fp16", clip=1.0)
    with pytest.raises(Stop):
        learn(stream, slower, tmp_path, stop_at(2, 2))
    state = torch.load(tmp_path / "learning_2.pt", weights_only=True)
    assert {group["lr"] for group in state["optimizer"]["param_groups"]} == {options.lr / 4}
    result = learn(stream, slower, tmp_path)[1]
    assert result.details["exact"] and result.details["bit_equal"]
    with pytest.raises(ConfigError, match="options.weight_decay=0.05, now got 0.1"):
        learn(stream, dataclasses.replace(slower, weight_decay=0.1), tmp_path)


def test_other_data_are_refused_on_resume(tmp_path, stream):
    with pytest.raises(Stop):
        learn(stream, folder=tmp_path, tell=stop_at(0, 2))
    other = [*stream[:2], dataclasses.replace(stream[2], x_test=stream[2].x_test ^ 1)]
    with pytest.raises(IntegrityError, match="the data of the task blobs2 has changed since the run was started"):
        learn(other, folder=tmp_path)


def test_nan_in_the_middle_of_a_task_changes_nothing_learned(stream):
    model = new_model(stream)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    kept = {}

    def tell(at):
        if at.doing == "stage":
            model.eval()
            with hatcl.task(model, at.stage), torch.no_grad():
                kept[at.stage] = model(x).clone()
        if (at.doing, at.stage, at.step) == ("learning", 1, 3):
            kept["hook"] = model.register_forward_hook(lambda *parts: parts[-1] * float("nan"))

    with pytest.raises(NonFiniteLossError, match=r"task blobs1: epoch 2, step 4: the loss is nan.*Lower"):
        learn(stream, model=model, tell=tell)
    kept["hook"].remove()
    assert hatcl.tasks(model) == [0]
    model.eval()
    with hatcl.task(model, 0), torch.no_grad():
        assert torch.equal(model(x), kept[0])


@pytest.mark.parametrize("change", [{"amp": "bf16"}, {"amp": "fp16"}, {"fresh_optimizer": True, "clip": 1.0}])
def test_other_ways_to_train_are_exact_too(stream, change):
    details = learn(stream[:2], dataclasses.replace(OPTIONS, **change))[1].details
    assert details["exact"] and details["bit_equal"]


@pytest.mark.slow
def test_compiled_training_is_exact(stream):
    details = learn(stream[:2], dataclasses.replace(OPTIONS, compile=True))[1].details
    assert details["exact"] and details["bit_equal"]


def test_a_digest_sees_every_bit(finished, stream):
    _, model, _, _ = finished
    task = image_tasks(stream)[0]
    logits = torch.zeros(3, 2)
    other = logits.clone()
    other[1, 1] = -0.0
    found = [
        outputs_digest(model, dataclasses.replace(task, outputs=lambda model, out=out: out), 0)
        for out in (logits, logits.clone(), other)
    ]
    assert found[0] == found[1] != found[2]


# --- other methods, and what tasks are made of ---


@pytest.mark.parametrize("method", ["sequential", "joint", "replay", "graft", "tasl"])
def test_a_plain_classifier_learns_by_other_methods(stream, method):
    """One head for all classes; each task is learned and scored on its own."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    head = model.get_classifier().weight.detach().clone()
    chosen = {"grain": "matrix"} if method == "tasl" else None
    tasks = image_tasks(stream[:2], one_head=True)
    options = dataclasses.replace(OPTIONS, epochs=6)
    result = learn_sequence(model, tasks, method, options, method_options=chosen)
    assert np.isfinite(result.matrix[-1]).all() and result.losses[0][1] < result.losses[0][0]
    after = model.get_classifier().weight.detach()
    if method == "sequential":  # the last two classes are nobody's: only decay moves them, and all by one factor
        factor = (after[5:] / head[5:]).detach()
        assert float(factor.std()) < 1e-4 and not torch.allclose(after[:5], factor.mean() * head[:5], atol=1e-3)
    assert [task.outputs(model).shape[1] for task in tasks] == [2, 3]


def test_validation_uses_no_test_image(stream):
    data = dataclasses.replace(stream[0], x_test=np.full_like(stream[0].x_test, 255))
    (task,) = image_tasks([data], validated=True, seed=3)
    (whole,) = image_tasks([data])
    assert len(task.train) < len(whole.train) == 24 and task.digest == whole.digest
    seen = []
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
    model.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    options = {**dataclasses.asdict(OPTIONS), "score_on": "validation"}
    assert 0 <= learn_sequence(model, [task], "sequential", options).matrix[0, 0] <= 1
    assert all(float(x.std()) > 0.1 for batch in seen for x in batch)  # a test image is all white
    with pytest.raises(ConfigError, match="score_on: task blobs0 has no validation data"):
        learn_sequence(model, [whole], "sequential", options)


def test_augmentation_follows_the_seed_and_leaves_the_labels(stream):
    plain, moved = (image_tasks(stream[:1], change)[0] for change in ({}, {"flip": True, "crop": 2}))
    x, y = plain.collate([3, 4, 5])
    torch.manual_seed(1)
    one, labels = moved.collate([3, 4, 5])
    other, _ = moved.collate([3, 4, 5])
    torch.manual_seed(1)
    again, _ = moved.collate([3, 4, 5])
    assert torch.equal(one, again) and not torch.equal(one, other) and torch.equal(y, labels)
    assert one.shape == x.shape and not torch.equal(one, x)
    assert torch.equal(plain.inputs(2), plain.collate([0, 1])[0]) and torch.equal(moved.inputs(2), moved.inputs(2))


def test_rotations_are_classes_of_their_own_while_learning(stream):
    some = stream[:2]
    torch.manual_seed(0)
    widths = [4 * data.num_classes for data in some]
    model = timm.create_model(DENSE, num_tasks=2, num_classes=widths)
    tasks = image_tasks(some, {"rotate": True})
    x, y = tasks[0].collate([0, 1, 2])
    plain, labels = image_tasks(some)[0].collate([0, 1, 2])
    assert torch.equal(x[:3], plain) and torch.equal(x[3:6], plain.rot90(1, (2, 3)))
    assert y.tolist() == [c + 2 * k for k in range(4) for c in labels.tolist()]
    result = learn_sequence(model, tasks, "hat", OPTIONS.changed({"epochs": 1}))
    assert result.details["exact"] and result.details["bit_equal"]
    options = ImageOptions(rotate=True)
    router = image_router(model, some, options, {"width": 16})
    found = routing_measures(router, model, image_examples(some, 256))
    assert abs(found["task_incremental"] - np.mean([result.matrix[1, t] for t in range(2)])) < 1e-6  # equal counts
    images = torch.from_numpy(some[1].x_test)
    p = hatcl.predict(model, images, router=router)  # the answer is a class of the data, none of a rotation
    assert all(int(c) < some[t].num_classes for t, c in zip(p.task.tolist(), p.label.tolist(), strict=True))
    blind = image_router(model, some, ImageOptions(), {"width": 16})  # the twin: it takes the whole head
    assert blind.seen(model, images, 1)[1].shape[1] == widths[1]
    assert router.seen(model, images, 1)[1].shape[1] == some[1].num_classes


def test_rotations_that_do_not_fit(stream):
    for more, text in (
        (
            {"one_head": True},
            "rotate: got True for a head that all tasks share; it works only for classification tasks with",
        ),
        (
            {},
            "task blobs0: its classes end at 8, but the model's head has 2;.* with rotate four times as many classes",
        ),
    ):
        with pytest.raises(ConfigError, match=text):
            learn_sequence(new_model(stream), image_tasks(stream, {"rotate": True}, **more), "hat", OPTIONS)
    y = {f"y_{part}": getattr(stream[0], f"y_{part}")[:, None] + 0.5 for part in ("train", "test")}
    numbers = dataclasses.replace(stream[0], problem="regression", num_classes=1, **y)
    with pytest.raises(ConfigError, match="rotate: got True for images without exactly one class each"):
        image_tasks([numbers], {"rotate": True})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rotate": 4}, "rotate: got 4, expected True or False"),
        ({"fit": "pads"}, "fit: got 'pads'.*did you mean 'pad'"),
        ({"flip": "no"}, "flip: got 'no', expected True or False"),
        ({"crop": -1}, "crop: got -1, expected an integer of at least 0"),
        ({"size": 2.5}, "size: got 2.5, expected an integer of at least 0"),
        ({"eval_batch_size": 0}, "eval_batch_size: got 0"),
        ({"validation": 1.0}, "validation: got 1.0, expected a share"),
        ({"sise": 3}, "did you mean 'size'"),
    ],
)
def test_options_are_checked(stream, changes, text):
    with pytest.raises(ConfigError, match=text):
        image_tasks(stream, changes)
    assert ImageOptions(**dataclasses.asdict(ImageOptions())) == ImageOptions()


def test_a_head_that_is_too_narrow_and_a_model_without_features(stream):
    tasks = image_tasks(stream, one_head=True)
    with pytest.raises(
        ConfigError, match="task blobs2: its classes end at 7, but the model's head has 5; give a model"
    ):
        learn_sequence(timm.create_model("test_resnet", num_classes=5), tasks, "joint", OPTIONS)
    assert "ilora" in list_continual_methods()
    with pytest.raises(
        SkillError, match="Linear has no forward_features, which returns the hidden states of timm's models"
    ):
        tasks[0].hidden(torch.nn.Linear(2, 2), tasks[0].collate([0]))
