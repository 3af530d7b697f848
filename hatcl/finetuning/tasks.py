"""What is fine-tuned: a model that gives logits, examples, and which parameters are embeddings and head."""

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
    """One classification task and the model that it is for.

    Attributes:
        name: what reports call it. mode: which mode made it. labels: class i's label.
        model: the pretrained model; its forward takes a batch's inputs and gives logits `[B, C]`. A transformers model
            keeps its parameters' names, so that task vectors and grafts also fit the model as its maker loads it; a
            new head is called `head`.
        train, validation, test: examples (pairs of a text and a label, or `Images`); validation may be empty.
        collate: examples to a batch: (inputs, labels `[B]`); inputs are a mapping of keyword arguments, or a tensor.
        length: of an example, to batch like with like where order does not matter; None = all alike.
        embeddings, head: names of the parameters that are embeddings (with their norm) and head. Tied parameters have
            one name, the first.
        fresh: those of the head that are new: not the pretrained model's.
        fixed_head: is the head left as it is unless `fix_head` says otherwise?
        tokenizer: of a text model, what a run keeps to read further texts.
        measure: what validation chooses by, one of `MEASURES`. With `pearson` labels are soft, `[B, 2]`: the shares of
            the lowest and of the highest score.

    Raises:
        ConfigError: an unknown measure.
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
        """Are the labels scores, and no classes?"""
        return MEASURES[self.measure].of_scores

    def part(self, name: str) -> Examples:
        """`train`, `validation` or `test`. Raises `ConfigError` on another name."""
        one_of("part", name, PARTS)
        found: Examples = getattr(self, name)
        return found

    def batch(self, part: str | Examples, ids: Sequence[int]) -> LabelledBatch:
        """The examples at these indices."""
        data = self.part(part) if isinstance(part, str) else part
        if isinstance(data, Images):
            return self.collate(data.at(torch.as_tensor(list(ids))))
        return self.collate([data[i] for i in ids])

    def batches(self, part: str | Examples, size: int = 32) -> TaskBatches:
        """All batches of a part, or of further examples, always the same; to be passed over as often as needed.
        Examples of like length share a batch, so that little is spent on padding."""
        return TaskBatches(self, self.part(part) if isinstance(part, str) else part, size)

    @staticmethod
    def logits(model: nn.Module, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        """Logits `[B, C]` and labels `[B]`, on the model's device, as `engine.measures.predictions_of` takes them."""
        found = outputs(model, batch[0])
        return found, batch[1].to(found.device)

    @staticmethod
    def loss(model: nn.Module, batch: LabelledBatch) -> Tensor:
        """The mean cross-entropy of a batch, as `hatcl.learn_graft` takes it."""
        return cross_entropy(model, batch)

    def accuracy(self, model: nn.Module, part: str | Examples = "test", size: int = 64) -> float:
        """Share of examples whose largest logit is at the label, in evaluation mode.

        Raises:
            ConfigError: no examples.
        """
        if self.regression:
            raise ConfigError(f"task {self.name}: a regression has no accuracy; its score() is by {self.measure}")
        return accuracy(model, self.batches(part, size))

    def score(self, model: nn.Module, part: str | Examples = "test", size: int = 64) -> float:
        """What the model is worth by the task's own measure, in evaluation mode, the higher the better.

        Raises:
            ConfigError: no examples.
        """
        if self.measure == "accuracy":
            return self.accuracy(model, part, size)
        return measured_by(self.measure, model, self.batches(part, size))

    def constant_score(self, part: str | Examples = "test", size: int = 64) -> float:
        """The score of always giving the commonest answer."""
        labels = torch.cat([labels for _, labels in self.batches(part, size)])
        return constant_answer(self.measure, labels, len(self.labels))


class TaskBatches:
    """Batches that are made when asked for; texts in the order of their lengths, images in their own."""

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
