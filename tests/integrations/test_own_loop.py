"""A loop of one's own: the row of docs/stack.md that all hosts are measured by."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from host_parts import STEPS, X, made, said
from torch.nn import functional as tf
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hatcl
from hatcl.functional import same_bits


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)


def train(model, task, optimizer, start=0, accumulate=1, bf16=False, seen=None, before_the_end=None):
    """seen: called after each step. before_the_end: called once all steps are done, inside the block."""
    y = (X[:, task] > 0).long() + (X[:, task + 1] > 0).long()
    with hatcl.learn(model, task, optimizer, STEPS, start=start) as learning:
        model.train()
        for step in range(start, STEPS):
            optimizer.zero_grad()
            for part in range(accumulate):
                rows = (torch.arange(8) + 8 * step + part) % 32
                with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
                    loss = tf.cross_entropy(model(X[rows]), y[rows])
                ((loss + learning.penalty()) / accumulate).backward()
            optimizer.step()
            if seen is not None:
                seen(step)
        if before_the_end is not None:
            before_the_end()


def with_task_0():
    model = copy.deepcopy(made(2))
    train(model, 0, optimizer_of(model))
    return model, said(model, 0)


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"bf16": True}], ids=lambda o: next(iter(o), "default"))
def test_two_tasks(options):
    model, want = with_task_0()
    train(model, 1, optimizer_of(model), **options)
    assert hatcl.tasks(model) == [0, 1] and same_bits(said(model, 0), want) and hatcl.certify(model, X).exact


def test_an_interrupted_task_is_resumed_with_the_same_bits():
    model, _ = with_task_0()
    optimizer, kept = optimizer_of(model), []

    def keep(step):
        if step == 10:  # past 90 %, where the gates are hard
            kept.extend(copy.deepcopy([model.state_dict(), optimizer.state_dict()]))

    train(model, 1, optimizer, seen=keep)
    again = copy.deepcopy(made(2))
    other = optimizer_of(again)
    again.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    train(again, 1, other, start=11)
    assert all(same_bits(said(again, t), said(model, t)) for t in (0, 1))


def test_averaged_weights():
    model, want = with_task_0()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    train(model, 1, optimizer_of(model), seen=lambda step: average.update_parameters(model))
    hatcl.seal(average.module)
    assert all(same_bits(said(m, 0), want) for m in (model, average.module))
    assert hatcl.certify(average.module, X).exact and not same_bits(said(average.module, 1), said(model, 1))


def test_the_best_state_is_put_back_and_sealed():
    model, want = with_task_0()
    best = {}

    def keep(step):
        if step == 10:
            best.update(copy.deepcopy(model.state_dict()))

    train(model, 1, optimizer_of(model), seen=keep, before_the_end=lambda: model.load_state_dict(best))
    assert hatcl.tasks(model) == [0, 1] and same_bits(said(model, 0), want) and hatcl.certify(model, X).exact
    assert all(same_bits(p, best[name]) for name, p in model.named_parameters())


def test_copies_in_threads_are_refused():
    """`nn.DataParallel` asks every module for a copy, on devices that a test may not have."""
    with pytest.raises(hatcl.TaskError, match="torch.nn.DataParallel runs copies .*DistributedDataParallel"):
        [module._replicate_for_data_parallel() for module in made(2).modules()]
