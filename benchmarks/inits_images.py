"""Starts of a task's embeddings, schedules of the scale, and forms of the compensation, on images: split CIFAR-10 (five
tasks of two classes) and ten tasks of five `cifar100_even` classes.

    python benchmarks/inits_images.py [--epochs 6] [--seeds 3]        # writes results/inits_images.json

A network of three convolutions (width 16) with batch norms learns with Adam at 3e-3, or with SGD at .05 and momentum
.9; batches of 50, mirrored. Accuracy is measured on a held-out fifth of the training images. All rows but `hat` have
the compensation `exact`. `hat-cl` is its own recipe: a dense start, its cosine, the penalty per layer that forgives
1/T, and s_max = 100; once unchanged, and once with embeddings that move 20 times as fast. Resumes: runs that are in the
results are skipped.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import warnings
from typing import Any

import torch
from common import Task, bit_equal, learn_all, read, save, split
from grow import network

import hatcl

WIDTH = 16
DATA = {"cifar10": 5, "cifar100_even": 10}
INITS, SCHEDULES = ("normal", "dense", "sparse", "uniform"), ("linear", "cosine")
HATCL = {"init": "dense", "schedule": "cosine", "penalty": "layer", "max_scale": 100.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "adam, normal, linear": {},
    "adam, hat": {"compensation": "hat"},
    "sgd, exact": {},
    "sgd, hat": {"compensation": "hat"},
    "adam, hat-cl": HATCL,
    **{f"adam, {i}, {s}": {"init": i, "schedule": s} for i, s in itertools.product(INITS, SCHEDULES)},
    "adam, hat-cl, 20": {**HATCL, "embedding_lr_scale": 20.0},
}


def held_out(task: Task, seed: int) -> Task:
    """The task with a fifth of its training images in place of its test images."""
    order = torch.randperm(len(task.y), generator=torch.Generator().manual_seed(seed))
    away, rest = order[: len(order) // 5], order[len(order) // 5 :]
    task.x_test, task.y_test, task.x, task.y = task.x[away], task.y[away], task.x[rest], task.y[rest]
    return task


def optimizer_of(model: torch.nn.Module, name: str) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.Adam(model.parameters(), lr=3e-3)


def run(data: str, name: str, seed: int, epochs: int) -> dict[str, float]:
    torch.manual_seed(seed)
    tasks = [held_out(task, seed) for task in split(data, DATA[data])]
    config = {"compensation": "exact", **SETTINGS[name]}
    if config.get("penalty") == "layer":
        config["forgiven"] = 1 / len(tasks)
    classes = [task.classes for task in tasks]
    model = hatcl.convert(network(WIDTH), len(tasks), tasks[0].x[:2], num_classes=classes, config=config)
    optimizer = optimizer_of(model, name.partition(",")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tasks that take all units, or find none
        rows = learn_all(model, tasks, optimizer, epochs, 50, seed, lambda _: None, flip=True)
    assert all(bit_equal(model, tasks, rows))
    return {
        "accuracy": statistics.fmean(r["hard"] for r in rows),
        "last": statistics.fmean(r["hard"] for r in rows[-2:]),
        "units": statistics.fmean(r["units"] for r in rows) / hatcl.describe(model).units,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    for name, data, seed in itertools.product(SETTINGS, DATA, range(args.seeds)):
        found = read("inits_images")
        runs = found.setdefault("runs", {}).setdefault(data, {}).setdefault(name, {})
        if str(seed) not in runs:
            runs[str(seed)] = run(data, name, seed, args.epochs)
            save("inits_images", {**found, "epochs": args.epochs})
            print(seed, data, name, {k: round(v, 3) for k, v in runs[str(seed)].items()}, flush=True)
    for data, each in read("inits_images")["runs"].items():
        for name, runs in each.items():
            values = [r["accuracy"] for r in runs.values()]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            units = statistics.fmean(r["units"] for r in runs.values())
            print(f"{data:14} {name:24} {statistics.fmean(values):.3f} ({spread:.3f}), {units:.0%} of the units a task")


if __name__ == "__main__":
    main()
