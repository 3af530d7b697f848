"""Shared by the methods: computing tensor by tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ...calls import outputs
from ...config import number, one_of
from ...errors import ConfigError
from ..task_vector import Delta, TaskVector

Forward = Callable[[Any, Any, int], Tensor]
PerVector = float | Sequence[float]  # an option that is one number for all vectors, or one for each
RESCALES = ("expected", "l1", "none")
LEAST_MASS = 1e-7  # tensors with a smaller L1 norm are not rescaled (mergekit's)
NO_TOTAL = 1e-8  # weights whose sum is smaller than this are not divided by it (mergekit's)


def blockwise(vectors: Sequence[TaskVector], fn: Callable[[str, list[Tensor]], Tensor]) -> TaskVector:
    """`fn(name, [tau_1, ..., tau_T])` for every tensor, in the vectors' own dtype. Lazy if a vector is.

    A result equal to one vector's tensor keeps that vector's remainders, so that one vector, or copies of it, still
    reproduces its model bit for bit after merging.
    """

    def one(name: str, *deltas: Delta) -> Tensor | Delta:
        taus = [d.value for d in deltas]
        kind = functools.reduce(torch.promote_types, (t.dtype for t in taus))
        with torch.no_grad():
            out = fn(name, taus).to(kind)
        return next((d for d in deltas if d.at is not None and torch.equal(out, d.value)), out)

    return vectors[0]._map(one, *vectors[1:])


def weighted(taus: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    """`sum_t w_t tau_t`, in float64: sums of a few float32 numbers are exact there, so their order does not matter."""
    out = torch.zeros(taus[0].shape, dtype=torch.float64, device=taus[0].device)
    for w, tau in zip(weights, taus, strict=True):
        out += tau if isinstance(w, float) and w == 1 else tau.double() * w
    return out


def average(taus: Sequence[Tensor]) -> Tensor:
    """`sum_t tau_t / T`."""
    return weighted(taus, [1.0] * len(taus)) / len(taus)


def per_vector(option: str, values: object, vectors: Sequence[TaskVector], what: str) -> list:
    """An option that has one value per vector. Raises `ConfigError` otherwise."""
    if not isinstance(values, (list, tuple)) or len(values) != len(vectors):
        got = f"{len(values)}" if isinstance(values, (list, tuple)) else f"a {type(values).__name__}"
        raise ConfigError(f"{option}: got {got}, expected a list of {len(vectors)}: one {what} per vector")
    return list(values)


def each(
    option: str,
    value: PerVector,
    vectors: Sequence[TaskVector],
    low: float = -math.inf,
    high: float = math.inf,
    without: str = "",
) -> list[float]:
    """An option that is one number for all vectors, or a list of one per vector. Raises `ConfigError` as `number`."""
    values = (
        per_vector(option, value, vectors, "number") if isinstance(value, (list, tuple)) else [value] * len(vectors)
    )
    return [number(option, v, low, high, without=without) for v in values]


def shares(weights: PerVector | None, vectors: Sequence[TaskVector]) -> list[float]:
    """The weights of the vectors; None = 1 each."""
    return each("weights", 1.0 if weights is None else weights, vectors)


def summed(taus: Sequence[Tensor], weights: Sequence[float], normalise: bool) -> Tensor:
    """`sum_t w_t tau_t`, with `normalise` divided by `sum_t w_t`, as float64."""
    total = sum(weights)
    out = weighted(taus, weights)
    return out / total if normalise and abs(total) >= NO_TOTAL else out


def rescaled(part: Tensor, whole: Tensor, how: str, keep: float | Tensor = 1.0) -> Tensor:
    """Rescale the elements that a mask left of a tensor to the tensor's former size.

    Args:
        how: `expected` divides by the probability `keep` with which each element was kept; `l1` restores the sum of
            magnitudes (mergekit's way); `none` leaves it.
    """
    if how == "expected":
        return part.double() / keep
    if how == "l1":
        before, after = float(whole.abs().sum(dtype=torch.float64)), float(part.abs().sum(dtype=torch.float64))
        if before >= LEAST_MASS and after >= LEAST_MASS:
            return part.double() * (before / after)
    return part


def rescaling(how: str, choices: Sequence[str] = RESCALES) -> str:
    """The option `rescale`, checked. Raises `ConfigError`."""
    one_of("rescale", how, choices)
    return how


def own_logits(model: Any, inputs: Any, task: int = 0) -> Tensor:
    """A model's logits for inputs of any task: the default `Forward` of the methods."""
    return outputs(model, inputs)


def as_matrix(x: Tensor, convs: bool) -> Tensor | None:
    """A weight as a matrix `[out, in]`: matrices as they are, with `convs` also flattened filters; otherwise None."""
    if not x.numel() or not (x.dim() == 2 or (convs and x.dim() in (3, 4, 5))):
        return None
    return aligned(rearrange(x, "o ... -> o (...)"))


def aligned(x: Tensor) -> Tensor:
    """The tensor at an aligned address. Tensors in mapped files may be unaligned, where matrix products and sums round
    differently."""
    return x if x.data_ptr() % 64 == 0 else x.clone()
