"""The proof that `hatcl zoo` runs on one model, from conversion to loading in another process."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import random
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calls import call, tensors_of, values_of
from ..config import HATConfig
from ..hat.certify import certify, largest_gap
from ..hat.convert import convert, map_of
from ..hat.describe import describe
from ..hat.extraction.extract import ExtractReport, extract_task
from ..hat.gates import gates_of
from ..hat.learn import learn
from ..hat.saving.pretrained import from_pretrained, read_config, save_pretrained
from ..hat.tasks import task as active

# about half of each task's units are off and stay off: a few steps do not change the sign of an embedding of 6
PROOF_CONFIG = HATConfig(num_tasks=2, init="sparse", init_density=0.5, init_value=6.0, penalty_weight=0.0)
EXPECTED = "expected.pt"
MASK_SUFFIX = "attention_mask"


@dataclasses.dataclass(frozen=True)
class Proof:
    """Figures of a model that passed.

    Attributes:
        known: share of the parameters' elements whose owner and reader are known (`UnitMap.known`). unknown: for the
            others, reason -> share. notes: what the trace could not follow, each text once.
        shares: as in `hatcl.Description`. use: share of the units that each task uses.
        extracted: mean share of the elements that the extracted tasks keep. difference: their largest difference from
            the model, relative to the largest output. full: the number of modules in them that keep units at full
            width.
        forward_seconds, trace_seconds, seconds: times of one plain forward, of the trace, and of the whole proof.
    """

    parameters: int
    units: int
    known: float
    unknown: dict[str, float]
    notes: list[str]
    shares: dict[str, float]
    use: list[float]
    extracted: float
    difference: float
    full: int
    forward_seconds: float
    trace_seconds: float
    seconds: float


class ProofFailed(AssertionError):
    """A model converts, but something promised does not hold."""


def prove(source: nn.Module, inputs: Any, folder: Path, recipe: dict[str, Any] | None = None, steps: int = 3) -> Proof:
    """Prove that a model can learn task after task; leaves the saved model and its outputs in `folder` for `reload`.

    a. It converts, in evaluation and in training mode, to the same map, and stays unchanged.
    b. Without a task the outputs are the source's bit for bit, in both modes.
    c. It learns two tasks; the certificate is exact, and the first task's outputs are the same as at sealing.
    d. A deep copy and (in `reload`) the saved model in another process give the same outputs.
    g. Each task is extracted as a smaller module without hatcl, which agrees with the model.

    For inputs with padding masks, all of this must also hold without the masks: attention then uses other kernels, in
    which the heads of grouped keys stay grouped.

    Args:
        source: the plain model; the proof changes it. recipe: how `hatcl.from_pretrained` makes it again.

    Raises:
        ProofFailed: says what does not hold. Errors of conversion and learning are passed on.
    """
    began = time.perf_counter()
    before = _model_digest(source)
    source.eval()
    forms = [inputs, *_without_masks(inputs)]
    forward = min(_timed(_outputs, source, [inputs])[0] for _ in range(2))
    traced, unit_map = _timed(map_of, source, inputs)
    model = convert(source.train(), None, inputs, config=PROOF_CONFIG)
    _hold(model.training and source.training, "convert changes the mode of the model")
    _hold(_model_digest(source) == before, "convert changes the source")
    gates = gates_of(model)[0]
    assert gates.unit_map is not None
    maps = [{n: [f.to_json() for f in e.factors] for n, e in m.entries.items()} for m in (unit_map, gates.unit_map)]
    _hold(maps[0] == maps[1], "the map depends on the mode of the model")
    for training in (True, False):
        want, got = _outputs(source, forms, training), _outputs(model, forms, training)
        mode = "training" if training else "evaluation"
        _hold(_all_equal(want, got), f"without a task it is not the source, in {mode} mode: {_gap(want, got)}")
    for form in forms[1:]:
        convert(source, None, form, config=PROOF_CONFIG)
    del source, unit_map
    if recipe is not None:
        gates.source = recipe

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    sealed: list[list[Tensor]] = []
    for t in range(PROOF_CONFIG.num_tasks):
        with warnings.catch_warnings(), learn(model, t, optimizer, steps=steps) as learning:
            warnings.simplefilter("ignore")  # a layer of one or two units may be left without any
            model.train()
            for step in range(steps):
                optimizer.zero_grad()
                (_objective(call(model, inputs), step) + learning.penalty()).backward()
                optimizer.step()
        with active(model, t):
            sealed.append(_outputs(model, forms))
    optimizer.zero_grad()
    del optimizer
    with active(model, 0):
        _hold(_all_equal(sealed[0], _outputs(model, forms)), "task 0 changed while task 1 was learned")
    _hold(not _all_equal(*sealed), "both tasks give the same outputs: nothing was learned")
    for form in forms:
        certificate = certify(model, form)
        _hold(certificate.exact, f"the certificate is {certificate}")
    other = copy.deepcopy(model)
    for t, want in enumerate(sealed):
        with active(other, t):
            _hold(_all_equal(want, _outputs(other, forms)), f"a deep copy gives other outputs for task {t}")
    del other
    small = [_cut_out(model, t, inputs) for t in range(PROOF_CONFIG.num_tasks)]
    save_pretrained(model, folder)
    torch.save({"forms": forms, "sealed": sealed}, folder / EXPECTED)

    found = describe(model)
    entries = gates.unit_map.entries.values()
    total = sum(math.prod(e.shape) for e in entries)
    unknown: dict[str, float] = {}
    for e in entries:
        if e.known < 1:
            why = e.why if e.unexplained else "one end is not known"
            unknown[why] = unknown.get(why, 0.0) + (1 - e.known) * math.prod(e.shape) / total
    return Proof(
        total, found.units, gates.unit_map.known, unknown, list(dict.fromkeys(found.notes.values())), found.shares,
        [used / max(found.units, 1) for used in found.use.values()],
        sum(r.kept for r in small) / max(sum(r.total for r in small), 1), max(r.difference for r in small),
        max(len(r.full) for r in small), forward, traced, time.perf_counter() - began,
    )  # fmt: skip


def reload(folder: Path, make: Callable[[], nn.Module]) -> None:
    """Load what `prove` saved and compare its outputs. `make` returns the plain module if hatcl cannot make it itself.

    Raises:
        ProofFailed: a task gives different outputs.
    """
    expected = torch.load(folder / EXPECTED, weights_only=True)
    alone = read_config(folder)["source"] is not None
    model = from_pretrained(folder, base=None if alone else make())
    for t, want in enumerate(expected["sealed"]):
        with active(model, t):
            got = _outputs(model, expected["forms"])
        _hold(_all_equal(want, got), f"loaded in another process, task {t} gives other outputs: {_gap(want, got)}")


def _cut_out(model: nn.Module, task: int, inputs: Any) -> ExtractReport:
    """Extract a task as a smaller module. `extract_task` itself checks that it agrees with the model."""
    found = extract_task(model, task, inputs)
    theirs = [p for p, m in found.model.named_modules() if type(m).__module__.split(".")[0] == "hatcl"]
    _hold(not theirs, f"cut out, task {task} has something of hatcl in it: {theirs[:3]}")
    return found.report


def _without_masks(inputs: Any) -> list[dict[str, Any]]:
    """The inputs of a text model without their padding masks; empty if they have none."""
    bare = (
        {name: x for name, x in inputs.items() if not name.endswith(MASK_SUFFIX)} if isinstance(inputs, Mapping) else {}
    )
    return [bare] if bare and len(bare) < len(inputs) else []


def _model_digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _outputs(model: nn.Module, forms: list[Any], training: bool = False) -> list[Tensor]:
    """Every value that the model outputs for each of its inputs."""
    found = []
    for form in forms:
        random.seed(0)
        np.random.seed(0)  # transformers draws its audio masks from it
        torch.manual_seed(0)
        with torch.no_grad():
            found += [t.clone() for t in values_of(call(model.train(training), form)).values()]
    return found


def _objective(out: Any, seed: int) -> Tensor:
    """Cross-entropy between the first floating-point output and random classes."""
    y = next(t for t in tensors_of(out) if t.is_floating_point() and t.requires_grad)
    y = y.flatten(0, -2) if y.dim() > 1 else y.unsqueeze(0)
    target = torch.randint(0, y.shape[1], (y.shape[0],), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(y.float(), target)


def _timed(run: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """The seconds of CPU time that a run takes in this thread, which a busy machine does not change, and its value."""
    began = time.thread_time()
    out = run(*args)
    return time.thread_time() - began, out


def _equal(a: Tensor, b: Tensor) -> bool:
    return largest_gap(a, b) == 0


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
