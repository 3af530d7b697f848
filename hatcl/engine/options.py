"""How a loop learns: one frozen, JSON-able dataclass, from which every procedure's options derive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..config import Changeable, flag, number, one_of, whole
from ..errors import ConfigError, nearest
from ..functional import RATES

AMP = ("none", "bf16", "fp16")
RATE_SCHEDULES = (*RATES, "tanh", "step", "poly")
COMMON = ("adamw", "sgd")  # known without importing timm, which is slow


@dataclass(frozen=True)
class LoopOptions(Changeable):
    """How a loop learns. Every field is checked when the options are made.

    Args:
        optimizer: one of `timm.optim.list_optimizers()`, which has all of torch's. lr: the highest learning rate.
        momentum: for optimizers that have one. None = timm's own default: 0.9, with Nesterov momentum for `sgd`; a
        number makes `sgd` torch's, without Nesterov momentum.
        weight_decay: as the optimizer defines it (decoupled for `adamw`).
        max_steps: the number of optimizer steps, however many passes they take; None = the steps of `epochs`.
            epochs: passes over the examples.
        schedule: after the warm-up `constant`, or `linear` or `cosine` down to 0 at the last step, or timm's `tanh`,
            `step` or `poly`. warmup: the share of the steps in which the rate rises linearly from 0.
        accumulate: the number of batches per step; they are weighted by their sizes.
        clip: clip the gradient's norm to this, 0 = off.
        amp: autocast losses to `bf16` or `fp16` (with a gradient scaler), or `none`.
        compile: run the model's training steps through `torch.compile`.
        seed: seeds everything random while learning: order, dropout, augmentation.

    Raises:
        ConfigError: a value is outside its range; for names the text has the nearest one.
    """

    optimizer: str = "adamw"
    lr: float | None = 1e-3
    momentum: float | None = None
    weight_decay: float = 0.0
    max_steps: int | None = None
    epochs: int | None = None
    schedule: str = "constant"
    warmup: float = 0.0
    accumulate: int = 1
    clip: float = 0.0
    amp: str = "none"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _known_optimizer(self.optimizer)
        for name in ("momentum", "warmup"):
            if name != "momentum" or self.momentum is not None:
                number(name, getattr(self, name), 0, 1, without="high", what="a share")
        for name in ("weight_decay", "clip"):
            number(name, getattr(self, name), 0)
        if self.momentum and not _takes_momentum(self.optimizer):
            raise ConfigError(
                f"momentum: got {self.momentum!r} for {self.optimizer}, which has none; leave it out, or take sgd"
            )
        if self.lr is not None or not self.rates():
            number("lr", self.lr, 0, without="low")
        elif self.optimizer not in self.rates():
            raise ConfigError(
                f"lr: got none, and optimizer={self.optimizer!r} has no default rate, unlike "
                f"{' and '.join(self.rates())}; give one (--lr)"
            )
        whole("max_steps", self.max_steps, optional=True)
        whole("epochs", self.epochs, optional=type(self).epochs is None)
        whole("accumulate", self.accumulate)
        whole("seed", self.seed, 0)
        one_of("schedule", self.schedule, self.schedules())
        one_of("amp", self.amp, AMP)
        flag("compile", self.compile)

    @classmethod
    def schedules(cls) -> tuple[str, ...]:
        """The names that `schedule` may have."""
        return RATE_SCHEDULES

    @classmethod
    def rates(cls) -> Mapping[str, float]:
        """optimizer -> its rate if `lr` is None."""
        return {}

    @property
    def rate(self) -> float:
        """The highest learning rate in use."""
        return self.rates()[self.optimizer] if self.lr is None else self.lr

    @property
    def course(self) -> str:
        """The schedule in use; a subclass may have a name that chooses one by other options."""
        return self.schedule

    def steps_of(self, batches: int) -> int | None:
        """The number of steps, given the number of batches per epoch; None if neither option is set."""
        if self.max_steps is not None or self.epochs is None:
            return self.max_steps
        return self.epochs * -(-batches // self.accumulate)


def _takes_momentum(name: str) -> bool:
    if name in COMMON:
        return name == "sgd"
    from timm.optim import get_optimizer_info

    return bool(get_optimizer_info(name.removeprefix("lookahead_")).has_momentum)


def _known_optimizer(name: str) -> None:
    if name in COMMON:
        return
    from timm.optim import list_optimizers

    known = list_optimizers()
    if not isinstance(name, str) or name.removeprefix("lookahead_") not in known:
        raise ConfigError(
            f"optimizer: got {name!r}, expected a name of timm.optim.list_optimizers(); did you mean "
            f"{nearest(name, known)!r}?"
        )
