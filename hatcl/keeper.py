"""Keep elements of parameters bit for bit around any optimizer: while it steps, when it fails, and if other code writes
to them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from .errors import GuardError
from .functional import INTEGERS, local, same_bits

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq", "square_avg")
SMALLEST_MOMENT = 1e-30
"""Below it no second moment of a kept element falls. Its gradient is 0, so that it would be 0, or decay into denormal
floats: of both a CPU takes the root several times slower than of other numbers. To a step it is no other than 0."""
RAISED_EVERY = 100
"""After how many steps of an optimizer that is seen to."""
SHORTEST_RUN = 4
"""From how many elements on a run is written faster than by a mask."""
SMALL_MASK = 1 << 14
"""Up to how many elements a mask is kept as wide as the parameter is, and is written faster. Of more, memory counts."""


@dataclass
class Kept:
    """Elements of a parameter that must not change.

    A mask is converted to one of two forms that are written several times faster. A mask that is the same along the
    last dimensions (as a convolution's is over its kernel) becomes indices, each for `run` consecutive elements. Any
    other mask becomes integers in the memory order of the parameter, 0 where an element is kept and -1 (all bits) where
    it is free; `masked` is then True. If it is the same along other dimensions (as an embedding's is for all rows),
    these integers are stored only once.

    Attributes:
        which: None = all elements; a bool mask of the parameter's shape; or flat indices (int64, fewer than all), whose
            memory depends only on their number.
        old: the values of these elements.
    """

    param: nn.Parameter
    which: Tensor | None
    name: str = ""
    run: int = 1
    masked: bool = False
    old: Tensor = field(default_factory=lambda: torch.zeros(0))
    _views: tuple[Any, Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        mask = self.which
        if mask is None or mask.dtype != torch.bool:
            return
        run, last = 1, mask.dim()
        while last and (mask.stride(last - 1) == 0 or mask.shape[last - 1] == 1):
            last -= 1
            run *= mask.shape[last]
        p = local(self.param.detach())
        part = _one_index(mask, p)
        if part is not None:
            self.which, self.masked = part.to(INTEGERS[p.element_size()]).sub_(1), True
        elif (run >= SHORTEST_RUN and p.is_contiguous()) or p.element_size() not in INTEGERS:
            heads = mask.reshape(*mask.shape[:last], -1)[..., 0]
            self.which, self.run = heads.flatten().nonzero().flatten(), run
        else:
            kind = INTEGERS[p.element_size()] if p.numel() <= SMALL_MASK else torch.int8
            self.which, self.masked = torch.empty_like(p, dtype=kind).copy_(mask).sub_(1), True

    def take(self) -> None:
        """Store the current values as those to keep."""
        self.old, self._views = taken(self), None

    def put(self) -> None:
        """Write the kept values back."""
        p = self.param if type(self.param) is nn.Parameter else local(self.param)
        where, views = (p.data_ptr(), p.dtype, p.device), self._views
        if views is None or views[0] != where:  # the parameter was cast or has other memory
            if self.which is None or not (self.masked or p.is_contiguous()):
                put_back(self.param, self)
                return
            x = p.detach()
            view, old = (_bits(x), _bits(self.old.to(x))) if self.masked else (_at(x, self)[0], self.old.to(x))
            self._views = views = (where, view, old)
        assert self.which is not None
        if self.masked:
            views[1].bitwise_and_(self.which).bitwise_or_(views[2])
        else:
            views[1].index_copy_(0, self.which, views[2])


@dataclass
class _Step:
    """An optimizer's step in progress. by_wrapper: our wrapper saw it, not only torch's hook. inner: another optimizer
    has stepped within it (Lookahead, SAM)."""

    optimizer: Any
    by_wrapper: bool
    state: Any
    inner: bool = False


class Keeper:
    """Keeps elements of parameters bit-identical, whatever optimizer steps.

    - Gradient hooks zero the gradient of kept elements as it arrives, so that clipping sees the true norm. A parameter
      that is kept whole has no gradient at all.
    - After every step of an optimizer that holds such parameters, the kept elements are put back, even if the step
      raised. This holds for the optimizers given and for every other `torch.optim.Optimizer`: one inside another, or
      one that was not mentioned.
    - Copies of weights that an optimizer stores (the z of schedule-free methods, Lookahead's slow weights) are put back
      as well; otherwise it would write them into the parameters later.
    - On leaving, the kept elements are compared with their former values, and put back if other code wrote to them.

    Args:
        kept: the elements to keep. optimizers: those that will step. Parameters may be added to them later.

    Attributes:
        stepped: the optimizers that stepped. lock: held by the thread that steps. written: after leaving, the
            parameters that other code wrote to.
    """

    def __init__(self, kept: Sequence[Kept], optimizers: Sequence[Any]) -> None:
        self.kept = list(kept)
        self.optimizers = [unwrapped(o) for o in optimizers]
        self.written: list[str] = []
        self._hooks: list[Any] = []
        self._around: list[Any] = []
        self._wrapped: list[tuple[Any, Any, bool]] = []
        self.stepped: dict[int, Any] = {}
        self._running: list[_Step] = []
        self._stored: dict[int, StoredWeights] = {}
        self._known: dict[int, tuple[int, list[Kept], bool]] = {}
        self._ended: dict[int, int] = {}
        self._active = False
        self.lock = threading.RLock()

    # ---- hooks for subclasses around a step ---------------------------------------------------------------------

    def before_step(self, optimizer: Any) -> Any:
        """Called before an optimizer steps; its result is passed to `after_step`."""

    def after_step(self, optimizer: Any, state: Any, innermost: bool) -> None:
        """Called after a step that did not raise, with the kept elements back in place.

        Args:
            innermost: no other optimizer stepped within this step.
        """

    def concerns(self, p: Tensor) -> bool:
        """Must this parameter's optimizer be watched, even if none of its elements are kept?"""
        return False

    # ---- on and off --------------------------------------------------------------------------------------------

    def __enter__(self) -> Keeper:
        self.hold()
        for o in self.optimizers:
            self._zero_moments(o)
            self._wrap(o)
        self._around = [
            torch_optimizer.register_optimizer_step_pre_hook(lambda o, *_: self._begin(o)),
            torch_optimizer.register_optimizer_step_post_hook(lambda o, *_: self._end(o, True)),
        ]
        self._active = True
        return self

    def hold(self) -> None:
        """Store the current values as those to keep."""
        for k in self.kept:
            k.take()
            if k.param.requires_grad:
                self._hooks.append(k.param.register_post_accumulate_grad_hook(_zero(k)))
        self._known, self._stored = {}, {}

    def hold_instead(self, kept: Sequence[Kept]) -> None:
        """From now on, keep these elements instead, with their current values."""
        for h in self._hooks:
            h.remove()
        self._hooks, self.kept = [], list(kept)
        self.hold()
        for o in self.optimizers:
            self._zero_moments(o)

    def __exit__(self, *exc: object) -> None:
        self._active = False
        for h in (*self._hooks, *self._around):
            h.remove()
        for o, wrapped, had in self._wrapped:
            if vars(o).get("step") is wrapped:  # else a scheduler wrapped ours, which passes calls through
                if had:
                    o.step = wrapped.__dict__["_hat_inner"]
                else:
                    del o.step
        try:
            self.written = self.put_back()
        except BaseException:  # interrupted during `put_back`: put everything back first
            self.put_back()
            raise

    def put_back(self) -> list[str]:
        """Put every kept element back. Returns the names of the parameters that other code had written to."""
        names = []
        for k in self.kept:
            if not same_bits(taken(k), k.old):
                names.append(k.name)
                put_back(k.param, k)
        for o in self.stepped.values():
            self._sync(o)
        return names

    # ---- around a step -----------------------------------------------------------------------------------------

    def _wrap(self, optimizer: Any) -> None:
        """Give an optimizer a `step` of our own. Torch's hooks around a step do not run if it raises, nor for
        optimizers that are not torch's."""
        had, inner = "step" in vars(optimizer), optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return inner(*args, **kwargs)
            with self.lock:
                self._begin(optimizer, by_wrapper=True)
                done = False
                try:
                    out = inner(*args, **kwargs)
                    done = True
                    return out
                finally:
                    self._end(optimizer, done, by_wrapper=True)

        # schedulers look for these on a bound method
        step.__func__ = lambda _, *args, **kwargs: step(*args, **kwargs)  # type: ignore[attr-defined]
        step.__self__ = optimizer  # type: ignore[attr-defined]
        if hasattr(inner, "_wrapped_by_lr_sched"):
            step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        if had:
            step.__dict__["_hat_inner"] = inner
        optimizer.step = step
        self._wrapped.append((optimizer, step, had))

    def _begin(self, optimizer: Any, by_wrapper: bool = False) -> None:
        running = next((s for s in self._running if s.optimizer is optimizer), None)
        if running is not None and running.by_wrapper:
            return  # torch's hook, called within our wrapper
        if running is not None:  # this step raised, which torch's hook does not report
            del self._running[self._running.index(running) :]
        kept, watched = self._mine(optimizer)
        if watched:
            self.stepped[id(optimizer)] = optimizer
            for k in kept:
                if k.which is None:
                    k.param.grad = None
            self._running.append(_Step(optimizer, by_wrapper, self.before_step(optimizer)))

    def _end(self, optimizer: Any, done: bool, by_wrapper: bool = False) -> None:
        at = next((i for i, s in enumerate(self._running) if s.optimizer is optimizer), None)
        if at is None or self._running[at].by_wrapper != by_wrapper:
            return
        step = self._running[at]
        del self._running[at:]
        put_all_back(self._mine(optimizer)[0])
        self._sync(optimizer)
        ended = self._ended.get(id(optimizer), 0)
        self._ended[id(optimizer)] = ended + 1
        if ended % RAISED_EVERY == 0:  # also after the first step, which creates the moments
            self._raise_moments(optimizer)
        if done:
            for outer in self._running:
                outer.inner = True
            self.after_step(optimizer, step.state, not step.inner)

    def _mine(self, optimizer: Any) -> tuple[list[Kept], bool]:
        """The kept elements of an optimizer's parameters, and whether its steps are watched at all."""
        groups = getattr(optimizer, "param_groups", ())
        count = sum(len(group["params"]) for group in groups)
        known = self._known.get(id(optimizer))
        if known is None or known[0] != count:
            params = [p for group in groups for p in group["params"]]
            ids = {id(p) for p in params}
            kept = [k for k in self.kept if id(k.param) in ids]
            given = any(o is optimizer for o in self.optimizers)
            known = (count, kept, given or bool(kept) or any(map(self.concerns, params)))
            self._known[id(optimizer)] = known
        return known[1:]

    # ---- copies that optimizers store -----------------------------------------------------------

    def _zero_moments(self, optimizer: Any) -> None:
        """Zero the first moments of kept elements. Otherwise they decay into denormal floats, which cost a CPU more
        than the step."""
        for k in self.kept:
            state = _state_of(optimizer, k.param)
            for key in FIRST_MOMENTS:
                moment = state.get(key)
                if k.which is not None and isinstance(moment, Tensor) and moment.shape == k.param.shape:
                    _clear(local(moment.detach()), k)

    def _raise_moments(self, optimizer: Any) -> None:
        for k in self._mine(optimizer)[0]:
            state = _state_of(optimizer, k.param) if k.which is not None else {}
            for key in SECOND_MOMENTS:
                moment = state.get(key)
                if not isinstance(moment, Tensor) or moment.device.type != "cpu":
                    continue
                if moment.shape == k.param.shape and moment.dtype in (torch.float32, torch.float64, torch.bfloat16):
                    _raise(local(moment.detach()), k)

    def _sync(self, optimizer: Any) -> None:
        """Put back the copies of weights that an optimizer stores."""
        stored = self._stored.get(id(optimizer))
        if stored is None:
            self._stored[id(optimizer)] = stored = StoredWeights(optimizer, self._mine(optimizer)[0])
        stored.put_back()


_WEIGHTS: weakref.WeakKeyDictionary[Any, dict[Any, bool]] = weakref.WeakKeyDictionary()
"""Optimizer -> key -> whether it stores weights there, as decided when the key first appeared. Later the stored weights
may differ too much from the parameters to be recognised."""
_SOME = 4096


class StoredWeights:
    """Copies of the weights that an optimizer stores and later writes into them: the z of schedule-free methods,
    Lookahead's slow weights, a backup.

    They are recognised by their values, not by name. They are tensors of the parameters' shapes, under one key of the
    optimizer's state or in a list as long as its parameters. When first seen, they must all together point in the
    parameters' direction (cosine above .9) and have about their size (a half to twice).
    """

    def __init__(self, optimizer: Any, kept: Sequence[Kept]) -> None:
        self._optimizer, self._kept = optimizer, list(kept)
        self._is_weight = _WEIGHTS.setdefault(optimizer, {})
        self._size = -1
        self._found: list[tuple[Kept, Tensor]] = []

    def look(self) -> None:
        """Look for them again if the optimizer's state has grown or shrunk."""
        state = getattr(self._optimizer, "state", {})
        size = sum(len(s) for s in state.values() if isinstance(s, dict))
        if size != self._size:
            self._size, self._found = size, list(self._look())

    def put_back(self) -> None:
        self.look()
        for k, tensor in self._found:
            put_back(tensor, k)

    @torch.no_grad()
    def begin_again(self) -> None:
        """The elements got other values on purpose: set the stored copies to these values, and the moments to 0."""
        for k in self._kept:
            k.take()
        self.put_back()
        for k in self._kept:
            for key, x in _state_of(self._optimizer, k.param).items():
                if isinstance(x, Tensor) and x.shape == k.param.shape and not self._is_weight.get(key):
                    x.zero_() if k.which is None else _clear(local(x.detach()), k)

    def _look(self) -> Iterator[tuple[Kept, Tensor]]:
        params = [p for group in getattr(self._optimizer, "param_groups", ()) for p in group["params"]]
        beside: dict[Any, dict[int, tuple[Tensor, Tensor]]] = {}
        for p in params:
            for key, x in _state_of(self._optimizer, p).items():
                if isinstance(x, Tensor) and x.shape == p.shape:
                    beside.setdefault(key, {})[id(p)] = (p, x)
        for name, value in vars(self._optimizer).items():
            tensors = list(tensors_within(value)) if isinstance(value, (list, tuple)) else []
            if len(tensors) == len(params) and all(x.shape == p.shape for x, p in zip(tensors, params, strict=True)):
                beside[f".{name}"] = {id(p): (p, x) for p, x in zip(params, tensors, strict=True)}
        for key, pairs in beside.items():
            if key not in self._is_weight:
                self._is_weight[key] = same_direction(pairs.values())
            if self._is_weight[key]:
                yield from ((k, pairs[id(k.param)][1]) for k in self._kept if id(k.param) in pairs)


def same_direction(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Do the second tensors of all pairs together point in the direction of the first, with about their size?"""
    both = one = other = 0.0
    for a, b in pairs:
        a, b = (local(x.detach()).flatten()[:_SOME].double() for x in (a, b))
        both, one, other = both + float(a @ b), one + float(a @ a), other + float(b @ b)
    return 0.25 * one < other < 4 * one and both > 0.9 * (one * other) ** 0.5


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that really steps: accelerate and Lightning wrap it, and call it only once gradients are
    complete."""
    while True:
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or inner is optimizer or not hasattr(inner, "param_groups") or not hasattr(inner, "step"):
            return optimizer
        optimizer = inner


def _state_of(optimizer: Any, p: Tensor) -> dict[Any, Any]:
    state = getattr(optimizer, "state", {})
    found = state.get(p) if hasattr(state, "get") else None
    return found if isinstance(found, dict) else {}


def tensors_within(value: Any) -> Iterator[Tensor]:
    for x in value:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors_within(x)


def check_optimizers(model: nn.Module, optimizers: Sequence[Any], remedy: str) -> set[int]:
    """The ids of all parameters that the optimizers hold.

    Args:
        remedy: the end of the message about an optimizer of another model: what to do.

    Raises:
        GuardError: an optimizer has no `step()` to guard, or holds none of the model's parameters.
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


# ---- elements of a tensor -----------------------------------------------------------------------------------------


def _zero(k: Kept) -> Callable[[Tensor], None]:
    def hook(p: Tensor) -> None:
        grad = p.grad
        if grad is None:
            return
        if k.which is None:
            p.grad = None
        elif grad.is_sparse:
            grad = grad.coalesce()
            values = grad.values().masked_fill(_mask(p, k)[tuple(grad.indices())], 0)
            p.grad = torch.sparse_coo_tensor(grad.indices(), values, grad.shape, check_invariants=False)
        else:
            _clear(local(grad.detach() if grad.requires_grad else grad), k)

    return hook


def _one_index(mask: Tensor, p: Tensor) -> Tensor | None:
    """The part of a mask that the rest repeats, if it lies along the parameter's memory, where it is as fast as a full
    mask; None otherwise."""
    again = [d for d in range(mask.dim()) if mask.stride(d) == 0 and mask.shape[d] > 1]
    nearest = min((d for d in range(p.dim()) if p.shape[d] > 1), key=p.stride, default=None)
    if not again or nearest is None or nearest in again or p.element_size() not in INTEGERS:
        return None
    for d in again:
        mask = mask.narrow(d, 0, 1)
    return mask


def _bits(x: Tensor) -> Tensor:
    """The same memory, viewed as integers."""
    return x.view(INTEGERS[x.element_size()])


def _mask(x: Tensor, k: Kept) -> Tensor:
    assert k.which is not None
    if k.masked:
        return (k.which == 0).expand(x.shape)
    runs = torch.zeros(x.numel() // k.run, dtype=torch.bool, device=x.device).index_fill_(0, k.which, True)
    return runs.repeat_interleave(k.run).view(x.shape)


def _at(x: Tensor, k: Kept) -> tuple[Tensor, Any]:
    """A view and its index for elements given by indices: flat if the elements of `x` are contiguous, else one index
    per dimension."""
    assert k.which is not None
    if x.is_contiguous():
        return x.view(-1) if k.run == 1 else x.view(-1, k.run), k.which
    which = k.which if k.run == 1 else k.which[:, None] * k.run + torch.arange(k.run, device=x.device)
    return x, torch.unravel_index(which, x.shape)


def _clear(x: Tensor, k: Kept) -> None:
    """Zero the kept elements of `x`, which must not need a gradient."""
    assert k.which is not None
    if k.masked:
        _bits(x).bitwise_and_(k.which)
        return
    view, at = _at(x, k)
    if isinstance(at, Tensor):
        view.index_fill_(0, at, 0)
    else:
        view[at] = 0


def _raise(x: Tensor, k: Kept) -> None:
    """Raise the kept elements to at least `SMALLEST_MOMENT`."""
    if k.masked:
        x.copy_(torch.where(_mask(x, k), x.clamp(min=SMALLEST_MOMENT), x))
        return
    view, at = _at(x, k)
    view[at] = view[at].clamp(min=SMALLEST_MOMENT)


def taken(k: Kept) -> Tensor:
    """A copy of the current values of the kept elements; for a mask, of the whole tensor with zeros elsewhere."""
    x = local(k.param.detach())
    if k.which is None:
        return x.clone()
    if k.masked:
        return _bits(x).bitwise_and(~k.which).view(x.dtype)
    view, at = _at(x, k)
    return view[at]


@torch.no_grad()
def put_all_back(kept: Sequence[Kept]) -> None:
    """Write back the kept values of many parameters; parameters that are kept whole are written in one call."""
    whole: list[Tensor] = []
    was: list[Tensor] = []
    for k in kept:
        if k.which is not None:
            k.put()
            continue
        whole.append(k.param if type(k.param) is nn.Parameter else local(k.param.detach()))
        was.append(k.old)
    if whole:
        torch._foreach_copy_(whole, was)


@torch.no_grad()
def put_back(p: Tensor, k: Kept) -> None:
    """Write the kept values back into a tensor of the parameter's shape."""
    x = local(p.detach())
    if k.which is None:
        x.copy_(k.old)
        return
    if k.masked:
        _bits(x).bitwise_and_(k.which).bitwise_or_(_bits(k.old.to(x)))
        return
    view, at = _at(x, k)
    if isinstance(at, Tensor):
        view.index_copy_(0, at, k.old.to(view))
    else:
        view[at] = k.old.to(view)
