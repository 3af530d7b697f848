"""HAT: each task learns which units it uses, and keeps what it learned bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...calls import call, device_of, moved, seeded
from ...config import BEST
from ...errors import ConfigError, TaskError
from ...files import read_json
from ...functional import digest_of
from ...hat.adapter import as_adapter
from ...hat.certify import certify
from ...hat.describe import describe
from ...hat.gates import gates_of
from ...hat.learn import Learning, learn
from ...hat.tasks import task
from ...lend import Evaluating
from ...skills.tensors import adapters_of
from ..tasks import ContinualTask
from .registry import Batch, Method, continual_method

DIGESTS = "digests.json"
PROBED = 8  # training examples for the certificate
IN_ONE_FORWARD = 64  # training examples, in one forward, that choose the task to start from


@continual_method("hat", paper="Serra et al. 2018, arXiv 1801.01423")
class HardAttention(Method):
    """Learn each task inside `hatcl.learn`, with HAT's penalty, on a model made by `hatcl.convert`, which gates the
    channels of a network or the pairs of a peft model. Each task is scored with its own gates, so backward transfer is
    0 by construction; a task cannot be scored before it is learned, so forward transfer is unknown.

    For each stage it reports `soft_score` (with the soft gates of the last scale), `units_used`, `units`, `loss` and
    `penalty` (means over the last tenth of the steps), and digests of the model's outputs for the task (see
    `ContinualTask.outputs`) at sealing and at the end of the run; for the whole run the certificate (`hatcl.certify` on
    a few training examples of the first task) and the units that each task uses in each layer.

    Its options are those of the model's `HATConfig`.
    """

    ahead = False
    together = True

    def start(self, model: nn.Module, tasks: Sequence[ContinualTask], seed: int) -> None:
        self.tasks = tasks
        self.gates = gates_of(model)[0]  # raises if there are none
        sealed = self.gates.sealed.nonzero().flatten().tolist()
        if sealed or self.gates.num_tasks < len(tasks):
            raise TaskError(
                f"hat: the model has room for {self.gates.num_tasks} tasks, of which {sealed or 'none'} are sealed; "
                f"{len(tasks)} must be learned, starting with the first: convert it again with num_tasks={len(tasks)}"
            )

        for of in tasks:
            _check_inputs(model, of)

    def begin(self, model: nn.Module, stage: int) -> None:
        self.stage = stage
        self.now: list[tuple[float, float, int]] = []  # loss, penalty and size of a step's batches
        self.steps: list[list[float]] = []  # loss and penalty of the stage's steps

    @contextlib.contextmanager
    def watching(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int
    ) -> Iterator[Learning]:
        epochs = self.learning.epochs or self.learning.passes
        examples = _batches_of(self.tasks[self.stage]) if self.gates.config.start_from == BEST else None
        with learn(model, self.stage, optimizer, steps, epochs, start, examples=examples) as self.course:
            yield self.course
            with self.course.soft(), Evaluating(model), torch.no_grad():
                self.soft_score = float(self.tasks[self.stage].score(model))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = batch.loss(model)
        with torch.autocast(loss.device.type, enabled=False):
            penalty = self.course.penalty()
        self.now.append((float(loss.detach()), float(penalty.detach()), len(batch.positions)))
        return loss + penalty

    def after_step(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        sizes = [size for *_, size in self.now]
        self.steps.append([_mean([pair[i] for pair in self.now], sizes) for i in range(2)])
        self.now = []

    def measured(self) -> dict[str, float]:
        loss, penalty = self.steps[-1]
        on = float(self.gates.on(self.stage).float().mean()) if self.gates.num_units else 0.0
        return {"loss": loss, "penalty": penalty, "scale": self.course.scale, "units_on": on}

    def facts(self, model: nn.Module, stage: int) -> dict[str, Any]:
        last = self.steps[-math.ceil(len(self.steps) / 10) :]
        loss, penalty = (_mean([pair[i] for pair in last], [1] * len(last)) for i in range(2))
        gates = gates_of(model)
        return {
            "soft_score": self.soft_score,
            "units_used": sum(int(g.masks[stage].sum()) for g in gates),
            "units": sum(g.num_units for g in gates),
            "loss": loss,
            "penalty": penalty,
            "outputs_sha256": outputs_digest(model, self.tasks[stage], stage),
        }

    def finish(self, model: nn.Module, facts: list[dict[str, Any]]) -> dict[str, Any]:
        for t, known in enumerate(facts):
            known["outputs_sha256_end"] = outputs_digest(model, self.tasks[t], t)
            known["bit_equal"] = known["outputs_sha256_end"] == known["outputs_sha256"]
        certificate = certify(model, moved(self.tasks[0].inputs(PROBED), device_of(model)))
        described = describe(model).to_dict()
        gates, done = gates_of(model), range(len(facts))
        return {
            "exact": certificate.exact,
            "bit_equal": all(known["bit_equal"] for known in facts),
            "max_abs_diff": {str(t): float(diff) for t, diff in certificate.max_abs_diff.items()},
            "units": described["units"],
            "layers": described["layers"],
            "overlap": [[sum(int((g.masks[i] & g.masks[j]).sum()) for g in gates) for j in done] for i in done],
        }

    def scoring(self, model: nn.Module, index: int) -> contextlib.AbstractContextManager[nn.Module]:
        return task(model, index)

    def adapters(self, model: nn.Module) -> list[str] | None:
        """For LoRA pairs a task's own adapter; other units have no tensors that belong to one task."""
        return None if adapters_of(model) else []

    def saving(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Inside, the task's adapter is saved as an ordinary one that computes the same outputs as the task."""
        return as_adapter(model, self.stage) if adapters_of(model) else contextlib.nullcontext()

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.steps = [[float(value) for value in pair] for pair in state["steps"]]

    def save(self, folder: Path) -> None:
        (folder / DIGESTS).write_text(json.dumps(self.gates.digests))

    def load(self, folder: Path, model: nn.Module) -> None:
        stored = read_json(folder / DIGESTS)
        self.gates.digests = {int(t): d for t, d in stored.items()}


def _check_inputs(model: nn.Module, of: ContinualTask) -> None:
    """Check that the model can be called with the result of the task's collate, which the certificate needs.

    Raises:
        ConfigError: the model cannot be called with it.
    """
    try:
        with Evaluating(model), torch.no_grad():
            call(model, moved(of.inputs(), device_of(model)))
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError) as error:
        raise ConfigError(
            f"hat: task {of.name}: the model cannot be called with the result of its collate "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}), so it could not be "
            "certified; let collate return the inputs of the model's forward, or these and labels"
        ) from error


def _batches_of(of: ContinualTask) -> Iterator[Any]:
    """Batches of the task's training examples; a collate that draws random numbers draws the same ones each time."""
    for at in range(0, len(of.train), IN_ONE_FORWARD):
        with seeded():
            batch = of.collate([of.train[i] for i in range(at, min(at + IN_ONE_FORWARD, len(of.train)))])
        yield batch


def outputs_digest(model: nn.Module, of: ContinualTask, index: int) -> str:
    """SHA-256 of the bits of the model's outputs for a task under its gates."""
    with task(model, index):
        said = of.said(model)
    return hashlib.sha256("\n".join(f"{name} {digest_of(said[name])}" for name in said).encode()).hexdigest()


def _mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    return math.fsum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)
