"""Experience replay: earlier tasks' examples are learned again together with the current ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config import whole
from ...engine.state import kept_whole
from ...errors import SkillError
from ...files import read_torch
from ...skills.reservoir import Reservoir
from ..tasks import ContinualTask
from .registry import Batch, Method, continual_method

MEMORY = "memory.pt"


@continual_method("replay", paper="Chaudhry et al. 2019, arXiv 1902.10486")
class Replay(Method):
    """The loss is the mean over a batch and as many examples of earlier tasks, `(n_b L_b + n_m L_m) / (n_b + n_m)`,
    drawn from a memory that reservoir sampling keeps uniform over all examples of the tasks that are finished.

    The memory holds (task, position) instead of the examples, so that a run can resume from a small file. The paper
    fills it while a task is learned; here a task's examples enter once, when it is finished.
    """

    @dataclass(frozen=True)
    class Options:
        """Args:
        buffer_size: the number of examples kept of all earlier tasks. samples: the number drawn per step; None = the
        batch's size.
        """

        buffer_size: int = 500
        samples: int | None = None

        def __post_init__(self) -> None:
            whole("buffer_size", self.buffer_size)
            whole("samples", self.samples, optional=True)

    def start(self, model: nn.Module, tasks: Sequence[ContinualTask], seed: int) -> None:
        self.tasks = tasks
        self.memory: Reservoir = Reservoir(self.options.buffer_size, seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if not len(self.memory):
            return batch.loss(model)
        drawn = self.memory.sample(self.options.samples or len(batch.positions))
        return mean_loss(model, [batch, *together(self.tasks, drawn)])

    def end(self, model: nn.Module, stage: int) -> None:
        for position in range(len(self.tasks[stage].train)):
            self.memory.add((stage, position))

    def state(self) -> dict[str, Any]:
        return {"memory": self.memory.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.memory.load_state_dict(state["memory"])

    def save(self, folder: Path) -> None:
        torch.save(self.memory.state_dict(), folder / MEMORY)

    def load(self, folder: Path, model: nn.Module) -> None:
        read_memory(self.memory, folder / MEMORY, self.tasks)


def read_memory(memory: Reservoir, path: Path, tasks: Sequence[ContinualTask]) -> None:
    """Read the file of a memory of (task, position) pairs.

    Raises:
        IntegrityError: the file is damaged, or holds something else.
    """
    state = read_torch(path)
    with kept_whole(path):
        for index, position in state["examples"]:
            if not 0 <= int(position) < len(tasks[int(index)].train):
                raise IndexError(f"task {index} has no example {position}")
        try:
            memory.load_state_dict(state)
        except SkillError as error:
            raise ValueError(str(error)) from error


def together(tasks: Sequence[ContinualTask], drawn: Sequence[Any]) -> list[Batch]:
    """(task, position) pairs as one batch per task."""
    found: dict[int, list[int]] = {}
    for index, position in drawn:
        found.setdefault(int(index), []).append(int(position))
    return [Batch(i, tasks[i], tuple(found[i])) for i in sorted(found)]


def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """The mean loss over the examples of all batches."""
    total = torch.stack([b.loss(model) * len(b.positions) for b in batches]).sum()
    return total / sum(len(b.positions) for b in batches)
