"""How coefficients are learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import number, without_effect
from ..engine.options import LoopOptions
from ..errors import ConfigError


@dataclass(frozen=True)
class AtlasOptions(LoopOptions):
    """How `fit` learns coefficients. The defaults are those published for addition (Zhang et al. 2024, arXiv
    2407.02880, and its repository); each procedure documents its changes to them.

    Weight decay applies only to the coefficients. Under `amp`, coefficients, vectors and measurements of accuracy keep
    their own dtype.

    Args:
        regulariser: weight of `mean_j ||lambda_:j||_p` (the paper's is 0.5), 0 = off. p: the regulariser's norm, 1 or
            2.

    Raises:
        ConfigError: a value is outside its range, see also `LoopOptions`.
    """

    weight_decay: float = 0.1
    epochs: int = 20
    clip: float = 1.0
    regulariser: float = 0.0
    p: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        number("regulariser", self.regulariser, 0)
        if self.p not in (1, 2):
            raise ConfigError(f"p: got {self.p!r}, expected 1 or 2")
        if not self.regulariser:
            without_effect(self, ("p",), "regulariser=0", "give regulariser (the paper's is 0.5)")


Options = AtlasOptions | Mapping[str, Any] | None
