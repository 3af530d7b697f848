"""How coefficients are learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import Changeable, number, one_of, whole
from ..errors import ConfigError

SCHEDULES = ("constant", "cosine")
AMP = ("none", "bf16", "fp16")


@dataclass(frozen=True)
class AtlasOptions(Changeable):
    """How `fit` learns coefficients with AdamW. The defaults are those published for addition (Zhang et al. 2024,
    arXiv 2407.02880, and its repository); each procedure says which of them it changes.

    Args:
        lr: learning rate. epochs: passes over the batches. weight_decay: decoupled, on the coefficients alone.
        clip: clip the gradient's norm to this, 0 = off.
        schedule: `constant`, or `cosine` from lr to 0 over all epochs, without warm-up.
        regulariser: weight of `mean_j ||lambda_:j||_p` (the paper's is 0.5), 0 = off. p: 1 or 2.
        seed: of the random generators (order of batches, dropout, partitions of the data) while learning.
        amp: autocast to `bf16` or `fp16` (with a gradient scaler) in steps; coefficients, vectors and the measuring of
            accuracy keep their own dtype.
        accumulate: so many batches make one step, weighted by their sizes.

    Raises:
        ConfigError: a value outside its range.
    """

    lr: float = 1e-3
    epochs: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: str = "constant"
    regulariser: float = 0.0
    p: int = 1
    seed: int = 0
    amp: str = "none"
    accumulate: int = 1

    def __post_init__(self) -> None:
        number("lr", self.lr, 0, without="low")
        for name in ("weight_decay", "clip", "regulariser"):
            number(name, getattr(self, name), 0)
        for name in ("epochs", "accumulate"):
            whole(name, getattr(self, name))
        if self.p not in (1, 2):
            raise ConfigError(f"p: got {self.p!r}, expected 1 or 2")
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("amp", self.amp, AMP)


Options = AtlasOptions | Mapping[str, Any] | None
