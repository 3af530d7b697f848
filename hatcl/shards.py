"""Models whose parameters are shards: `torch.distributed.fsdp.fully_shard` makes each a `DTensor`, of which every
process holds a part. For plain models, everything here does nothing and costs nothing.

Gathering is a collective operation: all processes must do it together.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .errors import HATError
from .functional import local


def is_shard(x: Tensor) -> bool:
    return getattr(x, "_local_tensor", None) is not None


def unsharded(x: Tensor) -> Tensor:
    """The whole tensor, with gradients that are averaged over the processes."""
    if getattr(x, "_local_tensor", None) is None:
        return x
    sharded: Any = x
    if not (sharded.requires_grad and torch.is_grad_enabled()):
        return sharded.full_tensor()
    from torch.distributed.tensor import Partial

    averaged = [Partial("avg")] * sharded.device_mesh.ndim
    return sharded.full_tensor(grad_placements=averaged)


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that is sharded like `like`. Every process has all values, so nothing is sent."""
    if not is_shard(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    made = distribute_tensor(full.detach(), sharded.device_mesh, sharded.placements, src_data_rank=None)
    return local(made)


def gathered_part(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor, sharded like `like`, of which this process holds `part`."""
    if not is_shard(like):
        return part
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    made: Any = DTensor.from_local(
        part, sharded.device_mesh, sharded.placements, shape=like.shape, stride=like.stride(), run_check=False
    )
    return made.full_tensor()


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this module."""
    return hasattr(type(module), "_get_fsdp_state")


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    return [m for m in model.modules() if is_sharded(m)]


def reshard(model: nn.Module) -> bool:
    """Make a model hold its shards again instead of the parameters that a forward has gathered. Returns whether it is
    sharded."""
    found = sharded_modules(model)
    for m in found:
        m.reshard()
    return bool(found)


REMEDY = "do it before fully_shard, or with hatcl.gathered(model), a plain copy with whole parameters"


def check_whole(model: nn.Module, doing: str, remedy: str = REMEDY) -> None:
    """Raise `HATError` for a model whose parameters are shards."""
    if sharded_modules(model):
        raise HATError(f"{doing}: the parameters of {type(model).__name__} are shards (fully_shard); {remedy}")


def check_precision(model: nn.Module) -> None:
    """Raise `HATError` if a plain copy would compute in another dtype than the sharded model."""
    for m in sharded_modules(model):
        dtype = m._get_fsdp_state()._mp_policy.param_dtype
        if dtype is not None and any(p.dtype != dtype for p in m.parameters()):
            raise HATError(
                f"fully_shard: this model computes in {str(dtype).removeprefix('torch.')} (mp_policy), where a "
                "plain copy does not compute the same, so a copy proves nothing; certify hatcl.gathered(model), "
                "which proves it for the parameters' own dtype and under bfloat16 autocast"
            )


def gathered(model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """A plain copy of a sharded model, with whole parameters. All processes must call it together.

    Args:
        device: the copy's device; default: the shards' device.
    """
    made = gathered_in(model, True, device)
    assert made is not None
    return made


def gathered_in(model: nn.Module, here: bool, device: torch.device | str | None = None) -> nn.Module | None:
    """The same in the processes where `here` is true; the others take part, hold one parameter at a time, and get
    None."""
    found = sharded_modules(model)
    reshard(model)
    memo: dict[int, Any] = {}
    for p in model.parameters():
        if is_shard(p):
            value = unsharded(p.detach())
            if here:
                memo[id(p)] = nn.Parameter(value.to(device), requires_grad=p.requires_grad)
    if not here:
        return None
    hooks: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    states: list[tuple[nn.Module, dict[str, Any]]] = []
    classes = [(m, m.__class__) for m in found]
    try:
        for m in model.modules():
            for kind in _HOOKS:
                every = m.__dict__[kind]
                hooks.append((every, {**every}))
                for key in [key for key, hook in every.items() if _of_torch(hook)]:
                    del every[key]
            states.append((m, {key: m.__dict__.pop(key) for key in [*m.__dict__] if key.startswith(_STATE)}))
        for m, cls in classes:
            m.__class__ = cls.__mro__[2]  # the class that `fully_shard` put itself in front of
        made = copy.deepcopy(model, memo)
    finally:
        for m, cls in classes:
            m.__class__ = cls
        for m, state in states:
            m.__dict__.update(state)
        for every, before in hooks:
            every.clear()
            every.update(before)
    for m in made.modules():
        if "origin" in m.__dict__:  # an attribute of gates, which does not follow a model whose parameters are shards
            m.__dict__["origin"] = None
    return made if device is None else made.to(device)


_STATE = "__composable_api"  # the attribute in which `fully_shard` keeps a module's state
_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    "_state_dict_pre_hooks",
)  # fmt: skip


def _of_torch(hook: Any) -> bool:
    """Whether this is a hook of `fully_shard`."""
    hook = getattr(hook, "hook", hook)  # hooks of loading are wrapped
    module = getattr(hook, "__module__", "") or ""
    return module.startswith(("torch.distributed.fsdp", "torch.distributed._composable"))
