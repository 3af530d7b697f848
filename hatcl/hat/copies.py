"""Copies that are averaged with the model while it learns (timm's `ModelEmaV3`, torch's `AveragedModel`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import TaskError
from . import digests
from .gates import gates_of
from .held import held, live_for, own_buffers, shared_path
from .tasks import tasks


def seal(model: nn.Module, task: int | None = None) -> None:
    """Harden a task's gates and record the elements it uses, like the end of `hatcl.learn`, in copies that are averaged
    with the model while it learns (timm's `ModelEmaV3`, torch's `AveragedModel`):

        with hatcl.learn(model, 1, optimizer, steps):
            ...
            ema.update(model)
        hatcl.seal(ema.module)

    Everything that earlier sealed tasks use stays as the model has it, bit for bit.

    Args:
        task: the task to seal; default: the one that the copy follows.

    Raises:
        TaskError: the model is not a copy of a learning model, or is learning itself. IntegrityError: an earlier sealed
            task has changed.

    Warns:
        UserWarning: a layer is left without units.
    """
    gates = gates_of(model)
    origin = gates[0].origin
    for g in gates:
        g.notice()
    if task is None:
        if origin is None or origin.task is None:
            raise TaskError(
                f"seal: {type(model).__name__} is no copy that was averaged with a model that learns a task, so there "
                "is nothing to seal; hatcl.learn seals the model itself"
            )
        task = origin.task
    if gates[0].learning is not None:
        raise TaskError(f"seal: task {gates[0].learning} is being learned; leaving its hatcl.learn block seals it")
    refresh_copy(model)
    digests.check_sealed(model, [t for t in tasks(model) if t != task])
    digests.harden(model, task)
    if origin is not None:
        source = origin.gates()
        if source is not None and source.lineage.shape == gates[0].lineage.shape:
            gates[0].lineage[task] |= source.lineage[task].to(gates[0].lineage)
        origin.own.add(task)
        origin.task = None
        origin.kept = _used_by(model, sorted(origin.own))


def let_go(model: nn.Module, task: int) -> None:
    """Reopen a task that was sealed in a copy: its elements are no longer restored, and the copy may follow it."""
    gates = gates_of(model)
    for g in gates:
        if g.origin is not None:
            g.origin.reopen(task, g)
    origin = gates[0].origin
    if origin is not None:
        origin.kept = _used_by(model, sorted(origin.own))


def _used_by(model: nn.Module, tasks: Sequence[int]) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """Tensors, the elements of them that some tasks use (None: all), and their values."""
    out: list[tuple[Tensor, Tensor | None, Tensor]] = []
    for h in held(model):
        where = live_for(h, tasks) if h.task is None and not h.plain else None
        if where is not None or h.task in tasks:
            out.append((h.param, where, h.param.detach().clone()))
    buffers = [b for t in tasks for _, b in own_buffers(model, t)]
    return out + [(b, None, b.clone()) for b in buffers] + [(g.masks, None, g.masks.clone()) for g in gates_of(model)]


def refresh_copy(model: nn.Module) -> None:
    """In a copy that is averaged with the model it was copied from (EMA), reset everything that sealed tasks use to the
    model's values: an average of equal numbers may round, and that of two -0.0 is 0.0. Tasks sealed by the copy itself
    are reset to their values at that time."""
    gates = gates_of(model)
    for g in gates:
        g.notice()
    if gates[0].origin is None or (gates[0].origin.task is None and not gates[0].origin.own):
        return  # the owner may write to a copy that is not averaged
    now = tuple(x._version for x in (*model.parameters(), *model.buffers()))
    if gates[0].origin.seen == now:
        return
    origin = gates[0].origin
    other = origin.model()
    if other is not None and len(gates_of(other)[0].growths) != len(gates[0].growths):
        raise TaskError(
            f"{type(model).__name__}: the model that it was copied from has grown since, and nothing can be averaged "
            "any more; make the copy again after hatcl.grow"
        )
    if other is not None:
        _copy_sealed(other, model, [t for t in tasks(model) if t not in origin.own and t != origin.task])
    with torch.no_grad():
        for x, where, old in origin.kept:
            x.copy_(old if where is None else torch.where(where, old, x))
    origin.seen = tuple(x._version for x in (*model.parameters(), *model.buffers()))


def _copy_sealed(source: nn.Module, model: nn.Module, chosen: Sequence[int]) -> None:
    """Copy everything that these sealed tasks use from `source` to `model`."""
    done = [t for t in tasks(source) if t in chosen]
    theirs = {h.name: h for h in held(source)}
    mine = held(model)
    a, b = shared_path(list(theirs)), shared_path([h.name for h in mine])
    known = {name.removeprefix(a): h for name, h in theirs.items()}
    with torch.no_grad():
        for h in mine:
            other = known.get(h.name.removeprefix(b))
            if other is None or other.param.shape != h.param.shape:
                continue
            if h.task is None and not h.plain:
                live = live_for(h, done)
                if live is not None:
                    h.param.copy_(torch.where(live, other.param, h.param))
            elif h.plain or h.task in done:
                h.param.copy_(other.param)
        buffers = {n.removeprefix(a): x for t in done for n, x in own_buffers(source, t)}
        for t in done:
            for name, x in own_buffers(model, t):
                if (was := buffers.get(name.removeprefix(b))) is not None:
                    x.copy_(was)
