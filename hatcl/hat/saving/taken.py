"""A recipe for inputs of a model's forward: shapes, dtypes and the range of integers, without the example itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # torch's `ignore_index`, which transformers' labels hold


def recipe_of(inputs: Any) -> dict[str, Any] | None:
    """A JSON-able recipe of some inputs; None if they contain an object that it cannot describe."""
    if isinstance(inputs, Tensor):
        made: dict[str, Any] = {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
        if inputs.dtype == torch.bool or inputs.is_meta or not inputs.numel():
            return made
        if not inputs.is_floating_point() and not inputs.is_complex():
            made |= {"low": int(inputs.min()), "high": int(inputs.max())}
        return made
    if isinstance(inputs, Mapping):
        parts = {str(name): recipe_of(x) for name, x in inputs.items()}
        return None if None in parts.values() else {"mapping": parts}
    if type(inputs) in (list, tuple):
        row = [recipe_of(x) for x in inputs]
        return None if None in row else {type(inputs).__name__: row}
    return {"value": inputs} if isinstance(inputs, (bool, int, float, str, type(None))) else None


def made_by(recipe: Mapping[str, Any], like: Tensor) -> Any:
    """Inputs by a recipe, always the same: normal numbers, integers from their range, masks of ones. like: floats get
    its dtype, and all tensors its device."""
    draw = torch.Generator().manual_seed(0)

    def make(x: Mapping[str, Any]) -> Any:
        if "mapping" in x:
            return {name: make(part) for name, part in x["mapping"].items()}
        for kind in (list, tuple):
            if kind.__name__ in x:
                return kind(make(part) for part in x[kind.__name__])
        if "value" in x:
            return x["value"]
        dtype, shape = getattr(torch, x["dtype"]), x["shape"]
        if dtype.is_floating_point or dtype.is_complex:
            numbers = torch.randn(shape, generator=draw, dtype=torch.complex64 if dtype.is_complex else torch.float32)
            return numbers.to(like.device, like.dtype if dtype.is_floating_point else dtype)
        low, high = x.get("low", 1), x.get("high", 1)
        if low == IGNORED and high >= 0:  # labels, some ignored by the loss; the numbers from -99 to -1 are no classes
            low = 0
        if (low, high) in ((0, 1), (1, 1)):  # a mask: use ones, so that no row is empty
            return torch.ones(shape, dtype=dtype, device=like.device)
        return torch.randint(low, high + 1, shape, generator=draw, dtype=dtype).to(like.device)

    return make(recipe)
