"""Hard attention to the task in Avalanche.

Not imported by `import hatcl`, which works without Avalanche: `from hatcl.integrations.avalanche import HATPlugin`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils import DataAttribute, TaskAwareClassificationDataset, TaskLabels
from avalanche.core import SupervisedPlugin
from torch.utils.data import TensorDataset

from ..data.images import ImageData, Preparation
from ..engine.processes import place
from ..errors import ConfigError, TaskError
from ..hat.distributed import ddp_of
from ..hat.learn import Learning
from ..hat.tasks import task as active_task
from ..hat.tasks import tasks
from .course import TaskCourse

LABELLED = "make the benchmark by avalanche.benchmarks.task_incremental_benchmark, or hatcl's image_benchmark"


class HATPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Lets an Avalanche strategy learn each experience as a task of a converted model, and seals it:

        model = hatcl.convert(network, num_tasks=5, example_inputs=x)
        strategy = Naive(model=model, optimizer=AdamW(model.parameters()), plugins=[HATPlugin()], train_epochs=10, ...)
        for experience in benchmark.train_stream:
            strategy.train(experience)
            strategy.eval(benchmark.test_stream)

    An experience's task label is its task's index, so the benchmark must be task-incremental. The gradient of HAT's
    penalty is added once per optimizer step; the loss that Avalanche records is the task's own. An experience is
    evaluated under its own task's hard gates, also in the middle of training; an experience whose task is not learned
    yet is evaluated under task None, the plain model with the current shared weights. Avalanche's metrics, its loggers
    and its `EarlyStoppingPlugin` work unchanged. docs/stack.md explains how to resume a run between experiences.

    Avalanche does not notify plugins of errors. After one the task stays open until the next `train`, which begins it
    again; `with plugin: strategy.train(experience)` leaves it at once.

    Attributes:
        learning: the result of `hatcl.learn`, while a task is learned.

    Raises:
        ConfigError: an experience has no task label or several, a strategy has no batches, or there are several
            processes without DistributedDataParallel. TaskError: the task is sealed (the experience belongs to an
            earlier task, or is a part of one), or a batch holds another task's examples, as with replay. Also all
            errors of `hatcl.learn`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.course: TaskCourse | None = None
        self._evaluation = contextlib.ExitStack()

    @property
    def learning(self) -> Learning | None:
        return None if self.course is None else self.course.learning

    def __enter__(self) -> HATPlugin:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """If an error ended training, leave the task unsealed."""
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        self._evaluation.close()
        course, self.course = self.course, None
        if course is not None:
            course.leave(error)

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self._leave(TaskError("training begins once more"))
        _check_processes(strategy.model)
        course = TaskCourse(_task_of(strategy.experience))
        steps = strategy.train_epochs * len(strategy.dataloader)
        if not steps:
            raise ConfigError(
                f"HATPlugin: task {course.task} has {len(strategy.dataloader)} batches and {strategy.train_epochs} "
                "epochs, so there is nothing to learn; give both at least one"
            )
        if course.task in tasks(strategy.model):
            raise TaskError(
                f"HATPlugin: experience {strategy.experience.current_experience} has the task label {course.task}, and "
                f"that task is sealed; each task is one experience. Where all experiences have one label, {LABELLED}; "
                f"hatcl.reopen_task(model, {course.task}) opens a task to learn it on"
            )
        course.begin(strategy.model, strategy.optimizer, steps, 0)
        self.course = course

    def before_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        if self.course is None:
            return
        others = sorted(set(strategy.mb_task_id.tolist()) - {self.course.task})
        if others:
            raise TaskError(
                f"HATPlugin: a batch holds examples of task {others[0]} while task {self.course.task} is learned; what "
                "is sealed needs no examples of earlier tasks, so take a strategy or plugin without replay"
            )

    def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        if self.course is not None:
            self.course.add_penalty()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        if self.course is not None:
            self.course.seal()
            self.course = None

    def before_eval_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self._evaluation.close()  # an error ended an earlier evaluation
        task = _task_of(strategy.experience)
        if self.learning is None or task != self.learning.task:
            known = task if task in tasks(strategy.model) else None
            self._evaluation.enter_context(active_task(strategy.model, known))

    def after_eval_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self._evaluation.close()


def image_benchmark(images: Sequence[ImageData], size: int | None = None) -> Any:
    """Tasks of images as an Avalanche benchmark with task labels 0, 1, ... and the streams `train` and `test`, split as
    in hatcl's own commands:

        image_benchmark(split_classes(npz_task("mine.npz"), 5))

    Every task's labels are 0, 1, ...; images are floats 3 x H x W, normalised by the task's own training images.

    Args:
        size: resize images to it; None keeps their own.
    """
    streams: dict[str, list[Any]] = {"train": [], "test": []}
    for task, data in enumerate(images):
        prepare = Preparation.of(data, size=size)
        for part, stream in streams.items():
            x, y = prepare(getattr(data, f"x_{part}")), torch.from_numpy(getattr(data, f"y_{part}"))
            told = [DataAttribute(y.tolist(), "targets"), TaskLabels([task] * len(y))]
            stream.append(TaskAwareClassificationDataset([TensorDataset(x, y)], data_attributes=told))
    made = with_classes_timeline(with_task_labels(benchmark_from_datasets(**streams)))
    for experience in (e for stream in made.streams.values() for e in stream):
        classes = sorted(experience.classes_in_this_experience)
        experience.classes_in_this_experience = classes  # a list, with which Avalanche's heads index
    return made


def _task_of(experience: Any) -> int:
    labels = getattr(experience, "task_labels", None)
    if labels is None or len(labels) != 1:
        raise ConfigError(
            f"HATPlugin: experience {experience.current_experience} has "
            f"{'no task label' if not labels else f'the task labels {sorted(labels)}'}, and hard attention needs to "
            f"know the task; {LABELLED}"
        )
    return int(labels[0])


def _check_processes(model: torch.nn.Module) -> None:
    _, count = place()
    if count > 1 and ddp_of(model) is None:
        raise ConfigError(
            f"HATPlugin: {count} processes, and Avalanche gives each its share of the batches "
            "without averaging gradients, so their models would drift apart; give the strategy the model in "
            "torch.nn.parallel.DistributedDataParallel"
        )
