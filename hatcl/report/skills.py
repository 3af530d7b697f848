"""Pictures of skills: where in the network a task's important units are, and how much two tasks' skills overlap."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..config import one_of
from ..errors import ConfigError
from ..map.lora import factor_in
from ..skills.scores import Skill, SkillScores, check_same_groups, skill_overlap
from .heatmap import MOST_NUMBERS
from .picture import FREE, INK, MOST_NAMES, MUTED, SHADES, dress, new_figure, png, separate, short

OF = ("rank", "score")
MOST_ASIDE = 1  # modules named in a title
NARROWEST, WIDEST = 7.0, 16.0  # inches, for the title and for the page
NUMBERED = re.compile(r"[^.]+\.\d+\.")


class LayerPlace(NamedTuple):
    """Where a module is: the layer (`3`, `encoder.block.3`, `head`) and what it is in there (`attn.qkv`)."""

    layer: str
    kind: str


def draw_skills(scores: Mapping[str, SkillScores], of: str = "rank") -> bytes:
    """A PNG of importance: a panel per task, in it a row per type of module and a column per layer.

    Args:
        scores: task name -> its scores, over the same groups. of: `rank`: a cell is the mean rank of its groups among
            all groups of the task, from 0 (lowest) to 1 (highest). `score`: the mean of their normalised scores, a few
            of which are often far above all others.

    Raises:
        ConfigError: no scores, another `of`, or matplotlib is not installed. SkillError: scores of other groups.
    """
    one_of("of", of, OF)
    every = _same_units(scores, "scores")
    places = places_of(every[0].labels)
    alone = _lonely(places)
    in_grid = [p for p in places if p not in alone]
    layers, kinds = (list(dict.fromkeys(names)) for names in zip(*in_grid, strict=True))
    grids = [_grid(heights_of(s, of), places, layers, kinds) for s in every]
    left, width = 0.085 * max(len(_tail(k)) for k in kinds), max(1.9, 0.24 * len(layers))
    down = -(-len(grids) // max(1, min(len(grids), 3, int((WIDEST - left) // width))))
    across = -(-len(grids) // down)  # as many as possible in each row
    names = _short_layers(layers)
    shown = range(0, len(layers), -(-len(layers) // MOST_NAMES))
    below = 0.075 * max(map(len, names)) + 0.35
    height = down * (0.26 * len(kinds) + 0.45) + below + 1.1
    figure = new_figure(min(WIDEST, max(NARROWEST, left + across * width + 1.5)), height)
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for place, axes in enumerate(panels.flat):
        if place >= len(grids):
            axes.set_axis_off()
            continue
        axes.set_facecolor(FREE)
        image = axes.imshow(np.ma.masked_invalid(grids[place]), cmap=SHADES, vmin=0.0, vmax=1.0, aspect="auto")
        heights = heights_of(every[place], of)
        aside = [f"{p.layer} {p.kind} {_mean_at(heights, places, p):.2f}" for p in alone]
        dress(axes, "   ".join([short(list(scores)[place]), *([f"({', '.join(aside)})"] if aside else [])]))
        separate(axes, len(layers), len(kinds))
        axes.set_yticks(range(len(kinds)), [_tail(k) for k in kinds], fontsize=8)
        turned = 0 if max(map(len, names)) <= 2 else 90
        axes.set_xticks(shown, [names[i] for i in shown], fontsize=8, rotation=turned)
        lowest = place + across >= len(grids)
        axes.tick_params(labelbottom=lowest, labelleft=place % across == 0)
        if lowest:
            axes.set_xlabel("layer", color=MUTED)
    bar = figure.colorbar(image, ax=panels, pad=0.02, fraction=0.05, aspect=24)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=MUTED)
    what = {"rank": "mean rank of scores", "score": "mean normalised score"}[of]
    groups = {"lora_pair": "LoRA pairs", "matrix": "matrices", "block": "tensors"}[every[0].grain]
    figure.suptitle(
        f"Importance per layer and module ({what}, {len(places)} {groups})", x=0.015, ha="left", color=INK, fontsize=12
    )
    return png(figure)


def draw_overlap(skills: Mapping[str, Skill]) -> bytes:
    """A PNG of the overlap of each two tasks' skills: the share of the column's groups that the row's skill has too. A
    column is empty where a skill has no group.

    Raises:
        ConfigError: no skills, or matplotlib is not installed. SkillError: skills of other groups.
    """
    every, names = _same_units(skills, "skills"), list(skills)
    count = len(every)
    grid = np.array([[skill_overlap(a, b) if bool(b.on.any()) else np.nan for b in every] for a in every])
    cell = 0.5 if count <= MOST_NUMBERS else 0.28
    figure = new_figure(4.6 + cell * count, 2.9 + cell * count)
    axes = figure.add_subplot()
    axes.set_facecolor(FREE)
    image = axes.imshow(np.ma.masked_invalid(grid), cmap=SHADES, vmin=0.0, vmax=1.25)  # the darkest shades stay unused
    if count <= MOST_NUMBERS:
        for i, j in zip(*np.nonzero(np.isfinite(grid)), strict=True):
            colour = "white" if grid[i, j] > 0.7 else INK
            axes.text(j, i, f"{100 * grid[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_yticks(range(count), [short(name) for name in names])
    axes.set_xticks(range(count), [short(name) for name in names], rotation=90)
    separate(axes, count, count)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04, aspect=24)
    bar.ax.set_ylim(0, 1)
    bar.outline.set_visible(False)
    bar.set_ticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"])
    bar.ax.tick_params(length=0, colors=MUTED)
    sizes = [float(s.on.double().mean()) for s in every]
    chance = (
        f"{100 * min(sizes):.0f}"
        if max(sizes) - min(sizes) < 0.005
        else f"{100 * min(sizes):.0f} to {100 * max(sizes):.0f}"
    )
    dress(axes, f"Overlap of skills in % (by chance {chance})")
    return png(figure)


def places_of(labels: Sequence[str]) -> list[LayerPlace]:
    """Layer and kind of the module of each group: the path in two, after its first number or after its last, whichever
    gives fewer cells (T5 has `block.0.layer.1.DenseReluDense.wi`, one layer with two parts; Swin `layers.0.blocks.1`, a
    layer each); without a number, after its first part. A common start of all paths is left out, and so are numbered
    parts of kinds, unless that would mix different ones (T5's `layer.1.` is the feed-forward in the encoder, in the
    decoder it is not)."""
    paths = [_path(label) for label in labels]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == paths[0][shared] and not p[shared].isdigit() for p in paths):
        shared += 1
    cuts = [[_place_of(p[shared:], last) for p in paths] for last in (False, True)]
    numbered = [i for i, p in enumerate(paths) if any(part.isdigit() for part in p[shared:])]

    def cells(places: list[LayerPlace]) -> int:
        return math.prod(len({places[i][side] for i in numbered}) for side in (0, 1))

    places = min(cuts, key=cells)
    plain = [LayerPlace(p.layer, NUMBERED.sub("", p.kind)) for p in places]
    return plain if len(set(plain)) == len(set(places)) else places


def _lonely(places: Sequence[LayerPlace]) -> list[LayerPlace]:
    """Modules that are the only one of their layer and of their kind, such as a pooler: each would have an empty row
    and an empty column in a grid. None if nothing else is left, or there are too many for a title."""
    found = list(dict.fromkeys(places))
    counted = [Counter(p[side] for p in found) for side in (0, 1)]
    alone = [p for p in found if all(counted[side][p[side]] == 1 for side in (0, 1))]
    return alone if len(alone) < min(len(found), MOST_ASIDE + 1) else []


def _mean_at(heights: np.ndarray, places: Sequence[LayerPlace], at: LayerPlace) -> float:
    return float(np.mean([height for height, place in zip(heights, places, strict=True) if place == at]))


def _path(label: str) -> list[str]:
    """The path of a group's module: without the rank, the factor, and the parameter's own name."""
    parts = label.split("[")[0].split(".")
    at = factor_in(parts)
    if at is not None:
        return parts[:at] or parts
    if label.endswith("]") or len(parts) == 1:
        return parts
    return parts[:-1]


def _place_of(parts: list[str], last: bool) -> LayerPlace:
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    cut = (numbers[-1 if last else 0] if numbers else 0) + 1
    return LayerPlace(".".join(parts[:cut]), ".".join(parts[cut:]) or parts[-1])


def heights_of(scores: SkillScores, of: str) -> np.ndarray:
    """Per group, between 0 and 1; equal scores have the mean of their ranks."""
    if of == "score":
        return scores.normalised().values.double().numpy()
    _, which, counts = torch.unique(scores.values, return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts + 1) / 2
    return (ranks / max(1, len(which) - 1))[which].numpy()


def _grid(heights: np.ndarray, places: Sequence[LayerPlace], layers: list[str], kinds: list[str]) -> np.ndarray:
    """Mean height `[kinds, layers]`, NaN where there is no such module."""
    total, count = (np.zeros((len(kinds), len(layers))) for _ in range(2))
    row, column = ({name: i for i, name in enumerate(names)} for names in (kinds, layers))
    inside = [i for i, p in enumerate(places) if p.kind in row and p.layer in column]
    at = ([row[places[i].kind] for i in inside], [column[places[i].layer] for i in inside])
    np.add.at(total, at, heights[inside])
    np.add.at(count, at, 1)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _same_units(named: Mapping[str, Any], what: str) -> list[Any]:
    if not named:
        raise ConfigError(f"{what}: got none, expected those of at least one task by its name")
    every = list(named.values())
    for name, one in list(named.items())[1:]:
        check_same_groups(every[0], one, (f"the {what} of {next(iter(named))}", f"those of {name}"))
    return every


def _tail(name: str) -> str:
    """The last 24 letters of a name, which distinguish modules."""
    return name if len(name) <= 24 else "…" + name[-23:]


def _short_layers(layers: Sequence[str]) -> list[str]:
    """Short names: only the number for layers in a single numbered row, the last letters for others."""
    counted = [layer.rpartition(".") for layer in layers]
    one = len({stem for stem, _, last in counted if last.isdigit()}) == 1
    return [
        last if one and last.isdigit() else _tail(layer) for layer, (_, _, last) in zip(layers, counted, strict=True)
    ]
