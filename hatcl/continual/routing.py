"""Routers for tasks of images and of texts that were learned in sequence, and their measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calls import moved, tensor_of
from ..data.images import ImageData, Images, Preparation
from ..data.pairs import Chat, Pair
from ..data.texts import TextData
from ..engine.problems import CLASSES
from ..errors import ConfigError
from ..functional import content_digest
from ..hat.features import middle_block
from ..hat.routing.predict import answer_of
from ..hat.routing.router import RouterOptions, TaskRouter
from ..hat.tasks import tasks
from .images import ImageOptions
from .tasks import ContinualTask, TextReading

SHARES = (
    "task_accuracy", "at_first_sight", "rejected", "task_incremental", "class_incremental", "largest_logit",
)  # fmt: skip
TEXTS = 32  # texts per forward
PROBES = (
    "The quick brown fox jumps over the lazy dog; is 9 > 8.0 - 7 and 65 % of 4,321 near 2,800?",
    "Zwölf Boxkämpfer: déjà vu! «Съешь ещё» 我能吞下玻璃 \n\t@user #tag http://a.b/c?d=e&f",
)  # tokenizers differ in the tokens of these


@dataclasses.dataclass(frozen=True)
class EachPrepared:
    """Prepares images for each task's network. Each task was learned with the mean and deviation of its own images, so
    an image whose task is unknown is prepared for the task being tried.

    Attributes:
        each: the preparation of each task.
    """

    each: Sequence[Preparation]

    @classmethod
    def of(cls, stream: Sequence[ImageData], options: ImageOptions) -> EachPrepared:
        """The same preparation as that of `image_tasks` for this data."""
        return cls([Preparation.of(data, size=options.size or None, fit=options.fit) for data in stream])

    @classmethod
    def from_dict(cls, each: Sequence[Mapping[str, Any]]) -> EachPrepared:
        """Read the result of `to_dict`, also after a JSON round trip."""
        return cls([Preparation(**{**p, "mean": tuple(p["mean"]), "std": tuple(p["std"])}) for p in each])

    def to_dict(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(p) for p in self.each]

    def __call__(self, task: int, images: Tensor) -> Tensor:
        """Prepare images `[B, H, W]` or `[B, H, W, C]`, given as they are stored, for a task's network."""
        return self.each[task](images.numpy())


@dataclasses.dataclass(frozen=True)
class OwnClasses:
    """The logits of a task's classes, for heads that have more (see `ImageOptions.rotate`).

    Attributes:
        counts: the number of classes of each task.
    """

    counts: Sequence[int]

    def __call__(self, task: int, images: Any, out: Any) -> Tensor:
        return tensor_of(out)[:, : self.counts[task]]


def check_routable(stream: Sequence[ImageData]) -> None:
    """Raise `ConfigError` if a task is not a classification: a router needs the answers of its classes."""
    other = next((data for data in stream if data.problem != CLASSES), None)
    if other is not None:
        raise ConfigError(
            f"router: task {other.name!r} is a {other.problem}, but a router needs tasks with one class per "
            "example; learn without --router, and choose the task of an input with hatcl.task(model, t)"
        )


def image_router(
    model: nn.Module,
    stream: Sequence[ImageData],
    options: ImageOptions,
    router: RouterOptions | Mapping[str, Any] | None = None,
) -> TaskRouter:
    """A router made from the training images of each sealed task.

    Args:
        stream: the data of the tasks, in order; if images were held out for validation, the remaining data.

    Raises:
        ConfigError: a task is not a classification.
    """
    check_routable(stream)
    own = OwnClasses([data.num_classes for data in stream]) if options.rotate else None
    made = TaskRouter(model, RouterOptions().changed(router), prepare=EachPrepared.of(stream, options), logits=own)
    for t in [t for t in tasks(model) if t < len(stream)]:
        data = stream[t]
        made.add_task(t, _unprepared(data.x_train, data.y_train).batches(options.eval_batch_size))
    return made


def image_examples(stream: Sequence[ImageData], size: int) -> dict[int, Iterable[Any]]:
    """The test images of each task, as stored, in batches of (images, labels)."""
    return {t: _unprepared(data.x_test, data.y_test).batches(size) for t, data in enumerate(stream)}


def _unprepared(x: Any, y: np.ndarray) -> Images:
    return Images(x, y.astype(np.int64), lambda images: torch.from_numpy(np.ascontiguousarray(images)))


@dataclasses.dataclass(frozen=True)
class TextLogits:
    """The logits of each task's classes, computed from the output of a model without a head; one column of zeros for a
    task that generates its answers.

    Attributes:
        each: each task's reading of texts.
    """

    each: Sequence[TextReading]

    def __call__(self, task: int, tokens: Any, out: Any) -> Tensor:
        own = self.each[task].logits
        return torch.zeros(len(tokens["input_ids"]), 1) if own is None else own(moved(tokens, _device_of(out)), out)


def _device_of(out: Any) -> torch.device:
    found: torch.device = out.last_hidden_state.device
    return found


def readings(sequence: Sequence[ContinualTask]) -> list[TextReading]:
    """The readings of texts of a sequence's tasks.

    Raises:
        ConfigError: a task has no reading.
    """
    for of in sequence:
        if of.reading is None:
            raise ConfigError(
                f"task {of.name} is not made of texts, or was made by hand; give ContinualTask(reading=...)"
            )
    return [of.reading for of in sequence if of.reading is not None]


def tokens_digest(each: Sequence[TextReading], chat: bool = False) -> str:
    """A digest of the tokens of some texts and of the labels; it depends on tokenizer, prompts and lengths."""
    read: dict[str, Tensor] = {}
    for i, how in enumerate(each):
        some: list[str] = [Chat([("user", x)]) if chat else x for x in (*PROBES, *how.labels)]
        read |= {f"{i} {name}": x for name, x in how.tokens(some).items() if isinstance(x, Tensor)}
    return content_digest(read)


def text_router(
    model: nn.Module,
    sequence: Sequence[ContinualTask],
    data: Sequence[TextData],
    options: RouterOptions | Mapping[str, Any] | None = None,
) -> TaskRouter:
    """A router made from the training texts of each sealed task. Its feature is the mean over tokens of the middle
    block's input: gates over adapters leave it nearly the same for all tasks, so one forward finds the task
    (`hatcl.predict(top=1)`).

    Args:
        data: the training data of each task, in order.

    Raises:
        ConfigError: a task has no reading of texts. HATError: the model has no stack of blocks.
    """
    each = readings(sequence)
    made = TaskRouter(model, RouterOptions().changed(options), middle_block(model), logits=TextLogits(each))
    for t in [t for t in tasks(model) if t < len(data)]:
        made.add_task(t, _read_texts(each[t], data[t].train))
    return made


def text_examples(sequence: Sequence[ContinualTask], data: Sequence[TextData]) -> dict[int, Iterable[Any]]:
    """The test texts of each task in batches of (tokens, labels)."""
    return {t: _read_texts(read, data[t].test) for t, read in enumerate(readings(sequence))}


def _read_texts(how: TextReading, pairs: Sequence[Pair]) -> Iterator[tuple[Any, Tensor]]:
    place = {y: i for i, y in enumerate(how.labels)}
    for i in range(0, len(pairs), TEXTS):
        some = pairs[i : i + TEXTS]
        yield how.tokens([x for x, _ in some]), torch.tensor([place.get(y, 0) for _, y in some])


def routing_measures(router: TaskRouter, model: nn.Module, examples: Mapping[int, Iterable[Any]]) -> dict[str, Any]:
    """Measure how often a router finds the right task and class.

    Args:
        examples: for each task, batches of (inputs, labels).

    Returns:
        confusion: `[T, T]`, the number of inputs of the row's task that were assigned to the column's.
        task_accuracy: share of the inputs whose task is found; at_first_sight: the same with only one forward, as in
            `hatcl.predict(top=1)`. rejected: share of the inputs that are rejected. If every task has classes, also
            task_incremental: accuracy with the task given; class_incremental: share of the inputs whose task and class
            are both found; largest_logit: task_accuracy when choosing the task with the largest logit.
    """
    count = len(examples)
    confusion = np.zeros((count, count), dtype=np.int64)
    told: list[Tensor] = []
    order = torch.tensor(router.tasks)
    router.check(model, router.tasks)
    for t in router.tasks:
        for x, y in examples[t]:
            seen = {other: router.seen(model, x, other) for other in router.tasks}
            said = {other: z.float().cpu() for other, (_, z) in seen.items()}
            found = answer_of(router, seen, torch.device("cpu"))
            task, label = found.task, found.label
            confusion[t] += np.bincount(task.numpy(), minlength=count)
            first = order[router.at_first_sight(seen[router.tasks[0]][0]).argmax(1)]
            largest = order[torch.stack([z.max(1).values for z in said.values()]).argmax(0)]
            rows = [task == t, first == t, found.rejected]
            if all(z.shape[1] > 1 for z in said.values()):
                rows += [said[t].argmax(1) == y, (task == t) & (label == y), largest == t]
            told.append(torch.stack(rows))
    shares = torch.cat(told, 1).double().mean(1).tolist()
    return {**dict(zip(SHARES, shares, strict=False)), "confusion": confusion.tolist()}
