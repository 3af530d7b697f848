"""The time of a training step by its parts, compared with the plain model.

    OMP_NUM_THREADS=1 PYTHONPATH=benchmarks python benchmarks/profile_step.py [--cases NAME ...] [--seconds 4]

For each network of `cost_cases.py` (selected by any part of its name): operations and CPU time of a step of the plain
model, of the first task and of the second, by part of the step; the time of the functions that the plain model does not
need; and the ten operations that add the most. Steps alternate, and times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cost_cases import LARGE, SMALL
from test_cost import half_on, operations, optimizer_of, step
from torch.profiler import ProfilerActivity, profile

import hatcl
from hatcl import keeper
from hatcl.hat.gates import Gates
from hatcl.hat.guard import Guard
from hatcl.hat.layers.gated import HATLayer

CASES = ["MLP", "resnet18, 32 px, batch 4", "vit_tiny_patch16_224, 96 px"]
CAUSES = {
    "gates": (Gates, "soft_gates"),
    "penalty": (Gates, "penalty"),
    "folding parameters with gates": (HATLayer, "_hat_by_folds"),
    "zeroing frozen gradients": (keeper, "_clear"),
    "before the step: is all finite": (Guard, "before_step"),
    "putting frozen elements back": (keeper, "put_all_back"),
    "after the step: embeddings, scale": (Guard, "after_step"),
}
"""The work of a step that the plain one does not have, and its function. (Derivatives count as backward.)"""


@contextmanager
def timed(found: dict[str, float]) -> Iterator[None]:
    """Inside, the time of every cause is added up."""
    before = {cause: getattr(owner, name) for cause, (owner, name) in CAUSES.items()}

    def around(cause: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                found[cause] += time.process_time() - began

        return run

    for cause, (owner, name) in CAUSES.items():
        setattr(owner, name, around(cause, before[cause]))
    try:
        yield
    finally:
        for cause, (owner, name) in CAUSES.items():
            setattr(owner, name, before[cause])


def parts(model: Any, optimizer: Any, x: torch.Tensor, y: torch.Tensor, learning: Any = None) -> list[float]:
    """Seconds of forward, backward, and the optimizer's step."""
    at = [time.process_time()]
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss = loss if learning is None else loss + learning.penalty()
    at.append(time.process_time())
    optimizer.zero_grad()
    loss.backward()
    at.append(time.process_time())
    optimizer.step()
    at.append(time.process_time())
    return [b - a for a, b in zip(at, at[1:], strict=False)]


def medians(rows: list[list[float]]) -> list[float]:
    return [1e3 * statistics.median(column) for column in zip(*rows, strict=True)]


def costs(runs: tuple[Callable[[], object], ...], rounds: int = 6) -> list[dict[str, tuple[float, float]]]:
    """Each operation's own microseconds in a step of each, and how often it runs. The profiler tells the time of the
    clock, so that the least of several rounds counts."""
    out: list[dict[str, tuple[float, float]]] = [{} for _ in runs]
    for _ in range(rounds):
        for known, run in zip(out, runs, strict=True):
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                for _ in range(5):
                    run()
            for e in seen.key_averages():
                now = (e.self_cpu_time_total / 5, e.count / 5)
                known[e.key] = min(now, known.get(e.key, now))
    return out


def report(name: str, seconds: float) -> None:
    torch.manual_seed(0)
    plain, x = {**SMALL, **LARGE}[name]()
    y = torch.arange(len(x)) % 10
    model = hatcl.convert(plain, num_tasks=3, example_inputs=x[:2], verify=False)
    theirs, ours = optimizer_of(plain), optimizer_of(model)
    plain.train(), model.train()
    print(f"\n{name}\n  CPU time in ms        forward  backward      step       all  operations")
    for task in (0, 1):
        with hatcl.learn(model, task, ours, steps=100_000) as learning:
            rows: tuple[list[list[float]], list[list[float]]] = ([], [])
            until = time.time() + seconds
            while time.time() < until or len(rows[0]) < 6:
                rows[0].append(parts(plain, theirs, x, y))
                rows[1].append(parts(model, ours, x, y, learning))
            runs = (lambda: step(plain, theirs, x, y), lambda learning=learning: step(model, ours, x, y, learning))
            both = zip(("plain", f"task {task}"), rows, runs, strict=True)
            for label, row, run in both:
                each = medians(row)
                print(f"  {label:<18}", *(f"{v:9.3f}" for v in (*each, sum(each))), f"{operations(run):10d}")
            if task == 1:
                found: dict[str, float] = defaultdict(float)
                steps = max(len(rows[0]) // 2, 6)
                with timed(found):
                    for _ in range(steps):
                        runs[1]()
                more = sum(medians(rows[1])) - sum(medians(rows[0]))
                print(f"  of {more:.3f} ms more, by function:")
                for cause, total in found.items():
                    print(f"    {cause:<36} {1e3 * total / steps:8.3f} ms  {1e5 * total / steps / more:5.1f} %")
                one, other = costs(runs)
                zero = (0.0, 0.0)
                most = sorted(other, key=lambda k: one.get(k, zero)[0] - other[k][0])[:10]
                print("  the ten operations that add the most, own time and number:")
                for key in most:
                    (a, n), (b, m) = one.get(key, zero), other[key]
                    print(f"    {key[:44]:<44} {a:9.1f} us {n:6.0f} -> {b:9.1f} us {m:6.0f}")
            half_on(model, task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--seconds", type=float, default=4.0, help="of alternating steps, for each task")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in {**SMALL, **LARGE}:
        if any(part in name for part in given.cases):
            report(name, given.seconds)


if __name__ == "__main__":
    main()
