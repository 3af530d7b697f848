"""Protection by degrees: five pairs of digits, an MLP with two layers of 12 units, Adam at 1e-2, 300 steps a task,
three seeds. `exact` is compared with AdaHAT and FG-AdaHAT at several alphas. The results are the accuracies of all
tasks at the end and of the last one, on held-out training images, and the drift that `describe` reports. `python
benchmarks/protection.py` writes results/protection.json in two minutes."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from common import save
from digits import accuracy, held_out, learn, mlp

import hatcl

STEPS, SEEDS, WIDTH = 300, range(3), 12
SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    **{
        f"{kind} {alpha:g}": {"protection": kind, "protection_alpha": alpha}
        for kind, alphas in (("adahat", (1e-6, 1e-3, 1e-1)), ("fg_adahat", (1e-6, 1e-3, 1e-2, 1e-1)))
        for alpha in alphas
    },
}


def run(config: dict[str, Any], seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    data = held_out(seed)
    model = hatcl.convert(mlp(WIDTH), len(data), data[0][0][0][:2], config=config)
    for t, (rows, _) in enumerate(data):
        learn(model, t, rows, torch.optim.Adam(model.parameters(), lr=1e-2), STEPS)
    right = [accuracy(model, t, held) for t, (_, held) in enumerate(data)]
    drift = hatcl.describe(model).drift.values()
    return {
        "accuracy": statistics.fmean(right),
        "last": right[-1],
        "moved": max((d["moved"] for d in drift), default=0.0),
        "same": min((d["same"] for d in drift), default=1.0),
    }


def main() -> None:
    found: dict[str, dict[str, list[float]]] = {}
    for name, config in SETTINGS.items():
        runs = [run(config, seed) for seed in SEEDS]
        found[name] = {key: [r[key] for r in runs] for key in runs[0]}
        print(f"{name}:", *(f"{key} {statistics.fmean(v):.3f}" for key, v in found[name].items()), flush=True)
    save("protection", found)


if __name__ == "__main__":
    main()
