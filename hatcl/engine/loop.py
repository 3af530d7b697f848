"""The loop over batches, steps and epochs. It knows no method: a `Work` defines what is learned, and how."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..calls import device_of
from ..errors import ConfigError, NonFiniteLossError
from .options import LoopOptions
from .schedule import Schedule, make_optimizer
from .state import Standing, kept_whole, length_of, load_optimizer, random_state, seed_all, set_random_state

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Progress:
    """The progress of learning, reported after each step, epoch, measurement and stage of any procedure.

    Attributes:
        doing: `learning` (a step is done), `epoch` (an epoch is over), `scoring` (something was measured) or `stage`
            (a stage is done; `value` is its score).
        task: the task's name. stage: the number of the stage, if there are several; -1 before the first. step, steps:
        this stage's steps, done and in all; None if their number is not known. epoch: epochs done.
        value: the step's loss, the epoch's mean loss, or the score. measured: further values, by name; for a step the
            rate `lr`, `gradient_norm` (before clipping) and the procedure's own values.
    """

    doing: str
    task: str
    step: int
    steps: int | None
    value: float
    epoch: int = 0
    stage: int = 0
    measured: Mapping[str, float] = field(default_factory=dict)


Tell = Callable[[Progress], None]


class Work:
    """The protocol between a loop and a procedure: a procedure overrides the parts that it does differently.

    Attributes:
        kind: the procedure's name, which its checkpoints carry. promise: a sentence for error texts that names what an
        error leaves unchanged.
        name: the task's name. model: the model that is trained. parameters: the parameters that learn.
        seed: seeds the global generators before the first step; None leaves that to the caller. generators: further
            generators that batches draw from; they are kept in checkpoints.
        stage: the number of this work, if there are several.
    """

    kind: ClassVar[str] = "hatcl"
    promise: ClassVar[str] = ""
    stage: int = 0

    def __init__(
        self, name: str, model: nn.Module, parameters: Iterable[nn.Parameter], seed: int | None = None
    ) -> None:
        self.name, self.model, self.parameters, self.seed = name, model, list(parameters), seed
        self.generators: list[torch.Generator] = []

    @property
    def title(self) -> str:
        """The name that errors use."""
        return f"task {self.name}"

    def trained(self, options: LoopOptions) -> Any:
        """Parameters or groups for the optimizer, see `make_optimizer`."""
        return self.parameters

    def epoch_length(self) -> int | None:
        """The number of batches in every epoch; None if it is unknown or varies."""
        return None

    def batches(self, epoch: int) -> Iterable[Any]:
        """The batches of epoch 0, 1, ... To resume in the middle of an epoch, the loop requests the epoch's batches
        again, with the generators as they were at its start, and skips those already used."""
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        """The mean loss of a batch, with its graph."""
        raise NotImplementedError

    def size(self, batch: Any) -> float:
        """The weight of a batch among those accumulated into one step."""
        return 1.0

    def penalty(self) -> Tensor | None:
        """A term that each step adds to its loss once, regardless of the number of its batches."""
        return None

    def said_of(self, batch: Any) -> str:
        """The words that an error uses for a batch."""
        return "the inputs"

    def set_mode(self) -> None:
        """Put the model into the mode for learning; called before the first step."""

    def begin(self) -> None:
        """Called before the first step, unless the course is resumed."""

    def after_step(self, loop: Loop, batches: list[Any]) -> Mapping[str, float]:
        """Called after the optimizer's step. Returns values for `Progress.measured`."""
        return {}

    def after_epoch(self, loop: Loop, loss: float) -> Mapping[str, float]:
        """Called after an epoch, with its mean loss. Returns values for `Progress.measured`."""
        return {}

    def state(self) -> dict[str, Any]:
        """The work's own part of a checkpoint: tensors and plain values."""
        return {}

    def load_state(self, state: Mapping[str, Any], where: object) -> None:
        """Continue from this work's part of a checkpoint.

        Raises:
            ConfigError: the checkpoint was written with other options. IntegrityError: it does not fit.
        """


class Loop:
    """One course of learning.

    It offers every optimizer of timm and torch, schedules, mixed precision with a gradient scaler, accumulation,
    clipping, `torch.compile`, and an error for losses and gradients that are not finite. An interrupted and resumed
    course ends with the same bits as an uninterrupted one, since checkpoints hold the states of all generators.

    Args:
        optimizer, scaler: taken from an earlier course to keep their state; None makes new ones.
        standing: the checkpoint. If it exists, it is read at once, so that `step` is known.
        tell: called after each step and each epoch.

    Attributes:
        step, steps: steps done and in all (None if only epochs are known). epoch: epochs done. rate: the last learning
            rate.

    Raises:
        ConfigError: the optimizer cannot be made, or the checkpoint has other options. IntegrityError: the checkpoint
            is damaged.
    """

    def __init__(
        self,
        work: Work,
        options: LoopOptions,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
        standing: Standing | None = None,
        tell: Tell | None = None,
    ) -> None:
        self.work, self.options, self.standing = work, options, standing
        self.tell: Tell = tell or (lambda progress: None)
        self.device = work.parameters[0].device if work.parameters else device_of(work.model)
        self.optimizer = make_optimizer(work.trained(options), options) if optimizer is None else optimizer
        rates = [float(group.setdefault("initial_lr", group["lr"])) for group in self.optimizer.param_groups]
        self.schedule = Schedule(self.optimizer, options, rates)
        self.scaler = scaler or torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        length = work.epoch_length()
        self.steps = options.max_steps if length is None else options.steps_of(length)
        if self.steps is None and options.epochs is None:
            raise ConfigError(f"{work.title}: give epochs or max_steps; nothing says when to end")
        self.step = self.epoch = self.taken = 0
        self.rate = max(rates)
        self.losses: list[float] = []
        self._epoch_began: dict[str, Any] = {}
        self._now: dict[str, Any] | None = None
        self._compiled = torch.compile(work.model._call_impl) if options.compile else None
        saved = None if standing is None else standing.read(work.kind)
        if standing is not None and saved is not None:
            self._take_up(saved, standing.file)

    @property
    def finished(self) -> bool:
        """Whether the course is at its end."""
        return self.step == self.steps if self.steps is not None else self.epoch == self.options.epochs

    def run(self) -> None:
        """Learn to the end.

        Raises:
            NonFiniteLossError: a loss or a gradient is not finite. ConfigError: there are no batches.
        """
        if self._now is None:
            if self.work.seed is not None:
                seed_all(self.work.seed)
            self.work.begin()
        self.work.set_mode()
        while not self.finished:
            self._epoch()

    # --- an epoch, a step ---

    def _epoch(self) -> None:
        batches = self._from_here()
        for group in iter(lambda: list(itertools.islice(batches, self.options.accumulate)), []):
            self._step(group)
            if self.step == self.steps:
                break
        if not self.losses:
            raise ConfigError(f"batches: none in epoch {self.epoch + 1}; expected at least one")
        mean = math.fsum(self.losses) / len(self.losses)
        self.epoch, self.taken = self.epoch + 1, 0
        measured = self.work.after_epoch(self, mean)
        self.losses = []
        if self.standing is not None and self.standing.epochs:
            self.keep()
        self.tell(self._progress("epoch", mean, measured))

    def _from_here(self) -> Iterator[Any]:
        """This epoch's batches, without those used before an interruption."""
        work, now = self.work, self._now
        if now is not None:
            set_random_state(self._epoch_began if self.taken else now, self.device, work.generators)
        self._epoch_began, self._now = random_state(self.device, work.generators), None
        given = work.batches(self.epoch)
        length = length_of(given)
        self._epoch_steps = None if length is None else max(1, -(-length // self.options.accumulate))
        batches = iter(given)
        if self.taken and now is not None:
            for _ in itertools.islice(batches, self.taken):
                pass
            set_random_state(now, self.device, work.generators)
        return batches

    def _step(self, group: list[Any]) -> None:
        work, options = self.work, self.options
        self._set_rate()
        sizes = [work.size(batch) for batch in group]
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch, size in zip(group, sizes, strict=True):
            with self._autocast(), self._compiling():
                loss = work.loss(batch)
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32)) * (size / math.fsum(sizes))
            self._check(loss, "loss", batch)
            self.scaler.scale(loss).backward()
            total += float(loss.detach())
        extra = work.penalty()
        if extra is not None:
            self.scaler.scale(extra).backward()
            total += float(extra.detach())
        self.scaler.unscale_(self.optimizer)
        norm = self._norm()
        if options.amp != "fp16":  # the scaler skips a step whose scaled gradients overflow
            self._check(norm, "gradient", group[0])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step, self.taken = self.step + 1, self.taken + len(group)
        self.losses.append(total)
        measured = {"lr": self.rate, "gradient_norm": float(norm), **work.after_step(self, group)}
        if self.standing is not None and self.step != self.steps and self.standing.due():
            self.keep()
        self.tell(self._progress("learning", total, measured))

    def _set_rate(self) -> None:
        if self.steps is not None:
            self.rate = self.schedule.set(self.step, self.steps)
        else:
            part = 1.0 if self._epoch_steps is None else 1 / self._epoch_steps
            done = 0.0 if self._epoch_steps is None else min(len(self.losses) / self._epoch_steps, 1.0)
            self.rate = self.schedule.set(self.epoch + done, self.options.epochs or 1, part)

    def _norm(self) -> Tensor:
        trained = [p for p in self.work.parameters if p.grad is not None]
        if self.options.clip:
            return nn.utils.clip_grad_norm_(trained, self.options.clip)
        return nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None and not p.grad.is_sparse])

    def _check(self, value: Tensor, what: str, batch: Any) -> None:
        if not math.isfinite(float(value.detach())):
            o, promise = self.options, f" {self.work.promise}." if self.work.promise else ""
            raise NonFiniteLossError(
                f"{self.work.title}: epoch {self.epoch + 1}, step {self.step + 1}: the {what} is "
                f"{float(value.detach())}.{promise} Lower lr ({o.rate:g}), set clip ({o.clip:g}), leave out amp "
                f"({o.amp}), or look for NaN in {self.work.said_of(batch)}"
            )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        amp = self.options.amp
        return contextlib.nullcontext() if amp == "none" else torch.autocast(self.device.type, PRECISIONS[amp])

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """Inside the block, calls of the model run compiled. The module object stays the same; evaluation is not
        compiled."""
        model = self.work.model
        if self._compiled is None:
            yield
            return
        before, model._compiled_call_impl = model._compiled_call_impl, self._compiled
        try:
            yield
        finally:
            model._compiled_call_impl = before

    def _progress(self, doing: str, value: float, measured: Mapping[str, float]) -> Progress:
        work = self.work
        return Progress(doing, work.name, self.step, self.steps, value, self.epoch, work.stage, measured)

    # --- checkpoints ---

    def keep(self) -> None:
        """Write a checkpoint."""
        if self.standing is not None:
            self.standing.write(self.work.kind, self.state())

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint: tensors and plain values."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "taken": self.taken,
            "losses": list(self.losses),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch_began": self._epoch_began,
            "random": random_state(self.device, self.work.generators),
            "work": self.work.state(),
        }

    def _take_up(self, saved: Mapping[str, Any], where: object) -> None:
        with kept_whole(where):
            self.work.load_state(saved["work"], where)
            self.step, self.epoch, self.taken = (int(saved[name]) for name in ("step", "epoch", "taken"))
            self.losses = [float(loss) for loss in saved["losses"]]
            self._epoch_began, self._now = saved["epoch_began"], saved["random"]
            for state in (*([self._epoch_began] if self.taken else []), self._now):
                set_random_state(state, self.device, self.work.generators)
            if dict(saved["scaler"]):  # empty if no scaler was used
                self.scaler.load_state_dict(saved["scaler"])
            load_optimizer(self.optimizer, saved["optimizer"], where)
