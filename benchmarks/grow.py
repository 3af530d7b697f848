"""Growth twice in a run of tasks: ten tasks of five `cifar100_even` classes in a small convolutional network that soon
runs out of units. It keeps its size (`fixed`), or grows by half before tasks 3 and 6 (`grown`). After the last task
every task's logits must be bit-equal on its test images. A run ends when no unit is left.

    python benchmarks/grow.py [--epochs 10] [--seeds 3]        # writes results/grow.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from common import bit_equal, learn_all, save, split
from torch import nn

import hatcl

WIDTH, GROWS, FACTOR = 8, (3, 6), 1.5


def network(width: int) -> nn.Module:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    body = [*block(3, width), *block(width, 2 * width), *block(2 * width, 4 * width)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 5))


def run(kind: str, seed: int, epochs: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    tasks = split("cifar100_even", 10)
    model = hatcl.convert(network(WIDTH), 1, tasks[0].x[:2])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rows: list[dict[str, Any]] = []
    began, growing = time.time(), 0.0
    for t in range(len(tasks)):
        if kind == "grown" and t in GROWS:
            start = time.time()
            print(hatcl.grow(model, FACTOR, optimizer=optimizer))
            growing += time.time() - start
        if t:
            hatcl.add_tasks(model, 1)
            optimizer.add_param_group({"params": hatcl.task_parameters(model, t)})
        try:
            rows += learn_one(model, tasks, t, optimizer, epochs, seed)
        except hatcl.CapacityError as error:
            print(error)
            break
    exact = bit_equal(model, tasks[: len(rows)], rows)
    certificate = hatcl.certify(model, tasks[0].x_test[:8])
    assert all(exact) and certificate.exact, certificate
    return {
        "accuracy": [r["hard"] for r in rows], "units": [r["units"] for r in rows], "bit_equal": exact,
        "certificate": str(certificate), "seconds": time.time() - began, "growing": growing,
        "all_units": hatcl.describe(model).units,
    }  # fmt: skip


def learn_one(
    model: nn.Module, tasks: list[Any], t: int, optimizer: torch.optim.Optimizer, epochs: int, seed: int
) -> list[dict[str, Any]]:
    return learn_all(model, tasks[t : t + 1], optimizer, epochs, 50, seed, first=t, flip=True, cosine=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, Any] = {"settings": vars(args), "runs": {}}
    for kind in ("fixed", "grown"):
        found["runs"][kind] = [run(kind, seed, args.epochs) for seed in range(args.seeds)]
        found[kind] = summary(found["runs"][kind])
        print(kind, found[kind], flush=True)
        save("grow", found)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """How many tasks were learned in each run, and the mean accuracy before the first growth and after the second."""
    out: dict[str, Any] = {"tasks learned": [len(r["accuracy"]) for r in runs]}
    for part, tasks in (("tasks 0 to 2", slice(0, GROWS[0])), ("tasks 6 and later", slice(GROWS[1], None))):
        means = [statistics.fmean(r["accuracy"][tasks]) for r in runs if r["accuracy"][tasks]]
        spread = statistics.stdev(means) if len(means) > 1 else 0.0
        out[part] = {"mean": statistics.fmean(means), "spread": spread, "runs": len(means)} if means else None
    return out


if __name__ == "__main__":
    main()
