"""Keeps a plain model unchanged: its parameters during trial forwards, and its modules if the conversion fails (M9)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ..errors import ConversionError
from ..functional import bits_of
from .altered import blocks_of, uninterrupted

WRITES = (
    "{name}: the forward itself writes to this parameter, which would change what sealed tasks use; keep what it "
    "computes in a variable, or in a buffer"
)


class _Unwritten(TorchDispatchMode):
    """Refuses operations that would write to one of a model's parameters. It skips the scaling of an embedding's rows
    by `max_norm`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {_memory(p): n for n, p in model.named_parameters()}
        self.refused = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation that does not write to a parameter."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.embedding_renorm_.default:
            return args[0]
        if func._schema.is_mutable:
            for at, argument in enumerate(func._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                given = args[at] if at < len(args) else kwargs.get(argument.name)
                for x in tree_flatten(given)[0]:
                    if isinstance(x, Tensor) and _memory(x) in self.names:
                        self.refused = self.names[_memory(x)]
                        raise ConversionError(WRITES.format(name=self.refused))
        return func(*args, **kwargs)


def _memory(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _sums(model: nn.Module) -> dict[str, int]:
    def of(p: Tensor) -> int:  # block by block, because torch casts the elements before it sums them
        return sum(int(block.sum(dtype=torch.int64)) for block in blocks_of(bits_of(p)))

    return {n: of(p) for n, p in model.named_parameters() if p.numel() and not p.is_meta}


@contextlib.contextmanager
def parameters_unwritten(model: nn.Module) -> Iterator[None]:
    """Inside the block, no torch operation writes to the model's parameters. Other writes are detected on leaving.

    Raises:
        ConversionError: names the parameter.
    """
    before, mode = _sums(model), _Unwritten(model)
    with mode:
        yield
    now = _sums(model)
    written = mode.refused or next((n for n, was in before.items() if now[n] != was), "")
    if written:
        raise ConversionError(WRITES.format(name=written))


class Structure:
    """The state of a model's modules, from which it can be restored (without the values of tensors)."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [(m, type(m), dict(m.__dict__), _containers(m)) for m in model.modules()]

    def restore(self) -> None:
        """Restore the modules."""
        uninterrupted(self._restore)

    def _restore(self) -> None:
        for m, cls, own, containers in self._kept:
            object.__setattr__(m, "__class__", cls)
            for name in [n for n in m.__dict__ if n not in own]:
                del m.__dict__[name]
            m.__dict__.update(own)
            for name, was in containers.items():
                now = own[name]
                for key in [k for k in now if k not in was]:
                    del now[key]
                now.update(was)


def _containers(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """torch's own entries in a module: its parameters, buffers, submodules and hooks."""
    torchs = nn.Module().__dict__
    return {n: dict(v) for n, v in module.__dict__.items() if isinstance(v, dict) and n in torchs}


@contextlib.contextmanager
def restored_on_failure(model: nn.Module) -> Iterator[Structure]:
    """Restore the model's modules if the block raises."""
    structure = Structure(model)
    try:
        yield structure
    except BaseException:
        structure.restore()
        raise
