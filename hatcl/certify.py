"""The certificate: proof, for the model in hand, that a sealed task depends on nothing that is not its own (M7)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import IsolationError, TaskError
from .gates import gates_of
from .gates import task as active
from .guard import check, held, own_buffers, sealed_tasks
from .map.trace import call, tensors_of

MAGNITUDE = {torch.float16: 1e2, torch.bfloat16: 1e3}


@dataclass(frozen=True)
class Certificate:
    """exact: every sealed task's outputs are bit-equal under attack. max_abs_diff: task -> largest difference seen.
    overwritten: task -> how many elements the attack overwrote (a proof that overwrote nothing proves nothing)."""

    exact: bool
    max_abs_diff: dict[int, float] = field(default_factory=dict)
    overwritten: dict[int, int] = field(default_factory=dict)

    def __str__(self) -> str:
        tasks = ", ".join(map(str, self.max_abs_diff)) or "none"
        if self.exact:
            least = min(self.overwritten.values(), default=0)
            return f"exact: tasks {tasks} are bit-equal with everything else overwritten (at least {least:,} elements)"
        bad = {t: d for t, d in self.max_abs_diff.items() if d != 0}
        return f"NOT exact: of tasks {tasks}, these moved: {bad}"


@contextlib.contextmanager
def attack(model: nn.Module, task: int, only: set[str] | None = None, seed: int = 0) -> Iterator[int]:
    """Overwrite in place every element that is not live for `task` with large random values; put back on leaving.
    only: restrict the attack to these shared parameters. Yields how many elements were overwritten."""
    generator = torch.Generator().manual_seed(seed)
    kept: list[tuple[Tensor, Tensor]] = []
    count = 0
    with torch.no_grad():

        def overwrite(x: Tensor, where: Tensor | None) -> int:
            if not x.is_floating_point():
                return 0
            kept.append((x, x.detach().clone()))
            noise = torch.randn(x.shape, generator=generator) * MAGNITUDE.get(x.dtype, 1e4)
            noise = noise.to(x)
            if where is None:
                x.copy_(noise)
                return x.numel()
            x.copy_(torch.where(where, noise, x))
            return int(where.sum())

        for h in held(model):
            shared = h.task is None and not h.plain
            if only is not None and (not shared or h.name not in only):
                continue
            if shared:
                count += overwrite(h.param, ~h.live(task)) if h.plan is not None else 0
            elif h.task != task:
                count += overwrite(h.param, None)
        if only is None:
            for other in range(gates_of(model)[0].num_tasks):
                if other != task:
                    for _, b in own_buffers(model, other):
                        count += overwrite(b, None)
        try:
            yield count
        finally:
            for x, old in kept:
                x.copy_(old)


def outputs_of(model: nn.Module, inputs: Any, task: int) -> list[Tensor]:
    """Every tensor that the model puts out for a task."""
    with active(model, task):
        return [x.detach().clone() for x in tensors_of(call(model, inputs))]


def certify(model: nn.Module, inputs: Any, *, strict: bool = False) -> Certificate:
    """Prove that sealed tasks are isolated: for each, overwrite on a copy everything that is not its own with large
    random values and demand bit-equal outputs on `inputs`. Also checks every task's digest.

    Args:
        inputs: what the model's forward takes: a tensor, a tuple or a dict.
        strict: raise instead of returning a certificate that is not exact.

    Raises:
        IntegrityError: what was sealed is not what is there. IsolationError: not exact, under `strict`.
        TaskError: no task is sealed.
    """
    done = sealed_tasks(model)
    if not done:
        raise TaskError("certify: no task is sealed yet, so there is nothing to prove; learn one with hatcl.learn")
    check(model)
    trial = copy.deepcopy(model).eval()
    for g in gates_of(trial):
        g.learning = None
    diffs: dict[int, float] = {}
    counts: dict[int, int] = {}
    with torch.no_grad():
        for t in done:
            want = outputs_of(trial, inputs, t)
            with attack(trial, t, seed=t) as counts[t]:
                got = outputs_of(trial, inputs, t)
            diffs[t] = max((difference(a, b) for a, b in zip(want, got, strict=False)), default=0.0)
    certificate = Certificate(all(d == 0 for d in diffs.values()), diffs, counts)
    if strict and not certificate.exact:
        raise IsolationError(f"certify: {certificate}. Other tasks reach them; please report the model")
    return certificate


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference; 0.0 where the two are the same bit for bit, NaN for NaN."""
    if torch.equal(a, b):
        return 0.0
    if a.is_floating_point() and torch.equal(torch.isnan(a), torch.isnan(b)):
        known = ~torch.isnan(a)
        a, b = a[known], b[known]
        return 0.0 if torch.equal(a, b) else float((a - b).abs().nan_to_num(torch.inf).max())
    return float("inf")
