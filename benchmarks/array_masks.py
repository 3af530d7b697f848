"""Sixteen tasks in one network by array masks: a quarter of every layer's units each, no weight shared.

    python benchmarks/array_masks.py [--net resnet convnext] [--width 1] [--epochs 10] [--methods array ...] [--bf16]

The tasks: ten of five `cifar100_even` classes, fashion_mnist, notmnist, and two halves each of cifar10 and mnist. Array
masks are compared with learned masks in the same network, and with a separate network of a quarter of the width for
each task. At the end all tasks must be bit-equal. Then task 5 is forgotten and the others must stay unchanged, while an
attacker who kept task 5's gates, copies and statistics puts them back. Resumes: methods that are in the results are
skipped.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence

import numpy as np
import timm
import torch
from common import Task, accuracy, bit_equal, fit, learn_all, load, logits, read, save, split
from forgetting import restored
from torch import nn

import hatcl
from hatcl.hat.held import held

FORGOTTEN = 5


def tasks_of(count: int, images: int) -> list[Task]:
    """The first tasks, each with so many training images, drawn at random, or all where it has fewer."""
    whole, halved = (load("fashion_mnist"), load("notmnist")), (*split("cifar10", 2), *split("mnist", 2))
    tasks = [*split("cifar100_even", 10), *whole, *halved][:count]
    for task in tasks:
        order = torch.randperm(len(task.y), generator=torch.Generator().manual_seed(0))[:images]
        task.x, task.y = task.x[order], task.y[order]
    return tasks


def make(net: str, width: float, classes: int) -> nn.Module:
    """For images of 32 x 32; its widths are `width` times the usual ones."""
    if net == "resnet":
        channels = tuple(round(n * width) for n in (64, 128, 256, 512))
        return timm.create_model("resnet18s", num_classes=classes, channels=channels, stem_width=channels[0])
    dims = tuple(round(n * width) for n in (40, 80, 160, 320))
    return timm.create_model("convnext_atto", num_classes=classes, dims=dims, patch_size=1)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def attacked(model: nn.Module, tasks: Sequence[Task], rows: list[dict], forgotten: int) -> dict:
    """Forget a task; what the others compute then, and what the attacker gets."""
    before = copy.deepcopy(model)
    planned = hatcl.forget_task(model, forgotten, dry_run=True)
    report = hatcl.forget_task(model, forgotten)
    others = [t for t in range(len(tasks)) if t != forgotten]
    erased = {}
    for h in held(before):
        if h.name in planned.erased:
            needed = torch.zeros(h.param.shape, dtype=torch.bool)
            for t in others:
                needed |= h.live(t)
            erased[h.name] = h.live(forgotten) & ~needed
    same = []
    for t in others:
        with hatcl.task(model, t):
            same.append(torch.equal(logits(model, tasks[t].x_test), rows[t]["logits"]))
    attack = {}
    for factor in (1.0, 0.0, 0.1, 3.0):
        back = restored(model, before, forgotten, erased, factor)
        with hatcl.task(back, forgotten):
            attack[f"times {factor:g}"] = accuracy(back, tasks[forgotten])
    return {
        "task": tasks[forgotten].name, "before": rows[forgotten]["hard"], "attack": attack,
        "chance": 1 / tasks[forgotten].classes, "share_kept": report.share_kept, "others_bit_equal": all(same),
    }  # fmt: skip


def run(net: str, method: str, q: int, width: float, epochs: int, images: int, bf16: bool, seed: int) -> dict:
    tasks, began = tasks_of(q * q, images), time.time()
    torch.manual_seed(seed)
    if method == "separate":
        scores = []
        for t, task in enumerate(tasks):
            model = make(net, width / q, task.classes)
            fit(model, task, adam(model), epochs, 64, seed * 100 + t, flip=True, bf16=bf16)
            scores.append(accuracy(model, task))
            print(f"  task {t} {task.name}: {scores[-1]:.4f}", flush=True)
        return {"accuracy": scores, "average": float(np.mean(scores)), "seconds": time.time() - began}
    config = {"masks": f"array:{q}" if method == "array" else "learned"}
    model = hatcl.convert(
        make(net, width, 10), len(tasks), tasks[0].x[:2], num_classes=[t.classes for t in tasks], config=config
    )
    rows = learn_all(
        model, tasks, lambda: adam(model), epochs, 64, seed, lambda line: print(line, flush=True), flip=True, bf16=bf16
    )
    out = {
        "accuracy": [r["hard"] for r in rows], "units": [r["units"] for r in rows],
        "bit_equal": all(bit_equal(model, tasks, rows)), "room": hatcl.describe(model).room.to_dict(),
        "elements": hatcl.describe(model).elements,
    }  # fmt: skip
    out["forgetting"] = attacked(model, tasks, rows, FORGOTTEN if q > 2 else 2)
    return {**out, "average": float(np.mean(out["accuracy"])), "seconds": time.time() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", nargs="+", default=["resnet"], choices=["resnet", "convnext"])
    parser.add_argument("--methods", nargs="+", default=["array", "separate", "learned"])
    parser.add_argument("--q", type=int, default=4, choices=[2, 3, 4])
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=5000, help="at most so many training images a task")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16; tests run in float32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    for net in args.net:
        name = f"array_{net}_q{args.q}_width{args.width:g}_epochs{args.epochs}"
        for seed in args.seeds:
            for method in args.methods:
                if str(seed) in read(name).get("runs", {}).get(method, {}):
                    continue
                row = run(net, method, args.q, args.width, args.epochs, args.images, args.bf16, seed)
                result = {**read(name), "images": args.images, "bf16": args.bf16}
                result.setdefault("runs", {}).setdefault(method, {})[str(seed)] = row
                save(name, result)
                print(f"{net} seed {seed} {method}: {row['average']:.4f} {row.get('forgetting')}", flush=True)


if __name__ == "__main__":
    main()
