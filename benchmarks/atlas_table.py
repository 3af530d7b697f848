"""The results of `atlas.py` as tables: means over the available seeds, in percent, with their standard deviations.

python benchmarks/atlas_table.py [convnext resnet20 minilm]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from common import RESULTS

NETWORKS = ("convnext", "resnet20", "minilm")
PARTS = ("validation", "test")
Rows = Mapping[str, Any]


def line(title: str, *columns: list[float]) -> None:
    """A row: one mean per column over the seeds."""
    cells = [100 * np.array(c) for c in columns]
    shown = [f"{c.mean():.1f} ({c.std(ddof=1):.1f})" if len(c) > 1 else f"{c.mean():.1f}" for c in cells]
    print("|", " | ".join([title, *shown]), "|")


def head(title: str, *columns: str) -> None:
    print("\n|", " | ".join([title, *columns]), "|\n|" + "---|" * (len(columns) + 1))


def addition(runs: list[Rows]) -> None:
    renewed = "test, statistics renewed"
    parts = [*PARTS, *([renewed] if renewed in runs[0]["pretrained"] else [])]
    head("addition", *(f"{part}, {m}" for part in parts for m in ("mean", "normalised")))
    for n in runs[0]:
        if n not in ("finetuned", "seconds"):
            line(n, *([r[n][part][m] for r in runs] for part in parts for m in ("mean", "normalised")))
    line("finetuned, each its own task", *([float(np.mean(r["finetuned"][part])) for r in runs] for part in PARTS))


def tasks(run: Rows, get: Callable[[Rows], float]) -> list[float]:
    return [get(rows) for name, rows in run.items() if name not in ("seconds", "control before")]


def negation(runs: list[Rows]) -> None:
    head("negation", *(f"{part}, {what}" for part in PARTS for what in ("fall, mean", "fall, least", "control kept")))
    for n in ("search", "anisotropic"):
        columns: list[list[float]] = []
        for part in PARTS:
            falls = [tasks(r, lambda t: 1 - t[n][part]["target"] / t["before"][part]) for r in runs]  # noqa: B023
            kept = [tasks(r, lambda t: t[n][part]["control"] / r["control before"][part]) for r in runs]  # noqa: B023
            columns += [[float(np.mean(f)) for f in falls], [min(f) for f in falls], [min(k) for k in kept]]
        line(n, *columns)


def few_shot(runs: list[Rows]) -> None:
    shots = [key.split()[1] for key in next(iter(runs[0].values())) if key.startswith("block")]
    head("few shots per class", "0", *shots)
    for grain in ("global", "block"):
        columns = [[float(np.mean(tasks(r, lambda t: t[k]))) for r in runs]  # noqa: B023
                   for k in ("0", *(f"{grain} {k}" for k in shots))]  # fmt: skip
        line(grain, *columns)


def partitions(runs: list[Rows]) -> None:
    parts = list(next(iter(runs[0].values())))
    head("parts per block", *parts)
    line("all training examples", *([float(np.mean(tasks(r, lambda t: t[k]))) for r in runs] for k in parts))  # noqa: B023


def adaptation(runs: list[Rows]) -> None:
    names = [n for n in runs[0] if n != "seconds"]
    head("no labels", *names, "all", "gained, all", "95 % half interval of one task and seed")
    for way in next(iter(runs[0].values())):
        each = [[r[n][way]["accuracy"] for r in runs] for n in names]
        gained = [float(np.mean(tasks(r, lambda t: t[way]["accuracy"] - t["none"]["accuracy"]))) for r in runs]  # noqa: B023
        half = [r[n][way]["half_interval"] for r in runs for n in names]
        line(way, *each, list(np.mean(each, axis=0)), gained, [max(half)] * 2)


def main() -> None:
    for name in sys.argv[1:] or NETWORKS:
        runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"atlas_{name}_seed*.json"))]
        print(f"\n## {name}, {len(runs)} seeds")
        for part in (addition, negation, few_shot, partitions, adaptation):
            have = [run[part.__name__] for run in runs if part.__name__ in run]
            if have:
                part(have)


if __name__ == "__main__":
    main()
