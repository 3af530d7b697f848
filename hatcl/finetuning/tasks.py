"""Tasks of fine-tuning: a model that returns logits, examples, and the names of embeddings and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import cross_entropy, outputs
from ..config import one_of
from ..data.images import Images
from ..engine.measures import accuracy
from ..errors import ConfigError
from .measuring import MEASURES, constant_answer, measured_by

PARTS = ("train", "validation", "test")
LabelledBatch = tuple[Any, Tensor]
Examples = Sequence[Any] | Images


@dataclass(frozen=True, eq=False)
class FinetuneTask:
    """One classification task and its model.

    Attributes:
        name: the name in reports. mode: the mode that made it. labels: the label of each class.
        model: the pretrained model; its forward takes a batch's inputs and returns logits `[B, C]`. A transformers
        model keeps its parameters' names, so that task vectors and grafts also fit the model as transformers loads it;
        a new head is called `head`.
        train, validation, test: examples (pairs of a text and a label, or `Images`); validation may be empty.
        collate: examples to a batch: (inputs, labels `[B]`); inputs are a mapping of keyword arguments, or a tensor.
        length: the length of an example, to batch similar ones together where order does not matter; None = all are
        alike.
        embeddings, head: names of the parameters that are embeddings (with their norm) and head. Tied parameters have
            one name, the first.
        fresh: the head's parameters that are new, not from the pretrained model.
        fixed_head: whether the head stays as it is if `fix_head` is not given.
        tokenizer: for a text model; a run keeps it to read further texts.
        measure: the measure for validation, one of `MEASURES`. With `pearson` labels are soft, `[B, 2]`: the shares of
            the lowest and the highest score.

    Raises:
        ConfigError: the measure is unknown.
    """

    name: str
    mode: str
    labels: tuple[str, ...]
    model: nn.Module
    train: Examples
    validation: Examples
    test: Examples
    collate: Callable[[Any], LabelledBatch]
    length: Callable[[Any], int] | None = None
    embeddings: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    fixed_head: bool = True
    tokenizer: Any = None
    measure: str = "accuracy"

    def __post_init__(self) -> None:
        one_of("measure", self.measure, list(MEASURES))

    @property
    def regression(self) -> bool:
        """Whether the labels are scores instead of classes."""
        return MEASURES[self.measure].of_scores

    def part(self, name: str) -> Examples:
        """The part `train`, `validation` or `test`. Raises `ConfigError` for another name."""
        one_of("part", name, PARTS)
        found: Examples = getattr(self, name)
        return found

    def batch(self, part: str | Examples, ids: Sequence[int]) -> LabelledBatch:
        """The batch of the examples at these indices."""
        data = self.part(part) if isinstance(part, str) else part
        if isinstance(data, Images):
            return self.collate(data.at(torch.as_tensor(list(ids))))
        return self.collate([data[i] for i in ids])

    def batches(self, part: str | Examples, size: int = 32) -> TaskBatches:
        """All batches of a part, or of further examples, always the same; they can be iterated repeatedly. Examples of
        similar length share a batch to save padding."""
        return TaskBatches(self, self.part(part) if isinstance(part, str) else part, size)

    @staticmethod
    def logits(model: nn.Module, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        """Logits `[B, C]` and labels `[B]`, on the model's device, for `engine.measures.predictions_of`."""
        found = outputs(model, batch[0])
        return found, batch[1].to(found.device)

    @staticmethod
    def loss(model: nn.Module, batch: LabelledBatch) -> Tensor:
        """The mean cross-entropy of a batch, for `hatcl.learn_graft`."""
        return cross_entropy(model, batch)

    def accuracy(self, model: nn.Module, part: str | Examples = "test", size: int = 64) -> float:
        """The share of examples whose largest logit is at the label, in evaluation mode.

        Raises:
            ConfigError: there are no examples.
        """
        if self.regression:
            raise ConfigError(f"task {self.name}: a regression has no accuracy; its score() is by {self.measure}")
        return accuracy(model, self.batches(part, size))

    def score(self, model: nn.Module, part: str | Examples = "test", size: int = 64) -> float:
        """The model's score by the task's measure, in evaluation mode; higher is better.

        Raises:
            ConfigError: there are no examples.
        """
        if self.measure == "accuracy":
            return self.accuracy(model, part, size)
        return measured_by(self.measure, model, self.batches(part, size))

    def constant_score(self, part: str | Examples = "test", size: int = 64) -> float:
        """The score of always giving the most common answer."""
        labels = torch.cat([labels for _, labels in self.batches(part, size)])
        return constant_answer(self.measure, labels, len(self.labels))


class TaskBatches:
    """Batches made on demand; texts are ordered by length, images keep their order."""

    def __init__(self, task: FinetuneTask, data: Examples, size: int) -> None:
        self.task, self.data = task, data
        order = list(range(len(data)))
        if task.length is not None:
            order.sort(key=lambda i: task.length(data[i]))  # type: ignore[misc]
        self.rows = [order[k : k + size] for k in range(0, len(order), size)]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[LabelledBatch]:
        for ids in self.rows:
            yield self.task.batch(self.data, ids)
