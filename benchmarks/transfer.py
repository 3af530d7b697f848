"""Forward transfer: ten tasks of five classes of CIFAR-100, one after another, in a small ResNet of four blocks.

    python benchmarks/transfer.py [--rows default previous separate ...] [--lr 3e-3] [--width 32] [--validate]

The result is the accuracy of each task right after it was learned; for hatcl it stays the same. `separate` trains a
network for each task; `sequential` trains one network with a head per task and nothing frozen (it forgets, so its
average at the end is also given). All rows have the same network, loop and steps: Adam (`--lr`) new per task, batch 64,
flips, and a rate that falls to zero along each task. `--validate` holds out a fifth of each class's training images and
scores on those; settings were chosen that way. Resumes by row and seed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from common import Task, accuracy, bit_equal, fit, logits, read, save, split
from torch import Tensor, nn
from torch.nn import functional as F

import hatcl

PARTS, BATCH = 10, 64
# row -> options of HATConfig; None: without hatcl
ROWS: dict[str, dict[str, Any] | None] = {
    "default": {},
    "previous": {"start_from": "previous"},
    "best": {"start_from": "best"},
    "previous_half": {"start_from": "previous", "start_hold": 0.5},
    "previous_array": {"start_from": "previous", "masks": "array:4"},
    "previous_own": {"start_from": "previous", "own_share": 0.1},
    "all": {"start_from": "previous", "masks": "all", "own_share": 0.3},
    "separate": None,
    "sequential": None,
}


class Block(nn.Module):
    """Two 3 x 3 convolutions with a shortcut."""

    def __init__(self, read: int, write: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(read, write, 3, stride, 1, bias=False), nn.BatchNorm2d(write)
        self.conv2, self.bn2 = nn.Conv2d(write, write, 3, 1, 1, bias=False), nn.BatchNorm2d(write)
        self.down, self.bn3 = nn.Conv2d(read, write, 1, stride, bias=False), nn.BatchNorm2d(write)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.bn3(self.down(x)))


def network(width: int, classes: int) -> nn.Module:
    blocks = [Block(width * a, width * b, s) for a, b, s in ((1, 1, 1), (1, 2, 2), (2, 4, 2), (4, 8, 2))]
    stem = [nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes))


def held_out(task: Task) -> Task:
    """The task with every fifth training image of a class in place of the test images."""
    place = torch.zeros(len(task.y), dtype=torch.long)
    for c in range(task.classes):
        mine = (task.y == c).nonzero().flatten()
        place[mine] = torch.arange(len(mine))
    out = place % 5 == 4
    task.x, task.x_test, task.y, task.y_test = task.x[~out], task.x[out], task.y[~out], task.y[out]
    return task


def adam(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=rate)


def run(row: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(seed)
    tasks = [held_out(t) if args.validate else t for t in split("cifar100_even", PARTS)]
    classes = tasks[0].classes
    options = {"flip": True, "cosine": True}
    began = time.time()
    out: dict[str, Any] = {"accuracy": []}
    if row == "separate":
        for t, task in enumerate(tasks):
            model = network(args.width, classes)
            fit(model, task, adam(model, args.lr), args.epochs, BATCH, seed * 100 + t, **options)
            out["accuracy"].append(accuracy(model, task))
    elif row == "sequential":
        model = network(args.width, classes * PARTS)

        def head(t: int) -> Callable[[Tensor], Tensor]:
            return lambda z: z[:, classes * t : classes * (t + 1)]

        def score(t: int) -> float:
            return float((head(t)(logits(model, tasks[t].x_test)).argmax(1) == tasks[t].y_test).float().mean())

        for t, task in enumerate(tasks):
            fit(model, task, adam(model, args.lr), args.epochs, BATCH, seed * 100 + t, head=head(t), **options)
            out["accuracy"].append(score(t))
        out["at the end"] = [score(t) for t in range(PARTS)]
    else:
        config = {**(ROWS[row] or {}), **dict(args.hat)}
        model = hatcl.convert(network(args.width, classes), PARTS, tasks[0].x[:2], config=config)
        rows = list(_learned(model, tasks, args, seed, options))
        out["accuracy"] = [r["hard"] for r in rows]
        out |= {"units": [r["units"] for r in rows], "lineage": hatcl.describe(model).lineage}
        out["bit_equal"] = all(bit_equal(model, tasks, rows))
        out["exact"] = hatcl.certify(model, tasks[0].x[:4]).exact
    return {**out, "average": float(np.mean(out["accuracy"])), "seconds": time.time() - began}


def _learned(
    model: nn.Module, tasks: list[Task], args: argparse.Namespace, seed: int, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for t, task in enumerate(tasks):
        epochs, optimizer, examples = args.epochs, adam(model, args.lr), (task.x, task.y)
        with hatcl.learn(model, t, optimizer, epochs * task.steps(BATCH), epochs, examples=examples) as learning:
            fit(model, task, optimizer, epochs, BATCH, seed * 100 + t, extra=learning.penalty, **options)
        kept = logits(model, task.x_test)
        hard = float((kept.argmax(1) == task.y_test).float().mean())
        yield {"hard": hard, "units": hatcl.describe(model).use[t], "logits": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's rate at the start of each task")
    parser.add_argument("--validate", action="store_true", help="score on held-out training images")
    parser.add_argument("--hat", nargs="*", default=[], type=_option, help="options of HATConfig, key=value")
    args = parser.parse_args()
    name = f"transfer_{'validation' if args.validate else 'test'}"
    for seed in args.seeds:
        for row in args.rows:
            settings = {"width": args.width, "epochs": args.epochs, **({"lr": args.lr} if args.lr != 1e-3 else {})}
            settings |= dict(args.hat if ROWS[row] is not None else [])
            key = " ".join([row, *(f"{k}={v}" for k, v in settings.items())])
            if str(seed) in read(name).get("runs", {}).get(key, {}):
                continue
            found = run(row, seed, args)
            result = read(name)
            result.setdefault("runs", {}).setdefault(key, {})[str(seed)] = found
            result["average"] = {
                k: {
                    "mean": float(np.mean(a)), "spread": float(np.std(a)), "seeds": len(a),
                    "tasks 2 to 10": float(np.mean([r["accuracy"][1:] for r in runs.values()])),
                }
                for k, runs in result["runs"].items()
                if (a := [r["average"] for r in runs.values()])
            }  # fmt: skip
            save(name, result)
            print(f"seed {seed} {key}: {found['average']:.4f} ({found['seconds']:.0f} s)", flush=True)
    for key, found in read(name).get("average", {}).items():
        print(f"{key}: {found['mean']:.4f} +- {found['spread']:.4f} ({found['seeds']} seeds)")


def _option(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, float(value) if "." in value else int(value)
    except ValueError:
        return key, None if value == "None" else value


if __name__ == "__main__":
    main()
