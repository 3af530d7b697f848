"""Norms. Each task has its own affine parameters and running statistics; statistics over units use only the units that
are on; the gate multiplies the output."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from timm.layers import norm as timm_norm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ... import functional as F
from ..binding import Binding, Units
from ..registry import register_layer
from .gated import HATLayer, gating, multiply, task_buffer, task_parameter, unchanged

log = logging.getLogger(__name__)
_Around = Callable[[Tensor], Tensor]


class _Norm(HATLayer):
    hat_is_norm: ClassVar[bool] = True
    hat_owner_dims: ClassVar[Mapping[str, int]] = {"weight": 0, "bias": 0}
    hat_copied: ClassVar[tuple[str, ...]] = ("weight", "bias")
    weight = task_parameter("weight")
    bias = task_parameter("bias")

    def _hat_has_affine(self) -> bool:
        return self._parameters.get("weight") is not None  # type: ignore[attr-defined]


class _PerChannel(_Norm):
    """Norms with statistics per channel: no statistic mixes units, and the affine parameters carry the gate."""

    hat_task_buffers: ClassVar[tuple[str, ...]] = ("running_mean", "running_var", "num_batches_tracked")
    running_mean = task_buffer("running_mean")
    running_var = task_buffer("running_var")
    num_batches_tracked = task_buffer("num_batches_tracked")

    def reset_running_stats(self) -> None:
        """Reset the active task's statistics unless it is sealed (`torch.optim.swa_utils.update_bn` calls this)."""
        hat: Binding | None = self.__dict__.get("_hat")
        task = None if hat is None else hat.gates.task
        if hat is None or task is None or hat.gates.is_open(task):
            super().reset_running_stats()  # type: ignore[misc]
        else:
            warnings.warn(
                f"{hat.path or type(self).__name__}: the running statistics of sealed task {task} were not reset; "
                "sealed tasks do not change. Reset them while the task is learned, or forget it (hatcl.forget_task)",
                stacklevel=2,
            )

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)  # type: ignore[misc]
        hat = None if self._hat_has_affine() else self._hat_active
        return out if hat is None or hat.norm is None else multiply(out, hat.norm[1], hat.norm[0])


@register_layer(nn.BatchNorm1d)
class TaskIndexedBatchNorm1d(_PerChannel, nn.BatchNorm1d):
    """Batch norm over `[B, U]` or `[B, U, L]`; per task: weight, bias, running mean and variance."""


@register_layer(nn.BatchNorm2d)
class TaskIndexedBatchNorm2d(_PerChannel, nn.BatchNorm2d):
    """Batch norm over `[B, U, H, W]`; per task: weight, bias, running mean and variance."""


@register_layer(nn.BatchNorm3d)
class TaskIndexedBatchNorm3d(_PerChannel, nn.BatchNorm3d):
    """Batch norm over `[B, U, D, H, W]`; per task: weight, bias, running mean and variance."""


@register_layer(_BatchNorm)
class _TaskIndexedBatchNorm(_PerChannel):
    """Any other batch norm (SyncBatchNorm)."""


@register_layer(nn.InstanceNorm1d)
class TaskIndexedInstanceNorm1d(_PerChannel, nn.InstanceNorm1d):
    """Instance norm over `[B, U, L]`."""


@register_layer(nn.InstanceNorm2d)
class TaskIndexedInstanceNorm2d(_PerChannel, nn.InstanceNorm2d):
    """Instance norm over `[B, U, H, W]`."""


@register_layer(nn.InstanceNorm3d)
class TaskIndexedInstanceNorm3d(_PerChannel, nn.InstanceNorm3d):
    """Instance norm over `[B, U, D, H, W]`."""


@register_layer(_InstanceNorm)
class _TaskIndexedInstanceNorm(_PerChannel):
    """Any other instance norm."""


class _Crossing(_Norm):
    """Norms whose statistics mix units: the input and the result of the plain norm are both adjusted."""

    hat_fold_lasts: ClassVar[bool] = True

    def _hat_no_share(self, hat: Binding, task: Any) -> bool:
        """True if the share of units on is not known as a number: for soft gates, for gates that may change between
        steps of a compiled graph, and for several tasks at once."""
        if isinstance(task, Tensor):
            return True
        return hat.gates.is_soft(task) or (torch.compiler.is_compiling() and hat.gates.is_open(task))

    def _hat_around(self, ndim: int, dtype: torch.dtype) -> tuple[_Around, _Around]:
        """Two functions for inputs with `ndim` dimensions: one changes the input of the plain norm, the other its
        result."""
        raise NotImplementedError

    def _hat_groups(self) -> int:
        """The number of groups of units with separate statistics."""
        return 1

    def hat_fold_gate(self, name: str, gate: Tensor) -> Tensor:
        return gate if name == "bias" else F.norm_gates(gate, self._hat_groups())[0]

    def _hat_fold_of(self, name: str, units: Units, task: Any) -> Tensor:
        return units.gate_of(task) if name == "bias" else units.norm_gates(task, self._hat_groups())[0]

    def _hat_after(self, gate: Callable[[], Tensor], dim: int) -> _Around:
        """A function that applies the gate along `dim`, if the norm has no weight to carry it."""
        if self._hat_has_affine():
            return unchanged
        fold = self.hat_fold_gate("weight", gate())
        return lambda out: out * along(fold, out, dim)

    def forward(self, x: Tensor) -> Tensor:
        hat: Binding | None = self.__dict__.get("_hat")
        if hat is None:
            return super().forward(x)  # type: ignore[misc]
        before, after = hat.once(("norm", x.dim(), x.dtype), lambda: self._hat_around(x.dim(), x.dtype))
        out: Tensor = after(super().forward(before(x)))  # type: ignore[misc]
        return out


class _OverUnits(_Crossing):
    """Norms over units. Let `n = sum a` of `U` units be on, and the input be centred over those units (off units zero).
    Then the norm over all U differs from the norm over the n by the factor `sqrt(n / U)`, which is folded into the
    weight, and by eps, which is scaled by `n / U` once gates are hard. (With soft gates eps is unchanged, so that no
    step waits for n.)

    Deviation: HAT (Serra et al. 2018) has no norms over units, and HAT-CL normalises over all of them.
    """

    hat_centred: ClassVar[bool] = True

    def _hat_dims(self) -> tuple[int, ...]:
        return tuple(range(-len(self.normalized_shape), 0))  # type: ignore[attr-defined]

    def hat_fold_key(self, name: str) -> Any:
        return None if name == "bias" else _OverUnits

    @property
    def eps(self) -> Any:
        """The plain eps, times n / U where a sealed task is active."""
        plain, hat = self.__dict__["eps"], self.__dict__.get("_hat")
        return plain if plain is None or hat is None else hat.once(("eps", plain), lambda: self._hat_eps(plain))

    @eps.setter
    def eps(self, value: Any) -> None:
        self.__dict__["eps"] = value

    def _hat_eps(self, plain: float) -> float:
        hat = self._hat_active
        if hat is None or hat.norm is None:
            return plain
        task = hat.gates.task
        return plain if task is None or self._hat_no_share(hat, task) else plain * hat.norm[1].share(task)

    def _hat_around(self, ndim: int, dtype: torch.dtype) -> tuple[_Around, _Around]:
        hat = self._hat_active
        if hat is None or hat.norm is None:
            return unchanged, self._hat_gate_output
        dim, units = hat.norm
        dim = dim if dim < ndim else -1  # `torch.vmap` removes leading dimensions
        task = hat.gates.task
        assert task is not None
        gate = units.gate_of(task).to(dtype)
        share = None if self._hat_no_share(hat, task) else units.share(task)
        clean = gating(units, dim, ndim, dtype) if hat.dirty else unchanged
        over = self._hat_dims() if len(self._hat_dims()) > 1 else (dim,)
        weight = units.norm_gates(task)[1].to(dtype) if share is None and self.hat_centred else None

        def before(x: Tensor) -> Tensor:
            x = clean(x)
            if self.hat_centred:
                x = F.centre(x, gate, dim, over, share, weight)
            return x / share_on(gate).sqrt() if isinstance(task, Tensor) else x  # the same as scaling eps by n / U

        # with all units on it is the plain norm
        return (unchanged if share == 1.0 else before), self._hat_after(lambda: gate, dim)


@register_layer(nn.LayerNorm)
class TaskIndexedLayerNorm(_OverUnits, nn.LayerNorm):
    """Layer norm over the units that are on; per task: weight and bias. Shapes: x `[..., U]`."""

    hat_output_dim: ClassVar[int] = -1


class _RootMeanSquare(_OverUnits):
    hat_centred: ClassVar[bool] = False
    hat_output_dim: ClassVar[int] = -1


@register_layer(nn.RMSNorm)
class TaskIndexedRMSNorm(_RootMeanSquare, nn.RMSNorm):
    """RMS norm over the units that are on; per task: weight. Shapes: x `[..., U]`."""


_TIMM = ("RmsNorm", "RmsNormFp32", "RmsNorm2d", "RmsNorm2dFp32")


@register_layer(*(getattr(timm_norm, name) for name in _TIMM if hasattr(timm_norm, name)))
class _TaskIndexedRmsNorm(_RootMeanSquare):
    """timm's RMS norms, which are not subclasses of torch's."""


@register_layer(nn.GroupNorm)
class TaskIndexedGroupNorm(_Crossing, nn.GroupNorm):
    """Group norm over the units of each group that are on; per task: weight and bias. Shapes: x `[B, U, ...]`.

    The input is centred over the units that are on and scaled by `sqrt(U_g / n_g)`, so that the variance over the group
    equals that of its n_g units on; the weight undoes the scale. While gates are soft the input is not scaled, which
    only changes the effect of eps.
    """

    def _hat_groups(self) -> int:
        return self.num_groups

    def hat_fold_key(self, name: str) -> Any:
        return None if name == "bias" else (TaskIndexedGroupNorm, self.num_groups)

    def _hat_spread(self, gate: Tensor) -> Tensor:
        """`[1, groups, 1, 1]`: the factor `sqrt(U_g / n_g)` of the input."""
        share = gate.view(1, self.num_groups, -1, 1).mean(2, keepdim=True)
        return share.clamp(min=F.SMALLEST_GATE).rsqrt()

    def _hat_around(self, ndim: int, dtype: torch.dtype) -> tuple[_Around, _Around]:
        hat = self._hat_active
        if hat is None or hat.norm is None:
            return unchanged, self._hat_gate_output
        units, task = hat.norm[1], hat.gates.task
        assert task is not None
        clean = gating(units, 1, ndim, dtype) if hat.dirty else unchanged
        kept = (self.num_groups, dtype)

        def gate() -> Tensor:
            return units.gate_of(task).to(dtype)

        weight = units.norm_gates(task, self.num_groups)[1].to(dtype)
        soft = hat.gates.is_soft(task)
        spread = None if soft else units.once(task, ("spread", kept), lambda: self._hat_spread(gate()))

        def before(x: Tensor) -> Tensor:
            x = clean(x)
            if spread is not None:
                x = (x.reshape(len(x), self.num_groups, -1, math.prod(x.shape[2:])) * spread).view(x.shape)
            return F.centre_groups(x, weight, self.num_groups)

        whole = not self._hat_no_share(hat, task) and units.share(task) == 1.0
        # with all units on it is the plain norm
        return (unchanged if whole else before), self._hat_after(gate, 1)


class _FoundNorm(HATLayer):
    """A norm over units of an unregistered class, recognised by its behaviour (`kind_of_norm`).

    Let `x` be zero where units are off and, for a centred norm, centred over the units that are on. With
    `c = sqrt(U / n)`, the mean of `(c x)^2` over all U equals the mean of `x^2` over the n. So the module f cut down to
    those units computes `(f(c x) - f(0)) / c + f(0)`, however it uses its weight, bias `f(0)` and eps.
    """

    hat_is_norm: ClassVar[bool] = True
    hat_centred: ClassVar[bool] = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hat = self._hat_active
        if hat is None or hat.norm is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        dim, units = hat.norm
        gate = units.gate()
        assert gate is not None
        if hat.dirty:
            x = multiply(x, units, dim)
        if self.hat_centred:
            x = F.centre(x, gate.to(x.dtype), dim, (dim,))
        share = share_on(gate).sqrt().to(x.dtype)
        out = super().forward(x / share, *args, **kwargs)  # type: ignore[misc]
        zero = x.new_zeros([n if d == dim else 1 for d, n in enumerate(x.shape)])
        bias = super().forward(zero)  # type: ignore[misc]
        on = along((gate != 0).to(out.dtype) * share.to(out.dtype), out, dim)
        return (out - bias) * on + bias * along(gate.to(out.dtype), out, dim)


@register_layer(nn.Module, kind="rms")
class _FoundRootMeanSquare(_FoundNorm):
    """A module that behaves like an RMS norm."""


@register_layer(nn.Module, kind="centred")
class _FoundLayerNorm(_FoundNorm):
    """A module that behaves like a layer norm."""

    hat_centred: ClassVar[bool] = True


def kind_of_norm(module: nn.Module, ndim: int, dim: int, width: int) -> str:
    """Does a module normalise over `width` units along `dim` of an input of `ndim` dimensions? `rms`, `centred`, or ""
    if neither. It is tested on random numbers: a copy cut down to some of the units must agree with the result of
    `_FoundNorm` for the whole module."""
    some = next(module.parameters(), torch.zeros(()))
    if width < 3 or some.is_meta:
        return ""
    generator = torch.Generator().manual_seed(0)
    shape = [3 if d == dim else 2 for d in range(ndim)]
    on = torch.zeros(width, dtype=torch.bool)
    on[torch.randperm(width, generator=generator)[:3]] = True
    x = torch.randn(shape, generator=generator)
    where = [slice(None)] * ndim
    where[dim] = on  # type: ignore[call-overload]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            whole, cut = (copy.deepcopy(module).cpu().float().eval() for _ in range(2))
            for name, p in whole._parameters.items():
                if p is not None:
                    p.copy_(torch.randn(p.shape, generator=generator))
                    cut._parameters[name] = nn.Parameter(p[on] if p.shape == (width,) else p.clone())
            for name, value in vars(cut).items():
                if value in (width, (width,)):
                    setattr(cut, name, 3 if value == width else (3,))
            want = cut(x)
            for kind, centred in (("rms", False), ("centred", True)):
                wide = torch.zeros([width if d == dim else n for d, n in enumerate(shape)])
                wide[tuple(where)] = x - x.mean(dim, keepdim=True) if centred else x
                share, bias = math.sqrt(3 / width), whole(torch.zeros_like(wide))
                if not centred and torch.allclose(whole(wide)[tuple(where)], want, rtol=1e-4, atol=1e-5):
                    return ""  # it does not normalise over units
                if torch.allclose(((whole(wide / share) - bias) * share + bias)[tuple(where)], want, 1e-4, 1e-5):
                    return kind
    except Exception as error:
        log.debug("%s is no norm: %s", type(module).__name__, error)
    return ""


def along(vector: Tensor, x: Tensor, dim: int) -> Tensor:
    """A vector shaped to multiply `x` along `dim`."""
    shape = [1] * x.dim()
    shape[dim] = -1
    return vector.view(shape)


def share_on(gate: Tensor) -> Tensor:
    """n / U, at least `SMALLEST_GATE` (with no unit on, everything is zero anyway)."""
    return gate.mean().clamp(min=F.SMALLEST_GATE)
