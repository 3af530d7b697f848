"""A picture of how often the task of an input is found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import ConfigError
from .heatmap import MOST_NUMBERS
from .picture import INK, MUTED, SHADES, dress, new_figure, png, separate, short


def draw_routing(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> bytes:
    """A PNG of the confusion of tasks: in the row of a task, the share of its inputs that was assigned to each task.

    Args:
        confusion: `[T, T]`, the number of inputs of the row's task that were assigned to the column's.

    Raises:
        ConfigError: a matrix of another shape, or matplotlib is not installed.
    """
    counts, size = np.asarray(confusion, dtype=float), len(names)
    if counts.shape != (size, size) or not size:
        raise ConfigError(f"confusion: got shape {list(counts.shape)}, expected {[size, size]}")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = new_figure(3.6 + 0.48 * size, 2.3 + 0.44 * size)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap=SHADES, vmin=0.0, vmax=1.25)  # the dark end stays unused, so that numbers stay readable
    if size <= MOST_NUMBERS:
        for i, j in np.ndindex(size, size):
            dark = shares[i, j] > 0.6
            text = f"{100 * shares[i, j]:.0f}"
            axes.text(j, i, text, ha="center", va="center", color="white" if dark else INK, fontsize=8)
    axes.set_xticks(range(size), [str(t) for t in range(size)])
    axes.set_yticks(range(size), [f"{short(name)}  {t}" for t, name in enumerate(names)])
    axes.set_xlabel("task answered", color=MUTED)
    axes.set_ylabel("task of the input", color=MUTED)
    separate(axes, size, size)
    dress(axes, f"Which task an input is taken for, in %: {100 * counts.trace() / max(counts.sum(), 1):.1f} right")
    return png(figure)
