"""`extract_task`: cut the network of M1 down to a task's units, as an ordinary smaller module."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...calls import call, device_of, seeded, shapes, tensors_of, values_of
from ...errors import ConfigError, ConversionError, HATError
from ...lend import Evaluating, lent
from ...map.units import UnitMap
from ...sources import build_source, can_fit, fitted_source
from ..certify import named_outputs
from ..digests import check_sealed
from ..gates import gates_of
from ..growth.grown import sizes_after
from ..saving.taken import made_by
from ..tasks import check_task
from ..tasks import task as active
from ..verify import stirred
from .cut import Cutter, Shaping
from .files import check_format, write_extracted, write_program
from .plain import plain_copy, weights_of_task
from .trace import Carried, Footprint, footprint

log = logging.getLogger(__name__)
TOLERANCE = 1e-5  # relative to the largest value; docs/hat.md has measurements
STIRRED = 1e-4  # with noise on the weights, where an error causes differences of 1e-2 and more
ATTEMPTS = 40


@dataclass(frozen=True)
class ExtractReport:
    """The report of a cut.

    Attributes:
        task: the task. kept, total: elements of the smaller network's parameters and of the plain model's.
        difference: the largest difference of an output value on the example inputs, divided by the largest value.
        multiply_adds, multiply_adds_before: those of one forward on the example inputs, with the smaller network and
            with the plain model.
        units, on: the number of units of the smaller network, and how many of them belong to the task; the others are
            zeros that keep sizes equal where a forward requires it.
        full: module path -> why all units used only by this module and similar ones were kept.
    """

    task: int
    kept: int
    total: int
    difference: float
    multiply_adds: int
    multiply_adds_before: int
    units: int
    on: int
    full: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        def share(part: int, whole: int) -> str:
            return f"{part / max(whole, 1):.1%}"

        lines = [
            f"task {self.task}: {self.kept:,} of {self.total:,} elements ({share(self.kept, self.total)}), "
            f"{self.multiply_adds:,} of {self.multiply_adds_before:,} multiply-adds "
            f"({share(self.multiply_adds, self.multiply_adds_before)}), outputs within {self.difference:.1g} of the "
            "largest",
            f"units: {self.on} of the task's, {self.units - self.on} that are zero and kept for their place",
        ]
        lines += [f"full width: {path}: {why}" for path, why in self.full.items()]
        return "\n".join(lines)


@dataclass
class Extracted:
    """A task as a separate model.

    Attributes:
        model: the smaller network, in evaluation mode, an ordinary module.
        report: what was cut.
        shaping: its differences from a model made by its class. source: how its class makes it, if hatcl knows. inputs:
            the inputs on which it was compared.
    """

    model: nn.Module
    report: ExtractReport
    shaping: Shaping
    inputs: Any = None
    source: dict[str, Any] | None = None

    def save(self, folder: str | os.PathLike[str], form: str = "safetensors") -> Path:
        """Write the model in its current state, fine-tuned or not.

        Args:
            form: `safetensors`: tensors and a description of the network (`hatcl.load_extracted` reads it); `pt2`: a
                program of `torch.export`; `onnx`: for onnxruntime and others. Programs take any batch size.

        Raises:
            ConfigError: there is no such form, or a package that writes it is not installed. ConversionError: no
                program can be made.
        """
        if check_format(form) != "safetensors":
            return write_program(folder, self.model.eval(), self.inputs, form)
        return write_extracted(folder, self.model, self.shaping, self.source, dataclasses.asdict(self.report))


def extract_task(model: nn.Module, task: int, example_inputs: Any = None, *, tolerance: float = TOLERANCE) -> Extracted:
    """The network that a sealed task uses, as an ordinary smaller module: only the task's units, with its norms, copies
    and head folded in, and without hatcl. The model stays unchanged.

    Modules keep their classes and get smaller tensors. Where a forward requires equal sizes (attention heads, halves of
    a split, groups), units that are off fill them up as zeros. Where a forward's sizes cannot be changed, all units
    concerned stay, and the report says where and why. Outputs are cut too: features have only the task's channels.

    Args:
        example_inputs: inputs of the model's forward, on which the result must agree with the model; default: random
            ones of the kind used at conversion.
        tolerance: the largest allowed difference of an output, relative to the largest value.

    Raises:
        TaskError: the task is not sealed, or there is no such task.
        ConfigError: there are no inputs, or they do not fit.
        ConversionError: the smaller network does not agree with the model.
        HATError: the model was assembled by hand.
    """
    gates = gates_of(model)
    task = check_task(model, task, sealed=True)
    if len(gates) != 1 or gates[0].unit_map is None:
        raise HATError(
            "extract_task: this model was put together by hand, not converted, so nothing says which of its sizes "
            "belong together; convert the plain module with hatcl.convert"
        )
    check_sealed(model, [task])
    inputs = example_inputs_of(model) if example_inputs is None else example_inputs
    if any(x.numel() == 0 for x in tensors_of(inputs, "example_inputs")):
        raise ConfigError(f"example_inputs: got {shapes(inputs)}, which holds no example; pass one or more")
    want = outputs_under(model, inputs, task)
    if not any(bool(x.isfinite().any()) for x in want.values()):
        raise ConfigError(
            f"example_inputs: no output of {type(model).__name__} is finite on them, so nothing could be compared; "
            "pass others"
        )
    stage = gates[0].stage_of(task)
    seen = footprint(plain_copy(model, task if stage else None), inputs)
    unit_map: UnitMap = gates[0].map_at(stage)
    if seen.units != unit_map.num_units:
        raise ConversionError(
            f"extract_task: on example_inputs = {shapes(inputs)} the model has {seen.units} units, at conversion it "
            f"had {unit_map.num_units}; pass inputs of the same kind (the same arguments, so that the same code runs)"
        )
    on = torch.cat([torch.ones(1, dtype=torch.bool), gates[0].masks[task].cpu()])[gates[0].number_from(stage)]
    trial = stirred(model, inputs)
    cutter = Cutter(plain_copy(trial, task), weights_of_task(trial, task), unit_map, seen, on)
    gated = outputs_under(trial, inputs, task)
    source: Any = gates[0].source
    plain, weights = plain_copy(model, task), weights_of_task(model, task)
    own_rows, stirred_values = list(cutter.rows), (cutter.plain, cutter.weights)
    for alike in [True, False] if can_fit(source) else [False]:
        cutter.fill(*stirred_values)
        cutter.rows = own_rows + (cutter.alike_rows() if alike else [])
        search = Search(trial, task, inputs, gated, cutter, STIRRED)
        keep, full = search.run()
        cutter.fill(plain, weights)
        made, shaping = cutter.cut(keep)
        if alike and (fitted := _fitted(source, made, inputs, tolerance)) is not None:
            source, shaping = fitted, Shaping()
            break
    del trial
    difference, where = search.difference(want, _run(made, inputs), keep)
    if not difference <= tolerance:
        raise ConversionError(
            f"{type(model).__name__}: the network cut down to task {task} does not agree with the model within "
            f"{tolerance:g} of the largest value ({where}); pass tolerance= what you can bear, or report the model"
        )
    for path, sizes in sizes_after(gates[0].growths[:stage] if source is gates[0].source else []).items():
        shaping.sizes[path] = {**sizes, **shaping.sizes.get(path, {})}
    return Extracted(
        made,
        ExtractReport(
            task, _elements(made), _elements(plain), difference, _multiply_adds(made, inputs),
            _multiply_adds(plain, inputs), int(keep[1:].sum()), int((keep & on)[1:].sum()), full,
        ),
        shaping,
        inputs,
        source,
    )  # fmt: skip


def _fitted(source: Any, made: nn.Module, inputs: Any, tolerance: float) -> dict[str, Any] | None:
    """The description with which the model's class makes the smaller one, if it can."""
    fitted = fitted_source(source, made)
    if fitted is None:
        return None
    try:
        other = build_source(fitted).to(device_of(made)).eval()
        other.load_state_dict(made.state_dict())
        want, got = _run(made, inputs), _run(other, inputs)
    except Exception as error:
        log.info("the smaller model is not what its class makes: %s", error)
        return None
    nothing = torch.zeros(1, dtype=torch.bool)
    same = want.keys() == got.keys() and all(_gap_of(x, got[p], None, nothing) <= tolerance for p, x in want.items())
    return fitted if same else None


def example_inputs_of(model: nn.Module) -> Any:
    """Inputs of the kind used at conversion, or those that the model itself declares."""
    some = next(model.parameters())
    if (takes := gates_of(model)[0].takes) is not None:
        return made_by(takes, some)
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if size is not None:
        embed = getattr(getattr(model, "patch_embed", None), "img_size", None)
        draw = torch.Generator().manual_seed(0)
        return torch.randn(2, size[0], *(embed or size[1:]), generator=draw).to(some)
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping):
        return {name: x.to(some.device) if isinstance(x, Tensor) else x for name, x in dummy.items()}
    raise ConfigError(
        f"example_inputs: got None, and {type(model).__name__} does not say what it takes; pass an input of its "
        "forward: a tensor, a tuple or a dict"
    )


def outputs_under(model: nn.Module, inputs: Any, task: int | None) -> dict[str, Tensor]:
    """A task's outputs in evaluation, by name.

    Raises:
        ConfigError: the forward does not accept the inputs.
    """
    try:
        with torch.no_grad(), Evaluating(model):
            return named_outputs(model, inputs, task)
    except HATError:
        raise
    except Exception as error:
        raise ConfigError(
            f"example_inputs: the model's forward failed on {shapes(inputs)} ({type(error).__name__}: {error}); pass "
            "what it takes: a tensor, a tuple or a dict"
        ) from error


def _elements(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _multiply_adds(model: nn.Module, inputs: Any) -> int:
    """The multiply-adds of matrix products, convolutions and attention in one forward."""
    with lent(model, ()), FlopCounterMode(display=False) as counter, seeded(device=device_of(model)):
        call(model, inputs)
    return counter.get_total_flops() // 2


# ---- how much can be cut --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Misfit:
    """Where and why a smaller network is wrong. runs: its forward finishes, with different outputs."""

    path: str
    why: str
    runs: bool = False


class Search:
    """Cuts all units that are off. Where a module's forward cannot work with the smaller sizes, it keeps units there at
    full width: first those that only this module and similar ones use, then all that it uses."""

    def __init__(
        self, model: nn.Module, task: int, inputs: Any, want: dict[str, Tensor], cutter: Cutter, tolerance: float
    ) -> None:
        self.model, self.task, self.inputs, self.want = model, task, inputs, want
        self.cutter, self.tolerance = cutter, tolerance
        self.held = torch.zeros(cutter.seen.units + 1, dtype=torch.bool)
        self.within = _within(cutter.seen)
        self.one_width: dict[type, list[Any]] = {}  # class -> rows that must stay equally long
        self.asked: set[tuple[int, type]] = set()  # the choices tried for a class

    def run(self) -> tuple[Tensor, dict[str, str]]:
        """The units to keep, and the reasons for keeping some of them at full width."""
        full: dict[str, str] = {}
        where, why = "", ""
        for _ in range(ATTEMPTS):
            keep = self.cutter.settled(self.held)
            found = self._try(keep)
            if found is not None:
                found = self._with_sizes_left(keep, found)
            if found is None:
                return keep, full
            where, why = found.path, found.why
            log.info("%s: %s", where or type(self.model).__name__, why)
            if not self._hold(where):
                break
            if self.held.any():
                full.setdefault(where or type(self.model).__name__, why)
        raise ConversionError(
            f"{where or type(self.model).__name__}: the network cut down to task {self.task} does not agree with the "
            f"model, also at full width: {why}; please report the model"
        )

    def _try(self, keep: Tensor) -> Misfit | None:
        stack: list[str] = []
        made, _ = self.cutter.cut(keep)
        try:
            got = self._run_followed(made, stack)
        except Exception as error:  # the plain model accepts these inputs, so the cut causes any error
            log.debug("a forward that was cut fails", exc_info=True)
            text = str(error).splitlines()[0][:120] if str(error) else ""
            why = f"its forward has sizes of its own ({type(error).__name__}: {text})"
            return Misfit(stack[-1] if stack else "", why)
        difference, part = self.difference(self.want, got, keep)
        if difference <= self.tolerance:
            return None
        return Misfit(self._first_that_differs(made, keep), f"cut, it computes something else ({part})", True)

    def _run_followed(self, made: nn.Module, stack: list[str]) -> dict[str, Tensor]:
        with _followed(made, stack):
            return _run(made, self.inputs)

    def _with_sizes_left(self, keep: Tensor, misfit: Misfit) -> Misfit | None:
        """Try again with a class's attributes unchanged (one may only happen to equal a size), or with queries scaled
        by the root of their width. A change that gets the forward further is kept for the class."""
        order = {path: i for i, path in enumerate(self.cutter.seen.outputs)}
        path = misfit.path
        while True:
            cls = type(self.cutter.modules.get(path))
            for choice, so in (
                (self.cutter.rooted, misfit.runs and path in self.cutter.seen.products),
                (self.cutter.left, bool(self.cutter.resizes(path, keep)) if path in self.cutter.modules else False),
            ):
                if not so or (id(choice), cls) in self.asked:
                    continue
                self.asked.add((id(choice), cls))
                choice.add(cls)
                found = self._try(keep)
                if found is None:
                    return None
                if order.get(found.path, -1) > order.get(misfit.path, len(order)):
                    misfit = found
                else:
                    choice.discard(cls)
            if not path:
                return misfit
            path = path.rpartition(".")[0]

    def _hold(self, path: str) -> bool:
        """Keep more units at full width; False if all units already are."""
        path = self._at_fault(path)
        seen, cls = self.cutter.seen, type(self.cutter.modules.get(path))
        like = [p for p, m in self.cutter.modules.items() if type(m) is cls]
        if cls not in self.one_width:
            self.one_width[cls] = [rows for p in like for rows in seen.of_one_width(p)]
            self.cutter.rows += self.one_width[cls]
            if self.one_width[cls]:
                return True
        useless = {id(rows) for rows in self.one_width[cls]}
        self.one_width[cls] = []
        self.cutter.rows = [rows for rows in self.cutter.rows if id(rows) not in useless]
        local = [u for p in like for u in [self._local(p)] if len(u)]
        parent = path.rpartition(".")[0]
        options = [
            np.concatenate(local) if local else np.zeros(0, dtype=np.int64),
            seen.units_at(path),
            seen.units_at(path, inside=True),
            seen.units_at(parent),
            seen.units_at(parent, inside=True),
            np.arange(1, len(self.held)),
        ]
        for units in options:
            more = torch.from_numpy(units)
            if len(more) and not bool((self.held | self.cutter.on)[more].all()):
                self.held[more] = True
                return True
        return False

    def _at_fault(self, path: str) -> str:
        """The module whose code causes a failure at this path: a simple layer, or a chain of layers, only passes on its
        input."""
        while path:
            module = self.cutter.modules.get(path)
            simple = module is not None and not module._modules and type(module).__module__.startswith("torch.nn.")
            if not simple and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.Identity)):
                break
            path = path.rpartition(".")[0]
        return path

    def _local(self, path: str) -> Any:
        """The units that a module meets and that are met only within its parent module."""
        units = self.cutter.seen.units_at(path)
        parent = path.rpartition(".")[0]
        return units[[self.within[u] == parent or f"{self.within[u]}.".startswith(f"{parent}.") for u in units]]

    def difference(self, want: dict[str, Tensor], got: dict[str, Tensor], keep: Tensor) -> tuple[float, str]:
        """The largest difference of an output, relative to the largest value, and its place."""
        if got.keys() != want.keys():
            return float("inf"), "its output has other parts"
        worst, where = 0.0, ""
        for path, x in want.items():
            gap = _gap_of(x, got[path], self.cutter.seen.results.get(path), keep)
            if gap > worst:
                worst, where = gap, f"{path} differs by {gap:.1g}"
        return worst, where

    def _first_that_differs(self, made: nn.Module, keep: Tensor) -> str:
        """The first module with a different output, in the order in which modules end."""
        with active(self.model, self.task):
            want = _module_outputs(self.model, self.inputs)
        got = _module_outputs(made, self.inputs)
        for path, x in want.items():
            carried = self.cutter.seen.outputs.get(path)
            if path in got and path not in self.cutter.scaled and _gap_of(x, got[path], carried, keep) > self.tolerance:
                return path
        return ""


def _within(seen: Footprint) -> list[str]:
    """Unit -> the longest module path within which all its uses lie."""
    out: list[str | None] = [None] * (seen.units + 1)
    for path in seen.work:
        for u in seen.units_at(path):
            known = out[u]
            out[u] = path if known is None else _shared(known, path)
    return [p or "" for p in out]


def _shared(a: str, b: str) -> str:
    same = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        same.append(x)
    return ".".join(same)


def _gap_of(want: Tensor, got: Tensor, carried: Carried | None, keep: Tensor) -> float:
    if carried is not None and want.shape == carried.shape:
        mask = carried.kept(keep)
        want = want.masked_select(mask.to(want.device))
    if want.numel() != got.numel():
        return float("inf")
    if not want.numel():
        return 0.0
    want, got = want.flatten().double(), got.flatten().double()
    alike = (want == got) | (want.isnan() & got.isnan())  # infinities and NaNs that are equal differ by nothing
    gap = torch.where(alike, 0.0, (want - got).abs())
    if bool(gap.isnan().any()):
        return float("inf")
    largest = want[want.isfinite()].abs().max() if bool(want.isfinite().any()) else want.new_ones(())
    return float(gap.max() / largest.clamp(min=1e-30))


def _run(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    with torch.no_grad(), seeded(device=device_of(model)):
        return {path: x.clone() for path, x in values_of(call(model, inputs)).items()}


@contextlib.contextmanager
def _followed(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """While the model runs, `stack` holds the paths of the modules at work; a module that fails stays on it."""
    handles = []
    for path, m in model.named_modules():
        handles.append(m.register_forward_pre_hook(lambda m, a, path=path: stack.append(path)))
        handles.append(m.register_forward_hook(lambda m, a, out: stack.__delitem__(-1)))
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def _module_outputs(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Module path -> the first tensor that the module returned, in the order in which modules end."""
    out: dict[str, Tensor] = {}

    def note(path: str) -> Any:
        def hook(m: nn.Module, args: Any, given: Any) -> None:
            if found := tensors_of(given):
                out.setdefault(path, found[0].detach().clone())

        return hook

    handles = [m.register_forward_hook(note(path)) for path, m in model.named_modules()]
    try:
        with Evaluating(model), contextlib.suppress(Exception):
            _run(model, inputs)
    finally:
        for h in handles:
            h.remove()
    return out
