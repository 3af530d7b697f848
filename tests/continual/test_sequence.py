"""The loop over tasks: every method learns, what it calls and when, and errors before anything is done."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from continual_parts import (  # noqa: E402
    CHANGED,
    METHODS,
    QUICK,
    bert,
    made,
    plain,
    run,
    same,
    state,
    text_tasks,
    vector_task,
)

from hatcl.continual import (  # noqa: E402
    ContinualTask,
    LearnOptions,
    SequenceResult,
    continual_method,
    learn_sequence,
    list_continual_methods,
)
from hatcl.continual.images import ImageLearning  # noqa: E402
from hatcl.continual.methods import Method  # noqa: E402
from hatcl.continual.options import LEAST_STEPS  # noqa: E402
from hatcl.engine.schedule import Schedule, make_optimizer  # noqa: E402
from hatcl.errors import ConfigError, NonFiniteLossError, SkillError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("method", METHODS)
def test_learns_and_measures(method, tmp_path):
    base = bert()
    tasks = text_tasks(base)
    model, result = run(method, tmp_path / "run", model=made(method, base), tasks=tasks, epochs=4)
    rows = result.matrix
    assert rows.shape == (3, 3)
    assert np.isfinite(rows[-1]).all()
    assert len(result.losses) == len(result.seconds) == (1 if method == "joint" else 3)
    if method == "joint":
        assert np.isnan(rows[:-1]).all() and math.isnan(result.backward_transfer)
    else:
        assert np.isfinite(rows[np.tril_indices(3)]).all()  # what was learned
        ahead = list_continual_methods()[method].ahead
        assert np.isfinite([rows[0, 1], rows[1, 2], *result.measures.values()]).all() == ahead  # and the next one
        assert np.isnan(rows[0, 2])
    assert result.losses[0][1] < result.losses[0][0]
    # what is on disk says the same, and the run can be read without the model
    stored = SequenceResult.from_dict(json.loads((tmp_path / "run" / "metrics.json").read_text()))
    assert np.array_equal(stored.matrix, rows, equal_nan=True) and stored.baseline == result.baseline


@pytest.mark.parametrize("method", METHODS)
def test_the_base_stays_and_the_mode_comes_back(method):
    base = bert()
    model, tasks = made(method, copy.deepcopy(base)).eval(), text_tasks(base)
    learns_it = not list_continual_methods()[method].adapted  # its linear layers
    linear = {f"{n}.weight" for n, m in model.named_modules() if learns_it and isinstance(m, torch.nn.Linear)}
    before = {n: t for n, t in state(model).items() if "lora_" not in n and "hat_" not in n and n not in linear}
    random = torch.get_rng_state()
    run(method, model=model, tasks=tasks)
    after = {n: t for n, t in state(model).items() if n in before}
    assert same(before, after)
    assert not model.training
    assert torch.equal(random, torch.get_rng_state())


def test_seeds_differ_and_repeat(tmp_path):
    one, two, other = (state(run("sequential", seed=s)[0]) for s in (0, 0, 1))
    assert same(one, two)
    assert not same(one, other)


def test_a_timm_vit_with_lora(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    x = torch.randn(24, 3, 32, 32)
    y = torch.arange(24) % 2
    x[y == 1, :, :16] += 1.0

    def task(name, flip):
        images = x.flip(-2) if flip else x

        def score(model):
            return float((model(images).argmax(1) == y).float().mean())

        def loss(model, batch):
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        def hidden(model, batch):
            return [model.base_model.model.forward_features(batch[0])]

        def collate(some):
            return torch.stack([images[i] for i in some]), y[some]

        return ContinualTask(name, list(range(24)), collate, loss, score, hidden=hidden)

    for method in ("tasl", "ilora"):
        torch.manual_seed(0)
        base = timm.create_model("test_vit", num_classes=2, img_size=32, depth=1)
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["qkv", "proj"]))
        result = learn_sequence(
            model, [task("a", False), task("b", True)], method, {**QUICK, "epochs": 4},
            method_options=CHANGED.get(method), folder=tmp_path / method,
        )  # fmt: skip
        assert result.losses[0][1] < result.losses[0][0]
        assert (tmp_path / method / "tasks" / "1_b" / "adapter" / "adapter_model.safetensors").exists()


class Spy(Method):
    """Counts what the loop calls."""

    name = "spy"

    def __init__(self):
        super().__init__()
        self.calls, self.rates, self.seen = [], [], []

    def begin(self, model, stage):
        self.calls.append(("begin", stage))

    def watching(self, model, optimizer, steps, start):
        self.optimizer = optimizer
        return super().watching(model, optimizer, steps, start)

    def loss(self, model, batch):
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.seen.append((batch.index, batch.positions))
        self.calls.append(("loss", batch.index, model.training))
        return batch.loss(model)

    def after_step(self, model, batches):
        self.calls.append(("after", batches[0].index))

    def end(self, model, stage):
        self.calls.append(("end", stage))


def test_the_loop_calls_a_method_in_order_and_shows_each_example_once_per_epoch():
    spy = Spy()
    tasks = [vector_task(f"v{i}", i, count=10) for i in range(2)]
    options = LearnOptions(epochs=2, batch_size=4, lr=0.5, warmup=0.5, schedule="constant", clip=0.0)
    learn_sequence(plain(), tasks, spy, options)
    steps = [("loss", 0, True), ("after", 0)] * 6
    assert spy.calls[: 2 + len(steps)] == [("begin", 0), *steps, ("end", 0)]
    epoch = [p for i, some in spy.seen[:3] for p in some]
    assert sorted(epoch) == list(range(10)) and [len(some) for _, some in spy.seen[:3]] == [4, 3, 3]
    again = [p for i, some in spy.seen[3:6] for p in some]
    assert sorted(again) == list(range(10)) and again != epoch
    assert spy.rates[:6] == pytest.approx([0.5 / 3, 1.0 / 3, 0.5, 0.5, 0.5, 0.5])


def test_joint_mixes_all_tasks():
    spy = Spy()
    spy.stages = lambda count: [list(range(count))]
    tasks = [vector_task(f"v{i}", i, count=16) for i in range(3)]
    learn_sequence(plain(), tasks, spy, {"epochs": 1, "batch_size": 4})
    indices = [i for i, _ in spy.seen]
    assert sorted(indices) == [0] * 4 + [1] * 4 + [2] * 4 and indices != sorted(indices)


def test_the_learning_rate_falls_by_a_cosine():
    options = LearnOptions(lr=2.0, warmup=0.25)
    schedule = Schedule(make_optimizer([nn.Parameter(torch.zeros(1))], options), options, [2.0])
    assert [schedule.set(s, 8) for s in range(8)] == pytest.approx(
        [1.0, 2.0, *[1 + math.cos(math.pi * k / 6) for k in range(6)]]
    )


def test_errors_before_anything_is_written(tmp_path):
    folder = tmp_path / "run"
    model, tasks = plain(), [vector_task("a", 0), vector_task("b", 1)]
    cases = [
        (ConfigError, "expected at least one", {"tasks": []}),
        (ConfigError, "two are named 'a'", {"tasks": [tasks[0], tasks[0]]}),
        (ConfigError, "task a has no training examples", {"tasks": [vector_task("a", 0, count=0)]}),
        (ConfigError, "did you mean 'sequential'", {"method": "sequentual"}),
        (ConfigError, "did you mean 'epochs'", {"options": {"epoch": 1}}),
        (ConfigError, "did you mean 'buffer_size'", {"method": "replay", "method_options": {"buffer": 3}}),
        (ConfigError, "buffer_size: got 0", {"method": "replay", "method_options": {"buffer_size": 0}}),
        (ConfigError, "leave them out", {"method": Spy(), "method_options": {"a": 1}}),
        (ConfigError, "seed: got -1", {"options": {"seed": -1}}),
        (ConfigError, "score_on: task a has no validation data", {"options": {"score_on": "validation"}}),
        (SkillError, "Sequential is not a peft model", {"method": "olora"}),
        (SkillError, "is not a peft model", {"method": "ilora"}),
        (ConfigError, "orthogonality: got -1", {"method": "tasl", "method_options": {"orthogonality": -1}}),
        (ConfigError, "mode: got 'case'", {"method": "tasl", "method_options": {"consolidate": {"mode": "case"}}}),
        (ConfigError, "l2: got nan", {"method": "olora", "method_options": {"l2": math.nan}}),
        (ConfigError, "samples: got 0", {"method": "ilora", "method_options": {"samples": 0}}),
        (ConfigError, "replay: got 1.0 with on='batch'", {"method": "ilora", "method_options": {"on": "batch"}}),
        (ConfigError, "scored: got 'stabel'", {"method": "ilora", "method_options": {"scored": "stabel"}}),
    ]
    for kind, message, changes in cases:
        given = {"tasks": tasks, "method": "sequential", "options": QUICK, **changes}
        with pytest.raises(kind, match=message):
            learn_sequence(
                model, given["tasks"], given["method"], given["options"],
                method_options=given.get("method_options"), folder=folder,
            )  # fmt: skip
        assert not folder.exists(), message
    for name, value in [("epochs", 0), ("lr", 0.0), ("weight_decay", -1), ("warmup", 1.0), ("schedule", "cos")]:
        with pytest.raises(ConfigError, match=name):
            LearnOptions(**{name: value})
    with pytest.raises(ConfigError, match="evaluate"):
        LearnOptions(evaluate="none")
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(SkillError, match="no parameter requires a gradient"):
        learn_sequence(model, tasks, "sequential", QUICK, folder=folder)
    assert not folder.exists()


def test_scores_may_be_of_validation_examples():
    """So that test examples choose nothing."""

    def task(name, seed):
        inner = vector_task(name, seed)
        return dataclasses.replace(inner, score=lambda model: pytest.fail("a test score"), validate=lambda model: 0.25)

    result = learn_sequence(plain(), [task("a", 0), task("b", 1)], "sequential", {**QUICK, "score_on": "validation"})
    assert np.nanmin(result.matrix) == np.nanmax(result.matrix) == 0.25 and result.baseline == [0.25, 0.25]


def test_options_of_another_method():
    with pytest.raises(ConfigError, match="expected"):
        list_continual_methods()["replay"](LearnOptions())


def test_a_loss_that_is_not_finite_keeps_the_tasks_before(tmp_path):
    good, bad = vector_task("good", 0), vector_task("bad", 1)
    bad.train[3] = (bad.train[3][0] * math.nan, 0)
    with pytest.raises(
        NonFiniteLossError,
        match="task bad: epoch 1, step .: the loss is nan. A run's folder holds.*Lower",
    ):
        learn_sequence(plain(), [good, bad], "sequential", QUICK, folder=tmp_path)
    assert sorted(p.name for p in (tmp_path / "tasks").iterdir()) == ["0_good"]
    assert json.loads((tmp_path / "checkpoint" / "progress.json").read_text())["stages"] == 1


def test_a_name_that_is_taken():
    with pytest.raises(ConfigError, match="'tasl' is taken by TaSL"):
        continual_method("tasl", paper="")(Spy)
    with pytest.raises(ConfigError, match="dict is no method; derive it from hatcl.continual.Method"):
        continual_method("none", paper="")(dict)


@pytest.mark.parametrize("kind, passes", [(LearnOptions, 1), (ImageLearning, 12)])
def test_few_examples_are_passed_over_until_something_can_be_learned(kind, passes):
    """100 steps at least, in whole passes; as many passes as were asked for where they were."""
    for batches in (1, 3, 13, 99, 100, 101, 5000):
        steps = kind().steps_of(batches)
        assert steps >= LEAST_STEPS and steps % batches == 0 and steps >= passes * batches
        assert steps < LEAST_STEPS + batches or steps == passes * batches
        assert kind(epochs=2).steps_of(batches) == 2 * batches and kind(max_steps=7).steps_of(batches) == 7
    assert kind(accumulate=4).steps_of(13) == 100 and kind(accumulate=4).steps_of(4000) == passes * 1000
