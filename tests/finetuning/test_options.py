"""Options: ranges, steps and rates by hand, what is stored and read back."""

from __future__ import annotations

import json

import pytest
import torch

from hatcl.engine.schedule import Schedule, make_optimizer
from hatcl.errors import ConfigError
from hatcl.finetuning import FinetuneOptions, TaskOptions


def test_the_defaults_are_the_published_ones_but_for_the_rate():
    options = FinetuneOptions()
    assert (options.optimizer, options.rate, options.momentum) == ("sgd", 1e-2, 0.0)
    assert options.fix_embeddings and options.fix_head is None and options.dropout
    assert options.steps(32) == 1000 and options.evaluate_every == 100


@pytest.mark.parametrize(
    "options, rates",
    [
        ({"schedule": "constant"}, [2.0, 2.0, 2.0, 2.0]),
        ({"schedule": "auto"}, [2.0, 2.0, 2.0, 2.0]),
        ({"schedule": "auto", "optimizer": "adamw"}, [2.0, 1.5, 1.0, 0.5]),
        ({"schedule": "linear", "warmup": 0.5}, [1.0, 2.0, 2.0, 1.0]),
        # (1 + cos(pi p)) / 2 for p = 0, 1/4, 1/2, 3/4
        ({"schedule": "cosine"}, [2.0, 1.0 + 2**0.5 / 2, 1.0, 1.0 - 2**0.5 / 2]),
    ],
)
def test_rates_by_hand(options, rates):
    chosen = FinetuneOptions(lr=2.0, **options)
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], chosen)
    schedule = Schedule(optimizer, chosen, [2.0])
    assert [schedule.set(i, 4) for i in range(4)] == pytest.approx(rates, abs=1e-12)


def test_a_rate_that_is_not_given_is_the_optimizers():
    assert FinetuneOptions().changed({"optimizer": "adamw"}).rate == 2e-4
    assert FinetuneOptions(optimizer="lamb", lr=0.1).rate == 0.1
    for name in ("sgd", "adamw"):
        options = FinetuneOptions(optimizer=name)
        made = make_optimizer([torch.nn.Parameter(torch.zeros(1))], options)
        assert made.param_groups[0]["lr"] == options.rate
    known = "optimizer='lamb' has no default rate, unlike sgd and adamw; give one"
    with pytest.raises(ConfigError, match=f"lr: got none, and {known}"):
        FinetuneOptions(optimizer="lamb")


def test_steps():
    assert FinetuneOptions(epochs=3, batch_size=4).steps(10) == 9
    assert FinetuneOptions(max_steps=7).steps(10) == 7


@pytest.mark.parametrize(
    "options, words",
    [
        ({"optimizer": "sgdd"}, "optimizer: got 'sgdd'.*did you mean 'sgd'"),
        ({"schedule": "steps"}, "schedule: got 'steps'.*did you mean 'step'"),
        ({"statistics": "held_"}, "did you mean 'held'"),
        ({"lr": 0.0}, "lr: got 0.0, expected a number above 0"),
        ({"l1": -1.0}, "l1: got -1.0, expected a number of at least 0"),
        ({"clip": float("nan")}, "clip: got nan"),
        ({"warmup": 1.0}, "warmup: got 1.0, expected a share"),
        (
            {"momentum": 0.9, "optimizer": "adamw"},
            "momentum: got 0.9 for adamw, which has none",
        ),
        ({"epochs": 1, "max_steps": 1}, "max_steps=1 and epochs=1: give one of the two"),
        ({"epochs": 0}, "epochs: got 0, expected an integer of at least 1"),
        ({"batch_size": 1.5}, "batch_size: got 1.5"),
        ({"evaluate_every": 0}, "evaluate_every: got 0"),
        (
            {"l1": 0.1, "optimizer": "lion", "lr": 1e-4},
            "l1: got 0.1 with optimizer='lion'; the pull works with adamw and sgd",
        ),
        ({"dropout": "no"}, "dropout: got 'no', expected True or False"),
        ({"fix_head": 1}, "fix_head: got 1, expected True or False"),
        ({"seed": -1}, "seed: got -1, expected an integer of at least 0"),
    ],
)
def test_bad_learning(options, words):
    with pytest.raises(ConfigError, match=words):
        FinetuneOptions(**options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"k": 0}, "k: got 0, expected an integer of at least 1, or None"),
        ({"max_length": 0}, "max_length: got 0, expected an integer of at least 1, or None"),
        ({"measure": "f2"}, "measure: got 'f2', expected one of accuracy"),
        ({"task": "rta"}, "did you mean 'rte'"),
        ({"cut": "tail"}, "cut: got 'tail', expected one of end, head"),
        ({"token": "clss"}, "did you mean 'cls'"),
        ({"head": "zero"}, "head: got 'zero'"),
        ({"fit": "crop"}, "fit: got 'crop'"),
        ({"normalise": "both"}, "normalise: got 'both'"),
        ({"scale": 0.0}, "scale: got 0.0, expected a number above 0"),
        ({"size": -1}, "size: got -1"),
    ],
)
def test_bad_task(options, words):
    with pytest.raises(ConfigError, match=words):
        TaskOptions("prompt", "m", "d.json", **options)


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(ConfigError, match="no option 'max_step'; did you mean 'max_steps'"):
        FinetuneOptions().changed({"max_step": 3})
    assert FinetuneOptions().changed({"l1": 0.5}).l1 == 0.5


def test_a_task_survives_json():
    options = TaskOptions("image", "m", "a/data.npz", words={"0": "bad"}, model_kwargs={"img_size": 32}, k=4)
    assert TaskOptions(**json.loads(json.dumps(options.to_dict()))) == options
    assert options.name == "a"
    assert TaskOptions("prompt", "m", "a/sst-2.json.gz").name == "sst-2"
