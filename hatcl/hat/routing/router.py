"""The router: it predicts the task of an input from statistics of the sealed tasks' features, without stored
examples."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...calls import Batches, tensor_of
from ...config import number
from ...errors import ConfigError, HATError, IntegrityError, TaskError
from ...files import parse_json, write_files
from ...functional import content_digest
from ...lend import Evaluating
from ...vectors.files import read_metadata
from ...vectors.tensors import named_tensors
from ..features import Features, features_and_outputs
from ..gates import gates_of
from ..tasks import check_task, task
from .known import Gathered, KnownTask, RouterOptions, changed_digest, labelled, rows_of, sealed_digests
from .ridge import Sums, lifted, ridge

log = logging.getLogger(__name__)
ROUTER_ENTRY = "hatcl.router"  # key of the file's metadata
FORMAT = 1
FUNCTION = "a function"  # stands for a function in the file
OF_TASK = ("labels", "counts", "dtype", "digests")  # a task's entries in addition to its tensors
TEMPERATURES = tuple(2 ** (k / 2) for k in range(17))  # `calibrate` tries these


@dataclass(eq=False)
class TaskRouter:
    """Predicts which sealed task an input belongs to:

        router = hatcl.TaskRouter(model)
        for t, loader in enumerate(loaders):
            ...  # learn and seal task t
            router.add_task(t, loader)
        hatcl.predict(model, x, router=router)

    A sealed task's features never change, so statistics of them stay valid. Each task a has a *space*: random features
    of its head's input. There a ridge classifier distinguishes the classes of task a and of all tasks added after it:

        phi_a(x) = [relu(h_a(x) P_a), 1]                h_a: the head's input under task a; P_a normal, by the seed
        S_ab = sum phi_a phi_a^T,  C_ab = sum phi_a onehot(y)^T                       over the examples of task b
        W_a = (sum_{b >= a} S_ab + lambda n I)^-1 [C_aa | C_a,a+1 | ...]              see `ridge`
        l_a(b|x) = logsumexp_{c in b} tau W_a^T phi_a(x) - logsumexp_c tau W_a^T phi_a(x)
        r_ab(x) = mean over spaces s <= min(a, b) of l_s(b|x) - l_s(a|x)
        P(t|x) = softmax_t(mean_a r_at)

    (random features with a ridge classifier: RanPAC, arXiv 2307.02251, which uses one pretrained model; the evidence
    over several tasks' spaces is this project's own). `<=` is the order in which tasks were added. A space has no
    statistics of earlier tasks, because their examples are gone when it is created. So a task that is learned again
    comes last in the order, and tasks added in between are not compared in its space.

    All statistics are per task. A router over some of its tasks, after `remove_task` or with `among=`, is bit-equal to
    a router to which only these were added, in the same order.

    Args:
        model: the HAT model. Only `add_task` evaluates it; `predict` gets the model as an argument.
        options: see `RouterOptions`, or a mapping of options to change.
        features: other features than the head's input, see `hatcl.hat.features`.
        logits: for models whose output is not logits: called with a task, inputs and the model's output, gives
            `[B, C]`. One column means that the task has no classes: the router finds the task, and its label is 0.
        prepare: called with a task and inputs, gives the inputs of this task's network. For tasks that were learned
            with different preprocessing (each with its own mean and standard deviation). None = inputs unchanged.
    """

    model: nn.Module = field(repr=False)
    options: RouterOptions = field(default_factory=RouterOptions)
    features: Features = None
    prepare: Callable[[int, Any], Any] | None = None
    logits: Callable[[int, Any, Any], Tensor] | None = None
    _known: dict[int, KnownTask] = field(default_factory=dict, init=False, repr=False)
    _weights: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)
    _checked: weakref.WeakKeyDictionary[Any, Any] = field(
        default_factory=weakref.WeakKeyDictionary, init=False, repr=False
    )

    def __post_init__(self) -> None:
        gates_of(self.model)
        self.options = RouterOptions().changed(self.options)

    # ---- tasks ---------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[int]:
        """The tasks in the router, in the order in which they were added."""
        return list(self._known)

    @property
    def bytes(self) -> int:
        """The size of its statistics."""
        every = [x for known in self._known.values() for x in known.tensors().values()]
        return sum(x.numel() * x.element_size() for x in every)

    def __str__(self) -> str:
        lines = [f"{len(self._known)} tasks, {self.bytes / 2**20:.1f} MiB of statistics"]
        for t, known in self._known.items():
            here = [b for b, other in self._known.items() if t in other.sums]
            lines.append(
                f"task {t}: {known.examples} examples of {len(known.labels)} classes; its space tells apart {here}"
            )
        return "\n".join(lines)

    def add_task(self, task: int, x: Any, y: Tensor | None = None, *, batch_size: int = 256) -> None:
        """Compute the statistics of a sealed task's examples, in its own space and in those of all tasks in the router.

        They are sums in float64 on the CPU. Other batches or another order give the same sums up to rounding: 1e-13 of
        the largest if the model gives the same features (in float32, another batch size changes these by 1e-7).

        Args:
            x, y: inputs and labels `[B]`; or x alone: batches of (inputs, labels), such as a DataLoader. Inputs: a
                tensor, a tuple or a mapping of which every tensor has a row per example.
            batch_size: number of rows evaluated at once if y is given.

        Raises:
            TaskError: the task is not sealed, is already in the router, or has examples of fewer than two classes.
            ConfigError: examples or labels that do not fit. The router is then unchanged.
        """
        model = self.model
        new = check_task(model, task, sealed=True)
        old = self._known.get(new)
        now = sealed_digests(model, new)
        if old is not None and changed_digest(old.digests, now) is None:
            raise TaskError(
                f"add_task: task {new} is in the router already, with {old.examples} examples; call "
                f"remove_task({new}) first, and add all of its examples at once"
            )
        others = [a for a in self._known if a != new]
        self.check(model, others)
        batches = rows_of(f"task {new}", x, y, batch_size) if y is not None else labelled(f"task {new}", x)
        gathered = Gathered(self.options, new, {a: self._known[a].p for a in others})
        for inputs, labels in batches:
            gathered.add(labels, {a: self.seen(model, inputs, a, len(labels)) for a in [new, *others]})
        known = gathered.known(now)
        if old is not None:
            log.info("task %d was sealed again: its statistics are computed again, and it comes last in the order", new)
            self.remove_task(new)
        self._known[new] = known
        self._weights.clear()

    def remove_task(self, task: int) -> None:
        """Drop a task's statistics and its space. The result is bit-equal to a router to which the task was never
        added. `hatcl.forget_task` erases the task from the model.

        Raises:
            TaskError: the task is not in the router.
        """
        self.chosen([task])
        del self._known[task]
        for known in self._known.values():
            known.sums.pop(task, None)
        self._weights.clear()

    def check(self, model: nn.Module, chosen: Sequence[int]) -> None:
        """Check that these tasks have not changed since they were added.

        Raises:
            TaskError: one is not in the router, is not sealed, or was sealed again since.
        """
        gates = gates_of(model)[0]
        for t in chosen:
            if t >= len(gates.sealed) or not bool(gates.sealed[t]):
                raise TaskError(
                    f"task {t} is in the router and not sealed in the model: it was forgotten, is learned again, or "
                    f"this is another model; router.remove_task({t}) takes it out exactly, among= leaves it out"
                )
        seen, epoch = self._checked.get(gates, (set(), None))
        seen = set() if epoch != gates.epoch else seen
        for t in [t for t in chosen if t not in seen]:
            now, was = sealed_digests(model, t), self._known[t].digests
            changed = changed_digest(was, now)
            if changed is not None:
                raise TaskError(
                    f"task {t} is not what it was when it was added to the router ({changed} is another one): it was "
                    f"learned again, or this is another model. Its statistics are void; router.add_task({t}, ...) "
                    f"computes them again, router.remove_task({t}) takes it out"
                )
            seen.add(t)
        self._checked[gates] = seen, gates.epoch

    def chosen(self, some: Sequence[int] | None) -> list[int]:
        """Some of the tasks in the router, in its order.

        Raises:
            TaskError: one is not in it, is named twice, or there are none.
        """
        if not self._known:
            raise TaskError("the router has no tasks yet; call router.add_task for each sealed task")
        if some is None:
            return self.tasks
        wanted = [int(t) for t in some]
        for t in wanted:
            if t not in self._known:
                raise TaskError(
                    f"task {t} is not in the router, which has {self.tasks}; call router.add_task({t}, ...)"
                )
        if not wanted or len(set(wanted)) != len(wanted):
            raise TaskError(f"among: got {wanted}, expected different tasks of {self.tasks}, at least one")
        return [t for t in self._known if t in wanted]

    # ---- evidence ------------------------------------------------------------------------------------------------

    def seen(self, model: nn.Module, inputs: Any, space: int, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """The checked features and logits of some inputs under a task, in evaluation mode and without gradients.

        Raises:
            ConfigError: the inputs do not fit the model, or its features or logits do not fit the router.

        Warns:
            UserWarning: the model computes in another dtype than when the task was added.
        """
        with Evaluating(model), task(model, space), torch.no_grad():
            try:
                taken = inputs if self.prepare is None else self.prepare(space, inputs)
                h, out = features_and_outputs(model, taken, self.features)
            except HATError:
                raise
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
                raise ConfigError(
                    f"task {space}: the model does not take these inputs ({type(error).__name__}: {error}); give them "
                    "as its forward takes them: a tensor, a tuple, or a mapping of keywords"
                ) from error
        z = tensor_of(out) if self.logits is None else self.logits(space, taken, out)
        rows = len(z) if rows is None else rows
        if z.dim() != 2 or len(z) != rows or len(h) != rows:
            raise ConfigError(
                f"task {space}: for {rows} examples the model gives features {list(h.shape)} and logits "
                f"{list(z.shape)}, expected {[rows, 'F']} and {[rows, 'C']}: one answer per example"
            )
        known = self._known.get(space)
        if known is not None and h.shape[1] != len(known.p):
            raise ConfigError(f"task {space}: got {h.shape[1]} features, the router was made with {len(known.p)}")
        if known is not None and known.dtype != str(h.dtype):
            warnings.warn(
                f"task {space}: its features are {h.dtype} now and were {known.dtype} when it was added to the router: "
                "they are rounded differently from its statistics; add the tasks again where it matters",
                stacklevel=3,
            )
        if not bool(torch.isfinite(h).all()):
            raise ConfigError(f"task {space}: its features of these inputs are not finite; are the inputs finite?")
        return h, z

    def probabilities(self, features: Mapping[int, Tensor], among: Sequence[int] | None = None) -> Tensor:
        """`P(t|x)`, `[B, T]` float64 on the CPU, a column for each chosen task in the router's order.

        Args:
            features: `h_t(x)`, `[B, F]`, for each chosen task t. among: the possible tasks; None = all.
        """
        chosen = self.chosen(among)
        spaces = [lifted(features[a], self._known[a].p) @ self._solved(chosen[i:]) for i, a in enumerate(chosen)]
        counts = [len(self._known[t].labels) for t in chosen]
        total = torch.zeros(len(spaces[0]), len(chosen), dtype=torch.float64)
        evidence = torch.zeros_like(total)
        for s, said in enumerate(spaces):
            parts = (self.options.temperature * said).split(counts[s:], 1)
            total[:, s:] += torch.stack([part.logsumexp(1) for part in parts], 1)  # without terms common to all tasks
            # compare task s with all later tasks over the spaces up to s: r_sb for b >= s, and r_bs = -r_sb
            against = (total[:, s:] - total[:, s : s + 1]) / (s + 1)
            evidence[:, s:] += against
            evidence[:, s] -= against.sum(1)
        return (evidence / len(chosen)).softmax(1)

    def calibrate(self, model: nn.Module, batches: Batches, *, keep: float = 0.95) -> RouterOptions:
        """Choose temperature and threshold on examples that were not learned, and set these options. The temperature
        maximises the mean log P of the right task; the threshold then rejects a share of 1 - `keep` of these examples.
        The choice holds for the tasks that are in the router now.

        Args:
            batches: batches of (inputs, tasks `[B]`). keep: share of the examples that is not rejected.

        Raises:
            ConfigError: tasks that do not fit the inputs. TaskError: as `check`.
        """
        number("keep", keep, 0, 1, without="low", what="a share")
        self.check(model, self.chosen(None))
        features: dict[int, list[Tensor]] = {t: [] for t in self._known}
        right: list[Tensor] = []
        for inputs, of in labelled("calibrate", batches):
            self.chosen(of.unique().tolist())
            right.append(torch.tensor([self.tasks.index(t) for t in of.tolist()]))
            for t, parts in features.items():
                parts.append(self.seen(model, inputs, t, len(of))[0].cpu())
        known = {t: torch.cat(parts) for t, parts in features.items()}
        before, best, at = self.options, -torch.inf, torch.cat(right).unsqueeze(1)
        try:
            for temperature in TEMPERATURES:
                self.options = dataclasses.replace(before, temperature=temperature)
                p = self.probabilities(known)
                likely = float(p.gather(1, at).clamp(min=1e-300).log().mean())
                if likely > best:
                    best, threshold = likely, float(p.max(1).values.quantile(1 - keep))
                    chosen = dataclasses.replace(before, temperature=temperature, threshold=threshold)
            before = chosen
        finally:
            self.options = before
        return self.options

    def at_first_sight(self, features: Tensor, among: Sequence[int] | None = None) -> Tensor:
        """`softmax_t l_a(t|x)`, `[B, T]` float64 on the CPU, where a is the first of the chosen tasks in the router's
        order. All have statistics in its space, so one forward distinguishes them.

        Args:
            features: `h_a(x)`, `[B, F]`. among: the possible tasks; None = all.
        """
        chosen = self.chosen(among)
        said = self.options.temperature * lifted(features, self._known[chosen[0]].p) @ self._solved(chosen)
        parts = said.split([len(self._known[t].labels) for t in chosen], 1)
        return torch.stack([part.logsumexp(1) for part in parts], 1).softmax(1)

    def _solved(self, chosen: Sequence[int]) -> Tensor:
        """W in the space of the first chosen task, `[M + 1, classes of all chosen tasks]`."""
        key = tuple(chosen)
        if key not in self._weights:
            every = [self._known[b] for b in chosen]
            self._weights[key] = ridge([known.sums[key[0]] for known in every], sum(known.examples for known in every))
        return self._weights[key]

    # ---- the file ------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the router as one `.safetensors` file; `load` reads it back, bit for bit.

        Raises:
            ConfigError: another file extension. IntegrityError: the disk is full or not writable.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ConfigError(f"{path}: got {path.suffix or 'no ending'}, expected a file that ends in .safetensors")
        tensors = {f"{t}.{n}": x for t, known in self._known.items() for n, x in known.tensors().items()}
        tensors = {name: x.contiguous().clone() for name, x in tensors.items()}
        about = {
            "format": FORMAT, "options": dataclasses.asdict(self.options),
            "features": FUNCTION if callable(self.features) else self.features,
            "prepare": None if self.prepare is None else FUNCTION,
            "logits": None if self.logits is None else FUNCTION,
            "tasks": [
                {"task": t, "spaces": list(known.sums), **{name: getattr(known, name) for name in OF_TASK}}
                for t, known in self._known.items()
            ],
        }  # fmt: skip
        text = json.dumps({**about, "digest": _digest_of_all(tensors, about)})
        write_files({path: lambda new: save_file(tensors, new, metadata={ROUTER_ENTRY: text})})
        return path

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        features: Features = None,
        prepare: Callable[[int, Any], Any] | None = None,
        logits: Callable[[int, Any, Any], Tensor] | None = None,
    ) -> TaskRouter:
        """The router that `save` wrote.

        Args:
            model: the router's model. features, prepare, logits: the functions that the router was made with, if any.

        Raises:
            IntegrityError: the file is missing, damaged or no router. ConfigError: functions that it was made with are
                missing, or others are given.
        """
        stored, text = named_tensors(path), read_metadata(path).get(ROUTER_ENTRY)
        if text is None:
            raise IntegrityError(f"{path}: is no router; expected a file that TaskRouter.save wrote")
        about: dict[str, Any] = parse_json(text, path)
        tensors = {name: stored[name].clone() for name in stored}  # tensors of a file are memory-mapped
        digest = about.pop("digest", None)
        if about.get("format") != FORMAT or _digest_of_all(tensors, about) != digest:
            raise IntegrityError(f"{path}: its content is not what was saved; the file is damaged, save it again")
        for name, given in (("features", features), ("prepare", prepare), ("logits", logits)):
            made_with = about.get(name)  # an older file, from before logits=, has no such entry
            if (made_with == FUNCTION) != callable(given) or (given is not None and not callable(given)):
                raise ConfigError(
                    f"{path}: the router was made with {name}={made_with!r}, got {given!r}; give the same function, "
                    "and nothing where it was none"
                )
        router = cls(model, RouterOptions().changed(about["options"]), features or about["features"], prepare, logits)
        for told in about["tasks"]:
            t = told["task"]
            sums = {
                space: Sums(
                    tensors[f"{t}.{space}.gram"], tensors[f"{t}.{space}.classes"], tensors.get(f"{t}.{space}.low")
                )
                for space in told["spaces"]
            }
            router._known[t] = KnownTask(p=tensors[f"{t}.p"], sums=sums, **{name: told[name] for name in OF_TASK})
        return router


def _digest_of_all(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    text = content_digest(tensors) + json.dumps(about, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
