"""A converted model attacks itself before it is handed over (M7): it must compute what its source computes, and nothing
that is not a task's own may reach what the task computes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import call, device_of, seeded, tensors_of, values_of
from ..errors import ConversionError
from ..functional import same_bits
from ..map.units import UnitMap
from .altered import Altered, is_large
from .build import GATES
from .certify import RANDOM, attack, attacked_outputs, compare_outputs, largest_gap, named_outputs
from .gates import Gates
from .layers.gated import HATLayer
from .layers.state import copy_of

log = logging.getLogger(__name__)


def check_plain(made: nn.Module, source: nn.Module, batch: Any, few: Any) -> None:
    """Without a task the model must compute what the source does, bit for bit: in evaluation on the whole batch, and in
    training on few rows of it (on all, where the source cannot train on few).

    Raises:
        ConversionError: names the first module whose output differs.
    """
    for training in (False, True):
        mode = "training" if training else "evaluation"
        inputs = few if training else batch
        try:
            want = _plain_outputs(source, inputs, training)
        except Exception as error:
            if not training:
                raise
            if few is not batch:
                return check_plain(made, source, batch, batch)
            log.info("%s: a training forward failed (%s), so it is not compared", type(source).__name__, error)
            return
        try:
            got = _plain_outputs(made, inputs, training)
            where = compare_outputs(want, got)[1]
        except Exception as error:
            got, where = {}, f"{type(error).__name__}: {error}"
        if not where:
            continue
        random = compare_outputs(want, _plain_outputs(source, inputs, training))[1]
        if random and training:
            log.info("%s: its training forward cannot be seeded, so it is not compared", type(source).__name__)
            return
        if random:
            raise ConversionError(f"{type(source).__name__}: {RANDOM.format(where=random)}")
        path = _first_that_differs(made, source, inputs, training)
        raise ConversionError(
            f"{path or type(source).__name__}: without a task, in {mode} mode, the converted module computes something "
            f"else than the source ({where}). Conversion gives a module a class that is derived from its own: a "
            "forward that compares classes (type(m) is nn.Linear) must use isinstance, and names that begin with "
            "hat_ or _hat_ belong to hatcl"
        )


def _plain_outputs(model: nn.Module, inputs: Any, training: bool) -> dict[str, Tensor]:
    trial = copy_of(model, share=True).train(training)
    with torch.no_grad(), seeded(device=device_of(model)):
        return {path: x.clone() for path, x in values_of(call(trial, inputs)).items()}


def _first_that_differs(made: nn.Module, source: nn.Module, inputs: Any, training: bool) -> str:
    """The path of the first module, in the order in which they end, whose output is another one in the converted
    model."""

    def run(model: nn.Module) -> list[tuple[str, list[Tensor]]]:
        trial, seen = copy_of(model, share=True).train(training), []

        def note(path: str) -> Any:
            return lambda m, args, out: seen.append((path, [x.detach().clone() for x in tensors_of(out)]))

        for path, m in trial.named_modules():
            if path in paths:
                m.register_forward_hook(note(path))
        with contextlib.suppress(Exception), torch.no_grad(), seeded(device=device_of(model)):
            call(trial, inputs)
        return seen

    paths = {path for path, _ in source.named_modules()}
    for (path, a), (other, b) in zip(run(source), run(made), strict=False):
        if path != other or len(a) != len(b) or not all(map(same_bits, a, b)):
            return path
    return ""


def verified(
    model: nn.Module, source: nn.Module, unit_map: UnitMap, inputs: Any, few: Any, rebuild: Callable[[], None]
) -> None:
    """Attack with random gates, in place (the model is as it was afterwards, bit for bit). A parameter through which
    the attack gets out becomes a copy per task (M5): `rebuild` makes the model again on the map that says so.

    Args:
        inputs, few: a batch, and few rows of it (see `_leaks`).
    """
    blamed: list[str] = []
    for _ in range(8):
        altered = Altered(1)
        try:
            leaks = _leaks(model, inputs, few, altered)
        finally:
            altered.undo()  # again: an interruption may have come just before the first time
        if leaks is None:
            return
        if not leaks:
            break
        blamed += leaks
        for name in leaks:
            entry = unit_map.entries[name]
            unit_map.entries[name] = dataclasses.replace(entry, copied=True, why="the attack got out through it")
            log.info("%s: reachable by other tasks, so each task gets its own copy", name)
        rebuild()
    names = ", ".join(list(dict.fromkeys(blamed))[:5])
    raise ConversionError(
        f"{type(source).__name__}: other tasks reach a task's output through {names} even as "
        "copies per task. If the forward takes them from parameters(), named_parameters(), state_dict() or "
        "torch.func.stack_module_state, which give those of the plain model, let it read them as attributes "
        "(module.weight); else please report the model, or pass verify=False to convert without the guarantee"
    )


def _leaks(model: nn.Module, inputs: Any, few: Any, altered: Altered) -> list[str] | None:
    """Shared parameters whose non-live elements reach the output under random gates (on the whole batch) or under their
    complement, so that every unit is off once (on few rows of it); all that are left, where no one does by itself; None
    where nothing gets out. Under both also the cut must compute what the gates do, on few rows.

    The parameters are stirred and attacked where they are, and put back bit for bit, also where this is interrupted.
    """
    trial = copy_of(model, share=True).eval()
    for m in trial.modules():
        if isinstance(m, HATLayer):  # constants of a whole task would be as large as the model
            m.register_forward_hook(lambda m, args, out: m._hat.cache.clear())
    gates: Gates = getattr(trial, GATES)
    mask = torch.rand(gates.num_units, generator=torch.Generator().manual_seed(0)) < 0.5
    gates.sealed[0] = True
    names = [n for n, e in gates.unit_map.entries.items() if not e.copied]
    found: dict[str, None] = {}
    exact = True
    try:
        stir(trial, altered)
        for on, batch in ((mask, inputs), (~mask, few)):
            gates.masks[0] = on.to(gates.masks.device)
            _set_cut(gates, False)  # what the folds of the map alone give: this is what proves the map
            with torch.no_grad():
                want = named_outputs(trial, batch, 0)
                if len(altered) and not _all_finite(want):
                    log.info("%s overflows with noise on its parameters; attacked as it is", type(model).__name__)
                    altered.undo()
                    want = named_outputs(trial, batch, 0)
                groups = [names]
                while groups:
                    group = groups.pop()
                    with attack(trial, 0, only=None if group is names else set(group), frugal=altered):
                        got = attacked_outputs(trial, batch, 0)
                    if _same_numbers(want, got):
                        continue
                    if exact and (where := compare_outputs(want, named_outputs(trial, batch, 0))[1]):
                        raise ConversionError(f"{type(model).__name__}: {RANDOM.format(where=where)}")
                    exact = False
                    if len(group) == 1:
                        found[group[0]] = None
                    elif group:
                        groups += [group[: len(group) // 2], group[len(group) // 2 :]]
                want = want if batch is few or not exact else named_outputs(trial, few, 0)
                _set_cut(gates, True)
                if exact and not _same_numbers(want, got := named_outputs(trial, few, 0)):
                    diff, where = compare_outputs(want, got)
                    raise ConversionError(
                        f"{type(model).__name__}: cut down to half of its units it computes another {where} (by "
                        f"{diff:.2g}) than gated to them, so its map is not right; please report the model, or pass "
                        "verify=False to convert without the guarantee"
                    )
    finally:
        altered.undo()
    return None if exact else list(found) or names


def _set_cut(gates: Gates, cut: bool) -> None:
    gates.cut = cut
    gates.epoch += 1


def _same_numbers(want: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> bool:
    """The same bits, but for the sign of zeros: without the cut a zero is a product, and has its sign."""
    return want.keys() == got.keys() and all(largest_gap(x + 0, got[path] + 0) == 0 for path, x in want.items())


def _all_finite(values: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in values.values())


def stir(model: nn.Module, altered: Altered) -> None:
    """Noise on every parameter, in place: biases and scales that start at zero would hide what gets out through them.
    Small ones get normal noise of half their spread; the elements of large ones are multiplied with random factors from
    1/2 to 2, and their zeros become such noise."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if not (p.is_floating_point() or p.is_complex()) or not p.numel():
            continue
        fan_in = p.numel() / p.shape[0] if p.dim() > 1 else 25.0
        least = 0.5 / math.sqrt(fan_in)
        if is_large(p):
            altered.turned_over(p, functools.partial(_normal, generator, least))
        else:
            size = max(0.5 * float(p.detach().std()) if p.numel() > 1 else 0.0, least)
            altered.replace(p, p.detach() + _normal(generator, size, p))


def _normal(generator: torch.Generator, size: float, like: Tensor) -> Tensor:
    """Normal noise of a tensor's shape and type."""
    dtype = torch.complex64 if like.is_complex() else torch.float32
    return (torch.randn(like.shape, generator=generator, dtype=dtype) * size).to(like)


def stirred(model: nn.Module, inputs: Any) -> nn.Module:
    """A copy with noise on every parameter, where the model computes finite values with it."""
    trial, altered = copy_of(model).eval(), Altered(1)
    stir(trial, altered)
    if not _all_finite(named_outputs(trial, inputs, None)):
        log.info("%s overflows with noise on its parameters; taken with its own values", type(model).__name__)
        altered.undo()
    return trial
