"""Coefficients that depend on the input: predicted from features by a linear map (Zhang et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calls import Batches, Head, again, moved, one_pass, outputs, split_batch
from ..config import one_of
from ..engine.loop import Tell
from ..errors import ConfigError
from .entropy import mean_entropy
from .fewshot import by_accuracy
from .fitting import Path_, fit
from .linear import Composed
from .options import AtlasOptions, Options

PREDICTION = AtlasOptions(lr=1e-4, epochs=1, schedule="cosine")
LEARNED_BY = ("cross_entropy", "entropy")


class Predicted(nn.Module):
    """A composition whose coefficients are `lambda = mean over the batch of (W f(x) + b)`, f the features. W and b
    start at zero, which is the pretrained model.

    Args:
        features: inputs -> `[B, d]`, such as the frozen pretrained encoder. width: d.
    """

    def __init__(self, composer: Composed, features: Callable[[Any], Tensor], width: int) -> None:
        super().__init__()
        t, g = composer.coefficients.shape
        self.composer, self.features = composer, features
        device = composer.coefficients.device
        self.weight = nn.Parameter(torch.zeros(t * g, width, device=device))
        self.bias = nn.Parameter(torch.zeros(t * g, device=device))

    @property
    def coefficients(self) -> nn.Parameter:
        """The composer's own, which this one does not use."""
        return self.composer.coefficients

    def predict(self, inputs: Any) -> Tensor:
        """The coefficients `[T, G]` for a batch."""
        with torch.no_grad():
            f = self.features(inputs).float()
        return F.linear(f, self.weight, self.bias).mean(0).view_as(self.composer.coefficients)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        lam = self.predict(kwargs or (args[0] if len(args) == 1 else args))
        return with_coefficients(self.composer, lam, args, kwargs)


def learn_predictor(
    composer: Composed,
    features: Callable[[Any], Tensor],
    batches: Batches,
    validation: Batches | None = None,
    *,
    head: Head | None = None,
    objective: str = "cross_entropy",
    options: Options = None,
    checkpoint: Path_ | None = None,
    on_progress: Tell | None = None,
) -> Predicted:
    """Learn the linear map of a `Predicted`, with cross-entropy if there are labels, or with the mean entropy.

    Defaults of the published code: AdamW, cosine from lr 1e-4, weight decay 0.1 on the coefficients (here there is
    nothing to decay, since the map is not decayed), clip 1, 1 epoch (it takes 1 to 6). It warms up over 500 steps; here
    there is no warm-up. Its coefficients are per vector; here they have any grain.

    Args:
        features: inputs -> `[B, d]`, from the pretrained model. batches: (inputs, labels), or inputs for `entropy`.
        validation: batches that choose the epoch; None keeps the last.

    Raises:
        ConfigError: the objective is unknown, or features have another shape.
    """
    one_of("objective", objective, LEARNED_BY)
    chosen = PREDICTION.changed(options)
    first = next(one_pass(again(batches, "batches"), "batches"))
    device = composer.coefficients.device
    with torch.no_grad():
        seen = features(moved(split_batch(first)[0], device))
    if seen.dim() != 2:
        raise ConfigError(f"features: gave shape {list(seen.shape)}, expected [batch, d]")
    model = Predicted(composer, features, seen.shape[1])

    def loss(batch: Any) -> Tensor:
        logits = outputs(model, split_batch(batch)[0], head)
        return mean_entropy(logits) if objective == "entropy" else F.cross_entropy(logits, batch[1].to(device))

    fit(
        composer,
        loss,
        batches,
        select=by_accuracy(model, validation, head),
        options=chosen,
        others={"weight": (model.weight, chosen.rate), "bias": (model.bias, chosen.rate)},
        checkpoint=checkpoint,
        on_progress=on_progress,
    )
    return model


def with_coefficients(composer: Composed, lam: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The composer's output with other coefficients, through which its gradient flows."""
    name = next(n for n, p in composer.named_parameters() if p is composer.coefficients)
    return torch.func.functional_call(composer, {name: lam}, args, kwargs)
