"""Fine-tuning: the loop, what is trained in it, and the pull to the pretrained weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.state import Standing
from ..errors import ConfigError, NonFiniteLossError
from ..lend import lent
from .options import FinetuneOptions
from .tasks import FinetuneTask

Told = Callable[[dict[str, float]], None]


def trained_names(task: FinetuneTask, options: FinetuneOptions | Mapping[str, Any] | None = None) -> list[str]:
    """The parameters of the task's model that fine-tuning with these options may change; `reached` tells which of them
    the loss depends on at all.

    Parameters that require no gradient are left alone. Of tied tensors the first name stands for all.

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
    """The names of the parameters that a gradient reaches inside: those of `trained_names` without what no logits use,
    such as BERT's pooler under label words. They are what a graft can be of."""
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
    on_progress: Told | None = None,
    standing: Standing | None = None,
) -> list[dict[str, float]]:
    """Fine-tune a model in place on a task, by the cross-entropy of its logits.

    The weights with the best accuracy on validation are kept, of equal ones the last; without validation the last. All
    but the parameters of `trained_names` keeps every bit, buffers included (but for `statistics="learned"`). The
    same seed gives the same bits on the same machine; the caller's random state, gradients, `requires_grad` and the
    model's mode are put back. After an exception the model is what it was.

    With `l1` every step is followed by the proximal step of `l1 sum |theta - theta_pre|` at the step's rate,

        d = theta - theta_pre;   theta = theta_pre + sign(d) max(|d| - lr l1 / s, 0)

    so that what the loss pulls away from its pretrained value by less than l1 (the size of its gradient) ends exactly
    there. s is what the optimizer divides an element's step by: 1 for SGD, which is then proximal gradient descent on
    loss + l1 |theta - theta_pre|_1, and `sqrt(v) + eps` with the corrected second moment for AdamW, whose proximal step
    is one in the metric of its own steps (ProxGen, Yun et al. 2020, arXiv 2007.07484). So l1 has the same unit for
    both, and the penalty does not enter AdamW's moments. (A threshold of lr l1 for AdamW too, as decoupled as its
    weight decay, was tried: every element with a steady gradient passes it, however small that is.) The published code
    adds a subgradient to the loss instead, with which no element ends at its pretrained value.

    Args:
        model: the task's own, or a copy of it. options: `FinetuneOptions`, or a mapping of what to change.
        on_progress: told after each step {step, steps, loss}, and beside these {validation} when it has validated.
        standing: where it is kept how far this got, after every minute or as it says; a fine-tuning that was killed
            goes on from there, and ends with the bits of one that was not.

    Returns:
        One entry per validation (and for the last step): step, the mean loss since the entry before, lr, validation
        (where there is one); `kept` is 1 in the entry whose weights the model ends with, else 0.

    Raises:
        ConfigError: options, or a model that is not the task's. NonFiniteLossError: a loss that is not finite.
    """
    chosen = FinetuneOptions().changed(options)
    trained = _trained(model, task, chosen)
    if not len(task.train):
        raise ConfigError(f"task {task.name}: no training examples")
    statistics = _statistics(model) if chosen.statistics == "learned" else {}
    watched = {**trained, **statistics}
    start = {n: t.detach().clone() for n, t in watched.items()}
    device = next(model.parameters()).device
    rng = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with rng, lent(model, trained.values(), statistics.values()):
        torch.manual_seed(chosen.seed)
        try:
            history = _loop(model, task, chosen, trained, watched, start, on_progress or (lambda told: None), standing)
        except BaseException:
            _put(watched, start)
            raise
    return history


def _loop(
    model: nn.Module,
    task: FinetuneTask,
    options: FinetuneOptions,
    trained: dict[str, nn.Parameter],
    watched: dict[str, Tensor],
    start: dict[str, Tensor],
    tell: Told,
    standing: Standing | None,
) -> list[dict[str, float]]:
    optimizer = _optimizer(model, trained, options)
    steps = options.steps(len(task.train))
    order = _order(len(task.train), options.batch_size, options.seed)
    begun = 0
    history: list[dict[str, float]] = []
    losses: list[float] = []
    best: tuple[float, dict[str, Tensor], int] | None = None
    _mode(model, options)
    if standing is not None and (kept := standing.read(start)) is not None:
        begun, history, losses, best = (kept[name] for name in ("step", "history", "losses", "best"))
        _put(watched, kept["tensors"])
        optimizer.load_state_dict(kept["optimizer"])
        for _ in range(begun):
            next(order)
    for step in range(begun, steps):
        rate = options.rate(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = next(order)
        loss = task.loss(model, task.batch("train", ids))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"task {task.name}, step {step}: the loss is {value}; lower lr ({options.lr:g}), or look at the "
                f"examples {ids[:4]} ..."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if options.clip_grad:
            nn.utils.clip_grad_norm_(trained.values(), options.clip_grad)
        optimizer.step()
        if options.l1:
            pull_(trained, start, reach(optimizer, trained, rate * options.l1))
        losses.append(value)
        told = {"step": step + 1.0, "steps": float(steps), "loss": value}
        if (step + 1) % options.evaluate_every == 0 or step + 1 == steps:
            entry = {"step": step + 1.0, "loss": sum(losses) / len(losses), "lr": rate, "kept": 0.0}
            if len(task.validation):
                entry["validation"] = told["validation"] = task.accuracy(model, "validation")
                if best is None or entry["validation"] >= best[0]:
                    best = (entry["validation"], {n: t.detach().clone() for n, t in watched.items()}, len(history))
            history.append(entry)
            losses = []
        if standing is not None and step + 1 < steps and standing.due():
            standing.write(
                step=step + 1, history=history, losses=losses, best=best, optimizer=optimizer.state_dict(),
                tensors={n: t.detach() for n, t in watched.items()},
            )  # fmt: skip
        tell(told)
    if best is not None:
        _put(watched, best[1])
    history[-1 if best is None else best[2]]["kept"] = 1.0
    return history


@torch.no_grad()
def pull_(trained: Mapping[str, Tensor], start: Mapping[str, Tensor], by: Mapping[str, Tensor | float]) -> None:
    """Move every element towards its start by this much, and no further: those within reach are exactly there."""
    for name, reach in by.items():
        p, goal = trained[name], start[name]
        away = p - goal
        p.copy_(torch.where(away.abs() <= reach, goal, p - reach * away.sign()))


@torch.no_grad()
def reach(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter], by: float
) -> dict[str, Tensor | float]:
    """How far the pull reaches after a step: `by` divided by what the optimizer divides an element's step by."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return dict.fromkeys(trained, by)
    found: dict[str, Tensor | float] = {}
    group = optimizer.param_groups[0]
    for name, p in trained.items():
        state = optimizer.state.get(p)
        if state:  # one that never had a gradient has not moved
            corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
            found[name] = by / (corrected.sqrt() + group["eps"])
    return found


def _trained(model: nn.Module, task: FinetuneTask, options: FinetuneOptions) -> dict[str, nn.Parameter]:
    names = trained_names(task, options)
    have = dict(model.named_parameters())
    lacking = [n for n in names if n not in have or have[n].shape != task.model.get_parameter(n).shape]
    if lacking:
        raise ConfigError(
            f"task {task.name}: {type(model).__name__} has no {lacking[0]} of its shape ({len(lacking)} such tensors); "
            "pass task.model or a copy of it"
        )
    return {n: have[n] for n in names}


def _optimizer(
    model: nn.Module, trained: Mapping[str, nn.Parameter], options: FinetuneOptions
) -> torch.optim.Optimizer:
    """Decay is not of biases and norms: of what has one dimension."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trained.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum)
    return torch.optim.AdamW(groups, lr=options.lr)


def _order(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Batches without end: each pass has every example once, in batches of nearly equal size, at most `size` (a last
    batch of one image would break batch norms that learn their statistics)."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from (ids.tolist() for ids in order.tensor_split(-(-count // size)))


def _mode(model: nn.Module, options: FinetuneOptions) -> None:
    model.train(options.dropout)
    for m in model.modules():
        if _keeps_statistics(m):
            m.train(options.statistics == "learned")


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module._buffers.get("running_mean"), Tensor)


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}" if path else name: b
        for path, m in model.named_modules() if _keeps_statistics(m)
        for name, b in m._buffers.items() if b is not None
    }  # fmt: skip


@torch.no_grad()
def _put(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, t in tensors.items():
        t.copy_(values[name])
