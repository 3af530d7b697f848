"""The loop that all procedures share: learn coefficients, measure after every epoch, keep the best."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
import os
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor, nn

from ..calls import Batches, again
from ..engine.folder import random_state, set_random_state
from ..errors import ConfigError, IntegrityError, NonFiniteLossError, VectorError
from ..files import write_files
from ..lend import Evaluating
from .linear import Composed
from .options import AtlasOptions
from .regularisers import penalty

FORMAT = "hatcl.atlas.fit"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Select = Callable[[], Mapping[str, float]]
Path_ = Union[str, "os.PathLike[str]"]


@dataclass
class Fitted:
    """What was learned. The composer holds the coefficients already.

    Attributes:
        coefficients: the best ones, `[T, G]`. others: what was learned beside them, by name.
        epoch: after which they were reached; 0 = the start, -1 = all zero, the pretrained model.
        score: theirs, by which they were chosen; NaN where nothing was measured and the last ones are kept.
        pretrained, start: what was measured with all coefficients zero, and at the start.
        history: what was measured after each epoch, with its mean `loss`.
    """

    coefficients: Tensor
    others: dict[str, Tensor] = field(default_factory=dict)
    epoch: int = -1
    score: float = math.nan
    pretrained: dict[str, float] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def fit(
    composer: Composed,
    loss_of_step: Callable[[Any], Tensor],
    batches: Batches | Callable[[int], Batches],
    *,
    select: Select | None = None,
    options: AtlasOptions | None = None,
    warm_start: Tensor | None = None,
    others: Mapping[str, tuple[nn.Parameter, float]] | None = None,
    checkpoint: Path_ | None = None,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> Fitted:
    """Learn a composer's coefficients with AdamW and leave the best in it.

    The model is in evaluation mode throughout: no dropout, batch norms with their running statistics. (The published
    release trains in training mode; its CLIP encoders have neither.)

    Args:
        loss_of_step: a batch -> its mean loss.
        batches: passed over once per epoch, or a function of the epoch that gives them.
        select: measures the composer as it is; more `score` is better, `-inf` never kept. Asked for the pretrained
            model (all coefficients zero), the start, and after every epoch, so that what is kept is at least as good as
            both. None keeps the last coefficients.
        warm_start: where to start, `[T]`, `[T, 1]` or `[T, G]`; None = the coefficients as they are.
        others: parameters to learn beside the coefficients, with their learning rates; not decayed.
        checkpoint: a file, replaced in one go after every epoch. If it is there, learning goes on from it and ends with
            the same bits as without the interruption.
        progress: told each epoch's entry of the history.

    Raises:
        ConfigError: batches that cannot be passed over again, or a checkpoint of other options.
        VectorError: a start of another shape or not finite. IntegrityError: a checkpoint that cannot be read.
        NonFiniteLossError: a loss or gradient that is not finite. The composer is then as it was before.
    """
    options = options or AtlasOptions()
    make = batches if callable(batches) else _same(again(batches, "batches"))
    generators = [] if callable(batches) else _generators(batches)
    start = spread(composer, composer.coefficients.detach() if warm_start is None else warm_start)
    run = _Run(composer, options, dict(others or {}), generators, None if checkpoint is None else Path(checkpoint))
    saved = run.load()
    with run.undone_on_error():
        if saved is None:
            run.begin(start, select)
        else:
            run.restore(saved)
        while run.epoch < options.epochs:
            mean = run.pass_over(loss_of_step, make(run.epoch))
            run.measure(select, mean)
            run.save()
            if progress is not None:
                progress(run.fitted.history[-1])
        run.finish()
    return run.fitted


def spread(composer: Composed, coefficients: Tensor) -> Tensor:
    """Coefficients per vector, `[T]` or `[T, 1]` (an isotropic composition's), as the composer's own `[T, G]`: the
    same model at a finer grain. Those of its own shape are copied.

    Raises:
        VectorError: another shape, or numbers that are not finite.
    """
    t, g = composer.coefficients.shape
    c = coefficients.detach().to(composer.coefficients)
    if c.shape == (t,):
        c = c[:, None]
    if c.shape not in ((t, 1), (t, g)):
        raise VectorError(
            f"coefficients of shape {list(coefficients.shape)}; expected {[t, g]} ({t} vectors, {g} groups of the "
            f"grain {composer.grain.name}), or one per vector, {[t]}. Use refine() for another grain's"
        )
    if not bool(torch.isfinite(c).all()):
        raise VectorError(f"coefficients: {int((~torch.isfinite(c)).sum())} of {c.numel()} are NaN or infinite")
    return c.expand(t, g).clone()


class _Run:
    """One call of `fit`."""

    def __init__(
        self,
        composer: Composed,
        options: AtlasOptions,
        others: dict[str, tuple[nn.Parameter, float]],
        generators: list[torch.Generator],
        path: Path | None,
    ) -> None:
        self.composer, self.options, self.generators, self.path = composer, options, generators, path
        self.others = {name: p for name, (p, _) in others.items()}
        self.device = composer.coefficients.device
        groups: list[dict[str, Any]] = [
            {"params": [composer.coefficients], "lr": options.lr, "weight_decay": options.weight_decay}
        ]
        groups += [{"params": [p], "lr": lr, "weight_decay": 0.0} for p, lr in others.values()]
        self.rates = [g["lr"] for g in groups]
        self.optimizer = torch.optim.AdamW(groups)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        self.epoch = 0
        self.fitted = Fitted(composer.coefficients.detach().clone())

    # ---- what is learned ---------------------------------------------------------------------------------------

    def values(self) -> tuple[Tensor, dict[str, Tensor]]:
        return self.composer.coefficients.detach().clone(), {n: p.detach().clone() for n, p in self.others.items()}

    @torch.no_grad()
    def put(self, coefficients: Tensor, others: Mapping[str, Tensor]) -> None:
        self.composer.coefficients.copy_(coefficients)
        for name, value in others.items():
            self.others[name].copy_(value)

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Evaluation mode and own random numbers inside; on an error everything is as it was before."""
        before, state = self.values(), random_state(self.device)
        parameters = [self.composer.coefficients, *self.others.values()]
        grads = [p.grad for p in parameters]
        try:
            with Evaluating(self.composer):
                yield
        except BaseException:
            self.put(*before)
            raise
        finally:
            for p, grad in zip(parameters, grads, strict=True):
                p.grad = grad
            set_random_state(state, self.device)

    def begin(self, start: Tensor, select: Select | None) -> None:
        torch.manual_seed(self.options.seed)
        _seed_others(self.options.seed)
        if select is not None:
            self.put(torch.zeros_like(start), {})
            self.fitted.pretrained = self.score(select, -1)
        self.put(start, {})
        if select is not None:
            self.fitted.start = self.score(select, 0) if bool(start.any()) else dict(self.fitted.pretrained)

    def measure(self, select: Select | None, loss: float) -> None:
        self.epoch += 1
        self.fitted.history.append({"epoch": float(self.epoch), "loss": loss})
        if select is not None:
            self.fitted.history[-1] |= self.score(select, self.epoch)
        else:
            self.keep(self.epoch, math.nan)

    def score(self, select: Select, epoch: int) -> dict[str, float]:
        said = {k: float(v) for k, v in select().items()}
        if "score" not in said or math.isnan(said["score"]):
            raise ConfigError(f"select: gave {said}, expected a mapping with a number called score")
        if said["score"] > (-math.inf if math.isnan(self.fitted.score) else self.fitted.score):
            self.keep(epoch, said["score"])
        return said

    def keep(self, epoch: int, score: float) -> None:
        self.fitted.coefficients, self.fitted.others = self.values()
        self.fitted.epoch, self.fitted.score = epoch, score

    def finish(self) -> None:
        if self.fitted.epoch == -1 and math.isnan(self.fitted.score) and self.fitted.history:
            raise ConfigError(
                "select: gave -inf for every coefficients tried, the pretrained model's included; nothing can be kept"
            )
        self.put(self.fitted.coefficients, self.fitted.others)

    # ---- an epoch ----------------------------------------------------------------------------------------------

    def pass_over(self, loss_of_step: Callable[[Any], Tensor], batches: Batches) -> float:
        """One epoch of steps. Returns the mean loss."""
        size = _len(batches)
        steps = None if size is None else max(1, -(-size // self.options.accumulate))
        iterator, losses = iter(batches), []
        for step in itertools.count():
            group = list(itertools.islice(iterator, self.options.accumulate))
            if not group:
                break
            part = 0.0 if steps is None else min(step / steps, 1.0)
            self.rate((self.epoch + part) / self.options.epochs)
            losses.append(self.step(loss_of_step, group, f"epoch {self.epoch + 1}, step {step + 1}"))
        if not losses:
            raise ConfigError(f"batches: none in epoch {self.epoch + 1}; expected at least one")
        return math.fsum(losses) / len(losses)

    def rate(self, share: float) -> None:
        factor = 0.5 * (1 + math.cos(math.pi * share)) if self.options.schedule == "cosine" else 1.0
        for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr * factor

    def step(self, loss_of_step: Callable[[Any], Tensor], group: list[Any], where: str) -> float:
        options, composer = self.options, self.composer
        weights = [float(_examples(b)) for b in group]
        parameters = [composer.coefficients, *self.others.values()]
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch, weight in zip(group, weights, strict=True):
            with torch.autocast(self.device.type, DTYPES.get(options.amp), enabled=options.amp != "none"):
                loss = loss_of_step(batch)
            loss = loss.float() * (weight / math.fsum(weights))
            self.check(loss, "loss", where)
            self.scaler.scale(loss).backward()
            total += float(loss.detach())
        if options.regulariser:
            extra = penalty(composer.coefficients, options.p, options.regulariser)
            self.scaler.scale(extra).backward()
            total += float(extra.detach())
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(
            [p for p in parameters if p.grad is not None], options.clip if options.clip else math.inf
        )
        if options.amp != "fp16":  # the scaler leaves out a step whose scaled gradients overflow
            self.check(norm, "gradient", where)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total

    def check(self, value: Tensor, what: str, where: str) -> None:
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteLossError(
                f"{where}: the {what} is {float(value.detach())}; the coefficients are as they were before. Lower lr "
                f"({self.options.lr:g}), set clip, or look for NaN in the inputs"
            )

    # ---- the checkpoint ----------------------------------------------------------------------------------------

    def save(self) -> None:
        if self.path is None:
            return
        coefficients, others = self.values()
        content = {
            "format": FORMAT,
            "options": dataclasses.asdict(self.options),
            "grain": self.composer.grain.name,
            "epoch": self.epoch,
            "coefficients": coefficients,
            "others": others,
            "fitted": dataclasses.asdict(self.fitted),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_state(self.device),
            "generators": [g.get_state() for g in self.generators],
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_files({self.path: buffer.getvalue()})

    def load(self) -> dict[str, Any] | None:
        """The checkpoint, checked, or None where there is none yet."""
        if self.path is None or not self.path.exists():
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            raise IntegrityError(
                f"{self.path} cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
                "expected a checkpoint of hatcl.atlas. Delete it to start anew"
            ) from error
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise IntegrityError(f"{self.path}: not a checkpoint of hatcl.atlas; give another path")
        ours = dataclasses.asdict(self.options) | {"grain": self.composer.grain.name}
        theirs = saved["options"] | {"grain": saved["grain"]}
        ours |= {"coefficients": list(self.composer.coefficients.shape), "others": sorted(self.others)}
        theirs |= {"coefficients": list(saved["coefficients"].shape), "others": sorted(saved["others"])}
        theirs |= {"generators": len(saved["generators"])}
        ours |= {"generators": len(self.generators)}
        differ = [f"{k} {theirs.get(k)!r} (now {v!r})" for k, v in ours.items() if theirs.get(k) != v]
        if differ:
            raise ConfigError(
                f"{self.path} was written with {', '.join(differ)}; go on as it was, or delete it to start anew"
            )
        return saved

    def restore(self, saved: dict[str, Any]) -> None:
        self.put(saved["coefficients"], saved["others"])
        fitted = saved["fitted"]
        fitted["coefficients"] = fitted["coefficients"].to(self.device)
        fitted["others"] = {n: v.to(self.device) for n, v in fitted["others"].items()}
        self.fitted = Fitted(**fitted)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        set_random_state(saved["random"], self.device)
        for generator, state in zip(self.generators, saved["generators"], strict=True):
            generator.set_state(state)
        self.epoch = int(saved["epoch"])


def _same(batches: Batches) -> Callable[[int], Batches]:
    return lambda epoch: batches


def _seed_others(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


def _len(batches: Batches) -> int | None:
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader over an iterable data set
        return None


def _examples(batch: Any) -> int:
    """How many examples a batch of (inputs, labels) has; others count as one."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor) and batch[1].dim():
        return max(len(batch[1]), 1)
    return 1


def _generators(batches: Any) -> list[torch.Generator]:
    """The random generators that loaders hold themselves."""
    found: dict[int, torch.Generator] = {}
    loaders = [batches]
    while loaders:
        loader = loaders.pop(0)
        loaders += list(getattr(loader, "loaders", []))
        inside = getattr(loader, "batch_sampler", None)
        for holder in (loader, getattr(loader, "sampler", None), inside, getattr(inside, "sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                found.setdefault(id(generator), generator)
    return list(found.values())
