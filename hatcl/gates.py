"""Gates: every task's embeddings over the units, and what is sealed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import functional as F
from .config import HATConfig
from .errors import CapacityError, TaskError


class Gates(nn.Module):
    """The gates of `U` units for `T` tasks.

    A task's gate is `a = sigmoid(s * e)` while it is learned and exactly 0 or 1 once sealed. The active task is a
    property of the gates (`task`), as is the task being learned (`learning`): what a layer computes follows the first,
    what is frozen follows the second.

    Attributes:
        embeddings: T parameters `[U]`.
        masks: `[T, U]` bool, the hard gates of sealed tasks. sealed: `[T]` bool.
        unit_map: the map the model was converted on (None for layers put together by hand).
        source: how to make the plain model again (its timm name, say), for `from_pretrained`.
        layers: (name, start, stop) bounds of the layers' units, 0-based, for penalties per layer and tables.
    """

    masks: Tensor
    sealed: Tensor
    scale: Tensor

    def __init__(self, units: int, config: HATConfig, layers: Sequence[tuple[str, int, int]] | None = None) -> None:
        super().__init__()
        self.config = config
        self.layers = list(layers) if layers is not None else [("units", 0, units)]
        self.embeddings = nn.ParameterList([self.fresh_embedding(units) for _ in range(config.num_tasks)])
        self.register_buffer("masks", torch.zeros(config.num_tasks, units, dtype=torch.bool))
        self.register_buffer("sealed", torch.zeros(config.num_tasks, dtype=torch.bool))
        self.register_buffer("scale", torch.tensor(float(config.max_scale)), persistent=False)
        self.task: int | None = None
        self.learning: int | None = None
        self.soft = False
        self.settled = False
        self.epoch = 0
        self.from_map = layers is not None
        self._taken_by: tuple[Any, Tensor] = (None, torch.zeros(0, dtype=torch.bool))
        self.digests: dict[int, dict[str, str]] = {}
        self.unit_map: Any = None
        self.source: dict[str, Any] | None = None

    def forward(self, x: Any) -> Any:
        """Nothing: where the converted model is an `nn.Sequential`, its gates are one step of it."""
        return x

    # ---- what layers ask ---------------------------------------------------------------------------------------

    @property
    def num_units(self) -> int:
        return self.masks.shape[1]

    @property
    def num_tasks(self) -> int:
        return self.masks.shape[0]

    def is_soft(self) -> bool:
        """Are the active task's gates soft now? In evaluation without gradients they are what sealing would give."""
        if self.task is None or self.task != self.learning:
            return False
        return self.soft or (not self.settled and (self.training or torch.is_grad_enabled()))

    def select(self, index: slice | Tensor) -> Tensor | None:
        """The active task's gates of some units, as floats; None for the plain model."""
        if self.task is None:
            return None
        e = self.embeddings[self.task]
        if self.is_soft():
            a = F.soft_gate(e[index], self.scale, self.config.max_scale, self.config.compensation_clamp)
            return a if self.config.reuse == "all" else torch.where(self._taken(self.task)[index], 0.0, a)
        on = self._hard_now(self.task) if self.task == self.learning else self.masks[self.task]
        return on[index].to(e.dtype)

    def hard(self, task: int) -> Tensor:
        """`[U]` bool: a task's gates as sealed, or as sealing would make them now."""
        return self.masks[task] if bool(self.sealed[task]) else self._hard_now(task)

    def _hard_now(self, task: int) -> Tensor:
        on = F.hard_gate(self.embeddings[task].detach())
        return on if self.config.reuse == "all" else on & ~self._taken(task)

    def _taken(self, task: int) -> Tensor:
        """`[U]` bool: units that other sealed tasks use."""
        key = (task, self.epoch)
        if self._taken_by[0] != key:
            self._taken_by = (key, self.used(without=task))
        return self._taken_by[1]

    # ---- life of a task ----------------------------------------------------------------------------------------

    def fresh_embedding(self, units: int, like: Tensor | None = None) -> nn.Parameter:
        """A new embedding by `config.init` (Serra et al. 2018, section 2.3; dense: HAT-CL)."""
        c = self.config
        if c.init == "normal":
            e = torch.randn(units)
        elif c.init == "sparse":
            e = torch.where(torch.rand(units) < c.init_density, c.init_value, -c.init_value)
        else:
            e = torch.full((units,), abs(c.init_value) if c.init == "dense" else c.init_value)
        e = e.clamp(-c.clamp, c.clamp)
        return nn.Parameter(e if like is None else e.to(like))

    def used(self, without: int | None = None) -> Tensor:
        """`[U]` bool: units on in any sealed task."""
        rows = self.sealed.clone()
        if without is not None:
            rows[without] = False
        return self.masks[rows].any(0)

    def seal(self, task: int) -> None:
        self.masks[task] = self.hard(task)
        self.sealed[task] = True
        self.epoch += 1

    def unseal(self, task: int) -> None:
        """Forget a task's gates: its row is empty and its embedding new."""
        self.masks[task] = False
        self.sealed[task] = False
        with torch.no_grad():
            self.embeddings[task].copy_(self.fresh_embedding(self.num_units))
        self.epoch += 1

    def add(self, tasks: int) -> None:
        device = self.masks.device
        self.config = self.config.replace(num_tasks=self.num_tasks + tasks)
        like = self.embeddings[0].detach()
        for _ in range(tasks):
            self.embeddings.append(self.fresh_embedding(self.num_units, like))
        self.masks = torch.cat([self.masks, torch.zeros(tasks, self.num_units, dtype=torch.bool, device=device)])
        self.sealed = torch.cat([self.sealed, torch.zeros(tasks, dtype=torch.bool, device=device)])
        self.epoch += 1

    def room(self, task: int) -> dict[str, bool]:
        """Layer -> has it a unit that no other sealed task uses?"""
        used = self.used(without=task)
        return {name: not bool(used[a:b].all()) for name, a, b in self.layers if b > a}

    def penalty(self) -> Tensor:
        """`penalty_weight` times the sparsity penalty of the task being learned, over units no sealed task uses."""
        c = self.config
        e = self.embeddings[self.learning if self.learning is not None else 0]
        a = F.soft_gate(e, self.scale, c.max_scale, c.compensation_clamp)
        bounds = [(start, stop) for _, start, stop in self.layers] if c.penalty == "layer" else None
        return c.penalty_weight * F.sparsity_penalty(a, self.used(), bounds, c.forgiven or 0.0)

    # ---- torch's own -------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is not being learned, also where it was made inside a `hatcl.learn` block."""
        task = None if self.task == self.learning else self.task
        return {**self.__dict__, "task": task, "learning": None, "settled": False, "soft": False}

    def get_extra_state(self) -> Tensor:
        """Digests as bytes: state dicts and safetensors files hold tensors."""
        return torch.frombuffer(
            bytearray(json.dumps({str(t): d for t, d in self.digests.items()}).encode()), dtype=torch.uint8
        )

    def set_extra_state(self, state: Tensor) -> None:
        self.digests = {int(t): d for t, d in json.loads(bytes(state.cpu().tolist())).items()}

    def _apply(self, fn: Any, recurse: bool = True) -> Gates:
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)  # s keeps float32: bfloat16 has too few steps for its annealing
        self.epoch += 1
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.epoch += 1

    def extra_repr(self) -> str:
        return f"units={self.num_units}, tasks={self.num_tasks}, sealed={self.sealed.nonzero().flatten().tolist()}"


class Units:
    """Some units of some gates: what one axis of a parameter belongs to. Entries that are 0 are always on."""

    def __init__(self, gates: Gates, numbers: np.ndarray) -> None:
        self.gates = gates
        self.numbers = np.asarray(numbers, dtype=np.int64)
        n = len(self.numbers)
        first = int(self.numbers[0]) if n else 0
        run = first > 0 and bool((self.numbers == np.arange(first, first + n)).all())
        self.run = slice(first - 1, first - 1 + n) if run else None
        self._share: tuple[Any, float] = (None, 1.0)
        self._fixed: tuple[Any, Tensor | None] = (None, None)
        always = self.numbers == 0
        self._index: dict[torch.device, tuple[Tensor, Tensor | None]] = {}
        if not run:
            index = torch.as_tensor(np.maximum(self.numbers - 1, 0))
            self._index[index.device] = (index, torch.as_tensor(always) if always.any() else None)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fixed": (None, None)}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        if device not in self._index:
            index, always = next(iter(self._index.values()))
            self._index[device] = (index.to(device), None if always is None else always.to(device))
        return self._index[device]

    def gate(self) -> Tensor | None:
        """The active task's gate per entry, `[n]`; None for the plain model."""
        gates = self.gates
        if gates.task is None:
            return None
        if gates.task == gates.learning:
            return self._select()
        key = (gates.task, gates.epoch)  # a sealed task's gates are constants
        if self._fixed[0] != key:
            with torch.inference_mode(False):
                self._fixed = (key, self._select())
        return self._fixed[1]

    def _select(self) -> Tensor | None:
        if self.run is not None:
            return self.gates.select(self.run)
        index, always = self._on(self.gates.masks.device)
        a = self.gates.select(index)
        return a if always is None or a is None else torch.where(always, 1.0, a)

    def share(self) -> float:
        """The share of entries that the active task has on, never quite zero."""
        key = (self.gates.task, self.gates.epoch)
        if self._share[0] != key or self.gates.task == self.gates.learning:
            assert self.gates.task is not None
            on = self.hard(self.gates.task)
            self._share = (key, max(int(on.sum()) / max(len(on), 1), F.SMALLEST_GATE))
        return self._share[1]

    def hard(self, task: int) -> Tensor:
        """A task's hard gate per entry, `[n]` bool."""
        on = self.gates.hard(task)
        if self.run is not None:
            return on[self.run]
        index, always = self._on(on.device)
        return on[index] if always is None else on[index] | always


def gates_of(model: nn.Module) -> list[Gates]:
    """Every `Gates` of a model: one for a converted model, one per layer where layers were put together by hand."""
    found = [m for m in model.modules() if isinstance(m, Gates)]
    if not found:
        raise TaskError(
            f"{type(model).__name__} has no gates: convert it first (hatcl.convert) or build it from HAT layers"
        )
    return found


def check_task(model: nn.Module, task: int | None, *, sealed: bool | None = None) -> int:
    """The task as an int, or `TaskError`. sealed: require that it is (True) or is not (False) sealed."""
    gates = gates_of(model)
    count = min(g.num_tasks for g in gates)
    if isinstance(task, bool) or not isinstance(task, (int, np.integer)):
        raise TaskError(f"task: got {task!r}, expected an integer from 0 to {count - 1}")
    if not 0 <= task < count:
        raise TaskError(
            f"task: got {task}, the model has tasks 0 to {count - 1}; hatcl.add_tasks(model, n) makes room for more"
        )
    is_sealed = bool(gates[0].sealed[task])
    if sealed and not is_sealed:
        done = gates[0].sealed.nonzero().flatten().tolist()
        raise TaskError(
            f"task {task} is not sealed, so it has no hard gates yet; sealed are {done}. Learn it with hatcl.learn"
        )
    if sealed is False and is_sealed:
        raise TaskError(
            f"task {task} is sealed and cannot be learned again; hatcl.forget_task(model, {task}) frees it, or "
            f"learn another"
        )
    return int(task)


def check_room(model: nn.Module, task: int) -> None:
    """Raise `CapacityError` if every unit of every layer is taken by sealed tasks."""
    gates = gates_of(model)
    names = {id(g): path.removesuffix(".gates") for path, g in model.named_modules() if isinstance(g, Gates)}
    room = {n if g.from_map else names[id(g)]: free for g in gates for n, free in g.room(task).items()}
    if room and not any(room.values()):
        full = list(room)
        raise CapacityError(
            f"task {task}: no units left, all {sum(g.num_units for g in gates)} units of {', '.join(full[:5])}"
            f"{' ...' if len(full) > 5 else ''} are used by sealed tasks; forget a task (hatcl.forget_task), raise "
            f"HATConfig.penalty_weight (now {gates[0].config.penalty_weight:g}) for earlier tasks, or use a wider model"
        )


def set_task(model: nn.Module, task: int | None) -> None:
    """Make `task` the active one: 0, 1, ... computes with that task's gates, None is the plain model.

    Raises:
        TaskError: there is no such task, or it is neither sealed nor being learned.
    """
    gates = gates_of(model)
    if task is not None and task != gates[0].learning:
        task = check_task(model, task, sealed=True)
    for g in gates:
        g.task = task


@contextlib.contextmanager
def task(model: nn.Module, task: int | None) -> Iterator[nn.Module]:
    """`with hatcl.task(model, 2): ...` computes with task 2's gates inside the block and restores what was active."""
    before = [(g, g.task) for g in gates_of(model)]
    set_task(model, task)
    try:
        yield model
    finally:
        for g, t in before:
            g.task = t


def tasks(model: nn.Module) -> list[int]:
    """The sealed tasks."""
    return gates_of(model)[0].sealed.nonzero().flatten().tolist()
