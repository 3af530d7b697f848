"""Consolidate the adapter of all earlier tasks with that of the current one, group by group (TaSL, Feng et al.
2024, arXiv 2408.05200)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Changeable, number, one_of, without_effect
from ..errors import ConfigError, SkillError
from ..map.grains import make_grain
from .product import best_factors, factor_pairs, fit_each_other
from .scores import SkillScores, check_same_groups, localize

MODES = ("cases", "adaptive", "coarse")
AVERAGES = ("factors", "product")
READ_BY = {  # the mode that reads each option
    "cases": ("both", "previous_only", "current_only", "neither", "share", "threshold"),
    "adaptive": ("temperature",),
    "coarse": ("coarse",),
}
Weights = tuple[float, float]


@dataclass(frozen=True)
class ConsolidateOptions(Changeable):
    """How `consolidate` weighs two adapters. Every pair of weights is (previous, current); both are at least 0 and sum
    to 1, because the result is a mean: another sum would shrink or grow the adapter with every task (and, with
    `factors`, its effect by the square).

    Args:
        mode: `cases`: TaSL's four cases, by the adapters that a group is important to. `adaptive`: a softmax of the two
            scores over `temperature` instead of hard cases (the form in TaSL's code for `lora_pair`). `coarse`:
            one pair of weights for the whole model, for comparison.
        both, previous_only, current_only, neither: the weights of the four cases.
        temperature: for `adaptive`; higher is nearer to the plain mean. coarse: the weights of `coarse`.
        average: `factors` takes the means of A and of B, as published; the product of means has cross terms,
            `B_previous A_current`, that neither task learned. `product` takes the mean of the products B A and finds
            its best factors of the same rank.
        share: the share of the groups that are important, in each of the two scores separately (`localize`). threshold:
            instead of the share, the score, scaled to 0..1, above which a group is important.

    Raises:
        ConfigError: a value is outside its range, or has no effect in this mode or with a threshold.
    """

    mode: str = "cases"
    both: Weights = (0.7, 0.3)
    previous_only: Weights = (1.0, 0.0)
    current_only: Weights = (0.0, 1.0)
    neither: Weights = (0.5, 0.5)
    temperature: float = 0.25
    coarse: Weights = (0.5, 0.5)
    average: str = "factors"
    share: float = 0.2
    threshold: float | None = None

    def __post_init__(self) -> None:
        one_of("mode", self.mode, MODES)
        one_of("average", self.average, AVERAGES)
        for name in ("both", "previous_only", "current_only", "neither", "coarse"):
            given = getattr(self, name)
            value = tuple(given) if isinstance(given, (tuple, list)) else ()
            numbers = len(value) == 2 and all(isinstance(w, (int, float)) for w in value)
            # two decimal numbers that sum to one do so up to rounding, 1e-16
            if not numbers or not min(value) >= 0 or not abs(sum(value) - 1) < 1e-9:
                raise ConfigError(
                    f"{name}: got {given!r}, expected two weights, of the previous and of the current "
                    "adapter, that are at least 0 and sum to 1"
                )
            object.__setattr__(self, name, value)
        number("temperature", self.temperature, 0, without="low")
        number("share", self.share, 0, 1, without="low", what="a share of the groups")
        if self.threshold is not None:
            number("threshold", self.threshold, 0, 1, what="a normalised score")
            without_effect(self, ["share"], f"threshold={self.threshold!r}", "remove the threshold")
        for mode, names in READ_BY.items():
            if mode != self.mode:
                without_effect(self, names, f"mode={self.mode!r}", f"pass mode={mode!r}")

    @property
    def unscored(self) -> Weights:
        """The weights of a tensor without a score."""
        return {"cases": self.neither, "adaptive": (0.5, 0.5), "coarse": self.coarse}[self.mode]


def consolidate(
    previous: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
    previous_scores: SkillScores | None,
    current_scores: SkillScores | None,
    options: ConsolidateOptions | Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """`w_p * previous + w_c * current` for every group of the scores' grain, with the weights of `group_weights`.

    `average="factors"`: every tensor separately, A with the weights of its groups and B with those of its own.

    `average="product"`: for each pair of factors, the best factors of its rank for `B_p diag(w_p) A_p + B_c diag(w_c)
    A_c`, rotated to be nearest to the result of `factors`, so that pair r stays as close as possible to the pair that
    the scores of earlier tasks cover (`best_factors`). If every pair is taken entirely from one of the two, the pairs
    stay bit for bit. One product needs one weight per pair: if A and B have separate scores and therefore weights
    (grains `matrix` and `block`), it is the mean of the two. The scaling `alpha / r` that peft multiplies in is the
    same for both adapters and cancels; the tensors do not show it, so adapters with another `lora_alpha` must be scaled
    first. A tensor that is not a factor is averaged directly.

    A tensor that the grain does not cover (biases and norms in `matrix` and `lora_pair`) counts as important to
    neither: it gets the weights `neither`, in mode `adaptive` those of equal scores, in mode `coarse` those of
    `coarse`.

    Args:
        previous, current: the tensors of both by the same names, as from `skill_tensors` (or peft's file, unless its
        config has `target_parameters`: for experts, rows of A and columns of B are not pairs, which names and shapes do
        not show); dtypes and devices may differ.
        previous_scores: the scores over all earlier tasks (`accumulate_scores`). current_scores: those of the current
        task alone. `coarse` needs neither (None).
        options: `ConsolidateOptions`, or a mapping of the options to change.

    Returns:
        New tensors with the names, order, dtypes and devices of `current`. The arguments are not changed.

    Raises:
        SkillError: the adapters differ in targets or ranks, tensors are not finite, or scores are missing, for other
            tensors, or of two grains. ConfigError: see `ConsolidateOptions`.
    """
    chosen = ConsolidateOptions().changed(options)
    _same_tensors(previous, current)
    share = _current_weight(current, previous_scores, current_scores, chosen)
    pairs = factor_pairs(current) if chosen.average == "product" else []
    for a, b in pairs:
        fit_each_other(a, current[a], current[b])
    out = {n: _weighted_mean(previous[n].detach(), x.detach(), share[n]) for n, x in current.items()}
    for a, b in pairs:
        rank = len(current[a])
        w = ((share[a].flatten() + share[b].flatten()) / 2).expand(rank)
        if ((w == 0) | (w == 1)).all():  # each pair comes entirely from one of the two
            continue
        two = [(current[a], current[b], w), (previous[a], previous[b], 1 - w)]
        out[a], out[b] = best_factors(two, rank, like=(out[a], out[b]))
    return out


def group_weights(
    previous: SkillScores, current: SkillScores, options: ConsolidateOptions | Mapping[str, Any] | None = None
) -> Tensor:
    """The weights of the previous and of the current adapter, float64 `[G, 2]`, for each group of the
    scores.

    `cases` localises both separately. `adaptive` is `softmax([N(previous), N(current)] / temperature)` with N as in
    `SkillScores.normalised`: raw scores are products of small numbers, for which no temperature fits.

    Raises:
        SkillError: the scores are of two grains or for other tensors. ConfigError: see `ConsolidateOptions`.
    """
    chosen = ConsolidateOptions().changed(options)
    check_same_groups(previous, current, ("the previous scores", "the current scores"))
    if chosen.mode == "coarse":
        return torch.tensor(chosen.coarse, dtype=torch.float64).repeat(len(current.values), 1)
    if chosen.mode == "adaptive":
        both = torch.stack([s.normalised().values.double() for s in (previous, current)], 1)
        return (both / chosen.temperature).softmax(1)
    of_previous, of_current = (localize(s, chosen.share, chosen.threshold).on.long() for s in (previous, current))
    cases = [chosen.neither, chosen.current_only, chosen.previous_only, chosen.both]
    return torch.tensor(cases, dtype=torch.float64)[2 * of_previous + of_current]


def _current_weight(
    tensors: Mapping[str, Tensor],
    previous: SkillScores | None,
    current: SkillScores | None,
    options: ConsolidateOptions,
) -> dict[str, Tensor]:
    """The weight of the current adapter for each tensor, of shapes that broadcast."""
    if previous is None or current is None:
        if options.mode != "coarse":
            which = "previous" if previous is None else "current"
            raise SkillError(f"mode {options.mode!r} needs the {which} scores, got None; only 'coarse' does without")
        return dict.fromkeys(tensors, torch.tensor(options.coarse[1], dtype=torch.float64))
    weights = group_weights(previous, current, options)
    shapes = {n: tuple(x.shape) for n, x in tensors.items()}
    _same_shapes(current.shapes, "scores", {n: s for n, s in shapes.items() if n in current.shapes}, "adapters")
    _same_shapes(current.shapes, "scores", make_grain(current.grain, shapes).shapes, "adapters")
    grain = make_grain(current.grain, current.shapes)  # in the scores' own order, which numbers their groups
    return {
        **dict.fromkeys(tensors, torch.tensor(options.unscored[1], dtype=torch.float64)),
        **grain.expand(weights[:, 1]),
    }


def _weighted_mean(previous: Tensor, current: Tensor, weight: Tensor) -> Tensor:
    """`(1 - weight) * previous + weight * current` in at least float32, exact where the two are equal or the weight is
    0 or 1."""
    kind = torch.promote_types(torch.promote_types(previous.dtype, current.dtype), torch.float32)
    p, c = previous.to(current.device, kind), current.to(kind)
    return torch.lerp(p, c, weight.to(c)).to(current.dtype)


def _same_tensors(previous: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    if not previous or not current:
        which = "previous" if not previous else "current"
        raise SkillError(f"the {which} adapter has no tensors; use skill_tensors(model, adapter)")
    shapes = [{n: tuple(x.shape) for n, x in adapter.items()} for adapter in (previous, current)]
    _same_shapes(shapes[0], "previous adapter", shapes[1], "current adapter")
    for which, adapter in (("previous", previous), ("current", current)):
        for name, x in adapter.items():
            if not x.is_floating_point():
                raise SkillError(f"{name}: {x.dtype} in the {which} adapter, expected a floating-point tensor")
            if not x.isfinite().all():
                bad = int((~x.isfinite()).sum())
                raise SkillError(
                    f"{name}: {bad} of {x.numel()} elements of the {which} adapter are NaN or infinite; its training "
                    "diverged, train it again with a lower learning rate"
                )


def _same_shapes(
    one: Mapping[str, tuple[int, ...]],
    one_name: str,
    two: Mapping[str, tuple[int, ...]],
    two_name: str,
) -> None:
    """Raise `SkillError` for the first tensor in which the two differ."""
    remedy = "both need the same target_modules and rank: one LoraConfig for all tasks of a sequence"
    for name in [*one, *two]:
        if name not in one or name not in two:
            which, lacks, held = (one_name, two_name, one) if name in one else (two_name, one_name, two)
            more = sum(n not in one or n not in two for n in held)
            raise SkillError(
                f"{name} {list(held[name])} is in the {which} but not in the {lacks} ({more} such); {remedy}"
            )
        if one[name] != two[name]:
            raise SkillError(
                f"{name} is {list(one[name])} in the {one_name}, {list(two[name])} in the {two_name}; {remedy}"
            )
