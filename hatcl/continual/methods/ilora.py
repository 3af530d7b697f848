"""I-LoRA: a plastic adapter that learns and a stable one that follows, with a memory (Ren et al. 2024, arXiv
2402.18865)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config import number, one_of, whole
from ...errors import ConfigError, SkillError
from ...files import read_json
from ...skills.hidden import Hidden, hidden_states_of
from ...skills.ilora import ILoRA
from ...skills.ilora_config import ILoRAConfig
from ..tasks import ContinualTask
from .registry import Batch, Method, continual_method
from .replay import MEMORY, mean_loss, read_memory, together

COUNTS = "counts.json"


@continual_method("ilora", paper="Ren et al. 2024, arXiv 2402.18865")
class InterpolatedLoRA(Method):
    """The loss of a batch, plus `replay` times that of examples of earlier tasks, plus `consistency_weight` times the
    mean squared error between the plastic and the stable adapter's hidden states of those; after each step
    `stable = ema_alpha * stable + (1 - ema_alpha) * plastic`. The plastic adapter goes on from task to task, and stays
    the active one; what is scored is the stable one: `model.set_adapter("stable")` gives the scores reported.

    The authors' code has the mean of the two losses; up to the weight of the consistency that is `replay=1`. Examples
    of several tasks are batched task by task, and the error is the mean over those batches. The memory is as in
    `Replay`: a task's examples enter when it is finished.
    """

    lora = "with_head"

    @dataclass(frozen=True)
    class Options:
        """Args:
        ema_alpha, consistency_weight, ilora_buffer_size, selective_update, min_update_threshold,
            hidden_state_layers: see `ILoRAConfig`.
        replay: weight of the loss on the memory's examples, 0 = none. samples: how many are drawn per step.
        on: take the consistency on the `memory` or on the current `batch` (then `replay` must be 0).
        scored: which adapter is scored, `stable` or `plastic`.
        """

        ema_alpha: float = 0.999
        consistency_weight: float = 1.0
        ilora_buffer_size: int = 500
        selective_update: bool = False
        min_update_threshold: float = 0.1
        hidden_state_layers: tuple[int, ...] = (-1,)
        replay: float = 1.0
        samples: int = 16
        on: str = "memory"
        scored: str = "stable"

        def __post_init__(self) -> None:
            object.__setattr__(self, "hidden_state_layers", self.config.hidden_state_layers)
            one_of("on", self.on, ("memory", "batch"))
            one_of("scored", self.scored, ("stable", "plastic"))
            whole("samples", self.samples)
            number("replay", self.replay, 0)
            if self.replay and self.on == "batch":
                raise ConfigError(f"replay: got {self.replay!r} with on='batch', expected 0; it is of the memory")

        @property
        def config(self) -> ILoRAConfig:
            """The part of it that is `ILoRA`'s."""
            return ILoRAConfig(
                use_ilora=True,
                ema_alpha=self.ema_alpha,
                consistency_weight=self.consistency_weight,
                ilora_buffer_size=self.ilora_buffer_size,
                selective_update=self.selective_update,
                min_update_threshold=self.min_update_threshold,
                hidden_state_layers=self.hidden_state_layers,
            )

    def start(self, model: nn.Module, tasks: Sequence[ContinualTask], seed: int) -> None:
        self.tasks, o = tasks, self.options
        self.two = ILoRA(
            model,
            o.config,
            hidden_states=_hidden,
            loss=lambda model, batches: mean_loss(model, batches),
            collate=lambda drawn: together(tasks, drawn),
            on=o.on,
            replay=o.replay,
            batch_size=o.samples,
            seed=seed,
        )

    def begin(self, model: nn.Module, stage: int) -> None:
        if stage:
            self.two.next_task(stage)

    def watching(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int
    ) -> contextlib.AbstractContextManager[Any]:
        return self.two.watch(optimizer)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch.loss(model) + self.two.loss([batch])

    def end(self, model: nn.Module, stage: int) -> None:
        self.two.remember((stage, position) for position in range(len(self.tasks[stage].train)))

    def scoring(self, model: nn.Module, index: int) -> contextlib.AbstractContextManager[Any]:
        return self.two.stable_active() if self.options.scored == "stable" else contextlib.nullcontext()

    def adapters(self, model: nn.Module) -> list[str]:
        return [self.two.plastic, self.two.stable]

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


def _hidden(model: nn.Module, batches: Sequence[Batch]) -> list[Hidden]:
    """Of each batch one `Hidden` per stack of layers."""
    out: list[Hidden] = []
    for batch in batches:
        tokens = batch.task.collate(batch.examples)
        if batch.task.hidden is not None:
            given = list(batch.task.hidden(model, tokens))
        elif isinstance(tokens, Mapping):
            given = list(hidden_states_of(model, tokens))
        else:
            raise SkillError(
                f"task {batch.task.name}: its batches are of {type(tokens).__name__}, from which ilora knows no way "
                "to hidden states; give ContinualTask(hidden=...), or consistency_weight=0"
            )
        stacks = [h for h in given if isinstance(h, Hidden)]
        out += stacks or [Hidden([h for h in given if isinstance(h, Tensor)])]
    return out
