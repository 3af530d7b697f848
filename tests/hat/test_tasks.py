"""The task that a model computes with: the default, and blocks."""

from __future__ import annotations

import threading

import border_parts as border
import parts
import pytest
from border_parts import two_tasks

import hatcl
from hatcl.hat.gates import gates_of


def test_the_default_does_not_change_under_a_block_or_a_learning_thread():
    model, _ = two_tasks()
    with hatcl.task(model, 0), pytest.raises(hatcl.TaskError, match="inside a `with hatcl.task.*leave the block first"):
        hatcl.set_task(model, 1)
    with hatcl.task(model, 0), pytest.raises(hatcl.TaskError, match="learn: task 2 cannot be learned inside"):
        with hatcl.learn(model, 2, border.adamw(model), steps=1):
            pass
    with hatcl.task(model, 1), pytest.raises(hatcl.TaskError, match="task 1 is active in a `with hatcl.task"):
        hatcl.forget_task(model, 1)
    said = []

    def other():
        try:
            hatcl.set_task(model, 0)
        except hatcl.TaskError as error:
            said.append(str(error))

    optimizer = border.adamw(model)
    with hatcl.learn(model, 2, optimizer, steps=1) as learning:
        border.loss_of(model, 2, learning).backward()
        optimizer.step()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another thread is learning task 2" in said[0]


def test_the_active_task_comes_back():
    model = parts.pretend(parts.converted("mlp"))
    hatcl.set_task(model, 1)
    with hatcl.task(model, 2) as inside:
        assert inside is model and gates_of(model)[0].task == 2
        with hatcl.task(model, None):
            assert gates_of(model)[0].task is None
        assert gates_of(model)[0].task == 2
    assert gates_of(model)[0].task == 1
    with pytest.raises(ZeroDivisionError), hatcl.task(model, 0):
        raise ZeroDivisionError
    assert gates_of(model)[0].task == 1
