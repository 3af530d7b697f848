"""Modes of fine-tuning by name.

A mode makes a `FinetuneTask` from a model, its data and `TaskOptions`. The decorator `@finetune_mode(name, ...)` makes
its function findable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from ...config import one_of, without_effect
from ...errors import ConfigError
from ..options import TaskOptions
from ..tasks import FinetuneTask

MakeFunction = TypeVar("MakeFunction", bound=Callable[..., FinetuneTask])


@dataclass(frozen=True)
class FinetuneMode:
    """A registered mode.

    Attributes:
        make: (options, data, model, tokenizer, seed) -> the task; it works on a copy of the model.
        loads: the transformers `Auto...` class that loads its model; empty = timm. paper: its source.
        texts: whether its data are texts (else images). reads: the options it uses out of those that not all modes have
            (`OF_MODES`).
    """

    name: str
    make: Callable[[TaskOptions, Any, nn.Module, Any, int], FinetuneTask]
    loads: str
    paper: str
    own: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.own, *(OF_TEXTS if self.texts else OF_IMAGES))

    @property
    def texts(self) -> bool:
        return bool(self.loads)


OF_TEXTS = ("template", "max_length", "cut", "plain", "file_seed")
OF_IMAGES = ("weights", "model_kwargs", "size", "fit", "normalise")
OF_MODES = ("words", "token", "head", "scale", *OF_TEXTS, *OF_IMAGES)

_MODES: dict[str, FinetuneMode] = {}


def finetune_mode(
    name: str, *, loads: str, paper: str, own: tuple[str, ...] = ()
) -> Callable[[MakeFunction], MakeFunction]:
    """Decorator for the function that makes tasks from options with this `mode`.

    Args:
        loads: the transformers `Auto...` class that loads its model; empty = timm. paper: its source.
        own: fields of `TaskOptions` that it uses but other modes of the same kind of data do not.

    Raises:
        ConfigError: the name is taken.
    """

    def add(make: MakeFunction) -> MakeFunction:
        if name in _MODES:
            raise ConfigError(f"finetune_mode: {name!r} is taken by {_MODES[name].make.__module__}")
        _MODES[name] = FinetuneMode(name, make, loads, paper, own)
        return make

    return add


def list_finetune_modes() -> dict[str, FinetuneMode]:
    """All modes by name."""
    return dict(sorted(_MODES.items()))


def mode_of(name: str) -> FinetuneMode:
    """The mode of a name. Raises `ConfigError` with the nearest name if there is none."""
    one_of("mode", name, sorted(_MODES))
    return _MODES[name]


def mode_for(options: TaskOptions) -> FinetuneMode:
    """The mode that options name. Raises `ConfigError` also for an option that this mode does not use."""
    mode = mode_of(options.mode)
    for name in OF_MODES:
        if name not in mode.reads:
            others = [other.name for other in list_finetune_modes().values() if name in other.reads]
            without_effect(options, [name], f"mode {mode.name!r}", f"use mode {' or '.join(map(repr, others))}")
    return mode
