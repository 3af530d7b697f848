"""Methods of continual learning by name.

A method is a class with its actions before, during and after a task. The decorator `@continual_method(name, paper=...)`
makes it findable; its options are the fields of its dataclass `Options`.
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
        index: the task's number. task: the task. positions: the indices of its training examples.
        weight: the factor of its loss: if several processes share one batch, the size of this share relative to their
            mean.
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
        """The task's own loss on them, weighted."""
        loss = self.task.loss(model, self.task.collate(self.examples))
        return loss if self.weight == 1 else self.weight * loss


class Saved(Protocol):
    """Something that is kept as a `.safetensors` file."""

    def save(self, path: str | os.PathLike[str]) -> object: ...


class Method:
    """Base class of methods; by itself it is plain training. A method overrides the parts that it does differently.

    `begin` is called once per stage, then for each step `loss` of its batches, a backward pass, clipping, the
    optimizer's step and `after_step`, then `end`. All randomness comes from the global generators, which are seeded
    again for each stage.

    Attributes:
        name: as registered. paper: its source. options: an instance of `Options`. ahead: whether a task can be scored
            before it is learned. together: whether several processes can learn as one, with the model in
            `DistributedDataParallel`. lora: how `hatcl train` trains it on images: `none` = the whole model; a LoRA
            adapter `with_head`, which is trained as well, or `alone`. adapted: whether it learns texts with a LoRA
            adapter; otherwise with the model's own weights. renews: whether each task has new parameters and therefore
            a new optimizer. learning: how the run trains; `learn_sequence` sets it before `start`.
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
        """This method has no options."""

    def __init__(self, options: Any = None) -> None:
        kind = type(self).Options
        if isinstance(options, Mapping):
            known_options(kind, options)
            options = kind(**options)
        self.options: Any = kind() if options is None else options
        if not isinstance(self.options, kind):
            raise ConfigError(f"{self.name}: got options of {type(options).__qualname__}, expected {kind.__qualname__}")

    def stages(self, count: int) -> list[list[int]]:
        """The tasks that are learned together in each stage, in order."""
        return [[i] for i in range(count)]

    def start(self, model: nn.Module, tasks: Sequence[ContinualTask], seed: int) -> None:
        """Called before the first stage, and before an interrupted run is resumed.

        Raises:
            SkillError: the method cannot learn with this model.
        """

    def begin(self, model: nn.Module, stage: int) -> None:
        """Called before a stage. Afterwards the optimizer is made for the parameters that require a gradient."""

    def watching(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int
    ) -> contextlib.AbstractContextManager[Any]:
        """A context around a stage's steps. `start` of them were done before an interruption."""
        return contextlib.nullcontext()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch."""
        return batch.loss(model)

    def after_step(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        """Called after the optimizer's step, which used these batches."""

    def measured(self) -> dict[str, float]:
        """Further values of the last step, for progress and metrics.jsonl."""
        return {}

    def end(self, model: nn.Module, stage: int) -> None:
        """Called after a stage's steps; afterwards the model is scored and saved."""

    def leave(self, model: nn.Module) -> None:
        """Called after an error between `begin` and `end`: undo the changes that `begin` made to the model."""

    def facts(self, model: nn.Module, stage: int) -> dict[str, Any]:
        """Further results of the stage that has just ended, JSON-able."""
        return {}

    def finish(self, model: nn.Module, facts: list[dict[str, Any]]) -> dict[str, Any]:
        """Called after the last stage: results of the whole run, JSON-able. It may add to the stages' `facts`."""
        return {}

    def scoring(self, model: nn.Module, index: int) -> contextlib.AbstractContextManager[Any]:
        """A context around the scoring of a task."""
        return contextlib.nullcontext()

    def scores(self) -> Mapping[str, Saved]:
        """The objects to save with a finished task: `scores` of the task, `cumulative` of all so far, `graft`."""
        return {}

    def adapters(self, model: nn.Module) -> list[str] | None:
        """The model's adapters to save with a finished task; None = the active one, or the learned weights of a model
        without LoRA. With an empty list nothing is saved."""
        return None

    def saving(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """A context around the saving of these adapters."""
        return contextlib.nullcontext()

    def write(self, model: nn.Module, folder: Path) -> None:
        """Write further files into a finished task's folder, which already holds its adapters."""

    def save(self, folder: Path) -> None:
        """Write the state that the next stage needs in addition to the model."""

    def load(self, folder: Path, model: nn.Module) -> None:
        """Read the files of `save`. Called after `start` and before the model's tensors are read."""

    def state(self) -> dict[str, Any] | None:
        """Everything that steps have changed since `begin`, except the model's tensors: plain values and tensors. None
        means that it is unknown; an interrupted task is then learned again from its beginning."""
        return None

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of `state`. Called after `begin`."""

    def to_dict(self) -> dict[str, Any]:
        """Name and options, JSON-able."""
        return {"name": self.name, "options": dataclasses.asdict(self.options)}


_METHODS: dict[str, type[Method]] = {}


def continual_method(name: str, *, paper: str) -> Callable[[MethodClass], MethodClass]:
    """Class decorator: `learn_sequence` finds the method under this name.

    Raises:
        ConfigError: the name is taken, or the class is no `Method`.
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
    """The method of a name, with options changed; or the given method itself.

    Raises:
        ConfigError: a name or option is unknown (the text has the nearest one), or options were given together with a
            method that has its own.
    """
    if isinstance(method, Method):
        if options:
            raise ConfigError(f"method_options: the method {method.name} has its own options; leave them out")
        return method
    one_of("method", method, list(list_continual_methods()))
    return _METHODS[method](options or {})
