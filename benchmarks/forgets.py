"""The README's figure: the accuracy on each of five tasks of digits after each task learned, in sequence and by hatcl.

    python benchmarks/forgets.py     # in three minutes: results/forgets.json and docs/forgets.svg

It runs `hatcl train --method sequential` and `hatcl train` with their defaults and three seeds: scikit-learn's digits,
five tasks of two classes, one `hat_test_resnet`. The accuracy matrices on the test images are read from their folders.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import read, save

from hatcl.report.picture import INK, MUTED, new_figure

NAME, FIGURE = "forgets", Path(__file__).parents[1] / "docs" / "forgets.svg"
METHODS = {"sequential": "one network, trained in sequence", "hat": "the same network with hatcl"}
COLOURS = ["#3a7ca5", "#d1495b", "#66a182", "#edae49", "#7d5ba6"]


def matrix(method: str, seed: int, folder: Path) -> list[list[float | None]]:
    """`matrix[i][j]`: accuracy on task j after task i."""
    command = [sys.executable, "-m", "hatcl", "train", "--method", method, "--seed", str(seed), "--output", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "metrics.json").read_text())["matrix"]


def main() -> None:
    if not read(NAME):
        with tempfile.TemporaryDirectory() as work:
            save(NAME, {m: [matrix(m, s, Path(work) / f"{m}{s}") for s in range(3)] for m in METHODS})
    found = {m: read(NAME)[m] for m in METHODS}
    figure = new_figure(9.6, 3.4)
    for axes, (method, runs) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        count = len(runs[0])
        for task, colour in zip(range(count), COLOURS, strict=True):
            after = range(task, count)
            each = [[100 * run[i][task] for i in after] for run in runs]
            mean = [statistics.fmean(values) for values in zip(*each, strict=True)]
            for values in each:
                axes.plot(after, values, color=colour, alpha=0.3, linewidth=0.9)
            axes.plot(
                after, mean, color=colour, linewidth=2.4, marker="o", markersize=5, label=f"{2 * task}-{2 * task + 1}"
            )
        average = statistics.fmean(100 * run[-1][j] for run in runs for j in range(count))
        axes.set_title(f"{METHODS[method]}: {average:.1f} % at the end", loc="left", color=INK, fontsize=11)
        axes.set_xticks(range(count), [f"{2 * i}-{2 * i + 1}" for i in range(count)])
        axes.set_xlabel("after learning the digits", color=MUTED)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#edf1f4")
    left, right = figure.axes
    left.set_ylabel("accuracy in %", color=MUTED)
    right.legend(title="tested on", frameon=False, loc="lower right", fontsize=9)
    figure.savefig(FIGURE, metadata={"Date": None})
    for method, runs in found.items():
        averages = [100 * statistics.fmean(run[-1]) for run in runs]
        print(f"{method}: {statistics.fmean(averages):.1f} % ({statistics.stdev(averages):.1f})")


if __name__ == "__main__":
    main()
