"""The rules by the operation that they are for, and what a rule is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ...errors import ConfigError
from ..coupling import Coupling
from ..shadow import Shadow, apply_as_is


@dataclass(frozen=True)
class Call:
    """One operation of the forward, after it has run.

    Attributes:
        func: the operation (an overload of an ATen operation, or of a library's own).
        args, kwargs: its arguments.
        flat: all arguments one after another, those in lists too. spec: how they are put together again.
        shadows: the shadow of each of `flat`; None for constants and for what is no tensor.
        out: its output.
    """

    func: Any
    args: tuple
    kwargs: dict[str, Any]
    flat: list[Any]
    spec: TreeSpec
    shadows: list[Shadow | None]
    out: Any

    @property
    def name(self) -> str:
        """The operation's name without its library; an in-place operation has the name of the one that is not."""
        return _operation(self.func)[0]

    @property
    def inplace(self) -> bool:
        """Does it write to its first argument? (`add_`)"""
        return _operation(self.func)[1]

    @cached_property
    def outs(self) -> list[Any]:
        """Its outputs one after another."""
        return tree_flatten(self.out)[0]

    def argument(self, at: int, name: str, default: Any) -> Any:
        """An argument that may be given by its place or by its name."""
        return self.args[at] if len(self.args) > at else self.kwargs.get(name, default)

    def on(self, flat: Sequence[Any]) -> list[Any]:
        """The outputs of the same operation on other arguments."""
        args, kwargs = tree_unflatten(list(flat), self.spec)
        return tree_flatten(self.func(*args, **kwargs))[0]

    def on_labels(self, ids: Tensor) -> list[Tensor]:
        """The outputs of the same operation on the labels of its first argument. Other tensors (indices) follow the
        labels to the CPU."""
        rest = [v.cpu() if isinstance(v, Tensor) else v for v in self.flat[1:]]
        args, kwargs = tree_unflatten([ids, *rest], self.spec)
        return tree_flatten(apply_as_is(self.func, args, kwargs, [ids]))[0]


@cache
def _operation(func: Any) -> tuple[str, bool]:
    """An operation's name without its library and without the mark of an in-place operation; is it one?"""
    name: str = func._schema.name.partition("::")[2]
    inplace = name.endswith("_") and not name.startswith("__")
    return name.removesuffix("_") if inplace else name, inplace


# One shadow for every output, or one for each (outputs that are left out carry nothing); None: nothing is carried.
Moved = Shadow | Sequence[Shadow | None] | None


@dataclass(frozen=True)
class Rule:
    """apply: couples the labels that meet in an operation, and gives the shadows of its outputs. reads: whether the
    operation reads its inputs' values gated, so that what is pending on them acts."""

    apply: Callable[[Call, Coupling], Moved]
    reads: bool = True


TRACE_RULES: dict[str | torch.Tag, Rule] = {}


def rule(
    *operations: str | torch.Tag, reads: bool = True
) -> Callable[[Callable[[Call, Coupling], Moved]], Callable[[Call, Coupling], Moved]]:
    """Say what operations do to units.

    The decorated function takes the `Call` and the trace's `Coupling`. It couples labels by the verbs of `Coupling`
    and returns the shadow of the outputs. It takes the place of an earlier rule for the same operation.

    Args:
        operations: names without their library (`"mm"` for `aten::mm`; `"relu"` is `relu_` too), or torch's tags for
            all operations that no rule names.
        reads: False where values only move or are computed with elsewhere, so that a fold can still be taken over by
            what comes next.

    Raises:
        ConfigError: no operation is named, or one with its library.

    Example::

        @rule("grid_sampler_2d")
        def grid_sample(call, coupling):
            return within_channels(call, coupling, dims=2)
    """

    named = [x for x in operations if isinstance(x, torch.Tag) or (isinstance(x, str) and "::" not in x)]
    if not operations or len(named) < len(operations):
        wrong = ", ".join(repr(x) for x in operations if x not in named) or "nothing"
        raise ConfigError(f'rule: got {wrong}; name operations without their library, such as @rule("mm") for aten::mm')

    def register(apply: Callable[[Call, Coupling], Moved]) -> Callable[[Call, Coupling], Moved]:
        TRACE_RULES.update(dict.fromkeys(operations, Rule(apply, reads)))
        return apply

    return register


def apply_rule(call: Call, coupling: Coupling) -> Moved:
    """The shadows of an operation's outputs, by the rule for its name, else for one of its tags, else as `unknown`."""
    found = TRACE_RULES.get(call.name) or next((TRACE_RULES[t] for t in call.func.tags if t in TRACE_RULES), UNKNOWN)
    if found.reads:
        for shadow in call.shadows:  # whatever reads a value, in whichever argument, reads it gated
            coupling.commit(shadow)
    return found.apply(call, coupling)


def unknown(call: Call, coupling: Coupling) -> Shadow:
    """An operation that no rule knows: its output belongs to no unit, and parameters get a copy per task."""
    for shadow in call.shadows:
        if shadow is not None:
            coupling.commit(shadow)
            for slot in shadow.slots:
                coupling.place(slot.ids, range(slot.ids.dim()))
            if shadow.of_parameters:
                disown(shadow, coupling)
    if any(shadow is not None and shadow.slots for shadow in call.shadows):
        coupling.note(f"{call.func._schema.name} is not known to the trace: it forgets which units it carries")
    return Shadow()


def disown(shadow: Shadow, coupling: Coupling) -> Shadow:
    """Parameters that go where no unit can be followed: each gets a copy per task."""
    for slot in shadow.slots:
        coupling.drop(slot)
    return Shadow()


UNKNOWN = Rule(unknown)
