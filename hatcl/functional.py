"""Pure tensor maths of hard attention to the task. Serra et al. 2018, arXiv 1801.01423 (HAT); arXiv 2307.09653
(HAT-CL). At the end, the format of scores.

Shapes: `U` units, `T` tasks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.functional import threshold

from .config import HATConfig

SMALLEST_GATE = 1e-4
"""Soft gates up to this size become exact zeros. A gradient passes two gates and an optimizer squares it, so smaller
gates would make denormal floats, which slow a CPU's step many times. Their embeddings still learn (see `soft_gate`)."""

HATCL_ABOVE_ONE = 0.8
"""The ratio of HAT-CL's exponential schedule."""

RATES = ("constant", "linear", "cosine")
"""The courses of a learning rate after the warm-up."""


def scale_at(
    step: int, steps: int, max_scale: float, schedule: str = "linear", above_one: float = HATCL_ABOVE_ONE
) -> float:
    """The scale s at step b = `step` of B = `steps` of one annealing cycle, with the progress p = b / (B - 1).

    - linear: `s = 1/s_max + (s_max - 1/s_max) * p` (HAT eq. 3, where b is counted from 1);
    - cosine: `s = max(s_max/2 * (1 + cos(2 pi p)), 1)`, which falls from s_max to 1 and rises again (HAT-CL): weights
      are learned first, then gates, then weights again;
    - half_cosine: linear with `(1 - cos(pi p)) / 2` in place of p;
    - exponential: `s = s_max ** ((p - 1 + r) / r)` with r = `above_one`, the share of the cycle in which s is above 1
      (HAT-CL: .8);
    - constant: `s_max`.
    """
    progress = min(max(step / (steps - 1), 0.0), 1.0) if steps > 1 else 1.0
    low = 1.0 / max_scale
    if schedule == "linear":
        return low + (max_scale - low) * progress
    if schedule == "half_cosine":
        return low + (max_scale - low) * (1.0 - math.cos(math.pi * progress)) / 2.0
    if schedule == "cosine":
        return max(max_scale * (1.0 + math.cos(2 * math.pi * progress)) / 2.0, 1.0)
    if schedule == "exponential":
        return float(max_scale ** ((progress - 1.0 + above_one) / above_one))
    return max_scale


def rate_at(progress: float, lr: float, schedule: str) -> float:
    """The learning rate at the share `progress` = p of the steps after the warm-up, by one of `RATES`:

    constant: lr;   linear: lr (1 - p);   cosine: lr (1 + cos(pi p)) / 2
    """
    if schedule == "linear":
        return lr * (1 - progress)
    return lr * (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else lr


class _Gate(torch.autograd.Function):
    generate_vmap_rule = True  # so that a forward may use `torch.func`

    @staticmethod
    def forward(
        e: Tensor, scale: Tensor, max_scale: float, clamp: float, hardened: Tensor | None, exact: bool
    ) -> Tensor:
        return gate_value(e, scale, hardened)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        e, scale, ctx.max_scale, ctx.clamp, hardened, ctx.exact = inputs
        ctx.save_for_backward(e, scale, hardened)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        e, scale, hardened = ctx.saved_tensors
        return grad * gate_slope(e, scale, hardened, ctx.max_scale, ctx.clamp, ctx.exact), None, None, None, None, None


def gate_value(e: Tensor, scale: Tensor, hardened: Tensor | None) -> Tensor:
    """The value of `soft_gate`."""
    gate = threshold(torch.sigmoid(scale * e), SMALLEST_GATE, 0.0)
    return gate if hardened is None else torch.where(hardened > 0, (e > 0).to(gate.dtype), gate)


def gate_slope(
    e: Tensor, scale: Tensor, hardened: Tensor | None, max_scale: float, clamp: float, exact: bool
) -> Tensor:
    """The derivative of `soft_gate`, including HAT's compensation."""
    half, steep = torch.sigmoid(e), scale * e
    factor = max_scale * half * (1 - half) * torch.exp((clamp - steep.abs()).clamp(max=0.0))
    if not exact:
        x = steep.float().clamp(max=50.0)  # beyond that 1 - a is 0 anyway
        factor = factor * ((1 - torch.sigmoid(x)) / torch.sigmoid(-x)).to(factor.dtype)
    return factor if hardened is None else torch.where(hardened > 0, 0.0, factor)


def soft_gate(
    e: Tensor,
    scale: Tensor,
    max_scale: float,
    clamp: float = 50.0,
    hardened: Tensor | None = None,
    compensation: str = "exact",
) -> Tensor:
    """`a = sigmoid(s * e)` with HAT's gradient compensation built into its derivative.

    HAT (eq. 6) multiplies the gradient q of an embedding by `s_max/s * (cosh(clamp(s e, +-c)) + 1) / (cosh(e) + 1)`.
    As `sigmoid'(x) = 1 / (2 (cosh(x) + 1))`, the product of that factor and the sigmoid's own derivative is
    `s_max * sigmoid'(e) * exp(-max(|s e| - c, 0))` (for |s e| > c up to a relative 1e-21), without the `0 * inf` that
    the two-step form can meet. `compensation` says which number is computed: - `exact`: this one. A gate that is on is
    pushed as long as s e < c.
    - `hat`: the one that HAT, HAT-CL and CLArena get in two steps in float32, where `1 - a` is rounded to 0 above s e =
      16.6, so that a gate that is on is pushed no further (at s = 40, e = 1: 0 instead of 78.6). It is the product
      above times `(1 - sigmoid(s e)) / sigmoid(-s e)`, in float32.

    Args:
        e: embeddings, any shape.
        scale: s, a tensor of no dimensions.
        max_scale: s_max. clamp: c.
        hardened: a tensor of no dimensions; if it is not 0, the gate is the one at infinite scale and its derivative is
        0.
        compensation: `exact` or `hat`.
    """
    return _Gate.apply(e, scale, max_scale, clamp, hardened, compensation == "exact")


def drawn_embedding(units: int, config: HATConfig) -> Tensor:
    """The start values of a task's embeddings, `[U]`, by `config.init` (Serra et al. 2018, section 2.3; dense, sparse:
    HAT-CL), within +-`config.clamp`."""
    size = abs(config.init_value)
    if config.init == "normal":
        e = torch.randn(units)
    elif config.init == "sparse":
        share = torch.tensor(share_switched_on(config), dtype=torch.float64)
        e = size * (torch.randn(units) + float(torch.special.ndtri(share)))
    elif config.init == "uniform":
        e = 2 * size * torch.rand(units)
    else:
        e = torch.full((units,), size if config.init == "dense" else config.init_value)
    return e.clamp(-config.clamp, config.clamp)


def share_switched_on(config: HATConfig) -> float:
    """The expected share of units that `drawn_embedding` switches on."""
    if config.init == "normal":
        return 0.5
    if config.init == "sparse":
        return 1 / config.num_tasks if config.init_density is None else config.init_density
    return float(config.init_value > 0 if config.init == "constant" else config.init_value != 0)


def hard_gate(e: Tensor) -> Tensor:
    """The gate at infinite scale: on where `e > 0`."""
    return e > 0


def sparsity_penalty(
    gates: Tensor, used: Tensor, bounds: list[tuple[int, int]] | None = None, forgiven: float = 0.0
) -> Tensor:
    """HAT's eq. 5: `sum_i a_i (1 - used_i) / sum_i (1 - used_i)`, over units that no sealed task uses.

    Args:
        gates: a, `[U]`. used: `[U]` bool, the union of the sealed tasks' gates.
        bounds: if given, (start, stop) per layer; the result is the mean of the layers' ratios (HAT-CL).
        forgiven: share of a layer's units (of all units if `bounds` is None) that may be on without a penalty.
    """
    free = (~used).to(gates.dtype)
    cost = gates * free
    if bounds is None:
        over = torch.relu(cost.sum() - forgiven * gates.numel())
        return over / free.sum().clamp(min=1.0)
    sizes = torch.tensor([stop - start for start, stop in bounds], device=gates.device)
    layer = torch.repeat_interleave(torch.arange(len(bounds), device=gates.device), sizes)
    on = gates.new_zeros(len(bounds)).index_add(0, layer, cost)
    room = gates.new_zeros(len(bounds)).index_add(0, layer, free)
    over = torch.relu(on - forgiven * sizes)
    return (over / room.clamp(min=1.0)).mean()


def centring(gate: Tensor) -> Tensor:
    """`a * U / sum a`: the factor that turns a mean over all U units into the mean over those that are on."""
    return gate * (len(gate) / gate.sum().clamp(min=SMALLEST_GATE))


def centre(
    x: Tensor,
    gate: Tensor,
    dim: int,
    over: tuple[int, ...],
    share: float | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Subtract the mean over the units that are on: `x - a * (sum x / sum a)`.

    `x` already carries the gate (it is `a` times a value), so `sum x / sum a` is the gated mean of the value, and off
    units stay exactly zero. A norm over all units of the result then differs from the norm over the units that are on
    only by the constant factor `sqrt(U / sum a)`.

    Args:
        dim: the dimension of the units. over: the dimensions of the mean, including `dim`.
        share: the share of units that are on, if gates are hard and it is known.
        weight: `centring(gate)`, if it has been computed.
    """
    if x.dtype in (torch.float16, torch.bfloat16):  # a mean with eight bits is too coarse to centre
        return centre(x.float(), gate.float(), dim, over, share, None if weight is None else weight.float()).to(x.dtype)
    shape = [1] * x.dim()
    shape[dim] = -1
    if share is not None:
        return torch.addcmul(x, x.mean(over, keepdim=True), gate.view(shape), value=-1 / share)
    weight = centring(gate) if weight is None else weight
    inner = len(over) == 1 and (x.stride(dim) == 1 or dim % x.dim() == x.dim() - 1)  # nothing is copied
    if inner and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        out: Tensor = _Centre.apply(x.movedim(dim, -1), weight)[0]
        return out.movedim(-1, dim)
    return torch.addcmul(x, x.mean(over, keepdim=True), weight.view(shape), value=-1)


def norm_gates(gate: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """The factors, `[U]` each, of a norm over units in groups of `U_g` with `n_g = sum a`:

    - `(a != 0) * sqrt(n_g / U_g)`, which its weight is folded with;
    - `a * U_g / n_g`, by which the mean over all units of a group becomes that over those that are on.
    """
    by_group = gate.view(groups, -1)
    total, size = by_group.sum(1, keepdim=True), by_group.shape[1]
    share = (total / size).clamp(min=SMALLEST_GATE)
    fold = (by_group != 0) * share.sqrt()
    return fold.view(-1), (by_group * (size / total.clamp(min=SMALLEST_GATE))).view(-1)


def norm_gates_backward(gate: Tensor, to_fold: Tensor, to_centring: Tensor, groups: int = 1) -> Tensor:
    """The gradient of `norm_gates`' argument, from those of what it gives."""
    by_group, to_centring = gate.view(groups, -1), to_centring.view(groups, -1)
    total, size = by_group.sum(1, keepdim=True), by_group.shape[1]
    part = (size / total.clamp(min=SMALLEST_GATE)) * to_centring
    root = (total / size).clamp(min=SMALLEST_GATE).rsqrt() / (2 * size)
    through = ((by_group != 0) * to_fold.view(groups, -1)).sum(1, keepdim=True) * root * (total > size * SMALLEST_GATE)
    through = through - (part * by_group).sum(1, keepdim=True) / total.clamp(min=SMALLEST_GATE)
    return (part + through).view(-1)


class _Centre(torch.autograd.Function):
    """`x - weight * mean x` along the last dimension, with a derivative that passes over x-sized memory three times
    instead of seven. The mean is an output too: otherwise a second derivative would not see that it depends on x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean(-1, keepdim=True)
        ctx.save_for_backward(weight, mean)
        ctx.set_materialize_grads(False)
        return torch.addcmul(x, mean, weight, value=-1), mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_mean: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        weight, mean = ctx.saved_tensors
        to_x, to_weight, to_mean = grad, None, of_mean
        if grad is not None:
            rows = grad.reshape(-1, grad.shape[-1])
            through = -torch.mv(rows, weight.to(grad.dtype)).view(mean.shape)
            to_mean = through if of_mean is None else through + of_mean
            to_weight = -torch.mv(rows.t(), mean.reshape(-1))
        if to_mean is not None:
            to_mean = to_mean / len(weight)
            to_x = to_mean.expand(*mean.shape[:-1], len(weight)) if grad is None else grad + to_mean
        return to_x, to_weight


def centre_groups(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """`x - weight * mean x`, the mean over each of several groups of units. Shapes: x `[B, U, ...]`, weight `[U]`."""
    if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        out: Tensor = _CentreGroups.apply(x, weight, groups)[0]
        return out
    return _centred_groups(x, weight, groups)[0]


def _in_groups(x: Tensor, groups: int) -> Tensor:
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, math.prod(x.shape[2:]))


def _centred_groups(x: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    parts = _in_groups(x, groups)
    mean = parts.mean((2, 3), keepdim=True)
    return (parts - mean * weight.view(groups, -1, 1)).view(x.shape), mean


class _CentreGroups(torch.autograd.Function):
    """`centre_groups`. The mean is an output, too, as that of `_Centre`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        out, mean = _centred_groups(x, weight, groups)
        ctx.groups = groups
        ctx.save_for_backward(weight, mean)
        return out, mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor, to_mean: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, mean = ctx.saved_tensors
        parts = _in_groups(grad, ctx.groups)
        rows = parts.sum(3, keepdim=True)
        through = to_mean - (rows * weight.view(ctx.groups, -1, 1)).sum(2, keepdim=True)
        to_x = parts + through / (parts.shape[2] * parts.shape[3])
        return to_x.view(grad.shape), -(rows * mean).sum(0).view(-1), None


def hashed(x: Tensor) -> Tensor:
    """A 32-bit integer hash (Wellons' lowbias32) of numbers below 2^32, in int64."""
    low = 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & low
    x = ((x ^ (x >> 15)) * 0x846CA68B) & low
    return x ^ (x >> 16)


def is_followed() -> bool:
    """Is what is computed now more than its numbers: part of a graph that is compiled or traced, of a transform of
    `torch.func`, of a forward derivative, of a mode such as that of fake tensors? Then nothing of it may be kept, and
    nothing that was kept may stand for it."""
    return (
        is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(x: Tensor) -> Tensor:
    """A tensor's memory as integers, which are equal exactly if every bit is: -0.0 differs from 0.0, and a NaN equals
    itself."""
    x = x.detach().resolve_conj().resolve_neg()
    if x.dtype == torch.complex128:
        x = torch.view_as_real(x)
    return x.view(INTEGERS[x.element_size()]) if x.is_floating_point() or x.is_complex() else x


def bits_where(on: Tensor, dtype: torch.dtype) -> Tensor:
    """An integer mask for the bits of numbers of a type: all bits where `on`, none elsewhere."""
    return on.to(INTEGERS[dtype.itemsize]).neg_()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits_of(a), bits_of(b))


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, or its shard of a `DTensor`."""
    part = getattr(x, "_local_tensor", None)
    return x if part is None else part


def digest_of(value: Tensor) -> str:
    """`dtype:sha256` of a tensor's elements, in row order."""
    raw = value.detach().contiguous().cpu().view(-1)
    data = raw.view(torch.uint8) if raw.numel() else raw.new_zeros(0, dtype=torch.uint8)
    return f"{str(value.dtype).removeprefix('torch.')}:{hashlib.sha256(data.numpy().data).hexdigest()}"


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, shapes and bits of named tensors."""
    rows = "\n".join(f"{n} {list(tensors[n].shape)} {digest_of(tensors[n])}" for n in sorted(tensors))
    return hashlib.sha256(rows.encode()).hexdigest()


NO_SHARES = ("r2", "pearson", "mcc")  # measures that are not shares of examples and can be below 0


def score_text(value: float | None, measure: str = "") -> str:
    """A score for people to read: in percent, or as it is if the measure is not a share; a dot if it was not
    measured."""
    if value is None or math.isnan(value):
        return "·"
    return f"{value:.3f}" if measure in NO_SHARES else f"{100 * value:.1f}"


def own_measure(measures: Iterable[str]) -> str:
    """The first of these measures that is not a share; empty if all are."""
    return next((measure for measure in measures if measure in NO_SHARES), "")


def score_unit(measures: Iterable[str]) -> str:
    """The unit in which scores by these measures are shown."""
    own = sorted({measure for measure in measures if measure in NO_SHARES})
    return f"by {' and '.join(own)}" if own else "in %"
