"""Options of a merge that differ from layer to layer.

    hatcl.merge(vectors, "ties", density={"layers": [0.1, 0.5]})
    hatcl.merge(vectors, "mean", weights=[1.0, {"layers": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]}])

`{"layers": SETTING}` takes the place of a number. A setting is written as in mergekit's recipes: a value; a list of
values, which are interpolated from the first layer to the last (a gradient); or a list of mappings with `value` and,
except for the last, `filter`: the first whose filter is part of the tensor's name counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...errors import ConfigError
from ..delta import Delta
from ..task_vector import TaskVector
from ..tensors import Kind, Lazy

LAYERS = "layers"
LAYER = re.compile(r"\.(\d+)\.|^(\d+)\.")  # the first number in a tensor's name is its layer's


def differs(value: object) -> bool:
    """Whether an option differs from layer to layer."""
    if isinstance(value, (list, tuple)):
        return any(differs(v) for v in value)
    return isinstance(value, Mapping) and list(value) == [LAYERS]


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack of layers of a tensor, and its layer's number there. None outside all stacks."""
    found = LAYER.search(name)
    return (name[: found.start()], int(found[1] or found[2])) if found else None


def places(names: Iterable[str]) -> dict[str, float]:
    """The relative position of each tensor in its stack: 0 in the first layer and outside the stacks, 1 in the last
    layer (and in a stack with only one), as in mergekit."""
    found = {n: layer_of(n) for n in names}
    last: dict[str, int] = {}
    for at in found.values():
        if at is not None:
            last[at[0]] = max(last.get(at[0], 0), at[1])
    return {n: 0.0 if at is None else at[1] / last[at[0]] if last[at[0]] else 1.0 for n, at in found.items()}


def setting_at(option: str, setting: Any, name: str, place: float) -> Any:
    """The value of a setting for one tensor; None if no filter fits.

    Args:
        option: its name in errors. place: from 0 (the first layer) to 1.

    Raises:
        ConfigError: not a setting.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, (list, tuple)):
        return setting
    if not setting:
        return None
    if all(isinstance(case, Mapping) for case in setting):
        for case in setting:
            unknown = [key for key in case if key not in ("filter", "value")]
            if unknown or "value" not in case:
                raise ConfigError(f"{option}: got {dict(case)!r}, expected a mapping with value and, if wanted, filter")
            wanted = case.get("filter")
            if wanted in (None, "*") or str(wanted) in name:
                return setting_at(option, case["value"], name, place)
        return None
    if any(isinstance(value, (Mapping, list, tuple)) for value in setting):
        raise ConfigError(
            f"{option}: got {list(setting)!r}, expected values only, or mappings with value and filter only"
        )
    at = place * (len(setting) - 1)
    below = int(at)
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in setting):
        return setting[below]  # words and switches cannot be interpolated
    above = min(below + 1, len(setting) - 1)
    return setting[below] + (at - below) * (setting[above] - setting[below])


def by_layers(
    vectors: Sequence[TaskVector], method: Callable[..., TaskVector], options: Mapping[str, Any]
) -> TaskVector:
    """Merge tensors with the same options together, separately from the others: a method that uses a whole vector (the
    threshold of `ties`) sees only these.

    Raises:
        ConfigError: a setting cannot be read, or has no value for a tensor.
    """
    first, *others = vectors
    whole = [first._map(lambda _, *ds, i=i: ds[i], *others) for i in range(len(vectors))]  # adapters' zeros filled in
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for name, place in places(whole[0]).items():
        mine = {option: _resolved(option, value, name, place) for option, value in options.items()}
        groups.setdefault(json.dumps(mine, default=repr), ([], mine))[0].append(name)
    merged: dict[str, TaskVector] = {}
    for names, mine in groups.values():
        made = method([restricted(v, names) for v in whole], **mine)
        merged |= dict.fromkeys(names, made)
    kinds: dict[str, Kind] = {n: merged[n].kinds[n] for n in whole[0]}
    together: Lazy[Delta] = Lazy(kinds, lambda name: merged[name].delta(name))
    lazy = any(isinstance(v._deltas, Lazy) for v in whole)
    return TaskVector(together if lazy else dict(together), whole[0].base, partial=first.partial)


def _resolved(option: str, value: Any, name: str, place: float) -> Any:
    if not differs(value):
        return value
    if isinstance(value, (list, tuple)):
        return [_resolved(option, v, name, place) for v in value]
    found = setting_at(option, value[LAYERS], name, place)
    if found is None:
        raise ConfigError(f"{option}: no value for {name}; end the list with one that has no filter")
    return found


def restricted(vector: TaskVector, names: Sequence[str]) -> TaskVector:
    """A vector with only some of its tensors; the missing ones count as unchanged."""
    kinds, base = vector.kinds, vector.base
    deltas: Lazy[Tensor | Delta] = Lazy({n: kinds[n] for n in names}, vector.delta)
    digests = None if base is None else Lazy({n: kinds[n] for n in names}, base.__getitem__)
    return TaskVector(deltas if isinstance(vector._deltas, Lazy) else dict(deltas), digests, partial=True)
