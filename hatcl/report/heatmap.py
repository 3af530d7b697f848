"""Pictures of compositions: coefficients by block and vector, cosines between vectors, accuracy against coefficient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError
from .picture import INK, MUTED, dress, new_figure, png, separate, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIGNED = "RdBu_r"
LINES = ("#3a7ca5", "#d1603d", "#4f9d69", "#8a5a9e", "#b8912f", "#5d6975")
MOST_NUMBERS = 24  # rows or columns, above which numbers are not written into cells


def draw_coefficients(values: Sequence[Sequence[float]], vectors: Sequence[str], blocks: Sequence[str]) -> bytes:
    """A PNG of coefficients: a row per vector, a column per block from input to output, blue below zero, red above.

    Args:
        values: one number per vector and block. blocks: the parameters' names; neighbours of one layer are marked as
            one.

    Raises:
        ConfigError: values of another shape, or matplotlib is not installed.
    """
    grid = np.asarray(values, dtype=float)
    if grid.shape != (len(vectors), len(blocks)) or not grid.size:
        raise ConfigError(f"values: got shape {list(grid.shape)}, expected {[len(vectors), len(blocks)]}")
    layers = layers_of(blocks)
    width = min(24.0, max(7.5, 1.9 + 0.11 * len(blocks), 1.9 + 0.3 * len(layers)))
    figure = new_figure(width, 2.3 + 0.36 * len(vectors))
    axes = figure.add_subplot()
    most = float(np.abs(grid).max()) or 1.0
    image = axes.imshow(grid, cmap=SIGNED, vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    _names(axes, vectors)
    every = -(-len(layers) // 60)  # more names would be unreadable
    shown = layers[::every]
    axes.set_xticks([start for _, start in shown], [short(name) for name, _ in shown], rotation=90, fontsize=8)
    edges = [start - 0.5 for _, start in layers[1:]]
    if len(layers) <= 120:
        axes.vlines(edges, -0.5, len(vectors) - 0.5, color="white", linewidth=0.8)
    axes.hlines(np.arange(1, len(vectors)) - 0.5, -0.5, len(blocks) - 0.5, color="white", linewidth=1.5)
    _bar(figure, axes, image)
    dress(axes, f"Coefficients by task vector and block ({len(blocks)}, from input to output)")
    return png(figure)


def draw_cosines(matrix: Sequence[Sequence[float]], names: Sequence[str]) -> bytes:
    """A PNG of the cosines between task vectors, `[T, T]`.

    Raises:
        ConfigError: a matrix of another shape, or matplotlib is not installed.
    """
    grid = np.asarray(matrix, dtype=float)
    count = len(names)
    if grid.shape != (count, count) or not count:
        raise ConfigError(f"matrix: got shape {list(grid.shape)}, expected {[count, count]}")
    cell = 0.5 if count <= MOST_NUMBERS else 0.28
    figure = new_figure(3.8 + cell * count, 2.4 + cell * count)
    axes = figure.add_subplot()
    image = axes.imshow(grid, cmap=SIGNED, vmin=-1.4, vmax=1.4)  # the darkest ends stay unused for readability
    if count <= MOST_NUMBERS:
        for i, j in np.ndindex(count, count):
            dark = abs(grid[i, j]) > 0.85
            axes.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", color="white" if dark else INK, fontsize=8)
    _names(axes, names)
    axes.set_xticks(range(count), [short(name) for name in names], rotation=90)
    separate(axes, count, count)
    _bar(figure, axes, image, ends=(-1.0, 1.0))
    dress(axes, "Cosines between task vectors")
    return png(figure)


def draw_sweep(scales: Sequence[float], accuracies: Sequence[Sequence[float]], names: Sequence[str]) -> bytes:
    """A PNG of accuracy against coefficient, a line per task vector.

    Args:
        scales: `[S]`. accuracies: `[T, S]`, between 0 and 1.

    Raises:
        ConfigError: accuracies of another shape, or matplotlib is not installed.
    """
    grid = np.asarray(accuracies, dtype=float)
    if grid.shape != (len(names), len(scales)) or not grid.size:
        raise ConfigError(f"accuracies: got shape {list(grid.shape)}, expected {[len(names), len(scales)]}")
    figure = new_figure(7.2, 4.2)
    axes = figure.add_subplot()
    for i, (name, row) in enumerate(zip(names, grid, strict=True)):
        style = ("-", "--", ":")[i // len(LINES) % 3]
        axes.plot(scales, 100 * row, style, color=LINES[i % len(LINES)], marker="o", markersize=3, label=short(name))
    low, high = min(scales), max(scales)
    for at in (0.0, 1.0):  # the pretrained and the fine-tuned model
        if low <= at <= high:
            axes.axvline(at, color=MUTED, linewidth=0.8, alpha=0.5, zorder=0)
    axes.set_xlabel("coefficient (0: pretrained, 1: fine-tuned)", color=MUTED)
    axes.set_ylabel("accuracy in %", color=MUTED)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.01, 1))
    dress(axes, "Accuracy against coefficient")
    return png(figure)


def layers_of(blocks: Sequence[str]) -> list[tuple[str, int]]:
    """Names and first positions of runs of blocks in one layer: a parameter's name up to its last number, else its
    first part (`blocks.0.attn.qkv.weight` -> `blocks.0`, `head.norm.weight` -> `head`). Deeper parts of a layer
    (`layer1.0.downsample.1`) belong to it."""
    out: list[tuple[str, int]] = []
    for i, block in enumerate(blocks):
        parts = block.split(".")
        last = max((k for k, part in enumerate(parts) if part.isdigit()), default=0)
        name = ".".join(parts[: last + 1])
        if not out or not f"{name}.".startswith(f"{out[-1][0]}."):
            out.append((name, i))
    return out


def _names(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [short(name) for name in names])


def _bar(figure: Figure, axes: Axes, image: object, ends: tuple[float, float] | None = None) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04, aspect=24)  # type: ignore[arg-type]
    if ends is not None:
        bar.ax.set_ylim(*ends)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=MUTED)
