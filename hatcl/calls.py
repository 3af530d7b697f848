"""Run a model on a batch in any form that loaders give, and find every value in its output.

Proofs about a model cover only the values that these functions find. So an object that they cannot look into is an
error and is never skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import enum
import functools
import numbers
import random
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import SUPPORTED_NODES

from .errors import ConfigError, HATError
from .functional import digest_of

Batches = Iterable[Any]
Head = Callable[[Tensor], Tensor]


class OutputError(HATError, TypeError):
    """A forward returns something in which no value can be found."""


# ---- batches ---------------------------------------------------------------------------------------------------------


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Inputs and labels of a batch: `(inputs, labels)`, inputs alone, or a mapping of keyword arguments with an entry
    `labels`. The labels are None if there are none.

    Raises:
        ConfigError: a tuple or list is empty or has more than two entries.
    """
    if isinstance(batch, Mapping):
        return {k: v for k, v in batch.items() if k != "labels"}, batch.get("labels")
    if isinstance(batch, (tuple, list)):
        if len(batch) not in (1, 2):
            raise ConfigError(
                f"batches: got a batch of {len(batch)} parts, expected inputs or (inputs, labels); put several inputs "
                "into one tuple or mapping"
            )
        return batch[0], (batch[1] if len(batch) > 1 else None)
    return batch, None


def one_by_one(inputs: Any) -> Iterator[Any]:
    """Yield the examples of a batch's inputs, each as a batch of one."""
    if isinstance(inputs, Tensor):
        yield from inputs.split(1)
    elif isinstance(inputs, Mapping):
        for parts in zip(*map(one_by_one, inputs.values()), strict=True):
            yield dict(zip(inputs, parts, strict=True))
    else:
        yield from zip(*map(one_by_one, inputs), strict=True)


def examples_in(batch: Any) -> int:
    """The number of examples in a batch of (inputs, labels) or a mapping; other batches count as one."""
    inputs, labels = split_batch(batch)
    for part in (labels, *(inputs.values() if isinstance(inputs, Mapping) else (inputs,))):
        if isinstance(part, Tensor) and part.dim() and len(part):
            return len(part)
    return 1


def again(batches: Batches, what: str) -> Batches:
    """Return the batches, if they can be iterated more than once.

    Raises:
        ConfigError: they are an iterator, which is exhausted after one pass.
    """
    if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
        raise ConfigError(
            f"{what}: got {type(batches).__name__}, expected batches that can be iterated in every epoch; pass a "
            "list or a DataLoader"
        )
    return batches


def one_pass(batches: Batches, what: str, otherwise: str = "there are none") -> Iterator[Any]:
    """Yield the batches once.

    Args:
        otherwise: the error's text if there are none.

    Raises:
        ConfigError: there are none.
    """
    seen = False
    for batch in batches:
        seen = True
        yield batch
    if not seen:
        raise ConfigError(f"{what}: {otherwise}; pass a list or a DataLoader with batches in it")


def endless(batches: Batches, what: str) -> Iterator[Any]:
    """Yield the batches, and start again when they run out.

    Raises:
        ConfigError: there are none, or they can be iterated only once.
    """
    yield from one_pass(batches, what)
    while True:
        yield from one_pass(batches, what, "they can be read only once")


def moved(inputs: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; everything else in it stays as it is."""
    if isinstance(inputs, (Tensor, PackedSequence)):
        return inputs.to(device, non_blocking=True)  # type: ignore[arg-type]  # PackedSequence's hints are narrow
    if isinstance(inputs, Mapping):
        return {k: moved(v, device) for k, v in inputs.items()}
    if isinstance(inputs, tuple) and hasattr(inputs, "_fields"):
        return type(inputs)(*(moved(v, device) for v in inputs))
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(moved(v, device) for v in inputs)
    return inputs


# ---- running a model on a batch
# -------------------------------------------------------------------------------------------


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a tensor, a tuple or list (positional) or a mapping (keywords)."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (list, tuple)):
        return model(*inputs)
    return model(inputs)


def outputs(model: nn.Module, inputs: Any, head: Head | None = None) -> Tensor:
    """The logits of a batch's inputs, computed on the model's device.

    Args:
        head: turns the model's output into logits; None = it is logits already.

    Raises:
        ConfigError: the model returns something other than a tensor or an output with `logits`.
    """
    first = next(iter(model.parameters()), None)
    out = tensor_of(call(model, inputs if first is None else moved(inputs, first.device)))
    return out if head is None else head(out)


def tensor_of(out: Any) -> Tensor:
    """The logits of a model's output."""
    got = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(got, Tensor):
        raise ConfigError(
            f"the model gives a {type(out).__name__}, expected logits: a tensor or an output with logits; pass "
            "forward= or logits_fn= where the function has one; for embeddings of a timm or transformers model "
            "compose hatcl.atlas.encoder(model) and give the task a head"
        )
    return got


def cross_entropy(model: nn.Module, batch: tuple[Any, Tensor], head: Head | None = None) -> Tensor:
    """The mean cross-entropy of a batch (inputs, labels).

    Raises:
        ConfigError: see `check_answers`.
    """
    inputs, labels = split_batch(batch)
    logits = outputs(model, inputs, head)
    check_answers(logits, labels)
    return F.cross_entropy(logits, labels.to(logits.device))


def check_answers(logits: Tensor, labels: Any) -> None:
    """Raise `ConfigError` unless these are logits `[B, C]` and labels: `[B]`, or `[B, C]` if they are shares."""
    if labels is None:
        raise ConfigError("batches: got one without labels, expected (inputs, labels)")
    shares = labels.is_floating_point() and labels.shape == logits.shape
    if logits.dim() != 2 or not (shares or labels.shape == logits.shape[:1]):
        raise ConfigError(
            f"the model gives logits {list(logits.shape)} for labels {list(labels.shape)}, expected [B, C] and [B]: "
            "one answer per example. A language model answers at every token: pass a head= that picks one token, "
            "such as lambda logits: logits[:, -1], or compose a model for sequence classification"
        )


# ---- every value in an output ------------------------------------------------------------------------------------


def tensors_of(out: Any, name: str = "output") -> list[Tensor]:
    """Every tensor in the inputs or outputs of a forward: in mappings, sequences, sets, dataclasses, named tuples,
    nodes of torch's pytree, distributions, caches and any other object with attributes, however deep, each object once.

    Raises:
        OutputError: hatcl cannot look into a part, which the text names.
    """
    return [x for _, x in _found(out, name) if isinstance(x, Tensor)]


def values_of(out: Any) -> dict[str, Tensor]:
    """Path -> value, for every value in a forward's output, as a detached dense tensor: tensors, the parts of sparse
    and nested tensors, numpy arrays, and numbers and texts, which a forward may compute as well.

    Raises:
        OutputError: there is no tensor in it, or hatcl cannot look into a part, which the text names.
    """
    values: dict[str, Tensor] = {}
    tensors = 0
    for path, x in _found(out):
        if isinstance(x, Tensor):
            tensors += 1
            values.update(_dense(path, x.detach()))
        else:
            values[path] = _as_tensor(path, x)
    if not tensors:
        raise OutputError(
            f"its forward returns {_kind(out)}, which holds no tensor, so there is nothing to compare; return the "
            "tensors that it computes, alone or in a tuple, a dict, a dataclass or another object"
        )
    return values


def shapes(x: Any) -> str:
    """Inputs in words, for messages."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{k}: {shapes(v)}" for k, v in x.items()) + "}"
    if isinstance(x, (list, tuple)):
        return "(" + ", ".join(map(shapes, x)) + ")"
    return type(x).__name__


@contextlib.contextmanager
def seeded(seed: int = 0, device: torch.device | None = None) -> Iterator[None]:
    """Inside, torch, numpy and Python draw the same numbers each time; afterwards they continue as before."""
    state = random.getstate(), np.random.get_state()
    devices = [device] if device is not None and device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices=devices, device_type=devices[0].type if devices else "cuda"):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])


def device_of(model: nn.Module) -> torch.device:
    """A model's device: that of its first parameter or buffer, else the CPU."""
    for tensors in (model.parameters(), model.buffers()):
        for x in tensors:
            return x.device
    return torch.device("cpu")


def inside(x: Any) -> Iterator[tuple[str, Any]]:
    """Yield path and object of every part of an object, each once, starting with itself. Modules and objects that hatcl
    cannot look into are yielded without their parts."""
    seen: dict[int, Any] = {}
    stack: list[tuple[str, Any]] = [("", x)]
    while stack:
        path, x = stack.pop()
        yield path, x
        if isinstance(x, (Tensor, nn.Module, enum.Enum, *_VALUES, *_NOTHING)) or id(x) in seen:
            continue
        seen[id(x)] = x
        with contextlib.suppress(OutputError):
            stack += reversed(_parts(path, x))


# ---- looking into objects --------------------------------------------------------------------------------------------

_NOTHING = (
    type(None), type, types.ModuleType, types.BuiltinFunctionType, types.GenericAlias, torch.dtype, torch.device,
    torch.layout, torch.memory_format, type(...), type(NotImplemented), property,
)  # fmt: skip
_VALUES = (numbers.Number, str, bytes, bytearray, np.ndarray, np.generic, range, datetime.date, datetime.time,
           datetime.timedelta, torch.Generator)  # fmt: skip


_BUILT_IN: dict[type, tuple[str, ...]] = {
    slice: ("start", "stop", "step"), functools.partial: ("func", "args", "keywords"), types.MethodType: ("__self__",),
    BaseException: ("args",),
}  # fmt: skip


def _kind(x: Any) -> str:
    name = type(x).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}" if x is not None else "None"


def _found(out: Any, name: str = "output") -> Iterator[tuple[str, Any]]:
    """Yield path and value of every tensor and every plain value, each object once, in a deterministic order."""
    seen: dict[int, Any] = {}  # keeps the objects alive, so that no id is reused
    stack: list[tuple[str, Any]] = [(name, out)]
    while stack:
        path, x = stack.pop()
        if isinstance(x, enum.Enum):
            yield path, x.name
        elif isinstance(x, _VALUES):
            yield path, x
        elif isinstance(x, Tensor):
            yield path, x
        elif not isinstance(x, _NOTHING) and id(x) not in seen:
            seen[id(x)] = x
            stack += reversed(_parts(path, x))


def _parts(path: str, x: Any) -> list[tuple[str, Any]]:
    """The parts of an object: its members, and its attributes unless they are the same objects."""
    members = _members(path, x)
    attributes = attributes_of(x)
    if members is None and attributes is None:
        raise OutputError(
            f"{path} is {_kind(x)}, whose content hatcl cannot read to compare it; return tensors, or a "
            "tuple, a dict, a dataclass or an object whose attributes hold them"
        )
    known = {id(value) for _, value in members or ()}  # a model output of transformers has each member twice
    more = [(f"{path}.{name}", value) for name, value in (attributes or {}).items() if id(value) not in known]
    return [*(members or ()), *more]


def _members(path: str, x: Any) -> list[tuple[str, Any]] | None:
    """The members of an object of a known kind."""
    if isinstance(x, nn.Module):
        raise OutputError(
            f"{path} is a module ({type(x).__name__}); a forward whose output holds a module cannot be compared, "
            "because everything that the module holds belongs to all tasks; return what it computes"
        )
    if isinstance(x, Mapping):
        return [(f"{path}[{key!r}]", value) for key, value in x.items()]
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return [(f"{path}.{name}", value) for name, value in zip(x._fields, x, strict=True)]
    if isinstance(x, (list, tuple, deque)):
        return [(f"{path}[{i}]", value) for i, value in enumerate(x)]
    if isinstance(x, (set, frozenset)):  # a set orders tensors by their addresses
        return [(f"{path}{{{i}}}", value) for i, value in enumerate(sorted(x, key=_sort_key))]
    if isinstance(x, types.FunctionType):
        cells = zip(x.__code__.co_freevars, x.__closure__ or (), strict=True)
        kept = [(f"{path}.{name}", cell.cell_contents) for name, cell in cells]
        return [*kept, (f"{path}.__defaults__", x.__defaults__), (f"{path}.__kwdefaults__", x.__kwdefaults__)]
    if isinstance(x, weakref.ReferenceType):
        return [(f"{path}()", x())]
    for kind, names in _BUILT_IN.items():
        if isinstance(x, kind):
            return [(f"{path}.{name}", getattr(x, name)) for name in names]
    node = SUPPORTED_NODES.get(type(x))
    if node is not None:
        return [(f"{path}<{i}>", child) for i, child in enumerate(node.flatten_fn(x)[0])]
    return None


def attributes_of(x: Any) -> dict[str, Any] | None:
    """The attributes of an object, in `__dict__` and in slots; None if it cannot have any, such as an object written in
    C."""
    slots = [name for cls in type(x).__mro__ for name in _slots(cls)]
    own = getattr(x, "__dict__", None)
    if own is None and not slots and not dataclasses.is_dataclass(x) and not _is_plain(type(x)):
        return None
    found = dict(own or {})
    for name in slots:
        with contextlib.suppress(AttributeError):  # a slot that was declared but not assigned
            found[name] = object.__getattribute__(x, name)
    return found


def _slots(cls: type) -> list[str]:
    names = cls.__dict__.get("__slots__", ())
    names = [names] if isinstance(names, str) else list(names)
    private = [n for n in names if n.startswith("__") and not n.endswith("__")]
    return [
        f"_{cls.__name__.lstrip('_')}{n}" if n in private else n for n in names if n not in ("__dict__", "__weakref__")
    ]


def _is_plain(cls: type) -> bool:
    """Whether a class is written in Python and has no slots or attributes of its own (`__slots__ = ()`)."""
    return all("__slots__" in base.__dict__ for base in cls.__mro__[:-1])


def _sort_key(x: Any) -> str:
    return digest_of(x) if isinstance(x, Tensor) and x.layout == torch.strided else f"{type(x).__name__} {x!r}"


def _dense(path: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the dense tensors that a tensor consists of."""
    parts: dict[str, Callable[[], Tensor]]
    if x.is_nested:
        for i, part in enumerate(x.unbind()):
            yield from _dense(f"{path}[{i}]", part)
        return
    if x.layout == torch.sparse_coo:
        parts = {"indices": x._indices, "values": x._values}
    elif x.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = {"crow_indices": x.crow_indices, "col_indices": x.col_indices, "values": x.values}
    elif x.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = {"ccol_indices": x.ccol_indices, "row_indices": x.row_indices, "values": x.values}
    elif x.is_quantized:
        parts = {"int_repr": x.int_repr, "dequantize": x.dequantize}
    elif x.layout != torch.strided:
        parts = {"to_dense": x.to_dense}
    else:
        yield path, x.resolve_conj().resolve_neg()
        return
    yield f"{path}.shape", torch.tensor(x.shape)
    for name, get in parts.items():
        yield f"{path}.{name}", get().detach()


def _as_tensor(path: str, x: Any) -> Tensor:
    """A value that is not a tensor, as a tensor with the same bits."""
    if isinstance(x, torch.Generator):
        return x.get_state()
    if isinstance(x, (np.ndarray, np.generic)):
        array = np.ascontiguousarray(x)
        if array.dtype.hasobject:
            raise OutputError(
                f"{path} is a numpy array of Python objects, which hatcl cannot read; return arrays of numbers"
            )
        kind = str((array.dtype.str, np.shape(x)))
        return torch.frombuffer(bytearray(array.tobytes() + kind.encode()), dtype=torch.uint8)
    if type(x) in (bool, float, complex):
        return torch.tensor(x, dtype={bool: torch.bool, float: torch.float64, complex: torch.complex128}[type(x)])
    if type(x) is int and -(2**63) <= x < 2**63:
        return torch.tensor(x)
    text = bytes(x) if isinstance(x, (bytes, bytearray)) else str(x).encode("utf-8", "surrogatepass")
    return torch.frombuffer(bytearray(type(x).__name__.encode() + b" " + text), dtype=torch.uint8)
