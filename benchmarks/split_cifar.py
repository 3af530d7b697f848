"""Split CIFAR-10: five tasks of two classes, a ResNet-18 with a 3 x 3 stem (`hat_resnet18s`), 10 epochs a task.

    python benchmarks/split_cifar.py [--seeds 0 1 2] [--methods hat separate sequential] [--bf16]

Task-incremental accuracy with hard gates, compared with the same backbone trained separately per task and in sequence.
The protocol is HAT-CL's (Adam 1e-3 fresh per task, batch 64, flips). Resumes: runs already in the results are skipped.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import timm
import torch
from common import accuracy, bit_equal, fit, learn_all, read, save, split

NAME = "split_cifar10_resnet18"


def run(method: str, seed: int, epochs: int, bf16: bool) -> dict:
    torch.manual_seed(seed)
    tasks = split("cifar10", 5)
    options = {"flip": True, "bf16": bf16}
    began = time.time()
    if method == "hat":
        model = timm.create_model("hat_resnet18s", num_tasks=5, num_classes=2)
        rows = learn_all(
            model, tasks, lambda: torch.optim.Adam(model.parameters(), lr=1e-3), epochs, 64, seed, **options
        )
        exact = bit_equal(model, tasks, rows)
        out = {
            "accuracy": [r["hard"] for r in rows],
            "soft": [r["soft"] for r in rows],
            "units": [r["units"] for r in rows],
            "bit_equal": exact,
        }
    elif method == "separate":
        accuracies = []
        for t, task in enumerate(tasks):
            torch.manual_seed(seed)
            model = timm.create_model("resnet18s", num_classes=2)
            fit(model, task, torch.optim.Adam(model.parameters(), lr=1e-3), epochs, 64, seed * 100 + t, **options)
            accuracies.append(accuracy(model, task))
        out = {"accuracy": accuracies}
    else:  # one network, a head per task, nothing held
        model = timm.create_model("resnet18s", num_classes=2 * len(tasks))

        def head(t: int):
            return lambda out: out[:, 2 * t : 2 * t + 2]

        for t, task in enumerate(tasks):
            fit(
                model,
                task,
                torch.optim.Adam(model.parameters(), lr=1e-3),
                epochs,
                64,
                seed * 100 + t,
                head=head(t),
                **options,
            )
        out = {"accuracy": []}
        from common import logits

        for t, task in enumerate(tasks):
            out["accuracy"].append(float((head(t)(logits(model, task.x_test)).argmax(1) == task.y_test).float().mean()))
    return {
        **out,
        "average": float(np.mean(out["accuracy"])),
        "seconds": time.time() - began,
        "epochs": epochs,
        "bf16": bf16,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["hat", "separate", "sequential"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, for all methods alike")
    args = parser.parse_args()
    for seed in args.seeds:
        for method in args.methods:
            if str(seed) in read(NAME).get("runs", {}).get(method, {}):
                continue
            row = run(method, seed, args.epochs, args.bf16)
            result = read(NAME)
            result.setdefault("runs", {}).setdefault(method, {})[str(seed)] = row
            result["average"] = {
                m: {"mean": float(np.mean(a)), "spread": float(np.std(a)), "seeds": len(a)}
                for m, runs in result["runs"].items()
                if (a := [r["average"] for r in runs.values()])
            }
            save(NAME, result)
            print(f"seed {seed} {method}: {row['average']:.4f} {row['accuracy']} ({row['seconds']:.0f} s)", flush=True)
    print(read(NAME)["average"])


if __name__ == "__main__":
    main()
