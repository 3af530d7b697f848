"""The loop over tasks: learn one after another, seal, test, and show at the end that no sealed task moved by a bit."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data.images import Preparation, Task, num_batches, test_batches, train_batches
from ..engine import folder as checkpoints
from ..engine import measures as metrics
from ..engine.schedule import make_optimizer, make_scheduler
from ..errors import ConfigError, IntegrityError, NonFiniteLossError
from ..hat.certify import certify
from ..hat.describe import describe
from ..hat.learn import learn
from ..hat.tasks import set_task
from ..hat.tasks import task as active_task

log = logging.getLogger(__name__)

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How `train` learns each task.

    Args:
        epochs: passes over a task's training images; `HATConfig.cycles` says how often the scale of the gates is
            annealed in them.
        batch_size: largest training batch; the batches of an epoch are of nearly equal size.
        opt, lr, weight_decay: for `timm.optim.create_optimizer_v2`.
        sched, warmup_epochs: for `timm.scheduler.create_scheduler_v2`, over each task anew; `none` keeps the rate.
        fresh_optimizer: build a new optimizer for each task instead of keeping one for all.
        clip_grad: clip the gradients' norm to this, 0 = off.
        amp: `none`, `bf16` or `fp16` (with a gradient scaler).
        compile: run training steps through `torch.compile`.
        flip: mirror training images with probability 1/2.
        crop: shift training images by up to this many pixels.
        size, fit: see `Preparation`.
        seed: of the batches' order, augmentation, dropout and the like.
        device: where to run.
        eval_batch_size: batch size of testing; part of the options because another size may round differently.
        checkpoint_seconds: a checkpoint is written at the first step after this many seconds, and after each task.
    """

    epochs: int = 12
    batch_size: int = 32
    opt: str = "adamw"
    lr: float = 3e-3
    weight_decay: float = 0.05
    sched: str = "cosine"
    warmup_epochs: int = 0
    fresh_optimizer: bool = False
    clip_grad: float = 0.0
    amp: str = "none"
    compile: bool = False
    flip: bool = False
    crop: int = 0
    size: int | None = 32
    fit: str = "resize"
    seed: int = 0
    device: str = "cpu"
    eval_batch_size: int = 256
    checkpoint_seconds: float = 20.0

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 1), ("eval_batch_size", 1), ("size", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name}: got {value}, expected at least {low}")
        for name in ("weight_decay", "warmup_epochs", "clip_grad", "crop", "checkpoint_seconds", "seed"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least 0")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"lr: got {self.lr}, expected a number above 0")
        if self.amp not in ("none", *AMP):
            raise ConfigError(f"amp: got {self.amp!r}, expected none, {' or '.join(AMP)}")
        if self.warmup_epochs >= self.epochs:
            raise ConfigError(f"warmup_epochs: got {self.warmup_epochs} of {self.epochs} epochs, expected fewer")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> TrainOptions:
        return cls(**options)


@dataclasses.dataclass
class TaskRecord:
    """What is known of one task of a run.

    Args:
        soft_accuracy: test accuracy at the end of learning with the soft gates of the last scale.
        hard_accuracy: the same with the hard gates, right after sealing.
        units_used: how many units the task has on.
        loss, penalty: cross entropy and sparsity penalty, means over the last epoch.
        logits_sha256: digest of the logits on the whole test set at sealing.
        logits_sha256_end: the same at the end of the run; None until then.
    """

    name: str
    classes: int
    steps: int
    seconds: float
    soft_accuracy: float
    hard_accuracy: float
    units_used: int
    loss: float
    penalty: float
    logits_sha256: str
    logits_sha256_end: str | None = None

    @property
    def bit_equal(self) -> bool:
        """Whether the logits at the end are those at sealing, bit for bit."""
        return self.logits_sha256 == self.logits_sha256_end


@dataclasses.dataclass
class RunResult:
    """What a run showed; `to_dict` is what `metrics.json` holds.

    Args:
        records: one for each sealed task.
        rows: the accuracy matrix, row i = tested after task i was learned, on tasks 0 to i.
        exact, max_abs_diff: the certificate (`hatcl.certify`), None until the end.
        use: units used per layer and task, as in `Description.to_dict()["layers"]`.
        units: number of units of the model.
        seconds: time spent learning and testing, interruptions left out.
        finished: whether the run came to its end.
        forgotten: tasks forgotten after the run.
    """

    records: list[TaskRecord] = dataclasses.field(default_factory=list)
    rows: list[list[float]] = dataclasses.field(default_factory=list)
    exact: bool | None = None
    max_abs_diff: dict[str, float] | None = None
    layers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    units: int = 0
    seconds: float = 0.0
    finished: bool = False
    forgotten: list[int] = dataclasses.field(default_factory=list)

    @property
    def bit_equal(self) -> bool:
        """Whether every task's logits at the end are those at sealing, bit for bit."""
        return all(record.bit_equal for record in self.records)

    def to_dict(self) -> dict[str, Any]:
        out = dataclasses.asdict(self)
        for fields, record in zip(out["records"], self.records, strict=True):
            fields["bit_equal"] = record.bit_equal if record.logits_sha256_end else None
        if self.rows:
            r = metrics.matrix(self.rows)
            out["average_accuracy"] = metrics.average_accuracy(r)
            out["forgetting"] = metrics.forgetting(r)
            out["backward_transfer"] = metrics.backward_transfer(r)
        out["bit_equal"] = self.bit_equal if self.finished else None
        return out

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RunResult:
        """Reads back `to_dict`. Raises `IntegrityError` if a field is missing."""
        try:
            known = {field.name: content[field.name] for field in dataclasses.fields(cls)}
            names = [field.name for field in dataclasses.fields(TaskRecord)]
            known["records"] = [TaskRecord(**{name: fields[name] for name in names}) for fields in content["records"]]
        except (KeyError, TypeError) as error:
            raise IntegrityError(f"metrics: field {error} is missing; expected what hatcl train wrote") from error
        return cls(**known)


class Watcher:
    """Told what happens in a run; every method does nothing until overridden."""

    def started(self, tasks: Sequence[Task], steps: Sequence[int], result: RunResult) -> None:
        """The run starts (or goes on, with `result` so far)."""

    def learning(self, task: int, step: int) -> None:
        """Task `task` is learned from step `step` on."""

    def stepped(self, task: int, step: int, loss: float, penalty: float, scale: float) -> None:
        """One optimizer step is done; `step` counts from 1."""

    def sealed(self, task: int, result: RunResult) -> None:
        """Task `task` is sealed, its record and row of the accuracy matrix are in `result`."""


def train(
    model: nn.Module,
    tasks: Sequence[Task],
    options: TrainOptions,
    *,
    folder: Path | None = None,
    watcher: Watcher | None = None,
    checkpoint: checkpoints.Checkpoint | None = None,
) -> RunResult:
    """Learn `tasks` one after another with `model`, and test all sealed ones after each.

    Seeds torch's global generator at the start of each task, so that a task's course does not depend on what ran
    before it in the process.

    Args:
        model: a HAT model with room for all tasks; its task `i` learns `tasks[i]`.
        folder: the run folder; None writes nothing.
        watcher: told of progress.
        checkpoint: where to go on from (`checkpoints.load_checkpoint`); its model has to be `model`.

    Raises:
        NonFiniteLossError: the loss is NaN or infinite; nothing of the task is sealed, earlier tasks are as they were.
        IntegrityError: the tasks are not those that the checkpoint was learning.
        CapacityError: no unit is left for a task.
    """
    return _Run(model, tasks, options, folder, watcher or Watcher(), checkpoint).go()


@torch.no_grad()
def test_logits(model: nn.Module, task: Task, prepare: Preparation, options: TrainOptions) -> torch.Tensor:
    """The logits of `model`, as it is set, on the task's whole test set, on the CPU. Runs in eval mode."""
    device = torch.device(options.device)
    training = model.training
    model.eval()
    try:
        batches = test_batches(task, prepare, options.eval_batch_size)
        return torch.cat([model(x.to(device)).float().cpu() for x, _ in batches])
    finally:
        model.train(training)


def logits_digest(logits: torch.Tensor) -> str:
    """sha256 of the bits of a float tensor on the CPU."""
    return hashlib.sha256(logits.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def probe_inputs(task: Task, prepare: Preparation, count: int = 8) -> torch.Tensor:
    """A few test images to certify with."""
    return prepare(task.x_test[:count])


class _Run:
    """One call of `train`: what its parts share."""

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[Task],
        options: TrainOptions,
        folder: Path | None,
        watcher: Watcher,
        checkpoint: checkpoints.Checkpoint | None,
    ) -> None:
        self.device = torch.device(options.device)
        self.model = model.to(self.device)
        self.tasks, self.options, self.folder, self.watcher = tasks, options, folder, watcher
        self.prepare = [Preparation.of(task, size=options.size, fit=options.fit) for task in tasks]
        self.epoch_steps = [num_batches(task, options.batch_size) for task in tasks]
        self.digests = [task.digest() for task in tasks]
        self.forward: nn.Module = model
        if options.compile:
            self.forward = torch.compile(model)  # type: ignore[assignment]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        self.optimizer: torch.optim.Optimizer | None = None
        self.result = RunResult()
        self.next_task, self.next_step = 0, 0
        self.random_state: dict[str, Any] | None = None
        if checkpoint is not None:
            self._take_up(checkpoint)
        self.clock = time.monotonic()
        self.saved = self.clock

    def _take_up(self, checkpoint: checkpoints.Checkpoint) -> None:
        progress, training = checkpoint.progress, checkpoint.training
        if progress["digests"] != self.digests:
            other = [
                task.name
                for task, here, there in zip(self.tasks, self.digests, progress["digests"], strict=False)
                if here != there
            ]
            raise IntegrityError(
                f"resume: the data of the tasks ({', '.join(other) or 'their number'}) are not those the run started "
                "with; put the same files back, or start a new run in another folder"
            )
        self.result = RunResult.from_dict(progress["result"])
        self.next_task, self.next_step = progress["task"], progress["step"]
        self.random_state = training["random"]
        if training["optimizer"] is not None:
            self.optimizer = self._new_optimizer()
            self.optimizer.load_state_dict(training["optimizer"])
            for group in self.optimizer.param_groups:  # the rate may be another one now, say after a loss went NaN
                for name in {"lr", "initial_lr"} & group.keys():
                    group[name] *= self.options.lr / progress["lr"]
            if training["scaler"]:  # empty where the run did without one
                self.scaler.load_state_dict(training["scaler"])

    def go(self) -> RunResult:
        steps = [count * self.options.epochs for count in self.epoch_steps]
        self.watcher.started(self.tasks, steps, self.result)
        for t in range(self.next_task, len(self.tasks)):
            self._learn(t, first_step=self.next_step)
            self.next_task, self.next_step = t + 1, 0
            self._save()
            self.watcher.sealed(t, self.result)
        self._finish()
        return self.result

    # --- learning ---

    def _learn(self, t: int, first_step: int) -> None:
        options, task, prepare = self.options, self.tasks[t], self.prepare[t]
        per_epoch = self.epoch_steps[t]
        if first_step and self.random_state is not None:
            checkpoints.set_random_state(self.random_state, self.device)
        else:
            torch.manual_seed(options.seed * 1_000_003 + t)
            if options.fresh_optimizer:
                self.optimizer = None
        if self.optimizer is None:
            self.optimizer = self._new_optimizer()
        scheduler = make_scheduler(
            self.optimizer,
            options.sched,
            epochs=options.epochs,
            steps_per_epoch=per_epoch,
            warmup_epochs=options.warmup_epochs,
        )
        if scheduler is not None:
            scheduler.step_update(first_step)
        total = options.epochs * per_epoch
        last_epoch: list[tuple[float, float]] = []
        step = first_step
        self.watcher.learning(t, step)
        with learn(
            self.model, t, optimizer=self.optimizer, steps=total, epochs=options.epochs, start=first_step
        ) as learning:
            for x, y in self._batches(t, first_step):
                self.model.train()
                loss, penalty = self._step(t, step, x, y, learning)
                step += 1
                if scheduler is not None:
                    scheduler.step_update(step)
                if step > total - per_epoch:
                    last_epoch.append((loss, penalty))
                self.watcher.stepped(t, step, loss, penalty, learning.scale)
                if step < total and time.monotonic() - self.saved >= options.checkpoint_seconds:
                    self.next_step = step
                    self._save()
            with learning.soft():
                soft = test_logits(self.model, task, prepare, options)
        hard = self._test(t)[t]
        self._tick()
        labels = torch.from_numpy(task.y_test)
        description = describe(self.model).to_dict()
        self.result.layers, self.result.units = description["layers"], description["units"]
        self.result.records.append(
            TaskRecord(
                name=task.name,
                classes=task.num_classes,
                steps=total,
                seconds=self.result.seconds - sum(record.seconds for record in self.result.records),
                soft_accuracy=metrics.top1(soft, labels),
                hard_accuracy=metrics.top1(hard, labels),
                units_used=description["use"][t],
                loss=sum(loss for loss, _ in last_epoch) / max(1, len(last_epoch)),
                penalty=sum(penalty for _, penalty in last_epoch) / max(1, len(last_epoch)),
                logits_sha256=logits_digest(hard),
            )
        )

    def _step(self, t: int, step: int, x: torch.Tensor, y: torch.Tensor, learning: Any) -> tuple[float, float]:
        assert self.optimizer is not None
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        with self._autocast():
            entropy = F.cross_entropy(self.forward(x), y)
        penalty = learning.penalty()
        loss = entropy + penalty
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"task {t} ({self.tasks[t].name}): the loss is {float(loss.detach())} at step {step + 1}; expected a "
                f"finite number. Nothing of task {t} was sealed; earlier tasks are as they were. Look for NaN in the "
                "data, or go on from the last checkpoint with a lower lr, clipped gradients or without AMP "
                "(hatcl train --resume --lr, --clip-grad, --amp)"
            )
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if self.options.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(entropy.detach()), float(penalty.detach())

    def _batches(self, t: int, first_step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All batches of a task from step `first_step` on."""
        first_epoch, start = divmod(first_step, self.epoch_steps[t])
        for epoch in range(first_epoch, self.options.epochs):
            yield from train_batches(
                self.tasks[t],
                self.prepare[t],
                self.options.batch_size,
                seed=(self.options.seed, t, epoch),
                start=start if epoch == first_epoch else 0,
                flip=self.options.flip,
                crop=self.options.crop,
            )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.options.amp == "none":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=AMP[self.options.amp])

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model, self.options.opt, self.options.lr, self.options.weight_decay)

    # --- testing ---

    def _test(self, t: int) -> list[torch.Tensor]:
        """Append the row of the accuracy matrix after task t; returns the logits it rests on."""
        logits = []
        for j in range(t + 1):
            with active_task(self.model, j):
                logits.append(test_logits(self.model, self.tasks[j], self.prepare[j], self.options))
        labels = [torch.from_numpy(task.y_test) for task in self.tasks]
        self.result.rows.append([metrics.top1(out, labels[j]) for j, out in enumerate(logits)])
        return logits

    def _finish(self) -> None:
        for j, record in enumerate(self.result.records):
            with active_task(self.model, j):
                logits = test_logits(self.model, self.tasks[j], self.prepare[j], self.options)
            record.logits_sha256_end = logits_digest(logits)
        certificate = certify(self.model, probe_inputs(self.tasks[0], self.prepare[0]).to(self.device))
        self.result.exact = certificate.exact
        self.result.max_abs_diff = {str(task): float(diff) for task, diff in certificate.max_abs_diff.items()}
        self._tick()
        set_task(self.model, None)
        self.result.finished = True
        if self.folder is not None:
            checkpoints.save_model(self.folder, self.model)
            checkpoints.write_json(self.folder / checkpoints.METRICS, self.result.to_dict())
            checkpoints.tidy(self.folder)

    # --- keeping ---

    def _tick(self) -> None:
        now = time.monotonic()
        self.result.seconds += now - self.clock
        self.clock = now

    def _save(self) -> None:
        self._tick()
        if self.folder is None:
            return
        training = {
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": checkpoints.random_state(self.device),
        }
        progress = {
            "task": self.next_task,
            "step": self.next_step,
            "lr": self.options.lr,
            "digests": self.digests,
            "result": self.result.to_dict(),
        }
        checkpoints.save_checkpoint(self.folder, checkpoints.Checkpoint(self.model, training, progress))
        self.saved = time.monotonic()
        log.info("checkpoint at task %d, step %d in %s", self.next_task, self.next_step, self.folder)
