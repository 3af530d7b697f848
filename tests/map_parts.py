"""What tests of the map are put together from: a network around something, and what the map says of a parameter."""

from __future__ import annotations

import torch
from torch import nn


class Between(nn.Module):
    """Two linear layers with something between them that keeps the number of elements."""

    def __init__(self, between, width=12, out=None):
        super().__init__()
        self.first, self.between = nn.Linear(5, width), between
        self.second = nn.Linear(out or width, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(self.between(self.first(x)))))


def units(found, name, owner):
    """The unit numbers that a parameter writes (or reads), None where no factor does."""
    return next((f.units.tolist() for f in found.entries[name].factors if f.owner == owner), None)
