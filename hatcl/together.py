"""One batch of several tasks: each row under its own task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .errors import TaskError
from .forward import call
from .gates import check_task, task
from .lend import Evaluating


def forward(model: nn.Module, x: Any, tasks: Tensor | Sequence[int]) -> Any:
    """What the model says to each row of a batch under that row's task, in evaluation mode:

        hatcl.forward(model, images, tasks=torch.tensor([0, 2, 0, 1]))

    Rows of one task are computed together, so the result is bit for bit what `with hatcl.task(model, t): model(rows)`
    gives for them. The model is lent: its modes are as they were afterwards, and no task is left active.

    Shapes: `B` rows. x: a tensor `[B, ...]`, or a tuple (positional) or mapping (keywords) of which every tensor has B
    rows. tasks: `[B]` integers.

    Args:
        model: a HAT model; every task in `tasks` is sealed.

    Returns:
        The model's output with the rows in the order of x: a tensor `[B, ...]`; where tasks give rows of different
        shapes, such as heads of different widths, a list of B rows. Of an output with several tensors, each of them so.

    Raises:
        TaskError: tasks that do not fit the rows or are not sealed, or an output that has no row per example.
    """
    ids = [int(t) for t in tasks] if _is_flat(tasks) else None
    rows = {len(t) if t.dim() else None for t in tree_flatten(x)[0] if isinstance(t, Tensor)}
    if not ids or rows != {len(ids)}:
        came = f"shape {list(tasks.shape)}" if isinstance(tasks, Tensor) else f"{len(tasks)} of them"
        found = ", ".join("no rows" if n is None else str(n) for n in sorted(rows, key=str)) or "no tensor"
        raise TaskError(
            f"tasks: got {came}, and inputs with {found} rows; pass one integer per row, and inputs of which every "
            "tensor "
            "has a row per example"
        )
    groups = {t: torch.tensor([i for i, own in enumerate(ids) if own == t]) for t in dict.fromkeys(ids)}
    for t in groups:
        check_task(model, t, sealed=True)
    said: dict[int, list[Tensor]] = {}
    with Evaluating(model):
        for t, at in groups.items():
            with task(model, t):
                out = call(model, tree_map(lambda v, at=at: v[at.to(v.device)] if isinstance(v, Tensor) else v, x))
            said[t], form = tree_flatten(out)
            for y in said[t]:
                if not isinstance(y, Tensor) or not y.dim() or len(y) != len(at):
                    came = f"a tensor of shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
                    raise TaskError(
                        f"forward: for {len(at)} rows of task {t} the model gives {came}, which has no row per "
                        "example; "
                        "use `with hatcl.task(...)` for such models"
                    )
    merged = [_merged([(groups[t], said[t][i]) for t in groups], len(ids)) for i in range(len(said[ids[0]]))]
    return tree_unflatten(merged, form) if len(merged) != 1 or not isinstance(out, Tensor) else merged[0]


def _is_flat(tasks: Any) -> bool:
    if isinstance(tasks, Tensor):
        return tasks.dim() == 1 and not tasks.is_floating_point() and tasks.dtype != torch.bool
    return isinstance(tasks, Sequence) and all(isinstance(t, int) and not isinstance(t, bool) for t in tasks)


def _merged(parts: Sequence[tuple[Tensor, Tensor]], rows: int) -> Any:
    """Parts of a batch, each with the places of its rows, as one."""
    if len({(y.shape[1:], y.dtype) for _, y in parts}) == 1:
        order = torch.cat([at for at, _ in parts]).argsort().to(parts[0][1].device)
        return torch.cat([y for _, y in parts])[order]
    out: list[Any] = [None] * rows
    for at, y in parts:
        for i, row in zip(at.tolist(), y, strict=True):
            out[i] = row
    return out
