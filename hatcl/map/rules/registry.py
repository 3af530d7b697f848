"""The table of rules by operation, and the arguments of a rule."""

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
        flat: all arguments in one list, including those within lists. spec: how to put them together again.
        shadows: the shadow of each of `flat`; None for constants and for anything that is not a tensor.
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
        """The operation's name without its library; an in-place operation has the name of the ordinary one."""
        return _operation(self.func)[0]

    @property
    def inplace(self) -> bool:
        """Does it write to its first argument? (`add_`)"""
        return _operation(self.func)[1]

    @cached_property
    def outs(self) -> list[Any]:
        """Its outputs as one list."""
        return tree_flatten(self.out)[0]

    def argument(self, at: int, name: str, default: Any) -> Any:
        """An argument given by position or by name."""
        return self.args[at] if len(self.args) > at else self.kwargs.get(name, default)

    def on(self, flat: Sequence[Any]) -> list[Any]:
        """The outputs of the same operation on other arguments."""
        args, kwargs = tree_unflatten(list(flat), self.spec)
        return tree_flatten(self.func(*args, **kwargs))[0]

    def on_labels(self, ids: Tensor) -> list[Tensor]:
        """The outputs of the same operation on the labels of its first argument. Other tensors (indices) are moved to
        the CPU, where the labels are."""
        rest = [v.cpu() if isinstance(v, Tensor) else v for v in self.flat[1:]]
        args, kwargs = tree_unflatten([ids, *rest], self.spec)
        return tree_flatten(apply_as_is(self.func, args, kwargs, [ids]))[0]


@cache
def _operation(func: Any) -> tuple[str, bool]:
    """An operation's name without its library and without the mark of an in-place operation, and whether it is
    in-place."""
    name: str = func._schema.name.partition("::")[2]
    inplace = name.endswith("_") and not name.startswith("__")
    return name.removesuffix("_") if inplace else name, inplace


# One shadow for every output, or one each (None: that output carries no units); None alone: no output carries units.
Moved = Shadow | Sequence[Shadow | None] | None


@dataclass(frozen=True)
class Rule:
    """apply: couples the labels that meet in an operation, and returns the shadows of its outputs. reads: whether the
    operation reads its inputs gated, so that their pending folds act."""

    apply: Callable[[Call, Coupling], Moved]
    reads: bool = True


TRACE_RULES: dict[str | torch.Tag, Rule] = {}


def rule(
    *operations: str | torch.Tag, reads: bool = True
) -> Callable[[Callable[[Call, Coupling], Moved]], Callable[[Call, Coupling], Moved]]:
    """Register a rule: the effect of some operations on units.

    The decorated function takes the `Call` and the trace's `Coupling`. It couples labels with the methods of `Coupling`
    and returns the shadow of the outputs. It replaces an earlier rule for the same operation.

    Args:
        operations: names without their library (`"mm"` for `aten::mm`; `"relu"` includes `relu_`), or torch's tags for
            all operations that no rule names.
        reads: False if the operation only moves values, or if another operation computes with them, so that this later
            operation can still take over a fold.

    Raises:
        ConfigError: no operation is named, or a name includes its library.

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
    """The shadows of an operation's outputs, by the rule for its name, else for one of its tags, else by `unknown`."""
    found = TRACE_RULES.get(call.name) or next((TRACE_RULES[t] for t in call.func.tags if t in TRACE_RULES), UNKNOWN)
    if found.reads:
        for shadow in call.shadows:  # an operation reads the values of all its arguments gated
            coupling.commit(shadow)
    return found.apply(call, coupling)


def unknown(call: Call, coupling: Coupling) -> Shadow:
    """The rule for unknown operations: the output belongs to no unit, and parameters get a copy per task."""
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
    """Give each of these parameters a copy per task, because the trace cannot follow their units here."""
    for slot in shadow.slots:
        coupling.drop(slot)
    return Shadow()


UNKNOWN = Rule(unknown)
