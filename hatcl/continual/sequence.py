"""The loop over tasks: learn, run the method's steps, score, save, and resume an interrupted run."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import device_of, seeded
from ..engine import folder as checkpoints
from ..engine.folder import METRICS, tidy
from ..engine.loop import Loop, Progress, Tell, Work
from ..engine.measures import commonest_share
from ..engine.options import LoopOptions
from ..engine.processes import place, wait_for_all
from ..engine.records import made_with
from ..engine.schedule import make_optimizer
from ..engine.state import Modes, Standing, kept_whole, load_optimizer, seed_all, write_all
from ..errors import ConfigError, SkillError
from ..files import complete, read_torch, replaced_folder
from ..hat.saving.pretrained import is_converted, load_pretrained_
from ..skills.tensors import adapters_of, skill_tensors
from .folder import (
    CHECKPOINT,
    METHOD,
    MIDWAY,
    MODEL,
    PROGRESS,
    SECONDS,
    base_of,
    check,
    claim,
    learned_state,
    read_model,
    save_model,
    task_folder,
    write_model,
    write_task,
)
from .methods import Batch, Method, make_method
from .options import LearnOptions
from .result import SequenceResult
from .tasks import ContinualTask, check_tasks

OPTIMIZER = "optimizer.pt"  # one for all tasks


def learn_sequence(
    model: nn.Module,
    tasks: Sequence[ContinualTask],
    method: str | Method = "tasl",
    options: LearnOptions | Mapping[str, Any] | None = None,
    *,
    method_options: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    on_progress: Tell | None = None,
) -> SequenceResult:
    """Learn tasks one after another and score them after each.

    Everything that requires a gradient is trained: the active adapter of a peft model, or a whole model. Afterwards the
    model is as the method left it after the last task, with each module in its former mode. A model that arrives in
    evaluation mode is trained in training mode; in one that arrives in training mode, modules in evaluation mode stay
    so.

    `options.seed` seeds the order of batches, dropout and the method's own choices. All generators are seeded again for
    each stage, so a stage does not depend on how the earlier ones were run. The caller's random state is restored.

    If `torch.distributed` was initialised with several processes, each takes its share of every batch, and the model is
    learned in `DistributedDataParallel` (only with `hat`). All must call this with the same arguments; rank 0 writes
    the folder. Norms over a batch see only a process's share. An interrupted stage is then learned again from its
    beginning.

    Args:
        model: a peft model with one active LoRA adapter, or any module.
        tasks: see `ContinualTask`.
        method: one of `list_continual_methods()`, or a `Method`. method_options: changes to its options.
        options: how to train, `LearnOptions` or a mapping of the options to change.
        folder: the run's folder (see `hatcl/continual/folder.py`). An interrupted run resumes where it stopped and ends
        with the same bits as an uninterrupted one; a finished run is read.
        on_progress: called after each step, each epoch, each score and each stage, and at the start for the stages done
            before.

    Raises:
        ConfigError: options, tasks or the folder do not fit. SkillError: the adapter or the base model does not fit the
            method or the folder's run. NonFiniteLossError: a loss or gradient is not finite; the folder holds the tasks
            before it. IntegrityError: a file in the folder is damaged.
    """
    chosen = make_method(method, method_options)
    learning = LearnOptions().changed(options)
    validated = learning.score_on == "validation"
    check_tasks(tasks, validated=validated)
    scored = [dataclasses.replace(t, score=t.validate or t.score) if validated else t for t in tasks]
    where = None if folder is None else Path(folder)
    return _Run(model, scored, chosen, learning, where, on_progress).go()


class _Stage(Work):
    """One stage as a loop's work: one task, or several together."""

    kind = "hatcl.continual"
    promise = "A run's folder holds the tasks before it"

    def __init__(self, run: _Run, stage: int) -> None:
        indices = run.stages[stage]
        trained = (p for p in run.model.parameters() if p.requires_grad)
        super().__init__(run.tasks[indices[0]].name, run.model, trained)
        self.run, self.stage, self.indices, self.method = run, stage, indices, run.method
        self.order = torch.Generator().manual_seed(_mix(run.options.seed, stage + 1))
        self.generators = [self.order]
        self.losses: list[float] = []

    def set_mode(self) -> None:
        self.run.modes.train()

    def epoch_length(self) -> int:
        return sum(-(-len(self.run.tasks[i].train) // self.run.options.batch_size) for i in self.indices)

    def trained(self, options: LoopOptions) -> Any:
        """The groups of parameters; biases, norms and gates get no weight decay."""
        return self.model if options.weight_decay else self.parameters

    def batches(self, epoch: int) -> list[Batch]:
        """Batches with every example once, those of a stage's tasks shuffled together. They have nearly equal size,
        since a last batch of one example would break batch norms."""
        size, found = self.run.options.batch_size, list[Batch]()
        for i in self.indices:
            order = torch.randperm(len(self.run.tasks[i].train), generator=self.order)
            parts = order.tensor_split(-(-len(order) // size))
            found += [Batch(i, self.run.tasks[i], tuple(part.tolist())) for part in parts]
        if len(self.indices) > 1:
            found = [found[k] for k in torch.randperm(len(found), generator=self.order).tolist()]
        return [self._share(batch) for batch in found]

    def _share(self, batch: Batch) -> Batch:
        """This process's share of a batch."""
        rank, count = place()
        if count == 1:
            return batch
        mine = batch.positions[rank::count]
        return dataclasses.replace(batch, positions=mine, weight=len(mine) * count / len(batch.positions))

    def loss(self, batch: Batch) -> Tensor:
        self.name = batch.task.name
        return self.method.loss(self.run.replica, batch)

    def size(self, batch: Batch) -> float:
        return len(batch.positions) / batch.weight  # the same in every process that has a share

    def said_of(self, batch: Batch) -> str:
        return f"the examples {list(batch.positions[:4])} ..."

    def after_step(self, loop: Loop, batches: list[Any]) -> dict[str, float]:
        self.method.after_step(self.model, batches)
        self.losses.append(loop.losses[-1])
        return self.method.measured()

    def state(self) -> dict[str, Any]:
        tensors = {n: t.detach() for n, t in learned_state(self.model).items()}
        return {"tensors": tensors, "losses": self.losses, "method": self.method.state()}

    def load_state(self, state: Mapping[str, Any], where: object) -> None:
        write_all(learned_state(self.model), state["tensors"])
        self.losses = [float(loss) for loss in state["losses"]]
        self.method.load_state(state["method"])


class _Run:
    """One call of `learn_sequence`."""

    def __init__(
        self,
        model: nn.Module,
        tasks: list[ContinualTask],
        method: Method,
        options: LearnOptions,
        folder: Path | None,
        on_progress: Tell | None,
    ) -> None:
        self.model, self.tasks, self.method, self.options = model, tasks, method, options
        self.folder, self.tell = folder, on_progress or (lambda progress: None)
        rank, self.processes = place()
        self.writes = folder if rank == 0 else None
        self.replica = model  # or its wrapper, if several processes learn as one
        self.stages = method.stages(len(tasks))
        self.modes = Modes(model)
        self.optimizer: torch.optim.Optimizer | None = None
        self.scaler: torch.amp.GradScaler | None = None
        self.moments: dict[str, Any] = {}  # the state of one optimizer for all tasks, and of its scaler
        self.result = SequenceResult(method.name, [t.name for t in tasks], commonest=[
            commonest_share(t.validation_answers if options.score_on == "validation" else t.answers) for t in tasks
        ], scored_by=[t.measure for t in tasks])  # fmt: skip

    def go(self) -> SequenceResult:
        if not any(p.requires_grad for p in self.model.parameters()):
            raise SkillError(
                f"{type(self.model).__name__}: no parameter requires a gradient; give a peft model whose adapter is "
                "trainable (is_trainable=True when loading it)"
            )
        self._check_processes()
        with seeded(_mix(self.options.seed, 0), device_of(self.model)):
            try:
                self._go()
            finally:
                self.modes.put_back()
        return self.result

    def _check_processes(self) -> None:
        if self.processes > 1 and not self.method.together:
            raise ConfigError(
                f"{self.method.name}: cannot be learned by {self.processes} processes together; start one process, "
                "or use hat"
            )
        for task in self.tasks if self.processes > 1 else ():
            smallest = len(task.train) // -(-len(task.train) // self.options.batch_size)
            if smallest < self.processes:
                raise ConfigError(
                    f"batch_size: got {self.options.batch_size}; task {task.name} then has a batch of {smallest}, "
                    f"too few for {self.processes} processes; give a larger batch_size"
                )

    def _go(self) -> None:
        config = self._config()  # before the method adds its own adapters
        if self.folder is not None:
            check(self.folder, config)
        self.method.learning = self.options
        self.method.start(self.model, self.tasks, self.options.seed)
        done = 0
        if self.folder is not None:
            if self.writes is not None:
                claim(self.writes, config)
            wait_for_all()
            done = self._resume(self.folder)
            wait_for_all()  # before it is written again
            if (self.folder / METRICS).exists():
                return
        if self.processes > 1:
            where = device_of(self.model)
            self.replica = nn.parallel.DistributedDataParallel(self.model, [where] if where.type == "cuda" else None)
        for stage in range(done):
            self._tell_stage(stage)
        if done == 0 and not self.result.baseline:
            every = range(len(self.tasks)) if self.options.baseline and self.method.ahead else []
            self.result.baseline = self._scores(every, -1)
            if self.writes is not None:
                self._checkpoint(self.writes, 0)
        for stage in range(done, len(self.stages)):
            self._stage(stage)
        self.result.details = self.method.finish(self.model, self.result.facts)
        if self.writes is not None:
            self._finish(self.writes)
        wait_for_all()

    # --- one stage ---

    def _stage(self, stage: int) -> None:
        seed_all(_mix(self.options.seed, stage + 1))
        began = time.perf_counter()
        self._learn(stage)
        facts = self.method.facts(self.model, stage)
        learned = time.perf_counter()
        row = self._scores(self._due(stage), stage)
        # one row per task: a stage with several tasks has no scores after each of them
        gap = [[math.nan] * len(self.tasks)] * (len(self.stages[stage]) - 1)
        self.result.rows += [*gap, row]
        self.result.facts.append(facts)
        now = time.perf_counter()
        self.result.seconds.append({"learning": learned - began, "scoring": now - learned})
        if self.writes is not None:
            self._write(self.writes, stage)
        self._tell_stage(stage)

    def _learn(self, stage: int) -> None:
        try:
            losses = self._steps(stage)
        except BaseException:
            self.method.leave(self.model)
            raise
        tenth = -(-len(losses) // 10)
        self.result.losses.append([sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth])

    def _steps(self, stage: int) -> list[float]:
        """Learn a stage and return the losses of its steps."""
        self.method.begin(self.model, stage)
        standing = None
        if self.writes is not None and self.processes == 1 and self.method.state() is not None:
            standing = Standing(self.writes / MIDWAY.format(stage), seconds=self.options.checkpoint_seconds)
        work = _Stage(self, stage)
        loop = Loop(
            work, self.options, optimizer=self._kept_optimizer(work), scaler=self.scaler, standing=standing,
            tell=self.tell,
        )  # fmt: skip
        with self.method.watching(self.replica, loop.optimizer, loop.steps or 0, loop.step):
            loop.run()
        loop.optimizer.zero_grad(set_to_none=True)
        if not self.options.fresh_optimizer and not self.method.renews:
            self.optimizer, self.scaler = loop.optimizer, loop.scaler
        self.method.end(self.model, stage)
        return work.losses

    def _kept_optimizer(self, work: _Stage) -> torch.optim.Optimizer | None:
        """The optimizer of the earlier stages, if all share one; also after an interruption."""
        if self.optimizer is None and self.moments:
            where = f"{OPTIMIZER} in the run's checkpoint"
            self.optimizer = make_optimizer(work.trained(self.options), self.options)
            self.scaler = torch.amp.GradScaler(device_of(self.model).type, enabled=self.options.amp == "fp16")
            with kept_whole(where):
                load_optimizer(self.optimizer, self.moments["optimizer"], where)
                if dict(self.moments["scaler"]):  # empty if the run used no scaler
                    self.scaler.load_state_dict(self.moments["scaler"])
        return self.optimizer

    def _tell_stage(self, stage: int) -> None:
        """Report a finished stage: the score of its last task, and the method's results."""
        index = self.stages[stage][-1]
        told = {"loss": self.result.losses[stage][1], **self.result.facts[stage]}
        facts = {n: float(v) for n, v in told.items() if isinstance(v, (int, float))}
        score = self.result.rows[index][index]
        self.tell(Progress("stage", self.tasks[index].name, 0, 0, score, stage=stage, measured=facts))

    def _due(self, stage: int) -> list[int]:
        """The tasks to score after a stage."""
        learned = max(self.stages[stage]) + 1
        count = len(self.tasks)
        if not self.method.ahead:
            return list(range(learned))
        return list(range(count if self.options.evaluate == "all" else min(learned + 1, count)))

    def _scores(self, due: Sequence[int], stage: int) -> list[float]:
        row = [math.nan] * len(self.tasks)
        self.model.eval()
        for i in due:
            with torch.no_grad(), self.method.scoring(self.model, i):
                row[i] = float(self.tasks[i].score(self.model))
                self.tell(Progress("scoring", self.tasks[i].name, 0, 0, row[i], stage=stage))
        return row

    # --- the folder ---

    def _config(self) -> dict[str, Any]:
        adapter = skill_tensors(self.model) if adapters_of(self.model) else {}
        return {
            "method": self.method.to_dict(),
            "options": dataclasses.asdict(self.options),
            "tasks": [{"name": t.name, "examples": len(t.train), "digest": t.digest} for t in self.tasks],
            "base": base_of(self.model),
            "tensors": {n: list(p.shape) for n, p in adapter.items()},
        }

    def _resume(self, folder: Path) -> int:
        """Read the newest checkpoint, or a finished run, and return the number of finished stages."""
        at, finished = complete(folder / CHECKPOINT), complete(folder / MODEL)
        if (folder / METRICS).exists() and finished.exists():
            load_pretrained_(self.model, finished, grow=True)
            self._take(folder / METRICS, checkpoints.read_json(folder / METRICS), folder)
            return len(self.stages)
        if not at.exists():
            return 0
        progress = checkpoints.read_json(at / PROGRESS)
        with kept_whole(at / METHOD):
            self.method.load(at / METHOD, self.model)
        read_model(self.model, at)
        if (at / OPTIMIZER).exists():
            self.moments = read_torch(at / OPTIMIZER)
        with kept_whole(at / PROGRESS):
            self._take(at / PROGRESS, progress["result"], folder)
            done = int(progress["stages"])
        self.result.seconds = self.result.seconds[:done]
        return done

    def _take(self, path: Path, content: dict[str, Any], folder: Path) -> None:
        with kept_whole(path):
            self.result = SequenceResult.from_dict(content)
        if (folder / SECONDS).exists():
            self.result.seconds = checkpoints.read_json(folder / SECONDS, list)

    def _write(self, folder: Path, stage: int) -> None:
        index = self.stages[stage][-1]
        about = {
            "task": self.tasks[index].name,
            "tasks": [self.tasks[i].name for i in self.stages[stage]],
            "method": self.method.to_dict(),
            "options": dataclasses.asdict(self.options),
            "base": checkpoints.read_json(folder / checkpoints.CONFIG)["base"],
            "scores": dict(zip(self.result.tasks, self.result.to_dict()["matrix"][index], strict=True)),
            "record": {
                "data": {self.tasks[i].name: self.tasks[i].digest for i in self.stages[stage]},
                "examples": {self.tasks[i].name: len(self.tasks[i].train) for i in self.stages[stage]},
                **made_with(),
            },
        }
        checkpoints.write_json(folder / SECONDS, self.result.seconds)
        write_task(folder, task_folder(index, self.tasks[index].name), self.model, self.method, about)
        self._checkpoint(folder, stage + 1)

    def _checkpoint(self, folder: Path, stages: int) -> None:
        with replaced_folder(folder / CHECKPOINT) as new:
            (new / METHOD).mkdir()
            write_model(self.model, new)
            self.method.save(new / METHOD)
            if self.optimizer is not None and self.scaler is not None:
                moments = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
                torch.save(moments, new / OPTIMIZER)
            progress = {"stages": stages, "result": self.result.to_dict()}
            (new / PROGRESS).write_text(json.dumps(progress) + "\n")
        for path in folder.glob(MIDWAY.format("*")):  # of the finished stage
            path.unlink()

    def _finish(self, folder: Path) -> None:
        whole = is_converted(self.model)
        if whole:
            save_model(folder, self.model, self.result.to_dict())
        checkpoints.write_json(folder / METRICS, self.result.to_dict())
        if whole:
            tidy(folder)


def _mix(seed: int, stage: int) -> int:
    """A seed for each stage that differs from those of every other seed's stages."""
    return seed * 1009 + stage
