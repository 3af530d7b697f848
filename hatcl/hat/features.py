"""Features of a task: what enters its head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import call, device_of, moved
from ..errors import HATError
from ..lend import Evaluating
from .build import GATES
from .gates import gates_of
from .layers.gated import HATLayer
from .tasks import task as active


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of every head: what writes the classes, by the map; in a model put together by hand, the layers of
    which every task has its own weight.

    Raises:
        HATError: there is none.
    """
    root = next((m for m in model.modules() if GATES in m._modules), None)
    found: dict[str, nn.Module] = {}
    if root is not None:
        entries = gates_of(root)[0].unit_map.entries
        paths = [e.name.rpartition(".")[0] for e in entries.values() if e.head and e.copied and len(e.shape) > 1]
        found = {path: root.get_submodule(path) for path in paths}
    else:
        for path, module in model.named_modules():
            plan = module._hat.params.get("weight") if isinstance(module, HATLayer) and "_hat" in vars(module) else None
            if plan is not None and plan.copied and len(plan.view) > 1:
                found[path] = module
    if not found:
        raise HATError(
            f"{type(model).__name__}: no head was found whose input could serve as features: a layer that writes the "
            "outputs, of which every task has its own copy. Put the classifier into the model before hatcl.convert"
        )
    return found


@contextlib.contextmanager
def watched_heads(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, every forward leaves what entered the heads here, by the heads' paths."""
    seen: dict[str, Tensor] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if given is not None:
                seen[path] = given

        return hook

    hooks = [m.register_forward_pre_hook(note(path), with_kwargs=True) for path, m in head_modules(model).items()]
    try:
        yield seen
    finally:
        for h in hooks:
            h.remove()


def features_of(model: nn.Module, inputs: Any) -> Tensor:
    """What enters the heads under the active task, `[B, F]`: the mean over positions where there are several
    (`[B, N, F]` of a linear head, `[B, F, H, W]` of a convolution), of several heads one after the other. A unit
    that is off is 0 there.

    Raises:
        HATError: no head, or none that the forward calls.
    """
    with watched_heads(model) as seen:
        call(model, moved(inputs, device_of(model)))
    modules = head_modules(model)
    parts = []
    for path in [path for path in modules if path in seen]:
        x = seen[path]
        if isinstance(modules[path], nn.modules.conv._ConvNd):
            x = x.flatten(2).mean(2)
        elif x.dim() > 2:
            x = x.flatten(1, -2).mean(1)
        parts.append(x)
    if not parts:
        raise HATError(
            f"{type(model).__name__}: its forward does not call {', '.join(modules)} as a module, so what enters its "
            "head is not seen"
        )
    return torch.cat(parts, 1)


def features_under(model: nn.Module, batches: Iterable[Any], task: int | None) -> Tensor:
    """Features of many inputs under a task, `[B, F]`: in evaluation mode, without gradients, in float32 on the CPU."""
    with active(model, task), Evaluating(model), torch.no_grad():
        return torch.cat([features_of(model, x).float().cpu() for x in batches])
