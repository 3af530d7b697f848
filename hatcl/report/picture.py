"""One picture of a run: the accuracy matrix and how the tasks share the network's units."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError
from ..functional import own_measure, score_text, score_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED = "#1b2733", "#5d6975"
MOST_NAMES = 40  # the most names of layers that are readable below a panel
BAR, FREE, SHADES = "#3a7ca5", "#edf1f4", "Blues"


def draw_run(metrics: Mapping[str, Any], numbers: Sequence[int] | None = None) -> bytes:
    """A PNG of a run of `hat`: its accuracy matrix, the units on for each task, and their share in each layer.

    Args:
        metrics: the result of `SequenceResult.to_dict`, or the content of `metrics.json`. numbers: the tasks' numbers;
            None = 0, 1, 2, ...

    Raises:
        ConfigError: matplotlib is not installed.
    """
    facts, names = metrics["facts"], metrics["tasks"][: len(metrics["facts"])]
    count, layers = len(names), metrics["details"].get("layers", [])  # none before a run's end
    shown = [str(t) for t in (range(count) if numbers is None else numbers[:count])]
    labels = [f"{i}  {short(name)}" for i, name in zip(shown, names, strict=True)]
    side = max(3.2, 0.44 * count)
    heights = [side]
    if layers:  # none if every parameter is copied per task
        heights.append(1.9 + 0.2 * count)
    figure = new_figure(2 * side + 4.6, sum(heights) + 1.9)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=[1.15, 1])
    rows = [[np.nan if v is None else v for v in row[:count]] for row in metrics["matrix"]]
    by = [*metrics.get("scored_by", ()), *[""] * count][:count]
    _draw_matrix(figure.add_subplot(grid[0, 0]), rows, labels, shown, by)
    used = [known["units_used"] for known in facts]
    _draw_use(figure.add_subplot(grid[0, 1]), used, facts[0]["units"], labels)
    if layers:
        _draw_layers(figure.add_subplot(grid[1, :]), layers, labels)
    figure.suptitle(_headline(metrics), x=0.015, ha="left", color=INK, fontsize=13, fontweight="bold")
    return png(figure)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that is drawn without a display.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "the picture needs matplotlib, which is not installed; run: pip install 'hatcl[plots]'"
        ) from error
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.14, h_pad=0.14, hspace=0.04, wspace=0.04)  # type: ignore[union-attr, call-arg]
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG. Names are drawn literally: a `$` in them does not begin a formula, as it does in ticks."""
    from matplotlib.text import Text

    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        axis.get_ticklabels(which="both")  # creates the labels
    for text in figure.findobj(Text):
        if r"\mathdefault" not in text.get_text():
            text.set_parse_math(False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _headline(metrics: Mapping[str, Any]) -> str:
    own = own_measure(metrics.get("scored_by", ()))
    words = [
        f"{name.replace('_', ' ').replace('accuracy', 'score')} {score_text(metrics[name], own)}{'' if own else ' %'}"
        for name in ("average_accuracy", "forgetting")
        if metrics.get(name) is not None
    ]
    if metrics["details"].get("bit_equal"):
        words.append("every sealed task bit-equal")
    return "   ".join(words)


def _draw_matrix(
    axes: Axes, rows: Sequence[Sequence[float]], labels: Sequence[str], numbers: Sequence[str], by: Sequence[str]
) -> None:
    count = len(labels)
    values = np.full((count, count), np.nan)
    for i, row in enumerate(rows):
        values[i, : len(row)] = row
    low = min(0.5, float(np.nanmin(values)))
    # the ends of the colour map stay unused, so that the lowest accuracy is visible and the highest readable
    image = axes.imshow(values, cmap=SHADES, vmin=low - 0.1, vmax=1.25, aspect="equal")
    for i, j in zip(*np.nonzero(np.isfinite(values)), strict=True):
        dark = values[i, j] > low + 0.6 * (1 - low)
        axes.text(
            j, i, score_text(values[i, j], by[j]), ha="center", va="center", color="white" if dark else INK, fontsize=9
        )
    axes.set_xticks(range(count), numbers)
    axes.set_yticks(range(count), labels)
    axes.set_xlabel("task tested", color=MUTED)
    axes.set_ylabel("after learning", color=MUTED)
    separate(axes, count, count)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04, aspect=24)
    bar.ax.set_ylim(low, 1)
    bar.outline.set_visible(False)
    bar.set_ticks(
        [low, (low + 1) / 2, 1],
        labels=[score_text(v, own_measure(by)) for v in (low, (low + 1) / 2, 1)],
    )
    bar.ax.tick_params(length=0, colors=MUTED)
    dress(axes, f"Score {score_unit(by)}")


def _draw_use(axes: Axes, used: Sequence[int], units: int, labels: Sequence[str]) -> None:
    units = max(1, units)
    places = range(len(used))
    axes.barh(places, [units] * len(used), color=FREE, height=0.66)
    axes.barh(places, used, color=BAR, height=0.66)
    for place, value in zip(places, used, strict=True):
        inside = value > 0.6 * units
        axes.text(
            value + (-0.02 if inside else 0.02) * units,
            place,
            f"{value}  ({100 * value / units:.0f} %)",
            ha="right" if inside else "left",
            va="center",
            color="white" if inside else INK,
            fontsize=9,
        )
    axes.set_yticks(places, labels)
    axes.set_ylim(len(used) - 0.5, -0.5)
    axes.set_xlim(0, units)
    axes.set_xticks([])
    axes.set_xlabel(f"units on, of {units}", color=MUTED)
    dress(axes, "Units used")


def _draw_layers(axes: Axes, layers: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    count = len(labels)
    shares = np.array([[_used(layer, t) / max(1, layer["units"]) for layer in layers] for t in range(count)])
    image = axes.imshow(shares, cmap=SHADES, vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_yticks(range(count), labels)
    named = range(0, len(layers), -(-len(layers) // MOST_NAMES))
    axes.set_xticks(named, [short(layers[i]["name"], 24) for i in named], rotation=90, fontsize=8)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.012, fraction=0.03)
    bar.outline.set_visible(False)
    bar.set_ticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"])
    bar.ax.tick_params(length=0, colors=MUTED)
    separate(axes, len(layers), count)
    dress(axes, f"Share of each layer's units that a task uses ({len(layers)} layers, from input to output)")


def separate(axes: Axes, columns: int, rows: int) -> None:
    """White lines between the cells, if the cells are wide enough."""
    if columns <= 64:
        axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5 if columns <= 32 else 0.5)


def _used(layer: Mapping[str, Any], task: int) -> int:
    used = layer["used"]  # JSON turns the tasks' numbers into text
    return int(used.get(task, used.get(str(task), 0)))


def short(name: str, most: int = 16) -> str:
    """A name shortened to its beginning and its end, since the names of one run often begin alike."""
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}…{name[-tail:]}"


def dress(axes: Axes, title: str) -> None:
    """A title on the left, no frame and no ticks."""
    axes.set_title(title, loc="left", color=INK, fontsize=11, pad=9)
    axes.tick_params(which="both", length=0, colors=MUTED)
    for spine in axes.spines.values():
        spine.set_visible(False)
