"""I-LoRA: a plastic adapter that learns and a stable one that follows, with a memory (Ren et al. 2024, arXiv
2402.18865)."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config import number, one_of, whole
from ...errors import ConfigError, SkillError
from ...files import read_json
from ...skills import ilora_files
from ...skills.hidden import Hidden, hidden_states_of
from ...skills.ilora import ON, ILoRA
from ...skills.ilora_config import ILoRAConfig
from ..tasks import ContinualTask
from .registry import Batch, Method, continual_method
from .replay import MEMORY, mean_loss, read_memory, together

COUNTS = "counts.json"


@continual_method("ilora", paper="Ren et al. 2024, arXiv 2402.18865")
class InterpolatedLoRA(Method):
    """The loss of a batch, plus `replay` times that of examples of earlier tasks, plus `consistency_weight` times the
    mean squared error between the plastic and the stable adapter's hidden states for those; after each step `stable =
    ema_alpha * stable + (1 - ema_alpha) * plastic`. The plastic adapter passes from task to task and stays the active
    one; the stable one is scored: `model.set_adapter("stable")` gives the reported scores.

    The authors' code takes the mean of the two losses, which is `replay=1` up to the weight of the consistency.
    Examples of several tasks are batched per task, and the error is the mean over these batches. The memory works as in
    `Replay`: a task's examples enter when it is finished.

    This method also has all twelve options of `ILoRAConfig`. `use_ilora=False` is plain training. Unless
    `save_ema_adapter=False`, `ILoRA.load` can read each task's folder, and a run over the next task can continue from
    it with `previous_task_model` (the run's folder, or the task's) and `prev_task_id` (the task's name).
    `current_task_id` defaults to the task's name.
    """

    lora = "with_head"

    @dataclass(frozen=True)
    class Options(ILoRAConfig):
        """Args:
        replay: weight of the loss on the memory's examples, 0 = none. samples: the number drawn per step.
        on: take the consistency on the `memory` or on the current `batch` (then `replay` must be 0).
        scored: which adapter is scored, `stable` or `plastic`.
        """

        replay: float = 1.0
        samples: int = 16
        on: str = "memory"
        scored: str = "stable"

        def __post_init__(self) -> None:
            super().__post_init__()
            one_of("on", self.on, ON)
            one_of("scored", self.scored, ("stable", "plastic"))
            whole("samples", self.samples)
            number("replay", self.replay, 0)
            if self.replay and self.on == "batch":
                raise ConfigError(f"replay: got {self.replay!r} with on='batch', expected 0; replay needs the memory")

        @property
        def config(self) -> ILoRAConfig:
            """The options that belong to `ILoRA`."""
            return ILoRAConfig(**{f.name: getattr(self, f.name) for f in fields(ILoRAConfig)})

    def start(self, model: nn.Module, tasks: Sequence[ContinualTask], seed: int) -> None:
        o = self.options
        self.tasks = list(tasks)
        if o.current_task_id is not None and len(tasks) > 1:
            raise ConfigError(
                f"current_task_id: got {o.current_task_id!r} for {len(tasks)} tasks, which have their own names; "
                "leave it out"
            )
        if o.use_ilora and o.save_ema_adapter:
            ilora_files.check_saveable([_as_stored(t.train[0]) for t in tasks])
        self.two = ILoRA(
            model,
            o.config,
            hidden_states=_hidden,
            loss=lambda model, batches: mean_loss(model, batches),
            collate=lambda drawn: together(self.tasks, drawn),
            on=o.on,
            replay=o.replay,
            batch_size=o.samples,
            seed=seed,
        )
        self._know_again()

    def _know_again(self) -> None:
        """Add the examples remembered by an earlier run as further tasks after this run's.

        Raises:
            ConfigError: they belong to a task for which this run has no loss.
        """
        state = self.two.memory.state_dict()
        if not state["examples"]:
            return
        place: dict[str, int] = {}
        for i, (name, example) in enumerate(state["examples"]):
            if name not in place:
                own = next((t for t in self.tasks if t.name == name), self.tasks[0])
                if own.name != name and not own.shared:
                    raise ConfigError(
                        f"previous_task_model: its memory holds examples of the task {name!r}, whose labels this run "
                        f"does not know; give the task as well (--task {name}=FILE), or learn all tasks in one run"
                    )
                place[name] = len(self.tasks)
                self.tasks.append(replace(own, name=name, train=[]))
            known: Any = self.tasks[place[name]].train
            state["examples"][i] = (place[name], len(known))
            known.append(example)
        self.two.memory.load_state_dict(state)

    def begin(self, model: nn.Module, stage: int) -> None:
        two = self.two
        if not two.enabled or (not stage and two.config.current_task_id is not None):
            return
        # by the tasks' names, so that a process that resumes in this stage gives the same result
        two.config = replace(two.config, current_task_id=_task_id(self.tasks[max(stage - 1, 0)].name))
        if stage:
            two.next_task(_task_id(self.tasks[stage].name))

    def watching(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int
    ) -> contextlib.AbstractContextManager[Any]:
        return self.two.watch(optimizer)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch.loss(model) + self.two.loss([batch])

    def measured(self) -> dict[str, float]:
        """The two terms of the last batch, before their weights."""
        return {name: float(term) for name, term in self.two.terms.items()}

    def end(self, model: nn.Module, stage: int) -> None:
        self.two.remember((stage, position) for position in range(len(self.tasks[stage].train)))

    def scoring(self, model: nn.Module, index: int) -> contextlib.AbstractContextManager[Any]:
        return self.two.stable_active() if self.options.scored == "stable" else contextlib.nullcontext()

    def adapters(self, model: nn.Module) -> list[str] | None:
        if not self.two.enabled:
            return None
        return [self.two.plastic, *([self.two.stable] if self.options.save_ema_adapter else [])]

    def write(self, model: nn.Module, folder: Path) -> None:
        if self.two.enabled and self.options.save_ema_adapter:
            state = self.two.memory.state_dict()
            tasks = self.tasks
            state["examples"] = [(tasks[i].name, _as_stored(tasks[i].train[k])) for i, k in state["examples"]]
            ilora_files.save_beside(self.two, folder, state)

    def state(self) -> dict[str, Any]:
        return {"memory": self.two.memory.state_dict(), "steps": self.two.steps, "moves": self.two.moves}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.two.memory.load_state_dict(state["memory"])
        self.two.steps, self.two.moves = int(state["steps"]), int(state["moves"])

    def save(self, folder: Path) -> None:
        torch.save(self.two.memory.state_dict(), folder / MEMORY)
        (folder / COUNTS).write_text(json.dumps({"steps": self.two.steps, "moves": self.two.moves}))

    def load(self, folder: Path, model: nn.Module) -> None:
        read_memory(self.two.memory, folder / MEMORY, self.tasks)
        counts = read_json(folder / COUNTS)
        self.two.steps, self.two.moves = counts["steps"], counts["moves"]


def _task_id(name: str) -> str:
    """A task's name in a form that a folder can have."""
    return re.sub(r"[/\\\0]", "_", name)


def _as_stored(example: Any) -> Any:
    """An example in the form that a memory stores: plain texts, and pairs as tuples."""
    if isinstance(example, str):
        return str(example)
    return tuple(_as_stored(x) for x in example) if isinstance(example, tuple) else example


def _hidden(model: nn.Module, batches: Sequence[Batch]) -> list[Hidden]:
    """For each batch one `Hidden` per stack of layers."""
    out: list[Hidden] = []
    for batch in batches:
        tokens = batch.task.collate(batch.examples)
        if batch.task.hidden is not None:
            given = list(batch.task.hidden(model, tokens))
        elif isinstance(tokens, Mapping):
            given = list(hidden_states_of(model, tokens))
        else:
            raise SkillError(
                f"task {batch.task.name}: its batches are {type(tokens).__name__}, for which ilora cannot compute "
                "hidden states; give ContinualTask(hidden=...), or consistency_weight=0"
            )
        stacks = [h for h in given if isinstance(h, Hidden)]
        out += stacks or [Hidden([h for h in given if isinstance(h, Tensor)])]
    return out
