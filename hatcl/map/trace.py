"""The trace: run the model's own forward once, and find which unit every parameter element writes and reads.

Every tensor has a `Shadow` (see `shadow.py`). Five kinds of rules (see `rules/`) pass it from inputs to outputs:

1. view-like operations act on the shadow as on the tensor;
2. elementwise operations couple the labels that meet along the same dimensions; a parameter takes the unit that it
   meets;
3. contractions (linear, convolution, matmul, attention) give the output the weight's own labels, and couple each input
   index of the weight with the unit that it reads; if both sides are activations, the contracted labels are coupled;
4. a reduction over different units loses track of them, and is noted;
5. an unknown operation loses track of the units of its inputs, and its parameters get a copy per task.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from ..calls import call, tensors_of, values_of
from ..errors import ConversionError
from .coupling import Coupling, Trace
from .rules import Call, Moved, apply_rule
from .shadow import Shadow, flat_ids


class Tracer(TorchDispatchMode):
    """Intercepts every operation of one forward and passes it to its rule. at: the module path and the operation in
    progress, to which an error is attributed."""

    def __init__(self, coupling: Coupling, watch: Callable[[Call, Coupling], None] | None = None) -> None:
        super().__init__()
        self.coupling = coupling
        self.watch = watch
        self.at: tuple[str, str] | None = None
        self._elsewhere = torch.get_default_device().type != "cpu"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation, and move the shadows of its inputs to its outputs."""
        if func is torch.ops.aten.embedding_renorm_.default:
            return args[0]  # it would scale rows of the model's table in place; their units stay the same
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        shadows = [self.coupling.shadows.get(x) for x in flat]
        out = func(*args, **kwargs)
        tracked = [s for s in shadows if s is not None]
        if not tracked:
            return out
        for s in tracked:
            self.coupling.found.seen |= s.sources
        step = Call(func, args, kwargs, flat, spec, shadows, out)
        self.at = (self.coupling.here, func._schema.name)
        with _disable_current_modes(), self._on_cpu():
            self._keep(step, apply_rule(step, self.coupling))
            if self.watch is not None:
                self.watch(step, self.coupling)
        self.at = None
        return out

    def enter(self, path: str, args: tuple) -> None:
        """Called when a module begins."""
        self.at = (path, "what the module is given")
        self.coupling.enter(path, args)
        self.at = None

    def _on_cpu(self) -> contextlib.AbstractContextManager[Any]:
        """Set the CPU as the device on which rules create new labels."""
        return torch.device("cpu") if self._elsewhere else contextlib.nullcontext()

    def _keep(self, step: Call, moved: Moved) -> None:
        """Give the outputs their shadows."""
        if step.inplace and isinstance(step.args[0], Tensor):
            self.coupling.shadows.write(step.args[0], moved[0] if isinstance(moved, Sequence) else moved)
            return
        each = moved if isinstance(moved, Sequence) else [moved] * len(step.outs)
        for x, shadow in zip(step.outs, each, strict=False):
            if isinstance(x, Tensor) and shadow is not None:
                self.coupling.keep(x, shadow)


@contextlib.contextmanager
def _watched(model: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Track module paths while the model runs in evaluation mode without fused fast paths; restore everything
    afterwards."""
    handles = []
    for path, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(
                lambda m, a, k, p=path: tracer.enter(p, (*a, *k.values())), with_kwargs=True
            )
        )
        handles.append(module.register_forward_hook(lambda m, a, o: tracer.coupling.leave(), always_call=True))
    modes = [(m, m.training) for m in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for h in handles:
            h.remove()
        for m, training in modes:
            m.training = training


def trace(
    model: nn.Module,
    inputs: Any,
    norms: Callable[[nn.Module], bool],
    watch: Callable[[Call, Coupling], None] | None = None,
) -> Trace:
    """Run `model` on `inputs` once and return the results.

    Args:
        norms: whether a module is a norm layer that gates its own output.
        watch: is called with each operation once its outputs have their shadows.

    Raises:
        ConversionError: a rule failed.
    """
    coupling = Coupling(model, norms)
    tracer = Tracer(coupling, watch)
    for x in tensors_of(inputs, "inputs"):
        coupling.shadows[x] = Shadow()
    try:
        with _watched(model, tracer), tracer:
            out = call(model, inputs)
    except Exception as error:
        if tracer.at is None:
            raise
        path, operation = tracer.at
        raise ConversionError(
            f"{path or type(model).__name__}: the trace cannot follow {operation} ({type(error).__name__}: {error}); "
            "please report the model"
        ) from error
    found = coupling.found
    for path in sorted(coupling.remade):  # its weight does not carry the gate, so its behaviour must be tried
        if found.norms[path].across:
            found.mixing[path] = found.norms.pop(path)
    leaves = tensors_of(out) or list(values_of(out).values())  # if there is none, values_of raises
    carried = [flat_ids(slot.ids) for x in leaves if (s := coupling.shadow(x)) for slot in s.slots]
    outputs = np.concatenate([found.outputs, *carried])
    found.outputs = outputs[outputs != 0]
    return found
