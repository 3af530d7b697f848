"""Fine-tuning: the loop, the trained parameters, and the pull to the pretrained weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import device_of, seeded
from ..engine.loop import Loop, Tell, Work
from ..engine.options import LoopOptions
from ..engine.state import Modes, Standing, copies_of, undone_on_error, write_all
from ..errors import ConfigError, IntegrityError
from ..functional import digest_of
from ..lend import lent
from .options import FinetuneOptions
from .tasks import FinetuneTask


def trained_names(task: FinetuneTask, options: FinetuneOptions | Mapping[str, Any] | None = None) -> list[str]:
    """The parameters of the task's model that fine-tuning with these options may change; `reached` finds those that the
    loss depends on.

    Parameters that require no gradient stay fixed. The first name of tied tensors stands for all.

    Raises:
        ConfigError: none is left.
    """
    chosen = FinetuneOptions().changed(options)
    fix_head = task.fixed_head if chosen.fix_head is None else chosen.fix_head
    fixed = set(task.embeddings if chosen.fix_embeddings else ()) | set(task.head if fix_head else ())
    names = [n for n, p in task.model.named_parameters() if p.requires_grad and p.is_floating_point()]
    names = [n for n in names if n not in fixed]
    if chosen.train_bias_only:
        names = [n for n in names if n.endswith("bias") or n in task.fresh]
    if not names:
        raise ConfigError(
            f"task {task.name}: nothing is left to train with fix_embeddings={chosen.fix_embeddings}, fix_head="
            f"{fix_head}, train_bias_only={chosen.train_bias_only}; leave one of them out"
        )
    return names


@contextlib.contextmanager
def reached(model: nn.Module) -> Iterator[set[str]]:
    """Yields the names of the parameters that a gradient reaches inside the block: those of `trained_names` without
    parameters that no logits use, such as BERT's pooler under label words. A graft can hold these."""
    found: set[str] = set()
    hooks = [
        p.register_post_accumulate_grad_hook(lambda _, name=name: found.add(name))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def finetune_(
    model: nn.Module,
    task: FinetuneTask,
    options: FinetuneOptions | Mapping[str, Any] | None = None,
    on_progress: Tell | None = None,
    standing: Standing | None = None,
) -> list[dict[str, float]]:
    """Fine-tune a model in place on a task, with the cross-entropy of its logits.

    The weights with the best score on validation (`FinetuneTask.measure`) are kept, the last ones among equals; without
    validation the last. Everything but the parameters of `trained_names` keeps every bit, including buffers (except
    with `statistics="learned"`). The same seed gives the same bits on the same machine; the caller's random state,
    gradients, `requires_grad` and the model's mode are restored. After an exception the model is as it was. In a model
    in training mode, modules that are in evaluation mode stay in it.

    With `l1` every step is followed by the proximal step of `l1 sum |theta - theta_pre|` at the step's rate,

        d = theta - theta_pre;   theta = theta_pre + sign(d) max(|d| - lr l1 / s, 0)

    so that an element whose gradient away from its pretrained value is smaller than l1 ends exactly there. s is the
    optimizer's divisor of an element's step: 1 for SGD, which is then proximal gradient descent on loss + l1 |theta -
    theta_pre|_1, and `sqrt(v) + eps` with the corrected second moment for AdamW, whose proximal step is one in the
    metric of its own steps (ProxGen, Yun et al. 2020, arXiv 2007.07484). So l1 has the same unit for both, and the
    penalty does not enter AdamW's moments. (A threshold of lr l1 for AdamW too, decoupled like its weight decay, was
    tried: every element with a steady gradient passes it, however small the gradient is.) The published code adds a
    subgradient to the loss instead, with which no element ends at its pretrained value.

    Args:
        model: the task's own, or a copy of it. options: `FinetuneOptions`, or a mapping of the options to change.
        on_progress: called after each step, with `measured` {validation} when it has validated, and each epoch.
        standing: the checkpoint, by default written every minute. A killed fine-tuning resumes from it and ends with
            the same bits as an uninterrupted one.

    Returns:
        One entry per validation (and for the last step): step, the mean loss since the entry before, lr, validation
        (if there is one); `kept` is 1 in the entry whose weights the model keeps, else 0.

    Raises:
        ConfigError: options do not fit, or the model is not the task's. NonFiniteLossError: a loss or gradient is not
            finite. IntegrityError: the checkpoint is damaged, or belongs to a model that started with other bits.
    """
    chosen = FinetuneOptions().changed(options)
    trained = _trained_parameters(model, task, chosen)
    if not len(task.train):
        raise ConfigError(f"task {task.name} has no training examples")
    statistics = _statistics(model) if chosen.statistics == "learned" else {}
    modes = Modes(model)
    with (
        seeded(chosen.seed, device_of(model)),
        lent(model, trained.values(), statistics.values()),
        undone_on_error({**trained, **statistics}) as start,
    ):
        work = _Tuning(model, task, chosen, trained, {**trained, **statistics}, start, modes)
        Loop(work, chosen, standing=standing, tell=on_progress).run()
        return work.finish()


class _Tuning(Work):
    """Fine-tuning as a loop's work."""

    kind = "hatcl.finetuning"
    promise = "The model is as it was before"

    def __init__(
        self,
        model: nn.Module,
        task: FinetuneTask,
        options: FinetuneOptions,
        trained: dict[str, nn.Parameter],
        watched: dict[str, Tensor],
        start: dict[str, Tensor],
        modes: Modes,
    ) -> None:
        super().__init__(task.name, model, trained.values(), options.seed)
        self.task, self.options, self.by_name, self.watched, self.start = task, options, trained, watched, start
        self.modes = modes
        self.order = torch.Generator().manual_seed(options.seed)
        self.generators = [self.order]
        self.history: list[dict[str, float]] = []
        self.losses: list[float] = []  # since the last entry
        self.best: tuple[float, dict[str, Tensor], int] | None = None

    def trained(self, options: LoopOptions) -> list[dict[str, Any]]:
        """The groups of parameters; weight decay skips one-dimensional parameters (biases and norms)."""
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in self.parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return [g for g in groups if g["params"]]

    def set_mode(self) -> None:
        if self.options.dropout:
            self.modes.train()
        else:
            self.model.eval()
        for m in self.model.modules():
            if _keeps_statistics(m) and m not in self.modes.frozen:
                m.train(self.options.statistics == "learned")

    def epoch_length(self) -> int:
        return -(-len(self.task.train) // self.options.batch_size)

    def batches(self, epoch: int) -> list[list[int]]:
        """Batches with every example once, of nearly equal size (a last batch of one image would break batch norms that
        learn their statistics)."""
        order = torch.randperm(len(self.task.train), generator=self.order)
        return [ids.tolist() for ids in order.tensor_split(self.epoch_length())]

    def loss(self, batch: list[int]) -> Tensor:
        return self.task.loss(self.model, self.task.batch("train", batch))

    def size(self, batch: list[int]) -> float:
        return len(batch)

    def said_of(self, batch: list[int]) -> str:
        return f"the examples {batch[:4]} ..."

    def after_step(self, loop: Loop, batches: list[Any]) -> dict[str, float]:
        if self.options.l1:
            pull_(self.by_name, self.start, reach(loop.optimizer, self.by_name, loop.rate * self.options.l1))
        self.losses.append(loop.losses[-1])
        if loop.step % self.options.evaluate_every and not loop.finished:
            return {}
        entry = {"step": float(loop.step), "loss": sum(self.losses) / len(self.losses), "lr": loop.rate, "kept": 0.0}
        measured = {}
        if len(self.task.validation):
            entry["validation"] = measured["validation"] = self.task.score(self.model, "validation")
            if self.best is None or entry["validation"] >= self.best[0]:
                self.best = (entry["validation"], copies_of(self.watched), len(self.history))
        self.history.append(entry)
        self.losses = []
        return measured

    def finish(self) -> list[dict[str, float]]:
        """Load the best weights into the model, and return the measurements."""
        if self.best is not None:
            write_all(self.watched, self.best[1])
        self.history[-1 if self.best is None else self.best[2]]["kept"] = 1.0
        return self.history

    @functools.cached_property
    def began(self) -> dict[str, str]:
        """Digests of the start, computed lazily: most runs end before they are needed."""
        return {name: digest_of(t) for name, t in self.start.items()}

    def state(self) -> dict[str, Any]:
        tensors = {n: t.detach() for n, t in self.watched.items()}
        own = {"history": self.history, "losses": self.losses, "best": self.best}
        return {"began": self.began, "tensors": tensors, **own}

    def load_state(self, state: Mapping[str, Any], where: object) -> None:
        ours, theirs = self.began, state["began"]
        wrong = next((n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)), None)
        if wrong is not None:
            raise IntegrityError(
                f"{where}: {wrong} had other values when this fine-tuning began; give the model that it began with, "
                "or remove the checkpoint to start from the beginning"
            )
        write_all(self.watched, state["tensors"])
        self.history, self.losses, self.best = state["history"], state["losses"], state["best"]


@torch.no_grad()
def pull_(trained: Mapping[str, Tensor], start: Mapping[str, Tensor], by: Mapping[str, Tensor | float]) -> None:
    """Move every element towards its start by this much and no further: elements within reach end exactly there."""
    for name, reach in by.items():
        p, goal = trained[name], start[name]
        away = p - goal
        p.copy_(torch.where(away.abs() <= reach, goal, p - reach * away.sign()))


@torch.no_grad()
def reach(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter], by: float
) -> dict[str, Tensor | float]:
    """The reach of the pull after a step: `by` divided by the optimizer's divisor of an element's step."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return dict.fromkeys(trained, by)
    found: dict[str, Tensor | float] = {}
    group = optimizer.param_groups[0]
    for name, p in trained.items():
        state = optimizer.state.get(p)
        if state:  # an element without any gradient has not moved
            corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
            found[name] = by / (corrected.sqrt() + group["eps"])
    return found


def _trained_parameters(model: nn.Module, task: FinetuneTask, options: FinetuneOptions) -> dict[str, nn.Parameter]:
    names = trained_names(task, options)
    have = dict(model.named_parameters())
    lacking = [n for n in names if n not in have or have[n].shape != task.model.get_parameter(n).shape]
    if lacking:
        raise ConfigError(
            f"task {task.name}: {type(model).__name__} has no {lacking[0]} of its shape ({len(lacking)} such tensors); "
            "pass task.model or a copy of it"
        )
    return {n: have[n] for n in names}


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module._buffers.get("running_mean"), Tensor)


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}" if path else name: b
        for path, m in model.named_modules() if _keeps_statistics(m)
        for name, b in m._buffers.items() if b is not None
    }  # fmt: skip
