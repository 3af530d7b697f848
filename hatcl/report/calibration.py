"""Pictures of grafts: how well confidence matches accuracy, and accuracy against the share of kept elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.measures import Calibration
from ..errors import ConfigError
from .heatmap import LINES
from .picture import BAR, FREE, INK, MUTED, dress, new_figure, png, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACROSS = 4  # panels in a row
STEP_ASIDE = 1.07  # the factor between the lines of two rules, on a logarithmic axis
OVER, UNDER = "#d1603d", "#4f9d69"


def draw_reliability(calibrations: Mapping[str, Calibration]) -> bytes:
    """A PNG of reliability diagrams: a panel per model, in it a bar of accuracy per bin of confidence.

    Orange marks how much the bin's confidence exceeds its accuracy, green how much its accuracy exceeds its confidence.
    The number of examples per bin is drawn below (Guo et al. 2017, arXiv 1706.04599, fig. 1).

    Raises:
        ConfigError: no calibrations, or matplotlib is not installed.
    """
    if not calibrations:
        raise ConfigError("calibrations: got none, expected at least one model's")
    across = min(ACROSS, len(calibrations))
    down = -(-len(calibrations) // across)
    figure = new_figure(max(3.4, 2.7 * across + 0.4), 3.5 * down + 0.4)
    grid = figure.add_gridspec(2 * down, across, height_ratios=[4, 1] * down)
    most = max(float(c.count.max() / c.count.sum()) for c in calibrations.values())
    for i, (name, measured) in enumerate(calibrations.items()):
        row, column = divmod(i, across)
        upper = figure.add_subplot(grid[2 * row, column])
        lower = figure.add_subplot(grid[2 * row + 1, column], sharex=upper)
        _draw_bins(upper, measured, f"{short(name)}: ECE {100 * measured.ece:.1f} %", first=column == 0)
        _draw_counts(lower, measured, most, first=column == 0)
    figure.legend(
        *upper.get_legend_handles_labels(), loc="outside lower center", ncols=(1, 2, 2, 4)[across - 1],
        frameon=False, fontsize=8, labelcolor=INK,
    )  # fmt: skip
    return png(figure)


def _draw_bins(axes: Axes, measured: Calibration, title: str, first: bool) -> None:
    left, width = measured.edges[:-1].numpy(), np.diff(measured.edges.numpy())
    accuracy, confidence = measured.accuracy.numpy(), measured.confidence.numpy()
    axes.set_facecolor(FREE)
    over, under = (np.maximum(gap, 0) for gap in (confidence - accuracy, accuracy - confidence))
    both = np.minimum(accuracy, confidence)
    for height, bottom, colour, label in (
        (both, 0, BAR, "accuracy"),
        (over, both, OVER, "too sure: accuracy is lower than confidence"),
        (under, both, UNDER, "not sure enough: accuracy is higher"),
    ):
        axes.bar(
            left, height, width, bottom=bottom, align="edge", color=colour, edgecolor="white", linewidth=0.6,
            alpha=1 if colour == BAR else 0.5, label=label,
        )  # fmt: skip
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--", label="confidence")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0", "50", "100"] if first else [""] * 3)
    if first:
        axes.set_ylabel("accuracy in %", color=MUTED)
    dress(axes, title)
    axes.tick_params(labelbottom=False)


def _draw_counts(axes: Axes, measured: Calibration, most: float, first: bool) -> None:
    left, width = measured.edges[:-1].numpy(), np.diff(measured.edges.numpy())
    share = 100 * measured.count.numpy() / measured.count.sum().item()
    axes.bar(left, share, width, align="edge", color=MUTED, edgecolor="white", linewidth=0.6)
    axes.set_xticks([0, 0.5, 1], ["0", "50", "100"])
    axes.set_yticks([0, 100 * most], ["0", f"{100 * most:.0f}"] if first else ["", ""])
    axes.set_ylim(0, 100 * most)
    axes.set_xlabel("confidence in %", color=MUTED)
    if first:
        axes.set_ylabel("examples in %", color=MUTED)
    dress(axes, "")


def draw_graft_curve(
    rows: Sequence[Mapping[str, Any]], *, pretrained: float, finetuned: float, measure: str = "accuracy"
) -> bytes:
    """A PNG of a measure against sparsity on a logarithmic axis, a line per rule of selection.

    Args:
        rows: `by`, `sparsity` and the measure of each graft; for several with the same rule and sparsity (seeds) the
        mean is drawn with a bar from the lowest to the highest.
        pretrained, finetuned: the measure of the two models, drawn as horizontal lines. measure: the key and the axis's
            name.

    Raises:
        ConfigError: there are no rows, a row lacks one of the three, a sparsity is not above 0, or matplotlib is not
            installed.
    """
    if not rows:
        raise ConfigError("rows: got none, expected at least one graft's")
    for row in rows:
        missing = [key for key in ("by", "sparsity", measure) if key not in row]
        if missing or not row["sparsity"] > 0:
            what = f"none of {missing[0]!r}" if missing else f"sparsity {row['sparsity']}"
            raise ConfigError(f"rows: got {what} in {dict(row)}, expected by, a sparsity above 0 and {measure}")
    figure = new_figure(7.2, 4.2)
    axes = figure.add_subplot()
    rules = list(dict.fromkeys(row["by"] for row in rows))
    for i, rule in enumerate(rules):
        own = [row for row in rows if row["by"] == rule]
        places = sorted({row["sparsity"] for row in own})
        values = [[100 * row[measure] for row in own if row["sparsity"] == at] for at in places]
        colour = LINES[i % len(LINES)]
        if any(len(v) > 1 for v in values):  # a bar at each point, since bands of several lines would overlap
            beside = [at * STEP_ASIDE ** (i - (len(rules) - 1) / 2) for at in places]
            axes.vlines(
                beside, [min(v) for v in values], [max(v) for v in values], color=colour, linewidth=1.5, alpha=0.7
            )
            places = beside
        axes.plot(
            places, [sum(v) / len(v) for v in values], color=colour, marker="o", markersize=4, label=short(rule, 24)
        )
    for name, value, style in (("fine-tuned", finetuned, "-"), ("pretrained", pretrained, "--")):
        axes.axhline(100 * value, color=MUTED, linewidth=1, linestyle=style, zorder=0, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("sparsity: share of the elements that the graft holds", color=MUTED)
    axes.set_ylabel(f"{measure} in %", color=MUTED)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.01, 1))
    dress(axes, f"{measure[:1].upper()}{measure[1:]} of grafts against their size")
    return png(figure)
