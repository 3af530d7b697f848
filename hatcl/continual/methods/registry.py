"""Methods of continual learning by name.

A method is a class with what it does before, during and after a task. `@continual_method(name, paper=...)` above it is
all that it takes to be found; its options are the fields of its dataclass `Options`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ...config import known_options, one_of
from ...errors import ConfigError
from ..options import LearnOptions
from ..tasks import ContinualTask

MethodClass = TypeVar("MethodClass", bound="type[Method]")


@dataclass(frozen=True)
class Batch:
    """Some examples of one task.

    Attributes:
        index: which task. task: the task itself. positions: which of its training examples.
        weight: of its loss: where several processes have shares of one batch, by how much this one's is larger than
            their mean.
    """

    index: int
    task: ContinualTask
    positions: tuple[int, ...]
    weight: float = 1.0

    @property
    def examples(self) -> list[Any]:
        """The examples themselves."""
        return [self.task.train[i] for i in self.positions]

    def loss(self, model: nn.Module) -> Tensor:
        """The task's own loss of them, weighted."""
        loss = self.task.loss(model, self.task.collate(self.examples))
        return loss if self.weight == 1 else self.weight * loss


class Saved(Protocol):
    """Something that is kept as a `.safetensors` file."""

    def save(self, path: str | os.PathLike[str]) -> object: ...


class Method:
    """What every method can do; alone it is plain training. A method overrides what it does differently.

    `begin` is called once per stage, then for each step `loss` of its batches, a backward pass, clipping, the
    optimizer's step and `after_step`, then `end`. All randomness comes from the global generators, which are seeded
    again for each stage.

    Attributes:
        name: as registered. paper: who proposed it. options: of the class `Options`.
        ahead: can a task be scored before it is learned?
        together: can several processes learn as one, with the model in `DistributedDataParallel`?
        lora: what `hatcl train` gives it to learn images with: `none` = the whole model; a LoRA adapter `with_head`,
            which is trained as well, or `alone`.
        adapted: does it learn texts with a LoRA adapter on the model, or else with the model's own weights?
        renews: are the parameters of each task other ones, so that each has an optimizer of its own?
        learning: how the run trains; `learn_sequence` sets it before `start`.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    ahead: ClassVar[bool] = True
    together: ClassVar[bool] = False
    lora: ClassVar[str] = "none"
    adapted: ClassVar[bool] = True
    renews: ClassVar[bool] = False
    learning: LearnOptions = LearnOptions()

    @dataclass(frozen=True)
    class Options:
        """This method has none."""

    def __init__(self, options: Any = None) -> None:
        kind = type(self).Options
        if isinstance(options, Mapping):
            known_options(kind, options)
            options = kind(**options)
        self.options: Any = kind() if options is None else options
        if not isinstance(self.options, kind):
            raise ConfigError(f"{self.name}: got options of {type(options).__qualname__}, expected {kind.__qualname__}")

    def stages(self, count: int) -> list[list[int]]:
        """Which tasks are learned together, in order."""
        return [[i] for i in range(count)]

    def start(self, model: nn.Module, tasks: Sequence[ContinualTask], seed: int) -> None:
        """Before the first stage, and before going on with an interrupted run.

        Raises:
            SkillError: a model that the method cannot learn with.
        """

    def begin(self, model: nn.Module, stage: int) -> None:
        """Before a stage; the optimizer is made after it, of what then requires a gradient."""

    def watching(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int
    ) -> contextlib.AbstractContextManager[Any]:
        """Around a stage's steps. `start` of them were done before an interruption."""
        return contextlib.nullcontext()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch."""
        return batch.loss(model)

    def after_step(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        """After the optimizer's step, which these batches made."""

    def measured(self) -> dict[str, float]:
        """What is known of the last step besides its loss, for progress and metrics.jsonl."""
        return {}

    def end(self, model: nn.Module, stage: int) -> None:
        """After a stage's steps; the model is scored and saved as this leaves it."""

    def leave(self, model: nn.Module) -> None:
        """After an error between `begin` and `end`: take out what `begin` has put into the model."""

    def facts(self, model: nn.Module, stage: int) -> dict[str, Any]:
        """What is known of the stage that has just ended besides its scores, JSON-able."""
        return {}

    def finish(self, model: nn.Module, facts: list[dict[str, Any]]) -> dict[str, Any]:
        """After the last stage: what is known of the whole, JSON-able. `facts` of the stages may be added to."""
        return {}

    def scoring(self, model: nn.Module, index: int) -> contextlib.AbstractContextManager[Any]:
        """Around the scoring of a task."""
        return contextlib.nullcontext()

    def scores(self) -> Mapping[str, Saved]:
        """What to save with a finished task: `scores` of the task, `cumulative` of all so far, `graft`."""
        return {}

    def adapters(self, model: nn.Module) -> list[str] | None:
        """Which of the model's adapters to save with a finished task; None = the active one, or what a model without
        LoRA has learned. Of an empty list nothing is saved."""
        return None

    def saving(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Around the saving of these adapters."""
        return contextlib.nullcontext()

    def write(self, model: nn.Module, folder: Path) -> None:
        """Further files of a finished task's folder, which holds its adapters already."""

    def save(self, folder: Path) -> None:
        """What the next stage needs besides the model."""

    def load(self, folder: Path, model: nn.Module) -> None:
        """Read what `save` wrote. It comes after `start` and before the model's tensors are read."""

    def state(self) -> dict[str, Any] | None:
        """Everything but the model's tensors that steps have changed since `begin`: plain values and tensors. None
        means that it is not known; an interrupted task is then learned again from its beginning."""
        return None

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave. It is called after `begin`."""

    def to_dict(self) -> dict[str, Any]:
        """Name and options, JSON-able."""
        return {"name": self.name, "options": dataclasses.asdict(self.options)}


_METHODS: dict[str, type[Method]] = {}


def continual_method(name: str, *, paper: str) -> Callable[[MethodClass], MethodClass]:
    """Class decorator: `learn_sequence` finds the method under this name.

    Raises:
        ConfigError: a name that is taken, or a class that is no `Method`.
    """

    def add(kind: MethodClass) -> MethodClass:
        if not (isinstance(kind, type) and issubclass(kind, Method)):
            raise ConfigError(
                f"continual_method: {getattr(kind, '__qualname__', kind)} is no method; derive it from "
                "hatcl.continual.Method"
            )
        if name in _METHODS:
            raise ConfigError(f"continual_method: {name!r} is taken by {_METHODS[name].__qualname__}")
        kind.name, kind.paper = name, paper
        _METHODS[name] = kind
        return kind

    return add


def list_continual_methods() -> dict[str, type[Method]]:
    """All methods by name."""
    return dict(sorted(_METHODS.items()))


def make_method(method: str | Method, options: Mapping[str, Any] | None = None) -> Method:
    """A method by its name, with options changed; or the method itself.

    Raises:
        ConfigError: an unknown name or option, with the nearest one; options together with a method that has its own.
    """
    if isinstance(method, Method):
        if options:
            raise ConfigError(f"method_options: the method {method.name} came with its own; leave them out")
        return method
    one_of("method", method, list(list_continual_methods()))
    return _METHODS[method](options or {})
