"""Modes of fine-tuning by name.

A mode makes a `FinetuneTask` of a model, its data and `TaskOptions`. `@finetune_mode(name, ...)` above its function is
all that it takes to be found.
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
        make: takes (options, data, model, tokenizer, seed) and gives the task; it works on a copy of the model.
        loads: which of transformers' `Auto...` classes loads its model; empty = timm. paper: where it is from.
        texts: is its data texts (else images)? reads: which of the options that not all modes have (`OF_MODES`) it has.
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
    """Function decorator: options with this `mode` are made a task by the function.

    Args:
        loads: which of transformers' `Auto...` classes loads its model; empty = timm. paper: who proposed it.
        own: fields of `TaskOptions` that it reads and other modes of texts, or of images, do not.

    Raises:
        ConfigError: a name that is taken.
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
    """What is registered under a name. Raises `ConfigError` where nothing is, with the nearest name."""
    one_of("mode", name, sorted(_MODES))
    return _MODES[name]


def mode_for(options: TaskOptions) -> FinetuneMode:
    """The mode that options ask for. Raises `ConfigError` also for an option that this mode does not read."""
    mode = mode_of(options.mode)
    for name in OF_MODES:
        if name not in mode.reads:
            others = [other.name for other in list_finetune_modes().values() if name in other.reads]
            without_effect(options, [name], f"mode {mode.name!r}", f"take mode {' or '.join(map(repr, others))}")
    return mode
