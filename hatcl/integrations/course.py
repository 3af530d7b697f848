"""The `hatcl.learn` block of one task for hosts that own the loop: callbacks enter it, report to it and leave it."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn

from ..errors import TaskError
from ..hat.learn import Learning, learn
from ..hat.tasks import check_task, tasks


class TaskCourse:
    """Base class of the callbacks of all hosts.

    Attributes:
        task: the index of the task. learning: the result of `hatcl.learn`, while the task is learned. penalty: the last
            step's penalty.
    """

    def __init__(self, task: int) -> None:
        self.task = task
        self.learning: Learning | None = None
        self.penalty: Tensor | None = None
        self._block = contextlib.ExitStack()

    def begin(self, model: nn.Module, optimizer: Any, steps: int, start: int) -> None:
        """Enter the block. The last checkpoint of a finished run has nothing left to learn.

        Raises:
            TaskError: the task is sealed and has steps left. Also all errors of `hatcl.learn`.
        """
        if self.task in tasks(model):
            if start < steps:
                check_task(model, self.task, sealed=False)  # raises
            return
        self.learning = self._block.enter_context(learn(model, self.task, optimizer, steps, start=start))

    def add_penalty(self, scaler: Any = None) -> None:
        """Add the gradient of HAT's penalty, once per optimizer step. scaler: fp16's, if gradients are scaled."""
        if self.learning is not None:
            penalty = self.learning.penalty()
            self.penalty = penalty.detach()
            if penalty.requires_grad:
                (penalty if scaler is None else scaler.scale(penalty)).backward()

    def seal(self) -> None:
        """Seal the task, if it is being learned."""
        self.learning = None
        self._block.close()

    def leave(self, error: BaseException | None) -> None:
        """Leave the block: a task that is still being learned is left unsealed, and earlier tasks as they were. error:
        the exception, None if it was caught on the way."""
        self.learning = None
        error = error or TaskError(f"task {self.task} was left before its last step")
        self._block.__exit__(type(error), error, None)

    def check_resumed(self, of: int, remedy: str) -> None:
        """Raise `TaskError` if a resumed checkpoint belongs to another task, whose steps would count as this one's."""
        if of != self.task:
            raise TaskError(f"task: got {self.task}, but the checkpoint to resume from belongs to task {of}; {remedy}")
