"""Bindings of a layer's parameters to the units of its gates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from .. import functional as F
from ..errors import TaskError
from .active import CHOICES
from .gates import Gates
from .growth.grown import Spread
from .soft import kept_norm_gates, picked_gates

_PLAIN = (Tensor, nn.Parameter)


class Units:
    """The units that one axis of a parameter belongs to. An entry of 0 is always on."""

    def __init__(self, gates: Gates, numbers: np.ndarray) -> None:
        self.gates = gates
        self.numbers = np.asarray(numbers, dtype=np.int64)
        n = len(self.numbers)
        first = int(self.numbers[0]) if n else 0
        run = first > 0 and bool((self.numbers == np.arange(first, first + n)).all())
        self.run = slice(first - 1, first - 1 + n) if run else None
        self._known: tuple[Any, dict[Any, Any]] = (None, {})
        always = self.numbers == 0
        self.key = (first, n) if run else self.numbers.tobytes()  # the same for the same units
        self._index: dict[torch.device, tuple[Tensor, Tensor | None]] = {}
        if not run:
            index = torch.as_tensor(np.maximum(self.numbers - 1, 0))
            self._index[index.device] = (index, torch.as_tensor(always) if always.any() else None)

    def __len__(self) -> int:
        return len(self.numbers)

    def clear(self) -> None:
        """Drop the cached values of all tasks."""
        self._known = (None, {})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": (None, {})}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        if device not in self._index:
            index, always = next(iter(self._index.values()))
            self._index[device] = (index.to(device), None if always is None else always.to(device))
        return self._index[device]

    def gate(self) -> Tensor | None:
        """The active task's gate per entry, `[n]`; None for the plain model."""
        gates = self.gates
        task = gates.task
        return None if task is None else self.gate_of(task)

    def once(self, task: Any, key: Any, make: Callable[[], Any]) -> Any:
        """The result of `make` for a task's gates of these units, computed once for a sealed task. While gates are
        learned it is recomputed at each call, because the first backward frees its graph."""
        gates = self.gates
        if F.is_followed() or gates.is_open(task):
            return make()
        gates.look()
        now, known = (task, gates.epoch), self._known  # another thread may replace it meanwhile
        if known[0] != now:
            self._known = known = (now, {})
        if key not in known[1]:
            with torch.inference_mode(False), torch.no_grad():
                known[1][key] = make()
        return known[1][key]

    def gate_of(self, task: int) -> Tensor:
        """A task's gate per entry, `[n]`."""
        gate: Tensor = self.once(task, "gate", lambda: self._select(task))
        return gate

    def on(self, task: int) -> Tensor:
        """A task's hard gate per entry, `[n]` bool; a constant for a sealed task."""
        gates = self.gates
        on: Tensor = self.once(task, "on", lambda: self._of(gates.on(task)))
        return on

    def _select(self, task: int) -> Tensor:
        if self.run is not None:
            return self.gates.select(task, self.run)
        index, always = self._on(self.gates.masks.device)
        soft = self.gates.soft_now(task)
        if soft is not None:
            return soft.once((self.key, "gate"), lambda: picked_gates(soft.all, index, always))
        a = self.gates.select(task, index)
        return a if always is None else torch.where(always, 1.0, a)

    def norm_gates(self, task: Any, groups: int = 1) -> tuple[Tensor, Tensor]:
        """The factors of a norm over these units under a task (see `functional.norm_gates`)."""
        made: tuple[Tensor, Tensor]
        soft = self.gates.soft_now(task)
        if soft is None:
            made = self.once(task, ("norm", groups), lambda: F.norm_gates(self.gate_of(task), groups))
        else:
            made = soft.once((self.key, groups), lambda: kept_norm_gates(self.gate_of(task), groups))
        return made

    def share(self, task: int) -> float:
        """The share of entries that a task has on, at least `SMALLEST_GATE`."""
        if torch.compiler.is_compiling():
            return self._share_of_sealed(task, self.gates.sealings.get(task, 0))
        share: float = self.once(task, "share", lambda: self._share_of(self.on(task)))
        return share

    def _share_of(self, on: Tensor) -> float:
        try:
            return max(int(on.sum()) / max(len(on), 1), F.SMALLEST_GATE)
        except RuntimeError as error:  # each kind of tracing has its own subclass
            if type(on) is Tensor and not F.is_followed():
                raise
            raise TaskError(
                "how many units a task has on is a number that a norm over units needs, and it cannot be told where "
                "gates are traced or several at once (torch.export, make_fx, fake tensors, torch.vmap over states): "
                f"{type(error).__name__}; hatcl.extract_task(model, task).model is an ordinary module, of which all of "
                "that is possible"
            ) from error

    @torch.compiler.assume_constant_result
    def _share_of_sealed(self, task: int, sealings: int) -> float:
        """A constant in a compiled graph until the task is sealed again."""
        return self._share_of(self._of(self.gates.masks[task]))

    def hard(self, task: int) -> Tensor:
        """A task's sealed gate per entry, or the gate that sealing would give now, `[n]` bool."""
        return self._of(self.gates.hard(task))

    def _of(self, on: Tensor) -> Tensor:
        if self.run is not None:
            return on[self.run]
        index, always = self._on(on.device)
        return on[index] if always is None else on[index] | always


@dataclass
class UnitAxis:
    """One axis of a parameter: its units, and the shape in which their gates broadcast over the parameter's view."""

    units: Units
    shape: tuple[int, ...]
    owner: bool


@dataclass
class ParameterPlan:
    """How a parameter depends on the task.

    Attributes:
        view: the shape in which the axes index the parameter. axes: its owners and readers. fold: indices of the axes
            whose gates multiply it. copied: each task has its own copy. standardised: its rows are normalised before
            use; under a task, over the units that are on.
    """

    view: tuple[int, ...]
    axes: tuple[UnitAxis, ...] = ()
    fold: tuple[int, ...] = ()
    copied: bool = False
    standardised: bool = False

    @property
    def main(self) -> UnitAxis:
        """The owner's axis; if there is none, the first reader's."""
        return next((axis for axis in self.axes if axis.owner), self.axes[0])

    def over_units_on(self, value: Tensor, task: int) -> Tensor:
        """Change a weight so that a normalisation of its rows over all `N` elements equals one over the `n` elements
        whose units are on.

        These n are centred. The others, which are only multiplied by zeros, alternate between +s and -s, where `s` is
        the standard deviation of the n. So all N have the mean and variance of the n. (A single off element stays 0,
        and the variance is then `n / N` of that of the n.)
        """
        read = [axis for axis in self.axes if not axis.owner]
        if not read:
            return value
        rows = 2 if any(axis.shape[0] != 1 for axis in read) else 1  # in a grouped weight's view a row has two indices
        mask = value.new_ones((1,) * rows + value.shape[rows:])
        for axis in read:
            mask = mask * (axis.units.gate_of(task) != 0).to(value.dtype).view(axis.shape)
        return over_some(value, mask, rows)

    def live(self, task: int, device: torch.device) -> Tensor:
        """Which elements are live for a task: bool, broadcast over `view`."""
        mask: Tensor | None = None
        for axis in self.axes:
            on = axis.units.hard(task).view(axis.shape)
            mask = on.clone() if mask is None else mask & on
        return torch.ones((), dtype=torch.bool, device=device) if mask is None else mask


def over_some(value: Tensor, mask: Tensor, rows: int) -> Tensor:
    """`ParameterPlan.over_units_on` of a value whose first `rows` dimensions are rows. mask: 1 where the units that
    they read are on."""
    over = tuple(range(rows, value.dim()))
    on = mask.sum(over, keepdim=True).clamp(min=1.0)
    value = torch.where(mask > 0, value, 0.0)  # zero times another task's infinity would be NaN
    centred = (value - value.sum(over, keepdim=True) / on) * mask
    spread = (centred.square().sum(over, keepdim=True) / on).clamp(min=torch.finfo(value.dtype).tiny).sqrt()
    return centred + spread * _in_turn(1 - mask, rows)


def _in_turn(off: Tensor, rows: int) -> Tensor:
    """Alternating -1 and +1 where `off` is 1, with sum 0 and mean square 1 per row; an odd count ends in -sqrt(3/2),
    sqrt(3/2), 0."""
    flat = off.flatten(rows)
    rank, count = flat.cumsum(-1), flat.sum(-1, keepdim=True)
    sign = 1 - 2 * (rank % 2)
    ending = (rank > count - 3) & (count % 2 == 1)
    sign = torch.where(ending, sign * math.sqrt(1.5) * (rank < count), sign)
    return (flat * sign).view(off.shape)


@dataclass
class Binding:
    """The binding of a layer to gates.

    Attributes:
        others: gates of the units that the layer reads, if these are different gates (layers by hand).
        params: name -> plan. output: (dimension, units) whose gate multiplies the layer's output.
        norm: (dimension, units) over which a norm takes its statistics. dirty: the norm's input is not zero where units
            are off.
        buffers: buffers that a training forward writes; each task has its own.
        path: the module's path at conversion. shapes: the shapes of its parameters at conversion.
        formers: the binding before each growth of the network, for the tasks sealed by then. Only a former binding has
            `spreads`: the places of its tensors' elements in the current tensors, and `sizes`: the layer's former
            attributes.
    """

    gates: Gates
    others: tuple[Gates, ...] = ()
    params: dict[str, ParameterPlan] = field(default_factory=dict)
    output: tuple[int, Units] | None = None
    norm: tuple[int, Units] | None = None
    dirty: bool = False
    buffers: tuple[str, ...] = ()
    path: str = ""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    cache: dict[str, tuple[Any, Tensor, int, Tensor]] = field(default_factory=dict)
    now: tuple[Any, Any, dict[Any, Any]] = (None, None, {})
    formers: list[Binding] = field(default_factory=list)
    spreads: dict[str, Spread] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)

    def under(self, task: Any) -> Binding:
        """A task's binding: the one at its sealing, if the network has grown since."""
        return self.at(self.gates.stage_of(task)) if self.formers else self

    def at(self, stage: int) -> Binding:
        """The binding after `stage` growths."""
        return self.formers[stage] if stage < len(self.formers) else self

    def placed(self, name: str, x: Tensor) -> Tensor:
        """The part of a current tensor that existed before the network grew."""
        spread = self.spreads.get(name)
        return x if spread is None else spread.of_before(x)

    def key_of_kept(self, raw: Tensor, task: Any, held: bool = False) -> Any:
        """Everything that a sealed task's constant depends on. held: writes to `raw` are undone, so its version does
        not count. (The address detects replaced memory, as long as the former memory is kept alive.)"""
        every = (self.gates, *self.others)
        for g in every:
            g.look()
        epochs = [g.epoch for g in every]
        return (task, epochs, None if held else raw._version, raw.data_ptr(), raw.dtype)

    def of_now(self) -> dict[Any, Any] | None:
        """The cache for values that depend only on the gates and the active task, in evaluation without gradients. It
        is replaced as soon as either changes. None if a task is open, or may become open unnoticed.

        This call is most of the overhead of evaluation over the plain model, so it is written for speed."""
        if is_grad_enabled() or is_compiling():
            return None
        moment, saying, kept = self.now  # one read: another thread may replace it
        gates, said = self.gates, CHOICES.get().saying
        own = gates.__dict__
        masks, version = own["looked"]
        same = masks is not None and own["_buffers"]["masks"] is masks and masks._version == version
        if same and own["moment"] is moment and said is saying:
            origin = own["origin"]  # a copy that was averaged with its origin follows it
            if origin is None or origin.averaged(gates) is None:
                return kept
        now = gates.look()
        if self.others or F.is_followed() or not gates.is_quiet():
            return None
        self.now = (now, said, kept := {})
        return kept

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result of `make`, which depends only on the gates and the active task; computed once if it can be
        cached."""
        kept = self.of_now()
        if kept is None:
            return make()
        if key not in kept:
            if F.is_followed():
                return make()
            with torch.inference_mode(False), torch.no_grad():  # the result is also used outside inference mode
                kept[key] = make()
        return kept[key]

    def seen(self, name: str, kept: dict[Any, Any]) -> Tensor | None:
        """The cached result of an earlier read of a parameter or buffer; None if a new read could differ. kept: the
        result of `of_now`."""
        hit = kept.get(name)
        if hit is None:
            return None
        value, version, constant, place, name, raw, raw_version, alias, address = hit
        same = place.get(name) is raw and raw._version == raw_version and raw.data_ptr() == address
        return value if same and value._version == version and self.cache.get(name) is constant else None

    def read(
        self,
        name: str,
        place: dict[str, Any],
        kept: dict[Any, Any] | None,
        make: Callable[[], Tensor],
        key: str = "",
    ) -> Tensor:
        """The result of `make` for the tensor `name` of a module, cached for `seen`.

        Args:
            place: the dictionary that contains the tensor, so that a replacement is detected.
            kept: the result of `of_now`, called before the active task was read.
            key: the name under which `seen` finds it; default: `name`.
        """
        raw = place[name]
        if kept is None or type(raw) not in _PLAIN or raw.is_inference() or F.is_followed():
            return make()
        version, address = raw._version, raw.data_ptr()
        value = make()
        if type(value) in _PLAIN and not value.is_inference():
            # the alias keeps the memory alive; otherwise other values might get the same address
            constant, alias = self.cache.get(name), raw.detach()
            kept[key or name] = (value, value._version, constant, place, name, raw, version, alias, address)
        return value

    def plain_shape(self, name: str) -> tuple[int, ...]:
        """The expected shape of a parameter of the layer itself. The plain model's value of a parameter with a copy per
        task keeps its shape from conversion."""
        copied = (plan := self.params.get(name)) is not None and plan.copied
        return (self.at(0) if copied else self).shapes[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": {}, "now": (None, None, {})}

    def clear(self) -> None:
        """Drop the cached values of all tasks."""
        self.cache.clear()
        self.now = (None, None, {})
        for plan in self.params.values():
            for axis in plan.axes:
                axis.units.clear()
        for pair in (self.output, self.norm):
            if pair is not None:
                pair[1].clear()
        for former in self.formers:
            former.clear()


class TaskCopy(nn.Module):
    """One task's own parameters and running statistics of a layer, under the layer's own names."""
