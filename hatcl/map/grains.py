"""Grains: the sizes of the parts that methods work on. A method has one number per part, and `expand` turns these
numbers into tensors to multiply with.

    grain = make_grain("block", {name: p.shape for name, p in model.named_parameters()})
    scores = grain.reduce(gradients)      # tensors -> one number per block
    masks = grain.expand(scores > 0.5)    # a vector -> tensors that broadcast over the parameters

`element`: every element by itself.
`unit`: the elements that a unit owns (or reads, where nothing owns them), by the map; number 0 collects the elements
that are always on.
`matrix`: each tensor of two or more dimensions.
`block`: each tensor.
`global`: all elements together.
`row`: each index of a tensor's first dimension.
`qkv`: as `block`, but fused query-key-value tensors are split in three: those with `qkv` in a part of their name, and
`in_proj_weight` and `in_proj_bias`. They hold the queries, then the keys, then the values, of equal size (timm's and
PyTorch's attention). The `query_key_value` of Bloom and GPT-NeoX is ordered by heads and stays one block.
`lora_pair`: row r of A with column r of B.
`partition:K`: each tensor's elements in K random parts, by a counter-based hash of their index.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, VectorError, nearest
from ..functional import hashed
from .lora import PARTNER, factor_in
from .units import Entry, UnitMap

Shapes = Mapping[str, Sequence[int]]
GRAINS = ("element", "unit", "row", "matrix", "lora_pair", "qkv", "block", "partition:K", "global")


@dataclass(frozen=True)
class Grain:
    """A partition of the elements of some tensors.

    Attributes:
        name: as given to `make_grain`. size: the number of groups, `G`.
        shapes: the shapes of the tensors that take part. labels: the names of the groups, where they have names.
        index: tensor name -> function that computes its group numbers; they broadcast over the tensor.
    """

    name: str
    size: int
    shapes: dict[str, tuple[int, ...]]
    index: Mapping[str, Callable[[], Tensor]]
    labels: tuple[str, ...] = ()

    def reduce(self, tensors: Mapping[str, Tensor], how: str = "mean") -> Tensor:
        """One number per group, `[G]`: the mean, sum, or largest of its elements over all tensors.

        Raises:
            VectorError: a tensor that takes part is missing or has another shape. ConfigError: an unknown `how`.
        """
        if how not in ("mean", "sum", "max"):
            raise ConfigError(f"how: got {how!r}, expected mean, sum or max")
        some = next(iter(tensors.values()))
        kind = torch.promote_types(some.dtype, torch.float32)
        out = torch.full((self.size,), -math.inf if how == "max" else 0.0, dtype=kind, device=some.device)
        count = torch.zeros(self.size, dtype=kind, device=some.device)
        for name, shape in self.shapes.items():
            if name not in tensors:
                raise VectorError(f"{name}: missing; the grain {self.name} covers {len(self.shapes)} tensors")
            x = tensors[name]
            if tuple(x.shape) != shape:
                raise VectorError(f"{name}: got shape {list(x.shape)}, expected {list(shape)}")
            # first sum the elements that share a number by broadcasting, which avoids an index of the tensor's size
            ids = self.index[name]().to(x.device)
            x = x.to(kind)
            over = [d for d in range(x.dim()) if ids.dim() == 0 or ids.shape[d] == 1]
            if how == "max":
                part = x.amax(over, keepdim=True) if over else x
                out.scatter_reduce_(0, ids.expand(part.shape).reshape(-1), part.reshape(-1), "amax")
                continue
            part = x.sum(over, keepdim=True) if over else x
            flat = ids.expand(part.shape).reshape(-1)
            out.index_add_(0, flat, part.reshape(-1))
            each = x.numel() // max(part.numel(), 1)
            count.index_add_(0, flat, torch.full_like(flat, each, dtype=kind))
        return out / count.clamp(min=1) if how == "mean" else out

    def expand(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector `[G]` as tensors that broadcast over the parameters, at full shape only where necessary.

        Raises:
            VectorError: the vector has another length.
        """
        if vector.shape != (self.size,):
            raise VectorError(f"vector: got shape {list(vector.shape)}, the grain {self.name} has {self.size} groups")
        return {name: vector[self.index[name]().to(vector.device)] for name in self.shapes}


def make_grain(name: str, shapes: Shapes, unit_map: UnitMap | None = None, seed: int = 0) -> Grain:
    """A grain over tensors of these shapes.

    Args:
        unit_map: the map, for `unit`. seed: seed of the random parts, for `partition:K`.

    Raises:
        ConfigError: the grain is unknown, or `shapes` has nothing that it could group.
    """
    sized = {n: tuple(int(i) for i in s) for n, s in shapes.items()}
    kind, colon, arg = name.partition(":")
    if colon and kind != "partition":
        kind = name  # only `partition` takes a number
    if kind == "element":
        starts, total = {}, 0
        for n, s in sized.items():
            starts[n], total = total, total + math.prod(s)
        return Grain(name, total, sized, {n: functools.partial(_range, starts[n], s) for n, s in sized.items()})
    if kind in ("block", "matrix"):
        kept = {n: s for n, s in sized.items() if kind == "block" or len(s) > 1}
        return _named(name, kept, {n: _constant(i) for i, n in enumerate(kept)}, tuple(kept))
    if kind == "global":
        return Grain(name, 1, sized, {n: _constant(0) for n in sized}, ("all",))
    if kind == "row":
        return _rows(name, sized, {n: range(s[0]) for n, s in sized.items() if s})
    if kind == "qkv":
        return _rows(name, sized, {n: "qkv" for n, s in sized.items() if _is_fused(n, s)})
    if kind == "partition":
        if not (arg.isascii() and arg.isdigit()) or int(arg) < 1:
            raise ConfigError(f"grain: got {name!r}, expected partition:K with K of at least 1")
        parts = int(arg)
        index = {n: functools.partial(_hashed, i, s, parts, seed) for i, (n, s) in enumerate(sized.items())}
        return Grain(name, parts * len(sized), sized, index)
    if kind == "unit":
        if unit_map is None:
            raise ConfigError("grain: unit needs the map; pass unit_map= (hatcl.UnitMap, of a converted model)")
        kept = {n: s for n, s in sized.items() if n in unit_map.entries}
        wrong = next((n for n, s in kept.items() if tuple(unit_map.entries[n].shape) != s), None)
        if wrong is not None:
            raise ConfigError(
                f"grain: {wrong} is {list(unit_map.entries[wrong].shape)} in the map, {list(kept[wrong])} here; pass "
                "the map of this model"
            )
        index = {n: functools.partial(_units, unit_map.entries[n]) for n in kept}
        return Grain(name, unit_map.num_units + 1, kept, index)
    if kind == "lora_pair":
        return _lora_pairs(sized)
    near = nearest(name, GRAINS)
    raise ConfigError(f"grain: got {name!r}, expected one of {', '.join(GRAINS)}; did you mean {near!r}?")


def _named(
    name: str, shapes: dict[str, tuple[int, ...]], index: Mapping[str, Callable[[], Tensor]], labels: tuple[str, ...]
) -> Grain:
    """A grain whose parts have names."""
    if not shapes:
        raise ConfigError(f"grain: {name} finds no groups among the given tensors")
    return Grain(name, len(labels), shapes, index, labels)


def _is_fused(name: str, shape: tuple[int, ...]) -> bool:
    """Does this tensor hold the rows of query, key and value, one after another?"""
    parts = name.split(".")
    named = any("qkv" in part.lower() for part in parts) or parts[-1] in ("in_proj_weight", "in_proj_bias")
    return named and bool(shape) and shape[0] % 3 == 0


def _rows(name: str, shapes: dict[str, tuple[int, ...]], parts: Mapping[str, Sequence[object]]) -> Grain:
    """A grain that splits the first dimension of some tensors into equal parts with these names and leaves the others
    whole."""
    index: dict[str, Callable[[], Tensor]] = {}
    labels: list[str] = []
    for n, s in shapes.items():
        start, into = len(labels), parts.get(n, "1")
        split = len(into) != 1
        index[n] = functools.partial(_repeated, start, len(into), s) if split else _constant(start)
        labels += [f"{n}[{part}]" for part in into] if split else [n]
    return _named(name, shapes, index, tuple(labels))


def _repeated(start: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """`count` consecutive numbers from `start`, each for an equal share of the rows."""
    ids = torch.arange(start, start + count).repeat_interleave(shape[0] // max(count, 1))
    return ids.view(-1, *[1] * (len(shape) - 1))


# The functions below compute indices. They belong to the module and take arguments, so grains can be pickled.


def _constant(i: int) -> Callable[[], Tensor]:
    """One number for every element."""
    return functools.partial(torch.tensor, i)


def _range(start: int, shape: tuple[int, ...]) -> Tensor:
    """Consecutive numbers from `start`, one for each element."""
    return torch.arange(start, start + math.prod(shape)).view(shape)


def _units(entry: Entry) -> Tensor:
    """The units that own a parameter's elements, or else those that they read."""
    owners = [f for f in entry.factors if f.owner] or list(entry.factors)
    if not owners:
        return torch.zeros((), dtype=torch.long)
    ids = torch.from_numpy(owners[0].units).view(owners[0].shape)
    if entry.view == entry.shape:
        return ids
    return ids.expand(entry.view).reshape(entry.shape)


def _hashed(block: int, shape: tuple[int, ...], parts: int, seed: int) -> Tensor:
    """Part of element i = hash(seed, block, i) mod K."""
    i = torch.arange(math.prod(shape))
    salt = int(hashed(torch.tensor((seed * 0x9E3779B1 + block * 0x85EBCA77 + 1) & 0xFFFFFFFF)))
    return (hashed((i ^ salt) & 0xFFFFFFFF) % parts + block * parts).view(shape)


def _along(start: int, count: int, dim: int, dims: int) -> Tensor:
    """Consecutive numbers from `start` along one dimension."""
    shape = [1] * dims
    shape[dim] = count
    return torch.arange(start, start + count).view(shape)


def _lora_pairs(shapes: dict[str, tuple[int, ...]]) -> Grain:
    """A grain with one group per rank of each pair of LoRA factors, across both factors."""
    kept: dict[str, tuple[int, ...]] = {}
    index: dict[str, Callable[[], Tensor]] = {}
    labels: list[str] = []
    for name, a_shape in shapes.items():
        parts = name.split(".")
        at = factor_in(parts)
        if at is None or parts[at] not in PARTNER:
            continue
        other = ".".join([*parts[:at], PARTNER[parts[at]], *parts[at + 1 :]])
        if other not in shapes:
            raise ConfigError(f"grain: {name} has no partner {other}")
        start, rank = len(labels), a_shape[0]
        if shapes[other][1] != rank:
            raise ConfigError(f"grain: {name} has rank {rank}, {other} has rank {shapes[other][1]}")
        kept[name], kept[other] = a_shape, shapes[other]
        index[name] = functools.partial(_along, start, rank, 0, len(a_shape))
        index[other] = functools.partial(_along, start, rank, 1, len(shapes[other]))
        labels += [f"{'.'.join(parts[:at])}[{r}]" for r in range(rank)]
    return _named("lora_pair", kept, index, tuple(labels))
