"""What is learned in sequence: tasks with examples, a loss and a score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import call, device_of, moved, seeded, values_of
from ..errors import ConfigError
from ..lend import Evaluating

SEEN = 16  # training examples that stand for a task which does not say what its outputs are


@dataclass(frozen=True, eq=False)
class TextReading:
    """How texts are read whose task is not known yet, and what a task says to them.

    Attributes:
        tokens: what the model's forward takes for some texts; the same for all tasks of a sequence.
        labels: of its classes, in the order of `logits`; empty where the task writes its answers.
        logits: `[B, C]` of what the model was given and what it gave. written: the answers to some texts.
    """

    tokens: Callable[[Sequence[str]], Any]
    labels: tuple[str, ...] = ()
    logits: Callable[[Any, Any], Tensor] | None = None
    written: Callable[[nn.Module, Sequence[str]], list[str]] | None = None


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
        outputs: what the model says to the test set, in its order, on the CPU: what `hat` compares bit for bit between
            sealing and the end of a run. None = what its forward gives for the first `SEEN` training examples.
        digest: of the task's data, so that a run that is resumed knows them again.
        answers: the right answers of the test set, and validation_answers those of the validation data, where always
            giving the commonest of them is something to compare a score with.
        shared: do `collate` and `loss` fit the examples of any other such task too (generation: all is in the texts)?
            Then what a run before remembers can be learned again.
        reading: of tasks of texts, how a router reads them (see `text_router`).
        measure: what `score` is called, where it is no share of right answers: r2, pearson, ...
    """

    name: str
    train: Sequence[Any]
    collate: Callable[[list[Any]], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    score: Callable[[nn.Module], float]
    validate: Callable[[nn.Module], float] | None = None
    hidden: Callable[[nn.Module, Any], Sequence[Any]] | None = None
    outputs: Callable[[nn.Module], Tensor] | None = None
    digest: str = ""
    shared: bool = False
    answers: Sequence[Any] = ()
    validation_answers: Sequence[Any] = ()
    reading: TextReading | None = None
    measure: str = ""

    def inputs(self, count: int = 2) -> Any:
        """What the model's forward takes for the first training examples. A collate that draws random numbers draws the
        same ones each time."""
        with seeded():
            batch = self.collate([self.train[i] for i in range(min(count, len(self.train)))])
        return batch[0] if isinstance(batch, (tuple, list)) else batch

    def said(self, model: nn.Module) -> dict[str, Tensor]:
        """What the model says to the task, as it is set, in evaluation mode: values by their paths."""
        with Evaluating(model), torch.no_grad():
            if self.outputs is not None:
                return {"outputs": self.outputs(model)}
            return values_of(call(model, moved(self.inputs(SEEN), device_of(model))))


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
