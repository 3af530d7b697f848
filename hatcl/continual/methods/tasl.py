"""TaSL: find the adapter's units that each task needs, and merge task after task by their scores (Feng et al. 2024,
arXiv 2408.05200)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config import flag, number, one_of
from ...skills.consolidation import ConsolidateOptions, consolidate
from ...skills.orthogonal import orthogonality
from ...skills.scorer import IMPORTANCE, TIMINGS, SkillScorer
from ...skills.scores import SKILL_GRAINS, SkillScores, accumulate_scores, two_weights
from ...skills.tensors import adapters_of, skill_tensors
from ..tasks import ContinualTask
from .registry import Batch, Method, continual_method

CUMULATIVE = "cumulative.safetensors"


@continual_method("tasl", paper="Feng et al. 2024, arXiv 2408.05200")
class TaSL(Method):
    """Train task k from the consolidated adapter of tasks 1 .. k-1, score the adapter's units at each step, consolidate
    the adapters before and after the task by both scores, and update the cumulative scores `C_k = N(0.3 N(I_k) + 0.7
    N(C_{k-1}))`. The first task is not consolidated. No example of an earlier task is needed.

    Parameters trained in addition to A and B (heads in `modules_to_save`, DoRA's magnitudes, biases) have no score:
    they are averaged like units that are important to neither task. (TaSL's code has no such parameters.)
    """

    lora = "with_head"

    @dataclass(frozen=True)
    class Options:
        """Args:
        grain, importance, beta1, beta2: see `SkillScorer`. timing: score with the weights `before` the optimizer's
            step, or `after` it.
        memory: the weights of the current and of the previous scores.
        orthogonality: weight of the orthogonality regulariser on A and B, 0 = off; it needs LoRA. squared: use squared
        norms in it. consolidate: `ConsolidateOptions`, or a mapping of the options to change.
        """

        grain: str = "lora_pair"
        importance: str = "mixed"
        beta1: float = 0.85
        beta2: float = 0.85
        timing: str = "before"
        memory: tuple[float, float] = (0.3, 0.7)
        orthogonality: float = 0.1
        squared: bool = False
        consolidate: ConsolidateOptions = field(default_factory=ConsolidateOptions)

        def __post_init__(self) -> None:
            for name, choices in (("grain", SKILL_GRAINS), ("importance", IMPORTANCE), ("timing", TIMINGS)):
                one_of(name, getattr(self, name), choices)
            for name in ("beta1", "beta2"):
                number(name, getattr(self, name), 0, 1, without="both")
            number("orthogonality", self.orthogonality, 0)
            flag("squared", self.squared)
            object.__setattr__(self, "memory", two_weights("memory", self.memory))
            object.__setattr__(self, "consolidate", ConsolidateOptions().changed(self.consolidate))

    def start(self, model: nn.Module, tasks: Sequence[ContinualTask], seed: int) -> None:
        self.previous: tuple[dict[str, Tensor], ...] | None = None
        self.current: SkillScores | None = None
        self.cumulative: SkillScores | None = None
        self.regularised = bool(self.options.orthogonality) and bool(adapters_of(model))
        self._scorer(model)  # raises if it does not fit

    def _scorer(self, model: nn.Module) -> SkillScorer:
        o = self.options
        return SkillScorer(model, o.grain, importance=o.importance, beta1=o.beta1, beta2=o.beta2)

    def begin(self, model: nn.Module, stage: int) -> None:
        self.scorer = self._scorer(model)
        self.previous = (
            tuple({n: p.detach().clone() for n, p in x.items()} for x in _scored_and_beside(model)) if stage else None
        )

    def watching(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int
    ) -> contextlib.AbstractContextManager[Any]:
        return self.scorer.watch(optimizer, self.options.timing)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = batch.loss(model)
        if self.regularised:
            loss = loss + self.options.orthogonality * orthogonality(model, squared=self.options.squared)
        return loss

    @torch.no_grad()
    def end(self, model: nn.Module, stage: int) -> None:
        self.current = self.scorer.scores()
        if self.previous is not None:
            how = self.options.consolidate
            (scored, beside), (factors, others) = _scored_and_beside(model), self.previous
            merged = consolidate(factors, dict(scored), self.cumulative, self.current, how)
            if beside:
                merged |= consolidate(others, dict(beside), None, None, {"mode": "coarse", "coarse": how.unscored})
            for name, p in {**scored, **beside}.items():
                p.copy_(merged[name])
        self.cumulative = accumulate_scores(self.current, self.cumulative, self.options.memory)

    def scores(self) -> dict[str, SkillScores]:
        found = {"scores": self.current, "cumulative": self.cumulative}
        return {name: scores for name, scores in found.items() if scores is not None}

    def state(self) -> dict[str, Any]:
        return {"scorer": self.scorer.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.scorer.load_state_dict(state["scorer"])

    def save(self, folder: Path) -> None:
        if self.cumulative is not None:
            self.cumulative.save(folder / CUMULATIVE)

    def load(self, folder: Path, model: nn.Module) -> None:
        path = folder / CUMULATIVE
        self.cumulative = SkillScores.load(path) if path.exists() else None


def _scored_and_beside(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The parameters with scores, and the other trained parameters."""
    scored = skill_tensors(model)
    known = {id(p) for p in scored.values()}
    return scored, {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in known}
