"""Learned grafts: find the elements of a fine-tuned model that the pretrained one needs by gradient descent on the
task's loss (Panigrahi et al. 2023, arXiv 2302.06600, section 3)."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import again, endless, examples_in, one_pass
from ..errors import GraftError, NonFiniteLossError
from ..lend import lent
from ..vectors.select import largest
from ..vectors.tensors import Kind, Lazy, TensorSource, tied_names
from .checks import size_of
from .graft import Graft
from .options import GraftOptions
from .scores import GraftScores, as_small, top
from .selection import Pairs, Patterns, candidates, change_of, check_moved, drawn, filled, seed_of
from .weights import HardWeights, SoftWeights

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class LearnedGraft(Graft):
    """A graft with the record of its learning.

    Attributes:
        scores: the logits after the last step. (Keeping those of the best step would take another float per element.)
        history: one entry per mask, beginning with the start at step 0: `step`; `size`; `changed`, the number of its
        elements that are not in the start; `loss`, the mean loss of the model on the batches of the next step; and,
        unless `loss` chooses the mask, the value that does: `validation`, or `mask_loss`, the mean loss of the mask
        itself on examples that are the same for all masks.
        step: the number of steps after which the graft's mask was reached.
    """

    scores: GraftScores | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    step: int = 0


def learn_graft(
    pretrained: nn.Module,
    finetuned: TensorSource,
    loss_fn: LossFn,
    batches: Iterable[Any],
    sparsity: float = 1e-4,
    *,
    start: Graft | GraftScores | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    only: Patterns = (),
    skip: Patterns = (),
    options: GraftOptions | Mapping[str, Any] | None = None,
    on_progress: Callable[[dict[str, float]], None] | None = None,
) -> LearnedGraft:
    """Find the elements, `k = int(sparsity * N)` of all N candidates, that give the lowest loss.

    The paper starts from a base patch b and learns `gamma = b + (1 - 2b) * sigmoid(S - bias)`. As `1 - sigmoid(x) =
    sigmoid(-x)`, that is `gamma = sigmoid(L)` with the logit `L = (1 - 2b) * (S - bias)`, and its update, whose sign
    depends on b, is gradient descent on L: `dL = -lr * g * delta * sigmoid'(L)`, where g is the loss's gradient by the
    weights and `delta = theta_ft - theta_pre`. That is `GraftOptions(rule="plain")`; the default is its natural
    gradient in other units, `dL = -lr * 2 * bias * loss / squares * g * delta` (see `GraftOptions`). `PUBLISHED` is the
    whole published procedure.

    Of the start and the masks after each step, the one with the highest `validate` is kept, or with the lowest training
    loss; the first among equals. By that measure, the result is therefore never worse than the start. (The published
    release ignores the start, and measures training and validation accuracy together.) The losses are those of the
    masks, with gamma 0 or 1, on the same examples: all batches, or with `accumulate` that many first batches of one
    pass, which are kept for this. If gamma is hard and a step is a pass, learning computes this loss anyway; otherwise
    each mask is measured with additional forward passes.

    The model computes in evaluation mode: without dropout, with running statistics. The pretrained model's elements
    take fine-tuned values while learning; in the end, even after an error, its bits, gradients, modes and
    `requires_grad` are as before. The fine-tuned model is only read. With hard gamma and plain SGD, the memory in
    addition to the two models is one float per candidate and up to five numbers per element of the graft: each gradient
    is used as soon as it arrives, then freed.

    Args:
        pretrained: the module to compute with. finetuned: a module, state dict, or files of the same names and shapes.
        loss_fn: (model, batch) -> the mean loss of a batch.
        batches: a list or a DataLoader; it starts again when it runs out. In batches of (inputs, labels) and mappings
        every example has the same weight; batches of another form count as one example each.
        sparsity: the share of the candidates in the graft.
        start: the base patch (its size may differ from k), or the first logits; None = the k largest `|delta|`.
        validate: (model with the mask applied) -> a number; higher is better.
        only, skip: patterns of names, see `candidates`.
        options: `GraftOptions`, or a mapping of the options to change. on_progress: called with each entry of the
            history.

    Raises:
        GraftError: the models do not fit each other, do not differ or are not finite; the sparsity selects nothing or
            everything; the start is over other tensors; or the loss has no gradient for any candidate. ConfigError: an
            option is unknown, a pattern matches nothing, or there are no batches or they can be read only once.
            NonFiniteLossError: a loss, a gradient or a validation is not finite.
    """
    settings = GraftOptions().changed(options)
    if not isinstance(pretrained, nn.Module):
        raise GraftError(
            f"pretrained: got {type(pretrained).__name__}, expected the module to compute with; load files into it "
            "first"
        )
    pairs = candidates(pretrained, finetuned, only, skip)
    if not isinstance(finetuned, nn.Module):  # files would be read again for every gradient
        read = {n: pairs[n] for n in pairs}
        pairs = Lazy(pairs.kinds, read.__getitem__)
    check_moved(pairs)
    k = size_of(sparsity, sum(math.prod(kind.shape) for kind in pairs.kinds.values()))
    weights = (HardWeights if settings.gamma == "hard" else SoftWeights)(pairs)
    learner = _Learner(pretrained, weights, _start(pairs, k, start, settings), k, loss_fn, settings)
    taking_part = _parameters(pretrained, pairs)
    with lent(pretrained, taking_part), torch.random.fork_rng(_devices(pretrained)), contextlib.closing(weights):
        torch.manual_seed(seed_of("batches", settings.seed))
        stream = _Stream(batches, settings.accumulate)
        learner.run(stream, validate, on_progress)
    graft = filled(pairs, learner.best)
    scores = GraftScores(dict(learner.logits))
    return LearnedGraft(
        graft.shapes, graft.indices, graft.values, graft.base, scores, learner.history, learner.best_step
    )


# ---- the start -------------------------------------------------------------------------------------------------


def _start(pairs: Pairs, k: int, start: Graft | GraftScores | None, options: GraftOptions) -> Lazy[Tensor]:
    """The first logits, made on demand: always the same ones."""
    shapes = {n: kind.shape for n, kind in pairs.kinds.items()}
    if start is not None:
        theirs = (
            {n: tuple(x.shape) for n, x in start.values.items()} if isinstance(start, GraftScores) else start.shapes
        )
        wrong = next((n for n in [*shapes, *theirs] if shapes.get(n) != theirs.get(n)), None)
        if wrong is not None:
            ours, other = (list(s[wrong]) if wrong in s else "no part of it" for s in (shapes, theirs))
            raise GraftError(
                f"start: {wrong} is {other} in the start and {ours} among the candidates; both must have the same "
                "tensors (pass the only= and skip= that the start was made with)"
            )
    if isinstance(start, GraftScores):
        values = start.values
        return _lazy(shapes, lambda name: values[name].clone())
    if start is not None:
        members = dict(start.indices)
    else:
        scores = _lazy(shapes, lambda name: change_of(pairs[name]).abs())
        cut = largest(scores, k)
        found = {n: cut.mask(n, scores[n]).reshape(-1).nonzero().view(-1).cpu() for n in scores}
        members = {n: as_small(at, scores.kinds[n]) for n, at in found.items()}

    def make(name: str) -> Tensor:
        out = drawn(shapes[name], "start", options.seed, name).sub_(options.bias)
        if name in members:
            out.view(-1)[members[name].long()] *= -1
        return out

    return _lazy(shapes, make)


def _lazy(shapes: Mapping[str, tuple[int, ...]], make: Callable[[str], Tensor]) -> Lazy[Tensor]:
    return Lazy({n: Kind(s, torch.float32) for n, s in shapes.items()}, make)


# ---- learning ----------------------------------------------------------------------------------------------------


class _Learner:
    """The logits, the current mask, and the best one so far."""

    def __init__(
        self,
        model: nn.Module,
        weights: HardWeights | SoftWeights,
        start: Lazy[Tensor],
        k: int,
        loss_fn: LossFn,
        options: GraftOptions,
    ) -> None:
        self.model, self.weights, self.k, self.loss_fn, self.options = model, weights, k, loss_fn, options
        self.kinds, self.numel = start.kinds, sum(math.prod(kind.shape) for kind in start.kinds.values())
        self.scale: float | None = None if options.rule == "natural" else 1.0
        # with plain SGD and the natural rule, a batch's change of a logit does not depend on the logit: no separate sum
        self.in_place = options.rule == "natural" and options.optimizer == "sgd" and not options.momentum
        self.logits: Mapping[str, Tensor] = start
        self.sums: dict[str, Tensor] = {}
        self.weight = 1.0  # of the current batch
        self.optimizer: torch.optim.Optimizer | None = None
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_step, self.best_score = 0, -math.inf

    def run(
        self,
        stream: _Stream,
        validate: Callable[[nn.Module], float] | None,
        on_progress: Callable[[dict[str, float]], None] | None,
    ) -> None:
        first = members = self._members()
        # whether the loss at the start of a step is that of the mask, on the same examples for every mask
        telling = self.options.gamma == "hard" and stream.accumulate is None
        for step in range(self.options.steps + 1):
            entry: dict[str, float] = {"step": step, "size": _size(members), "changed": _outside(members, first)}
            if validate is not None:
                self.weights.show(members)
                with torch.no_grad():
                    entry["validation"] = _finite_value(float(validate(self.model)), "validation", step)
            elif not telling:
                self.weights.show(members)
                entry["mask_loss"] = self._pass(stream.sample(), step, backward=False)
            last = step == self.options.steps
            if not last or (validate is None and telling):
                self.weights.compute_with(members, self.logits)
                entry["loss"] = self._pass(stream.step(), step, backward=not last)
            score = entry["validation"] if validate is not None else -entry["loss" if telling else "mask_loss"]
            if score > self.best_score and 0 < _size(members) < self.numel:
                self.best, self.best_step, self.best_score = members, step, score
            self.history.append(entry)
            if on_progress is not None:
                on_progress(dict(entry))
            if not last:
                self._move(step)
                members = self._members()
        if not self.best:
            raise GraftError(
                f"every mask has either all {self.numel:,} elements or none; start from logits on both sides of 0, "
                "or set "
                "size='fixed'"
            )

    def _members(self) -> dict[str, Tensor]:
        """The mask: flat indices by name, ascending."""
        if self.options.size == "fixed":
            return top(self.logits, self.k)
        found = {n: (self.logits[n].reshape(-1) > 0).nonzero().view(-1) for n in self.logits}
        return {n: as_small(at, self.kinds[n]).cpu() for n, at in found.items() if len(at)}

    # ---- gradients ---------------------------------------------------------------------------------------------

    def _pass(self, batches: Iterable[Any], step: int, backward: bool) -> float:
        """The mean loss over some batches, every example with the same weight."""
        total, self.seen, self.arrived = 0.0, 0, set[str]()
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(backward))
            for p, name in _parameters(self.model, self.kinds).items() if backward else ():
                stack.enter_context(p.register_post_accumulate_grad_hook(functools.partial(self._take, name)))
            for batch in batches:
                self.weight = examples_in(batch)
                loss = self.loss_fn(self.model, batch)
                if not isinstance(loss, Tensor) or loss.numel() != 1 or (backward and not loss.requires_grad):
                    got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                    raise GraftError(
                        f"loss_fn: returned {got}, expected a scalar tensor with a gradient: the mean loss of a "
                        "batch, computed with the model that it receives"
                    )
                total += self.weight * _finite_value(float(loss.detach()), "loss", step)
                self.seen += self.weight
                if backward:
                    loss.backward()
        if backward and not self.arrived:
            raise GraftError(
                f"the loss has no gradient for any of the {len(self.kinds)} participating tensors; does loss_fn "
                "compute with the model that it receives, and do only= and skip= leave tensors that it uses?"
            )
        return total / self.seen

    @torch.no_grad()
    def _take(self, name: str, p: nn.Parameter) -> None:
        """Use a gradient, and free it."""
        assert p.grad is not None
        g, p.grad = p.grad.to_dense() if p.grad.is_sparse else p.grad, None
        self.arrived.add(name)
        moves_now = self.in_place and self.scale is not None
        into = self.logits if moves_now else self.sums
        if name not in into:
            self.sums[name] = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        factor = self._factor() if moves_now else 1.0
        into[name].addcmul_(g.to(torch.float32), self.weights.delta(name).to(torch.float32), value=factor * self.weight)

    # ---- steps -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _move(self, step: int) -> None:
        """Move the logits by the gradients of a step."""
        if self.scale is None:
            self.scale = self._unit()
            if self.in_place:
                factor = self._factor()
                for name in self.kinds:  # the sums become the logits, which saves a second float
                    x = self._begun(name)
                    self.sums[name] = self.sums[name].mul_(factor).add_(x) if name in self.sums else x
                self.logits, self.sums = self.sums, {}
        if not self.in_place:
            self._optimize()
        for name, x in self.logits.items():
            _finite_value(float(x.sum()), f"gradient of {name}", step)

    def _begun(self, name: str) -> Tensor:
        """The first logits of a tensor, on its device."""
        return self.logits[name].to(self.weights.pairs[name][0].device)

    def _factor(self) -> float:
        """The factor from `g * delta` to logits."""
        assert self.scale is not None
        return -self.options.lr * 2 * self.options.bias / self.scale

    def _unit(self) -> float:
        """`sum (g * delta)^2 / |loss|` over the k elements with the largest values in the first step, where g and the
        loss are sums over its examples."""
        sizes = _lazy({n: tuple(x.shape) for n, x in self.sums.items()}, lambda name: self.sums[name].abs())
        found = top(sizes, min(self.k, sum(x.numel() for x in self.sums.values())))
        parts = [sizes[n].view(-1)[at.long()].double() for n, at in found.items()]
        squares = sum(float(x.square().sum()) for x in parts)
        if not (math.isfinite(squares) and squares > 0):
            raise NonFiniteLossError(
                f"the squares of the first step's gradients sum up to {squares:g}, expected a number above 0; the "
                "models are as they were before. Is the loss constant, or does it overflow?"
            )
        gain = sum(float(x.sum()) for x in parts)  # the possible gain, if the loss is 0 already
        return squares / (abs(self.history[0]["loss"]) * self.seen or gain)

    def _optimize(self) -> None:
        """A step of torch's optimizer on separately kept sums."""
        options = self.options
        if self.optimizer is None:
            self.logits = {n: self._begun(n) for n in self.kinds}
            self.sums |= {n: torch.zeros_like(x) for n, x in self.logits.items() if n not in self.sums}
            parameters = list(self.logits.values())
            lr = options.lr * (2 * options.bias if options.rule == "natural" else 1.0)
            self.optimizer = (
                torch.optim.Adam(parameters, lr=lr, foreach=False)
                if options.optimizer == "adam"
                else torch.optim.SGD(parameters, lr=lr, momentum=options.momentum, foreach=False)
            )
        assert self.scale is not None
        for name, x in self.logits.items():
            g = self.sums[name]
            if options.rule == "natural":
                g /= self.scale
            else:
                gamma = x.sigmoid()
                g *= gamma * (1 - gamma) / self.seen
            x.grad = g
        self.optimizer.step()
        for name, x in self.logits.items():
            x.grad = None
            self.sums[name].zero_()


class _Stream:
    """The batches of one step after another.

    Raises:
        ConfigError: there are none, or they can be read only once.
    """

    def __init__(self, batches: Iterable[Any], accumulate: int | None) -> None:
        self.batches, self.accumulate = again(batches, "batches"), accumulate
        self.endless = endless(batches, "batches")
        self.first: list[Any] = []

    def step(self) -> Iterator[Any]:
        return self._pass() if self.accumulate is None else itertools.islice(self.endless, self.accumulate)

    def sample(self) -> Iterable[Any]:
        """The batches on which masks are compared: a pass, or always the same batches, as many as a step has."""
        if self.accumulate is None:
            return self._pass()
        self.first = self.first or list(itertools.islice(self._pass(), self.accumulate))
        return self.first

    def _pass(self) -> Iterator[Any]:
        return one_pass(self.batches, "batches")


def _parameters(model: nn.Module, pairs: Mapping[str, Any]) -> dict[nn.Parameter, str]:
    """The parameters that are candidates, with their names; includes all that share elements."""
    tied = tied_names(model)
    return {p: tied[n] for n, p in model.named_parameters() if tied[n] in pairs}


def _devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def _size(members: Mapping[str, Tensor]) -> int:
    return sum(len(at) for at in members.values())


def _outside(members: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> int:
    """The number of members that are not among the others."""
    out = _size(members)
    for n, at in members.items():
        if n in others:
            on = torch.zeros(1 + int(max(at[-1], others[n][-1])), dtype=torch.bool)
            out -= int(on.scatter_(0, others[n].long(), True).index_select(0, at).sum())
    return out


def _finite_value(value: float, what: str, step: int) -> float:
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"step {step}: the {what} is {value}, expected a finite number; the models are as they were before. "
            "Look for NaN in the inputs, or lower lr"
        )
    return value
