"""The active task: the one that this context chose, else the model's default; and, when activations are recomputed in a
backward pass, the task of their forward pass.

A choice (`with hatcl.task(...)`) belongs to the context (`contextvars`): to a thread, to an asyncio task. A new thread
starts without a choice and follows the default that `hatcl.set_task` sets for all threads.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ..errors import TaskError


@dataclass(frozen=True, eq=False)
class _Choice:
    keys: frozenset[int]
    task: Any


class Choices(NamedTuple):
    """The choices of a context, the last first. saying: one object for all equal choices, at any time and in any
    thread; it is the key of cached values."""

    made: tuple[_Choice, ...]
    saying: Any


_NONE = Choices((), ())
CHOICES: ContextVar[Choices] = ContextVar("hatcl_active_task", default=_NONE)


@contextlib.contextmanager
def choose(keys: Collection[int], task: Any) -> Iterator[None]:
    """Inside, only in this context, `task` is active for the gates with these keys: an index, None, or a tensor that
    stands for several (see `hatcl.forward`)."""
    mine = _Choice(frozenset(keys), task)
    _choose((mine, *CHOICES.get().made))
    try:
        yield
    finally:
        # without a token: a generator may be closed in another context than it was started in
        _choose(tuple(c for c in CHOICES.get().made if c is not mine))


def _choose(choices: tuple[_Choice, ...]) -> None:
    several = any(isinstance(c.task, Tensor) for c in choices)
    saying = object() if several else _one(tuple((c.keys, c.task) for c in choices))
    CHOICES.set(Choices(choices, saying))


@lru_cache(maxsize=4096)
def _one(saying: Any) -> Any:
    return saying


def chosen_task(key: int, default: int | None) -> Any:
    """The task that this context chose for the gates with this key, else the default."""
    for choice in CHOICES.get().made:
        if key in choice.keys:
            return choice.task
    return default


def is_chosen(key: int) -> bool:
    """Whether this context chose a task for the gates with this key."""
    return any(key in choice.keys for choice in CHOICES.get().made)


# ---- recomputation: the task of the forward ----------------------------------------------------------------------
#
# Activation checkpointing runs a part of the model again in the backward pass, when another task may be active. Torch
# has no hook for that, but the region has an object of its own that both passes can find: `_CheckpointFrame` in the
# closure of the saved-tensor hook (use_reentrant=False), the autograd function's context on the Python stack (the
# reentrant form, and those of other libraries). Each region keeps the task that its forward read.

_NOTES = "_hat_tasks"
_MIXED = -1


def of_forward(key: int, task: int | None, training: bool) -> int | None:
    """The task for a read of gates at this point: `task`, or that of the forward whose activations are being
    recomputed.

    Raises:
        TaskError: the task of a recomputation's forward cannot be determined.
    """
    with_grad = torch.is_grad_enabled()
    if with_grad and torch._C._current_graph_task_id() != -1:
        region = _recomputed()
        if region is not None:
            noted = getattr(region, _NOTES, {}).get(key, _MIXED)
            if noted == _MIXED:
                raise TaskError(
                    "activation checkpointing runs a part of the model again in backward, and hatcl cannot tell under "
                    "which task its forward ran; pass use_reentrant=False to torch.utils.checkpoint, and let each "
                    "checkpointed part run under one task"
                )
            task = noted
    if with_grad:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is not None:
            _note(_closure(hooks[0]).get("frame"), key, task)
    elif training and not torch.is_inference_mode_enabled():
        _note(_context("forward"), key, task)
    return task


def _note(region: Any, key: int, task: int | None) -> None:
    if region is not None:
        notes = vars(region).setdefault(_NOTES, {})
        notes[key] = task if notes.get(key, task) == task else _MIXED


def _recomputed() -> Any:
    """The checkpointed region that is being recomputed, if one is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "unpack_hook" and "frame" in code.co_freevars:
            return frame.f_locals["frame"]
        if code.co_name == "backward" and (context := _first_argument(frame)) is not None:
            return context
        frame = frame.f_back
    return None


def _context(name: str) -> Any:
    """The context of the innermost autograd function whose method of this name is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == name and (context := _first_argument(frame)) is not None:
            return context
        frame = frame.f_back
    return None


def _first_argument(frame: FrameType) -> Any:
    names = frame.f_code.co_varnames
    first = frame.f_locals.get(names[0]) if names else None
    return first if isinstance(first, BackwardCFunction) else None


def _closure(function: Any) -> dict[str, Any]:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
