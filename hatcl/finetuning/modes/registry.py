"""Modes of fine-tuning by name.

A mode makes a `FinetuneTask` of a model, its data and `TaskOptions`. `@finetune_mode(name, ...)` above its function is
all that it takes to be found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from ...config import one_of
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
        texts: is its data texts (else images)?
    """

    name: str
    make: Callable[[TaskOptions, Any, nn.Module, Any, int], FinetuneTask]
    loads: str
    paper: str

    @property
    def texts(self) -> bool:
        return bool(self.loads)


_MODES: dict[str, FinetuneMode] = {}


def finetune_mode(name: str, *, loads: str, paper: str) -> Callable[[MakeFunction], MakeFunction]:
    """Function decorator: options with this `mode` are made a task by the function.

    Args:
        loads: which of transformers' `Auto...` classes loads its model; empty = timm. paper: who proposed it.

    Raises:
        ConfigError: a name that is taken.
    """

    def add(make: MakeFunction) -> MakeFunction:
        if name in _MODES:
            raise ConfigError(f"finetune_mode: {name!r} is taken by {_MODES[name].make.__module__}")
        _MODES[name] = FinetuneMode(name, make, loads, paper)
        return make

    return add


def list_finetune_modes() -> dict[str, FinetuneMode]:
    """All modes by name."""
    return dict(sorted(_MODES.items()))


def mode_of(name: str) -> FinetuneMode:
    """What is registered under a name. Raises `ConfigError` where nothing is, with the nearest name."""
    one_of("mode", name, sorted(_MODES))
    return _MODES[name]
