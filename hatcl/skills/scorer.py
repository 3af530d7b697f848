"""Score how much a task needs each element of an adapter, while it is learned (Feng et al. 2024, arXiv 2408.05200)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..config import number, one_of
from ..errors import ConfigError, SkillError
from ..functional import local
from ..map.grains import make_grain
from ..shards import gathered_part, part_of
from .scores import SKILL_GRAINS, SkillScores
from .steps import at_steps
from .tensors import adapters_of, skill_tensors

IMPORTANCE = ("mixed", "first", "second")
TIMINGS = ("before", "after")
AT_ONCE = 1 << 22  # elements processed at once while a step is scored (16 MiB), however large the model
OPTION_NAMES = ("grain", "importance", "beta1", "beta2")


class SkillScorer:
    """Smoothed sensitivity times its uncertainty, per element, over the steps of one task. With w an element and g its
    gradient at a step,

        s = |w g|  (first),  (w g)^2  (second),  |w g - (w g)^2 / 2|  (mixed)
        I <- beta1 I + (1 - beta1) s,    U <- beta2 U + (1 - beta2) |s - I|,    score = I * U

    starting from I = U = 0, with the new I in U's line, as in TaSL's code, which follows AdaLoRA (Zhang et al. 2023,
    arXiv 2303.10512). That code leaves out the first and the last step of a run; here every step counts, so that a
    resumed run is the same run. A group's score is the mean over its tensor; for a LoRA pair `mean(score_B[:, r]) *
    mean(score_A[r, :])`, which is the mean of their outer product without its d x d matrix.

        scorer = SkillScorer(peft_model)
        with scorer.watch(optimizer):
            ...                           # any loop, any Trainer
        scores = scorer.scores()

    It keeps I and U in float32, two floats per element, on the parameters' device. Use one scorer per task.

    Args:
        model: has a LoRA adapter; otherwise its trainable parameters are scored. adapter: its name; default: the active
        one.
        grain: the scores' grain: `lora_pair`, `matrix` (tensors of two or more dimensions) or `block` (every tensor).
        importance: the form of s. beta1, beta2: the shares of I and U that are kept at each step.

    Raises:
        ConfigError: an option is outside its range, or the grain finds nothing to group. SkillError: the adapter does
            not exist, or nothing is trainable.

    For a sharded model (`fully_shard`), `scores()`, `element_scores()` and `state_dict()` gather tensors: all processes
    must call them together.
    """

    def __init__(
        self,
        model: nn.Module,
        grain: str = "lora_pair",
        *,
        adapter: str | None = None,
        importance: str = "mixed",
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        one_of("grain", grain, SKILL_GRAINS)
        one_of("importance", importance, IMPORTANCE)
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            number(name, beta, 0, 1, without="both")
        tensors = skill_tensors(model, adapter)
        if grain == "lora_pair" and not adapters_of(model):
            raise ConfigError(
                f"grain: got lora_pair, but {type(model).__name__} has no LoRA adapter; score fully trained "
                "parameters with grain='matrix' or 'block'"
            )
        self._grain = make_grain(grain, {n: p.shape for n, p in tensors.items()})
        self.grain, self.importance, self.beta1, self.beta2 = grain, importance, beta1, beta2
        self.steps = 0
        self._params = {n: tensors[n] for n in self._grain.shapes}
        self._smooth, self._uncertain = (
            {n: torch.zeros(local(p).shape, device=p.device) for n, p in self._params.items()} for _ in range(2)
        )

    # ---- while learning ---------------------------------------------------------------------------------------------

    def update(self) -> None:
        """Score one step from the current parameters and gradients: call it when the gradients are complete and
        clipped, before the optimizer's step (old weights) or after it (new weights), and before they are zeroed. A
        tensor without a gradient has s = 0 at this step.

        Raises:
            SkillError: no tensor has a gradient.
        """
        self._update(None)

    def watch(self, optimizer: torch.optim.Optimizer, timing: str = "before") -> RemovableHandle:
        """Call `update` at every step of an optimizer, with a hook, so that it works in any loop. Steps that a
        GradScaler skips do not count; gradients are unscaled first.

        Args:
            timing: `before` the step, with the old weights (those at which g was taken), or `after` it, with the new.

        Returns:
            a handle: `.remove()`, or a context manager that removes at its end.

        Raises:
            ConfigError: the timing is unknown. SkillError: the optimizer has none of the tensors.
        """
        one_of("timing", timing, TIMINGS)
        scored = list(self._params.values())
        what = f"that are scored (first {next(iter(self._params))})"
        return at_steps(optimizer, scored, what, self._update, before=timing == "before")

    @torch.no_grad()
    def _update(self, scale: Tensor | None) -> None:
        if all(p.grad is None for p in self._params.values()):
            raise SkillError(
                f"none of the {len(self._params)} tensors has a gradient (first {next(iter(self._params))}); score "
                "after backward() and before zero_grad(), and train this adapter"
            )
        self._follow()
        for names in self._portions():
            weights = [_float32(self._params[n]) for n in names]
            gradients = [_gradient(self._params[n]) for n in names]
            smooth, uncertain = [self._smooth[n] for n in names], [self._uncertain[n] for n in names]
            s = torch._foreach_mul(weights, gradients)
            if scale is not None:
                torch._foreach_div_(s, float(scale))
            if self.importance == "second":
                torch._foreach_mul_(s, s)
            elif self.importance == "mixed":
                torch._foreach_addcmul_(s, s, s, value=-0.5)
            torch._foreach_abs_(s)
            torch._foreach_lerp_(smooth, s, 1 - self.beta1)
            torch._foreach_sub_(s, smooth)
            torch._foreach_abs_(s)
            torch._foreach_lerp_(uncertain, s, 1 - self.beta2)
        self.steps += 1

    def _follow(self) -> None:
        """Move I and U to where the parameters are, if the model was moved."""
        for name, p in self._params.items():
            if self._smooth[name].device != p.device:
                self._smooth[name] = self._smooth[name].to(p.device)
                self._uncertain[name] = self._uncertain[name].to(p.device)

    def _portions(self) -> Iterator[list[str]]:
        """Names of tensors that are processed at once: on one device and few enough."""
        portion: list[str] = []
        size, where = 0, None
        for name, p in self._params.items():
            if portion and (size + p.numel() > AT_ONCE or p.device != where):
                yield portion
                portion, size = [], 0
            portion.append(name)
            size, where = size + p.numel(), p.device
        yield portion

    # ---- results ---------------------------------------------------------------------------------------------

    def scores(self) -> SkillScores:
        """The score of each group.

        Raises:
            SkillError: nothing was scored yet, all scores are 0, or one, whose label the text has, is not finite.
        """
        self._scored()
        values = torch.ones(self._grain.size, dtype=torch.float64)
        for name in self._grain.shapes:
            # mean over the elements of a group: all of a tensor, or all dimensions but the rank; a pair gets two means
            groups = self._grain.index[name]()
            scored = self._element(name)
            over = [d for d in range(scored.dim()) if groups.dim() == 0 or groups.shape[d] == 1]
            values[groups.flatten()] *= (scored.mean(over) if over else scored).flatten()
        if not bool(values.any()):
            raise SkillError(
                f"all {len(values)} scores are 0 after {self.steps} steps: no group had weights and gradients that are "
                "not 0. Are all labels masked (-100), or was only the first step of a new adapter scored?"
            )
        return SkillScores(self.grain, self._grain.shapes, values)

    def element_scores(self) -> dict[str, Tensor]:
        """`I * U` of every element, by the tensors' names, float64 on the CPU.

        Raises:
            SkillError: nothing was scored yet.
        """
        self._scored()
        return {n: self._element(n) for n in self._params}

    def _element(self, name: str) -> Tensor:
        smooth, uncertain = self._whole(self._smooth, name), self._whole(self._uncertain, name)
        return smooth.cpu().double() * uncertain.cpu().double()

    def _whole(self, kept: Mapping[str, Tensor], name: str) -> Tensor:
        """The whole of a kept tensor; for a sharded model (`fully_shard`) each process keeps only its part."""
        return gathered_part(kept[name], self._params[name])

    def _scored(self) -> None:
        if not self.steps:
            raise SkillError("no step was scored yet; call update() at each step, or watch(optimizer), while learning")

    # ---- resuming ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that a resumed run needs: the options, `steps`, and I and U by the tensors' names."""
        return {
            **{option: getattr(self, option) for option in OPTION_NAMES},
            "steps": self.steps,
            "I": {n: self._whole(self._smooth, n).clone() for n in self._smooth},
            "U": {n: self._whole(self._uncertain, n).clone() for n in self._uncertain},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`.

        Raises:
            SkillError: the state has other options or tensors, which the text names; the scorer is then as it was.
        """
        lacking = next((key for key in (*OPTION_NAMES, "steps", "I", "U") if key not in state), None)
        if lacking is not None:
            raise SkillError(f"the state lacks {lacking!r}, expected the result of SkillScorer.state_dict()")
        for option in OPTION_NAMES:
            if state[option] != getattr(self, option):
                raise SkillError(
                    f"the state has {option}={state[option]!r}, this scorer {getattr(self, option)!r}; make it with "
                    "the state's options"
                )
        for part in ("I", "U"):
            for name in dict.fromkeys([*self._params, *state[part]]):
                ours = list(self._params[name].shape) if name in self._params else "lacking"
                theirs = list(state[part][name].shape) if name in state[part] else "lacking"
                if ours != theirs:
                    raise SkillError(
                        f"{name} is {theirs} in the state, {ours} in this model; resume with the adapter that it was "
                        "scored with"
                    )
        for part, held in (("I", self._smooth), ("U", self._uncertain)):
            for name, t in held.items():
                t.copy_(part_of(state[part][name].to(t.device), self._params[name]))
        self.steps = int(state["steps"])

    def floats(self) -> float:
        """Its memory, in float32 numbers per scored element."""
        kept = [*self._smooth.values(), *self._uncertain.values()]
        size = sum(t.untyped_storage().nbytes() for t in kept) / torch.float32.itemsize
        return size / sum(math.prod(s) for s in self._grain.shapes.values())


def _float32(t: Tensor) -> Tensor:
    """In float32, where products of half-precision numbers do not vanish."""
    return local(t.detach()).to(torch.float32)


def _gradient(p: nn.Parameter) -> Tensor:
    if p.grad is None:
        return torch.zeros_like(local(p), dtype=torch.float32)
    return _float32(p.grad.to_dense() if p.grad.is_sparse else p.grad)
