"""One batch for several tasks: each row under its own task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..calls import call
from ..errors import TaskError
from ..lend import Evaluating
from .active import choose
from .gates import gates_of
from .tasks import check_task, task


def forward(model: nn.Module, x: Any, tasks: Tensor | Sequence[int], *, fused: bool = False) -> Any:
    """The model's outputs for each row of a batch under that row's task, in evaluation mode:

        hatcl.forward(model, images, tasks=torch.tensor([0, 2, 0, 1]))

    Rows of one task are computed together, so the result is bit-equal to `with hatcl.task(model, t): model(rows)` for
    these rows. Afterwards the modes of the model's modules are restored, and the active task is unchanged.

    Shapes: `B` rows. x: a tensor `[B, ...]`, or a tuple (positional) or mapping (keywords) in which every tensor has B
    rows. tasks: `[B]` integers.

    Args:
        model: a HAT model; every task in `tasks` is sealed.
        fused: compute all tasks in one forward (`torch.vmap` over them), which rounds differently (2e-7 relative,
            measured). Each task is padded to the rows of the largest, and every weight exists once per task.

    Returns:
        The model's output with the rows in the order of x: a tensor `[B, ...]`, or a list of B rows if tasks give rows
        of different shapes, such as heads of different widths. If the output has several tensors, this holds for each.

    Raises:
        TaskError: tasks that do not fit the rows or are not sealed, an output that has no row per example, or, under
            `fused`, a model that cannot compute several tasks at once.
    """
    ids = [int(t) for t in tasks] if _is_flat(tasks) else None
    rows = row_counts(x)
    if not ids or rows != {len(ids)}:
        came = f"shape {list(tasks.shape)}" if isinstance(tasks, Tensor) else f"{len(tasks)} of them"
        raise TaskError(
            f"tasks: got {came}, and inputs with {said_rows(rows)} rows; pass one integer per row, and inputs of which "
            "every tensor has a row per example"
        )
    groups = {t: torch.tensor([i for i, own in enumerate(ids) if own == t]) for t in dict.fromkeys(ids)}
    for t in groups:
        check_task(model, t, sealed=True)
    said: dict[int, list[Tensor]] = {}
    with Evaluating(model):
        answers = _fused(model, x, groups) if fused else (_of_task(model, x, t, at) for t, at in groups.items())
        for (t, at), out in zip(groups.items(), answers, strict=True):
            said[t], form = tree_flatten(out)
            for y in said[t]:
                if not isinstance(y, Tensor) or not y.dim() or len(y) != len(at):
                    came = f"a tensor of shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
                    raise TaskError(
                        f"forward: for {len(at)} rows of task {t} the model gives {came}, which has no row per "
                        "example; use `with hatcl.task(...)` for such models"
                    )
    merged = [_merged([(groups[t], said[t][i]) for t in groups], len(ids)) for i in range(len(said[ids[0]]))]
    return tree_unflatten(merged, form) if len(merged) != 1 or not isinstance(out, Tensor) else merged[0]


def row_counts(x: Any) -> set[int | None]:
    """The numbers of rows of a batch's tensors; None for a tensor without dimensions."""
    return {len(v) if v.dim() else None for v in tree_flatten(_as_dict(x))[0] if isinstance(v, Tensor)}


def said_rows(rows: set[int | None]) -> str:
    """The result of `row_counts` in words, for an error."""
    return ", ".join("no rows" if n is None else str(n) for n in sorted(rows, key=str)) or "no tensor"


def picked(x: Any, at: Tensor) -> Any:
    """Some rows of a batch in which every tensor has a row per example."""
    return tree_map(lambda v: v[at.to(v.device)] if isinstance(v, Tensor) else v, _as_dict(x))


def _as_dict(x: Any) -> Any:
    """A mapping as a dict: torch does not look into other mappings, such as a tokenizer's `BatchEncoding`."""
    return dict(x) if isinstance(x, Mapping) else x


def _of_task(model: nn.Module, x: Any, t: int, at: Tensor) -> Any:
    with task(model, t):
        return call(model, picked(x, at))


def _fused(model: nn.Module, x: Any, groups: dict[int, Tensor]) -> Iterator[Any]:
    """Each task's output, from one forward in which the active task is a tensor."""
    gates = gates_of(model)
    keeping = [g.unit_map.states for g in gates if g.unit_map is not None and g.unit_map.states]
    if keeping:
        raise TaskError(
            f"forward: {next(iter(keeping[0]))} keeps state between forwards, which is one task's at a time; leave out "
            "fused=True"
        )
    before = [t for g in gates for t in range(g.num_tasks) if g.stages[t] < len(g.growths)]
    if before:
        raise TaskError(
            f"forward: task {before[0]} was sealed before the network grew and keeps the sizes of then, so that the "
            "tasks of this model cannot be computed at once; leave out fused=True"
        )
    most = max(map(len, groups.values()))
    padded = torch.stack([torch.cat([at, at[:1].expand(most - len(at))]) for at in groups.values()])
    ids = torch.tensor(list(groups), device=gates[0].masks.device)
    flat, form = tree_flatten(picked(x, padded))
    is_tensor = [isinstance(v, Tensor) for v in flat]
    kept: list[Any] = []

    def one(t: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        left = iter(rows)
        inputs = tree_unflatten([next(left) if own else v for own, v in zip(is_tensor, flat, strict=True)], form)
        with choose([g.key for g in gates], t):
            out, spec = tree_flatten(call(model, inputs))
        kept[:] = [spec]
        return tuple(out)

    for g in gates:
        g.choose()
    try:
        said = torch.vmap(one, randomness="same")(ids, *(v for v, own in zip(flat, is_tensor, strict=True) if own))
    except Exception as error:
        raise TaskError(
            f"forward: {type(model).__name__} cannot compute tasks {list(groups)} at once "
            f"({type(error).__name__}: {error}); leave out fused=True"
        ) from error
    for i, at in enumerate(groups.values()):
        yield tree_unflatten([y[i, : len(at)] for y in said], kept[0])


def _is_flat(tasks: Any) -> bool:
    if isinstance(tasks, Tensor):
        return tasks.dim() == 1 and not tasks.is_floating_point() and tasks.dtype != torch.bool
    return isinstance(tasks, Sequence) and all(isinstance(t, int) and not isinstance(t, bool) for t in tasks)


def _merged(parts: Sequence[tuple[Tensor, Tensor]], rows: int) -> Any:
    """Merge parts of a batch, each with the positions of its rows."""
    if len({(y.shape[1:], y.dtype) for _, y in parts}) == 1:
        order = torch.cat([at for at, _ in parts]).argsort().to(parts[0][1].device)
        return torch.cat([y for _, y in parts])[order]
    out: list[Any] = [None] * rows
    for at, y in parts:
        for i, row in zip(at.tolist(), y, strict=True):
            out[i] = row
    return out
