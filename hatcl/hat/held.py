"""Every parameter and buffer of a HAT model, and whether it belongs to a task, to units, or to all tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HATError
from .binding import Binding, ParameterPlan, TaskCopy
from .gates import Gates, gates_of
from .layers.gated import HATLayer


@dataclass
class Held:
    """A parameter of a HAT model.

    Attributes:
        task: the task that owns this copy (None: shared). plan: the axes of a shared parameter. plain: is it the plain
            model's value of a parameter with a copy per task? module: the module that holds it.
    """

    name: str
    param: nn.Parameter
    plan: ParameterPlan | None
    module: nn.Module
    task: int | None = None
    plain: bool = False

    def live(self, task: int, *others: int) -> Tensor:
        """Bool mask in the parameter's shape: the elements that are live for a task, or for any of several. Its stride
        is 0 along dimensions without units."""
        if self.plan is None:
            return torch.ones(self.param.shape, dtype=torch.bool, device=self.param.device)
        mask = self.plan.live(task, self.param.device)
        for t in others:
            mask = mask | self.plan.live(t, self.param.device)
        return mask.expand(self.plan.view).reshape(self.param.shape)


def held(model: nn.Module) -> list[Held]:
    """Every parameter of a HAT model once, with its owner.

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
    """Buffers that all tasks read and none may write. unsaved: include non-persistent buffers."""
    for path, module in model.named_modules():
        if isinstance(module, (Gates, TaskCopy)):
            continue
        hat = isinstance(module, HATLayer) and module.__dict__.get("_hat") is not None
        own = module._hat_copied_buffers() if hat else ()
        for name, b in module._buffers.items():
            if b is not None and name not in own and (unsaved or name not in module._non_persistent_buffers_set):
                yield f"{path}.{name}" if path else name, b


def live_for(h: Held, tasks: Sequence[int]) -> Tensor | None:
    """Bool mask of the elements that are live for any of the tasks; None if there are no tasks."""
    return h.live(*tasks) if tasks else None


def shared_path(names: Sequence[str]) -> str:
    """The dotted path that all names start with, its last dot included."""
    first, last = min(names, default="").split("."), max(names, default="").split(".")
    same = 0
    while same < min(len(first), len(last)) - 1 and first[same] == last[same]:
        same += 1
    return "".join(f"{part}." for part in first[:same])


def check_structure(model: nn.Module) -> None:
    """Check that every module bound to gates at conversion is still there and bound, with parameters of the same
    shapes.

    Wrapping the model or its modules is allowed (DistributedDataParallel, `fully_shard`, `torch.compile`, peft): the
    check identifies a module by its binding, not by its path.

    Raises:
        HATError: names the module or the parameter that differs.
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
            for name in layer._hat.shapes:
                shape = layer._hat.plain_shape(name)
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
