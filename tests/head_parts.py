"""Models with more than one head."""

from __future__ import annotations

import torch
from torch import nn


class TwoHeads(nn.Module):
    def __init__(self, boxes=4):
        super().__init__()
        self.body, self.cls, self.box = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, boxes)

    def forward(self, x):
        h = self.body(x).relu()
        return self.cls(h), self.box(h)


class Scored(nn.Module):
    """Two heads; of the first each class has a factor, and another module adds to it."""

    def __init__(self, tied=False):
        super().__init__()
        self.body, self.cls, self.more, self.box = nn.Linear(8, 16), *(nn.Linear(16, n) for n in (3, 3, 4))
        self.factor = nn.Parameter(torch.ones(3))
        if tied:
            self.more.weight = self.cls.weight

    def forward(self, x):
        h = self.body(x).relu()
        return (self.cls(h) + self.more(h.cos())) * self.factor, self.box(h)
