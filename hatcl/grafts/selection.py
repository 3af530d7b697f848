"""The elements that a graft may take, and grafts by a score that needs no training: the change of an element, chance,
or the user's own score."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import one_of, whole
from ..errors import ConfigError, GraftError, VectorError, nearest
from ..functional import digest_of
from ..map.grains import make_grain
from ..map.lora import no_pairs
from ..map.units import UnitMap
from ..vectors.pairing import paired
from ..vectors.select import Patterns, largest
from ..vectors.tensors import Kind, Lazy, TensorSource, kinds_of
from .checks import size_of
from .graft import Graft
from .scores import GraftScores, highest

SELECTED_BY = ("magnitude", "random")
ALWAYS_ON = 0  # in the grain `unit`, the number of the group of elements that no unit owns
Pairs = Lazy[tuple[Tensor, Tensor]]


def candidates(pretrained: TensorSource, finetuned: TensorSource, only: Patterns = (), skip: Patterns = ()) -> Pairs:
    """The floating-point parameters that a graft may take elements from.

    Args:
        pretrained, finetuned: modules, state dicts, safetensors files, or folders of them.
        only: patterns (`fnmatch`) of names, of which one must match; none = all tensors. skip: patterns of names to
            leave out, such as `*embeddings*` or `classifier.*`. A tied tensor matches by any of its names.

    Returns:
        name -> (pretrained tensor, fine-tuned tensor), read on demand; tied tensors once, under their first name.

    Raises:
        GraftError: the models differ in names or shapes. ConfigError: a pattern matches nothing (the text has the
            nearest name), or no tensor is left.
    """
    try:
        ours, theirs = paired(pretrained, finetuned, only=only, skip=skip)
    except VectorError as error:
        raise GraftError(str(error)) from error
    return Lazy(kinds_of(ours), lambda name: (ours[name], theirs[name]))


def select_graft(
    pretrained: TensorSource,
    finetuned: TensorSource,
    sparsity: float,
    by: str | Mapping[str, Tensor] | GraftScores = "magnitude",
    *,
    per_layer: bool = False,
    grain: str = "element",
    unit_map: UnitMap | None = None,
    only: Patterns = (),
    skip: Patterns = (),
    seed: int = 0,
) -> Graft:
    """The k elements with the highest scores, exactly `k = int(sparsity * N)` of all N candidates; ties are resolved as
    in `vectors.select.largest`. By default this is the base patch of the paper: the k largest `|theta_ft - theta_pre|`
    (Panigrahi et al. 2023, arXiv 2302.06600).

    Args:
        pretrained, finetuned: as for `candidates`, with `only` and `skip`.
        by: `magnitude`; `random`; or scores by name, tensors that broadcast over the candidates, where higher is
        better, such as TaSL's importance expanded from a grain of the map; or `GraftScores`.
        per_layer: `int(sparsity * n)` of each tensor's n elements instead.
        grain: `element`, or another grain of the map: then whole groups are taken in the order of their mean score,
        each if it still fits into the rest of k. Elements that the grain does not cover stay out, and for `unit` also
        those that no unit owns.
        unit_map: the model's map, for the grain `unit`. seed: seeds `random` and the grain `partition:K`; any whole
            number from 0.

    Returns:
        A graft with the fine-tuned values.

    Raises:
        GraftError: the models do not fit each other or do not differ, elements are not finite, the sparsity selects
            nothing or everything, or scores do not fit the candidates. ConfigError: a pattern matches nothing, or the
            rule or grain is unknown.
    """
    whole("seed", seed, 0)
    why = no_pairs(pretrained) if grain == "lora_pair" else None
    if why is not None:
        raise GraftError(why)
    pairs = candidates(pretrained, finetuned, only, skip)
    check_moved(pairs)
    by = by.values if isinstance(by, GraftScores) else by
    scores = _element_scores(pairs, by, seed)
    if per_layer and grain != "element":
        raise ConfigError(f"per_layer: got grain {grain!r}, expected element; groups are taken over all tensors")
    total = sum(_numel(k) for k in pairs.kinds.values())
    if per_layer:
        at = _per_layer(scores, sparsity)
    elif grain != "element":
        at = _groups(scores, size_of(sparsity, total), grain, unit_map, seed)
    else:
        at = _best(scores, size_of(sparsity, total), signed=not isinstance(by, str))
    return filled(pairs, at)


def filled(pairs: Pairs, at: Mapping[str, Tensor]) -> Graft:
    """The graft at these flat indices, with values and the digests of the tensors that it changes."""
    values, base = {}, {}
    for name, i in at.items():
        if len(i):
            before, after = pairs[name]
            values[name] = after.reshape(-1)[i.to(after.device, torch.long)].cpu()
            base[name] = digest_of(before)
    shapes = {n: k.shape for n, k in pairs.kinds.items()}
    return Graft(shapes, {n: at[n].cpu() for n in values}, values, base)


def check_moved(pairs: Pairs) -> None:
    """Raise `GraftError` if the difference is zero everywhere, or not finite somewhere."""
    moved = False
    for name in pairs:
        d = change_of(pairs[name])
        bad = int((~torch.isfinite(d)).sum())
        if bad:
            raise GraftError(
                f"{name}: the difference of {bad} of {d.numel()} elements is NaN or infinite; is a checkpoint damaged, "
                "or did the fine-tuning diverge?"
            )
        moved = moved or bool(d.any())
    if not moved:
        raise GraftError(
            f"the two models are equal in all {len(pairs)} participating tensors, so there is nothing to graft; was "
            "the model fine-tuned in place, or do only= and skip= leave out the trained tensors?"
        )


def change_of(pair: tuple[Tensor, Tensor]) -> Tensor:
    """`theta_ft - theta_pre`, float32 or wider, on the pretrained tensor's device."""
    before, after = pair
    kind = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    return after.to(before.device, kind) - before.to(kind)


def seed_of(*words: object) -> int:
    """A seed for torch's generators, made from a purpose, a seed of any size, and anything else that distinguishes
    draws. (torch's CPU generator uses only the low 32 bits of a seed.)"""
    return int.from_bytes(hashlib.sha256(":".join(map(str, words)).encode()).digest()[:4], "little")


def drawn(shape: Sequence[int], purpose: str, seed: int, name: str) -> Tensor:
    """Numbers in [0, 1) for one tensor: always the same for the same purpose, seed and name, and different
    otherwise."""
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed_of(purpose, seed, name)))


def _element_scores(pairs: Pairs, by: str | Mapping[str, Tensor], seed: int) -> Lazy[Tensor]:
    """Scores of all elements, made on demand."""
    make: Callable[[str], Tensor]
    if isinstance(by, Mapping):
        _check_scores(pairs, by)

        def make(name: str) -> Tensor:
            return by[name].detach().to(torch.float32).expand(pairs.kinds[name].shape)

    elif by == "random":

        def make(name: str) -> Tensor:
            return drawn(pairs.kinds[name].shape, "random", seed, name)

    else:
        one_of("by", str(by), SELECTED_BY)

        def make(name: str) -> Tensor:
            return change_of(pairs[name]).abs()

    return Lazy({n: Kind(k.shape, torch.float32) for n, k in pairs.kinds.items()}, make)


def _check_scores(pairs: Pairs, by: Mapping[str, Tensor]) -> None:
    missing = [n for n in pairs if n not in by]
    unknown = [n for n in by if n not in pairs]
    if missing:
        raise GraftError(
            f"by: no scores for {missing[0]} ({len(missing)} such tensors); pass only= with the names that have scores"
        )
    if unknown:
        raise GraftError(
            f"by: scores for {unknown[0]}, which takes no part; did you mean {nearest(unknown[0], pairs)}?"
        )
    for name, x in by.items():
        shape = pairs.kinds[name].shape
        try:
            fits = torch.broadcast_shapes(tuple(x.shape), shape) == torch.Size(shape)
        except RuntimeError:
            fits = False
        if not fits:
            raise GraftError(f"{name}: scores of shape {list(x.shape)}, expected one that broadcasts to {list(shape)}")
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise GraftError(f"{name}: {bad} of {x.numel()} scores are NaN or infinite, expected finite numbers")


def _best(scores: Lazy[Tensor], k: int, signed: bool) -> dict[str, Tensor]:
    if signed:
        return {n: m.reshape(-1).nonzero().view(-1) for n, m in highest(scores, k).items()}
    cut = largest(scores, k)
    return {n: cut.mask(n, scores[n]).reshape(-1).nonzero().view(-1) for n in scores}


def _per_layer(scores: Lazy[Tensor], sparsity: float) -> dict[str, Tensor]:
    size_of(sparsity, sum(_numel(k) for k in scores.kinds.values()))
    at: dict[str, Tensor] = {}
    for name, kind in scores.kinds.items():
        k = int(sparsity * _numel(kind))
        if k:
            at |= {n: m.reshape(-1).nonzero().view(-1) for n, m in highest({name: scores[name]}, k).items()}
    if not at:
        largest_one = max(_numel(k) for k in scores.kinds.values())
        raise GraftError(
            f"sparsity: {sparsity!r} selects no element of any tensor; the largest has {largest_one:,} elements; "
            f"pass at least {1 / largest_one:.2g}, or per_layer=False"
        )
    return at


def _groups(scores: Lazy[Tensor], k: int, name: str, unit_map: UnitMap | None, seed: int) -> dict[str, Tensor]:
    grain = make_grain(name, {n: kind.shape for n, kind in scores.kinds.items()}, unit_map, seed)
    means = grain.reduce(scores)
    one = torch.ones((), dtype=torch.float64)
    sizes = grain.reduce({n: one.expand(s) for n, s in grain.shapes.items()}, "sum").long().tolist()
    on = torch.zeros(grain.size, dtype=torch.bool)
    left = k
    for i in torch.sort(means, descending=True, stable=True).indices.tolist():
        if 0 < sizes[i] <= left and not (name == "unit" and i == ALWAYS_ON):
            on[i], left = True, left - sizes[i]
    if left == k:
        smallest = min(s for s in sizes if s)
        raise GraftError(
            f"sparsity: {k:,} elements are fewer than the {smallest:,} of the smallest of {grain.size} groups of "
            f"the grain {name}; pass a larger sparsity or a finer grain"
        )
    masks = grain.expand(on)
    return {n: m.expand(grain.shapes[n]).reshape(-1).nonzero().view(-1) for n, m in masks.items()}


def _numel(kind: Any) -> int:
    return torch.Size(kind.shape).numel()
