"""The loop that all procedures share: learn coefficients, measure after every epoch, keep the best."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor, nn

from ..calls import Batches, again, seeded
from ..engine.folder import check_same_run
from ..engine.loop import Loop, Tell, Work
from ..engine.options import LoopOptions
from ..engine.state import Standing, copies_of, generators_of, undone_on_error, write_all
from ..errors import ConfigError, VectorError
from ..lend import Evaluating
from .linear import Composed
from .options import AtlasOptions
from .regularisers import penalty

Select = Callable[[], Mapping[str, float]]
Path_ = Union[str, "os.PathLike[str]"]


@dataclass
class Fitted:
    """The result of learning. The composer already holds the coefficients.

    Attributes:
        coefficients: the best ones, `[T, G]`. others: other learned parameters, by name. epoch: the epoch after which
            they were reached; 0 = the start, -1 = all zero, the pretrained model. score: their score, which chose them;
            NaN if nothing was measured and the last ones are kept. pretrained, start: the measurements with all
            coefficients zero, and at the start. history: the measurements after each epoch, with its mean `loss`.
    """

    coefficients: Tensor
    others: dict[str, Tensor] = field(default_factory=dict)
    epoch: int = -1
    score: float = math.nan
    pretrained: dict[str, float] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def fit(
    composer: Composed,
    loss_of_step: Callable[[Any], Tensor],
    batches: Batches | Callable[[int], Batches],
    *,
    select: Select | None = None,
    options: AtlasOptions | None = None,
    warm_start: Tensor | None = None,
    others: Mapping[str, tuple[nn.Parameter, float]] | None = None,
    checkpoint: Path_ | None = None,
    seconds: float = 60.0,
    on_progress: Tell | None = None,
) -> Fitted:
    """Learn a composer's coefficients and leave the best in it.

    The model is in evaluation mode throughout: no dropout, batch norms with their running statistics. (The published
    release trains in training mode; its CLIP encoders have neither.)

    Args:
        loss_of_step: a batch -> its mean loss.
        batches: iterated once per epoch, or a function of the epoch that returns them. select: measures the composer in
        its current state; a higher `score` is better, `-inf` is never kept. It is called for the pretrained model (all
        coefficients zero), the start, and after every epoch, so that the result is at least as good as both. None keeps
        the last coefficients. warm_start: the start, `[T]`, `[T, 1]` or `[T, G]`; None = the current coefficients.
        others: parameters to learn besides the coefficients, with their learning rates; not decayed.
        checkpoint: a file, replaced atomically after every epoch, and within an epoch after some seconds. If it exists,
        learning resumes from it and ends with the same bits as without the interruption.
        on_progress: called after each step, and after each epoch with its entry of the history as `measured`.

    Raises:
        ConfigError: batches cannot be iterated again, or the checkpoint has other options. VectorError: the start has
            another shape or is not finite. IntegrityError: the checkpoint cannot be read. NonFiniteLossError: a loss or
            gradient is not finite. In all cases the composer is as it was before.
    """
    options = options or AtlasOptions()
    start = spread(composer, composer.coefficients.detach() if warm_start is None else warm_start)
    work = _Fitting(composer, loss_of_step, batches, select, options, start, dict(others or {}))
    standing = None if checkpoint is None else Standing(Path(checkpoint), seconds=seconds, epochs=True)
    grads = [p.grad for p in work.parameters]
    try:
        with (
            seeded(options.seed, composer.coefficients.device),
            undone_on_error(work.learned),
            Evaluating(composer),
        ):
            Loop(work, options, standing=standing, tell=on_progress).run()
            work.finish()
    finally:
        for p, grad in zip(work.parameters, grads, strict=True):
            p.grad = grad
    return work.fitted


def spread(composer: Composed, coefficients: Tensor) -> Tensor:
    """Coefficients per vector, `[T]` or `[T, 1]` (an isotropic composition's), as the composer's own `[T, G]`: the same
    model at a finer grain. Coefficients of its own shape are copied.

    Raises:
        VectorError: they have another shape, or numbers that are not finite.
    """
    t, g = composer.coefficients.shape
    c = coefficients.detach().to(composer.coefficients)
    if c.shape == (t,):
        c = c[:, None]
    if c.shape not in ((t, 1), (t, g)):
        raise VectorError(
            f"coefficients of shape {list(coefficients.shape)}; expected {[t, g]} ({t} vectors, {g} groups of the "
            f"grain {composer.grain.name}), or one per vector, {[t]}. Use refine() for another grain's"
        )
    if not bool(torch.isfinite(c).all()):
        raise VectorError(f"coefficients: {int((~torch.isfinite(c)).sum())} of {c.numel()} are NaN or infinite")
    return c.expand(t, g).clone()


class _Fitting(Work):
    """One call of `fit` as a loop's work."""

    kind = "hatcl.atlas"
    promise = "The coefficients are as they were before"

    def __init__(
        self,
        composer: Composed,
        loss_of_step: Callable[[Any], Tensor],
        batches: Batches | Callable[[int], Batches],
        select: Select | None,
        options: AtlasOptions,
        start: Tensor,
        others: dict[str, tuple[nn.Parameter, float]],
    ) -> None:
        self.others = {name: p for name, (p, _) in others.items()}
        super().__init__("fit", composer, [composer.coefficients, *self.others.values()], options.seed)
        self.composer, self.of_step, self.select, self.options = composer, loss_of_step, select, options
        self.given = batches if callable(batches) else again(batches, "batches")
        self.generators = [] if callable(batches) else generators_of(batches)
        self.start, self.rates = start, [lr for _, lr in others.values()]
        self.fitted = Fitted(composer.coefficients.detach().clone())

    @property
    def learned(self) -> dict[str, Tensor]:
        """The tensors that learn, by name."""
        return {"": self.composer.coefficients, **self.others}

    @property
    def title(self) -> str:
        return self.name

    def trained(self, options: LoopOptions) -> list[dict[str, Any]]:
        own = {"params": [self.composer.coefficients], "lr": options.rate, "weight_decay": options.weight_decay}
        pairs = zip(self.others.values(), self.rates, strict=True)
        return [own, *({"params": [p], "lr": lr, "weight_decay": 0.0} for p, lr in pairs)]

    def batches(self, epoch: int) -> Batches:
        return self.given(epoch) if callable(self.given) else self.given

    def loss(self, batch: Any) -> Tensor:
        return self.of_step(batch)

    def size(self, batch: Any) -> float:
        return float(_examples(batch))

    def penalty(self) -> Tensor | None:
        o = self.options
        return penalty(self.composer.coefficients, o.p, o.regulariser) if o.regulariser else None

    # ---- what is learned ---------------------------------------------------------------------------------------

    def values(self) -> tuple[Tensor, dict[str, Tensor]]:
        return self.composer.coefficients.detach().clone(), copies_of(self.others)

    def put(self, coefficients: Tensor, others: Mapping[str, Tensor]) -> None:
        write_all({"": self.composer.coefficients}, {"": coefficients})
        write_all({name: self.others[name] for name in others}, others)

    def begin(self) -> None:
        if self.select is not None:
            self.put(torch.zeros_like(self.start), {})
            self.fitted.pretrained = self.score(self.select, -1)
        self.put(self.start, {})
        if self.select is not None:
            measured = self.score(self.select, 0) if bool(self.start.any()) else dict(self.fitted.pretrained)
            self.fitted.start = measured

    def after_epoch(self, loop: Loop, loss: float) -> dict[str, float]:
        self.fitted.history.append({"epoch": float(loop.epoch), "loss": loss})
        if self.select is not None:
            self.fitted.history[-1] |= self.score(self.select, loop.epoch)
        else:
            self.keep(loop.epoch, math.nan)
        return self.fitted.history[-1]

    def score(self, select: Select, epoch: int) -> dict[str, float]:
        said = {k: float(v) for k, v in select().items()}
        if "score" not in said or math.isnan(said["score"]):
            raise ConfigError(f"select: gave {said}, expected a mapping with a number called score")
        if said["score"] > (-math.inf if math.isnan(self.fitted.score) else self.fitted.score):
            self.keep(epoch, said["score"])
        return said

    def keep(self, epoch: int, score: float) -> None:
        self.fitted.coefficients, self.fitted.others = self.values()
        self.fitted.epoch, self.fitted.score = epoch, score

    def finish(self) -> None:
        if self.fitted.epoch == -1 and math.isnan(self.fitted.score) and self.fitted.history:
            raise ConfigError(
                "select: gave -inf for every coefficients tried, the pretrained model's included; nothing can be kept"
            )
        self.put(self.fitted.coefficients, self.fitted.others)

    # ---- the checkpoint ----------------------------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        """The values in which a checkpoint must agree."""
        return {
            **dataclasses.asdict(self.options),
            "grain": self.composer.grain.name,
            "coefficients": list(self.composer.coefficients.shape),
            "others": sorted(self.others),
            "generators": len(self.generators),
        }

    def state(self) -> dict[str, Any]:
        coefficients, others = self.values()
        fitted = dataclasses.asdict(self.fitted)
        return {"of": self.described(), "coefficients": coefficients, "others": others, "fitted": fitted}

    def load_state(self, state: Mapping[str, Any], where: object) -> None:
        check_same_run(where, state["of"], self.described())
        self.put(state["coefficients"], state["others"])
        fitted, device = dict(state["fitted"]), self.composer.coefficients.device
        fitted["coefficients"] = fitted["coefficients"].to(device)
        fitted["others"] = {n: v.to(device) for n, v in fitted["others"].items()}
        self.fitted = Fitted(**fitted)


def _examples(batch: Any) -> int:
    """The number of examples in a batch of (inputs, labels); other batches count as one."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor) and batch[1].dim():
        return max(len(batch[1]), 1)
    return 1
