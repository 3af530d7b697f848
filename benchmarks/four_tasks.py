"""Four real tasks in one hat_resnet18 with ONE AdamW: mnist, fashion_mnist, notmnist, cifar10 as 32 x 32 RGB.

    python benchmarks/four_tasks.py [--epochs 5] [--seed 0]

After the last task all earlier logits must be bit-equal on the whole test sets; the average accuracy is compared with
the same backbone trained separately on each task with the same budget, and with plain sequential fine-tuning.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import timm
import torch
from common import Task, accuracy, bit_equal, fit, learn_all, load, logits, save

import hatcl

NAMES = ["mnist", "fashion_mnist", "notmnist", "cifar10"]


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tasks: list[Task] = [load(n) for n in NAMES]
    torch.manual_seed(args.seed)
    began = time.time()
    model = timm.create_model("hat_resnet18", num_tasks=4, num_classes=10)
    rows = learn_all(model, tasks, adamw(model), args.epochs, args.batch, args.seed, cosine=True)
    exact = bit_equal(model, tasks, rows)
    certificate = hatcl.certify(model, tasks[0].x_test[:16])
    print("bit-equal after the last task:", dict(zip(NAMES, exact, strict=False)), "|", certificate)
    separate = []
    for t, task in enumerate(tasks):
        torch.manual_seed(args.seed)
        plain = timm.create_model("resnet18", num_classes=10)
        fit(plain, task, adamw(plain), args.epochs, args.batch, args.seed * 100 + t, cosine=True)
        separate.append(accuracy(plain, task))
    torch.manual_seed(args.seed)
    plain = timm.create_model("resnet18", num_classes=40)
    optimizer = adamw(plain)
    for t, task in enumerate(tasks):
        fit(
            plain,
            task,
            optimizer,
            args.epochs,
            args.batch,
            args.seed * 100 + t,
            head=lambda o, t=t: o[:, 10 * t : 10 * t + 10],
        )
    sequential = [
        float((logits(plain, task.x_test)[:, 10 * t : 10 * t + 10].argmax(1) == task.y_test).float().mean())
        for t, task in enumerate(tasks)
    ]
    hard = [r["hard"] for r in rows]
    for name, a in (("hatcl", hard), ("separate", separate), ("sequential", sequential)):
        each = "  ".join(f"{n} {x:.4f}" for n, x in zip(NAMES, a, strict=True))
        print(f"{name:<11} average {np.mean(a):.4f}  {each}", flush=True)
    save(
        f"four_tasks_seed{args.seed}",
        {
            "tasks": NAMES, "epochs": args.epochs,
            "optimizer": "one AdamW for all tasks, lr 1e-3 with a cosine per task, weight decay 0.05",
            "hatcl": hard, "hatcl_soft": [r["soft"] for r in rows], "separate": separate, "sequential": sequential,
            "average": {"hatcl": np.mean(hard), "separate": np.mean(separate), "sequential": np.mean(sequential)},
            "bit_equal": exact, "certificate": str(certificate), "units": [r["units"] for r in rows],
            "seconds": time.time() - began,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
