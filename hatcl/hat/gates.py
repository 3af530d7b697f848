"""Gates: every task's embeddings over the units, and the masks of sealed tasks."""

from __future__ import annotations

import copy
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..config import HATConfig
from ..errors import TaskError
from ..shards import unsharded
from . import active
from .arrays import array_masks
from .growth.grown import Growth, key_of
from .soft import SoftGates, kept_gate, soft_key

_MOMENT = frozenset(
    ("epoch", "lock", "sharded", "learning", "origin", "training", "cut", "stages", "_default", "_ever_active")
)
SLOTS, SLOT_BYTES = 256, 16
"""Size of a task's row in `Gates.digest_table`."""

_context_keys = itertools.count()


class Origin:
    """The gates that a copy was made from. An averaged copy of a model (EMA) evaluates the task that the source was
    learning when the average was last updated.

    Attributes:
        task: the task that the copy follows. own: tasks that the copy sealed itself. kept: (tensor of the copy, mask of
            the elements that those tasks use or None for all, their values). seen: the versions of the copy's tensors
            when sealed values were last restored.
    """

    def __init__(self, source: Gates, copied: Gates) -> None:
        self.gates = weakref.ref(source)
        self.task = source.learning
        self.own: set[int] = set()
        self.kept: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self.seen: Any = None
        self._sealed = set(copied.sealed.nonzero().flatten().tolist())
        self.forget_writes(copied)

    def forget_writes(self, copied: Gates) -> None:
        """Do not count past writes to the copy, such as a loaded state, as averages."""
        self._versions = [e._version for e in copied.embeddings]

    def model(self) -> nn.Module | None:
        """The model that was copied, if it has learned anything since."""
        source = self.gates()
        return None if source is None or source.model is None else source.model()

    def reopen(self, task: int, copied: Gates) -> None:
        """The copy reopens a task that it sealed, so it may follow that task after the next average."""
        self.own.discard(task)
        self._sealed.discard(task)
        self.forget_writes(copied)

    def follow(self, copied: Gates) -> bool:
        """Follow the task that the copy was last averaged for. True if this is a new task."""
        task = self.averaged(copied)
        self.task = self.task if task is None else task
        return task is not None

    def averaged(self, copied: Gates) -> int | None:
        """The new task that the copy must follow; None if it has not changed."""
        source = self.gates()
        task = None if source is None else source.learned
        if task is None or task == self.task or task in self._sealed or task in self.own:
            return None
        if task >= len(self._versions) or copied.embeddings[task]._version == self._versions[task]:
            return None  # nothing was written to the copy
        return task


class Gates(nn.Module):
    """The gates of `U` units for `T` tasks.

    A task's gate is `a = sigmoid(s * e)` while it is learned and exactly 0 or 1 once sealed. The active task (`task`)
    determines the output of a layer; the task being learned (`learning`) determines which elements are frozen.

    Attributes:
        embeddings: T parameters `[U]`.
        masks: `[T, U]` bool, the hard gates of sealed tasks. sealed: `[T]` bool.
        given: `[T, U]` bool, hard gates that a task is given. given_until: `[T]`, the share of its steps during which
            it is held to them: 0 never, 1 always (see `hatcl.hold_gates`). holding: is the task being learned held now?
        order: `[T]` int64, 1, 2, ... in the order of sealing; 0: never sealed, or forgotten; -k: sealed as the k-th and
            reopened, so its elements are not frozen until it is sealed again.
        drift: `[T, 2]`, for sealed tasks under `HATConfig.protection="adahat"`: the largest change that later tasks
            made to an output, and the smallest share of rows with the same answer.
        importance: `[T, U]`, only under `HATConfig.protection="fg_adahat"`: how much a unit matters to a task (see
            `protection.py`).
        digests: sealed task -> name -> digest of the elements that the task uses. digest_table: `[T, 256, 16]` uint8,
            the same digests in a fixed size for state dicts (see `digests.table_of`).
        learned: the task being learned, else the one learned last. learner: the thread that is learning. lock: held by
            that thread during an optimizer step, when frozen elements may be moved temporarily.
        cut: a task with hard gates computes with its live elements and zeros, so no other values enter its arithmetic.
            If false, it computes with folded gates, as while it is learned.
        lineage: `[T, T]` uint8, which task received transplanted weights from which (see `lineage.py`).
        sharded: are the model's parameters shards (`fully_shard`)? These are gathered into reused memory, so values
            computed from them are not cached.
        hardened: 1 while the task being learned settles with hard gates; a tensor, so that a compiled program does not
            change. settled: the same as a Python bool.
        moment: an object that is replaced whenever an attribute changes that determines the active task, its gates, or
            whether they may be cached.
        looked: the table of hard gates and its version to which `moment` belongs (see `look`).
        epoch: counts all changes of gates. sealings: task -> how often its hard gates changed; compiled graphs depend
            on it.
        unit_map: the map that the model was converted with (None for layers assembled by hand).
        source: how `from_pretrained` builds the plain model (its timm name, for example).
        takes: a recipe of the forward's inputs at conversion (see `taken.py`).
        layers: (name, start, stop) bounds of the layers' units, 0-based, for penalties per layer and tables.
        bound: paths, at conversion, of the modules that the map bound to these gates.
        growths: all growths of the network since conversion. maps: its map before each growth.
        stages: per task, the number of growths before it was sealed, also if it is reopened; task None has 0.
    """

    masks: Tensor
    sealed: Tensor
    given: Tensor
    given_until: Tensor
    order: Tensor
    drift: Tensor
    scale: Tensor
    hardened: Tensor
    digest_table: Tensor
    lineage: Tensor
    stage_table: Tensor
    growth_key: Tensor
    importance: Tensor

    def __init__(self, units: int, config: HATConfig, layers: Sequence[tuple[str, int, int]] | None = None) -> None:
        super().__init__()
        self.moment = object()
        self.config = config
        self.layers = list(layers) if layers is not None else [("units", 0, units)]
        self.embeddings = nn.ParameterList([self.fresh_embedding(units) for _ in range(config.num_tasks)])
        self.register_buffer("masks", torch.zeros(config.num_tasks, units, dtype=torch.bool))
        self.register_buffer("sealed", torch.zeros(config.num_tasks, dtype=torch.bool))
        self.register_buffer("given", torch.zeros(config.num_tasks, units, dtype=torch.bool))
        self.register_buffer("given_until", torch.zeros(config.num_tasks))
        self.register_buffer("order", torch.zeros(config.num_tasks, dtype=torch.int64))
        self.register_buffer("drift", torch.tensor([0.0, 1.0]).repeat(config.num_tasks, 1))
        self.register_buffer("digest_table", torch.zeros(config.num_tasks, SLOTS, SLOT_BYTES, dtype=torch.uint8))
        self.register_buffer("lineage", torch.zeros(config.num_tasks, config.num_tasks, dtype=torch.uint8))
        if config.protection == "fg_adahat":
            self.register_buffer("importance", torch.zeros(config.num_tasks, units))
        self.register_buffer("scale", torch.tensor(float(config.max_scale)), persistent=False)
        self.register_buffer("hardened", torch.tensor(0.0), persistent=False)
        self.key = next(_context_keys)
        self.learning: int | None = None
        self.learned: int | None = None
        self.learner: int | None = None
        self.lock: Any = None
        self.soft = False
        self.settled = self.holding = False
        self.cut = True
        self.sharded = False
        self.epoch = 0
        self.sealings: dict[int, int] = {}
        self.from_map = layers is not None
        self.digests: dict[int, dict[str, str]] = {}
        self.unit_map: Any = None
        self.source: dict[str, Any] | None = None
        self.takes: dict[str, Any] | None = None
        self.bound: tuple[str, ...] = ()
        self.growths: list[Growth] = []
        self.maps: list[Any] = []
        self.stages: list[int] = [0] * config.num_tasks
        self.origin: Origin | None = None
        self.model: weakref.ref[nn.Module] | None = None
        self._default: int | None = None
        self._ever_active = self._unasked = False
        self._soft_now: SoftGates | None = None
        self._made: dict[str, tuple[Any, Any]] = {}
        self.looked: tuple[Tensor | None, int] = (None, 0)
        self.register_load_state_dict_post_hook(_loaded)

    def forward(self, x: Any) -> Any:
        """Return the input: a compiler may treat the gates of a converted `nn.Sequential` as one of its layers."""
        return x

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get(name, self)
        super().__setattr__(name, value)
        if name in _MOMENT and before is not value:
            self.__dict__["moment"] = object()

    # ---- the active task ---------------------------------------------------------------------------------------

    @property
    def task(self) -> int | None:
        """The active task: this context's, else the default. A recomputation uses the task of its forward."""
        if torch.compiler.is_compiling():
            return active.chosen_task(self.key, self._default) if self._ever_active else None
        if self.origin is not None:
            self.notice()
        if not self._ever_active:
            if self._unasked and not self.training:
                self._say_that_no_task_is_active()
            return None
        return active.of_forward(self.key, active.chosen_task(self.key, self._default), self.training)

    @task.setter
    def task(self, task: int | None) -> None:
        """Set the default task for all threads."""
        self._default = task
        self._unasked = False
        self._ever_active |= task is not None

    def _say_that_no_task_is_active(self) -> None:
        """Warn once after loading gates with sealed tasks: without a chosen task the output belongs to no task."""
        self._unasked = False
        sealed = self.sealed.nonzero().flatten().tolist()
        warnings.warn(
            f"no task is active, so this is the plain network, whose weights were learned on by the sealed tasks "
            f"{sealed}: it is none of them. Choose one: with hatcl.task(model, {sealed[0]}): ..., or "
            f"hatcl.set_task(model, {sealed[0]}). hatcl.set_task(model, None) says that the plain network is meant",
            stacklevel=2,
        )

    @property
    def default(self) -> int | None:
        """The active task in every context that did not choose one."""
        return self._default

    def choose(self) -> None:
        """Record that a context is about to choose a task."""
        self._ever_active = True

    def notice(self) -> None:
        """Follow the source model if this copy has been averaged with it while it learns."""
        if self.origin is not None and self.origin.follow(self):
            self.task = self.origin.task
            self.moment = object()

    def is_open(self, task: int | None) -> bool:
        """May this task's gates change from one step to the next? A sealed task's gates are constants. (A task that is
        a tensor stands for several sealed tasks and counts as open, so nothing is cached for it.)"""
        if isinstance(task, Tensor):
            return True
        return task is not None and (task == self.learning or (self.origin is not None and task == self.origin.task))

    def is_quiet(self) -> bool:
        """May the active task's values be cached for as long as `moment` and the chosen task stay the same?"""
        if self.lock is not None or self.sharded or self.training or not self.cut:
            return False
        if self.origin is not None and self.origin.averaged(self) is not None:
            return False
        task = self.task
        return task is None or (isinstance(task, int) and not self.is_open(task))

    def look(self) -> Any:
        """`moment`, after a check of the hard gates: other code may have written to them or replaced them (a state that
        is loaded into the model's tensors, `torch.func.functional_call`)."""
        masks, (looked, version) = self.masks, self.looked
        if masks is not looked or masks._version != version:
            # writes to an inference tensor cannot be detected, so it always counts as changed
            self.looked = (None, 0) if masks.is_inference() else (masks, masks._version)
            self.epoch += 1
        return self.moment

    def is_soft(self, task: int | None) -> bool:
        """Are a task's gates soft now? In evaluation without gradients they are hard, as after sealing."""
        if task is None or isinstance(task, Tensor) or task != self.learning or self.holding:
            return False
        return self.soft or self.training or torch.is_grad_enabled()

    # ---- what layers ask ---------------------------------------------------------------------------------------

    @property
    def num_units(self) -> int:
        return self.masks.shape[1]

    @property
    def num_tasks(self) -> int:
        return self.masks.shape[0]

    def select(self, task: int, index: slice | Tensor) -> Tensor:
        """A task's gates of some units, as floats."""
        if isinstance(task, Tensor):
            return self.on(task)[index].to(self.embeddings[0].dtype)
        if self.is_soft(task):
            soft = self.soft_gates(task)
            if soft is None:
                a = self._soft(unsharded(self.embeddings[task])[index])
                return a if self.config.reuse == "all" else torch.where(self._taken(task)[index], 0.0, a)
            if isinstance(index, Tensor):
                return soft.all.index_select(0, index)
            return soft.run(slice(*index.indices(self.num_units)))
        return self.on(task)[index].to(self.embeddings[task].dtype)

    def soft_gates(self, task: int) -> SoftGates | None:
        """The soft gates of all units, cached until a dependency changes; None if they cannot be cached."""
        every: Any = self._modules["embeddings"]  # indexing a ParameterList would compute its length each time
        e, c, scale = every._parameters[str(task)], self.config, self.scale
        key = None if self.sharded else soft_key(e, scale, task, self.epoch, self.settled)
        if key is None:
            return None
        soft = self._soft_now
        if soft is None or soft.key != key or soft.made_of[0] is not e or soft.made_of[1] is not c:
            options = (c.max_scale, c.compensation_clamp, c.compensation == "exact")
            a = kept_gate(e, scale, self._hardened(), None if c.reuse == "all" else self._taken(task), options)
            self._soft_now = soft = SoftGates(key, (e, c), a, [(start, stop) for _, start, stop in self.layers])
        return soft

    def soft_now(self, task: Any) -> SoftGates | None:
        """A task's soft gates; None if its gates are not soft or cannot be cached."""
        return self.soft_gates(task) if self.is_soft(task) else None

    def drop_soft_gates(self) -> None:
        """Before a forward: drop the cached soft gates, since torch does not count writes through `e.data`, and check
        the hard gates."""
        if self._soft_now is not None:
            self._soft_now = None
        self.look()

    def _soft(self, e: Tensor) -> Tensor:
        c = self.config
        return F.soft_gate(e, self.scale, c.max_scale, c.compensation_clamp, self._hardened(), c.compensation)

    def harden(self, settled: bool, holding: bool = False) -> None:
        """Set whether the gates of the task being learned are hard now, and whether it is held to given gates."""
        self.hardened.fill_(float(settled))
        self.settled = settled
        self.epoch += self.holding != holding
        self.holding = holding

    def is_given(self, task: int) -> bool:
        """Is a task held to given gates during all of its steps?"""
        return self.given_share(task) >= 1

    def given_share(self, task: int) -> float:
        """The share of its steps during which a task is held to given gates."""
        shares: list[float] = self._kept("shares", (self.given_until,), self.given_until.tolist)
        return shares[task]

    def _kept(self, name: str, made_of: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
        """The result of `make`, kept until these buffers are written to or replaced."""
        if F.is_followed() or any(x.is_inference() for x in made_of):
            return make()
        key, kept = [(x, x._version) for x in made_of], self._made.get(name)
        if kept is None or any(a is not b or i != j for (a, i), (b, j) in zip(key, kept[0], strict=True)):
            self._made[name] = kept = (key, make())
        return kept[1]

    def _hardened(self) -> Tensor | None:
        """The buffer that a compiled graph checks for hard gates; outside a graph, None if gates are not hard."""
        return self.hardened if torch.compiler.is_compiling() or self.settled else None

    def on(self, task: int) -> Tensor:
        """`[U]` bool: a task's hard gates, without a device synchronisation."""
        if isinstance(task, Tensor):
            return row(self.masks, task)
        if task == self.learning:
            return self._hard_now(task)
        return self.hard(task) if self.is_open(task) else self.masks[task]

    def hard(self, task: int) -> Tensor:
        """`[U]` bool: a task's sealed gates, or the gates that sealing would give now."""
        return self.masks[task] if bool(self.sealed[task]) else self._hard_now(task)

    def _hard_now(self, task: int) -> Tensor:
        if self.holding if task == self.learning else self.is_given(task):
            return self.given[task]
        on = F.hard_gate(unsharded(self.embeddings[task].detach()))
        return on if self.config.reuse == "all" else on & ~self._taken(task)

    def _taken(self, task: int) -> Tensor:
        """`[U]` bool: units that other sealed tasks use."""
        taken: Tensor = self._kept(f"taken from {task}", (self.masks, self.sealed), lambda: self.used(without=task))
        return taken

    # ---- growth ------------------------------------------------------------------------------------------------

    def stage_of(self, task: Any) -> int:
        """The number of growths before a task was sealed: it computes with the sizes from that time. (A tensor of
        several tasks uses the current sizes.)"""
        if task is None:
            return 0
        return len(self.growths) if isinstance(task, Tensor) else self.stages[task]

    def map_at(self, stage: int) -> Any:
        """The map after `stage` growths."""
        return self.maps[stage] if stage < len(self.maps) else self.unit_map

    def number_from(self, stage: int) -> Tensor:
        """`[U + 1]`: the current numbers of the units of that stage."""
        number = torch.arange((self.map_at(stage).num_units if self.growths else self.num_units) + 1)
        for growth in self.growths[stage:]:
            number = torch.from_numpy(growth.number)[number]
        return number

    def within(self, task: int) -> Tensor:
        """`[U]` bool: the units that exist at a task's sizes."""
        there = torch.zeros_like(self.masks[0])
        there[self.number_from(self.stages[task])[1:].to(there.device) - 1] = True
        return there

    def set_stages(self, stages: Sequence[int]) -> None:
        """Set `stages`; once the network has grown, also as a buffer, so that state dicts contain it."""
        self.stages = list(stages)
        if self.growths:
            device = self.masks.device
            self.register_buffer("stage_table", torch.tensor(self.stages, device=device))
            self.register_buffer("growth_key", key_of(self.growths).to(device))

    def grow(self, growth: Growth, grown_map: Any) -> None:
        """Keep each unit and add the new ones; no sealed task has the new ones on."""
        at = torch.from_numpy(growth.number[1:] - 1).to(self.masks.device)
        units = int(growth.bounds[-1])
        for t, old in enumerate(self.embeddings):
            new = self.fresh_embedding(units, old.detach())
            with torch.no_grad():
                if bool(self.sealed[t]) or bool(self.order[t] < 0) or bool(self.given_until[t] > 0):
                    new.copy_(self.embedding_of(torch.zeros_like(new, dtype=torch.bool)))
                new[at] = old.detach()
            self.embeddings[t] = new
        masks, given = (self.masks.new_zeros(self.num_tasks, units) for _ in range(2))
        masks[:, at], given[:, at] = self.masks, self.given
        plans = (self.planned(self.growths), self.planned([*self.growths, growth]))
        for t, (was, now) in enumerate(zip(*plans, strict=True)):  # a task with planned gates gets its new units too
            if torch.equal(self.given[t].cpu(), was):
                given[t] = now.to(given.device)
        self.masks, self.given = masks, given
        if "importance" in self._buffers:
            importance = self.importance.new_zeros(self.num_tasks, units)
            importance[:, at] = self.importance
            self.importance = importance
        bounds = growth.bounds.tolist()
        self.layers = [(name, bounds[start], bounds[stop]) for name, start, stop in self.layers]
        self.maps.append(self.unit_map)
        self.growths.append(growth)
        self.unit_map = grown_map
        self.origin = None  # it can no longer be averaged with its source
        self.set_stages(self.stages)
        self._changed(range(self.num_tasks))

    # ---- life of a task ----------------------------------------------------------------------------------------

    def fresh_embedding(self, units: int, like: Tensor | None = None) -> nn.Parameter:
        """A new embedding, drawn as `config.init` says."""
        e = F.drawn_embedding(units, self.config)
        return nn.Parameter(e if like is None else e.to(like))

    def used(self, without: int | None = None) -> Tensor:
        """`[U]` bool: units on in any sealed task."""
        rows = self.sealed
        if without is not None:
            rows = rows.clone()
            rows[without] = False
        return (self.masks & rows[:, None]).any(0)

    def seal(self, task: int) -> None:
        self.masks[task] = self.hard(task) & self.within(task)
        self.sealed[task] = True
        self.order[task] = self.order.abs().max() + 1
        self.drift[task] = self.drift.new_tensor([0.0, 1.0])
        self._changed([task])

    def planned(self, growths: Sequence[Growth]) -> list[Tensor]:
        """Each task's gates, `[U]` bool, that `config.masks` plans for a network after these growths; an empty list if
        it plans none."""
        if self.config.masks == "all":
            return [
                torch.ones(int(growths[-1].bounds[-1]) if growths else self.num_units, dtype=torch.bool)
            ] * self.num_tasks
        if self.config.array is None or self.unit_map is None:
            return []
        return array_masks((self.maps or [self.unit_map])[0], self.config.array, self.num_tasks, growths)

    def _changed(self, tasks: Iterable[int]) -> None:
        """The hard gates of these tasks have changed: invalidate their cached values."""
        self.epoch += 1
        for t in tasks:
            self.sealings[t] = self.sealings.get(t, 0) + 1

    def unseal(self, task: int, reopened: bool = False) -> None:
        """Reset a task's row. reopened: learning continues from the gates that it was sealed with. Otherwise the task
        is forgotten, and of the gates given to it only those of the model's plan remain."""
        on = self.masks[task].clone()
        held = bool(self.given_until[task] > 0) and (reopened or self.config.masks != "learned")
        if not held:
            self.give(task, None)
        elif reopened:
            self.given[task] = on  # learning may have changed the gates that it was first held to
        self.masks[task] = False
        self.sealed[task] = False
        self.order[task] = -self.order[task] if reopened else 0
        self.digest_table[task] = 0
        if "importance" in self._buffers:
            self.importance[task] = 0
        self.digests.pop(task, None)
        with torch.no_grad():
            e = self.embedding_of(self.given[task] if held else on) if held or reopened else None
            self.embeddings[task].copy_(self.fresh_embedding(self.num_units) if e is None else e)
        self._changed([task])

    def give(self, task: int, on: Tensor | None, until: float = 1.0) -> None:
        """Hold a task to hard gates, `[U]` bool, from its next step on; None: its gates are learned."""
        self.given[task] = False if on is None else on
        self.given_until[task] = 0.0 if on is None else until
        if on is not None:  # if it is learned afterwards, it starts from these gates
            with torch.no_grad():
                self.embeddings[task].copy_(self.embedding_of(self.given[task]))
        self._changed([task])

    def embedding_of(self, on: Tensor) -> Tensor:
        """`[U]`: +e for units that are on, -e for others, e = |`config.init_value`|, or 1 where that is 0."""
        size = min(abs(self.config.init_value) or 1.0, self.config.clamp)
        return torch.where(on, size, -size)

    def reopened(self) -> list[int]:
        """The tasks that were sealed and reopened."""
        return (self.order < 0).nonzero().flatten().tolist()

    def add(self, tasks: int) -> None:
        self.config = self.config.replace(num_tasks=self.num_tasks + tasks)
        like = self.embeddings[0].detach()
        for _ in range(tasks):
            self.embeddings.append(self.fresh_embedding(self.num_units, like))
        for name in ("masks", "sealed", "given", "given_until", "order", "lineage", "digest_table", "importance"):
            rows = self._buffers.get(name)
            if rows is None:
                continue
            setattr(self, name, torch.cat([rows, rows.new_zeros(tasks, *rows.shape[1:])]))
        self.lineage = nn.functional.pad(self.lineage, (0, tasks))
        self.set_stages([*self.stages, *[len(self.growths)] * tasks])
        self.drift = torch.cat([self.drift, self.drift.new_tensor([0.0, 1.0]).repeat(tasks, 1)])
        self.epoch += 1

    def penalty(self) -> Tensor:
        """`penalty_weight` times the sparsity penalty of the task being learned, over units that no sealed task
        uses."""
        c = self.config
        if self.holding:
            return self.scale.new_zeros(())
        task = self.learning if self.learning is not None else 0
        soft = self.soft_gates(task)
        a = self._soft(unsharded(self.embeddings[task])) if soft is None else soft.all
        used = self._kept("used", (self.masks, self.sealed), self.used)
        if c.penalty != "layer" and not c.forgiven and a.dtype == torch.float32 and not torch.compiler.is_compiling():
            free = self._kept("free", (used,), lambda: (~used).float() / (~used).sum().clamp(min=1))
            return c.penalty_weight * torch.dot(a, free)
        bounds = [(start, stop) for _, start, stop in self.layers] if c.penalty == "layer" else None
        return c.penalty_weight * F.sparsity_penalty(a, used, bounds, c.forgiven or 0.0)

    # ---- torch's own -------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is never being learned, even if it was made inside a `hatcl.learn` block."""
        state = {
            **self.__dict__,
            "_soft_now": None,
            "_made": {},
            "looked": (None, 0),
            "soft": False,
            "settled": False,
            "holding": False,
            "sharded": False,
            "moment": None,
        }
        if self._default == self.learning:
            state["_default"] = None
        return {**state, **dict.fromkeys(("key", "learning", "learned", "learner", "lock", "origin", "model"))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "looked": (None, 0)})
        self.moment = object()
        self.key = next(_context_keys)  # a task chosen in a context applies to one model, not to its copies

    def __deepcopy__(self, memo: dict[int, Any]) -> Gates:
        made: Gates = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        made.origin = Origin(self, made)
        if self.learning is not None and self._default == self.learning:
            made._default = self.learning
        return made

    def _replicate_for_data_parallel(self) -> Any:
        raise TaskError(
            "torch.nn.DataParallel runs copies of a model in threads of its own, where hatcl cannot keep tasks apart; "
            "use torch.nn.parallel.DistributedDataParallel"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Gates:
        kept = {name: self._buffers.get(name) for name in ("scale", "hardened", "importance")}
        super()._apply(fn, recurse)
        for name, x in kept.items():  # keep float32: bfloat16 is too coarse for annealing or a running mean
            if x is not None:
                self._buffers[name] = x.to(self.masks.device)
        self.epoch += 1
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        key, errors = state_dict.get(f"{prefix}growth_key"), args[-1]
        if key is not None and self.growths and not torch.equal(key.cpu(), self.growth_key.cpu()):
            errors.append(
                f"{prefix}growth_key: this state belongs to a model that grew differently, so its elements have "
                "other places; "
                "grow the same model in the same way, or take hatcl.from_pretrained"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.growths:
            self.stages = self.stage_table.tolist()
        if f"{prefix}digest_table" in state_dict:
            self.digests = {}  # these belong to the former state; the loaded table replaces them
        self._changed(range(self.num_tasks))

    def extra_repr(self) -> str:
        return f"units={self.num_units}, tasks={self.num_tasks}, sealed={self.sealed.nonzero().flatten().tolist()}"


def _loaded(gates: Gates, _: Any) -> None:
    gates._unasked = not (gates._ever_active or gates.sealed.is_meta) and bool(gates.sealed.any())
    if gates.origin is not None:
        gates.origin.forget_writes(gates)


def gates_of(model: nn.Module) -> list[Gates]:
    """Every `Gates` of a model: one for a converted model, one per layer if layers were assembled by hand."""
    found = [m for m in model.modules() if isinstance(m, Gates)]
    if not found:
        raise TaskError(
            f"{type(model).__name__} has no gates: convert it first (hatcl.convert) or build it from HAT layers"
        )
    return found


def roots_of(model: nn.Module) -> list[nn.Module]:
    """The model, and every module in it that has gates of its own."""
    with_gates = [m for m in model.modules() if any(isinstance(child, Gates) for child in m._modules.values())]
    return list({id(m): m for m in (model, *with_gates)}.values())


def groups_of(model: nn.Module) -> Iterator[tuple[str, Gates, int, int]]:
    """Every group of gates with at least one unit: (name of its layer, gates, start, stop), bounds 0-based."""
    by_hand = {id(g): path.removesuffix(".gates") for path, g in model.named_modules() if isinstance(g, Gates)}
    for g in gates_of(model):
        for name, start, stop in g.layers:
            if stop > start:
                yield name if g.from_map else by_hand[id(g)], g, start, stop


def row(table: Tensor, task: Tensor) -> Tensor:
    """The row of a task that is a 0-dimensional tensor, one of several under `torch.vmap`."""
    return table.index_select(0, task.reshape(1)).squeeze(0)
