"""Grafts in sequence: each task trains around the grafts of those before it, and leaves a graft of its own (after
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
    all grafts is put back to theta_pre, running statistics as well. A task is scored with the grafts up to its own:
    what that computes never changes again, bit for bit, so that backward transfer is 0.

    Elements of earlier grafts are in no later one, so the grafts can be applied in any number. Their values, and those
    of theta_pre at their elements, are kept with a run; each task's folder has its own as `graft.safetensors`.
    """

    @dataclass(frozen=True)
    class Options:
        """Args:
        sparsity: share of what is trained that a task's graft has. by: how it is chosen, `magnitude` of the change,
            `random`, or `learned` with the task's examples and loss (on which its mask is chosen as well: accuracy on
            a small validation set would choose by chance).
        scored: a task's score is that with the grafts up to its `own`, or with `all` there are.
        only, skip: patterns of names that take part or do not; what takes no part is trained, and put back.
        learn: `GraftOptions` for `learned`, or a mapping of what to change. batch_size: examples per batch there.
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
        self.grafts: list[Graft] = []  # task by task, with the values that it learned
        self.under: list[Graft] = []  # the same elements with those of theta_pre
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
        # theta_pre, without the earlier grafts, is what this one can be applied to as well
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
    """What learning changes; of parameters that share their elements the one that stands first."""
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
