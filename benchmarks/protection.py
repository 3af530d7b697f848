"""Protection by degrees: five pairs of digits, an MLP with two layers of 12 units, Adam at 1e-2, 300 steps a task,
three seeds. `exact` beside AdaHAT at several alphas. Accuracy of all tasks at the end and of the last one, on held out
training images, and what `describe` says of the drift. `python benchmarks/protection.py` writes
results/protection.json in a minute."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from common import save
from torch import nn
from torch.nn import functional as F

import hatcl
from hatcl.data.images import digits_tasks

STEPS, SEEDS, WIDTH = 300, range(3), 12
SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    **{f"adahat {alpha:g}": {"protection": "adahat", "protection_alpha": alpha} for alpha in (1e-6, 1e-3, 1e-1)},
}


def run(config: dict[str, Any], seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    tasks = [task.on_validation(0.2, seed) for task in digits_tasks()]
    data = [[torch.from_numpy(v) for v in (t.x_train, t.y_train, t.x_test, t.y_test)] for t in tasks]
    data = [(a.flatten(1).float() / 255, b, c.flatten(1).float() / 255, d) for a, b, c, d in data]
    net = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
    model = hatcl.convert(net, len(tasks), data[0][0][:2], config=config)
    for t, (x, y, _, _) in enumerate(data):
        made = torch.optim.Adam(model.parameters(), lr=1e-2)
        with hatcl.learn(model, t, made, STEPS) as learning:
            for _ in range(STEPS):
                at = torch.randint(len(x), (32,))
                loss = F.cross_entropy(model(x[at]), y[at]) + learning.penalty()
                made.zero_grad(), loss.backward(), made.step()
    right = []
    for t, (_, _, x, y) in enumerate(data):
        with hatcl.task(model.eval(), t), torch.no_grad():
            right.append(float((model(x).argmax(1) == y).float().mean()))
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
