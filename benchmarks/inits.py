"""Starts of a task's embeddings and schedules of the scale: five tasks of two digits, an MLP with two layers of 12
units, Adam at 1e-2, 300 steps a task, three seeds. Accuracy is measured on a held-out fifth of the training images; a
task for which there is no room counts as chance. `hat`: hatcl's other defaults. `hat-cl`: the penalty per layer that
forgives 1/T, and s_max = 100. `python benchmarks/inits.py` writes results/inits.json in two minutes."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import torch
from common import save
from digits import accuracy, held_out, learn, mlp

import hatcl

STEPS, SEEDS, WIDTH = 300, range(3), 12
INITS, SCHEDULES = ("normal", "dense", "sparse", "uniform"), ("linear", "cosine")
SETTINGS: dict[str, dict[str, Any]] = {
    "hat": {},
    "hat-cl": {"penalty": "layer", "forgiven": 0.2, "max_scale": 100.0},
}


def run(config: dict[str, Any], seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    data = held_out(seed)
    model = hatcl.convert(mlp(WIDTH), len(data), data[0][0][0][:2], config=config)
    right = []
    for t, (rows, held) in enumerate(data):
        try:
            learn(model, t, rows, torch.optim.Adam(model.parameters(), lr=1e-2), STEPS)
        except hatcl.CapacityError:
            right.append(0.5)
            continue
        right.append(accuracy(model, t, held))
        model.train()
    used = hatcl.describe(model).use
    return {
        "accuracy": statistics.fmean(right),
        "last": right[-1],
        "units": statistics.fmean(used.values()),
        "learned": len(used),
    }


def main() -> None:
    found: dict[str, dict[str, list[float]]] = {}
    for setting, init, schedule in itertools.product(SETTINGS, INITS, SCHEDULES):
        runs = [run({"init": init, "schedule": schedule, **SETTINGS[setting]}, seed) for seed in SEEDS]
        columns = {name: [r[name] for r in runs] for name in runs[0]}
        found[f"{setting}, {init}, {schedule}"] = columns
        means = [f"{name} {statistics.fmean(v):.3f} ({statistics.stdev(v):.3f})" for name, v in columns.items()]
        print(f"{setting}, {init}, {schedule}:", *means, flush=True)
    save("inits", found)


if __name__ == "__main__":
    main()
