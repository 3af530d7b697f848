"""Prediction without a given task: the share of images whose task and class are found, compared with other methods.

    python benchmarks/router.py [--data cifar100_even cifar10] [--seeds 0 1 2] [--epochs 10] [--rotate]

A small ResNet (test_resnet of timm, widths 16, 24, 32, 48) learns ten tasks of five classes of cifar100_even, or five
tasks of two classes of cifar10, with hatcl's defaults. All images are normalised with the mean and spread of all
training images, because those of a single task would reveal the task. A seed takes about three minutes per data set on
one CPU core. Resumes: runs already in the results are skipped.

Task id: the router (width 512, with temperature 8 and with one chosen on a tenth of the training images, held out from
the router), the largest logit, and the smallest Mahalanobis distance to a class's mean in each task's own features,
recentred per task by its training images' mean distance.

Class-incremental: the router; and without a task id, in the features of the first task, the nearest class mean, FeCAM's
class covariances and RanPAC's ridge (the exemplar-free methods that need one fixed backbone).

Rejection: each task in turn is taken out. The results are the share of its images that is rejected, at the threshold
under which 5 % of the other tasks' test images fall, and the area under the curve (0.5: no better than chance).

With `--rotate` each image is learned in its four rotations, as separate classes, which takes four times as long; all
else is the same.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import timm
import torch
from common import Task, bit_equal, learn_all, read, save, split
from torch import Tensor

import hatcl
from hatcl.data.images import rotated
from hatcl.hat.features import features_under
from hatcl.hat.routing.ridge import Sums, lifted, projection, ridge

NAME = "router"
PARTS = {"cifar100_even": 10, "cifar10": 5}
FIXED = ("nearest class mean", "FeCAM", "RanPAC")
LOW = (16, 64)  # ranks of the low-memory form


class Rotated(torch.nn.Module):
    """A network that gives the answers of the first quarter of its head, but while it learns."""

    def __init__(self, inner: torch.nn.Module, classes: int) -> None:
        super().__init__()
        self.inner, self.classes = inner, classes

    def forward(self, x: Tensor) -> Tensor:
        every = self.inner(x)
        return every if self.training else every[:, : self.classes]


def turned(task: Task) -> Task:
    """A task whose training batches have each image in its four rotations."""
    task, plain = copy.copy(task), task.batches

    def batches(*args: Any) -> Iterator[tuple[Tensor, Tensor]]:
        return (rotated(x, y, task.classes) for x, y in plain(*args))

    task.batches = batches  # type: ignore[method-assign]
    return task


def network(tasks: list[Task], epochs: int, seed: int, rotate: bool) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    times = 4 if rotate else 1
    wide: dict[str, Any] = {"channels": (16, 24, 32, 48), "stem_width": 16}
    plain = timm.create_model("test_resnet", num_classes=times * tasks[0].classes, **wide)
    plain = Rotated(plain, tasks[0].classes) if rotate else plain
    model = hatcl.convert(plain, len(tasks), tasks[0].x[:2])
    learned = [turned(t) for t in tasks] if rotate else tasks
    rows = learn_all(
        model, learned, lambda: torch.optim.Adam(model.parameters(), lr=2e-3), epochs, 64, seed,
        lambda text: print(text, flush=True), flip=True,
    )  # fmt: skip
    return model, rows


class Told:
    """The data on test images whose tasks are unknown: features and logits under every task."""

    def __init__(self, router: hatcl.TaskRouter, tasks: list[Task]) -> None:
        self.x = torch.cat([t.x_test for t in tasks])
        self.task = torch.cat([torch.full((len(t.y_test),), i) for i, t in enumerate(tasks)])
        self.label = torch.cat([t.y_test for t in tasks])
        self.features, self.z = {}, []
        for t in router.tasks:
            parts = [router.seen(router.model, x, t) for x in self.x.split(500)]
            self.features[t] = torch.cat([h for h, _ in parts])
            self.z.append(torch.cat([z for _, z in parts]))

    def answers(self, router: hatcl.TaskRouter) -> tuple[Tensor, Tensor]:
        """Task and class, as `hatcl.predict` gives them."""
        p = router.probabilities(self.features)
        classes = self.z[0].shape[1]
        joint = torch.cat([p[:, t : t + 1] * z.double().softmax(1) for t, z in enumerate(self.z)], 1).argmax(1)
        few = hatcl.predict(router.model, self.x[:500], router=router)
        assert torch.equal(few.task * classes + few.label, joint[:500])
        return joint // classes, joint % classes

    def found(self, router: hatcl.TaskRouter) -> dict[str, float]:
        task, label = self.answers(router)
        return {"task": self.right(task), "class": self.right(task, label)}

    def right(self, task: Tensor, label: Tensor | None = None) -> float:
        hit = task == self.task
        return float((hit if label is None else hit & (label == self.label)).float().mean())


def filled(model: torch.nn.Module, tasks: list[Task]) -> hatcl.TaskRouter:
    router = hatcl.TaskRouter(model)
    for t, task in enumerate(tasks):
        router.add_task(t, task.x, task.y)
    return router


def changed(router: hatcl.TaskRouter, **options: Any) -> hatcl.TaskRouter:
    """The router that the same examples give with other options."""
    other = hatcl.TaskRouter(router.model, dataclasses.replace(router.options, **options))
    for t, known in router._known.items():
        sums = known.sums
        if "rank" in options:
            sums = {a: Sums.of(s.whole(), s.classes, options["rank"]) for a, s in sums.items()}
        other._known[t] = dataclasses.replace(known, sums=sums)
    return other


def calibrated(model: torch.nn.Module, tasks: list[Task]) -> float:
    """The temperature that is best on a tenth of each task's training images, by a router of the others."""
    trial, held = hatcl.TaskRouter(model), []
    for t, task in enumerate(tasks):
        out = torch.arange(len(task.y)) % 10 == 0
        trial.add_task(t, task.x[~out], task.y[~out])
        held.append((task.x[out], torch.full((int(out.sum()),), t)))
    return trial.calibrate(model, held).temperature


def mahalanobis(model: torch.nn.Module, tasks: list[Task], told: Told) -> Tensor:
    """The task of the smallest distance in its own features, less the mean distance of its training images."""
    scores = []
    for t, task in enumerate(tasks):
        own = features_under(model, task.x.split(500), t).double()
        means = torch.stack([own[task.y == c].mean(0) for c in range(task.classes)])
        apart = own - means[task.y]
        precision = torch.linalg.pinv(apart.T @ apart / len(own), hermitian=True, rtol=1e-6)

        def distance(h: Tensor, means: Tensor = means, precision: Tensor = precision) -> Tensor:
            gap = h[:, None] - means
            return torch.einsum("bci,ij,bcj->bc", gap, precision, gap).min(1).values

        scores.append(distance(features_under(model, told.x.split(500), t).double()) - distance(own).mean())
    return torch.stack(scores, 1).argmin(1)


def one_backbone(model: torch.nn.Module, tasks: list[Task], told: Told) -> dict[str, float]:
    """Exemplar-free classifiers of all classes in the features of the first task."""
    classes = tasks[0].classes
    own = [features_under(model, task.x.split(500), 0).double() for task in tasks]
    h = features_under(model, told.x.split(500), 0).double()
    flat = [part[task.y == c] for part, task in zip(own, tasks, strict=True) for c in range(classes)]
    means = torch.stack([part.mean(0) for part in flat])
    answers = {"nearest class mean": torch.cdist(h, means).argmin(1)}
    distances = []
    for part, mean in zip(flat, means, strict=True):  # FeCAM: shrunk, normalised covariance of each class
        c = torch.cov(part.T)
        on = c.diagonal() > 0
        c = c + (c.diagonal().mean() + 1e-12) * torch.eye(len(c))
        c = c / torch.outer(c.diagonal().sqrt(), c.diagonal().sqrt())
        gap = (h - mean) * on
        distances.append((gap @ torch.linalg.inv(c) * gap).sum(1))
    answers["FeCAM"] = torch.stack(distances, 1).argmin(1)
    p = projection(h.shape[1], 512, 0, 0)
    sums = []
    for part, task in zip(own, tasks, strict=True):
        phi = lifted(part, p)
        sums.append(Sums.of(phi.T @ phi, phi.T @ torch.nn.functional.one_hot(task.y, classes).double(), None))
    answers["RanPAC"] = (lifted(h, p) @ ridge(sums, sum(map(len, own)))).argmax(1)
    return {name: told.right(at // classes, at % classes) for name, at in answers.items()}


def rejection(router: hatcl.TaskRouter, told: Told) -> dict[str, Any]:
    """Tasks taken out one by one: are their images told from those of the others by the largest probability?"""
    shares, areas = [], []
    for gone in router.tasks:
        found = router.probabilities(told.features, [t for t in router.tasks if t != gone]).max(1).values
        known, unknown = found[told.task != gone], found[told.task == gone]
        shares.append(float((unknown < known.quantile(0.05)).float().mean()))
        areas.append(float((known[None] > unknown[:, None]).float().mean()))
    return {"rejected": shares, "area": areas}


def run(name: str, seed: int, epochs: int, rotate: bool) -> dict[str, Any]:
    torch.manual_seed(seed)
    began = time.time()
    tasks = split(name, PARTS[name])
    whole = torch.cat([t.x * t._scale[1] + t._scale[0] for t in tasks])
    mean, std = whole.mean((0, 2, 3)), whole.std((0, 2, 3))
    for task in tasks:
        task.normalise(mean, std)
    model, rows = network(tasks, epochs, seed, rotate)
    learned = time.time()
    router = filled(model, tasks)
    added = time.time()
    told = Told(router, tasks)
    found = told.found(router)
    answered = time.time()
    temperature = calibrated(model, tasks)
    best = torch.stack([z.max(1).values for z in told.z], 1).argmax(1)
    label = torch.stack([z.argmax(1) for z in told.z], 1)

    def of(task: Tensor) -> dict[str, float]:
        return {"task": told.right(task), "class": told.right(task, label.gather(1, task[:, None])[:, 0])}

    low = {str(rank): changed(router, rank=rank) for rank in LOW}
    return {
        "tasks": len(tasks),
        "task_incremental": float(np.mean([r["hard"] for r in rows])),
        "router": found,
        "router, calibrated": told.found(changed(router, temperature=temperature)),
        "temperature": temperature,
        "largest logit": of(best),
        "Mahalanobis": of(mahalanobis(model, tasks, told)),
        "one backbone": one_backbone(model, tasks, told),
        "rejection": rejection(router, told),
        "low memory": {rank: {**told.found(r), "bytes": r.bytes} for rank, r in low.items()},
        "bytes": router.bytes,
        "bit_equal": bit_equal(model, tasks, rows),
        "seconds": {"learning": learned - began, "adding": added - learned, "answering": answered - added},
        "epochs": epochs,
    }


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds."""
    rows = {
        "task_incremental": lambda r: r["task_incremental"],
        "rejected": lambda r: float(np.mean(r["rejection"]["rejected"])),
        "area": lambda r: float(np.mean(r["rejection"]["area"])),
        **{
            f"{way}: {what}": lambda r, way=way, what=what: r[way][what]
            for way in ("router", "router, calibrated", "largest logit", "Mahalanobis")
            for what in ("task", "class")
        },
        **{f"{way}: class": lambda r, way=way: r["one backbone"][way] for way in FIXED},
        **{f"rank {k}: task": lambda r, k=k: r["low memory"][str(k)]["task"] for k in LOW},
    }
    values = {name: [of(r) for r in runs.values()] for name, of in rows.items()}
    return {n: {"mean": float(np.mean(v)), "spread": float(np.std(v)), "seeds": len(v)} for n, v in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rotate", action="store_true", help="learn the four rotations as classes of their own")
    args = parser.parse_args()
    parts = {name: f"{name} rotated" if args.rotate else name for name in args.data}
    for name, part in parts.items():
        for seed in args.seeds:
            if str(seed) in read(NAME).get(part, {}).get("runs", {}):
                continue
            row = run(name, seed, args.epochs, args.rotate)
            result = read(NAME)
            of_data = result.setdefault(part, {})
            of_data.setdefault("runs", {})[str(seed)] = row
            of_data["summary"] = summary(of_data["runs"])
            save(NAME, result)
    for part in parts.values():
        print(part)
        for what, x in read(NAME).get(part, {}).get("summary", {}).items():
            print(f"  {what:<28}{100 * x['mean']:6.1f} ({100 * x['spread']:.1f}, {x['seeds']} seeds)")


if __name__ == "__main__":
    main()
