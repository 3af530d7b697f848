"""The cost of a HAT model compared with the plain one: training step, evaluation forward, peak memory.

    OMP_NUM_THREADS=1 PYTHONPATH=benchmarks pytest benchmarks/test_cost.py --benchmark-only -k "not large"

Steps of both models alternate within one run, in both orders, and ratios are medians over pairs of CPU time, so that a
busy machine slows both. The second of three tasks is measured: half of the units belong to a sealed task, so a quarter
of the elements is frozen, and gates are soft. Nothing flushes denormals. The table also has the number of operations of
a step, which does not depend on the machine.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import pytest
import torch
from common import read, save
from cost_cases import LARGE, SMALL
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hatcl
from hatcl.hat.gates import gates_of

CASES = {"resnet18": (32, 64), "vit_tiny_patch16_224": (224, 8)}
NAMES = [*SMALL, *(pytest.param(name, id=f"large {name}") for name in LARGE)]
SECONDS = 6  # of pairs, for each model
LIMITS = {"train": 1.25, "eval": 1.05, "memory": 1.2}
LIMITED = ("resnet18, 32 px, batch 64", "vit_tiny_patch16_224, 224 px, batch 8")  # others are measured


class Operations(TorchDispatchMode):
    """How many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)


def batch(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    size, count = CASES[name]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % 10


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, learning=None) -> None:
    loss = F.cross_entropy(model(x), y)
    if learning is not None:
        loss = loss + learning.penalty()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def timed(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def operations(run: Callable[[], object]) -> int:
    with Operations() as seen:
        run()
    return seen.count


def pairs_of(plain: Callable[[], object], hat: Callable[[], object], seconds: float) -> list[tuple[float, float]]:
    pairs, until = [], time.time() + seconds
    while time.time() < until or len(pairs) < 6:
        pairs.append((timed(plain), timed(hat)))
        second = timed(hat)
        pairs.append((timed(plain), second))
    return pairs


def record(kind: str, name: str, row: dict) -> None:
    result = read("cost")
    result.setdefault(kind, {})[name] = row
    result["limits"] = LIMITS
    save("cost", result)


def report(kind: str, name: str, plain: Callable[[], object], hat: Callable[[], object], seconds: float) -> None:
    counts = operations(plain), operations(hat)
    pairs = pairs_of(plain, hat, seconds)
    ratio = statistics.median(b / a for a, b in pairs)
    seconds_each = [statistics.median(column) for column in zip(*pairs, strict=True)]
    row = {"ratio": ratio, "operations": counts, "plain_seconds": seconds_each[0], "hat_seconds": seconds_each[1]}
    record(kind, name, {**row, "pairs": len(pairs)})
    print(f"\n{kind}: {name}: {ratio:.2f}, operations {counts[0]} -> {counts[1]}")
    if name in LIMITED:
        assert ratio <= LIMITS[kind]


def half_on(model: nn.Module, task: int) -> None:
    """A task that is being learned has a random half of all units on."""
    e = gates_of(model)[0].embeddings[task]
    on = torch.rand(e.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    with torch.no_grad():
        e.copy_(torch.where(on, 1.0, -1.0))


@pytest.mark.parametrize("name", NAMES)
def test_cost(benchmark, name):
    torch.manual_seed(0)
    plain, x = {**SMALL, **LARGE}[name]()
    y = torch.arange(len(x)) % 10
    model = hatcl.convert(plain, num_tasks=3, example_inputs=x[:2])
    ours, theirs = optimizer_of(model), optimizer_of(plain)
    model.train(), plain.train()
    warnings.simplefilter("ignore")
    with hatcl.learn(model, 0, ours, steps=1) as learning:
        step(model, ours, x, y, learning)
        half_on(model, 0)

    def both() -> None:
        with hatcl.learn(model, 1, ours, steps=100_000) as learning:
            for _ in range(3):
                step(plain, theirs, x, y), step(model, ours, x, y, learning)
            report("train", name, lambda: step(plain, theirs, x, y), lambda: step(model, ours, x, y, learning), SECONDS)
        plain.eval(), model.eval()
        with torch.no_grad(), hatcl.task(model, 0):
            for _ in range(3):
                plain(x), model(x)
            report("eval", name, lambda: plain(x), lambda: model(x), SECONDS / 2)

    benchmark.pedantic(both, rounds=1)


MEMORY = """
import resource, sys, timm, torch
sys.path.insert(0, sys.argv[3])
import hatcl
from test_cost import batch, optimizer_of, step
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
name, hat = sys.argv[1], sys.argv[2] == "hat"
x, y = batch(name)
base = peak()
model = timm.create_model(("hat_" if hat else "") + name, num_classes=10, **({"num_tasks": 3} if hat else {}))
model.train()
o = optimizer_of(model)
for t in range(2):
    if hat:
        with hatcl.learn(model, t, o, steps=4) as learning:
            for _ in range(4): step(model, o, x, y, learning)
    else:
        for _ in range(4): step(model, o, x, y)
print(base, peak())
"""


@pytest.mark.parametrize("name", CASES)
def test_memory(name):
    """Peak resident memory of a process that learns two tasks, the libraries themselves included and left out."""
    here = str(__import__("pathlib").Path(__file__).parent)

    def run(kind: str) -> tuple[int, int]:
        out = subprocess.run(
            [sys.executable, "-c", MEMORY, name, kind, here], capture_output=True, text=True, check=True
        )
        base, peak = map(int, out.stdout.split())
        return base, peak

    (base, plain), (_, hat) = run("plain"), run("hat")
    row = {
        "plain_bytes": plain,
        "hat_bytes": hat,
        "ratio": hat / plain,
        "ratio_above_import": (hat - base) / (plain - base),
    }
    record("memory", name, row)
    assert row["ratio"] <= LIMITS["memory"], json.dumps(row)
