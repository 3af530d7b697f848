"""What is frozen while a task is learned, and the guard that keeps it so whatever the optimizer does."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import GuardError, HATError, IntegrityError, NonFiniteLossError
from .functional import digest_of
from .gates import Gates, gates_of
from .layers.gated import Binding, HATLayer, ParameterPlan, TaskCopy

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")


@dataclass
class Held:
    """A parameter of a HAT model. task: whose own it is (None: shared). plan: its axes, for a shared one."""

    name: str
    param: nn.Parameter
    plan: ParameterPlan | None
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
                out[id(e)] = Held(f"{prefix}embeddings.{t}", e, None, t)
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
                out[id(p)] = Held(f"{prefix}{name}", p, plan, None, plan is not None and plan.copied)
        if hat is not None:
            for t, copy in enumerate(getattr(module, "hat_tasks", ())):
                for name, p in copy.named_parameters():
                    out[id(p)] = Held(f"{prefix}hat_tasks.{t}.{name}", p, None, t)
    return list(out.values())


def own_buffers(model: nn.Module, task: int) -> Iterator[tuple[str, Tensor]]:
    """A task's running statistics."""
    for path, module in model.named_modules():
        if isinstance(module, HATLayer) and "hat_tasks" in module._modules:  # type: ignore[attr-defined]
            for name, b in module.hat_tasks[task].named_buffers():
                yield f"{path}.hat_tasks.{task}.{name}", b


def shared_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that all tasks read and none may write: those that are saved and are no task's own."""
    for path, module in model.named_modules():
        if isinstance(module, (Gates, TaskCopy)):
            continue
        hat = isinstance(module, HATLayer) and module.__dict__.get("_hat") is not None
        own = module._hat_copied_buffers() if hat else ()
        for name, b in module._buffers.items():
            if b is not None and name not in own and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, b


def sealed_tasks(model: nn.Module) -> list[int]:
    return gates_of(model)[0].sealed.nonzero().flatten().tolist()


# ---- digests: the proof that what was sealed is what is there ------------------------------------


def digest(model: nn.Module, task: int) -> dict[str, str]:
    """name -> `dtype:sha256` of everything a sealed task computes with: live elements, own copies, statistics,
    gates."""
    out: dict[str, str] = {}
    every = held(model)
    names = [h.name for h in every]
    wrapped = _shared_path(names)  # a model inside DistributedDataParallel or torch.compile is the same model
    for h in every:
        if h.plain or (h.task is not None and h.task != task):
            continue
        value = h.param.detach()
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


_SEALED_BY = WeakTensorKeyDictionary()  # parameter -> the gates of the model that sealed a task with it


def record(model: nn.Module, task: int) -> None:
    """Store a task's digest with its gates."""
    gates = gates_of(model)[0]
    gates.digests[task] = digest(model, task)
    for h in held(model):
        _SEALED_BY[h.param] = weakref.ref(gates)


def check(model: nn.Module, only: Sequence[int] | None = None) -> None:
    """Compare every sealed task with its digest.

    A parameter that was cast since (`model.half()`) has other bits by the user's own wish; its digest is taken anew.

    Raises:
        IntegrityError: names the task and the parameters that changed.
    """
    store = gates_of(model)[0].digests
    for task in sealed_tasks(model) if only is None else only:
        if task not in store:
            continue
        now = digest(model, task)
        changed = []
        for name, was in store[task].items():
            if name not in now or (now[name] != was and now[name].split(":")[0] == was.split(":")[0]):
                changed.append(name)
        if changed:
            raise IntegrityError(
                f"task {task} was sealed, but {len(changed)} of what it uses changed since: {', '.join(changed[:5])}"
                f"{' ...' if len(changed) > 5 else ''}. Something outside hatcl.learn wrote to the model; "
                "load the last saved model, or forget the task (hatcl.forget_task)"
            )
        store[task] = now


# ---- the guard -----------------------------------------------------------------------------------


class Keeper:
    """Keeps elements of parameters bit-identical, whatever optimizer steps.

    Gradient hooks zero their gradient as it arrives, so that clipping sees the true norm; after every
    `optimizer.step()` they are put back, so that momentum, weight decay and whatever else an optimizer does cannot
    move them. A parameter that is kept whole has no gradient at all.

    Args:
        frozen: parameters, and which of their elements: None = all; a bool mask of the parameter's shape; or flat
            indices (int64, fewer than all), which cost memory by their number alone.
        optimizers: those that will step. Parameters may join them later.
    """

    def __init__(self, frozen: Sequence[tuple[nn.Parameter, Tensor | None]], optimizers: Sequence[Any]) -> None:
        self.frozen, self._optimizers = list(frozen), list(optimizers)
        self.active = True
        self._hooks: list[Any] = []
        self._steps: list[tuple[Any, Any, bool]] = []

    def around(self, optimizer: Any, ids: set[int], first: bool) -> contextlib.AbstractContextManager[None]:
        """Around an optimizer's step and the putting back.

        Args:
            ids: of the optimizer's parameters. first: is it the first of the optimizers?
        """
        return contextlib.nullcontext()

    # ---- on and off ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Keeper:
        for p, which in self.frozen:
            if p.requires_grad:
                self._hooks.append(p.register_post_accumulate_grad_hook(_zero(which)))
        for i, o in enumerate(self._optimizers):
            for p, which in self.frozen:
                if which is None:
                    continue
                state = getattr(o, "state", {}).get(p, {})
                for key in FIRST_MOMENTS:  # or they decay into denormal floats, which cost a CPU more than the step
                    if isinstance(state.get(key), Tensor) and state[key].shape == p.shape:
                        _clear(state[key], which)
            had = "step" in vars(o)
            inner = o.step
            wrapped = self._wrap(o, inner, first=i == 0)
            o.step = wrapped
            self._steps.append((o, wrapped, had))
            if had:
                wrapped.__dict__["_hat_inner"] = inner
        return self

    def __exit__(self, *exc: object) -> None:
        self.active = False
        for h in self._hooks:
            h.remove()
        for o, wrapped, had in self._steps:
            if vars(o).get("step") is wrapped:  # else a scheduler wrapped it in turn, and ours passes calls through
                if had:
                    o.step = wrapped.__dict__["_hat_inner"]
                else:
                    del o.step

    def _wrap(self, optimizer: Any, inner: Callable[..., Any], first: bool) -> Callable[..., Any]:
        known: set[int] = set()
        held_here: list[tuple[nn.Parameter, Tensor | None, Tensor]] = []

        def hold() -> None:
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]} - known
            # frozen elements never change in between, so one copy at the start serves every step
            held_here.extend((p, which, _kept(p, which)) for p, which in self.frozen if id(p) in ids)
            known.update(ids)

        hold()

        def step(*args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return inner(*args, **kwargs)
            if sum(len(group["params"]) for group in optimizer.param_groups) != len(known):
                hold()
            for p, which, _ in held_here:
                if which is None:
                    p.grad = None
            with self.around(optimizer, known, first):
                out = inner(*args, **kwargs)
                for p, which, old in held_here:
                    _put_back(p, which, old)
            return out

        # schedulers look for these on a bound method
        step.__func__ = lambda _, *args, **kwargs: step(*args, **kwargs)  # type: ignore[attr-defined]
        step.__self__ = optimizer  # type: ignore[attr-defined]
        if hasattr(inner, "_wrapped_by_lr_sched"):
            step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        return step


def check_optimizers(model: nn.Module, optimizers: Sequence[Any], remedy: str) -> set[int]:
    """The ids of all parameters that the optimizers hold.

    Args:
        remedy: what to do about an optimizer of another model, as the message's end.

    Raises:
        GuardError: something that has no `step()` to guard, or that holds none of the model's parameters.
    """
    mine = {id(p) for p in model.parameters()}
    covered: set[int] = set()
    for o in optimizers:
        kind = type(o).__name__
        if not callable(getattr(o, "step", None)) or not hasattr(o, "param_groups"):
            raise GuardError(
                f"optimizer: got {kind}, which has no step() and param_groups to guard; pass a "
                "torch.optim.Optimizer (or a list of them) that you call step() on yourself"
            )
        ids = {id(p) for group in o.param_groups for p in group["params"]}
        if not ids & mine:
            raise GuardError(f"optimizer: {kind} holds none of this model's parameters; {remedy}")
        covered |= ids
    return covered


class Guard(Keeper):
    """Keeps what is frozen bit-identical while a task is learned. What that is depends on the task alone.

    Args:
        locked: sealed tasks that are held.
        after_step: called after every step of the first optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        task: int,
        optimizers: Sequence[Any],
        locked: Sequence[int],
        after_step: Callable[[], None],
    ) -> None:
        self.task, self.after_step = task, after_step
        frozen: list[tuple[nn.Parameter, Tensor | None]] = []
        self.shared: list[tuple[str, nn.Parameter, Tensor | None]] = []
        self.gates = gates_of(model)
        for h in held(model):
            sealed_by = _SEALED_BY.get(h.param, lambda: None)()
            if sealed_by is not None and bool(sealed_by.sealed.any()) and all(sealed_by is not g for g in self.gates):
                raise HATError(
                    f"{h.name} is also a parameter of another HAT model, whose sealed tasks would change; copy the "
                    "parameter, or convert one model that contains both"
                )
            whole = h.plain or (h.task is not None and h.task != task)
            mask: Tensor | None = None
            if not whole and h.task is None:
                if h.plan is None:
                    whole = bool(locked)
                else:
                    mask = torch.zeros(h.plan.view, dtype=torch.bool, device=h.param.device)
                    for t in locked:
                        mask |= h.plan.live(t, h.param.device)
                    mask = mask.reshape(h.param.shape)
                    whole = bool(mask.all())
                if not whole:
                    self.shared.append((h.name, h.param, mask))
            if whole:
                frozen.append((h.param, None))
            elif mask is not None and bool(mask.any()):
                frozen.append((h.param, mask))
        self.embeddings = [g.embeddings[task] for g in self.gates]
        self._check(model, optimizers)
        super().__init__(frozen, optimizers)

    def _check(self, model: nn.Module, optimizers: Sequence[Any]) -> None:
        covered = check_optimizers(
            model,
            optimizers,
            "build it over model.parameters() of the converted model (hatcl.convert returns a new model, the source's "
            "parameters are not its own)",
        )
        left = [e for e in self.embeddings if id(e) not in covered and e.numel()]
        if left:
            raise GuardError(
                f"optimizer: no optimizer holds task {self.task}'s gate embeddings; was it built before "
                "hatcl.add_tasks or over a part of the model? Call "
                f"optimizer.add_param_group({{'params': hatcl.task_parameters(model, {self.task})}})"
            )

    @contextlib.contextmanager
    def around(self, optimizer: Any, ids: set[int], first: bool) -> Iterator[None]:
        """What a step makes of the embeddings is scaled and clamped, or undone where the gates are hard."""
        mine = [(g, e) for g, e in zip(self.gates, self.embeddings, strict=False) if id(e) in ids]
        before = [e.detach().clone() for _, e in mine]
        skips = getattr(optimizer, "found_inf", None)  # fused optimizers skip a step by themselves under a scaler
        if skips is None or not bool(skips):
            self.check_finite(gradients=True)
        yield
        with torch.no_grad():
            for (g, e), was in zip(mine, before, strict=False):
                c = g.config
                if g.settled:
                    e.copy_(was)
                    continue
                if c.embedding_lr_scale != 1.0:
                    e.copy_(was + c.embedding_lr_scale * (e - was))
                e.clamp_(-c.clamp, c.clamp)
        if first:
            self.check_finite()
            self.after_step()

    # ---- what must not be sealed -------------------------------------------------------------------------------------

    def check_finite(self, gradients: bool = False) -> None:
        """A loss that is not finite reaches every embedding's gradient, so it is seen before any weight takes the
        step."""
        seen = [e.grad if gradients else e for e in self.embeddings]
        if not all(bool(torch.isfinite(x).all()) for x in seen if x is not None):
            raise NonFiniteLossError(
                f"task {self.task}: its gate embeddings or their gradients are no longer finite, so the loss was NaN "
                "or infinite. Nothing was sealed and earlier tasks are as they were; lower the learning rate, clip "
                "gradients, or look at the batch"
            )

    def repair(self, model: nn.Module) -> list[str]:
        """Set shared elements that are not finite to zero: a sealed task multiplies them with zero, and `0 * NaN` is
        NaN."""
        names = []
        with torch.no_grad():
            for name, p, _ in self.shared:
                bad = ~torch.isfinite(p)
                if bool(bad.any()):
                    p.masked_fill_(bad, 0)
                    names.append(name)
            for g, e in zip(self.gates, self.embeddings, strict=True):
                _refill(e, g.fresh_embedding(g.num_units, e.detach()))
            for module in model.modules():
                if isinstance(module, HATLayer) and "hat_tasks" in module._modules:
                    fresh = module._hat_new_copy().state_dict()
                    for name, x in module.hat_tasks[self.task].state_dict().items():
                        _refill(x, fresh[name])
        return names


def _refill(x: Tensor, fresh: Tensor) -> None:
    """Replace what is not finite."""
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        x.copy_(torch.where(bad, fresh, x) if x.shape == fresh.shape else x.masked_fill(bad, 0))


def _zero(which: Tensor | None) -> Callable[[Tensor], None]:
    def hook(p: Tensor) -> None:
        grad = p.grad
        if grad is None:
            return
        if which is None:
            p.grad = None
        elif grad.is_sparse:
            grad = grad.coalesce()
            values = grad.values().masked_fill(_mask(p, which)[tuple(grad.indices())], 0)
            p.grad = torch.sparse_coo_tensor(grad.indices(), values, grad.shape, check_invariants=False)
        else:
            _clear(grad, which)

    return hook


# ---- elements of a tensor: all (None), by a mask, or by flat indices ------------------------------


def _mask(x: Tensor, which: Tensor) -> Tensor:
    if which.dtype == torch.bool:
        return which
    return torch.zeros(x.numel(), dtype=torch.bool, device=x.device).index_fill_(0, which, True).view(x.shape)


def _at(x: Tensor, which: Tensor) -> tuple[Tensor, Any]:
    """A view and what to index it with: flat where the elements lie in order, else one index per dimension."""
    return (x.view(-1), which) if x.is_contiguous() else (x, torch.unravel_index(which, x.shape))


@torch.no_grad()
def _clear(x: Tensor, which: Tensor) -> None:
    if which.dtype == torch.bool:
        x.masked_fill_(which, 0)
    else:
        view, at = _at(x, which)
        view[at] = 0


def _kept(p: nn.Parameter, which: Tensor | None) -> Tensor:
    if which is None or which.dtype == torch.bool:
        return p.detach().clone()
    view, at = _at(p.detach(), which)
    return view[at]


@torch.no_grad()
def _put_back(p: nn.Parameter, which: Tensor | None, old: Tensor) -> None:
    if which is None:
        p.copy_(old)
    elif which.dtype == torch.bool:
        torch.where(which, old, p, out=p)
    else:
        view, at = _at(p, which)
        view[at] = old
