"""Grafts in sequence: each task trains around the grafts of the tasks before it and then gets its own graft (after
Panigrahi et al. 2023, arXiv 2302.06600, section 6)."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config import number, one_of, whole
from ...functional import digest_of
from ...grafts import inplace
from ...grafts.graft import Graft, union
from ...grafts.holding import hold
from ...grafts.learned import learn_graft
from ...grafts.options import GraftOptions
from ...grafts.selection import candidates, select_graft
from ...vectors.tensors import tied_names
from ..tasks import ContinualTask
from .registry import Method, continual_method

BY = ("magnitude", "random", "learned")
SCORED = ("own", "all")


@continual_method("graft", paper="Panigrahi et al. 2023, arXiv 2302.06600")
class Grafts(Method):
    """Task t trains from `theta_pre` with the grafts of the tasks before it, whose elements stay bit-identical. Then
    its graft is taken, the share `sparsity` of all elements that holds most of what it learned, and everything outside
    all grafts is reset to theta_pre, including running statistics. A task is scored with the grafts up to its own;
    these outputs never change again, bit for bit, so backward transfer is 0.

    No element is in two grafts, so any number of grafts can be applied together. A run keeps their values and those of
    theta_pre at their elements; each task's folder has its graft as `graft.safetensors`.
    """

    @dataclass(frozen=True)
    class Options:
        """Args:
        sparsity: the share of the trained elements in a task's graft. by: how they are chosen: by `magnitude` of the
        change, at `random`, or `learned` with the task's examples and loss (which also choose the mask, since accuracy
        on a small validation set would choose by chance). scored: score a task with the grafts up to its `own`, or with
        `all` grafts. only, skip: patterns of names that take part or do not; tensors that do not are trained and then
        reset. learn: `GraftOptions` for `learned`, or a mapping of the options to change. batch_size: examples per
        batch there.
        """

        sparsity: float = 0.01
        by: str = "magnitude"
        scored: str = "own"
        only: tuple[str, ...] = ()
        skip: tuple[str, ...] = ()
        learn: GraftOptions = field(default_factory=GraftOptions)
        batch_size: int = 16

        def __post_init__(self) -> None:
            one_of("by", self.by, BY)
            one_of("scored", self.scored, SCORED)
            number("sparsity", self.sparsity, 0, 1, without="both", what="a share")
            whole("batch_size", self.batch_size)
            for name in ("only", "skip"):
                given = getattr(self, name)
                object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
            object.__setattr__(self, "learn", GraftOptions().changed(self.learn))

    def start(self, model: nn.Module, tasks: Sequence[ContinualTask], seed: int) -> None:
        self.tasks = tasks
        self.grafts: list[Graft] = []  # one per task, with the learned values
        self.under: list[Graft] = []  # the same elements with theta_pre's values
        candidates(
            _learned_parameters(model), _learned_parameters(model), self.options.only, self.options.skip
        )  # raises for a wrong pattern

    def begin(self, model: nn.Module, stage: int) -> None:
        self.before = {n: t.detach().clone() for n, t in {**_learned_parameters(model), **_buffers(model)}.items()}

    def watching(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int
    ) -> contextlib.AbstractContextManager[Any]:
        return hold(model, self.grafts, optimizer)

    @torch.no_grad()
    def end(self, model: nn.Module, stage: int) -> None:
        weights = _learned_parameters(model)
        before = {n: self.before[n] for n in weights}
        after = {n: p.detach().clone() for n, p in weights.items()}
        for name, t in {**weights, **_buffers(model)}.items():
            t.copy_(self.before[name])
        graft = self._chosen(model, before, after, stage)
        if self.grafts:
            graft = graft - union(self.grafts)
        # this graft can also be applied to theta_pre without the earlier grafts
        base = {n: digest_of(_put(before[n].clone(), n, self.under)) for n in graft.indices}
        self.grafts.append(Graft(graft.shapes, graft.indices, graft.values, base))
        self.under.append(self.grafts[-1].fill(before))
        _write(weights, self.grafts[-1:])

    def _chosen(self, model: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor], stage: int) -> Graft:
        o, task = self.options, self.tasks[stage]
        if o.by != "learned":
            seed = int(torch.randint(2**31, ()))
            return select_graft(before, after, o.sparsity, o.by, only=o.only, skip=o.skip, seed=seed)
        names = [glob.escape(n) for n in candidates(before, after, o.only, o.skip)]
        others = {n: p for n, p in model.named_parameters() if n not in after}
        with torch.enable_grad():
            return learn_graft(
                model, {**others, **after}, task.loss, _Batches(task, o.batch_size), o.sparsity,
                only=names, options=o.learn,
            )  # fmt: skip

    @contextlib.contextmanager
    def scoring(self, model: nn.Module, index: int) -> Iterator[None]:
        later = slice(index + 1, None) if self.options.scored == "own" else slice(0, 0)
        weights = _learned_parameters(model)
        _write(weights, self.under[later])
        try:
            yield
        finally:
            _write(weights, self.grafts[later])

    def state(self) -> dict[str, Any]:
        return {}

    def scores(self) -> dict[str, Graft]:
        return {"graft": self.grafts[-1]} if self.grafts else {}

    def save(self, folder: Path) -> None:
        for i, (graft, under) in enumerate(zip(self.grafts, self.under, strict=True)):
            graft.save(folder / f"graft_{i}.safetensors")
            under.save(folder / f"under_{i}.safetensors")

    def load(self, folder: Path, model: nn.Module) -> None:
        count = len(list(folder.glob("graft_*.safetensors")))
        self.grafts = [Graft.load(folder / f"graft_{i}.safetensors") for i in range(count)]
        self.under = [Graft.load(folder / f"under_{i}.safetensors") for i in range(count)]


class _Batches:
    """A task's examples in their order, batched again for every pass."""

    def __init__(self, task: ContinualTask, size: int) -> None:
        self.task, self.size = task, size

    def __iter__(self) -> Iterator[Any]:
        train = self.task.train
        for k in range(0, len(train), self.size):
            yield self.task.collate([train[i] for i in range(k, min(k + self.size, len(train)))])


def _learned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learning changes; of parameters that share elements only the first."""
    tied = tied_names(model)
    return {n: p for n, p in model.named_parameters() if p.requires_grad and tied[n] == n}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers())


def _write(weights: dict[str, nn.Parameter], grafts: Sequence[Graft]) -> None:
    for name in {n for graft in grafts for n in graft.indices}:
        _put(weights[name], name, grafts)


def _put(t: Tensor, name: str, grafts: Sequence[Graft]) -> Tensor:
    """Write some grafts' values into one tensor."""
    for graft in grafts:
        if graft.values is not None and name in graft.indices:
            at, values = graft.indices[name], graft.values[name]
            inplace.put(t, at.to(t.device, torch.long), values.to(t.device))
    return t
