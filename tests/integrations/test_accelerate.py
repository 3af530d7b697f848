"""accelerate needs nothing of hatcl's own: `hatcl.learn` takes what `prepare` gives."""

from __future__ import annotations

import copy

import pytest
import torch
from host_parts import STEPS, X, made, said
from torch.nn import functional as tf
from torch.utils.data import DataLoader, TensorDataset

import hatcl
from hatcl.functional import same_bits

pytest.importorskip("accelerate")

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402


@pytest.fixture(autouse=True)
def new_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(accelerator, model, optimizer, loader, task, done=0, until=STEPS):
    """Learn from step `done` on; where `until` comes before the end, the state is kept and the block is left."""
    step, parts = done, accelerator.gradient_accumulation_steps
    with hatcl.learn(model, task, optimizer, STEPS, start=done) as learning:
        model.train()
        while step < until:
            torch.manual_seed(step)  # the batch depends on the step alone
            for _ in range(parts):
                x, y = next(iter(loader))
                with accelerator.accumulate(model), accelerator.autocast():
                    accelerator.backward(tf.cross_entropy(model(x), y) + learning.penalty())
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
            step += 1
        if until < STEPS:
            accelerator.save_state(str(train.folder))
            raise KeyboardInterrupt


def prepared(task, **options):
    accelerator = Accelerator(cpu=True, **options)
    model = copy.deepcopy(made(3))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    y = (X[:, task] > 0).long() + (X[:, task + 1] > 0).long()
    loader = DataLoader(TensorDataset(X, y), 8, shuffle=True)
    return accelerator, *accelerator.prepare(model, optimizer, loader)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}], ids=str)
def test_two_tasks(options):
    accelerator, model, optimizer, loader = prepared(0, **options)
    train(accelerator, model, optimizer, loader, 0)
    want = said(model, 0)
    train(accelerator, model, optimizer, loader, 1)
    assert hatcl.tasks(model) == [0, 1] and same_bits(said(model, 0), want)
    assert hatcl.certify(accelerator.unwrap_model(model), X).exact


def test_a_state_that_was_saved_is_resumed(tmp_path):
    accelerator, model, optimizer, loader = prepared(0)
    train(accelerator, model, optimizer, loader, 0)
    train.folder = tmp_path
    with pytest.raises(KeyboardInterrupt):
        train(accelerator, model, optimizer, loader, 1, until=7)
    train(accelerator, model, optimizer, loader, 1, done=7)
    whole = [said(model, t) for t in (0, 1)]
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, model, optimizer, loader = prepared(0)
    accelerator.load_state(str(tmp_path))
    assert hatcl.tasks(model) == [0]
    train(accelerator, model, optimizer, loader, 1, done=7)
    assert all(same_bits(said(model, t), whole[t]) for t in (0, 1))
