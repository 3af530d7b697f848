"""Negation: unlearn a task, keep the rest (Zhang et al. 2024, arXiv 2407.02880)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..calls import again, cross_entropy
from ..data.batches import Zipped
from ..engine.loop import Tell
from ..engine.measures import accuracy
from ..errors import ConfigError
from .addition import started
from .fitting import Fitted, Path_, Select, fit
from .linear import Composed
from .options import AtlasOptions, Options
from .searching import SCALES
from .tasks import AtlasTask

NEGATION = AtlasOptions(lr=5e-3, epochs=10)


def negate(
    composer: Composed,
    target: AtlasTask,
    control: AtlasTask,
    *,
    keep: float = 0.95,
    options: Options = None,
    warm_start: Tensor | str | None = None,
    checkpoint: Path_ | None = None,
    on_progress: Tell | None = None,
) -> Fitted:
    """Minimise `-CE_target + CE_control` over the coefficients. Of the epochs (and the start) whose control accuracy on
    validation is at least `keep` times the pretrained model's, the one with the lowest target accuracy is kept; if none
    is better, the pretrained model (all coefficients zero).

    As published: AdamW, weight decay 0.1, clip 1. The paper's repository tunes epochs (2 to 20) and lr (2e-3 to 1e-2)
    for each data set; the defaults here, 10 and 5e-3, are their middle. It also stops at the first epoch that breaks
    the constraint; here later epochs may satisfy it again.

    Args:
        target: the task to unlearn. An epoch is one pass over its batches. control: the task to keep; its batches start
        again when they run out.
        keep: the share of the pretrained control accuracy that must remain.
        options: `AtlasOptions`, or a mapping of the options to change.
        warm_start: coefficients, or `search` to start from the best shared scale of 0, -0.05, ..., -1.
        checkpoint, on_progress: see `fit`.

    Returns:
        The result, which measures `target` and `control` (accuracies), and `score`: minus the target's, or -inf.

    Raises:
        ConfigError: the share is outside 0 to 1, or `warm_start` is unknown. VectorError, NonFiniteLossError: see
            `fit`.
    """
    select = lowest_target(composer, target, control, keep)
    zipped = Zipped([again(t.batches, f"task {t.name}") for t in (target, control)], follow_first=True)

    def loss(parts: Any) -> Tensor:
        of_target, of_control = parts
        up = cross_entropy(composer, of_target, target.head)
        return cross_entropy(composer, of_control, control.head) - up

    return fit(
        composer,
        loss,
        zipped,
        select=select,
        options=NEGATION.changed(options),
        warm_start=started(composer, select, warm_start, [-s for s in SCALES]),
        checkpoint=checkpoint,
        on_progress=on_progress,
    )


def lowest_target(composer: Composed, target: AtlasTask, control: AtlasTask, keep: float) -> Select:
    """A function that measures a composer by the rule of `negate`. The pretrained control accuracy is measured at once.

    Raises:
        ConfigError: the share is outside 0 to 1."""
    if not 0 <= keep <= 1:
        raise ConfigError(f"keep: got {keep!r}, expected a share of the control accuracy between 0 and 1")
    for t in (target, control):
        again(t.chosen_by, f"task {t.name}, validation")
    before = composer.coefficients.detach().clone()
    composer.coefficients.data.zero_()
    try:
        floor = keep * accuracy(composer, control.chosen_by, control.head)
    finally:
        composer.coefficients.data.copy_(before)

    def select() -> dict[str, float]:
        of_target = accuracy(composer, target.chosen_by, target.head)
        of_control = accuracy(composer, control.chosen_by, control.head)
        return {
            "target": of_target,
            "control": of_control,
            "score": -of_target if of_control >= floor else -math.inf,
        }

    return select
