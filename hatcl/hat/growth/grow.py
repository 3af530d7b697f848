"""`grow`: add units to a network that has learned; all its outputs stay bit-equal (M12)."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ...calls import shapes
from ...config import number, whole
from ...errors import ConfigError, ConversionError, HATError, IsolationError, TaskError, nearest
from ...map.units import UnitMap
from ...shards import check_whole
from .. import digests
from ..certify import certify, compare_outputs
from ..convert import convert, map_of
from ..extraction.extract import Misfit, Search, example_inputs_of, outputs_under
from ..extraction.plain import plain_copy
from ..extraction.trace import footprint
from ..gates import Gates, gates_of
from ..held import check_structure
from ..layers.state import copy_of
from ..protection import by_degrees
from ..tasks import tasks
from .apply import apply_growth
from .grown import Growth, grown_map
from .optimizer import Carrier
from .plan import Grower

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GrowReport:
    """The report of a growth.

    Attributes:
        layers: name of a layer that grew -> its number of units before and after. left: name of a layer that did not
            grow -> the reason.
        units, units_before: number of units after and before. elements, elements_before: the same for elements of
            shared parameters.
        exact: tasks whose outputs were verified to be bit-equal; None is the plain model.
    """

    layers: dict[str, tuple[int, int]]
    left: dict[str, str]
    units: int
    units_before: int
    elements: int
    elements_before: int
    exact: list[int | None]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        done = ", ".join("None" if t is None else str(t) for t in self.exact)
        lines = [
            f"{self.units_before:,} units became {self.units:,}, {self.elements_before:,} shared elements "
            f"{self.elements:,}; tasks {done} are bit-equal"
        ]
        lines += [f"{name}: {old} -> {new}" for name, (old, new) in self.layers.items()]
        lines += [f"not grown: {name}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def grow(
    model: nn.Module,
    factor: float | Mapping[str, int] = 1.5,
    *,
    optimizer: Any = None,
    example_inputs: Any = None,
) -> GrowReport:
    """Give the network more units, in place. Every sealed task, and task None, still computes with its former sizes, so
    it stays bit-equal even where a larger matrix product would round differently. Unsealed tasks get the new units; all
    new elements are free.

    Coupled channels (a residual stream's channel across all layers that write to it, a query and its key) grow
    together. All heads of an attention, and all groups of a convolution, become equally wider. Heads that cannot become
    wider (because of rotary position embeddings) are followed by whole new heads. The growth is planned, traced and
    attacked on a copy, where every sealed task must stay bit-equal, before the model is changed.

    Args:
        factor: every layer's number of units is multiplied by this number (rounded down to whole rows of heads and
            groups), except for layers whose sizes are fixed in the model's code; the report lists these. Or a mapping
            from a layer's name, as in `hatcl.describe`, to its number of new units: `{"layer1.0.conv1": 16}` (rounded
            up to whole rows; coupled layers grow along).
        optimizer: an optimizer, or a list of those that hold the model's parameters: new parameters replace the old
            ones and keep their moments, which are zero for new elements. Without it, build a new optimizer.
        example_inputs: inputs of the model's forward; default: as for `hatcl.extract_task`.

    Raises:
        ConfigError: a factor below 1, less than one unit, an unknown layer, no inputs. TaskError: a task is being
            learned, or the model is a copy that is averaged. ConversionError: a named layer cannot grow (gives the
            reason). GuardError: an optimizer of another model, or one whose state cannot be carried over. HATError:
            layers assembled by hand, shards, or DistributedDataParallel. IntegrityError: a sealed task changed. After
            any error the model is unchanged.
    """
    gates = _growable(model)
    wanted = _more_units(gates, factor)
    named = isinstance(factor, Mapping)
    check_structure(model)
    digests.check_sealed(model)
    optimizers = [] if optimizer is None else list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    carriers = [Carrier(model, o) for o in optimizers]
    inputs = example_inputs_of(model) if example_inputs is None else example_inputs
    root = next(m for m in model.modules() if gates in m._modules.values())
    want = _said_by(root, inputs)
    growth, left = _planned(root, gates, inputs, wanted, named)
    before = [(name, stop - start) for name, start, stop in gates.layers]
    elements = _shared_elements(gates.unit_map)
    trial = copy_of(root)
    apply_growth(trial, growth)
    _check_on_copy(trial, inputs, want)
    del trial
    replaced = apply_growth(model, growth)
    for carrier in carriers:
        carrier.carry(replaced)
    for t in tasks(model):
        digests.record(model, t)
    grown = {name: (old, b - a) for (name, old), (_, a, b) in zip(before, gates.layers, strict=True) if b - a > old}
    return GrowReport(
        grown, left, gates.num_units, sum(n for _, n in before), _shared_elements(gates.unit_map), elements, list(want)
    )


def _growable(model: nn.Module) -> Gates:
    gates = gates_of(model)
    if len(gates) != 1 or gates[0].unit_map is None:
        raise HATError(
            "grow: this model was put together by hand, not converted, so nothing says which of its sizes belong "
            "together; convert the plain module with hatcl.convert"
        )
    check_whole(model, "grow")
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise HATError(
            "grow: DistributedDataParallel keeps the parameters that it was built with; grow the model itself, "
            "ddp.module, in every process with the same seed, and wrap it again"
        )
    if gates[0].learning is not None:
        raise TaskError(f"task {gates[0].learning} is being learned; leave its hatcl.learn block before growing")
    gates[0].notice()
    if (origin := gates[0].origin) is not None and origin.task is not None:
        raise TaskError(
            f"grow: this is a copy that is averaged with a model that learns task {origin.task}, which could not "
            "continue afterwards; hatcl.seal(copy) seals what it is now, or grow the model and make the copy again"
        )
    return gates[0]


def _more_units(gates: Gates, factor: float | Mapping[str, int]) -> dict[str, int]:
    """Layer -> requested number of new units."""
    have = {name: stop - start for name, start, stop in gates.layers if stop > start}
    if isinstance(factor, Mapping):
        for name, more in factor.items():
            if name not in have:
                raise ConfigError(
                    f"factor: got {name!r}, which is no layer with units; did you mean {nearest(name, have)!r}? The "
                    f"model has {', '.join([*have][:8])}{' ...' if len(have) > 8 else ''}"
                )
            whole(f"factor[{name!r}]", more)
        if not factor:
            raise ConfigError("factor: got no layer; name those that are to grow, or pass a factor above 1")
        return dict(factor)
    number("factor", factor, 1)
    wanted = {name: int(n * (factor - 1) + 1e-9) for name, n in have.items()}
    if not any(wanted.values()):
        widest = max(have.values(), default=0)
        raise ConfigError(
            f"factor: got {factor!r}, which is less than one new unit in every layer (the widest has {widest}); pass "
            f"at least {1 + 1 / max(widest, 1):.4g}, or name layers: {{{next(iter(have), 'layer')!r}: 8}}"
        )
    return wanted


def _said_by(model: nn.Module, inputs: Any) -> dict[int | None, Any]:
    """The outputs of task None and every sealed task in evaluation."""
    return {t: outputs_under(model, inputs, t) for t in (None, *tasks(model))}


def _shared_elements(unit_map: UnitMap) -> int:
    return sum(int(np.prod(e.shape)) for e in unit_map.entries.values() if not e.copied)


# ---- the plan --------------------------------------------------------------------------------------------------------


class _Growing(Search):
    """Grows all requested layers, except the units of modules whose forward fails with larger sizes."""

    cutter: Grower

    def _try(self, keep: torch.Tensor) -> Misfit | None:
        if bool((keep == 1).all()):
            return None
        stack: list[str] = []
        try:
            made, _ = self.cutter.cut(keep)
            expected = grown_map(self.cutter.unit_map, self.cutter.growth(keep))
            self._run_followed(made, stack)
            found = map_of(made, self.inputs)
        except Exception as error:
            log.debug("a forward that grew fails", exc_info=True)
            text = str(error).splitlines()[0][:120] if str(error) else ""
            return Misfit(
                stack[-1] if stack else "", f"its forward has sizes of its own ({type(error).__name__}: {text})"
            )
        where = _odd_module(expected, found)
        return None if where is None else Misfit(where, "grown, its units belong together otherwise")

    def _hold(self, path: str) -> bool:
        """A layer that fails got an input of another width than it reads, so hold the units that it reads first."""
        if path != self._at_fault(path):
            module = self.cutter.modules[path]
            names = [self.cutter.names[id(p)] for p in module._parameters.values() if p is not None]
            read = [f.units for n in names for f in self.cutter.unit_map.entries[n].factors if not f.owner]
            more = torch.from_numpy(np.concatenate(read)) if read else torch.zeros(0, dtype=torch.int64)
            if not bool(self.held[more].all()):  # (True for no units)
                self.held[more] = True
                return True
        return super()._hold(path)


def _odd_module(expected: UnitMap, found: UnitMap) -> str | None:
    """The path of the first module on which two maps differ; None if they agree."""
    for name, e in expected.entries.items():
        other = found.entries[name]
        a, b = ([f.to_json() for f in x.factors] for x in (e, other))
        if (e.shape, e.view, a, e.copied or other.copied) != (other.shape, other.view, b, e.copied):
            return name.rpartition(".")[0]
    for mine, theirs in ((expected.outputs, found.outputs), (expected.norms, found.norms)):
        for path, x in mine.items():
            y: Any = theirs.get(path)
            ours = x if isinstance(x, np.ndarray) else x.units
            if y is None or not np.array_equal(ours, y if isinstance(y, np.ndarray) else y.units):
                return path
    if expected.folds != found.folds:
        odd = {*expected.folds.items()} ^ {*found.folds.items()}
        return min(path for (path, _), _ in odd)
    return None if expected.num_units == found.num_units else ""


def _planned(
    model: nn.Module, gates: Gates, inputs: Any, wanted: dict[str, int], named: bool
) -> tuple[Growth, dict[str, str]]:
    """The plan, and layer -> why it does not get the requested growth."""
    plain = plain_copy(model, None, len(gates.growths))
    unit_map: UnitMap = gates.unit_map
    seen = footprint(plain, inputs)
    if seen.units != unit_map.num_units:
        raise ConversionError(
            f"grow: on example_inputs = {shapes(inputs)} the model has {seen.units} units, and {unit_map.num_units} on "
            "its map; pass inputs of the same kind (the same arguments, so that the same code runs)"
        )
    grower = Grower(plain, unit_map, seen, wanted, named)
    search = _Growing(model, 0, inputs, {}, grower, 0.0)
    counts, full = search.run()
    left = _left(gates, grower, search, counts, full, wanted)
    if named and left:
        name, why = next(iter(left.items()))
        raise ConversionError(f"{name}: it cannot get {wanted[name]} new units: {why}; leave it out")
    if bool((counts == 1).all()):
        name, why = next(iter(left.items()))
        raise ConversionError(f"{type(model).__name__}: none of its layers can grow; {name}: {why}")
    growth = grower.growth(counts)
    expected = grown_map(unit_map, growth)
    known = copy.deepcopy(expected)
    made, _ = grower.cut(counts)
    convert(made, 1, inputs, unit_map=known, inplace=True)  # attacks it
    leaks = [n for n, e in known.entries.items() if e.copied and not expected.entries[n].copied]
    if leaks:
        raise ConversionError(
            f"{leaks[0]}: other tasks would reach a task through it in the grown network; please report the model"
        )
    return growth, left


def _left(
    gates: Gates, grower: Grower, search: Search, counts: torch.Tensor, full: dict[str, str], wanted: dict[str, int]
) -> dict[str, str]:
    """Layer -> why it gets fewer new units than requested."""
    whole_units = np.zeros(len(counts), dtype=bool)
    whole_units[grower.seen.whole] = True
    held = search.held.numpy()
    out: dict[str, str] = {}
    for name, start, stop in gates.layers:
        mine = np.arange(start + 1, stop + 1)
        more = int((counts[mine] - 1).sum())
        if not wanted.get(name) or (more >= wanted[name] if grower.up else more):
            continue
        if held[mine].any() and full:
            here = (p for p in full if np.isin(mine, grower.seen.units_at(p, inside=True)).any())
            path = next(here, next(iter(full)))
            out[name] = f"{path or type(grower.plain).__name__}: {full[path]}"
        elif whole_units[mine].any():
            out[name] = "its units meet, one by one, values that belong to no unit (weights of attention, say)"
        else:
            out[name] = (
                "its units go together with those of a layer that cannot grow, or it would be less than one unit for "
                "each of its rows (heads, groups)"
            )
    return out


def _check_on_copy(trial: nn.Module, inputs: Any, want: Mapping[int | None, Any]) -> None:
    """Check on a grown copy that every task is bit-equal to before and depends only on its own elements."""
    got = _said_by(trial, inputs)
    for t, outputs in want.items():
        diff, where = compare_outputs(outputs, got[t])
        if where:
            raise ConversionError(
                f"{type(trial).__name__}: grown, task {t} computes another {where} (by {diff:.2g}); the model is as it "
                "was. Please report it"
            )
    digests.check_sealed(trial)
    if tasks(trial):
        proof = certify(trial, inputs, strict=not by_degrees(trial))
        if any(proof.max_abs_diff.values()):
            raise IsolationError(f"certify: {proof}")
