"""A small network, and what it says under a task, for the tests of hosts."""

from __future__ import annotations

import functools

import torch
from border_parts import out
from torch import nn

import hatcl

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
STEPS = 12
said = functools.partial(out, x=X)


@functools.cache
def made(tasks):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.BatchNorm1d(24), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
    return hatcl.convert(net, tasks, X[:2])
