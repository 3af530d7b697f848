"""Five tasks of two digits for a small MLP: what the benchmarks that compare options of HAT on them share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hatcl
from hatcl.data.images import digits_tasks

Rows = tuple[Tensor, Tensor]


def held_out(seed: int) -> list[tuple[Rows, Rows]]:
    """Of each task the pixels `[B, 64]` and labels that are learned, and a fifth of the training images that is not."""
    tasks = [task.on_validation(0.2, seed) for task in digits_tasks()]
    return [((_pixels(t.x_train), _labels(t.y_train)), (_pixels(t.x_test), _labels(t.y_test))) for t in tasks]


def _pixels(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x).flatten(1).float() / 255


def _labels(y: np.ndarray) -> Tensor:
    return torch.from_numpy(y)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


def learn(model: nn.Module, task: int, rows: Rows, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Learn a task in batches of 32 that are drawn at random."""
    x, y = rows
    with hatcl.learn(model, task, optimizer, steps) as learning:
        for _ in range(steps):
            at = torch.randint(len(x), (32,))
            loss = F.cross_entropy(model(x[at]), y[at]) + learning.penalty()
            optimizer.zero_grad(), loss.backward(), optimizer.step()


def accuracy(model: nn.Module, task: int, rows: Rows) -> float:
    x, y = rows
    with hatcl.task(model.eval(), task), torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())
