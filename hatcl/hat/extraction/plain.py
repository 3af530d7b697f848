"""The plain network inside a HAT model, and its tensors as a task sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..binding import Binding
from ..build import GATES
from ..copies import refresh_copy
from ..distributed import DDP_SKIPS
from ..gates import gates_of
from ..layers.gated import HATLayer
from ..layers.state import STATES, copy_of, detached_copy
from ..registry import plain_class
from ..saving.writers import give_back
from ..tasks import task as active

_HATCL_HOOKS = ("_forward_pre_hooks", "_load_state_dict_pre_hooks")


def plain_copy(model: nn.Module, task: int | None, stage: int | None = None) -> nn.Module:
    """The network that was converted, with modules of its original classes, the shared values of the parameters, and
    the task's buffers and states. It shares no memory with the model. stage: use the sizes after this many growths;
    default: the task's."""
    refresh_copy(model)
    made = copy_of(model)
    with active(made, task):
        kept = {path: _kept(m) for path, m in made.named_modules() if isinstance(m, HATLayer)}
    if (gates := gates_of(made)[0]).growths:
        _resize(made, kept, task, gates.stage_of(task) if stage is None else stage)
    for path, module in list(made.named_modules()):
        if path in kept:
            module.__class__ = plain_class(type(module))
            for name in ("_hat", STATES):
                module.__dict__.pop(name, None)
            module._modules.pop("hat_tasks", None)
            for name, value in kept[path].items():
                place = module._buffers if name in module._buffers else module.__dict__
                place[name] = value
        for hooks in (getattr(module, name) for name in _HATCL_HOOKS):
            for key, hook in list(hooks.items()):
                if getattr(getattr(hook, "hook", hook), "__module__", "").startswith("hatcl."):
                    del hooks[key]
    made._modules.pop(GATES, None)
    give_back(made)
    made.__class__ = plain_class(type(made))
    made.__dict__.pop(STATES, None)
    made.__dict__.pop(DDP_SKIPS, None)
    for m in made.modules():
        tidy_up(m)
    return made.eval()


def _resize(made: nn.Module, kept: dict[str, dict[str, Any]], task: int | None, stage: int) -> None:
    """Set parameters, buffers and sizes to those after this many growths."""
    known: dict[int, nn.Parameter] = {}
    for path, module in made.named_modules():
        hat: Binding | None = module.__dict__.get("_hat") if isinstance(module, HATLayer) else None
        if hat is None:
            continue
        then, own = hat.at(stage), None
        if "hat_tasks" in module._modules and (task is not None or stage):
            own = module._hat_new_copy() if task is None else module.hat_tasks[task]
        for name, p in module._parameters.items():
            plan = then.params.get(name)
            mine = own._parameters.get(name) if own is not None else None
            if p is None or (mine is None and plan is not None and plan.copied):  # the plain value is unchanged
                continue
            value = then.placed(name, p) if mine is None else mine
            if value is not p:
                fresh = nn.Parameter(value.detach().clone(), requires_grad=p.requires_grad)
                module._parameters[name] = known.setdefault(id(p), fresh) if mine is None else fresh
        for name in list(kept[path]):
            if own is not None and name in own._buffers:
                kept[path][name] = own._buffers[name].clone()
        for name, b in module._buffers.items():
            if b is not None and name not in module._hat_copied_buffers():
                module._buffers[name] = then.placed(name, b)
        module.__dict__.update(then.sizes)


def tidy_up(module: nn.Module) -> None:
    """Renew the list of weights that torch's recurrent layers keep in addition to their parameters."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [module._parameters.get(n) for n in module._flat_weights_names]


def _kept(layer: Any) -> dict[str, Any]:
    """Buffers and states as the active task sees them; `weights_of_task` has the parameters."""
    hat: Binding | None = layer.__dict__.get("_hat")
    if hat is None:
        return {}
    states = [n for path, n in layer.__dict__[STATES].start if path == hat.path] if STATES in layer.__dict__ else []
    return {n: detached_copy(getattr(layer, n)) for n in (*layer._hat_copied_buffers(), *states) if hasattr(layer, n)}


def weights_of_task(model: nn.Module, task: int) -> dict[tuple[str, str], Tensor]:
    """(module path, parameter) -> its value for the task: zero where it is not the task's. For a norm over units: the
    task's own values, not zeroed. For a standardised weight: the values before the missing ones are filled in."""
    out: dict[tuple[str, str], Tensor] = {}
    norms = gates_of(model)[0].unit_map.norms
    with active(model, task), torch.no_grad():
        for path, module in model.named_modules():
            hat: Binding | None = module.__dict__.get("_hat") if isinstance(module, HATLayer) else None
            if hat is None:
                continue
            hat = hat.under(task)
            for name, p in module._parameters.items():
                if p is None:
                    continue
                plan = hat.params.get(name)
                over_units = path in norms and norms[path].across
                if plan is None or not (over_units or plan.standardised):
                    value = p.detach() if plan is None else getattr(module, name)
                else:
                    value = module._hat_own("_parameters", name, task) if plan.copied else hat.placed(name, p)
                if plan is not None and hat.output is not None and not over_units:
                    for axis in (axis for axis in plan.axes if axis.owner):
                        on = axis.units.hard(task).view(axis.shape)
                        value = torch.where(on, value.view(plan.view), 0.0).view(value.shape)
                out[path, name] = value.detach().clone()
    return out
