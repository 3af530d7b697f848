"""A small model that learns tasks in a plain loop, for the tests of what other people's loops do to it."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn

import hatcl

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)
    )  # fmt: skip


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **{"lr": 0.05, "weight_decay": 0.1, **options})


def loss_of(model, task, learning, x=X):
    return (model(x) - task - 1).pow(2).mean() + learning.penalty()


def train(model, task, optimizer=None, steps=6, step=None):
    """Learn a task with the issue-like loop; `step` is called in place of `optimizer.step`."""
    optimizer = optimizer or adamw(model)
    with hatcl.learn(model, task, optimizer, steps=steps) as learning:
        model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model, task, learning).backward()
            (step or optimizer.step)()
    model.eval()


def out(model, task, x=X):
    training = model.training
    with hatcl.task(model, task), torch.no_grad():
        y = model.eval()(x).clone()
    model.train(training)
    return y


@functools.cache
def _learned():
    model = hatcl.convert(net(), 3, X)
    train(model, 0)
    return model


def learned():
    """A model with task 0 sealed and room for two more, and what task 0 says."""
    model = copy.deepcopy(_learned())
    return model, out(model, 0)


def two_tasks():
    model, first = learned()
    train(model, 1)
    hatcl.set_task(model, None)
    return model, [first, out(model, 1)]
