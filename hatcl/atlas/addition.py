"""Addition: one model for several tasks (Zhang et al. 2024, arXiv 2407.02880)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..calls import again, cross_entropy
from ..data.batches import Zipped
from ..engine.loop import Tell
from ..engine.measures import accuracy
from ..errors import ConfigError
from .fitting import Fitted, Path_, Select, fit
from .linear import Composed
from .measures import normalised
from .options import AtlasOptions, Options
from .searching import SCALES, search
from .tasks import AtlasTask

ADDITION = AtlasOptions()


def add(
    composer: Composed,
    tasks: Sequence[AtlasTask],
    *,
    options: Options = None,
    warm_start: Tensor | str | None = None,
    checkpoint: Path_ | None = None,
    on_progress: Tell | None = None,
) -> Fitted:
    """Minimise the sum of the tasks' cross-entropies over the coefficients; of all epochs, the start and the pretrained
    model, the one with the best mean normalised accuracy on the tasks' validation batches is kept.

        isotropic = hatcl.atlas.add(hatcl.compose(model, vectors, "global"), tasks, warm_start="search")
        fitted = hatcl.atlas.add(composer, tasks, warm_start=isotropic.coefficients)

    So pretrained <= search <= isotropic <= anisotropic holds on the validation batches.

    As published: AdamW, lr 1e-3, weight decay 0.1, clip 1, 20 epochs; the shortest task ends an epoch. The tasks'
    batches run one after another in a step, not concatenated, so that they may differ in shape.

    Args:
        tasks: each with its own head. Their `finetuned` accuracies may be left out if task i belongs to vector i: then
        that vector alone, at coefficient 1, is the fine-tuned model.
        options: `AtlasOptions`, or a mapping of the options to change.
        warm_start: coefficients (`[T]`, `[T, 1]` or `[T, G]`), or `search` to start from the best shared scale.
        checkpoint, on_progress: see `fit`.

    Returns:
        `history` and the rest hold `score`, and per task `<name>` (accuracy) and `<name>/normalised`.

    Raises:
        ConfigError: there are no tasks, names are equal, a fine-tuned accuracy is missing, or `warm_start` is unknown.
        VectorError, NonFiniteLossError: see `fit`.
    """
    chosen = ADDITION.changed(options)
    zipped = Zipped([again(t.batches, f"task {t.name}") for t in tasks])
    select = mean_normalised(composer, tasks)
    fitted = fit(
        composer,
        lambda parts: sum_of_losses(composer, tasks, parts),
        zipped,
        select=select,
        options=chosen,
        warm_start=started(composer, select, warm_start, SCALES),
        checkpoint=checkpoint,
        on_progress=on_progress,
    )
    return fitted


def mean_normalised(composer: Composed, tasks: Sequence[AtlasTask]) -> Select:
    """Measures a composer: the mean over tasks of accuracy / fine-tuned accuracy, on their validation batches.

    Raises:
        ConfigError: as for `add`.
    """
    names = [t.name for t in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ConfigError(f"tasks: got {names}, expected at least one, each with its own name")
    for t in tasks:
        again(t.chosen_by, f"task {t.name}, validation")
    finetuned = [t.finetuned for t in tasks]
    if None in finetuned and len(tasks) != len(composer.coefficients):
        raise ConfigError(
            f"task {names[finetuned.index(None)]}: no fine-tuned accuracy, and {len(tasks)} tasks are not the "
            f"{len(composer.coefficients)} vectors' own; pass finetuned="
        )
    full = [_alone(composer, i, t) if t.finetuned is None else t.finetuned for i, t in enumerate(tasks)]
    for t, x in zip(tasks, full, strict=True):
        if not x > 0:
            raise ConfigError(f"task {t.name}: fine-tuned accuracy is {x}, expected one above 0")

    def select() -> dict[str, float]:
        out: dict[str, float] = {}
        for t, x in zip(tasks, full, strict=True):
            out[t.name] = accuracy(composer, t.chosen_by, t.head)
            out[f"{t.name}/normalised"] = normalised(out[t.name], x)
        out["score"] = sum(out[f"{n}/normalised"] for n in names) / len(names)
        return out

    return select


def sum_of_losses(composer: Composed, tasks: Sequence[AtlasTask], parts: Sequence[Any]) -> Tensor:
    """`sum_t CE_t` of one batch of each task."""
    losses = [cross_entropy(composer, batch, t.head) for t, batch in zip(tasks, parts, strict=True)]
    return torch.stack(losses).sum()


def started(
    composer: Composed, select: Select, warm_start: Tensor | str | None, scales: Sequence[float]
) -> Tensor | None:
    """The coefficients for `warm_start`. The composer keeps its own."""
    if not isinstance(warm_start, str):
        return warm_start
    if warm_start != "search":
        raise ConfigError(f"warm_start: got {warm_start!r}, expected coefficients, None or 'search'")
    before = composer.coefficients.detach().clone()
    found = search(composer, select, scales).coefficients
    composer.coefficients.data.copy_(before)
    return found


@torch.no_grad()
def _alone(composer: Composed, i: int, task: AtlasTask) -> float:
    """The accuracy with vector i alone, at coefficient 1: the fine-tuned model's."""
    before = composer.coefficients.detach().clone()
    try:
        composer.coefficients.zero_()
        composer.coefficients[i] = 1
        return accuracy(composer, task.chosen_by, task.head)
    finally:
        composer.coefficients.copy_(before)
