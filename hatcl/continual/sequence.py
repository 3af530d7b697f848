"""The loop over tasks: learn, let the method do its part, score, save, and go on where an interrupted run stopped."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..engine import folder as checkpoints
from ..errors import ConfigError, NonFiniteLossError, SkillError
from ..files import complete, replaced_folder
from ..skills.tensors import skill_tensors
from .folder import (
    CHECKPOINT,
    METHOD,
    PROGRESS,
    RESULT,
    SECONDS,
    STATE,
    base_of,
    check,
    claim,
    read_state,
    task_folder,
    write_state,
    write_task,
)
from .methods import Batch, Method, make_method
from .options import LearnOptions
from .result import SequenceResult
from .tasks import ContinualTask, check_tasks


@dataclass(frozen=True)
class Progress:
    """Where a run stands; `learn_sequence` gives one after each step and each score.

    Attributes:
        stage: which stage. doing: `learning` or `scoring`. task: the name of the task at work.
        step, steps: of this stage, done and in all. value: the step's loss, or the score.
    """

    stage: int
    doing: str
    task: str
    step: int
    steps: int
    value: float


def learn_sequence(
    model: nn.Module,
    tasks: Sequence[ContinualTask],
    method: str | Method = "tasl",
    options: LearnOptions | Mapping[str, Any] | None = None,
    *,
    method_options: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
) -> SequenceResult:
    """Learn tasks one after another and score them after each.

    What requires a gradient is trained: the active adapter of a peft model, or a whole model. The model is left as the
    last task's method left it, in the mode it came in.

    Args:
        model: a peft model with one active LoRA adapter, or any module.
        tasks: see `ContinualTask`.
        method: one of `list_continual_methods()`, or a `Method`. method_options: what to change of its options.
        options: how to train, see `LearnOptions`, or a mapping of what to change.
        folder: where the run is kept (see `hatcl/continual/folder.py`). A run that is there goes on after its last
            finished task, and ends with what an uninterrupted run gives, bit for bit; a finished one is read.
        seed: of the batches' order, dropout and what the method draws; anew for each stage, so that a stage does not
            depend on how the ones before it were run. The caller's random state is put back.
        on_progress: is told after each step and each score.

    Raises:
        ConfigError: options, tasks or a folder that do not fit. SkillError: an adapter or a base model that does not
            fit the method or the folder's run. NonFiniteLossError: a loss that is not finite; the folder holds the
            tasks before it.
    """
    check_tasks(tasks)
    chosen = make_method(method, method_options)
    learning = LearnOptions().changed(options)
    return _Run(model, list(tasks), chosen, learning, None if folder is None else Path(folder), seed, on_progress).go()


class _Run:
    """One call of `learn_sequence`."""

    def __init__(
        self,
        model: nn.Module,
        tasks: list[ContinualTask],
        method: Method,
        options: LearnOptions,
        folder: Path | None,
        seed: int,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.model, self.tasks, self.method, self.options = model, tasks, method, options
        self.folder, self.seed, self.tell = folder, seed, on_progress or (lambda progress: None)
        self.stages = method.stages(len(tasks))
        self.result = SequenceResult(method.name, [t.name for t in tasks])

    def go(self) -> SequenceResult:
        if not any(p.requires_grad for p in self.model.parameters()):
            raise SkillError(
                f"{type(self.model).__name__}: no parameter requires a gradient; give a peft model whose adapter is "
                "trainable (is_trainable=True where it was loaded)"
            )
        was_training = self.model.training
        with _own_randomness(self.model):
            try:
                self._go()
            finally:
                self.model.train(was_training)
        return self.result

    def _go(self) -> None:
        done = 0
        torch.manual_seed(_mix(self.seed, 0))
        config = self._config()  # before the method adds adapters of its own
        if self.folder is not None:
            check(self.folder, config)
        self.method.start(self.model, self.tasks, self.seed)
        if self.folder is not None:
            claim(self.folder, config)
            done = self._resume(self.folder)
        if done == 0 and not self.result.baseline:
            every = range(len(self.tasks)) if self.options.baseline and self.method.ahead else []
            self.result.baseline = self._scores(every, -1)
            if self.folder is not None:
                self._checkpoint(self.folder, 0)
        for stage in range(done, len(self.stages)):
            torch.manual_seed(_mix(self.seed, stage + 1))
            began = time.perf_counter()
            self._learn(stage)
            learned = time.perf_counter()
            row = self._scores(self._due(stage), stage)
            # rows are by task: a stage of several tasks has no scores after each
            gap = [[math.nan] * len(self.tasks)] * (len(self.stages[stage]) - 1)
            self.result.rows += [*gap, row]
            now = time.perf_counter()
            self.result.seconds.append({"learning": learned - began, "scoring": now - learned})
            if self.folder is not None:
                self._write(self.folder, stage)
        if self.folder is not None:
            checkpoints.write_json(self.folder / RESULT, self.result.to_dict())

    # --- one stage ---

    def _learn(self, stage: int) -> None:
        model, options = self.model, self.options
        self.method.begin(model, stage)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=options.weight_decay)
        batches = list(self._batches(stage))
        losses: list[float] = []
        model.train()
        with self.method.watching(model, optimizer, len(batches)):
            for step, batch in enumerate(batches):
                for group in optimizer.param_groups:
                    group["lr"] = options.rate(step, len(batches))
                loss = self.method.loss(model, batch)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise NonFiniteLossError(
                        f"task {batch.task.name}, step {step}: the loss is {value}; lower lr ({options.lr:g}), or look "
                        f"at the examples {list(batch.positions[:4])} ..."
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if options.clip_grad:
                    nn.utils.clip_grad_norm_(trained, options.clip_grad)
                optimizer.step()
                self.method.after_step(model, batch)
                losses.append(value)
                self.tell(Progress(stage, "learning", batch.task.name, step + 1, len(batches), value))
        optimizer.zero_grad(set_to_none=True)
        self.method.end(model, stage)
        tenth = -(-len(losses) // 10)
        self.result.losses.append([sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth])

    def _batches(self, stage: int) -> Iterator[Batch]:
        """Each epoch every example once; the batches of a stage's tasks are shuffled together."""
        size = self.options.batch_size
        generator = torch.Generator().manual_seed(_mix(self.seed, stage + 1))
        for _ in range(self.options.epochs):
            found = []
            for i in self.stages[stage]:
                order = torch.randperm(len(self.tasks[i].train), generator=generator).tolist()
                found += [Batch(i, self.tasks[i], tuple(order[k : k + size])) for k in range(0, len(order), size)]
            if len(self.stages[stage]) > 1:
                found = [found[k] for k in torch.randperm(len(found), generator=generator).tolist()]
            yield from found

    def _due(self, stage: int) -> list[int]:
        """Which tasks to score after a stage."""
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
                self.tell(Progress(stage, "scoring", self.tasks[i].name, 0, 0, row[i]))
        return row

    # --- the folder ---

    def _config(self) -> dict[str, Any]:
        adapter = skill_tensors(self.model)
        return {
            "method": self.method.to_dict(),
            "options": asdict(self.options),
            "seed": self.seed,
            "tasks": [{"name": t.name, "examples": len(t.train)} for t in self.tasks],
            "base": base_of(self.model),
            "tensors": {n: list(p.shape) for n, p in adapter.items()},
        }

    def _resume(self, folder: Path) -> int:
        """Read the newest checkpoint; how many stages are done."""
        at = complete(folder / CHECKPOINT)
        if not at.exists():
            return 0
        progress = checkpoints.read_json(at / PROGRESS)
        self.method.load(at / METHOD, self.model)
        read_state(self.model, at / STATE)
        self.result = SequenceResult.from_dict(progress["result"])
        if (folder / SECONDS).exists():
            self.result.seconds = checkpoints.read_json(folder / SECONDS, list)[: progress["stages"]]
        return int(progress["stages"])

    def _write(self, folder: Path, stage: int) -> None:
        index = self.stages[stage][-1]
        about = {
            "task": self.tasks[index].name,
            "tasks": [self.tasks[i].name for i in self.stages[stage]],
            "method": self.method.to_dict(),
            "options": asdict(self.options),
            "seed": self.seed,
            "base": checkpoints.read_json(folder / checkpoints.CONFIG)["base"],
            "scores": dict(zip(self.result.tasks, self.result.to_dict()["matrix"][index], strict=True)),
        }
        checkpoints.write_json(folder / SECONDS, self.result.seconds)
        write_task(folder, task_folder(index, self.tasks[index].name), self.model, self.method, about)
        self._checkpoint(folder, stage + 1)

    def _checkpoint(self, folder: Path, stages: int) -> None:
        with replaced_folder(folder / CHECKPOINT) as new:
            (new / METHOD).mkdir()
            write_state(self.model, new / STATE)
            self.method.save(new / METHOD)
            progress = {"stages": stages, "result": self.result.to_dict()}
            (new / PROGRESS).write_text(json.dumps(progress) + "\n")


def _mix(seed: int, stage: int) -> int:
    """A seed for each stage that no other seed's stages have."""
    if seed < 0:
        raise ConfigError(f"seed: got {seed}, expected at least 0")
    return seed * 1009 + stage


@contextlib.contextmanager
def _own_randomness(model: nn.Module) -> Iterator[None]:
    """torch's global generators as they were, on leaving."""
    first = next(model.parameters())
    devices = [first.device.index or 0] if first.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
