"""Routers for tasks of images and of texts that were learned in sequence, and how well they tell them apart."""

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
TEXTS = 32  # that are read in one forward
PROBES = (
    "The quick brown fox jumps over the lazy dog; is 9 > 8.0 - 7 and 65 % of 4,321 near 2,800?",
    "Zwölf Boxkämpfer: déjà vu! «Съешь ещё» 我能吞下玻璃 \n\t@user #tag http://a.b/c?d=e&f",
)  # whose tokens tell tokenizers apart


@dataclasses.dataclass(frozen=True)
class EachPrepared:
    """Images as each task's network takes them. Each task was learned with the mean and spread of its own images, so an
    image whose task is unknown is prepared for the task that is asked about.

    Attributes:
        each: the preparation of each task.
    """

    each: Sequence[Preparation]

    @classmethod
    def of(cls, stream: Sequence[ImageData], options: ImageOptions) -> EachPrepared:
        """As `image_tasks` prepares the same data."""
        return cls([Preparation.of(data, size=options.size or None, fit=options.fit) for data in stream])

    @classmethod
    def from_dict(cls, each: Sequence[Mapping[str, Any]]) -> EachPrepared:
        """What `to_dict` gave, also after JSON."""
        return cls([Preparation(**{**p, "mean": tuple(p["mean"]), "std": tuple(p["std"])}) for p in each])

    def to_dict(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(p) for p in self.each]

    def __call__(self, task: int, images: Tensor) -> Tensor:
        """Images `[B, H, W]` or `[B, H, W, C]` as they are stored, for a task's network."""
        return self.each[task](images.numpy())


@dataclasses.dataclass(frozen=True)
class OwnClasses:
    """The logits of a task's classes, of heads that have more (see `ImageOptions.rotate`).

    Attributes:
        counts: how many classes each task has.
    """

    counts: Sequence[int]

    def __call__(self, task: int, images: Any, out: Any) -> Tensor:
        return tensor_of(out)[:, : self.counts[task]]


def check_routable(stream: Sequence[ImageData]) -> None:
    """Raises `ConfigError` where a task is no classification: a router tells tasks apart by what their classes say."""
    other = next((data for data in stream if data.problem != CLASSES), None)
    if other is not None:
        raise ConfigError(
            f"router: task {other.name!r} is a {other.problem}, and a router finds tasks of one class per example; "
            "learn without --router, and say with hatcl.task(model, t) which task an input belongs to"
        )


def image_router(
    model: nn.Module,
    stream: Sequence[ImageData],
    options: ImageOptions,
    router: RouterOptions | Mapping[str, Any] | None = None,
) -> TaskRouter:
    """A router with the training images of each sealed task.

    Args:
        stream: what the tasks were made of, in order; with validation images, what was left to learn from.

    Raises:
        ConfigError: a task is no classification.
    """
    check_routable(stream)
    own = OwnClasses([data.num_classes for data in stream]) if options.rotate else None
    made = TaskRouter(model, RouterOptions().changed(router), prepare=EachPrepared.of(stream, options), logits=own)
    for t in [t for t in tasks(model) if t < len(stream)]:
        data = stream[t]
        made.add_task(t, _unprepared(data.x_train, data.y_train).batches(options.eval_batch_size))
    return made


def image_examples(stream: Sequence[ImageData], size: int) -> dict[int, Iterable[Any]]:
    """The test images of each task, as they are stored, in batches of (images, labels)."""
    return {t: _unprepared(data.x_test, data.y_test).batches(size) for t, data in enumerate(stream)}


def _unprepared(x: Any, y: np.ndarray) -> Images:
    return Images(x, y.astype(np.int64), lambda images: torch.from_numpy(np.ascontiguousarray(images)))


@dataclasses.dataclass(frozen=True)
class TextLogits:
    """What each task's own classes get, of what a model without a head gives; one column of zeros for a task that
    writes its answers.

    Attributes:
        each: how each task reads texts.
    """

    each: Sequence[TextReading]

    def __call__(self, task: int, tokens: Any, out: Any) -> Tensor:
        own = self.each[task].logits
        return torch.zeros(len(tokens["input_ids"]), 1) if own is None else own(moved(tokens, _device_of(out)), out)


def _device_of(out: Any) -> torch.device:
    found: torch.device = out.last_hidden_state.device
    return found


def readings(sequence: Sequence[ContinualTask]) -> list[TextReading]:
    """How the tasks of a sequence read texts.

    Raises:
        ConfigError: one does not say.
    """
    for of in sequence:
        if of.reading is None:
            raise ConfigError(f"task {of.name}: is none of texts, or made by hand; give ContinualTask(reading=...)")
    return [of.reading for of in sequence if of.reading is not None]


def tokens_digest(each: Sequence[TextReading], chat: bool = False) -> str:
    """A digest of the tokens that some texts and the labels become: by tokenizer, prompts and lengths."""
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
    """A router with the training texts of each sealed task. It reads the mean over tokens of what enters the block in
    the middle: gates over adapters leave it nearly the same for all tasks, so that one forward finds the task
    (`hatcl.predict(top=1)`).

    Args:
        data: of each task in order, what it was learned from.

    Raises:
        ConfigError: tasks that do not say how they read texts. HATError: a model without a stack of blocks.
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
    """How well inputs find their task and their class.

    Args:
        examples: of each task, batches of (inputs, labels).

    Returns:
        confusion: `[T, T]`, how many inputs of the row's task were taken for the column's.
        task_accuracy: share of the inputs whose task is found; at_first_sight: by one forward alone, as
        `hatcl.predict(top=1)` does. rejected: share of the inputs that are rejected. Where every task has
        classes also task_incremental: accuracy where the task is given; class_incremental: share of the inputs whose
        task and class are both found; largest_logit: task_accuracy of the task with the largest logit.
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
