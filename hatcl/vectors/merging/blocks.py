"""What the methods share: working tensor by tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ...calls import outputs
from ...errors import ConfigError
from ..task_vector import Delta, TaskVector

Forward = Callable[[Any, Any, int], Tensor]


def blockwise(vectors: Sequence[TaskVector], fn: Callable[[str, list[Tensor]], Tensor]) -> TaskVector:
    """`fn(name, [tau_1, ..., tau_T])` for every tensor, in the vectors' own dtype. Lazy where a vector is.

    A tensor that comes out as one of the vectors' keeps that one's remainders, so that one vector, or copies of it,
    merged to itself still gives its model back bit for bit.
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
    """An option that has one value per vector. Raises `ConfigError` where it has not."""
    if not isinstance(values, (list, tuple)) or len(values) != len(vectors):
        got = f"{len(values)}" if isinstance(values, (list, tuple)) else f"a {type(values).__name__}"
        raise ConfigError(f"{option}: got {got}, expected a list of {len(vectors)}: one {what} per vector")
    return list(values)


def own_logits(model: Any, inputs: Any, task: int = 0) -> Tensor:
    """What a model says to inputs, whichever task they are of: the `Forward` that methods take by default."""
    return outputs(model, inputs)


def as_matrix(x: Tensor, convs: bool) -> Tensor | None:
    """A weight as a matrix `[out, in]`: matrices as they are, with `convs` also filters, flattened; else None."""
    if not x.numel() or not (x.dim() == 2 or (convs and x.dim() in (3, 4, 5))):
        return None
    return aligned(rearrange(x, "o ... -> o (...)"))


def aligned(x: Tensor) -> Tensor:
    """The tensor at an address as an allocator gives it. Tensors in mapped files lie anywhere, and matrix products and
    sums round differently there."""
    return x if x.data_ptr() % 64 == 0 else x.clone()
