"""Image tasks, which `learn_sequence` learns with a network with gates or any other classifier.

tasks = hatcl.continual.image_tasks(digits_tasks(), {"flip": True})
model = timm.create_model("hat_resnet18", num_tasks=len(tasks), num_classes=[2] * len(tasks))
learn_sequence(model, tasks, "hat", ImageLearning())
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..calls import device_of, moved, outputs
from ..config import Changeable, flag, number, one_of, whole, without_effect
from ..data.images import FITS, ImageData, Preparation, rotated, shifted
from ..data.photos import Pictured
from ..engine.problems import CLASSES, MEASURED_BY, problem_named
from ..errors import ConfigError, SkillError
from ..lend import Evaluating
from .options import LearnOptions
from .tasks import ContinualTask

CROPPED = "crop"
ROTATIONS = 4


@dataclass(frozen=True)
class ImageLearning(LearnOptions):
    """`LearnOptions` with the defaults for image networks that are trained from scratch."""

    lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: float = 0.0
    clip: float = 0.0
    batch_size: int = 32
    fresh_optimizer: bool = False
    checkpoint_seconds: float = 20.0
    passes: ClassVar[int] = 12


@dataclass(frozen=True)
class ImageOptions(Changeable):
    """How tasks are made from images.

    Args:
        size: resize images to this size; 0 = keep their own, which all images of an array share. fit: `resize`, `pad`
        (a black border), or `crop`, timm's way: the middle is cut out, in training a random part, and resized (for
        whole numbers 0 to 255).
        flip: mirror training images with probability 1/2.
        crop: shift training images by up to this many pixels.
        augment: with fit=crop, one of timm's policies for training images, such as rand-m9-mstd0.5 or augmix-m5-w4.
        rotate: with hat, learn each training image in its four rotations, as separate classes (see
        `hatcl.data.images.rotated`). It is meant to help a router find the task of an image, but did not in our
        measurements (docs/predict.md). A step takes four times as long, and the model's heads are four times as wide.
        eval_batch_size: images per batch of scoring; another size may round differently.
        validation: the share of the training images (of each class, if there are classes) that is held out when
        validation images are scored and the data has none.
        measured_by: accuracy; for several labels mean_average_precision or micro_f1; for a regression r2 or pearson.
            None = the first one for the task's problem.

    Raises:
        ConfigError: a value outside its range.
    """

    size: int = 32
    fit: str = "resize"
    flip: bool = False
    crop: int = 0
    rotate: bool = False
    augment: str | None = None
    eval_batch_size: int = 256
    validation: float = 0.2
    measured_by: str | None = None

    def __post_init__(self) -> None:
        one_of("fit", self.fit, (*FITS, CROPPED))
        whole("size", self.size, 0)
        flag("flip", self.flip)
        flag("rotate", self.rotate)
        whole("crop", self.crop, 0)
        whole("eval_batch_size", self.eval_batch_size)
        number("validation", self.validation, 0, 1, without="both", what="a share")
        if self.measured_by is not None:
            one_of("measured_by", self.measured_by, MEASURED_BY)
        if self.fit == CROPPED:
            without_effect(self, ["crop"], "fit=crop", "take another fit")
            if not self.size:
                raise ConfigError(
                    "size: got 0 (keep their own) with fit=crop, which resizes images to one size; give that size"
                )
            self.transform(training=True)
        else:
            without_effect(self, ["augment"], f"fit={self.fit}", "take fit=crop")

    def transform(self, *, training: bool) -> Callable[[Any], Tensor]:
        """timm's transform from a PIL image to a network's input.

        Raises:
            ConfigError: timm does not know the policy.
        """
        from timm.data import create_transform

        augment = {"auto_augment": self.augment} if training else {}
        try:
            made: Callable[[Any], Tensor] = create_transform(
                self.size, is_training=training, hflip=0.5 * self.flip, color_jitter=0.0, **augment
            )
        except (AssertionError, ValueError, IndexError, KeyError) as error:
            raise ConfigError(
                f"augment: timm makes no policy of {self.augment!r} ({str(error) or type(error).__name__}); expected "
                "such as rand-m9-mstd0.5, augmix-m5-w4 or original"
            ) from error
        return made


def image_tasks(
    stream: Sequence[ImageData],
    options: ImageOptions | Mapping[str, Any] | None = None,
    *,
    one_head: bool = False,
    validated: bool = False,
    seed: int = 0,
) -> list[ContinualTask]:
    """One task per data set, in order.

    Args:
        options: `ImageOptions`, or a mapping of the options to change.
        one_head: the model has one head with the classes of all tasks in sequence, like a plain classifier; each task
        is learned and scored on its own classes. Without it, the model has a head per task with only the task's
        classes, like a model with gates.
        validated: hold out training images and score on them (`LearnOptions.score_on="validation"`), so that no test
            image is used. seed: seeds this choice.

    Raises:
        ConfigError: an option is outside its range, or the share holds out no image.
    """
    chosen = ImageOptions().changed(options)
    if chosen.rotate and (one_head or any(data.problem != CLASSES for data in stream)):
        raise ConfigError(
            "rotate: got True for "
            + ("a head that all tasks share" if one_head else "images without exactly one class each")
            + "; it works only for classification tasks with a head each (hat); leave it out"
        )
    first = itertools.accumulate((data.num_classes for data in stream), initial=0)
    parts = [data.on_validation(chosen.validation, seed) if validated else data for data in stream]
    made = [_ImageParts(data, chosen, start if one_head else 0) for data, start in zip(parts, first, strict=False)]
    return [
        ContinualTask(
            of.data.name, range(len(of.data.x_train)), of.collate, of.loss, of.score,
            of.score if validated else None, hidden_states, of.outputs, whole_data.digest(),
            answers=of.answers(), validation_answers=of.answers() if validated else (),
            measure=chosen.measured_by or next(iter(of.problem.measures)),
        )
        for of, whole_data in zip(made, stream, strict=True)
    ]  # fmt: skip


class _ImageParts:
    """The parts of one task; its training examples are the indices of the images."""

    def __init__(self, data: ImageData, options: ImageOptions, first: int) -> None:
        self.data, self.options = data, options
        self.classes = slice(first, first + data.num_classes)
        self.problem = problem_named(data.problem)
        self.measure = self.problem.measure(options.measured_by)
        self.cropped = options.fit == CROPPED
        self.prepare: Callable[[Any], Tensor]
        if self.cropped:
            self.prepare = Pictured(options.transform(training=False))
            self.varied = Pictured(options.transform(training=True), drawn=True)
        else:
            self.prepare = Preparation.of(data, size=options.size or None, fit=options.fit)

    def collate(self, chosen: list[int]) -> tuple[Tensor, Tensor]:
        ids, o = np.asarray(chosen), self.options
        images = self.data.x_train[ids]
        x = self.varied(images) if self.cropped else self.prepare(images)
        if o.flip and not self.cropped:
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
        if o.crop:
            x = shifted(x, torch.randint(2 * o.crop + 1, (len(x), 2)), o.crop)
        y = self.targets(self.data.y_train[ids])
        return rotated(x, y, self.data.num_classes) if o.rotate else (x, y)

    def targets(self, y: np.ndarray) -> Tensor:
        """The targets that outputs are compared with."""
        return self.problem.targets(y, self.data.y_train)

    def answers(self) -> list[int]:
        """The test images' classes; several labels or numbers have no most common answer to compare a score with."""
        return self.data.y_test.tolist() if self.data.problem == CLASSES else []

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = self.logits(model, batch[0], ROTATIONS if self.options.rotate else 1)
        return self.problem.loss(logits, batch[1].to(logits.device))

    def logits(self, model: nn.Module, x: Tensor, times: int = 1) -> Tensor:
        """The logits of the task's classes, or of `times` as many.

        Raises:
            ConfigError: the model's head has fewer classes.
        """
        every, stop = outputs(model, x), self.classes.start + times * self.data.num_classes
        if every.shape[-1] < stop:
            raise ConfigError(
                f"task {self.data.name}: its classes end at {stop}, but the model's head has {every.shape[-1]}; "
                "give a model without gates num_classes= the sum over all tasks, and a model that learns with "
                "rotate four times as many classes"
            )
        return every[:, self.classes.start : stop]

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Tensor:
        """The logits of the task's classes for all test images, on the CPU."""
        size, x = self.options.eval_batch_size, self.data.x_test
        with Evaluating(model):
            parts = [self.logits(model, self.prepare(x[i : i + size])) for i in range(0, len(x), size)]
        return torch.cat([part.float().cpu() for part in parts])

    def score(self, model: nn.Module) -> float:
        """The score on the test images, by the problem's measure."""
        return self.measure(self.outputs(model), self.targets(self.data.y_test))


def hidden_states(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The features before the head, for `ilora`.

    Raises:
        SkillError: the model does not return them.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not hasattr(inner, "forward_features"):
        raise SkillError(
            f"{type(inner).__name__} has no forward_features, which returns the hidden states of timm's models; "
            "give consistency_weight=0, or use another method"
        )
    return [inner.forward_features(moved(batch[0], device_of(inner)))]
