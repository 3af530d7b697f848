"""Prediction without a given task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...calls import device_of
from ...config import whole
from ...errors import ConfigError, TaskError
from ..tasks import tasks
from ..together import picked, row_counts, said_rows
from .router import TaskRouter


@dataclass(frozen=True, eq=False)
class Prediction:
    """The result of `predict` for a batch of B examples.

    Attributes:
        task, label: `[B]` int64: the task, and the class by the numbers of its own head. probability: `[B]`, their
            joint probability. rejected: `[B]` bool: no task reaches the probability `RouterOptions.threshold`. Task and
            label are then the likeliest ones.
        tasks: the tasks that were considered. task_probability: `[B, T]`, the probability of each.
    """

    task: Tensor
    label: Tensor
    probability: Tensor
    rejected: Tensor
    tasks: list[int]
    task_probability: Tensor


def predict(
    model: nn.Module, x: Any, *, router: TaskRouter, among: Sequence[int] | None = None, top: int | None = None
) -> Prediction:
    """Task and class of each row of a batch, if it is not known which task an input belongs to:

        argmax over t, c of P(t|x) softmax(z_t(x))_c,  rejected where max_t P(t|x) < theta

    with P from the router (see `TaskRouter`) and the logits z_t under task t. This takes one forward per task. With
    `top` it takes one forward for P, from the space of the task that was added first (`TaskRouter.at_first_sight`), and
    for each row one for each of its `top` likeliest tasks; the answer is among these. The model runs in evaluation mode
    without gradients; afterwards its modes and its active task are unchanged.

    Args:
        model: the HAT model of the router, or a copy of it. x: B rows: a tensor, a tuple (positional) or a
            mapping (keywords).
        among: the possible tasks; None = all. The answer is bit-equal to that of a router with only these tasks: with
            `among=range(k)` it is the answer after task k - 1 was added. More tasks may change the answer.
        top: number of tasks that are run for each row; None = all, with evidence from the spaces of all. Rows that are
            run together round as a separate batch, so the last bits of `probability` depend on it. Use it for gates
            over adapters, where `features` of an early block serve all tasks (see `hatcl.hat.features.middle_block`).

    Raises:
        TaskError: a sealed task that is not in the router, or a task in the router that changed in the model (it was
            forgotten, or learned again). ConfigError: inputs that the model does not accept, or without a row per
            example under `top`; a `top` below 1.

    Warns:
        UserWarning: the model computes in another dtype than when a task was added.
    """
    if among is None and (missing := [t for t in tasks(model) if t not in router.tasks]):
        raise TaskError(
            f"predict: task {missing[0]} is sealed and not in the router, which has {router.tasks}, so it could never "
            f"be the answer; call router.add_task({missing[0]}, ...), or say among which tasks: among={router.tasks}"
        )
    chosen = router.chosen(among)
    router.check(model, chosen)
    whole("top", top, optional=True)
    where = device_of(model)
    if top is None:
        return answer_of(router, {t: router.seen(model, x, t) for t in chosen}, where)
    rows = row_counts(x)
    if len(rows) != 1 or None in rows:
        raise ConfigError(
            f"top: got inputs with {said_rows(rows)} rows, expected tensors that all have a row per example, since "
            "each row is run under its own tasks; leave top out"
        )
    p = router.at_first_sight(router.seen(model, x, chosen[0])[0], chosen)
    best = p.topk(min(top, len(chosen)), 1).indices
    joint = [_of_its_rows(model, x, router, t, p[:, i], (best == i).any(1)) for i, t in enumerate(chosen)]
    return _largest(router, chosen, p, joint, where)


def answer_of(router: TaskRouter, seen: Mapping[int, tuple[Tensor, Tensor]], where: torch.device) -> Prediction:
    """The answer from the forwards of all possible tasks.

    Args:
        seen: task -> the result of `TaskRouter.seen`, in the router's order. where: the device of the answer.
    """
    p = router.probabilities({t: h for t, (h, _) in seen.items()}, list(seen))
    joint = [p[:, i : i + 1] * z.cpu().double().softmax(1) for i, (_, z) in enumerate(seen.values())]
    return _largest(router, list(seen), p, joint, where)


def _largest(router: TaskRouter, chosen: list[int], p: Tensor, joint: list[Tensor], where: torch.device) -> Prediction:
    """The task and class of the largest `P(t|x) softmax(z_t(x))_c`.

    Args:
        p: P, `[B, T]`. joint: `P(t|x) softmax(z_t(x))` of each chosen task, `[B, C]`.
    """
    task = torch.cat([torch.full((part.shape[1],), t) for t, part in zip(chosen, joint, strict=True)])
    label = torch.cat([torch.arange(part.shape[1]) for part in joint])
    probability, at = torch.cat(joint, 1).max(1)
    rejected = p.max(1).values < router.options.threshold
    return Prediction(
        task[at].to(where), label[at].to(where), probability.float().to(where), rejected.to(where), chosen,
        p.float().to(where),
    )  # fmt: skip


def _of_its_rows(model: nn.Module, x: Any, router: TaskRouter, task: int, p: Tensor, asked: Tensor) -> Tensor:
    """`P(t|x) softmax(z_t(x))`, `[B, C]`, for the rows that are run under a task; 0 for others."""
    rows = asked.nonzero().flatten()
    if not len(rows):
        return p.new_zeros(len(p), 1)
    z = router.seen(model, picked(x, rows), task, len(rows))[1].cpu().double().softmax(1)
    return p.new_zeros(len(p), z.shape[1]).index_copy_(0, rows, p[rows, None] * z)
