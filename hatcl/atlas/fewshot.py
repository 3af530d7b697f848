"""Few-shot learning: vectors of other tasks, a few examples of this one (Zhang et al. 2024)."""

from __future__ import annotations

from torch import Tensor, nn

from ..calls import Batches, Head, again, cross_entropy
from ..data.batches import Repeated
from ..engine.loop import Tell
from ..engine.measures import accuracy
from .fitting import Fitted, Path_, Select, fit
from .linear import Composed
from .options import AtlasOptions, Options

FEW_SHOT = AtlasOptions(lr=0.1, epochs=10, schedule="cosine")
STEPS = 10  # of an epoch, at least


def few_shot(
    composer: Composed,
    batches: Batches,
    validation: Batches | None = None,
    *,
    head: Head | None = None,
    options: Options = None,
    steps: int = STEPS,
    warm_start: Tensor | None = None,
    checkpoint: Path_ | None = None,
    on_progress: Tell | None = None,
) -> Fitted:
    """Minimise the cross-entropy on a few labelled examples over the coefficients of other tasks' vectors (leave the
    target's own vector out of the composer). The epoch with the best validation accuracy is kept.

    As published: AdamW, cosine from lr 0.1, weight decay 0.1, clip 1, 10 epochs (30 are better for ResNets, says its
    repository) of at least 10 steps. With a composer of grain `partition:K` and all examples this is
    parameter-efficient fine-tuning, which also works over LoRA vectors.

    Args:
        batches: (inputs, labels), with `sample_shots`. validation: batches that choose the epoch; None keeps the last
        epoch's. head: turns the model's output into logits; None = it is logits already. options: `AtlasOptions`, or a
        mapping of the options to change. steps: the least number per epoch; batches are repeated.
        warm_start, checkpoint, on_progress: see `fit`.

    Returns:
        The result, which measures `score`: the accuracy on validation.

    Raises:
        ConfigError, VectorError, NonFiniteLossError: see `fit`.
    """

    return fit(
        composer,
        lambda batch: cross_entropy(composer, batch, head),
        repeated(again(batches, "batches"), steps),
        select=by_accuracy(composer, validation, head),
        options=FEW_SHOT.changed(options),
        warm_start=warm_start,
        checkpoint=checkpoint,
        on_progress=on_progress,
    )


def by_accuracy(model: nn.Module, validation: Batches | None, head: Head | None = None) -> Select | None:
    """A function that measures a composer, or a model made from one, by its accuracy; None without batches."""
    if validation is None:
        return None
    data = again(validation, "validation")
    return lambda: {"score": accuracy(model, data, head)}


def repeated(batches: Batches, steps: int) -> Batches:
    """The batches, repeated so that there are at least `steps`; unchanged if they have no length."""
    try:
        return Repeated(batches, steps)
    except TypeError:
        return batches
