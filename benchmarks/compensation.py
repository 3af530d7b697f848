"""HAT's gradient compensation as its own float32 code computes it (`hat`), against the closed form (`exact`): five
tasks of two digits, an MLP of width 48, 300 steps a task, HAT's own settings. Accuracy is on a fifth of the training
images that is held out. `python benchmarks/compensation.py` writes results/compensation.json in two minutes."""

from __future__ import annotations

import itertools
import statistics

import torch
from common import save
from torch import nn
from torch.nn import functional as F

import hatcl
from hatcl.config import COMPENSATIONS
from hatcl.data.images import digits_tasks

STEPS, SEEDS = 300, range(3)
OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2),
}


def run(compensation: str, optimizer: str, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    tasks = [task.on_validation(0.2, seed) for task in digits_tasks()]
    data = [[torch.from_numpy(v) for v in (t.x_train, t.y_train, t.x_test, t.y_test)] for t in tasks]
    data = [(a.flatten(1).float() / 255, b, c.flatten(1).float() / 255, d) for a, b, c, d in data]
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 2))
    config = {"compensation": compensation, "settle": 0.0}
    model = hatcl.convert(net, len(tasks), data[0][0][:2], config=config)
    for t, (x, y, _, _) in enumerate(data):
        made = OPTIMIZERS[optimizer](model)
        with hatcl.learn(model, t, made, STEPS) as learning:
            for _ in range(STEPS):
                at = torch.randint(len(x), (32,))
                loss = F.cross_entropy(model(x[at]), y[at]) + learning.penalty()
                made.zero_grad(), loss.backward(), made.step()
    right = []
    for t, (_, _, x, y) in enumerate(data):
        with hatcl.task(model.eval(), t), torch.no_grad():
            right.append(float((model(x).argmax(1) == y).float().mean()))
    used = hatcl.describe(model).to_dict()["use"]
    return {"accuracy": statistics.fmean(right), "units": statistics.fmean(used.values())}


def main() -> None:
    found: dict[str, dict[str, list[float]]] = {}
    for optimizer, compensation in itertools.product(OPTIMIZERS, COMPENSATIONS):
        runs = [run(compensation, optimizer, seed) for seed in SEEDS]
        columns = {name: [r[name] for r in runs] for name in runs[0]}
        found[f"{optimizer}, {compensation}"] = columns
        means = [f"{name} {statistics.fmean(v):.3f} ({statistics.stdev(v):.3f})" for name, v in columns.items()]
        print(f"{optimizer}, {compensation}:", *means, flush=True)
    save("compensation", found)


if __name__ == "__main__":
    main()
