"""State that a forward changes in addition to buffers: attributes of modules (numbers, lists, caches in a dict) and
buffers that are added or removed. Every task has its own.

A task that is being learned reads and writes its own values. A sealed task starts every forward of the model with its
values from sealing: caches fill and counters count within a forward, and are then discarded. As in the plain model, the
values are not part of a state dict.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ...calls import inside, values_of
from ...functional import same_bits
from ...shards import check_precision, gathered, sharded_modules
from ..binding import Binding
from .gated import HATLayer

STATES = "_hat_states"
Key = tuple[str, str]  # path of a module at conversion, name of the attribute


class _Absent:
    """Marks an absent attribute."""

    def __deepcopy__(self, memo: Any) -> _Absent:
        return self

    def __reduce__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()
_TORCHS = frozenset(nn.Module().__dict__) | {"call_super_init", "forward"}


class States:
    """The state that the modules of one model keep between forwards, per task.

    Attributes:
        start: the values at conversion. tasks: task -> its values, once it has read any while open.
    """

    def __init__(self, start: dict[Key, Any]) -> None:
        self.start = start
        self.tasks: dict[int, dict[Key, Any]] = {}

    def of(self, task: int, is_open: bool) -> dict[Key, Any]:
        """The values that a task reads and writes now. All are copied together, since modules may share an object."""
        if is_open:
            if task not in self.tasks:
                self.tasks[task] = detached_copy(self.start)
            return self.tasks[task]
        mine = _of_this_thread().setdefault(self, {})
        if task not in mine:
            mine[task] = detached_copy(self.tasks.get(task, self.start))
        return mine[task]

    def reset(self, key: Key, tasks: Sequence[int]) -> None:
        """Reset one of the attributes for these tasks."""
        for t in tasks:
            if t in self.tasks:
                self.tasks[t][key] = detached_copy(self.start[key])

    def forget(self, task: int) -> None:
        self.tasks.pop(task, None)
        _of_this_thread().pop(self, None)

    def apply(self, path: str, fn: Callable[[Tensor], Tensor]) -> None:
        for values in (self.start, *self.tasks.values()):
            for key, value in values.items():
                if key[0] == path and isinstance(value, Tensor):
                    values[key] = fn(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> States:
        made = States.__new__(States)
        memo[id(self)] = made
        for x in (self.start, self.tasks):
            _without_graphs(x, memo)
        made.start, made.tasks = copy.deepcopy(self.start, memo), copy.deepcopy(self.tasks, memo)
        return made


class _Local(threading.local):
    """The state of sealed tasks during the current forward of a thread."""

    def __init__(self) -> None:
        self.states: WeakKeyDictionary[States, dict[int, dict[Key, Any]]] = WeakKeyDictionary()


_LOCAL = _Local()


def _of_this_thread() -> WeakKeyDictionary[States, dict[int, dict[Key, Any]]]:
    return _LOCAL.states


def begin_forward(model: nn.Module, args: Any) -> None:
    """Forward pre-hook of a model: discard the state that sealed tasks wrote in this thread's last forward."""
    _of_this_thread().pop(model.__dict__[STATES], None)


def forget_states(model: nn.Module, task: int) -> None:
    """Drop a task's state: when it is learned next, it starts with the modules' values from conversion."""
    for m in model.modules():
        if STATES in m.__dict__:
            m.__dict__[STATES].forget(task)


def _without_graphs(x: Any, memo: dict[int, Any]) -> None:
    for _, part in inside(x):
        if isinstance(part, Tensor) and not part.is_leaf:
            memo[id(part)] = part.detach().clone()


def detached_copy(x: Any) -> Any:
    """A copy of `x` without autograd graphs that shares no memory with it, except modules and parameters, which are not
    copied."""
    memo: dict[int, Any] = {}
    _without_graphs(x, memo)
    memo.update((id(part), part) for _, part in inside(x) if isinstance(part, (nn.Module, nn.Parameter)))
    return copy.deepcopy(x, memo)


def same(a: Any, b: Any) -> bool:
    """Are two objects equal in all their parts, bit for bit?"""
    return _same_parts(parts_of(a), parts_of(b))


def parts_of(x: Any) -> list[tuple[str, Any]]:
    """The parts of an object, in a form that can be compared later."""
    return [(path, _frozen(part)) for path, part in inside(x)]


def _frozen(x: Any) -> Any:
    if isinstance(x, Tensor):
        return type(x), None if x.is_meta else {n: v.clone() for n, v in values_of(x).items()}
    if isinstance(x, (int, float, complex, str, bytes, bool, type(None))):
        return type(x), repr(x)  # repr distinguishes all floats, and NaN equals NaN
    if type(x).__module__ == "numpy":
        return type(x), x.tobytes(), getattr(x, "shape", ())
    return (type(x),) if hasattr(x, "__dict__") or isinstance(x, (dict, list, tuple, set, frozenset)) else (type(x), x)


def _same_parts(a: list[tuple[str, Any]], b: list[tuple[str, Any]]) -> bool:
    if len(a) != len(b):
        return False
    for (path, x), (other, y) in zip(a, b, strict=True):
        if path != other or len(x) != len(y) or x[0] is not y[0]:
            return False
        for left, right in zip(x[1:], y[1:], strict=True):
            if isinstance(left, dict) and isinstance(right, dict):
                if left.keys() != right.keys() or not all(same_bits(v, right[n]) for n, v in left.items()):
                    return False
            elif not (left is right or left == right):
                return False
    return True


def copy_of(model: nn.Module, share: bool = False) -> nn.Module:
    """A copy of a model, without the autograd graphs of tensors that its last forward left in attributes. share: share
    the parameters, except those that a forward writes to (the table of an embedding with `max_norm`)."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} if share else {}
    for m in model.modules():
        if share and getattr(m, "max_norm", None) is not None:
            for p in m._parameters.values():
                memo.pop(id(p), None)
    for m in model.modules():
        for name, value in m.__dict__.items():
            if name not in _TORCHS and not name.startswith("_hat") and not isinstance(value, (str, int, float)):
                _without_graphs(value, memo)
    if sharded_modules(model):  # all processes call this
        check_precision(model)
        return gathered(model)
    return copy.deepcopy(model, memo)


# ---- which ----------------------------------------------------------------------------------------------------------


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Everything that a module keeps in addition to its parameters and submodules: attributes, buffers, and the
    containers and tensors that its class keeps for all instances."""
    for name, value in module.__dict__.items():
        if name not in _TORCHS and not name.startswith("_hat"):
            yield name, value
    yield from module._buffers.items()
    for cls in type(module).__mro__:
        if cls.__module__.partition(".")[0] != "torch":
            for name, value in vars(cls).items():
                kept = isinstance(value, (dict, list, set, Tensor)) and not name.startswith("__")
                if kept and name not in module.__dict__ and name not in module._buffers:
                    yield name, value


class Watch:
    """Records which attributes of a model's modules change from now on."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self._now()
        self.changed: dict[Key, None] = {}

    def _now(self) -> dict[Key, list[tuple[str, Any]]]:
        known: dict[int, tuple[Any, list[tuple[str, Any]]]] = {}  # many modules share one config
        out: dict[Key, list[tuple[str, Any]]] = {}
        for path, module in self.model.named_modules():
            for name, value in attributes(module):
                if id(value) not in known:
                    known[id(value)] = (value, parts_of(value))
                out[path, name] = known[id(value)][1]
        return out

    def look(self) -> None:
        """Note what differs from the beginning."""
        now, modules = self._now(), dict(self.model.named_modules())
        for key in {**self.before, **now}:
            if key in self.changed:
                continue
            module = modules.get(key[0])
            if module is None or key[1] in module._modules or key[1] in module._parameters:
                continue  # a submodule that the forward created, or an attribute that became a submodule or parameter
            if key not in now or key not in self.before or not _same_parts(self.before[key], now[key]):
                self.changed[key] = None


@contextlib.contextmanager
def classes_kept(model: nn.Module) -> Iterator[None]:
    """On leaving, restore the values that the classes of a model's modules keep for all instances."""
    of_classes = [
        (value, detached_copy(value))
        for m in model.modules()
        for name, value in attributes(m)
        if name not in m.__dict__ and name not in m._buffers
    ]
    try:
        yield
    finally:
        for value, was in of_classes:
            if isinstance(value, Tensor):
                value.detach().copy_(was)
            elif isinstance(value, list):
                value[:] = was
            elif not same(value, was):
                value.clear()
                value.update(was)


# ---- the property ---------------------------------------------------------------------------------------------------


def _plain(module: Any, name: str) -> Any:
    """The plain model's value under a name, else ABSENT."""
    for place in (module.__dict__, module.__dict__["_buffers"]):
        if name in place:
            return place[name]
    for cls in type(module).__mro__:
        found = cls.__dict__.get(name, ABSENT)
        if found is not ABSENT and not (isinstance(found, property) and found.fget.__module__ == __name__):
            return found.__get__(module, type(module)) if hasattr(found, "__get__") else found
    return ABSENT


def _active(module: Any) -> tuple[States, Binding, int] | None:
    hat, states = module.__dict__.get("_hat"), module.__dict__.get(STATES)
    task = None if hat is None or states is None else hat.gates.task
    return None if task is None else (states, hat, task)


def task_state(name: str) -> property:
    """A property for an attribute with a value per task."""

    def get(self: Any) -> Any:
        active = _active(self)
        if active is None:
            value = _plain(self, name)
        else:
            states, hat, task = active
            value = states.of(task, hat.gates.is_open(task)).get((hat.path, name), ABSENT)
        if value is ABSENT:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return value

    def put(self: Any, value: Any) -> None:
        _put_state(self, name, value)

    def drop(self: Any) -> None:
        if _active(self) is not None:
            _put_state(self, name, ABSENT)
        elif self.__dict__.pop(name, ABSENT) is ABSENT:
            del self.__dict__["_buffers"][name]

    return property(get, put, drop)


def _put_state(module: Any, name: str, value: Any) -> None:
    active = _active(module)
    if active is None:
        place = module.__dict__["_buffers"] if name in module.__dict__["_buffers"] else module.__dict__
        place[name] = value
    else:
        states, hat, task = active
        states.of(task, hat.gates.is_open(task))[hat.path, name] = value
    hat, states = module.__dict__.get("_hat"), module.__dict__.get(STATES)
    if hat is None or states is None or not states.tasks or (active is not None and not hat.gates.is_open(active[2])):
        return
    if same(value, states.start[hat.path, name]):  # a reset, as when `train()` clears caches: reset all unsealed tasks
        others = [t for t in states.tasks if (active is None or t != active[2]) and not bool(hat.gates.sealed[t])]
        states.reset((hat.path, name), others)


def _is_state(module: Any, name: str) -> bool:
    found = type(module).__dict__.get(name)
    return isinstance(found, property) and found.fget is not None and found.fget.__module__ == __name__


def _setattr(_: str) -> Callable[[Any, str, Any], None]:
    def __setattr__(self: Any, name: str, value: Any) -> None:
        (_put_state if _is_state(self, name) else HATLayer.__setattr__)(self, name, value)

    return __setattr__


def _register_buffer(_: str) -> Callable[..., None]:
    def register_buffer(self: Any, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if _is_state(self, name) and _active(self) is not None:
            _put_state(self, name, tensor)
        else:
            super(HATLayer, self).register_buffer(name, tensor, persistent)

    return register_buffer


def _apply(_: str) -> Callable[..., Any]:
    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        out = HATLayer._apply(self, fn, recurse)
        self.__dict__[STATES].apply(self._hat.path, fn)
        return out

    return _apply


def state_attributes(names: Sequence[str]) -> tuple[tuple[str, Callable[[str], Any]], ...]:
    """The properties and methods for the class of a module with state attributes (see `registry.derive`)."""
    own = (("__setattr__", _setattr), ("register_buffer", _register_buffer), ("_apply", _apply))
    return (*((n, task_state) for n in names), *own) if names else ()


def keep_per_task(model: nn.Module, modules: dict[str, tuple[nn.Module, tuple[str, ...]]]) -> None:
    """Give every task its own values of some attributes of a converted model. modules: path -> (module, names)."""
    start = {(path, n): _plain(m, n) for path, (m, names) in modules.items() for n in names}
    if not start:
        return
    states = States(detached_copy(start))
    for module in (model, *(m for m, _ in modules.values())):
        module.__dict__[STATES] = states
    model.register_forward_pre_hook(begin_forward)
