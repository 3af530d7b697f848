"""Tasks that are learned in sequence, with examples, a loss and a score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import call, device_of, moved, seeded, values_of
from ..errors import ConfigError
from ..lend import Evaluating

SEEN = 16  # training examples that represent a task without `outputs`


@dataclass(frozen=True, eq=False)
class TextReading:
    """How to read texts whose task is not known yet, and how a task answers them.

    Attributes:
        tokens: from texts to the inputs of the model's forward; the same for all tasks of a sequence.
        labels: the labels of its classes, in the order of `logits`; empty if the task generates its answers.
        logits: `[B, C]`, from the model's inputs and outputs. written: the generated answers to some texts.
    """

    tokens: Callable[[Sequence[str]], Any]
    labels: tuple[str, ...] = ()
    logits: Callable[[Any, Any], Tensor] | None = None
    written: Callable[[nn.Module, Sequence[str]], list[str]] | None = None


@dataclass(frozen=True, eq=False)
class ContinualTask:
    """One task of a sequence. All tasks of a sequence share one model.

    Args:
        name: the name in reports and files.
        train: the examples to learn from, of any kind; their order is not used.
        collate: makes a batch from a list of examples.
        loss: the mean loss of a batch under the model, with its graph.
        score: the model's score on the test set, higher is better (accuracy, joint goal accuracy). It is called
            in evaluation mode and without gradients.
        validate: the same on validation data, for `LearnOptions.score_on="validation"`.
        hidden: hidden states of a batch, for `ilora`: one `hatcl.skills.ilora.Hidden` per stack of layers, or a list of
            tensors for one stack without padding. None = from `model(**batch, output_hidden_states=True)`.
        outputs: the model's outputs for the test set, in its order, on the CPU; `hat` compares them bit for bit between
        sealing and the end of a run. None = its forward's outputs for the first `SEEN` training examples.
        digest: a digest of the task's data, so that a resumed run can check it.
        answers: the right answers of the test set, and validation_answers those of the validation data, if a score can
        be compared with always giving the most common one.
        shared: whether `collate` and `loss` also fit the examples of other such tasks (as in generation, where the
        texts hold everything). If so, examples remembered by an earlier run can be learned again.
        reading: for tasks of texts, how a router reads them (see `text_router`).
        measure: the name of `score` if it is not a share of right answers: r2, pearson, ...
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
        """The inputs of the model's forward for the first training examples. A collate that draws random numbers draws
        the same ones each time."""
        with seeded():
            batch = self.collate([self.train[i] for i in range(min(count, len(self.train)))])
        return batch[0] if isinstance(batch, (tuple, list)) else batch

    def said(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's outputs for the task in evaluation mode, under the current gates: values by their paths."""
        with Evaluating(model), torch.no_grad():
            if self.outputs is not None:
                return {"outputs": self.outputs(model)}
            return values_of(call(model, moved(self.inputs(SEEN), device_of(model))))


def check_tasks(tasks: Sequence[ContinualTask], *, validated: bool = False) -> None:
    """Raise `ConfigError` if there is no task, a task has no examples (or, with `validated`, no validation data), or
    two have the same name."""
    if not tasks:
        raise ConfigError("tasks: got none, expected at least one ContinualTask")
    names = [t.name for t in tasks]
    for i, task in enumerate(tasks):
        if task.name in names[:i]:
            raise ConfigError(f"tasks: two are named {task.name!r}; give each its own name")
        if not len(task.train):
            raise ConfigError(f"task {task.name} has no training examples")
        if validated and task.validate is None:
            raise ConfigError(
                f"score_on: task {task.name} has no validation data; give ContinualTask(validate=...), or texts with a "
                "dev part"
            )
