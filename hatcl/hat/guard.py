"""The guard: keeps frozen elements unchanged while a task is learned, whatever the optimizer does."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GuardError, HATError, NonFiniteLossError
from ..functional import local, same_bits
from ..keeper import Keeper, Kept, StoredWeights, check_optimizers, put_back
from ..shards import part_of, reshard, unsharded
from .digests import SEALED_BY
from .gates import Gates, gates_of
from .growth.apply import OUTGROWN
from .held import held, live_for, own_buffers, shared_buffers
from .layers.gated import HATLayer
from .protection import FINE, Attribution, Before, after_step, before_step, by_degrees, eased


class Guard(Keeper):
    """Keeps frozen elements bit-identical while a task is learned.

    Args:
        locked: the sealed tasks whose elements are frozen.
        after: called with the number of steps taken, after each step that counts.
        start: steps already done.
    """

    def __init__(
        self,
        model: nn.Module,
        task: int,
        optimizers: Sequence[Any],
        locked: Sequence[int],
        after: Callable[[int], None],
        start: int = 0,
    ) -> None:
        self.model, self.task, self.after = model, task, after
        reshard(model)
        self.gates = gates_of(model)
        self.embeddings = [g.embeddings[task] for g in self.gates]
        self._own = {id(e) for e in self.embeddings}
        self._counts: dict[int, int] = {}
        self.steps = 0
        fine = self.gates[0].config.protection == FINE
        self.attribution = Attribution(model, task, start) if fine else None
        super().__init__(self._frozen(locked), optimizers)
        self._check(model, optimizers)

    def _frozen(self, locked: Sequence[int]) -> list[Kept]:
        """Determine the elements that must not change while the task is learned."""
        self.locked = list(locked)
        self.shared: list[tuple[str, nn.Parameter]] = []
        self.heldless: list[str] = []
        self.own_params: list[nn.Parameter] = []
        frozen: list[Kept] = []
        degrees = by_degrees(self.model)
        self.eased = eased(self.model, locked) if degrees else []
        self._modules: list[nn.Module] = []
        for h in held(self.model):
            sealed_by = SEALED_BY.get(h.param, lambda: None)()
            if sealed_by is not None and bool(sealed_by.sealed.any()) and all(sealed_by is not g for g in self.gates):
                raise HATError(
                    f"{h.name} is also a parameter of another HAT model, whose sealed tasks would change; copy the "
                    "parameter, or convert one model that contains both"
                )
            entire = h.plain or (h.task is not None and h.task != self.task)
            mask: Tensor | None = None
            if h.task == self.task:
                self.own_params.append(h.param)
            if not entire and h.task is None:
                if h.plan is None:
                    entire = bool(locked)
                    if entire and h.param.requires_grad:
                        self.heldless.append(h.name)
                elif not degrees or not h.plan.axes:
                    mask = live_for(h, locked)
                    entire = mask is not None and bool(mask.all())
                if not entire:
                    self.shared.append((h.name, h.param))
            if entire or (mask is not None and bool(mask.any())):
                frozen.append(Kept(h.param, None if mask is None or entire else part_of(mask, h.param), h.name))
                self._modules.append(h.module)
        self.buffers = {name: b.clone() for name, b in self._buffers()}
        return frozen

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The buffers that no step may write to. Read again at each use, since a cast replaces tensors."""
        if self.locked:
            yield from shared_buffers(self.model, unsaved=True)
        for t in self.locked:
            yield from own_buffers(self.model, t)
        for i, g in enumerate(self.gates):
            yield f"gates {i}", g.masks
            yield f"gates {i}, sealed", g.sealed
            yield f"gates {i}, given", g.given
            yield f"gates {i}, order", g.order

    def relock(self, locked: Sequence[int]) -> None:
        """After a state was loaded: keep its values from now on."""
        self.hold_instead(self._frozen(locked))

    def _check(self, model: nn.Module, optimizers: Sequence[Any]) -> None:
        for p in (p for o in optimizers for group in getattr(o, "param_groups", ()) for p in group["params"]):
            if p in OUTGROWN:
                raise GuardError(
                    f"optimizer: it holds {OUTGROWN[p]} as it was before the network grew, which nobody computes with "
                    "any more; build it again over model.parameters(), or let it grow along: "
                    "hatcl.grow(model, ..., optimizer=optimizer)"
                )
        covered = check_optimizers(
            model,
            optimizers,
            "build it over model.parameters() of the converted model (hatcl.convert returns a new model, the source's "
            "parameters are not its own)",
        )
        learned = [e for g, e in zip(self.gates, self.embeddings, strict=True) if not g.is_given(self.task)]
        left = [e for e in learned if id(e) not in covered and e.numel()]
        if left and self.gates[0].sharded:
            raise GuardError(
                f"optimizer: it holds none of the shards of task {self.task}'s gate embeddings; a forward has gathered "
                "the parameters, and it was built over those. Call model.reshard() before model.parameters()"
            )
        if left:
            raise GuardError(
                f"optimizer: no optimizer holds task {self.task}'s gate embeddings; was it built before "
                "hatcl.add_tasks or over a part of the model? Call "
                f"optimizer.add_param_group({{'params': hatcl.task_parameters(model, {self.task})}})"
            )
        names = {h.name: id(h.param) for h in held(model)}
        alone = [name for name in self.heldless if names.get(name) in covered]
        if alone:
            warnings.warn(
                f"{alone[0]}: the optimizer holds {len(alone)} parameters that no gate knows, so they are frozen whole "
                "from the first sealed task on and will not learn. Put such modules into the model before "
                "hatcl.convert (each task then gets its own head), or use hatcl.TaskIndexedLinear",
                stacklevel=5,
            )

    # ---- around a step ---------------------------------------------------------------------------------------------

    def concerns(self, p: Tensor) -> bool:
        return id(p) in self._own

    def before_step(self, optimizer: Any) -> tuple[list[tuple[Gates, nn.Parameter, Tensor]], Before, Any]:
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not _skips(optimizer):  # under a scaler, fused optimizers skip a step themselves
            self.check_finite(gradients=True)
        pairs = zip(self.gates, self.embeddings, strict=True)
        embeddings = [(g, e, local(e.detach()).clone()) for g, e in pairs if id(e) in ids]
        of_step = None
        if self.attribution is not None and self._counts.get(id(optimizer), 0) == self.steps:  # a step that counts
            of_step = self.attribution.of_step()
        return embeddings, before_step(self.eased, ids, self.gates), of_step

    @torch.no_grad()
    def after_step(self, optimizer: Any, state: Any, innermost: bool) -> None:
        """Scale and clamp a step's change of the embeddings, or undo it if the gates are hard. Elements that are
        protected by degrees take only their share of the step."""
        embeddings, values, of_step = state
        if innermost:
            after_step(values)
        for g, e, was in embeddings:
            c, now = g.config, local(e.detach())
            if g.settled or g.holding:
                now.copy_(was)
                continue
            if innermost and c.embedding_lr_scale != 1.0:
                now.copy_(was + c.embedding_lr_scale * (now - was))
            now.clamp_(-c.clamp, c.clamp)
        if innermost and not _skips(optimizer):
            self._counts[id(optimizer)] = self._counts.get(id(optimizer), 0) + 1
            if self._counts[id(optimizer)] > self.steps:  # of several optimizers, the one that steps most counts
                self.steps += 1
                if self.attribution is not None:
                    self.attribution.add(of_step, self.steps)
                self.after(self.steps)

    # ---- on leaving ------------------------------------------------------------------------------------------------

    def put_back(self) -> list[str]:
        reshard(self.model)
        names = super().put_back()
        with torch.no_grad():
            for k, module in zip(self.kept, self._modules, strict=True):
                put = module._parameters.get(k.name.rpartition(".")[2])
                if put is not None and put is not k.param and put.shape == k.param.shape:  # the parameter was replaced
                    put_back(put, k)
                    names.append(k.name)
            for name, b in self._buffers():
                old = self.buffers.get(name)
                if old is not None and old.shape == b.shape and not same_bits(b, old):
                    b.copy_(old)
                    names.append(name)
        return names

    def store_weights(self) -> None:
        """After sealing: set the weights that optimizers store for the task's elements to the sealed values. Otherwise
        they would write other values later (a schedule-free method's `eval()`, Lookahead's sync)."""
        every = [
            Kept(h.param, None if h.task == self.task else part_of(h.live(self.task), h.param), h.name)
            for h in held(self.model)
            if h.task == self.task or (h.task is None and not h.plain)
        ]
        for k in every:
            k.take()
        for o in self.stepped.values():
            ids = {id(p) for group in o.param_groups for p in group["params"]}
            StoredWeights(o, [k for k in every if id(k.param) in ids]).put_back()

    def check_finite(self, gradients: bool = False) -> None:
        """Raise if the loss was not finite, before any weight takes the step. Such a loss reaches every embedding's
        gradient, or every head's if gates are given. This is the only device synchronisation of a step; non-finite
        embeddings after the step are detected in the next step or on leaving."""
        seen: Sequence[Tensor] = self.embeddings
        if self.gates[0].holding:
            seen = [p for p in self.own_params if p.grad is not None] or [p for _, p in self.shared]
        values = [*seen, *(p.grad for p in seen if gradients and p.grad is not None)]
        values = [unsharded(x.detach()) for x in values if x.numel()]
        sizes = torch._foreach_norm(values, math.inf) if values else ()
        if sizes and not math.isfinite(float(sizes[0] if len(sizes) == 1 else torch.stack(sizes).max())):
            raise NonFiniteLossError(
                f"task {self.task}: its {'own weights' if self.gates[0].holding else 'gate embeddings'} or their "
                "gradients are no longer finite, so the loss was NaN or infinite. Nothing was sealed and earlier tasks "
                "are as they were; lower the learning rate, clip gradients, or look at the batch"
            )

    def repair(self, model: nn.Module) -> list[str]:
        """Set non-finite shared elements to zero, because a later task may start from them; redraw the task's own."""
        names = []
        with torch.no_grad():
            for name, p in self.shared:
                bad = ~torch.isfinite(local(p))
                if bool(bad.any()):
                    local(p).masked_fill_(bad, 0)
                    names.append(name)
            for g, e in zip(self.gates, self.embeddings, strict=True):
                _refill(local(e), local(g.fresh_embedding(g.num_units, e.detach())))
            for module in model.modules():
                if isinstance(module, HATLayer) and "hat_tasks" in module._modules:
                    fresh = module._hat_new_copy().state_dict()
                    for name, x in module.hat_tasks[self.task].state_dict().items():
                        _refill(local(x), local(fresh[name]))
        return names


def _skips(optimizer: Any) -> bool:
    """Does the optimizer skip this step, because a gradient scaler found an infinity?"""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _refill(x: Tensor, fresh: Tensor) -> None:
    """Replace non-finite elements by fresh values, or by zeros if the shapes differ."""
    if not x.is_floating_point() and not x.is_complex():
        return
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        x.copy_(torch.where(bad, fresh, x) if x.shape == fresh.shape else x.masked_fill(bad, 0))
