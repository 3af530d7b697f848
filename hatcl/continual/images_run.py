"""The loop over tasks: learn one after another, seal, test, and show at the end that no sealed task moved by a bit."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calls import seeded
from ..config import flag, number, one_of, whole
from ..data.images import FITS, ImageData, Preparation, num_batches, test_batches, train_batches
from ..engine import folder as checkpoints
from ..engine import measures as metrics
from ..engine.loop import Loop, Tell, Work
from ..engine.options import LoopOptions
from ..engine.schedule import make_optimizer
from ..engine.state import Modes, Standing, kept_whole, load_optimizer, seed_all
from ..errors import ConfigError, IntegrityError
from ..hat.certify import certify
from ..hat.describe import describe
from ..hat.learn import Learning, learn
from ..hat.tasks import set_task
from ..hat.tasks import task as active_task
from ..lend import Evaluating

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainOptions(LoopOptions):
    """How `train` learns each task. `HATConfig.cycles` says how often the scale of the gates is annealed in a task's
    epochs.

    Args:
        batch_size: largest training batch; the batches of an epoch are of nearly equal size.
        fresh_optimizer: build a new optimizer for each task instead of keeping one for all.
        flip: mirror training images with probability 1/2.
        crop: shift training images by up to this many pixels.
        size, fit: see `Preparation`.
        device: where to run.
        eval_batch_size: batch size of testing; part of the options because another size may round differently.
        checkpoint_seconds: a checkpoint is written at the first step after this many seconds, and after each task.

    Raises:
        ConfigError: a value outside its range, see also `LoopOptions`.
    """

    lr: float = 3e-3
    weight_decay: float = 0.05
    epochs: int = 12
    schedule: str = "cosine"
    batch_size: int = 32
    fresh_optimizer: bool = False
    flip: bool = False
    crop: int = 0
    size: int | None = 32
    fit: str = "resize"
    device: str = "cpu"
    eval_batch_size: int = 256
    checkpoint_seconds: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "eval_batch_size", "size"):
            whole(name, getattr(self, name), optional=name == "size")
        whole("crop", self.crop, 0)
        number("checkpoint_seconds", self.checkpoint_seconds, 0)
        one_of("fit", self.fit, FITS)
        for name in ("fresh_optimizer", "flip"):
            flag(name, getattr(self, name))
        try:
            torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(f"device: got {self.device!r}, expected cpu, cuda, cuda:1, ...") from error

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

    def started(self, tasks: Sequence[ImageData], steps: Sequence[int], result: RunResult) -> None:
        """The run starts (or goes on, with `result` so far)."""

    def learning(self, task: int, step: int) -> None:
        """Task `task` is learned from step `step` on."""

    def stepped(self, task: int, step: int, loss: float, penalty: float, scale: float) -> None:
        """One optimizer step is done; `step` counts from 1."""

    def sealed(self, task: int, result: RunResult) -> None:
        """Task `task` is sealed, its record and row of the accuracy matrix are in `result`."""


def train(
    model: nn.Module,
    tasks: Sequence[ImageData],
    options: TrainOptions,
    *,
    folder: Path | None = None,
    watcher: Watcher | None = None,
    checkpoint: checkpoints.Checkpoint | None = None,
    on_progress: Tell | None = None,
) -> RunResult:
    """Learn `tasks` one after another with `model`, and test all sealed ones after each.

    All generators are seeded at the start of each task, so that a task's course does not depend on what ran before it
    in the process; the caller's random state and each module's mode are put back.

    Args:
        model: a HAT model with room for all tasks; its task `i` learns `tasks[i]`.
        folder: the run folder; None writes nothing.
        watcher, on_progress: called with the run's progress.
        checkpoint: where to go on from (`checkpoints.load_checkpoint`); its model has to be `model`.

    Raises:
        NonFiniteLossError: the loss is NaN or infinite; nothing of the task is sealed, earlier tasks are as they were.
        IntegrityError: the tasks are not those that the checkpoint was learning.
        CapacityError: no unit is left for a task.
    """
    return _ImageRun(model, tasks, options, folder, watcher or Watcher(), checkpoint, on_progress).go()


@torch.no_grad()
def test_logits(model: nn.Module, task: ImageData, prepare: Preparation, options: TrainOptions) -> torch.Tensor:
    """The logits of `model`, as it is set, on the task's whole test set, on the CPU. Runs in eval mode."""
    device = torch.device(options.device)
    with Evaluating(model):
        batches = test_batches(task, prepare, options.eval_batch_size)
        return torch.cat([model(x.to(device)).float().cpu() for x, _ in batches])


def logits_digest(logits: torch.Tensor) -> str:
    """sha256 of the bits of a float tensor on the CPU."""
    return hashlib.sha256(logits.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def probe_inputs(task: ImageData, prepare: Preparation, count: int = 8) -> torch.Tensor:
    """A few test images to certify with."""
    return prepare(task.x_test[:count])


class _Learning(Work):
    """One task as a loop's work."""

    kind = "hatcl.images"
    promise = "Nothing of it was sealed; earlier tasks are as they were"
    learning: Learning

    def __init__(self, run: _ImageRun, t: int) -> None:
        super().__init__(run.tasks[t].name, run.model, run.model.parameters())
        self.of, self.t, self.stage = run, t, t
        self.last: list[list[float]] = []  # loss and penalty of the last epoch's steps
        self.now: list[float] = []

    @property
    def title(self) -> str:
        return f"task {self.t} ({self.name})"

    def set_mode(self) -> None:
        self.of.modes.train()

    def epoch_length(self) -> int:
        return num_batches(self.of.tasks[self.t], self.of.options.batch_size)

    def batches(self, epoch: int) -> list[tuple[int, int]]:
        """Which batch of which epoch; the images are read when their turn comes."""
        return [(epoch, number) for number in range(self.epoch_length())]

    def loss(self, batch: tuple[int, int]) -> Tensor:
        run, (epoch, number) = self.of, batch
        o, seed = run.options, (run.options.seed, self.t, epoch)
        x, y = next(
            train_batches(
                run.tasks[self.t], run.prepare[self.t], o.batch_size, seed=seed, start=number, flip=o.flip, crop=o.crop
            )
        )
        x, y = x.to(run.device, non_blocking=True), y.to(run.device, non_blocking=True)
        entropy = F.cross_entropy(run.model(x), y)
        with torch.autocast(run.device.type, enabled=False):
            penalty = self.learning.penalty()
        self.now = [float(entropy.detach()), float(penalty.detach())]
        return entropy + penalty

    def after_step(self, loop: Loop, batches: list[Any]) -> dict[str, float]:
        loss, penalty = self.now
        if loop.steps is not None and loop.step > loop.steps - -(-self.epoch_length() // loop.options.accumulate):
            self.last.append([loss, penalty])
        self.of.watcher.stepped(self.t, loop.step, loss, penalty, self.learning.scale)
        return {"loss": loss, "penalty": penalty, "scale": self.learning.scale}

    def state(self) -> dict[str, Any]:
        return {"last": self.last}

    def load_state(self, state: Mapping[str, Any], where: object) -> None:
        self.last = [list(pair) for pair in state["last"]]


class _Kept(Standing):
    """A run's checkpoint: the model as a whole, so that every command can look at it."""

    def __init__(self, run: _ImageRun) -> None:
        super().__init__(run.folder or Path(), seconds=run.options.checkpoint_seconds)
        self.of = run

    def read(self, kind: str) -> dict[str, Any] | None:
        return self.of.standing

    def due(self) -> bool:
        return self.of.folder is not None and super().due()

    def write(self, kind: str, state: Mapping[str, Any]) -> None:
        self.of.save(dict(state))
        self.last = time.monotonic()


class _ImageRun:
    """One call of `train`: what its parts share."""

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[ImageData],
        options: TrainOptions,
        folder: Path | None,
        watcher: Watcher,
        checkpoint: checkpoints.Checkpoint | None,
        on_progress: Tell | None,
    ) -> None:
        self.device = torch.device(options.device)
        self.model, self.modes = model.to(self.device), Modes(model)
        self.tasks, self.options, self.folder, self.watcher, self.tell = tasks, options, folder, watcher, on_progress
        self.prepare = [Preparation.of(task, size=options.size, fit=options.fit) for task in tasks]
        self.digests = [task.digest() for task in tasks]
        self.optimizer: torch.optim.Optimizer | None = None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        self.result = RunResult()
        self.next_task = 0
        self.standing: dict[str, Any] | None = None
        if checkpoint is not None:
            with kept_whole("the run's checkpoint"):
                self._take_up(checkpoint)
        self.clock = time.monotonic()
        self.kept = _Kept(self)

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
        self.next_task, self.standing = progress["task"], training["loop"]
        if progress["step"] != (self.standing["step"] if self.standing else 0):
            raise ValueError("its files belong to two checkpoints")
        self.modes.frozen = [self.model.get_submodule(name) for name in training["frozen"]]  # files hold no modes
        if training["optimizer"] is not None:
            self.optimizer = make_optimizer(self.model, self.options)
            load_optimizer(self.optimizer, training["optimizer"], "the run's checkpoint")
            if dict(training["scaler"]):  # empty where the run did without one
                self.scaler.load_state_dict(training["scaler"])

    def go(self) -> RunResult:
        steps = [self.options.steps_of(num_batches(task, self.options.batch_size)) or 0 for task in self.tasks]
        self.watcher.started(self.tasks, steps, self.result)
        with seeded(self.options.seed, self.device):
            try:
                for t in range(self.next_task, len(self.tasks)):
                    self._learn(t, steps[t])
                    self.next_task, self.standing = t + 1, None
                    self.save(None)
                    self.watcher.sealed(t, self.result)
                self._finish()
            finally:
                self.modes.put_back()
        return self.result

    # --- learning ---

    def _learn(self, t: int, steps: int) -> None:
        options, task, prepare = self.options, self.tasks[t], self.prepare[t]
        if self.standing is None:
            seed_all(options.seed * 1_000_003 + t)
            if options.fresh_optimizer:
                self.optimizer = None
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, options)
        work = _Learning(self, t)
        loop = Loop(work, options, optimizer=self.optimizer, scaler=self.scaler, standing=self.kept, tell=self.tell)
        self.watcher.learning(t, loop.step)
        with learn(
            self.model, t, optimizer=self.optimizer, steps=steps, epochs=options.epochs, start=loop.step
        ) as work.learning:
            loop.run()
            with work.learning.soft():
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
                steps=steps,
                seconds=self.result.seconds - sum(record.seconds for record in self.result.records),
                soft_accuracy=metrics.top1(soft, labels),
                hard_accuracy=metrics.top1(hard, labels),
                units_used=description["use"][t],
                loss=sum(loss for loss, _ in work.last) / max(1, len(work.last)),
                penalty=sum(penalty for _, penalty in work.last) / max(1, len(work.last)),
                logits_sha256=logits_digest(hard),
            )
        )

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

    def save(self, loop: dict[str, Any] | None) -> None:
        """Write a checkpoint: of a loop in the middle of a task, or between two tasks."""
        self._tick()
        if self.folder is None:
            return
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        progress = {
            "task": self.next_task,
            "step": loop["step"] if loop else 0,
            "digests": self.digests,
            "result": self.result.to_dict(),
        }
        frozen = [name for name, m in self.model.named_modules() if any(m is f for f in self.modes.frozen)]
        training = {"optimizer": optimizer, "scaler": self.scaler.state_dict(), "loop": loop, "frozen": frozen}
        checkpoints.save_checkpoint(self.folder, checkpoints.Checkpoint(self.model, training, progress))
        log.info("checkpoint of task %d in %s", self.next_task, self.folder)
