"""What is frozen while a task is learned, and the guard that keeps it so whatever the optimizer does."""

from __future__ import annotations

import hashlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import GuardError, HATError, IntegrityError, NonFiniteLossError, TaskError
from ..functional import digest_of, local, same_bits
from ..keeper import Keeper, Kept, StoredWeights, check_optimizers, put_back, taken
from ..map.lora import is_factor
from ..shards import part_of, reshard, whole
from .gates import SLOT_BYTES, SLOTS, Gates, gates_of
from .layers.gated import Binding, HATLayer, ParameterPlan, TaskCopy


@dataclass
class Held:
    """A parameter of a HAT model. task: whose own it is (None: shared). plan: its axes, for a shared one. plain: the
    plain model's value of what every task has a copy of. module: where it is."""

    name: str
    param: nn.Parameter
    plan: ParameterPlan | None
    module: nn.Module
    task: int | None = None
    plain: bool = False

    def live(self, task: int) -> Tensor:
        """Which elements are live for a task, in the parameter's shape."""
        if self.plan is None:
            return torch.ones(self.param.shape, dtype=torch.bool, device=self.param.device)
        return self.plan.live(task, self.param.device).expand(self.plan.view).reshape(self.param.shape)


def held(model: nn.Module) -> list[Held]:
    """Every parameter of a HAT model once, with what it belongs to.

    Raises:
        HATError: a parameter is shared by layers that belong to different gates (two models sharing parameters).
    """
    out: dict[int, Held] = {}
    owner: dict[int, tuple[Gates, str]] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, Gates):
            for t, e in enumerate(module.embeddings):
                out[id(e)] = Held(f"{prefix}embeddings.{t}", e, None, module.embeddings, t)
            continue
        hat: Binding | None = module.__dict__.get("_hat") if isinstance(module, HATLayer) else None
        for name, p in module._parameters.items():
            if p is None:
                continue
            plan = hat.params.get(name) if hat is not None else None
            if hat is not None and plan is not None and not plan.copied:
                gates, first = owner.setdefault(id(p), (hat.gates, f"{prefix}{name}"))
                converted = gates.from_map and hat.gates.from_map
                if gates is not hat.gates and converted:
                    raise HATError(
                        f"{prefix}{name} and {first} are one parameter but belong to two converted models; "
                        "convert the model that contains both, or copy the parameter"
                    )
            known = out.get(id(p))
            if known is None or (plan is not None and known.task is None and known.plan is None):
                out[id(p)] = Held(f"{prefix}{name}", p, plan, module, None, plan is not None and plan.copied)
        if hat is not None:
            for t, copy in enumerate(getattr(module, "hat_tasks", ())):
                for name, p in copy.named_parameters():
                    out[id(p)] = Held(f"{prefix}hat_tasks.{t}.{name}", p, None, copy, t)
    return list(out.values())


def own_buffers(model: nn.Module, task: int) -> Iterator[tuple[str, Tensor]]:
    """A task's running statistics."""
    for path, module in model.named_modules():
        if isinstance(module, HATLayer) and "hat_tasks" in module._modules:  # type: ignore[attr-defined]
            for name, b in module.hat_tasks[task].named_buffers():
                yield f"{path}.hat_tasks.{task}.{name}", b


def shared_buffers(model: nn.Module, *, unsaved: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Buffers that all tasks read and none may write: those that are no task's own, and are saved unless `unsaved`."""
    for path, module in model.named_modules():
        if isinstance(module, (Gates, TaskCopy)):
            continue
        hat = isinstance(module, HATLayer) and module.__dict__.get("_hat") is not None
        own = module._hat_copied_buffers() if hat else ()
        for name, b in module._buffers.items():
            if b is not None and name not in own and (unsaved or name not in module._non_persistent_buffers_set):
                yield f"{path}.{name}" if path else name, b


def sealed_tasks(model: nn.Module) -> list[int]:
    return gates_of(model)[0].sealed.nonzero().flatten().tolist()


# ---- digests: the proof that what was sealed is what is there ------------------------------------


def digest(model: nn.Module, task: int) -> dict[str, str]:
    """name -> `dtype:sha256` of everything a sealed task computes with: live elements, own copies, statistics,
    gates."""
    out: dict[str, str] = {}
    reshard(model)  # a hash shares memory with numpy, after which `fully_shard` could not free it
    every = held(model)
    names = [h.name for h in every]
    wrapped = _shared_path(names)  # a model inside DistributedDataParallel or torch.compile is the same model
    for h in every:
        if h.plain or (h.task is not None and h.task != task):
            continue
        value = whole(h.param.detach())
        if h.task is None:
            value = value[h.live(task)] if h.plan is not None else value
        out[h.name.removeprefix(wrapped)] = digest_of(value)
    for name, b in [*own_buffers(model, task), *shared_buffers(model)]:
        out[name.removeprefix(wrapped)] = digest_of(b)
    for i, g in enumerate(gates_of(model)):
        out[f"gates {i}"] = digest_of(g.masks[task])
    return out


def _shared_path(names: Sequence[str]) -> str:
    """The dotted path that all names start with, its last dot included."""
    first, last = min(names, default="").split("."), max(names, default="").split(".")
    same = 0
    while same < min(len(first), len(last)) - 1 and first[same] == last[same]:
        same += 1
    return "".join(f"{part}." for part in first[:same])


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
    """Where a name's digest is in `table_of`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "big") % SLOTS


_SEALED_BY = WeakTensorKeyDictionary()  # parameter -> the gates of the model that sealed a task with it


def record(model: nn.Module, task: int) -> None:
    """Store a task's digest with its gates."""
    gates = gates_of(model)[0]
    _store(gates, task, digest(model, task))
    for h in held(model):
        _SEALED_BY[h.param] = weakref.ref(gates)


def _store(gates: Gates, task: int, digests: dict[str, str]) -> None:
    gates.digests[task] = digests
    gates.digest_table[task] = table_of(digests).to(gates.digest_table.device)


def check(model: nn.Module, only: Sequence[int] | None = None) -> None:
    """Compare every sealed task with its digest.

    A parameter that was cast since (`model.half()`) has other bits by the user's own wish; its digest is taken anew.

    Raises:
        IntegrityError: names the task and the parameters that changed.
    """
    gates = gates_of(model)[0]
    for task in sealed_tasks(model) if only is None else only:
        row = gates.digest_table[task].cpu()
        if task not in gates.digests and not bool(row.any()):
            continue  # sealed by hand
        now = digest(model, task)
        was = gates.digests.get(task)
        if was is None:  # the state was loaded, and brought the table alone
            changed = _changed_slots(row, now)
        else:
            changed = [
                name for name, d in was.items()
                if name not in now or (now[name] != d and now[name].split(":")[0] == d.split(":")[0])
            ]  # fmt: skip
        if changed:
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
    """The names whose slot of a table is another one, or that share it with one that is."""
    differ = set((table_of(now) != row).any(1).nonzero().flatten().tolist())
    named = [name for name in now if slot_of(name) in differ]
    return named or [f"slot {slot} of its digests" for slot in sorted(differ)]


def seal(model: nn.Module, task: int | None = None) -> None:
    """Harden a task's gates and record what it uses: what leaving `hatcl.learn` does, for copies that are averaged with
    the model while it learns (timm's `ModelEmaV3`, torch's `AveragedModel`):

        with hatcl.learn(model, 1, optimizer, steps):
            ...
            ema.update(model)
        hatcl.seal(ema.module)

    What tasks use that were sealed before stays as the model has it, bit for bit.

    Args:
        task: the task that is sealed; default: the one that the copy follows.

    Raises:
        TaskError: the model is no copy of one that learned, or it is being learned itself. IntegrityError: a task that
            was sealed before changed.

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
                "is "
                "nothing to seal; hatcl.learn seals the model itself"
            )
        task = origin.task
    if gates[0].learning is not None:
        raise TaskError(f"seal: task {gates[0].learning} is being learned; leaving its hatcl.learn block seals it")
    refresh_copy(model)
    check(model, [t for t in sealed_tasks(model) if t != task])
    harden(model, task)
    if origin is not None:
        origin.own.add(task)
        origin.task = None
        origin.kept = _used_by(model, sorted(origin.own))


def harden(model: nn.Module, task: int) -> None:
    """Make a task's gates hard, the task the active one, and record what it uses."""
    for g in gates_of(model):
        g.seal(task)
        g.task = task
        empty = [
            name
            for name, start, stop in g.layers
            if stop > start and not bool(g.masks[task, start:stop].any()) and not is_factor(name)
        ]  # past a LoRA layer without pairs goes its base
        if empty:
            warnings.warn(
                f"task {task} uses no unit of {', '.join(empty[:5])}{' ...' if len(empty) > 5 else ''}, so nothing "
                "passes there; lower HATConfig.penalty_weight, start denser (init), or use a wider model",
                stacklevel=4,
            )
    record(model, task)


def _used_by(model: nn.Module, tasks: Sequence[int]) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """Tensors, which of their elements some tasks use (None: all), and their values."""
    out: list[tuple[Tensor, Tensor | None, Tensor]] = []
    for h in held(model):
        where = _live_for(h, tasks) if h.task is None and not h.plain else None
        if where is not None or h.task in tasks:
            out.append((h.param, where, h.param.detach().clone()))
    buffers = [b for t in tasks for _, b in own_buffers(model, t)]
    return out + [(b, None, b.clone()) for b in buffers] + [(g.masks, None, g.masks.clone()) for g in gates_of(model)]


# ---- the structure -------------------------------------------------------------------------------------------------


def check_structure(model: nn.Module) -> None:
    """Every module that was bound to gates at conversion is still there, bound, and has parameters of the same shapes.

    Wrapping the model or its modules is allowed (DistributedDataParallel, `fully_shard`, `torch.compile`, peft): a
    module is known by its binding, not by where it is.

    Raises:
        HATError: names the module or the parameter.
    """
    bound: dict[int, dict[str, Any]] = {}
    for module in model.modules():
        hat: Binding | None = module.__dict__.get("_hat")
        if hat is not None:
            bound.setdefault(id(hat.gates), {})[hat.path] = module
    for gates in gates_of(model):
        here = bound.get(id(gates), {})
        missing = [path for path in gates.bound if path not in here]
        if missing:
            raise HATError(
                f"{missing[0] or type(model).__name__}: the module that hatcl.convert bound to its gates is no longer "
                f"there ({len(missing)} such modules), so nothing keeps tasks apart in what took its place. Change the "
                "plain model first (reset_classifier, resize_token_embeddings, set_input_size, ...) and convert it "
                "then; hatcl.convert(..., num_classes=[...]) gives tasks heads of their own widths"
            )
        for path, layer in here.items():
            for name, shape in layer._hat.shapes.items():
                if name not in layer._parameters:
                    raise HATError(
                        f"{path}.{name}: the parameter that hatcl.convert mapped is no longer there; change "
                        "the plain model (parametrize, prune) before it is converted"
                    )
                p = layer._parameters[name]
                if p is not None and tuple(p.shape) != shape:
                    raise HATError(
                        f"{path}.{name}: it has shape {list(p.shape)}, hatcl.convert mapped {list(shape)}; change the "
                        "shape of the plain model before it is converted"
                    )


# ---- averaged copies -----------------------------------------------------------------------------------------------


def refresh_copy(model: nn.Module) -> None:
    """In a copy that is averaged with the model it was copied from (EMA), put everything that sealed tasks use back to
    what it is there: an average of equal numbers may round, and that of two -0.0 is 0.0. What the copy sealed itself is
    put back to what it was then."""
    gates = gates_of(model)
    for g in gates:
        g.notice()
    if gates[0].origin is None or (gates[0].origin.task is None and not gates[0].origin.own):
        return  # a copy that is not averaged is its owner's to write to
    now = tuple(x._version for x in (*model.parameters(), *model.buffers()))
    if gates[0].origin.seen == now:
        return
    origin = gates[0].origin
    other = origin.model()
    if other is not None:
        _copy_sealed(other, model, [t for t in sealed_tasks(model) if t not in origin.own and t != origin.task])
    with torch.no_grad():
        for x, where, old in origin.kept:
            x.copy_(old if where is None else torch.where(where, old, x))
    origin.seen = tuple(x._version for x in (*model.parameters(), *model.buffers()))


def _copy_sealed(source: nn.Module, model: nn.Module, tasks: Sequence[int]) -> None:
    tasks = [t for t in tasks if t in sealed_tasks(source)]
    theirs = {h.name: h for h in held(source)}
    mine = held(model)
    a, b = _shared_path(list(theirs)), _shared_path([h.name for h in mine])
    known = {name.removeprefix(a): h for name, h in theirs.items()}
    with torch.no_grad():
        for h in mine:
            other = known.get(h.name.removeprefix(b))
            if other is None or other.param.shape != h.param.shape:
                continue
            if h.task is None and not h.plain:
                live = _live_for(h, tasks)
                if live is not None:
                    h.param.copy_(torch.where(live, other.param, h.param))
            elif h.plain or h.task in tasks:
                h.param.copy_(other.param)
        buffers = {n.removeprefix(a): x for t in tasks for n, x in own_buffers(source, t)}
        for t in tasks:
            for name, x in own_buffers(model, t):
                if (was := buffers.get(name.removeprefix(b))) is not None:
                    x.copy_(was)


def _live_for(h: Held, tasks: Sequence[int]) -> Tensor | None:
    """Which elements are live for any of the tasks; None where none is."""
    mask: Tensor | None = None
    for t in tasks:
        mask = h.live(t) if mask is None else mask | h.live(t)
    return mask


# ---- the guard -----------------------------------------------------------------------------------


class Guard(Keeper):
    """Keeps what is frozen bit-identical while a task is learned. What that is depends on the task alone.

    Args:
        locked: sealed tasks that are held.
        after: called with the number of steps taken, when that has grown.
    """

    def __init__(
        self,
        model: nn.Module,
        task: int,
        optimizers: Sequence[Any],
        locked: Sequence[int],
        after: Callable[[int], None],
    ) -> None:
        self.model, self.task, self.after = model, task, after
        reshard(model)
        self.gates = gates_of(model)
        self.embeddings = [g.embeddings[task] for g in self.gates]
        self._own = {id(e) for e in self.embeddings}
        self._counts: dict[int, int] = {}
        self.steps = 0
        super().__init__(self._frozen(locked), optimizers)
        self._check(model, optimizers)

    def _frozen(self, locked: Sequence[int]) -> list[Kept]:
        """What must stay while the task is learned."""
        self.locked = list(locked)
        self.shared: list[tuple[str, nn.Parameter]] = []
        self.heldless: list[str] = []
        frozen: list[Kept] = []
        self._modules: list[nn.Module] = []
        for h in held(self.model):
            sealed_by = _SEALED_BY.get(h.param, lambda: None)()
            if sealed_by is not None and bool(sealed_by.sealed.any()) and all(sealed_by is not g for g in self.gates):
                raise HATError(
                    f"{h.name} is also a parameter of another HAT model, whose sealed tasks would change; copy the "
                    "parameter, or convert one model that contains both"
                )
            entire = h.plain or (h.task is not None and h.task != self.task)
            mask: Tensor | None = None
            if not entire and h.task is None:
                if h.plan is None:
                    entire = bool(locked)
                    if entire and h.param.requires_grad:
                        self.heldless.append(h.name)
                else:
                    mask = _live_for(h, locked)
                    entire = mask is not None and bool(mask.all())
                if not entire:
                    self.shared.append((h.name, h.param))
            if entire or (mask is not None and bool(mask.any())):
                frozen.append(Kept(h.param, None if mask is None or entire else part_of(mask, h.param), h.name))
                self._modules.append(h.module)
        self.buffers = {name: b.clone() for name, b in self._buffers()}
        return frozen

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        """What no step may write to, as it is now: a cast puts other tensors in its place."""
        if self.locked:
            yield from shared_buffers(self.model, unsaved=True)
        for t in self.locked:
            yield from own_buffers(self.model, t)
        for i, g in enumerate(self.gates):
            yield f"gates {i}", g.masks
            yield f"gates {i}, sealed", g.sealed

    def relock(self, locked: Sequence[int]) -> None:
        """A state was loaded: from now on hold what it brought."""
        self.hold_instead(self._frozen(locked))

    def _check(self, model: nn.Module, optimizers: Sequence[Any]) -> None:
        covered = check_optimizers(
            model,
            optimizers,
            "build it over model.parameters() of the converted model (hatcl.convert returns a new model, the source's "
            "parameters are not its own)",
        )
        left = [e for e in self.embeddings if id(e) not in covered and e.numel()]
        if left and self.gates[0].sharded:
            raise GuardError(
                f"optimizer: it holds none of the shards of task {self.task}'s gate embeddings; a forward has gathered "
                "the parameters, and it was built over those. Call model.reshard() before model.parameters()"
            )
        if left:
            raise GuardError(
                f"optimizer: no optimizer holds task {self.task}'s gate embeddings; was it built before "
                "hatcl.add_tasks or over a part of the model? Call "
                f"optimizer.add_param_group({{'params': hatcl.task_parameters(model, {self.task})}})"
            )
        names = {h.name: id(h.param) for h in held(model)}
        alone = [name for name in self.heldless if names.get(name) in covered]
        if alone:
            warnings.warn(
                f"{alone[0]}: the optimizer holds {len(alone)} parameters that no gate knows, so they are frozen whole "
                "from the first sealed task on and will not learn. Put such modules into the model before "
                "hatcl.convert "
                "(each task then gets its own head), or use hatcl.TaskIndexedLinear",
                stacklevel=5,
            )

    # ---- around a step ---------------------------------------------------------------------------------------------

    def concerns(self, p: Tensor) -> bool:
        return id(p) in self._own

    def before_step(self, optimizer: Any) -> list[tuple[Gates, nn.Parameter, Tensor]]:
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not _skips(optimizer):  # fused optimizers skip a step by themselves under a scaler
            self.check_finite(gradients=True)
        pairs = zip(self.gates, self.embeddings, strict=True)
        return [(g, e, local(e.detach()).clone()) for g, e in pairs if id(e) in ids]

    @torch.no_grad()
    def after_step(self, optimizer: Any, state: list[tuple[Gates, nn.Parameter, Tensor]], innermost: bool) -> None:
        """What a step makes of the embeddings is scaled and clamped, or undone where the gates are hard."""
        for g, e, was in state:
            c, now = g.config, local(e.detach())
            if g.settled:
                now.copy_(was)
                continue
            if innermost and c.embedding_lr_scale != 1.0:
                now.copy_(was + c.embedding_lr_scale * (now - was))
            now.clamp_(-c.clamp, c.clamp)
        self.check_finite()
        if innermost and not _skips(optimizer):
            self._counts[id(optimizer)] = self._counts.get(id(optimizer), 0) + 1
            if self._counts[id(optimizer)] > self.steps:  # the one of several optimizers that steps most
                self.steps += 1
                self.after(self.steps)

    # ---- on leaving ------------------------------------------------------------------------------------------------

    def put_back(self) -> list[str]:
        reshard(self.model)
        names = super().put_back()
        with torch.no_grad():
            for k, module in zip(self.kept, self._modules, strict=True):
                put = module._parameters.get(k.name.rpartition(".")[2])
                if put is not None and put is not k.param and put.shape == k.param.shape:  # another in its place
                    put_back(put, k)
                    names.append(k.name)
            for name, b in self._buffers():
                old = self.buffers.get(name)
                if old is not None and old.shape == b.shape and not same_bits(b, old):
                    b.copy_(old)
                    names.append(name)
        return names

    def store_weights(self) -> None:
        """The task is sealed: what the optimizers store of the weights that it uses is set to what was sealed, or they
        would write other values later (a schedule-free method's `eval()`, Lookahead's sync)."""
        every = [
            Kept(h.param, None if h.task == self.task else part_of(h.live(self.task), h.param), h.name)
            for h in held(self.model)
            if h.task == self.task or (h.task is None and not h.plain)
        ]
        for k in every:
            k.old = taken(k)
        for o in self.stepped.values():
            ids = {id(p) for group in o.param_groups for p in group["params"]}
            StoredWeights(o, [k for k in every if id(k.param) in ids]).put_back()

    def check_finite(self, gradients: bool = False) -> None:
        """A loss that is not finite reaches every embedding's gradient, so it is seen before any weight takes the
        step."""
        seen = [e.grad if gradients else e for e in self.embeddings]
        if not all(bool(torch.isfinite(whole(x)).all()) for x in seen if x is not None):
            raise NonFiniteLossError(
                f"task {self.task}: its gate embeddings or their gradients are no longer finite, so the loss was NaN "
                "or infinite. Nothing was sealed and earlier tasks are as they were; lower the learning rate, clip "
                "gradients, or look at the batch"
            )

    def repair(self, model: nn.Module) -> list[str]:
        """Set shared elements that are not finite to zero: a later task may start from them."""
        names = []
        with torch.no_grad():
            for name, p in self.shared:
                bad = ~torch.isfinite(local(p))
                if bool(bad.any()):
                    local(p).masked_fill_(bad, 0)
                    names.append(name)
            for g, e in zip(self.gates, self.embeddings, strict=True):
                _refill(local(e), local(g.fresh_embedding(g.num_units, e.detach())))
            for module in model.modules():
                if isinstance(module, HATLayer) and "hat_tasks" in module._modules:
                    fresh = module._hat_new_copy().state_dict()
                    for name, x in module.hat_tasks[self.task].state_dict().items():
                        _refill(local(x), local(fresh[name]))
        return names


def _skips(optimizer: Any) -> bool:
    """Is this a step that the optimizer skips, since a gradient scaler found an infinity?"""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _refill(x: Tensor, fresh: Tensor) -> None:
    """Replace what is not finite."""
    if not x.is_floating_point() and not x.is_complex():
        return
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        x.copy_(torch.where(bad, fresh, x) if x.shape == fresh.shape else x.masked_fill(bad, 0))
