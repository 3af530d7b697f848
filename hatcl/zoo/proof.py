"""What must hold for a model: the proof that `hatcl zoo` runs, on one model, from conversion to a load elsewhere."""

from __future__ import annotations

import copy
import dataclasses
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..certify import certify
from ..config import HATConfig
from ..convert import convert, map_of
from ..describe import describe
from ..gates import task as active
from ..map.trace import call, tensors_of
from ..pretrained import from_pretrained, save_pretrained
from ..training.learn import learn

# about half of each task's units off, and they stay so: a few steps do not turn an embedding of 6 around
CONFIG = HATConfig(num_tasks=2, init="sparse", init_density=0.5, init_value=6.0, penalty_weight=0.0)
EXPECTED = "expected.pt"


@dataclasses.dataclass(frozen=True)
class Proof:
    """Figures of a model that passed. known: share of the elements whose owner and reader are known (`UnitMap.known`).
    shares: of the elements of its parameters (see `hatcl.Description`). copies: why
    parameters are copied per task -> how many elements. use: share of the units that each task uses. seconds: of one
    plain forward, of the trace, and of everything."""

    parameters: int
    units: int
    known: float
    shares: dict[str, float]
    copies: dict[str, int]
    use: list[float]
    forward_seconds: float
    trace_seconds: float
    seconds: float


class ProofFailed(AssertionError):
    """A model converts and something that was promised does not hold."""


def prove(source: nn.Module, inputs: Any, folder: Path, steps: int = 3, set_source: Any = None) -> Proof:
    """Prove that a model can learn task after task; leaves the saved model and its outputs in `folder` for `reload`.

    a. it converts, in evaluation and in training mode, to the same map;
    b. without a task its outputs are the source's bit for bit, in both modes, and the source is as it was;
    c. two tasks are learned; the certificate is exact, and the first task's outputs are what they were at sealing;
    d. a deep copy, and (`reload`) a saved model in another process, give the same outputs.

    Raises:
        ProofFailed: says what does not hold. Whatever conversion and learning raise comes through.
    """
    began = time.perf_counter()
    state = {name: t.clone() for name, t in source.state_dict().items()}
    source.eval()
    forward = min(_timed(lambda: _outputs(source, inputs))[0] for _ in range(2))
    traced, unit_map = _timed(lambda: map_of(source, inputs))
    model = convert(source.train(), None, inputs, config=CONFIG)
    _hold(model.training and source.training, "convert changes the mode of the model")
    gates = model.get_submodule("hat_gates")
    _hold(unit_map.entries.keys() == gates.unit_map.entries.keys(), "the map depends on the mode of the model")  # type: ignore[union-attr]
    for name, value in source.state_dict().items():
        _hold(_equal(value, state[name]), f"convert changes {name} of the source")
    for training in (True, False):
        want, got = (_outputs(m, inputs, training) for m in (copy.deepcopy(source), copy.deepcopy(model)))
        mode = "training" if training else "evaluation"
        _hold(bool(want), "its forward returns no tensor")
        _hold(_all_equal(want, got), f"without a task it is not the source, in {mode} mode: {_gap(want, got)}")
    if set_source is not None:
        gates.source = set_source  # type: ignore[assignment]

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    sealed: list[list[Tensor]] = []
    for t in range(CONFIG.num_tasks):
        with warnings.catch_warnings(), learn(model, t, optimizer, steps=steps) as learning:
            warnings.simplefilter("ignore")  # a layer of one or two units may be left without any
            model.train()
            for step in range(steps):
                optimizer.zero_grad()
                (_objective(call(model, inputs), step) + learning.penalty()).backward()
                optimizer.step()
        with active(model, t):
            sealed.append(_outputs(model, inputs))
    with active(model, 0):
        _hold(_all_equal(sealed[0], _outputs(model, inputs)), "task 0 changed while task 1 was learned")
    _hold(not _all_equal(sealed[0], sealed[1]), "both tasks give the same outputs: nothing was learned")
    certificate = certify(model, inputs)
    _hold(certificate.exact, f"the certificate is {certificate}")
    for what, other in (("deepcopy", copy.deepcopy(model)),):
        for t, want in enumerate(sealed):
            with active(other, t):
                _hold(_all_equal(want, _outputs(other, inputs)), f"{what}: task {t} gives other outputs")
    save_pretrained(model, folder)
    torch.save({"inputs": inputs, "sealed": sealed}, folder / EXPECTED)

    found = describe(model)
    copies: dict[str, int] = {}
    for e in gates.unit_map.entries.values():  # type: ignore[union-attr]
        if e.copied:
            copies[e.why] = copies.get(e.why, 0) + torch.Size(e.shape).numel()
    return Proof(
        sum(p.numel() for p in source.parameters()),
        found.units,
        gates.unit_map.known,  # type: ignore[union-attr]
        found.shares,
        copies,
        [used / max(found.units, 1) for used in found.use.values()],
        forward,
        traced,
        time.perf_counter() - began,
    )


def reload(folder: Path, make: Callable[[], nn.Module]) -> None:
    """Load what `prove` saved and compare its outputs. `make` gives the plain module where hatcl cannot make it.

    Raises:
        ProofFailed: a task gives other outputs.
    """
    expected = torch.load(folder / EXPECTED, weights_only=True)
    try:
        model = from_pretrained(folder)
    except Exception:
        model = from_pretrained(folder, base=make())
    for t, want in enumerate(expected["sealed"]):
        with active(model, t):
            got = _outputs(model, expected["inputs"])
        _hold(_all_equal(want, got), f"loaded in another process, task {t} gives other outputs: {_gap(want, got)}")


def _outputs(model: nn.Module, inputs: Any, training: bool = False) -> list[Tensor]:
    random.seed(0)
    np.random.seed(0)  # transformers masks audio with it
    torch.manual_seed(0)
    with torch.no_grad():
        return [t.detach().clone() for t in tensors_of(call(model.train(training), inputs))]


def _objective(out: Any, seed: int) -> Tensor:
    """Cross-entropy of the first floating-point output with random classes."""
    y = next(t for t in tensors_of(out) if t.is_floating_point() and t.requires_grad)
    y = y.flatten(0, -2) if y.dim() > 1 else y.unsqueeze(0)
    target = torch.randint(0, y.shape[1], (y.shape[0],), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(y.float(), target)


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    out = run()
    return time.perf_counter() - began, out


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (torch.equal(a, b) or torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))


def _all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(_equal, a, b))


def _gap(a: list[Tensor], b: list[Tensor]) -> str:
    if len(a) != len(b):
        return f"{len(b)} tensors instead of {len(a)}"
    gaps = [f"{float((x.float() - y.float()).abs().max()):.2g}" for x, y in zip(a, b, strict=True) if not _equal(x, y)]
    return f"largest differences {', '.join(gaps)}"


def _hold(so: bool, what: str) -> None:
    if not so:
        raise ProofFailed(what)
