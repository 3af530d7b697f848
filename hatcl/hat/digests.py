"""Digests: the proof that sealed tasks have not changed."""

from __future__ import annotations

import hashlib
import warnings
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import IntegrityError
from ..functional import digest_of
from ..map.lora import is_factor
from ..shards import reshard, unsharded
from .gates import SLOT_BYTES, SLOTS, Gates, gates_of
from .held import held, own_buffers, shared_buffers, shared_path
from .tasks import tasks

SEALED_BY = WeakTensorKeyDictionary()  # parameter -> the gates of the model that sealed a task with it


def task_digests(model: nn.Module, task: int) -> dict[str, str]:
    """name -> `dtype:sha256` of everything a sealed task computes with: live elements, own copies, statistics,
    gates."""
    out: dict[str, str] = {}
    reshard(model)  # a hash shares memory with numpy, after which `fully_shard` could not free it
    every = held(model)
    # only the entries from before growths since its sealing: a growth changes no digest
    at = {id(g): g.number_from(g.stages[task])[1:] - 1 for g in gates_of(model)}
    of_gates = {id(g.embeddings[task]): at[id(g)] for g in gates_of(model)}
    names = [h.name for h in every]
    wrapped = shared_path(names)  # a model inside DistributedDataParallel or torch.compile is the same model
    for h in every:
        if h.plain or (h.task is not None and h.task != task):
            continue
        value = unsharded(h.param.detach())
        if h.task is None:
            value = value[h.live(task)] if h.plan is not None else value
        elif id(h.param) in of_gates:
            value = value[of_gates[id(h.param)].to(value.device)]
        out[h.name.removeprefix(wrapped)] = digest_of(value)
    for name, b in [*own_buffers(model, task), *shared_buffers(model)]:
        out[name.removeprefix(wrapped)] = digest_of(b)
    for i, g in enumerate(gates_of(model)):
        out[f"gates {i}"] = digest_of(g.masks[task][at[id(g)].to(g.masks.device)])
    return out


def table_of(digests: dict[str, str]) -> Tensor:
    """`[256, 16]` uint8, of the same size for every model, so that state dicts can be averaged and exchanged: a name's
    digest goes into one of 256 slots, and a slot's row is the start of the SHA-256 of what is in it."""
    slots: dict[int, list[str]] = {}
    for name in sorted(digests):
        slots.setdefault(slot_of(name), []).append(f"{name}={digests[name]}")
    table = torch.zeros(SLOTS, SLOT_BYTES, dtype=torch.uint8)
    for slot, lines in slots.items():
        row = hashlib.sha256("\n".join(lines).encode()).digest()[:SLOT_BYTES]
        table[slot] = torch.frombuffer(bytearray(row), dtype=torch.uint8)
    return table


def slot_of(name: str) -> int:
    """The slot of a name's digest in `table_of`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "big") % SLOTS


def harden(model: nn.Module, task: int) -> None:
    """Make a task's gates hard, make it the active task, and record the elements that it uses."""
    for g in gates_of(model):
        g.seal(task)
        g.task = task
        empty = [
            name
            for name, start, stop in g.layers
            if stop > start and not bool(g.masks[task, start:stop].any()) and not is_factor(name)
        ]  # without pairs, a LoRA layer still passes its base
        if empty:
            warnings.warn(
                f"task {task} uses no unit of {', '.join(empty[:5])}{' ...' if len(empty) > 5 else ''}, so nothing "
                "passes there; lower HATConfig.penalty_weight, start denser (init), or use a wider model",
                stacklevel=4,
            )
    record(model, task)


def record(model: nn.Module, task: int) -> None:
    """Store a task's digest with its gates."""
    gates = gates_of(model)[0]
    _store(gates, task, task_digests(model, task))
    for h in held(model):
        SEALED_BY[h.param] = weakref.ref(gates)


def _store(gates: Gates, task: int, digests: dict[str, str]) -> None:
    gates.digests[task] = digests
    gates.digest_table[task] = table_of(digests).to(gates.digest_table.device)


def check_sealed(model: nn.Module, only: Sequence[int] | None = None) -> None:
    """Compare every sealed task with its digest.

    If the user has cast a parameter (`model.half()`), its bits differ by intent, and its digest is computed again. So
    is every digest while a task is learned that may move elements of sealed ones (`HATConfig.protection`).

    Raises:
        IntegrityError: names the task and the parameters that changed.
    """
    gates = gates_of(model)[0]
    moving = gates.learning is not None and gates.config.protection != "exact"
    for task in tasks(model) if only is None else only:
        row = gates.digest_table[task].cpu()
        if task not in gates.digests and not bool(row.any()):
            continue  # sealed by hand
        now = task_digests(model, task)
        was = gates.digests.get(task)
        if was is None:  # the state was loaded, which brings only the table
            changed = _changed_slots(row, now)
        else:
            changed = [
                name for name, d in was.items()
                if name not in now or (now[name] != d and now[name].split(":")[0] == d.split(":")[0])
            ]  # fmt: skip
        if changed and not moving:
            copied = (
                " It is a copy that was averaged with the model; hatcl.seal(copy) seals what it is now."
                if gates.origin is not None and gates.origin.task is not None
                else ""
            )
            raise IntegrityError(
                f"task {task} was sealed, but {len(changed)} of what it uses changed since: {', '.join(changed[:5])}"
                f"{' ...' if len(changed) > 5 else ''}. Something outside hatcl.learn wrote to the model; "
                f"load the last saved model, or forget the task (hatcl.forget_task).{copied}"
            )
        _store(gates, task, now)


def _changed_slots(row: Tensor, now: dict[str, str]) -> list[str]:
    """The names whose slot of the table differs, including names that share a slot with a changed one."""
    differ = set((table_of(now) != row).any(1).nonzero().flatten().tolist())
    named = [name for name in now if slot_of(name) in differ]
    return named or [f"slot {slot} of its digests" for slot in sorted(differ)]
