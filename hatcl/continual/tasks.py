"""What is learned in sequence: tasks with examples, a loss and a score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError


@dataclass(frozen=True, eq=False)
class ContinualTask:
    """One task of a sequence. All tasks of a sequence share one model.

    Args:
        name: what reports and files call it.
        train: the examples to learn from, of any kind; their order is not used.
        collate: makes a batch of a list of examples.
        loss: the mean loss of a batch under the model, with its graph.
        score: the model's score on the test set, the higher the better (accuracy, joint goal accuracy). It is called
            in evaluation mode and without gradients.
        validate: the same on validation data, for `LearnOptions.score_on="validation"`.
        hidden: hidden states of a batch, for `ilora`: one `hatcl.skills.ilora.Hidden` per stack of layers, or a list of
            tensors for one stack without padding. None = what `model(**batch, output_hidden_states=True)` gives.
        shared: do `collate` and `loss` fit the examples of any other such task too (generation: all is in the texts)?
            Then what a run before remembers can be learned again.
    """

    name: str
    train: Sequence[Any]
    collate: Callable[[list[Any]], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    score: Callable[[nn.Module], float]
    validate: Callable[[nn.Module], float] | None = None
    hidden: Callable[[nn.Module, Any], Sequence[Any]] | None = None
    shared: bool = False


def check_tasks(tasks: Sequence[ContinualTask], *, validated: bool = False) -> None:
    """Raises `ConfigError` where there is no task, a task has no examples (or, with `validated`, no validation data),
    or two have one name."""
    if not tasks:
        raise ConfigError("tasks: got none, expected at least one ContinualTask")
    names = [t.name for t in tasks]
    for i, task in enumerate(tasks):
        if task.name in names[:i]:
            raise ConfigError(f"tasks: two are named {task.name!r}; give each its own name")
        if not len(task.train):
            raise ConfigError(f"task {task.name}: no training examples")
        if validated and task.validate is None:
            raise ConfigError(
                f"score_on: task {task.name} has no validation data; give ContinualTask(validate=...), or texts with a "
                "dev part"
            )
