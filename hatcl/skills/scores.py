"""Scores of the units of an adapter, their memory over tasks, and the skill: the units that matter for a task
(Feng et al. 2024, arXiv 2408.05200)."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as as_bytes
from torch import Tensor

from ..config import number, one_of
from ..errors import ConfigError, IntegrityError, SkillError
from ..files import parse_json, write_files
from ..map.grains import Grain, make_grain
from ..vectors.files import read_metadata
from ..vectors.tensors import named_tensors

SKILL_GRAINS = ("lora_pair", "matrix", "block")
ABOUT, SCORES = "hatcl.skills", "scores"  # the file's metadata (a single entry, so its order is fixed) and its tensor


@dataclass(frozen=True, eq=False)
class _Groups:
    """Groups of tensors, with values for each group."""

    grain: str
    shapes: Mapping[str, tuple[int, ...]]

    @functools.cached_property
    def _parts(self) -> Grain:
        return make_grain(self.grain, self.shapes)

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each group: `...query[3]` for a pair, the tensor's name for a matrix or block."""
        return self._parts.labels


@dataclass(frozen=True, eq=False)
class SkillScores(_Groups):
    """How important each group of some tensors is.

    Attributes:
        grain: `lora_pair`, `matrix` or `block`. shapes: the shapes of the tensors that it covers.
        values: one finite number per group, `[G]`, on the CPU: float64 from `SkillScorer` (the scores of a pair are
            products of four small numbers, which would be zero in float32), else float32.

    Raises:
        ConfigError: the grain is unknown. SkillError: there is not one number per group, or one, whose label the text
            has, is not finite.
    """

    values: Tensor

    def __post_init__(self) -> None:
        parts = _checked_grain(self, self.values)
        kind = torch.float64 if self.values.dtype == torch.float64 else torch.float32
        values = self.values.detach().to("cpu", kind)
        wrong = (~values.isfinite()).nonzero().flatten().tolist()
        if wrong:
            raise SkillError(
                f"the score of {parts.labels[wrong[0]]} is {float(values[wrong[0]])}, expected finite numbers "
                f"({len(wrong)} of {len(values)} are not); a step had gradients or weights that are not finite: lower "
                "the learning rate, clip, or use a GradScaler, and score again"
            )
        object.__setattr__(self, "values", values)

    def normalised(self) -> SkillScores:
        """`N(x) = (x - min) / (max - min)`, float32; zeros where all are equal (TaSL's code divides by zero there)."""
        x = self.values.double()
        low, high = x.min(), x.max()
        out = (x - low) / (high - low) if bool(high > low) else torch.zeros_like(x)
        return SkillScores(self.grain, self.shapes, out.float())

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per group: `label` and `score`."""
        return [{"label": a, "score": b} for a, b in zip(self.labels, self.values.tolist(), strict=True)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.safetensors` file, and next to it the same as a `.csv` table (label, score). Both are replaced once
        both are on disk.

        Raises:
            SkillError: the path has another suffix. IntegrityError: the disk is full or not writable.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise SkillError(f"{path}: got {path.suffix or 'no suffix'}, expected a file that ends in .safetensors")
        about = json.dumps({"grain": self.grain, "shapes": self.shapes})
        text = io.StringIO()
        table = csv.DictWriter(text, ["label", "score"], lineterminator="\n")
        table.writeheader()
        table.writerows(self.to_rows())
        content = as_bytes({SCORES: self.values.contiguous()}, {ABOUT: about})
        write_files({path.with_suffix(".csv"): text.getvalue().encode(), path: content})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SkillScores:
        """Read a file written by `save`.

        Raises:
            IntegrityError: the file is missing or damaged. SkillError: it holds something else.
        """
        path = Path(path)
        tensors, about = named_tensors(path), read_metadata(path).get(ABOUT)
        if about is None or SCORES not in tensors:
            raise SkillError(
                f"{path} holds {', '.join(sorted(tensors)[:5]) or 'nothing'}, expected scores written by "
                "SkillScores.save"
            )
        options = parse_json(about, path)
        try:
            shapes = {name: tuple(shape) for name, shape in options["shapes"].items()}
            return cls(options["grain"], shapes, tensors[SCORES])
        except (KeyError, AttributeError, TypeError) as error:
            raise IntegrityError(f"{path}: its metadata cannot be read ({error!r}); save it again") from error
        except SkillError as error:
            raise SkillError(f"{path}: {error}") from error


@dataclass(frozen=True, eq=False)
class Skill(_Groups):
    """The groups that matter for a task.

    Attributes:
        grain, shapes: as in its scores. on: whether a group belongs to it, bool `[G]`.

    Raises:
        ConfigError: the grain is unknown. SkillError: there is not one bool per group.
    """

    on: Tensor

    def __post_init__(self) -> None:
        _checked_grain(self, self.on)
        if self.on.dtype != torch.bool:
            raise SkillError(f"on: got {str(self.on.dtype).removeprefix('torch.')}, expected bool")
        object.__setattr__(self, "on", self.on.detach().cpu())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the groups that belong to it."""
        return tuple(label for label, on in zip(self.labels, self.on.tolist(), strict=True) if on)

    def expand(self) -> dict[str, Tensor]:
        """The skill as bool tensors that broadcast over the tensors it covers."""
        return self._parts.expand(self.on)


def accumulate_scores(
    current: SkillScores, previous: SkillScores | None, weights: tuple[float, float] = (0.3, 0.7)
) -> SkillScores:
    """The memory of scores over tasks: `C_k = N(0.3 N(I_k) + 0.7 N(C_{k-1}))`, and `C_1 = N(I_1)`, with N as in
    `SkillScores.normalised`. (As in TaSL's code, where the first task's file holds I_1 itself, which is normalised when
    it is read.)

    Args:
        current: I_k, the scores of the task just learned. previous: C_{k-1}; None for the first task.
        weights: the weights of the current and of the previous scores.

    Raises:
        SkillError: the scores have another grain, or other tensors, which the text names. ConfigError: weights are
            negative, not finite or both zero.
    """
    weights = two_weights("weights", weights)
    if previous is None:
        return current.normalised()
    check_same_groups(current, previous, ("the current scores", "the previous scores"))
    now, before = (scores.normalised().values.double() for scores in (current, previous))
    return SkillScores(current.grain, current.shapes, weights[0] * now + weights[1] * before).normalised()


def two_weights(name: str, value: Any) -> tuple[float, float]:
    """An option that holds the weights of two scores. Raises `ConfigError` for other values."""
    given = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(given) != 2 or not all(isinstance(w, (int, float)) and 0 <= w < math.inf for w in given) or not any(given):
        raise ConfigError(f"{name}: got {value!r}, expected two numbers of at least 0, not both 0")
    return given[0], given[1]


def localize(scores: SkillScores, share: float = 0.2, threshold: float | None = None) -> Skill:
    """The skill: the top share of the groups, or those whose score is above a threshold.

    Of G groups `ceil(share (G - 1))` are on, at least one, and all with share 1: as many as in TaSL's code, which takes
    scores strictly above the percentile `100 (1 - share)`, interpolated between G - 1 steps (3 of 12 groups with share
    0.2). Among equal scores the first ones are on; TaSL's code takes none that equal the percentile.

    Args:
        share: in (0, 1]. threshold: for the normalised scores, in 0..1, instead of a share; it may select nothing.

    Raises:
        ConfigError: the share or threshold is outside its range.
    """
    if threshold is not None:
        number("threshold", threshold, 0, 1, what="a normalised score")
        return Skill(scores.grain, scores.shapes, scores.normalised().values > threshold)
    number("share", share, 0, 1, without="low", what="a share of the groups")
    on = torch.zeros(len(scores.values), dtype=torch.bool)
    count = len(on) if share == 1 else max(1, math.ceil(round(share * (len(on) - 1), 9)))  # .55 * 20 rounds above 11
    on[torch.sort(scores.values, descending=True, stable=True).indices[:count]] = True
    return Skill(scores.grain, scores.shapes, on)


def skill_overlap(a: Skill, b: Skill) -> float:
    """`|a & b| / |b|`: the share of b's groups that are also in a.

    Raises:
        SkillError: the skills have another grain, or other tensors, which the text names; or b has no group.
    """
    check_same_groups(a, b, ("the first skill", "the second skill"))
    if not bool(b.on.any()):
        raise SkillError("the second skill has no group, so no share of it can be in the first; lower its threshold")
    return float((a.on & b.on).sum()) / float(b.on.sum())


def check_same_groups(a: _Groups, b: _Groups, what: tuple[str, str]) -> None:
    """Raise `SkillError` unless two cover the same groups. Args: what: the error's names for the two."""
    if a.grain != b.grain:
        raise SkillError(
            f"{what[0]} have the grain {a.grain}, {what[1]} have {b.grain}; score both with the same grain"
        )
    for name in [*a.shapes, *b.shapes]:
        ours, theirs = (list(x.shapes[name]) if name in x.shapes else "lacking" for x in (a, b))
        if ours != theirs:
            raise SkillError(
                f"{name} is {ours} in {what[0]}, {theirs} in {what[1]}; score adapters of the same rank and targets"
            )
    if list(a.shapes) != list(b.shapes):
        raise SkillError(
            f"{what[0]} and {what[1]} name the same tensors in another order, first {next(iter(a.shapes))} and "
            f"{next(iter(b.shapes))}; score adapters that were made in the same way"
        )


def _checked_grain(of: _Groups, vector: Tensor) -> Grain:
    """The grain of scores or a skill, whose shapes it narrows to those that it covers."""
    one_of("grain", of.grain, SKILL_GRAINS)
    parts = make_grain(of.grain, of.shapes)
    if vector.shape != (parts.size,):
        raise SkillError(
            f"got {list(vector.shape)} values for the {parts.size} groups of {of.grain}, expected one each"
        )
    object.__setattr__(of, "shapes", parts.shapes)
    return parts
