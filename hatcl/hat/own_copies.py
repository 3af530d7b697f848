"""An option between one network for all tasks and one network per task: parameters that tasks could share, smallest
first, get a copy per task instead.

Early layers hold few of a network's weights and fill up first: in a layer of 16 units, ten tasks get about one unit
each. A copy has no such limit. None of its elements is ever frozen, forgetting the task erases all of it, and a task
that starts from another begins with the source's copy.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

from torch import nn

from ..errors import ConfigError
from ..map.lora import is_factor
from ..map.units import Entry, UnitMap

CHOSEN = "own_share: one of the smallest parameters"


def with_own_share(unit_map: UnitMap, model: nn.Module, share: float) -> UnitMap:
    """The map with the smallest parameters copied for each task. Together they have at most `share` of the elements
    that tasks would share otherwise. Of equally large parameters the first are chosen; parameters that several modules
    hold are never chosen.

    Raises:
        ConfigError: a model with LoRA, whose pairs are the units.
    """
    if any(map(is_factor, unit_map.entries)):
        raise ConfigError(
            f"own_share: got {share:g} in a model with LoRA, whose tasks share pairs, each with both of its factors; "
            "give the adapter a larger rank, or leave own_share out"
        )
    names = {id(p): n for n, p in model.named_parameters()}
    holders = Counter(names[id(p)] for m in model.modules() for p in m._parameters.values() if p is not None)
    shared = [e for e in unit_map.entries.values() if e.why == CHOSEN or not e.copied]
    room = share * sum(map(_how_large, shared))
    smallest = sorted((e for e in shared if e.factors and holders[e.name] == 1), key=_how_large)
    sums = itertools.accumulate(map(_how_large, smallest))
    chosen = {e.name for e, so_far in zip(smallest, sums, strict=True) if so_far <= room}
    return unit_map.with_copies(chosen, CHOSEN)


def _how_large(entry: Entry) -> int:
    return math.prod(entry.shape)
