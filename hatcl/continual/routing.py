"""A router for tasks of images that were learned in sequence, and how well it tells them apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.images import ImageData, Images, Preparation
from ..hat.predict import predict
from ..hat.router import RouterOptions, TaskRouter
from ..hat.tasks import tasks
from .images import ImageOptions


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


def image_router(
    model: nn.Module,
    stream: Sequence[ImageData],
    options: ImageOptions,
    router: RouterOptions | Mapping[str, Any] | None = None,
) -> TaskRouter:
    """A router with the training images of each sealed task.

    Args:
        stream: what the tasks were made of, in order; with validation images, what was left to learn from.
    """
    made = TaskRouter(model, RouterOptions().changed(router), prepare=EachPrepared.of(stream, options))
    for t in [t for t in tasks(model) if t < len(stream)]:
        data = stream[t]
        made.add_task(t, _unprepared(data.x_train, data.y_train).batches(options.eval_batch_size))
    return made


def _unprepared(x: Any, y: np.ndarray) -> Images:
    return Images(x, y.astype(np.int64), lambda images: torch.from_numpy(np.ascontiguousarray(images)))


def routing_measures(
    router: TaskRouter, model: nn.Module, stream: Sequence[ImageData], options: ImageOptions
) -> dict[str, Any]:
    """How well test images find their task and their class.

    Returns:
        confusion: `[T, T]`, how many images of the row's task were taken for the column's.
        task_accuracy: share of the images whose task is found. task_incremental: accuracy where the task is given.
        class_incremental: share of the images whose task and class are both found. largest_logit: task_accuracy of the
        task with the largest logit. rejected: share of the images that are rejected.
    """
    count = len(stream)
    confusion = np.zeros((count, count), dtype=np.int64)
    told: list[Tensor] = []
    for t in router.tasks:
        data = stream[t]
        for x, y in _unprepared(data.x_test, data.y_test).batches(options.eval_batch_size):
            said = {other: router.seen(model, x, other)[1].float().cpu() for other in router.tasks}
            found = predict(model, x, router=router, among=router.tasks)
            task, label = found.task.cpu(), found.label.cpu()
            confusion[t] += np.bincount(task.numpy(), minlength=count)
            largest = torch.tensor(router.tasks)[torch.stack([z.max(1).values for z in said.values()]).argmax(0)]
            right = (task == t) & (label == y)
            told.append(torch.stack([said[t].argmax(1) == y, task == t, right, largest == t, found.rejected.cpu()]))
    names = ("task_incremental", "task_accuracy", "class_incremental", "largest_logit", "rejected")
    shares = torch.cat(told, 1).double().mean(1).tolist()
    return {**dict(zip(names, shares, strict=True)), "confusion": confusion.tolist()}
