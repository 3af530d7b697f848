"""What a HAT model costs beside the plain one: training step, evaluation forward, peak memory.

    pytest benchmarks/test_cost.py --benchmark-only

Steps of both models alternate within one run and ratios are medians over pairs, so that a busy machine slows both. The
second of three tasks is measured: part of the network is frozen, and gates are soft. No one flushes denormals.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import timm
import torch
from common import read, save
from torch import nn
from torch.nn import functional as F

import hatcl

CASES = {"resnet18": (32, 64), "vit_tiny_patch16_224": (224, 8)}
PAIRS = 15
LIMITS = {"train": 1.25, "eval": 1.05, "memory": 1.2}


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
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def record(kind: str, name: str, row: dict) -> None:
    result = read("cost")
    result.setdefault(kind, {})[name] = row
    result["limits"] = LIMITS
    save("cost", result)


def report(kind: str, name: str, pairs: list[tuple[float, float]]) -> float:
    ratio = statistics.median(hat / plain for plain, hat in pairs)
    plain, hat = (statistics.median(column) for column in zip(*pairs, strict=True))
    record(kind, name, {"plain_seconds": plain, "hat_seconds": hat, "ratio": ratio, "pairs": len(pairs)})
    return ratio


@pytest.mark.parametrize("name", CASES)
def test_step(benchmark, name):
    torch.manual_seed(0)
    x, y = batch(name)
    plain = timm.create_model(name, num_classes=10)
    model = hatcl.convert(plain, num_tasks=3, example_inputs=x[:2])
    ours, theirs = optimizer_of(model), optimizer_of(plain)
    model.train()
    with hatcl.learn(model, 0, ours, steps=2) as learning:
        for _ in range(2):
            step(model, ours, x, y, learning)
    pairs = []
    with hatcl.learn(model, 1, ours, steps=2 * PAIRS + 2) as learning:
        for _ in range(2):
            step(plain, theirs, x, y)
            step(model, ours, x, y, learning)

        def pair() -> None:
            pairs.append((timed(lambda: step(plain, theirs, x, y)), timed(lambda: step(model, ours, x, y, learning))))

        benchmark.pedantic(pair, rounds=PAIRS)
    assert report("train", name, pairs) <= LIMITS["train"]


@pytest.mark.parametrize("name", CASES)
def test_evaluation(benchmark, name):
    torch.manual_seed(0)
    x, y = batch(name)
    plain = timm.create_model(name, num_classes=10).eval()
    model = hatcl.convert(plain, num_tasks=3, example_inputs=x[:2])
    ours = optimizer_of(model)
    with hatcl.learn(model, 0, ours, steps=1) as learning:
        step(model, ours, x, y, learning)
    model.eval()
    pairs = []
    with torch.no_grad(), hatcl.task(model, 0):
        plain(x), model(x)
        benchmark.pedantic(lambda: pairs.append((timed(lambda: plain(x)), timed(lambda: model(x)))), rounds=2 * PAIRS)
    assert report("eval", name, pairs) <= LIMITS["eval"]


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
