"""The certificate: proof, for the model in hand, that a sealed task depends on nothing that is not its own (M7)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import OutputError, call, device_of, seeded, shapes, values_of
from ..errors import HATError, IsolationError, TaskError
from ..functional import same_bits
from .altered import Altered
from .digests import check_sealed
from .gates import gates_of
from .held import Held, check_structure, held, own_buffers
from .layers.gated import HATLayer
from .layers.state import copy_of
from .protection import by_degrees
from .tasks import task as active
from .tasks import tasks

log = logging.getLogger(__name__)

# Ordinary large values: a product of two of them is finite in the type.
MAGNITUDE = {torch.float16: 1e2, torch.bfloat16: 1e3}
# Values that differ in bits but not as numbers (the sign of a zero, a NaN's payload) count as the smallest difference.
SMALLEST = 5e-324
ROWS = 2  # of a batch, where what is proved on all of it is proved once more in another mode
DRAWN = 1_000_003  # a prime
RANDOM = (
    "two equal runs of its forward give different outputs ({where}), so it is random, or it keeps state where hatcl "
    "cannot see it. torch's, numpy's and Python's random numbers are seeded for the comparison; others (a generator of "
    "the model's own, the time) must be made constant in evaluation, and what is kept between forwards must be a "
    "buffer or an attribute of a module"
)


BY_CHOICE = (
    "by choice: HATConfig.protection is {protection!r}, so that later tasks move what sealed ones use. Now no task "
    "reaches another; hatcl.describe says how far they have drifted"
)


@dataclass(frozen=True)
class Certificate:
    """exact: every sealed task's outputs are bit-equal under attack. max_abs_diff: task -> largest difference seen.
    overwritten: task -> how many elements the attack overwrote (a proof that overwrote nothing proves nothing).
    modes: what it was proved in. why: what differs, where something does."""

    exact: bool
    max_abs_diff: dict[int, float] = field(default_factory=dict)
    overwritten: dict[int, int] = field(default_factory=dict)
    modes: tuple[str, ...] = ()
    why: str = ""

    def __str__(self) -> str:
        tasks = ", ".join(map(str, self.max_abs_diff)) or "none"
        if self.exact:
            least = min(self.overwritten.values(), default=0)
            modes = f", {', '.join(self.modes)}" if self.modes else ""
            return (
                f"exact: tasks {tasks} are bit-equal with everything else overwritten (at least {least:,} elements)"
                f"{modes}"
            )
        bad = {t: d for t, d in self.max_abs_diff.items() if d != 0}
        if not bad:
            return f"NOT exact: {self.why}"
        return f"NOT exact: of tasks {tasks}, these moved: {bad}{'. ' if self.why else ''}{self.why}"


@contextlib.contextmanager
def attack(
    model: nn.Module,
    task: int,
    only: set[str] | None = None,
    seed: int = 0,
    extreme: bool = False,
    frugal: Altered | None = None,
) -> Iterator[int]:
    """Overwrite in place every element that is not live for `task` with large random values; put back on leaving.

    Args:
        only: restrict the attack to these shared parameters.
        extreme: among them the largest finite values of the type, of either sign.
        frugal: keep no copy of large tensors (see `altered.py`), and alter them by this, whose owner undoes what an
            interruption leaves. What is zero becomes largest then, and among the others the proportions stay.

    Yields how many elements were overwritten.
    """
    generator, count = torch.Generator().manual_seed(seed), 0
    altered = Altered(seed) if frugal is None else frugal
    before = len(altered)

    def overwrite(x: Tensor, h: Held | None = None) -> int:
        where = None if h is None else lambda: ~h.live(task)
        if frugal is not None:
            return altered.overwrite(x, where, lambda: noise(x, generator), _magnitude(x.dtype))
        on, new = None if where is None else where(), noise(x, generator, extreme)
        altered.replace(x, new if on is None else torch.where(on, new, x.detach()))
        return x.numel() if on is None else int(on.count_nonzero())

    try:
        for h in held(model):
            shared = h.task is None and not h.plain
            if only is not None and (not shared or h.name not in only):
                continue
            if shared:
                count += overwrite(h.param, h) if h.plan is not None else 0
            elif h.task != task:
                count += overwrite(h.param)
        if only is None:
            for other in range(gates_of(model)[0].num_tasks):
                if other != task:
                    for _, b in own_buffers(model, other):
                        count += overwrite(b)
            for b in _plain_buffers(model):
                count += overwrite(b)
        yield count
    finally:
        altered.undo(before)


def noise(like: Tensor, generator: torch.Generator, extreme: bool = False) -> Tensor:
    """Large random values of a tensor's shape and type."""
    shape, dtype = like.shape, like.dtype
    if like.is_complex():
        real = torch.view_as_real(torch.empty(shape, dtype=dtype))
        return torch.view_as_complex(noise(real, generator, extreme)).to(like.device)
    if not like.is_floating_point():
        if dtype == torch.bool:
            return torch.rand(shape, generator=generator).lt(0.5).to(like.device)
        info = torch.iinfo(dtype)
        low, high = max(info.min, -(2**31)), min(info.max, 2**31 - 1)
        return torch.randint(low, high, shape, generator=generator).to(like)
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    new = _normal_numbers(like.numel(), generator, drawn).view(shape) * _magnitude(dtype)
    if extreme:  # every third, so that they meet all units whatever the width
        some = new.view(-1)[int(torch.randint(3, (), generator=generator)) :: 3]
        some.copy_(torch.copysign(torch.tensor(_largest_finite(dtype), dtype=drawn), some))
    return new.to(like)


def _normal_numbers(n: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """`[n]` normal numbers. Of more than a million the rest repeats them, at places that no width divides."""
    if n <= DRAWN:
        return torch.randn(n, generator=generator, dtype=dtype)
    return torch.randn(DRAWN, generator=generator, dtype=dtype).repeat(-(-n // DRAWN))[:n]


def _largest_finite(dtype: torch.dtype) -> float:
    # what bfloat16 autocast makes infinite is no value that a float32 model could have
    return torch.finfo(torch.bfloat16 if dtype == torch.float32 else dtype).max


def _magnitude(dtype: torch.dtype) -> float:
    """The size of an ordinary large value."""
    floating = dtype.is_floating_point
    return MAGNITUDE.get(dtype, min(1e4, _largest_finite(dtype) ** 0.5)) if floating else 1.0


def _plain_buffers(model: nn.Module) -> Iterator[Tensor]:
    """The plain model's buffers of which every task has its own."""
    for module in model.modules():
        if isinstance(module, HATLayer) and module.__dict__.get("_hat") is not None:
            own = module._hat_copied_buffers()
            yield from (b for name, b in module._buffers.items() if name in own and b is not None)


def named_outputs(model: nn.Module, inputs: Any, task: int | None, seed: int = 0) -> dict[str, Tensor]:
    """Every value that the model puts out for a task, by its path; the same each time, where random numbers are
    drawn."""
    with active(model, task), seeded(seed, device_of(model)):
        return {path: x.clone() for path, x in values_of(call(model, inputs)).items()}


def attacked_outputs(model: nn.Module, inputs: Any, task: int) -> dict[str, Tensor]:
    """The same while the model is attacked; nothing, where that makes its forward fail."""
    try:
        return named_outputs(model, inputs, task)
    except Exception as error:
        log.info("%s fails under attack: %s", type(model).__name__, error)
        return {}


def certify(model: nn.Module, inputs: Any, *, strict: bool = False) -> Certificate:
    """Prove that sealed tasks are isolated: for each, overwrite on a copy everything that is not its own, with large
    random values and with the largest that there are, and demand outputs of the same bits on `inputs`. Then, with two
    rows of them, the same with gradients enabled and under bfloat16 autocast (where the model runs so), and each task
    once more on the model itself, in two orders: what it keeps from earlier forwards must give what a copy gives that
    keeps nothing. Also checks every task's digest.

    Args:
        inputs: what the model's forward takes: a tensor, a tuple or a dict.
        strict: raise instead of returning a certificate that is not exact.

    Raises:
        IntegrityError: what was sealed is not what is there. IsolationError: not exact, under `strict`; or the forward
            gives something in which there is nothing to compare. TaskError: no task is sealed. HATError: a module was
            replaced after conversion, or the forward fails on `inputs`.
    """
    done = tasks(model)
    if not done:
        raise TaskError("certify: no task is sealed, so there is nothing to prove; learn one with hatcl.learn")
    check_structure(model)
    check_sealed(model)
    trial = copy_of(model).eval()
    for g in gates_of(trial):
        g.learning = None
    proof = _Proof(trial, done)
    try:
        few = few_rows(inputs, lambda x: named_outputs(trial, x, done[0]), model)
        modes = [_Mode("in evaluation", torch.no_grad, inputs)]
        try:
            proof.known[modes[0].name, done[0]] = proof.run(modes[0], done[0])
        except HATError:
            raise
        except Exception as error:
            raise HATError(
                f"certify: {type(model).__name__}: its forward failed on inputs = {shapes(inputs)}: "
                f"{type(error).__name__}: {error}; pass what hatcl.convert gets as example_inputs: a tensor, a tuple "
                "(positional) or a dict (keywords), without labels that the forward does not take"
            ) from error
        for mode in (_Mode("with gradients", torch.enable_grad, few), *_autocast(model, few)):
            try:
                proof.known[mode.name, done[0]] = proof.run(mode, done[0])
                modes.append(mode)
            except OutputError:
                raise
            except Exception as error:
                log.info(
                    "%s does not run %s (%s), so nothing is proved of that", type(model).__name__, mode.name, error
                )
        proof.attack(modes)
        proof.live(model, modes[0] if few is inputs else _Mode("", torch.no_grad, few))
    except OutputError as error:
        raise IsolationError(f"certify: {type(model).__name__}: {error}") from error
    exact = all(d == 0 for d in proof.diffs.values())
    if exact and by_degrees(model):
        exact, proof.why = False, BY_CHOICE.format(protection=gates_of(model)[0].config.protection)
    certificate = Certificate(exact, proof.diffs, proof.counts, tuple(m.name for m in modes), proof.why)
    if strict and not certificate.exact:
        raise IsolationError(f"certify: {certificate}")
    return certificate


@dataclass(frozen=True)
class _Mode:
    """A way to run a model: its name, in which context, on what."""

    name: str
    context: Callable[[], contextlib.AbstractContextManager[Any]]
    inputs: Any


def _autocast(model: nn.Module, inputs: Any) -> Iterator[_Mode]:
    device = device_of(model).type

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            yield

    if any(p.dtype == torch.float32 for p in model.parameters()) and not torch.is_autocast_enabled(device):
        yield _Mode("under bfloat16 autocast", context, inputs)


class _Proof:
    """The findings about each sealed task of a copy."""

    def __init__(self, trial: nn.Module, tasks: list[int]) -> None:
        self.trial, self.tasks = trial, tasks
        self.diffs: dict[int, float] = dict.fromkeys(tasks, 0.0)
        self.counts: dict[int, int] = {}
        self.known: dict[tuple[str, int], dict[str, Tensor]] = {}  # outputs by mode and task, where they are used again
        self.why = ""

    def run(self, mode: _Mode, task: int, attacked: bool = False) -> dict[str, Tensor]:
        with mode.context():
            return (attacked_outputs if attacked else named_outputs)(self.trial, mode.inputs, task)

    def attack(self, modes: list[_Mode]) -> None:
        for t in self.tasks:
            want = [self.known.pop((mode.name, t), {}) or self.run(mode, t) for mode in modes]
            with attack(self.trial, t, seed=t, extreme=True) as self.counts[t]:
                got = [self.run(mode, t, attacked=True) for mode in modes]
            self.known[modes[0].name, t] = want[0]
            for mode, a, b in zip(modes, want, got, strict=True):
                if self._note(t, a, b):
                    where = compare_outputs(a, self.run(mode, t))[1]
                    self._because(
                        RANDOM.format(where=where)
                        if where
                        else f"Other tasks reach {compare_outputs(a, b)[1]} of task {t} {mode.name}; please report the "
                        "model"
                    )

    def live(self, model: nn.Module, plain: _Mode) -> None:
        """Every task on the model itself, in two orders, compared with the copy, which keeps nothing from earlier
        forwards."""
        want = {t: self.known.get((plain.name, t)) or self.run(plain, t) for t in self.tasks}
        were = [(m, m.training) for m in model.modules()]
        try:
            for m, _ in were:
                m.training = False  # `eval()` may clear what the model keeps
            kept = [(hat.cache, dict(hat.cache)) for m, _ in were if (hat := m.__dict__.get("_hat")) is not None]
            first = sorted({hit[0][0] for _, was in kept for hit in was.values()} & set(self.tasks))
            for i, t in enumerate([*first, *reversed(self.tasks), *self.tasks]):
                if i < len(first):  # the kept values belong to these tasks; serving one replaces the others'
                    for cache, was in kept:
                        cache.update(was)
                with torch.no_grad():
                    got = named_outputs(model, plain.inputs, t)
                if self._note(t, want[t], got):
                    where = compare_outputs(want[t], got)[1]
                    self.run(plain, t)
                    spoilt = _spoilt(model, self.trial)
                    for cache, was in kept:  # it is computed again from now on
                        cache.clear()
                        was.clear()
                    self._because(
                        f"The model itself computes another {where} for task {t} than a copy of it: something wrote to "
                        f"what it keeps from earlier forwards{f' ({spoilt})' if spoilt else ''}. The model has now "
                        "recomputed it; write to parameters themselves, never to what a layer reads under a "
                        "task"
                    )
        finally:
            for m, training in were:
                m.training = training

    def _note(self, task: int, want: dict[str, Tensor], got: dict[str, Tensor]) -> bool:
        diff, _ = compare_outputs(want, got)
        self.diffs[task] = max(self.diffs[task], diff)
        return diff != 0

    def _because(self, why: str) -> None:
        self.why = self.why or why


def few_rows(inputs: Any, run: Callable[[Any], Any], what: nn.Module) -> Any:
    """The first rows of a batch; all of it, where a model does not run on them. run: how it is tried."""
    rows = next((x.shape[0] for x in _input_tensors(inputs) if x.dim()), 0)

    def cut(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x[:ROWS] if x.dim() and x.shape[0] == rows else x
        if isinstance(x, Mapping):
            return {k: cut(v) for k, v in x.items()}
        return type(x)(map(cut, x)) if type(x) in (list, tuple) else x

    if rows <= ROWS:
        return inputs
    few = cut(inputs)
    try:
        with torch.no_grad():
            run(few)
    except OutputError:
        raise
    except Exception as error:
        log.info("%s does not run on %d rows (%s)", type(what).__name__, ROWS, error)
        return inputs
    return few


def _input_tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple, Mapping)):
        for part in x.values() if isinstance(x, Mapping) else x:
            yield from _input_tensors(part)


def _spoilt(model: nn.Module, fresh: nn.Module) -> str:
    """Which values that layers keep for a sealed task are not what a fresh copy keeps."""
    names = []
    for (path, m), other in zip(model.named_modules(), fresh.modules(), strict=True):
        kept, right = (x.__dict__["_hat"].cache if "_hat" in x.__dict__ else {} for x in (m, other))
        names += [
            f"{path}.{n}" for n, hit in kept.items()
            if n in right and right[n][0][0] == hit[0][0] and not same_bits(hit[1], right[n][1])
        ]  # fmt: skip
    return ", ".join(names[:5])


def compare_outputs(want: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference between two outputs, and where they differ first: 0.0 and "" where every bit is the
    same."""
    if want.keys() != got.keys():
        odd = next(iter([*(want.keys() - got.keys()), *(got.keys() - want.keys())]))
        return float("inf"), f"{odd} ({len(got)} values instead of {len(want)})"
    diffs = {path: largest_gap(x, got[path]) for path, x in want.items()}
    return max(diffs.values(), default=0.0), next((path for path, d in diffs.items() if d != 0), "")


def largest_gap(a: Tensor, b: Tensor) -> float:
    """The largest difference; 0.0 only where the two are the same bit for bit, the sign of zeros and NaN included."""
    if same_bits(a, b):
        return 0.0
    if a.dtype != b.dtype or a.shape != b.shape or not (a.is_floating_point() or a.is_complex()):
        return float("inf")
    known = ~(a.isnan() & b.isnan())
    gaps = (a[known].to(_wide(a)) - b[known].to(_wide(b))).abs().nan_to_num(torch.inf, posinf=torch.inf)
    return max(float(gaps.max()) if gaps.numel() else 0.0, SMALLEST)


def _wide(x: Tensor) -> torch.dtype:
    return torch.complex128 if x.is_complex() else torch.float64
