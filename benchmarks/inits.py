"""How a task's embeddings start, and how the scale runs: five tasks of two digits, an MLP with two layers of 12 units,
Adam at 1e-2, 300 steps a task, three seeds. Accuracy is on a fifth of the training images that is held out; a task for
which there is no room counts as chance. `hat`: hatcl's other defaults. `hat-cl`: the penalty per layer that forgives
1/T, and s_max = 100. `python benchmarks/inits.py` writes results/inits.json in two minutes."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import torch
from common import save
from torch import nn
from torch.nn import functional as F

import hatcl
from hatcl.data.images import digits_tasks

STEPS, SEEDS, WIDTH = 300, range(3), 12
INITS, SCHEDULES = ("normal", "dense", "sparse", "uniform"), ("linear", "cosine")
SETTINGS: dict[str, dict[str, Any]] = {
    "hat": {},
    "hat-cl": {"penalty": "layer", "forgiven": 0.2, "max_scale": 100.0},
}


def run(config: dict[str, Any], seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    tasks = [task.on_validation(0.2, seed) for task in digits_tasks()]
    data = [[torch.from_numpy(v) for v in (t.x_train, t.y_train, t.x_test, t.y_test)] for t in tasks]
    data = [(a.flatten(1).float() / 255, b, c.flatten(1).float() / 255, d) for a, b, c, d in data]
    net = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
    model = hatcl.convert(net, len(tasks), data[0][0][:2], config=config)
    right = []
    for t, (x, y, held_x, held_y) in enumerate(data):
        made = torch.optim.Adam(model.parameters(), lr=1e-2)
        try:
            with hatcl.learn(model, t, made, STEPS) as learning:
                for _ in range(STEPS):
                    at = torch.randint(len(x), (32,))
                    loss = F.cross_entropy(model(x[at]), y[at]) + learning.penalty()
                    made.zero_grad(), loss.backward(), made.step()
        except hatcl.CapacityError:
            right.append(0.5)
            continue
        with hatcl.task(model.eval(), t), torch.no_grad():
            right.append(float((model(held_x).argmax(1) == held_y).float().mean()))
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
