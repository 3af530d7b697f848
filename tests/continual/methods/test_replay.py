"""Replay in the loop: what is drawn, how it is weighed, what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hatcl.continual import Batch, ContinualTask, make_method

pytestmark = pytest.mark.filterwarnings("ignore")


def task(name: str, value: float) -> ContinualTask:
    """The loss of a batch is the mean of its examples; they are all alike."""
    return ContinualTask(name, [value] * 10, torch.tensor, lambda model, batch: batch.mean(), lambda model: 0.0)


def test_the_loss_is_the_mean_over_the_batch_and_the_examples_of_earlier_tasks():
    tasks = [task("a", 1.0), task("b", 10.0), task("c", 100.0)]
    replay = make_method("replay", {"buffer_size": 20, "samples": 4})
    replay.start(nn.Identity(), tasks, 0)
    batch = Batch(0, tasks[0], (0, 1))
    assert float(replay.loss(nn.Identity(), batch)) == 1.0  # the memory is empty
    replay.end(nn.Identity(), 0)
    replay.end(nn.Identity(), 1)
    assert len(replay.memory) == 20
    batch = Batch(2, tasks[2], (0, 1))
    losses = {round(6 * float(replay.loss(nn.Identity(), batch)), 3) for _ in range(60)}  # float32: 1e-5
    # k of the four drawn are of the first task: (2 * 100 + k * 1 + (4 - k) * 10) / 6
    assert losses == {200.0 + k + (4 - k) * 10 for k in range(5)}


def test_as_many_as_the_batch_has_by_default():
    tasks = [task("a", 1.0), task("b", 10.0)]
    replay = make_method("replay")
    replay.start(nn.Identity(), tasks, 0)
    replay.end(nn.Identity(), 0)
    assert float(replay.loss(nn.Identity(), Batch(1, tasks[1], (0, 1, 2)))) == 5.5


def test_examples_enter_when_a_task_is_finished_each_once():
    tasks = [task("a", 1.0), task("b", 10.0)]
    replay = make_method("replay")
    replay.start(nn.Identity(), tasks, 0)
    replay.end(nn.Identity(), 0)
    assert sorted(replay.memory.examples) == [(0, i) for i in range(10)]
