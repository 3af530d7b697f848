"""`learn`: the block in which a task is learned; leaving it seals the task."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import HATConfig
from ..errors import HATError, NonFiniteLossError, TaskError
from ..functional import scale_at
from ..map.lora import is_factor
from ..shards import check_whole
from . import digests
from .active import is_chosen
from .distributed import Replicas
from .gates import Gates, gates_of, roots_of
from .given import check_given
from .guard import Guard
from .held import check_structure
from .layers.gated import HATLayer
from .lineage import has_begun, mark_sealed
from .protection import Drift, by_degrees
from .room import check_room
from .starting import source_for
from .tasks import check_none_reopened, check_task, locked_tasks, tasks
from .transplant import begun

log = logging.getLogger(__name__)

CONFIGURED = "configured"  # use `HATConfig.start_from`


class Learning:
    """A task being learned, as yielded by `hatcl.learn`.

    Attributes:
        task: its index. step: optimizer steps done. steps: total number of steps. scale: the current s. reopened: was
            the task sealed before? If so, the scale starts at s_max, where gates are hard.
    """

    def __init__(self, model: nn.Module, task: int, steps: int, epochs: int, start: int) -> None:
        self.model, self.task, self.steps, self.step = model, task, steps, start
        self.gates = gates_of(model)
        self.epochs = epochs
        self.reopened = task in self.gates[0].reopened()
        self.settled = False
        self.guard: Guard | None = None
        self._start = self._settled_at = start
        self._statistics = _Statistics(model, task)

    @property
    def config(self) -> HATConfig:
        return self.gates[0].config

    @property
    def scale(self) -> float:
        return float(self.gates[0].scale)

    def penalty(self) -> Tensor:
        """The sparsity penalty, `config.penalty_weight` times HAT's eq. 5; add it to the loss."""
        total = [g.penalty() for g in self.gates if g.num_units]
        return torch.stack(total).mean() if len(total) > 1 else total[0] if total else torch.zeros(())

    @contextlib.contextmanager
    def soft(self) -> Iterator[None]:
        """Inside the block, evaluation also uses the soft gates at the current scale (to measure the cost of
        hardening)."""
        for g in self.gates:
            g.soft = True
        try:
            yield
        finally:
            for g in self.gates:
                g.soft = False

    def _advance(self, taken: int) -> None:
        """`taken` optimizer steps have been taken in this block."""
        self.step = self._start + taken
        if self.settled:
            self._statistics.adopt(self.step - self._settled_at)
        self._set_scale()

    def _set_scale(self) -> None:
        cycles = self.config.cycles or self.epochs
        held = math.ceil(self.steps * self.gates[0].given_share(self.task))  # steps in which no gate is learned
        length = max(-(-(self.steps - held) // cycles), 1)
        at = max(min(self.step, self.steps - 1) - held, 0)
        c = self.config
        value = scale_at(at % length, length, c.max_scale, "cosine" if self.reopened else c.schedule, c.above_one)
        first = math.ceil(self.steps * (1 - self.config.settle))
        settled = self.step >= first
        if settled and not self.settled:
            again = self._start > first  # an interrupted task resumes with its statistics
            self._settled_at = first if again else self.step
            self._statistics.restart(again)
        self.settled = settled
        for g in self.gates:
            g.scale.fill_(value)
            g.harden(settled, self.step < held or held == self.steps)


class _Statistics:
    """Restarts the running statistics of the task being learned once its gates are hard, because those of soft gates
    lag behind. The k-th step moves them by `max(1/k, m)` of the way to the batch's statistics, with the momentum `m`:
    first an average over the steps, then the layer's usual moving average. The layers' own computation is unchanged."""

    def __init__(self, model: nn.Module, task: int) -> None:
        self._layers: list[tuple[Any, float | None]] = []
        for module in model.modules():
            if isinstance(module, HATLayer) and "hat_tasks" in module._modules:
                own = module.hat_tasks[task]._buffers
                if own.get("running_mean") is not None and own.get("running_var") is not None:
                    self._layers.append((own, getattr(module, "momentum", None)))
        self._before: list[tuple[Tensor, Tensor, int]] = []

    def restart(self, again: bool = False) -> None:
        for own, momentum in () if again else self._layers:
            if momentum is None and own.get("num_batches_tracked") is not None:
                own["num_batches_tracked"].zero_()  # torch computes the cumulative average from this count
        self._remember()

    def adopt(self, step: int) -> None:
        """Correct the statistics after step 1, 2, ... since the restart."""
        pairs = [(x, m) for x, m in zip(self._layers, self._before, strict=False) if x[1]]
        for (own, momentum), (mean, var, count) in pairs:
            assert momentum is not None
            moved = 1 - (1 - momentum) ** (int(own["num_batches_tracked"]) - count)  # over all forwards of this step
            if moved and moved * step < 1:
                with torch.no_grad():
                    own["running_mean"].copy_(mean + (own["running_mean"] - mean) / (moved * step))
                    own["running_var"].copy_(var + (own["running_var"] - var) / (moved * step))
        self._remember()

    def _remember(self) -> None:
        self._before = [
            (own["running_mean"].clone(), own["running_var"].clone(), int(own["num_batches_tracked"]))
            if own.get("num_batches_tracked") is not None
            else (own["running_mean"], own["running_var"], 0)
            for own, _ in self._layers
        ]


@contextlib.contextmanager
def learn(
    model: nn.Module,
    task: int,
    optimizer: Any,
    steps: int,
    epochs: int = 1,
    start: int = 0,
    start_from: int | str | None = CONFIGURED,
    examples: Any = None,
) -> Iterator[Learning]:
    """Learn a task: inside the block the model computes with soft gates, the scale follows the optimizer's steps, and
    frozen elements stay bit-identical. Leaving the block hardens the gates and seals the task; leaving it by an
    exception seals nothing and leaves sealed tasks unchanged. The task stays active after sealing.

    Frozen elements are restored after every step of any optimizer, even if the step raises, and again on leaving. If a
    state is loaded inside the block (`load_state_dict`), its values are kept from then on. A state is refused before
    anything is loaded if the task is sealed in it, or if a sealed task of the model is not.

    Args:
        model: a HAT model, also wrapped (DistributedDataParallel, `torch.compile`, peft).
        task: the index of a task that is not sealed.
        optimizer: the optimizer, or a list of all that are stepped. Built once for all tasks, or one for each.
        steps: total number of optimizer steps, over which the scale is annealed. Of several optimizers the one that
            steps most counts; steps that a gradient scaler skips do not count.
        epochs: annealing cycles within the steps (HAT anneals once per epoch), unless `HATConfig.cycles` is set.
        start: steps already done, to resume an interrupted task.
        start_from: a sealed task to start from: its number, "previous" (the one sealed last), "best" (the one whose
            features separate the examples best by their nearest neighbours), or None. Default: `HATConfig.start_from`.
            The task gets most of the source's units; others replace the rest and receive copies of the source's weights
            (see `hat/transplant.py`). It keeps these gates. `hatcl.describe` and `hatcl.forget_task` report which task
            started from which. The first task starts from none. With `start` above 0 a task continues with its own
            weights. Unless `start_from` is given here, so does a task that was started from another and left by an
            exception, or that is reopened.
        examples: examples of the new task for "best": (inputs, labels), or batches of them.

    Raises:
        TaskError: no such task, or it is already sealed; inside a `with hatcl.task(...)` block; a state that does not
            fit; given gates that the task cannot have. GuardError: an optimizer that cannot be guarded. HATError: a
            module was replaced after conversion; shards under protection by degrees. CapacityError: the task could
            learn only its head, because sealed tasks hold everything else. IntegrityError: a sealed task changed since
            it was sealed.
        NonFiniteLossError: the loss became NaN or infinite. ConfigError: an invalid `start_from` or `examples`.

    Warns:
        UserWarning: something other than an optimizer's step wrote to frozen elements (they are restored); the number
            of steps taken differs from `steps`; a layer has no units left; sealed tasks hold everything that the task
            could share, so it learns only its own norms and its head.
    """
    task = check_task(model, task, sealed=False)
    if steps < 1 or epochs < 1 or not 0 <= start <= steps:
        raise TaskError(
            f"steps: got steps={steps}, epochs={epochs}, start={start}; expected steps and epochs of at least 1, "
            f"start from 0 to steps"
        )
    gates = gates_of(model)
    if any(g.learning is not None for g in gates):
        raise TaskError(f"task {gates[0].learning} is being learned; leave its hatcl.learn block first")
    if any(is_chosen(g.key) for g in gates):
        raise TaskError(
            f"learn: task {task} cannot be learned inside a `with hatcl.task(...)` block of the same model, which "
            "keeps its own task active; leave the block first"
        )
    degrees = by_degrees(model)
    if degrees:
        check_whole(model, f"learn: protection={gates[0].config.protection!r}", "protect exactly, or do not shard it")
    check_none_reopened(model, f"learn: task {task}", task)
    _check_layers(model)
    check_structure(model)
    check_given(model, task)
    check_room(model, task)
    replicas = Replicas(model, task)
    with replicas.together():
        digests.check_sealed(model)
        if start_from == CONFIGURED:
            planned = gates[0].config.start_from
            start_from = None if has_begun(model, task) or planned == task else planned
        source = source_for(model, task, start_from, examples) if start == 0 else None
    learning = Learning(model, task, steps, epochs, start)
    optimizers: Sequence[Any] = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    locked = locked_tasks(model)
    with begun(model, task, replicas.of_rank_0(source), locked, optimizers, again=start > 0):
        guard = Guard(model, task, optimizers, locked, learning._advance, start)
    learning.guard = guard
    replicas.joined = lambda: guard.relock(guard.locked)
    before = [(g, g.task) for g in gates]
    for g in gates:
        g.task = g.learning = g.learned = task
        g.learner, g.lock = threading.get_ident(), guard.lock
        g.model, g.origin = weakref.ref(model), None
    learning._set_scale()
    drift = Drift(model, guard.locked) if degrees else None
    try:
        with _Loads(model, task, guard), replicas, guard:
            yield learning
            guard.check_finite()
    except BaseException:
        repaired = guard.repair(model)
        if repaired:
            log.warning("task %d: values that were not finite are set to zero in %s", task, ", ".join(repaired))
        if guard.written:
            log.warning("task %d: put back what was written to frozen elements of %s", task, ", ".join(guard.written))
        if drift is not None:
            drift.note()
            digests.check_sealed(model)
        _leave(before)
        raise
    try:
        with replicas.together():
            if guard.repair(model):
                raise NonFiniteLossError(
                    f"task {task}: shared weights are no longer finite; nothing was sealed, earlier tasks are as they "
                    "were"
                )
            check_structure(model)
            digests.check_sealed(model, guard.locked)
        replicas.agree()
    except BaseException:
        _leave(before)
        raise
    _warn_of(learning, guard)
    for g in gates:
        g.learning, g.learner, g.lock = None, None, None
        g.harden(False)
    digests.harden(model, task)
    mark_sealed(model, task)
    _warn_if_full(model, task)
    for t in [t for t in tasks(model) if t != task and t not in guard.locked]:
        digests.record(model, t)
    if drift is not None:
        drift.note()
    guard.store_weights()


def _warn_of(learning: Learning, guard: Guard) -> None:
    """Report problems that left every sealed task as it was."""
    task = learning.task
    if guard.written:
        names = ", ".join(guard.written[:5])
        warnings.warn(
            f"task {task}: something else than a step of an optimizer wrote to frozen elements of {names}"
            f"{' ...' if len(guard.written) > 5 else ''}; they are put back, and sealed tasks are as they were. Until "
            "then sealed tasks computed other values inside the block. Step through an optimizer that is given to "
            "hatcl.learn",
            stacklevel=4,
        )
    if learning.gates[0].holding:
        return  # given gates are hard at every step
    if learning.step < learning.steps:
        seen = f"{learning.step} of {learning.steps} steps"
        warnings.warn(
            f"task {task} is sealed after {seen}, at scale {learning.scale:.3g} of {learning.config.max_scale:g}: its "
            "gates were still soft, and sealing makes them hard. Give hatcl.learn the number of steps that you take, "
            "and the optimizer that takes them",
            stacklevel=4,
        )
    elif guard.steps > learning.steps - learning._start:
        warnings.warn(
            f"task {task}: {guard.steps} steps were taken and {learning.steps - learning._start} expected, so the last "
            f"{guard.steps - learning.steps + learning._start} had gates that were hard already; give hatcl.learn the "
            "number of steps that you take",
            stacklevel=4,
        )


def _warn_if_full(model: nn.Module, task: int) -> None:
    """Warn if the task uses every unit and other tasks are to follow."""
    gates = gates_of(model)
    if gates[0].config.masks != "learned":
        return  # the plan gave them to the task
    units = [bool(g.masks[task, a:b].all()) for g in gates for name, a, b in g.layers if b > a and not is_factor(name)]
    if units and all(units) and not bool(gates[0].sealed.all()):
        c = gates[0].config
        warnings.warn(
            f"task {task} uses every unit of the model, so that later tasks have none of their own. A unit goes off "
            f"once its embedding falls below 0, and one that starts at 1 must get there within the steps: raise "
            f"HATConfig.embedding_lr_scale (now {c.embedding_lr_scale:g}), HATConfig.penalty_weight (now "
            f"{c.penalty_weight:g}) or the number of steps",
            stacklevel=4,
        )


class _Loads:
    """Check a state before it is loaded while a task is learned, and keep its values from then on."""

    def __init__(self, model: nn.Module, task: int, guard: Guard) -> None:
        self.model, self.task, self.guard, self._loaded = model, task, guard, False
        self._hooks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"model": None, "task": self.task, "guard": None, "_loaded": False, "_hooks": []}

    def __enter__(self) -> None:
        for module in roots_of(self.model):
            self._hooks += [
                module.register_load_state_dict_pre_hook(self.before),
                module.register_load_state_dict_post_hook(self.after),
            ]

    def __exit__(self, *exc: object) -> None:
        for h in self._hooks:
            h.remove()

    def before(self, module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        paths = [path for path, g in module.named_modules() if isinstance(g, Gates)]
        rows = [state[name] for path in paths if (name := f"{prefix}{path}.sealed") in state]
        if self.guard is None or not rows:  # no guard: in a copy that was made inside the block
            return
        now, then = set(tasks(self.model)), set(rows[0].nonzero().flatten().tolist())
        if self.task in then or not now <= then:
            what = f"task {self.task} is sealed" if self.task in then else f"task {min(now - then)} is not sealed"
            raise TaskError(
                f"load_state_dict: in this state {what}, and task {self.task} is being learned while {sorted(now)} are "
                "sealed; nothing was loaded. Leave the hatcl.learn block, load the state, and learn then"
            )
        self._loaded = True

    def after(self, module: nn.Module, _: Any) -> None:
        if self._loaded:
            self._loaded = False
            digests.check_sealed(self.model)
            self.guard.relock(locked_tasks(self.model))


def _leave(before: list[tuple[Gates, int | None]]) -> None:
    for g, t in before:
        g.learning, g.learner, g.lock, g.task = None, None, None, t
        g.harden(False)


def _check_layers(model: nn.Module) -> None:
    for path, module in model.named_modules():
        # frozen batch norms also have running statistics, but no momentum: these are constants
        moving = module._buffers.get("running_mean") is not None and hasattr(module, "momentum")
        if moving and not isinstance(module, HATLayer):
            if not path.split(".")[-1].isdigit() or "hat_tasks" not in path:
                raise HATError(
                    f"{path}: {type(module).__name__} has running statistics that all tasks would share; "
                    "use its TaskIndexed kin, or hatcl.convert for the whole model"
                )
