"""Shared by the benchmarks: real data, plain training loops, and results as JSON together with their machine."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hatcl

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("HATCL_DATA", HERE.parent.parent / "shared" / "data"))
RESULTS = HERE / "results"


class Task:
    """One data set in memory: float NCHW images, normalised by the training images' own mean and spread."""

    def __init__(self, name: str, x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> None:
        self.name = name
        train, test = _images(x), _images(x_test)
        mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
        self.x, self.x_test = (train - mean) / std, (test - mean) / std
        self.y, self.y_test = torch.from_numpy(y).long(), torch.from_numpy(y_test).long()
        self.classes = int(self.y.max()) + 1
        self._scale = mean, std

    def normalise(self, mean: Tensor, std: Tensor) -> None:
        """Use this mean and spread per channel instead."""
        was_mean, was_std = self._scale
        for name in ("x", "x_test"):
            setattr(
                self, name, (getattr(self, name) * was_std + was_mean - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
            )
        self._scale = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def batches(self, size: int, generator: torch.Generator, flip: bool) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.y), generator=generator)
        for i in range(0, len(order), size):
            x = self.x[order[i : i + size]]
            if flip:
                turned = torch.rand(len(x), generator=generator) < 0.5
                x = torch.where(turned.view(-1, 1, 1, 1), x.flip(3), x)
            yield x, self.y[order[i : i + size]]

    def steps(self, size: int) -> int:
        return -(-len(self.y) // size)


def _images(x: np.ndarray) -> Tensor:
    """uint8 HWC or HW to float RGB of 32 x 32 (28 x 28 is padded)."""
    t = torch.from_numpy(np.ascontiguousarray(x)).float() / 255
    t = t.permute(0, 3, 1, 2) if t.dim() == 4 else t.unsqueeze(1).expand(-1, 3, -1, -1)
    gap = 32 - t.shape[-1]
    return F.pad(t, (gap // 2, gap - gap // 2, gap // 2, gap - gap // 2)).contiguous()


def load(name: str) -> Task:
    with np.load(DATA / name / "data.npz", allow_pickle=False) as d:
        return Task(name, d["x_train"], d["y_train"], d["x_test"], d["y_test"])


def split(name: str, parts: int) -> list[Task]:
    """A data set's classes in `parts` tasks of consecutive classes."""
    with np.load(DATA / name / "data.npz", allow_pickle=False) as d:
        per = (int(d["y_train"].max()) + 1) // parts
        out = []
        for t in range(parts):
            a, b = d["y_train"] // per == t, d["y_test"] // per == t
            out.append(
                Task(f"{name}[{t}]", d["x_train"][a], d["y_train"][a] % per, d["x_test"][b], d["y_test"][b] % per)
            )
        return out


def logits(model: nn.Module, x: Tensor, size: int = 500) -> Tensor:
    model.eval()
    with torch.no_grad():
        return torch.cat([model(x[i : i + size]).float() for i in range(0, len(x), size)])


def accuracy(model: nn.Module, task: Task) -> float:
    return float((logits(model, task.x_test).argmax(1) == task.y_test).float().mean())


def fit(
    model: nn.Module,
    task: Task,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch: int,
    seed: int,
    *,
    flip: bool = False,
    bf16: bool = False,
    cosine: bool = False,
    extra: Callable[[], Tensor] | None = None,
    head: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Cross-entropy for some epochs; `extra` is added to the loss, `head` picks a task's logits, `cosine` lets each
    learning rate fall to zero along the task (and puts it back afterwards)."""
    rates = [g["lr"] for g in optimizer.param_groups]
    done, total = 0, epochs * task.steps(batch)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        model.train()
        for x, y in task.batches(batch, generator, flip):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = model(x)
                loss = F.cross_entropy(head(out) if head else out, y)
            if extra is not None:
                loss = loss + extra()
            if cosine:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * (1 + math.cos(math.pi * done / total)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def learn_all(
    model: nn.Module,
    tasks: list[Task],
    optimizer: Callable[[], torch.optim.Optimizer] | torch.optim.Optimizer,
    epochs: int,
    batch: int,
    seed: int,
    log: Callable[[str], None] = print,
    first: int = 0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Learn the tasks in sequence with hatcl, from index `first` on; per task: accuracy with soft and hard gates, units
    used, logits."""
    rows = []
    for t, task in enumerate(tasks, first):
        o = optimizer() if callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer) else optimizer
        began = time.time()
        with hatcl.learn(model, task=t, optimizer=o, steps=epochs * task.steps(batch), epochs=epochs) as learning:
            fit(model, task, o, epochs, batch, seed * 100 + t, extra=learning.penalty, **options)
            with learning.soft():
                soft = accuracy(model, task)
        with hatcl.task(model, t):
            kept = logits(model, task.x_test)
        hard = float((kept.argmax(1) == task.y_test).float().mean())
        used = hatcl.describe(model).use[t]
        rows.append({"task": task.name, "soft": soft, "hard": hard, "units": used, "logits": kept})
        log(f"  task {t} {task.name}: soft {soft:.4f} hard {hard:.4f} units {used} ({time.time() - began:.0f} s)")
    return rows


def bit_equal(model: nn.Module, tasks: list[Task], rows: list[dict[str, Any]]) -> list[bool]:
    """Are every task's logits on its whole test set what they were at sealing, bit for bit?"""
    out = []
    for t, task in enumerate(tasks):
        with hatcl.task(model, t):
            out.append(torch.equal(logits(model, task.x_test), rows[t]["logits"]))
    return out


def save(name: str, result: dict[str, Any]) -> None:
    """Write `results/<name>.json` with the machine and the versions."""
    RESULTS.mkdir(exist_ok=True)
    result["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "hatcl": hatcl.__version__,
    }
    path = RESULTS / f"{name}.json"
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(result, indent=1, default=float) + "\n")
    os.replace(scratch, path)


def read(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}
