"""HAT's gradient compensation as its own float32 code computes it (`hat`), compared with the closed form (`exact`):
five tasks of two digits, an MLP of width 48, 300 steps a task, HAT's own settings. Accuracy is measured on a held-out
fifth of the training images. `python benchmarks/compensation.py` writes results/compensation.json in two minutes."""

from __future__ import annotations

import itertools
import statistics

import torch
from common import save
from digits import accuracy, held_out, learn, mlp

import hatcl
from hatcl.config import COMPENSATIONS

STEPS, SEEDS = 300, range(3)
OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2),
}


def run(compensation: str, optimizer: str, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    data = held_out(seed)
    config = {"compensation": compensation, "settle": 0.0}
    model = hatcl.convert(mlp(48), len(data), data[0][0][0][:2], config=config)
    for t, (rows, _) in enumerate(data):
        learn(model, t, rows, OPTIMIZERS[optimizer](model), STEPS)
    right = [accuracy(model, t, held) for t, (_, held) in enumerate(data)]
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
