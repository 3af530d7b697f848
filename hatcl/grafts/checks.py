"""Check that the parts of a graft fit each other, and that it fits a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import GraftError
from ..vectors.tensors import TensorSource, kinds_of, named_tensors, tied_names


def found_in(source: TensorSource, shapes: Mapping[str, Sequence[int]], what: str) -> dict[str, str]:
    """The names of some tensors in a source: the same name, or the first name if tensors are tied. Nothing is read.

    Raises:
        GraftError: the source lacks tensors, or has them in another shape or not in floating point (the text lists
            them), or two of them are one tensor there.
    """
    kinds, tied = kinds_of(named_tensors(source)), tied_names(source)
    found = {name: name if name in kinds else tied.get(name, name) for name in shapes}
    problems = []
    for name, first in found.items():
        kind = kinds.get(first)
        if kind is None or kind.shape != tuple(shapes[name]):
            has = "no such tensor" if kind is None else list(kind.shape)
            problems.append(f"{name} is {list(shapes[name])}, {what} has {has}")
        elif not kind.dtype.is_floating_point or kind.dtype.itemsize < 2:
            problems.append(f"{name} is {dtype_name(kind.dtype)} in {what}, expected float16 or wider")
    if problems:
        raise GraftError(
            f"{len(problems)} of the {len(found)} tensors do not fit: "
            f"{'; '.join(problems[:5])}{' ...' if len(problems) > 5 else ''}. Do the graft and the model have the "
            "same architecture?"
        )
    twice = [name for name, first in found.items() if name != first and first in found]
    if twice:
        raise GraftError(
            f"{twice[0]} and {found[twice[0]]} are one tensor in {what} and two in the graft; untie them, or make the "
            "graft from models where they are tied"
        )
    return found


def size_of(sparsity: float, numel: int) -> int:
    """`k = int(sparsity * N)`.

    Raises:
        GraftError: it selects no element, or all.
    """
    if not 0 <= sparsity <= 1:
        raise GraftError(f"sparsity: got {sparsity!r}, expected a share of the elements between 0 and 1")
    k = int(sparsity * numel)
    if not 0 < k < numel:
        raise GraftError(
            f"sparsity: {sparsity!r} of {numel:,} elements selects {'all' if k else 'none'}; "
            + ("that is the fine-tuned model" if k else f"use at least 1/{numel:,}")
        )
    return k


def checked_indices(name: str, at: Tensor, numel: int) -> Tensor:
    """Flat indices on the CPU, int32 if they fit. Raises `GraftError` unless they ascend within the tensor."""
    if at.dim() != 1 or at.dtype not in (torch.int32, torch.int64):
        raise GraftError(f"{name}: got indices of {dtype_name(at.dtype)} {list(at.shape)}, expected integers [k]")
    if len(at) and not (0 <= int(at[0]) and int(at[-1]) < numel and bool((at[1:] > at[:-1]).all())):
        raise GraftError(f"{name}: expected ascending indices from 0 to {numel - 1}, got {at[:3].tolist()} ...")
    return at.detach().to("cpu", torch.int32 if numel < 2**31 else torch.int64)


def checked_values(name: str, at: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """The values at some indices, on the CPU. Raises `GraftError` unless each index has one value of float16 or
    wider."""
    v = values.get(name)
    if v is None or v.shape != at.shape or not v.dtype.is_floating_point or v.dtype.itemsize < 2:
        got = "none" if v is None else f"{dtype_name(v.dtype)} {list(v.shape)}"
        raise GraftError(f"{name}: got values {got}, expected one number, float16 or wider, for each of {len(at)}")
    return v.detach().cpu()


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, such as `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
