"""hatcl and other methods under one protocol: split CIFAR-10 (five tasks) and ten tasks of five classes of CIFAR-100.

    python benchmarks/field.py [--data cifar10 cifar100_even] [--rows default fork ...] [--seeds 0 1 2] [--width 16]
        [--epochs 10] [--lr 3e-3] [--validate]

All rows use the four-block ResNet of `transfer.py` and its loop: a new Adam for each task, batch 64, flips, and a rate
that falls to zero along each task. `default`, `fork` (`start_from="previous"`), `all` (the same with `masks="all",
own_share=0.3`) and `array` (`masks="array:q"`) are hatcl, certified and compared bit for bit. `separate` has a network
for each task, `sequential` one network with nothing frozen, and `joint` learns all tasks at once. The rows of Avalanche
(`ewc`, `si`, `lwf`, `replay` of 200 images) run where its library is installed, with a head for each task and the same
optimizer; there the rate falls after each epoch. (Avalanche's PackNet does not support batch norms.)

    bash benchmarks/field_env.sh FOLDER && FOLDER/bin/python benchmarks/field.py --rows ewc si lwf replay

Results: accuracy with the task given, right after learning and at the end; forgetting, the mean difference of the two;
accuracy over all classes without the task, by the largest logit, for hatcl also by `hatcl.predict`; seconds; MiB of
parameters and buffers. `--validate` scores on held-out training images. `transfer.py` chose the rate on those;
Avalanche's options were not tuned. Resumes.
"""

from __future__ import annotations

import argparse
import math
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import Task, bit_equal, fit, learn_all, logits, read, save, split
from torch import Tensor, nn
from transfer import BATCH, adam, held_out, network

import hatcl

PARTS = {"cifar10": 5, "cifar100_even": 10}
HATCL: dict[str, dict[str, Any]] = {
    "default": {},
    "fork": {"start_from": "previous"},
    "all": {"start_from": "previous", "masks": "all", "own_share": 0.3},
    "array": {"masks": "array:{q}"},
}
PLAIN = ("separate", "sequential", "joint")
# row -> Avalanche's class and its options
AVALANCHE: dict[str, tuple[str, dict[str, Any]]] = {
    "ewc": ("EWC", {"ewc_lambda": 1e2}),
    "si": ("SynapticIntelligence", {"si_lambda": 1.0}),
    "lwf": ("LwF", {"alpha": 1.0, "temperature": 2.0}),
    "replay": ("Replay", {"mem_size": 200}),
}
Heads = Callable[[int, Tensor], Tensor]  # the logits of a task's head for some images


def tasks_of(name: str, validate: bool) -> list[Task]:
    """All images have one mean and spread: those of a task's own would tell the task."""
    tasks = split(name, PARTS[name])
    whole = torch.cat([t.x * t._scale[1] + t._scale[0] for t in tasks])
    for task in tasks:
        task.normalise(whole.mean((0, 2, 3)), whole.std((0, 2, 3)))
    return [held_out(t) if validate else t for t in tasks]


def told(heads: Heads, tasks: list[Task], t: int) -> float:
    return float((heads(t, tasks[t].x_test).argmax(1) == tasks[t].y_test).float().mean())


def untold(heads: Heads, tasks: list[Task]) -> float:
    """By the largest logit of all heads."""
    classes, x = tasks[0].classes, torch.cat([t.x_test for t in tasks])
    found = torch.cat([heads(t, x) for t in range(len(tasks))], 1).argmax(1)
    right = torch.cat([task.y_test + classes * t for t, task in enumerate(tasks)])
    return float((found == right).float().mean())


def size_of(*models: nn.Module) -> float:
    every = [x for model in models for x in (*model.parameters(), *model.buffers())]
    return sum(x.numel() * x.element_size() for x in every) / 2**20


def of_hatcl(row: str, tasks: list[Task], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    q = math.ceil(math.sqrt(len(tasks)))
    config = {name: v.format(q=q) if isinstance(v, str) else v for name, v in HATCL[row].items()}
    model = hatcl.convert(network(args.width, tasks[0].classes), len(tasks), tasks[0].x[:2], config=config)
    options = {"flip": True, "cosine": True}
    rows = learn_all(model, tasks, lambda: adam(model, args.lr), args.epochs, BATCH, seed, lambda text: None, **options)

    def heads(t: int, x: Tensor) -> Tensor:
        with hatcl.task(model, t):
            return logits(model, x)

    router = hatcl.TaskRouter(model)
    for t, task in enumerate(tasks):
        router.add_task(t, task.x, task.y)
    right = []
    for t, task in enumerate(tasks):
        p = hatcl.predict(model, task.x_test, router=router)
        right.append((p.task == t) & (p.label == task.y_test))
    return {
        "after": [r["hard"] for r in rows], "end": [told(heads, tasks, t) for t in range(len(tasks))],
        "untold": untold(heads, tasks), "untold, router": float(torch.cat(right).float().mean()),
        "bit_equal": all(bit_equal(model, tasks, rows)), "exact": hatcl.certify(model, tasks[0].x[:4]).exact,
        "MiB": size_of(model),
    }  # fmt: skip


def of_plain(row: str, tasks: list[Task], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    classes, options = tasks[0].classes, {"flip": True, "cosine": True}
    count, after = len(tasks), list[float]()
    models = [network(args.width, classes) for _ in tasks] if row == "separate" else [
        network(args.width, classes * count)
    ]  # fmt: skip

    def part(t: int) -> Callable[[Tensor], Tensor]:
        return lambda z: z[:, classes * t : classes * (t + 1)]

    def heads(t: int, x: Tensor) -> Tensor:
        return logits(models[t], x) if row == "separate" else part(t)(logits(models[0], x))

    if row == "joint":
        y = torch.cat([task.y + classes * t for t, task in enumerate(tasks)])
        every = types.SimpleNamespace(x=torch.cat([t.x for t in tasks]), y=y)
        every.steps, every.batches = (lambda size: -(-len(y) // size)), (lambda *a: Task.batches(every, *a))  # type: ignore[arg-type]
        fit(models[0], every, adam(models[0], args.lr), args.epochs, BATCH, seed, **options)  # type: ignore[arg-type]
    for t, task in enumerate(tasks) if row != "joint" else ():
        model, head = (models[t], None) if row == "separate" else (models[0], part(t))
        fit(model, task, adam(model, args.lr), args.epochs, BATCH, seed * 100 + t, head=head, **options)
        after.append(told(heads, tasks, t))
    end = [told(heads, tasks, t) for t in range(count)]
    return {"after": after or end, "end": end, "untold": untold(heads, tasks), "MiB": size_of(*models)}


class Headed(nn.Module):
    """The network with a name for its head, by which Avalanche makes one for each task."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        *body, self.classifier = network(width, classes)
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


class Flipped(torch.utils.data.Dataset):
    """A task's training images, each turned over with probability 1/2 when it is read."""

    def __init__(self, task: Task) -> None:
        self.x, self.y, self.targets = task.x, task.y, task.y.tolist()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return (self.x[i].flip(2) if torch.rand(()) < 0.5 else self.x[i]), self.targets[i]


def of_avalanche(row: str, tasks: list[Task], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
    from avalanche.benchmarks.utils import DataAttribute, TaskAwareClassificationDataset
    from avalanche.benchmarks.utils.data_attribute import TaskLabels
    from avalanche.models import as_multitask
    from avalanche.training import supervised
    from avalanche.training.plugins import EvaluationPlugin, LRSchedulerPlugin

    falling_rate = torch.optim.lr_scheduler.CosineAnnealingLR
    stream = [
        TaskAwareClassificationDataset(
            [Flipped(task)], data_attributes=[DataAttribute(task.y.tolist(), "targets"), TaskLabels([t] * len(task.y))]
        )
        for t, task in enumerate(tasks)
    ]
    made = with_classes_timeline(with_task_labels(benchmark_from_datasets(train=stream)))
    for experience in made.train_stream:  # a list, by which Avalanche's heads index
        experience.classes_in_this_experience = sorted(experience.classes_in_this_experience)
    model = as_multitask(Headed(args.width, tasks[0].classes), "classifier")
    kind, options = AVALANCHE[row]
    optimizer = adam(model, args.lr)
    falling = LRSchedulerPlugin(falling_rate(optimizer, args.epochs), reset_scheduler=False, reset_lr=False)
    strategy = getattr(supervised, kind)(
        model=model, optimizer=optimizer, plugins=[falling], criterion=nn.CrossEntropyLoss(), train_mb_size=BATCH,
        eval_mb_size=500, train_epochs=args.epochs, evaluator=EvaluationPlugin(loggers=[]), **options,
    )  # fmt: skip

    def heads(t: int, x: Tensor) -> Tensor:
        model.eval()
        with torch.no_grad():
            return torch.cat([model(part, torch.full((len(part),), t)) for part in x.split(500)])

    after = []
    for t, experience in enumerate(made.train_stream):
        strategy.optimizer = adam(model, args.lr)
        falling.scheduler = falling_rate(strategy.optimizer, args.epochs)
        strategy.train(experience)
        after.append(told(heads, tasks, t))
    end = [told(heads, tasks, t) for t in range(len(tasks))]
    return {"after": after, "end": end, "untold": untold(heads, tasks), "MiB": size_of(model), "options": options}


def run(name: str, row: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(seed)
    tasks, began = tasks_of(name, args.validate), time.time()
    learn = of_hatcl if row in HATCL else of_plain if row in PLAIN else of_avalanche
    out = learn(row, tasks, seed, args)
    lost = [a - b for a, b in zip(out["after"][:-1], out["end"][:-1], strict=True)]
    measured = {"told": float(np.mean(out["end"])), "forgotten": float(np.mean(lost)), "seconds": time.time() - began}
    return {**out, **measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rows", nargs="+", default=[*HATCL, *PLAIN], choices=[*HATCL, *PLAIN, *AVALANCHE])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=3e-3, help="Adam's rate at the start of each task")
    parser.add_argument("--validate", action="store_true", help="score on held-out training images")
    args = parser.parse_args()
    title = f"field_{'validation' if args.validate else 'test'}"
    settings = f"width={args.width} epochs={args.epochs} lr={args.lr}"
    for seed in args.seeds:
        for name in args.data:
            for row in args.rows:
                if str(seed) in read(title).get(name, {}).get(settings, {}).get(row, {}):
                    continue
                found, result = run(name, row, seed, args), read(title)
                result.setdefault(name, {}).setdefault(settings, {}).setdefault(row, {})[str(seed)] = found
                save(title, result)
    for name in args.data:
        for row, runs in read(title).get(name, {}).get(settings, {}).items():
            said = []
            for what in ("told", "untold", "untold, router", "forgotten", "seconds", "MiB"):
                values = [r[what] for r in runs.values() if what in r]
                times = 1 if what in ("seconds", "MiB") else 100
                if values:
                    said.append(f"{what} {times * np.mean(values):.1f} ({times * np.std(values):.1f})")
            print(f"{name} {row}: {', '.join(said)}; {len(runs)} seeds")


if __name__ == "__main__":
    main()
