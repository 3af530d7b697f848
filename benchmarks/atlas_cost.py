"""The cost of learning coefficients compared with fine-tuning: time per step and in evaluation, and memory.

    python benchmarks/atlas_cost.py [--model vit_base_patch32_224] [--batch 8] [--rounds 9]

Time: in one process, steps of plain AdamW fine-tuning alternate with steps of composers over T = 1, 4, 8 task vectors,
in float32 and in bfloat16. The result is the median CPU time as a ratio to fine-tuning's, with quartiles. Memory: one
process per T takes three steps while its anonymous memory is polled. The result is the peak above the memory after
imports, in multiples of the parameters' own size.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from common import save
from torch import Tensor, nn
from torch.nn import functional as F

import hatcl

COUNTS = (1, 4, 8)


def vectors_of(model: nn.Module, count: int) -> list[hatcl.TaskVector]:
    return [
        hatcl.TaskVector({n: 1e-3 * torch.randn_like(p) for n, p in model.named_parameters()}) for _ in range(count)
    ]


def data(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 224, 224), torch.randint(0, 10, (batch,))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def clocked(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def ratios(name: str, batch: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=10).eval()
    x, y = data(batch)
    vectors = vectors_of(plain, max(COUNTS))
    composers = {f"T={t}": hatcl.compose(plain, vectors[:t], check=False) for t in COUNTS}
    for t in COUNTS:  # task vectors in half the memory
        composers[f"T={t}, bfloat16"] = hatcl.compose(plain, vectors[:t], dtype=torch.bfloat16, check=False)
    tuned = copy.deepcopy(plain)
    steps: dict[str, Callable[[], Any]] = {}
    plain_optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-5)
    steps["fine-tuning"] = lambda: step(tuned, plain_optimizer, x, y)
    for k, composer in composers.items():
        optimizer = torch.optim.AdamW([composer.coefficients], lr=1e-3)
        steps[k] = lambda c=composer, o=optimizer: step(c, o, x, y)  # type: ignore[misc]
    taken: dict[str, list[float]] = {k: [] for k in steps}
    for i in range(rounds + 1):
        for k, work in steps.items():
            seconds = clocked(work)
            if i:  # the first round warms up
                taken[k].append(seconds)
    for composer in composers.values():
        with torch.no_grad():
            composer(x)  # folds, once
    evaluation: dict[str, list[float]] = {k: [] for k in ["plain", *composers]}
    with torch.no_grad():
        for _ in range(rounds):
            evaluation["plain"].append(clocked(lambda: plain(x)))
            for k, composer in composers.items():
                evaluation[k].append(clocked(lambda c=composer: c(x)))  # type: ignore[misc]
    return {"step": dict(relative(taken)), "evaluation": dict(relative(evaluation))}


def relative(taken: dict[str, list[float]]) -> Iterator[tuple[str, dict[str, float]]]:
    """Each round's ratio to the first entry of the same round: median and quartiles."""
    first, *others = taken
    yield first, {"seconds": statistics.median(taken[first])}
    for k in others:
        each = [a / b for a, b in zip(taken[k], taken[first], strict=True)]
        low, middle, high = statistics.quantiles(each, n=4)
        yield k, {"ratio": middle, "from": low, "to": high}


def anonymous() -> float:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024.0 for line in f if line.startswith("RssAnon"))


def peak(name: str, batch: int, count: int) -> dict[str, float]:
    """The peak of anonymous memory above import over three steps; count 0: forward and backward through the plain
    model to its input, without gradients of parameters."""
    torch.manual_seed(0)
    start = anonymous()
    highest, done = [start], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], anonymous())

    model = timm.create_model(name, num_classes=10).eval()
    x, y = data(batch)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if not count:
        model.requires_grad_(False)
        x.requires_grad_(True)
    else:
        composer = hatcl.compose(model, vectors_of(model, count), check=False)
        optimizer: Any = torch.optim.AdamW([composer.coefficients], lr=1e-3)
    thread = threading.Thread(target=watch)
    thread.start()
    for _ in range(3):
        if count:
            step(composer, optimizer, x, y)
        else:
            F.cross_entropy(model(x), y).backward()
    done.set()
    thread.join()
    return {"bytes": highest[0] - start, "parameters": size}


def memory(name: str, batch: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for t in (0, *COUNTS):
        command = [sys.executable, __file__, "--model", name, "--batch", str(batch), "--peak", str(t)]
        out[str(t)] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    size = out["0"]["parameters"]
    activations = out["0"]["bytes"] - size
    rows = {
        f"T={t}": {"above_activations": (out[str(t)]["bytes"] - activations) / size, "limit": t + 2} for t in COUNTS
    }
    return {"parameters_mb": size / 1e6, "activations": activations / size, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch32_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak is not None:
        sys.stdout.write(json.dumps(peak(args.model, args.batch, args.peak)))
        return
    result = {"model": args.model, "batch": args.batch, **ratios(args.model, args.batch, args.rounds)}
    result["memory"] = memory(args.model, args.batch)
    save("atlas_cost", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
