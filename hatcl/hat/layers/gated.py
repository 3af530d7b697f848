"""`HATLayer`: the mixin that makes a module task-aware.

A HAT layer is a subclass of the class that it replaces. Its parameters are stored as before (same names, same
`state_dict` keys). Reading one as an attribute gives the active task's value: with the gate folded in, or the task's
own copy. So the module's own forward, and any other code that uses `layer.weight`, computes the gated model unchanged.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ... import functional as F
from ...config import HATConfig
from ...errors import ConfigError
from ...shards import is_shard
from ..binding import Binding, ParameterPlan, TaskCopy, UnitAxis, Units
from ..gates import Gates, row
from ..registry import Derived, derive, register_layer
from ..soft import SoftGates


def task_parameter(name: str) -> property:
    """A property that gives the active task's value of a parameter."""

    def get(self: Any) -> Tensor | None:
        hat: Binding | None = self.__dict__.get("_hat")
        kept = None if hat is None else hat.of_now()
        if hat is not None and kept is not None and (seen := hat.seen(name, kept)) is not None:
            return seen
        params = self.__dict__["_parameters"]
        if name not in params:
            return _inherited(self, name)
        raw = params[name]
        if raw is None or hat is None:
            return raw
        plan = hat.params.get(name)
        if plan is None or (type(raw) is not nn.Parameter and is_shard(raw)):
            return raw  # no layer computes with a shard; `fully_shard` manages it
        task = hat.gates.task
        if kept is None and isinstance(task, int):  # the path of every step, written for speed
            own = self._hat_copy(task)._parameters if plan.copied else params
            soft = hat.gates.soft_now(task) if plan.fold and not hat.formers else None
            if soft is not None:
                return self._hat_by_folds(name, own[name], plan, task, soft)
            return self._hat_folded(name, own[name], task)
        if task is None:
            bare = plan.copied or not hat.formers
            return hat.read(name, params, kept, lambda: raw if bare else hat.under(None).placed(name, raw))
        if plan.copied:
            if isinstance(task, Tensor):
                return self._hat_folded(name, self._hat_own("_parameters", name, task), task)
            params = self._hat_copy(task)._parameters
        return hat.read(name, params, kept, lambda: self._hat_folded(name, params[name], task))

    return property(get)


def task_buffer(name: str) -> property:
    """A property that gives the active task's running statistics. For a sealed task they are copies, so that a write (a
    forward in training mode, a `zero_()`) does not reach the task's own."""

    def get(self: Any) -> Tensor | None:
        hat: Binding | None = self.__dict__.get("_hat")
        kept = None if hat is None or self.training else hat.of_now()
        if hat is not None and kept is not None and (seen := hat.seen(name, kept)) is not None:
            return seen
        buffers = self.__dict__["_buffers"]
        if name not in buffers:
            return _inherited(self, name)
        task = None if hat is None or buffers[name] is None else hat.gates.task
        if hat is None or task is None:
            return buffers[name]
        value = self._hat_own("_buffers", name, task, buffers[name])
        if hat.gates.is_open(task):
            return value
        if self.training or name in hat.buffers:  # the forward itself writes to it
            return value.clone()
        place = buffers if value is buffers[name] else self._hat_copy(task)._buffers
        return hat.read(name, place, kept, lambda: self._hat_constant(name, value, task, value.clone))

    return property(get)


def task_size(name: str) -> property:
    """A property for a size. If the active task was sealed before the network grew, it gives the former size."""

    def get(self: Any) -> Any:
        hat: Binding | None = self.__dict__.get("_hat")
        sizes = hat.under(hat.gates.task).sizes if hat is not None else {}
        if name in sizes:
            return sizes[name]
        return self.__dict__[name] if name in self.__dict__ else _inherited(self, name)

    def put(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return property(get, put)


def shared_buffer(name: str) -> property:
    """A property for a buffer that carries units and is shared by all tasks. If the active task was sealed before the
    network grew, it gives only the former entries."""

    def get(self: Any) -> Tensor | None:
        b = self.__dict__["_buffers"][name]
        hat: Binding | None = self.__dict__.get("_hat")
        return b if hat is None or b is None else hat.under(hat.gates.task).placed(name, b)

    return property(get)


def _inherited(module: Any, name: str) -> Any:
    """An attribute that another base class computes (torch's parametrizations), else the result of
    `nn.Module.__getattr__`."""
    for cls in type(module).__mro__:
        found = cls.__dict__.get(name)
        if isinstance(found, property) and found.fget is not None and found.fget.__module__ != __name__:
            return found.fget(module)
    return nn.Module.__getattr__(module, name)


def task_class(
    layer: type, cls: type, names: tuple[str, ...], buffers: tuple[str, ...] = (), more: tuple[Any, ...] = ()
) -> type:
    """The class that a converted instance of `cls` gets: `layer` in front of `cls`, with these parameters and buffers
    as properties per task. more: further attributes, (name, function that makes the property)."""
    return derive(layer, cls, (*((n, task_parameter) for n in names), *((n, task_buffer) for n in buffers), *more))


@register_layer(nn.Module)
class HATLayer(Derived):
    """Mixin that makes a module task-aware. It is also the layer for unregistered modules with parameters of their own.

    By hand: `HATLinear(8, 16, num_tasks=3)` has its own gates over its output units; `reads=layer` names the layer
    whose units its input carries (without it, freezing depends on the output unit alone); `units=layer` shares that
    layer's gates.

    Class attributes (for authors of further layers):
        hat_owner_dims / hat_reader_dims: parameter name -> dimension written / read.
        hat_output_dim: the dimension of the output that carries the units.
        hat_copied / hat_task_buffers: the parameters / buffers with a copy per task.
        hat_fold_output: multiply the output by the gate instead of the weight.
        hat_direct: the layer contracts its parameters with the input unchanged, so that zeros in elements that a task
            does not use change nothing.
        hat_always: also convert instances without parameters or buffers.
        hat_fold_lasts: the result of `_hat_fold_of` for soft gates has a graph that backward does not free.
    """

    hat_owner_dims: ClassVar[Mapping[str, int]] = {}
    hat_reader_dims: ClassVar[Mapping[str, int]] = {}
    hat_output_dim: ClassVar[int] = 1
    hat_copied: ClassVar[tuple[str, ...]] = ()
    hat_task_buffers: ClassVar[tuple[str, ...]] = ()
    hat_fold_output: ClassVar[bool] = False
    hat_direct: ClassVar[bool] = False
    hat_always: ClassVar[bool] = False
    hat_fold_lasts: ClassVar[bool] = False
    hat_is_norm: ClassVar[bool] = False
    _hat: Binding
    hat_tasks: Any

    def __init__(
        self,
        *args: Any,
        num_tasks: int | None = None,
        units: Any = None,
        reads: Any = None,
        config: HATConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if num_tasks is not None or units is not None or reads is not None:
            self._hat_bind_by_hand(num_tasks, units, reads, config)

    # ---- by hand -----------------------------------------------------------------------------------------------

    def _hat_width(self) -> int:
        name, dim = next(iter(self.hat_owner_dims.items()))
        return int(self._parameters[name].shape[dim])  # type: ignore[attr-defined]

    def _hat_bind_by_hand(self, num_tasks: int | None, units: Any, reads: Any, config: HATConfig | None) -> None:
        source = units_of(units) if units is not None else None
        read = units_of(reads) if reads is not None else None
        if source is None and self.hat_owner_dims and not self.hat_is_norm:
            config = (config or HATConfig()).replace(num_tasks=num_tasks or (read.gates.num_tasks if read else 1))
            self.gates = Gates(self._hat_width(), config)
            source = Units(self.gates, np.arange(1, self._hat_width() + 1))
        some = source or read
        if some is None:
            self.gates = Gates(0, (config or HATConfig()).replace(num_tasks=num_tasks or 1))
        gates = some.gates if some is not None else self.gates
        hat = Binding(gates, (read.gates,) if read is not None and read.gates is not gates else ())
        for name, p in self._parameters.items():  # type: ignore[attr-defined]
            if p is None:
                continue
            axes: list[UnitAxis] = []
            fold: tuple[int, ...] = ()
            for dims, which, owner in ((self.hat_owner_dims, source, True), (self.hat_reader_dims, read, False)):
                if name in dims and which is not None:
                    self._hat_check_width(name, p, dims[name], which)
                    shape = [1] * p.dim()
                    shape[dims[name]] = -1
                    if owner:
                        fold = (len(axes),)
                    axes.append(UnitAxis(which, tuple(shape), owner))
            hat.params[name] = ParameterPlan(tuple(p.shape), tuple(axes), fold, name in self.hat_copied)
            hat.shapes[name] = tuple(p.shape)
        self._hat_attach(hat, num_tasks or hat.gates.num_tasks)
        if source is not None:
            self._hat.norm = (self.hat_output_dim, source) if self.hat_is_norm else None

    def _hat_check_width(self, name: str, p: Tensor, dim: int, units: Units) -> None:
        if p.shape[dim] != len(units):
            side = "output" if dim == self.hat_owner_dims.get(name) else "input"
            raise ConfigError(
                f"{type(self).__name__}.{name}: gate has {len(units)} units, {side} has {p.shape[dim]}; "
                f"pass {'units' if side == 'output' else 'reads'}= a layer with {p.shape[dim]} output units"
            )

    # ---- by the converter --------------------------------------------------------------------------------------

    def _hat_attach(self, hat: Binding, num_tasks: int) -> None:
        """Bind to gates and make the task copies, which start with the plain values."""
        self.__dict__["_hat"] = hat
        hat.params = {n: p for n, p in hat.params.items() if p.axes or p.copied or p.fold}
        if self._hat_copied_names() or self._hat_copied_buffers():
            self.hat_tasks = nn.ModuleList(self._hat_new_copy() for _ in range(num_tasks))

    def _hat_own(self, kind: str, name: str, task: Any, otherwise: Any = None) -> Any:
        """A task's own parameter or buffer."""
        if not isinstance(task, Tensor):
            return self._hat_copy(task).__dict__[kind].get(name, otherwise)
        every = [getattr(own, kind).get(name, otherwise) for own in self.hat_tasks]
        return row(torch.stack(every), task)

    def _hat_copy(self, task: int) -> TaskCopy:
        copies = self.__dict__["_modules"]["hat_tasks"]._modules  # indexing a ModuleList would compute its length
        copy: TaskCopy = copies[str(task)]
        return copy

    def _hat_copied_names(self) -> list[str]:
        return [n for n, p in self._hat.params.items() if p.copied]

    def _hat_copied_buffers(self) -> list[str]:
        names = dict.fromkeys((*self.hat_task_buffers, *self._hat.buffers))
        return [n for n in names if self._buffers.get(n) is not None]  # type: ignore[attr-defined]

    def _hat_new_copy(self) -> TaskCopy:
        """A task's copy, with the plain model's values."""
        copy = TaskCopy()
        for name in self._hat_copied_names():
            p = self._parameters[name]  # type: ignore[attr-defined]
            value = self._hat_grown(name, p.detach(), 0)
            copy.register_parameter(name, nn.Parameter(value, requires_grad=p.requires_grad))
        for name in self._hat_copied_buffers():
            copy.register_buffer(name, self._hat_grown(name, self._buffers[name], 0))  # type: ignore[attr-defined]
        return copy

    def _hat_grown(self, name: str, value: Tensor, stage: int) -> Tensor:
        """A copy of a tensor from an earlier stage, in the current size. The layer's initialiser draws new elements of
        a parameter; new elements of a buffer equal those of the unit that they follow."""
        spread = self._hat.at(stage).spreads.get(name)
        if spread is None:
            return value.clone()
        if name not in self._hat.shapes:
            return spread.grown(value)
        shape = spread.shape_of(value, self._hat.shapes[name])
        return spread.grown(value, self._hat_redrawn({name: shape})[name])

    def _hat_redrawn(self, shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, Tensor]:
        """Fresh values for the parameters from the layer's own initialiser; without one, normal numbers with the
        current mean and standard deviation. shapes: new shapes, for parameters that change theirs."""
        bare = nn.Module.__new__(getattr(type(self), "_hat_source", (None, type(self)))[1])
        params = {n: p for n, p in self._parameters.items() if p is not None}  # type: ignore[attr-defined]

        new = shapes or {}
        state = {k: v for k, v in self.__dict__.items() if k not in ("_hat", "_parameters", "_buffers", "_modules")}
        fresh = {n: nn.Parameter(_drawn(p.detach(), tuple(new.get(n, p.shape)))) for n, p in params.items()}
        buffers = {n: b if b is None else b.clone() for n, b in self._buffers.items()}  # type: ignore[attr-defined]
        absent = {n: None for n, p in self._parameters.items() if p is None}  # type: ignore[attr-defined]
        bare.__dict__.update({**state, "_parameters": {**fresh, **absent}, "_buffers": buffers, "_modules": {}})
        reset = getattr(bare, "reset_parameters", getattr(bare, "_reset_parameters", None))
        if callable(reset):
            with contextlib.suppress(AttributeError):  # an initialiser may also reset absent attributes
                reset()
        return {n: bare._parameters[n].detach() for n in params}

    @classmethod
    def hat_sizes(cls, shapes: Mapping[str, Sequence[int]], groups: int) -> dict[str, int]:
        """The plain layer's size attributes for parameters of these shapes."""
        return {}

    # ---- at work -----------------------------------------------------------------------------------------------

    @property
    def _hat_active(self) -> Binding | None:
        """The binding while a task is active, else None (the plain model)."""
        hat: Binding | None = self.__dict__.get("_hat")
        task = None if hat is None else hat.gates.task
        return None if hat is None or task is None else hat.under(task)

    def _hat_folded(self, name: str, raw: Tensor, task: int) -> Tensor:
        """A task's value of `raw`. Soft gates: multiplied by the gates along the folded axes. Hard gates: the task's
        live elements, and zeros elsewhere."""
        hat: Binding = self._hat.under(task)
        plan, gates = hat.params[name], hat.gates
        if not self._hat.formers and gates.is_soft(task) and not torch.compiler.is_compiling():  # the usual step
            return self._hat_by_folds(name, raw, plan, task) if plan.fold or plan.standardised else raw
        if not plan.axes and not plan.standardised and not plan.copied:
            return raw
        changing = torch.is_grad_enabled() or gates.is_open(task) or F.is_followed()
        soft = not gates.cut or (changing and gates.is_soft(task))
        if not plan.fold and not plan.standardised and (soft or plan.copied or hat.output is not None):
            if name in hat.spreads and not plan.copied:
                if changing:
                    return hat.placed(name, raw)
                return self._hat_constant(name, raw, task, lambda: hat.placed(name, raw))
            # an embedding is not cut as a table: only the looked-up rows are. A head is returned as a copy, so that a
            # write to it does not reach the task's own
            held = (gates.lock is not None or plan.copied) and not changing and not soft
            if held:
                return self._hat_constant(name, raw, task, raw.clone)
            # torch chooses kernels by whether a weight requires a gradient, so this must match the cached value
            return raw if changing else raw.detach()
        if soft:
            return self._hat_by_folds(name, raw, plan, task)
        if changing:
            with _unmoved(gates):
                return self._hat_cut(name, raw, plan, task)
        return self._hat_constant(name, raw, task, lambda: self._hat_cut(name, raw, plan, task))

    def _hat_contracted(self, plan: ParameterPlan) -> bool:
        """Is a shared parameter contracted with its input unchanged, so that zeros in off elements change nothing?"""
        owned = all(i in plan.fold for i, axis in enumerate(plan.axes) if axis.owner)
        return (self.hat_direct or owned) and self._hat.output is None and not plan.standardised

    def _hat_by_folds(
        self, name: str, raw: Tensor, plan: ParameterPlan, task: int, soft: SoftGates | None = None
    ) -> Tensor:
        if self._hat.formers and not plan.copied:
            raw = self._hat.under(task).placed(name, raw)
        same = raw.shape == plan.view
        value = raw if same or raw.numel() != math.prod(plan.view) else raw.view(plan.view)
        if plan.standardised:
            value = plan.over_units_on(value, task)
        for i in plan.fold:
            value = value * self._hat_factor(name, plan.axes[i], task, value.dtype, soft)
        return value if same else value.view(raw.shape)

    def _hat_factor(
        self, name: str, axis: UnitAxis, task: int, dtype: torch.dtype, soft: SoftGates | None = None
    ) -> Tensor:
        """A parameter's factor along an axis, in the axis's shape and this dtype. soft: the soft gates that may cache
        it."""
        kind = self.hat_fold_key(name)

        def make() -> Tensor:
            factor = self._hat_fold_of(name, axis.units, task).to(dtype)
            return factor if len(axis.shape) == 1 else factor.view(axis.shape)

        units, key = axis.units, (kind, axis.shape, dtype)
        factor: Tensor
        if soft is not None and units.gates is self._hat.gates and (kind is None or self.hat_fold_lasts):
            factor = soft.once((units.key, *key), make)
        else:
            factor = units.once(task, key, make)
        return factor

    def _hat_cut(self, name: str, raw: Tensor, plan: ParameterPlan, task: int) -> Tensor:
        """Set elements to zero where the task is off. A product would not do: `0 * inf` is NaN and `0 * -1` is -0. If
        zeros might be divided by their norm (a weight normalised before use), other tasks' elements become ones."""
        folded = [plan.axes[i] for i in plan.fold]
        raw = raw if plan.copied else self._hat.under(task).placed(name, raw)
        value = raw.view(plan.view) if raw.numel() == math.prod(plan.view) else raw
        if not plan.copied:
            contracted = self._hat_contracted(plan)
            value = _where_on(plan.axes, task, value, 0.0 if contracted else 1.0)
            folded = [] if contracted else folded
        if plan.standardised:
            value = plan.over_units_on(value, task)
        if type(self).hat_fold_gate is not HATLayer.hat_fold_gate:
            for i in plan.fold:
                value = value * self._hat_factor(name, plan.axes[i], task, value.dtype)
        return _where_on(folded, task, value, 0.0).view(raw.shape)

    def _hat_constant(self, name: str, raw: Tensor, task: int, make: Callable[[], Tensor]) -> Tensor:
        """The result of `make`, cached until the task, its gates or `raw` change. The cached object itself is returned,
        so that a write to it is detected and discarded."""
        hat: Binding = self._hat
        if F.is_followed() or hat.gates.sharded or raw.is_inference():  # torch does not count writes to such a tensor
            return make()
        # while another task is learned the guard holds `raw`: it undoes an optimizer's writes after the step
        c = hat.gates.config
        held = hat.gates.lock is not None and c.locked is None and c.protection == "exact"
        key = hat.key_of_kept(raw, task, held)
        hit = hat.cache.get(name)  # one read: another thread may replace it
        if hit is not None and hit[0] == key:
            if hit[1]._version == hit[2]:
                return hit[1]
            warnings.warn(
                f"{hat.path or type(self).__name__}.{name}: something wrote to the value that sealed task {task} "
                "computes with; the write is undone, sealed tasks do not change",
                stacklevel=4,
            )
        with torch.inference_mode(False), torch.no_grad(), _unmoved(hat.gates):
            # detach at once; otherwise the first forward would use other kernels than later ones, which use the cache
            value = make().detach()
        hat.cache[name] = (key, value, value._version, raw.detach())
        return value

    def hat_fold_gate(self, name: str, gate: Tensor) -> Tensor:
        """The factor that multiplies a parameter whose gate is `gate`."""
        return gate

    def _hat_fold_of(self, name: str, units: Units, task: Any) -> Tensor:
        """The factor that multiplies a parameter along these units under a task."""
        return self.hat_fold_gate(name, units.gate_of(task))

    def hat_fold_key(self, name: str) -> Any:
        """A cache key: layers with the same gate and key have the same `hat_fold_gate`. None: it is the gate itself."""
        return None if type(self).hat_fold_gate is HATLayer.hat_fold_gate else (self, name)

    def _hat_gate_of_rows(self, name: str) -> Units | None:
        """While gates are soft: the units whose gate is folded into the weight's rows and the bias, if no other gate is
        folded; else None. The layer's output may then be multiplied by this gate instead."""
        hat: Binding | None = self.__dict__.get("_hat")
        if hat is None or hat.output is not None or hat.formers or not hat.gates.is_soft(hat.gates.task):
            return None
        params = self._parameters  # type: ignore[attr-defined]
        plan, raw, bias = hat.params.get(name), params.get(name), params.get("bias")  # a parametrized one is absent
        if plan is None or raw is None or plan.copied or plan.standardised or len(plan.fold) != 1:
            return None
        of_bias = hat.params.get("bias")
        if bias is not None and (of_bias is None or of_bias.copied or not of_bias.fold):
            return None
        owner = plan.axes[plan.fold[0]]
        whole = owner.owner and len(owner.units) == raw.shape[0]
        return owner.units if whole else None

    def _hat_gate_output(self, out: Tensor) -> Tensor:
        hat: Binding | None = self.__dict__.get("_hat")
        if hat is None or hat.output is None:
            return out
        gated: Tensor = hat.once(("output", out.dim(), out.dtype), lambda: self._hat_output_gating(out))(out)
        return gated

    def _hat_output_gating(self, out: Tensor) -> Callable[[Tensor], Tensor]:
        bound = self._hat.under(self._hat.gates.task).output
        assert bound is not None
        return gating(bound[1], bound[0], out.dim(), out.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and name in self.__dict__.get("_parameters", ()):
            # torch would first read the attribute, which would compute the folded value
            self.__dict__["_parameters"][name] = value
            return
        if name not in self.__dict__.get("_buffers", ()):
            super().__setattr__(name, value)
            return
        hat = self._hat_active
        if hat is None or name not in self._hat_copied_buffers():
            super().__setattr__(name, value)
        elif hat.gates.is_open(task := hat.gates.task):  # a sealed task's statistics stay as they are
            self.hat_tasks[task]._buffers[name] = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Cast or move the layer, and clear the cache, which would keep the former memory alive."""
        out = super()._apply(fn, recurse)  # type: ignore[misc]
        hat: Binding | None = self.__dict__.get("_hat")
        if hat is not None:
            hat.clear()
        return out


def _drawn(p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers with the mean and spread of `p`."""
    if p.is_complex():
        return torch.complex(_drawn(p.real, shape), _drawn(p.imag, shape))
    return p.new_empty(shape).normal_(float(p.mean()), float(p.std()) if p.numel() > 1 else 0.02)


def _where_on(axes: Sequence[UnitAxis], task: int, value: Tensor, otherwise: float) -> Tensor:
    """`value` where a task has all axes on, else `otherwise`."""
    live: Tensor | None = None
    for axis in axes:
        on = axis.units.on(task).view(axis.shape)
        live = on if live is None else live & on
    if live is None:
        return value
    if value.is_contiguous():
        return torch.where(live, value, otherwise)
    # `where` uses the memory layout of `live`, and then torch would choose other kernels than for the folds
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda d: -strides[d])
    back = sorted(range(value.dim()), key=order.__getitem__)
    return torch.where(live.permute(order).contiguous(), value.permute(order), otherwise).permute(back)


def _unmoved(gates: Gates) -> contextlib.AbstractContextManager[Any]:
    """Inside the block, no guarded optimizer is in the middle of a step."""
    lock: contextlib.AbstractContextManager[Any] | None = gates.lock
    return contextlib.nullcontext() if lock is None or torch.compiler.is_compiling() else lock


def multiply(x: Tensor, units: Units, dim: int) -> Tensor:
    """`x` times the active gates along `dim`; exactly zero where a hard gate is off, even for inf or NaN."""
    return gating(units, dim, x.dim(), x.dtype)(x)


def gating(units: Units, dim: int, ndim: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A function that applies the active gates along `dim` to a tensor with `ndim` dimensions of this dtype."""
    gates = units.gates
    task = gates.task
    if task is None:
        return unchanged
    shape = [1] * ndim
    shape[dim] = -1
    if gates.is_soft(task) or not gates.cut:
        gate = units.gate_of(task).to(dtype).view(shape)
        return lambda x: x * gate
    on = units.on(task).view(shape)
    if torch.is_grad_enabled() or F.is_followed() or isinstance(task, Tensor) or dtype.is_complex:
        return lambda x: torch.where(on, x, 0.0)
    bits = units.once(task, ("bits", dtype), lambda: F.bits_where(units.on(task), dtype)).view(shape)

    def by_bits(x: Tensor) -> Tensor:
        """Bit-equal to `where` and ten times as fast on a CPU, without derivatives."""
        if type(x) is not Tensor or F.is_followed():
            return torch.where(on, x, 0.0)
        return x.resolve_neg().view(bits.dtype).bitwise_and(bits).view(dtype)

    return by_bits


def unchanged(x: Tensor) -> Tensor:
    return x


def units_of(layer: Any) -> Units:
    """The units that a hand-built layer writes."""
    if isinstance(layer, Units):
        return layer
    hat: Binding | None = getattr(layer, "_hat", None)
    if hat is not None:
        if hat.norm is not None:
            return hat.norm[1]
        for plan in hat.params.values():
            for axis in plan.axes:
                if axis.owner:
                    return axis.units
        if hat.output is not None:
            return hat.output[1]
    raise ConfigError(f"{type(layer).__name__} has no units; pass a HAT layer that has gates (num_tasks=...)")
