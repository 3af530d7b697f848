"""HAT over an adapter: each task learns which LoRA pairs it uses, and what it learned stays bit for bit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import TaskError
from ...files import read_json
from ...hat.adapter import as_adapter
from ...hat.gates import gates_of
from ...hat.learn import Learning, learn
from ...hat.tasks import task
from ...skills.tensors import adapters_of
from ..tasks import ContinualTask
from .registry import Batch, Method, continual_method

DIGESTS = "digests.json"


@continual_method("hat", paper="Serra et al. 2018, arXiv 1801.01423")
class HardAttention(Method):
    """Learn each task inside `hatcl.learn`, with HAT's penalty, on a model that `hatcl.convert` made: of a peft model
    it gates the pairs. Each task is scored with its own gates, so that backward transfer is 0 by construction; a task
    that is not learned yet cannot be scored, and forward transfer is not known.

    Options are those of the model's `HATConfig`.
    """

    ahead = False

    def start(self, model: nn.Module, tasks: Sequence[ContinualTask], seed: int) -> None:
        self.gates = gates_of(model)[0]  # raises where there are none
        sealed = self.gates.sealed.nonzero().flatten().tolist()
        if sealed or self.gates.num_tasks < len(tasks):
            raise TaskError(
                f"hat: the model has room for {self.gates.num_tasks} tasks, of which {sealed or 'none'} are sealed; "
                f"{len(tasks)} are to be learned, from the first on: convert it anew with num_tasks={len(tasks)}"
            )

    def begin(self, model: nn.Module, stage: int) -> None:
        self.stage = stage

    @contextlib.contextmanager
    def watching(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int
    ) -> Iterator[Learning]:
        with learn(model, self.stage, optimizer, steps, start=start) as self.learning:
            yield self.learning

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch.loss(model) + self.learning.penalty()

    def scoring(self, model: nn.Module, index: int) -> contextlib.AbstractContextManager[nn.Module]:
        return task(model, index)

    def saving(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """The adapter that a task leaves behind is an ordinary one, and computes what the task computes."""
        return as_adapter(model, self.stage) if adapters_of(model) else contextlib.nullcontext()

    def state(self) -> dict[str, Any]:
        return {}

    def save(self, folder: Path) -> None:
        (folder / DIGESTS).write_text(json.dumps(self.gates.digests))

    def load(self, folder: Path, model: nn.Module) -> None:
        stored = read_json(folder / DIGESTS)
        self.gates.digests = {int(t): d for t, d in stored.items()}
