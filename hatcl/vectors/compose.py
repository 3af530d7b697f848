"""Knowledge composition with learned anisotropic scaling (aTLAS; Zhang et al. 2024, arXiv 2407.02880, eq. 1 and 2).

    theta_j = theta0_j + sum_i lambda_ij tau_ij

over blocks j (parameter tensors, or any grain of the map) of T task vectors. Only the coefficients lambda are learned.
Shapes: `T` vectors, `G` groups of the grain.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from ..calls import inside
from ..errors import IntegrityError, VectorError
from ..functional import digest_of
from ..map.grains import Grain, make_grain
from ..map.lora import no_pairs
from ..map.units import UnitMap
from .bases import joined_kinds
from .block import Block
from .delta import Delta, restore
from .parameters import refuse_as_target
from .task_vector import TaskVector, named_as_in
from .tensors import Kind, tied_names

FIRST = (1 << 63) - 1  # a sequence number above all of autograd's


def compose(
    model: nn.Module,
    vectors: Sequence[TaskVector],
    grain: str = "block",
    *,
    dtype: torch.dtype | None = None,
    unit_map: UnitMap | None = None,
    seed: int = 0,
    check: bool = True,
) -> Composer:
    """A model whose parameters are `theta0_j + sum_i lambda_ij tau_ij`, with `composer.coefficients` `[T, G]` to learn.

        composer = hatcl.compose(model, [v1, v2])
        optimizer = torch.optim.AdamW([composer.coefficients], lr=1e-3)
        loss = F.cross_entropy(composer(x), y)
        loss.backward()
        optimizer.step()
        merged = composer.merge()

    Coefficients start at zero, where the composer equals the model. With one vector's coefficients at 1 it has that
    fine-tuned model's parameters, bit for bit without gradients and from `merge`; while learning they are rounded once
    per vector. Tensors that the vectors or the grain do not cover stay as in the model, and so do buffers (running
    statistics), even if a vector has them.

    Args:
        model: theta0; it is not changed, and must not be while the composer is in use.
        vectors: task vectors of this model; those read from files are read into memory. The composer keeps their
            tensors and the model's, not copies.
        grain: `block` (a coefficient per tensor and vector), `global` (one per vector: isotropic), `row`, `qkv`,
            `unit`, `partition:K`, `lora_pair`, ... of `hatcl.map.grains`.
        dtype: keep the vectors in this dtype, such as bfloat16. unit_map: for grain `unit`. seed: for `partition:K`.
        check: compare the model with the base of the vectors.

    Raises:
        VectorError: there are no vectors, or they do not fit the model or each other. IntegrityError: the base is
            another one. ConfigError: the grain is unknown.
    """
    return Composer(model, vectors, grain, dtype=dtype, unit_map=unit_map, seed=seed, check=check)


@dataclass
class _Written:
    """The current content of the targets.

    Attributes:
        at: the coefficients; None = unknown. exact: whether it was rounded once. versions: the targets' versions after
            the write.
    """

    at: Tensor | None = None
    exact: bool = False
    versions: list[int] = field(default_factory=list)


class _Compose(torch.autograd.Function):
    """One block's composed tensor as a function of its coefficients. The value is already written (`Block.fold_`); the
    derivative needs only the vectors, so nothing is saved and the tensor's gradient is freed at once."""

    @staticmethod
    def forward(ctx: Any, lam: Tensor, block: Block, written: _Written) -> Tensor:
        ctx.block, ctx.written, ctx.at = block, written, written.at
        return block.target.data.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        now = ctx.written.at
        if now is not ctx.at and (now is None or not torch.equal(now, ctx.at)):
            raise VectorError(
                f"{ctx.block.name}: this gradient belongs to coefficients that the composer no longer holds; call "
                "backward "
                "for each forward pass before the coefficients change"
            )
        return ctx.block.products(grad), None, None


class Composer(nn.Module):
    """See `compose`.

    Attributes:
        coefficients: lambda, `[T, G]`, zero at first; the only parameter that requires a gradient.
        model: a copy of the model, with the composed parameters of the last forward pass. grain: the grain, with
            `labels` of the groups.
    """

    def __init__(
        self,
        model: nn.Module,
        vectors: Sequence[TaskVector],
        grain: str = "block",
        *,
        dtype: torch.dtype | None = None,
        unit_map: UnitMap | None = None,
        seed: int = 0,
        check: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise VectorError(
                f"compose: got a {type(model).__name__}, expected the pretrained model as a module; files are composed "
                "by hatcl merge"
            )
        tied = tied_names(model)
        source = {n: p for n, p in model.named_parameters() if tied[n] == n}
        vectors = [named_as_in(tied, v) for v in _checked_vectors(vectors)]
        changed = [_changed(source, tied, v, i) for i, v in enumerate(vectors)]
        for names_of_one in changed:
            refuse_as_target(model, names_of_one)
        names = _common(source, vectors, changed)
        if check:
            _same_base(source, vectors, changed)
        why = no_pairs(model) if grain == "lora_pair" else None
        if why is not None:
            raise VectorError(why)
        self.grain: Grain = make_grain(grain, {n: source[n].shape for n in names}, unit_map, seed)
        if not self.grain.shapes:
            raise VectorError(f"compose: the grain {grain} covers none of the vectors' tensors")
        kept = [v.in_memory() if dtype is None else v.in_memory().to(dtype) for v in vectors]
        self.model = copy.deepcopy(model)
        self.training = model.training
        self._trainable = {n: p.requires_grad for n, p in self.model.named_parameters()}
        self.model.requires_grad_(False)
        slots = _held_at(self.model, tied)
        copies = dict(self.model.named_parameters())
        device = next(iter(source.values())).device
        self.coefficients = nn.Parameter(torch.zeros(len(kept), self.grain.size, dtype=torch.float32, device=device))
        self.blocks: list[Block] = []
        for name in self.grain.shapes:
            p = source[name].detach()
            changing = [i for i, names in enumerate(changed) if name in names]
            none = Delta(torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape))
            deltas = [v.delta(name).to(p.device) if i in changing else none for i, v in enumerate(kept)]
            groups, local = torch.unique(self.grain.index[name]().to(p.device), return_inverse=True)
            self.blocks.append(
                Block(name, p, deltas, changing, copies[name], groups.view(-1), None if len(groups) == 1 else local,
                      slots[name])
            )  # fmt: skip
        of_all = torch.cat([b.groups.to(device) for b in self.blocks])
        in_order = torch.equal(of_all, torch.arange(self.grain.size, device=device))
        self._order = None if in_order else of_all
        whole = [b.groups for b in self.blocks if b.local is None]
        self._whole = torch.cat(whole).to(device) if whole else of_all[:0]
        self._versions = [_version(b.theta0) for b in self.blocks]
        self._written = _Written()
        self._inside: list[Tensor] | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each group, if the grain names them."""
        return self.grain.labels

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() == -1:  # else checkpointing calls, inside a backward pass
            self._put_back()
        learning = torch.is_grad_enabled() and self.coefficients.requires_grad
        self._fold(self.coefficients.detach().clone(), exact=not learning)
        if not learning:
            return self.model(*args, **kwargs)
        parts = self._parts(self.coefficients)
        composed = [
            _Compose.apply(part.to(block.theta0.device), block, self._written)
            for block, part in zip(self.blocks, parts, strict=True)
        ]
        # autograd runs the ready node with the highest number first: no gradient waits for others
        for tensor in composed:
            if tensor.grad_fn is not None:
                tensor.grad_fn._set_sequence_nr(FIRST)
        before = self._inside
        try:
            self._install(composed)
            out = self.model(*args, **kwargs)
        finally:
            self._put_back(before)
        again = _Again(self, composed)
        for node in {t.grad_fn for _, t in inside(out) if isinstance(t, Tensor) and t.grad_fn is not None}:
            node.register_prehook(again)
        return out

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """A plain model with the composed weights, and with the model's `requires_grad` and modes."""
        self._put_back()
        self._fold(self.coefficients.detach().clone(), exact=True)
        out = copy.deepcopy(self.model)
        for name, p in out.named_parameters():
            p.requires_grad_(self._trainable[name])
        return out

    @torch.no_grad()
    def vector(self) -> TaskVector:
        """`sum_i lambda_i tau_i`, as one task vector: applied to the model it gives the result of `merge`, bit for
        bit."""
        self._check()
        out: dict[str, Tensor | Delta] = {}
        for block, part in zip(self.blocks, self._parts(self.coefficients), strict=True):
            out[block.name] = block.combined(block.coefficients(part))
        return TaskVector(out, {b.name: digest_of(b.theta0) for b in self.blocks}, partial=True)

    def extra_repr(self) -> str:
        t, g = self.coefficients.shape
        return f"vectors={t}, grain={self.grain.name}, groups={g}"

    # ---- folding -----------------------------------------------------------------------------------------------

    def _selected(self, coefficients: Tensor) -> Tensor:
        return coefficients if self._order is None else coefficients.index_select(1, self._order)

    def _parts(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """Each block's coefficients, `[T, g]`."""
        return self._selected(coefficients).split([len(b.groups) for b in self.blocks], 1)

    def _check(self) -> None:
        for block, version in zip(self.blocks, self._versions, strict=True):
            if _version(block.theta0) != version:
                raise VectorError(
                    f"{block.name}: the model given to compose has changed since; compose it again, or pass a copy"
                )
        expected = [len(self.blocks[0].deltas), self.grain.size]
        if list(self.coefficients.shape) != expected:
            raise VectorError(
                f"coefficients of shape {list(self.coefficients.shape)}; expected {expected}: "
                f"{expected[0]} vectors, {expected[1]} groups of the grain {self.grain.name}"
            )

    @torch.no_grad()
    def _fold(self, coefficients: Tensor, exact: bool) -> None:
        """Write the composed tensors, unless they are current: exactly rounded for evaluation, fast for a step."""
        self._check()
        w = self._written
        versions = [_version(b.target) for b in self.blocks]
        there = w.at is not None and versions == w.versions and torch.equal(w.at, coefficients)
        if there and w.exact == exact:
            return
        at = w.at if there else coefficients
        w.at = None  # until everything is written
        numbers = iter(coefficients[:, self._whole].T.tolist())  # in one call, since it waits for a GPU
        for block, part in zip(self.blocks, self._parts(coefficients), strict=True):
            lam = next(numbers) if block.local is None else part.to(block.theta0.device)
            if exact:
                each: Iterable[Any] = block.coefficients(lam) if isinstance(lam, Tensor) else lam
                block.target.data.copy_(restore(block.theta0, block.combined(each)))
            else:
                block.fold_(lam)
        w.at, w.exact, w.versions = at, exact, versions

    # ---- the modules' parameters -------------------------------------------------------------------------

    def _install(self, composed: list[Tensor]) -> None:
        self._inside = composed
        for block, tensor in zip(self.blocks, composed, strict=True):
            _set(block, tensor)

    def _put_back(self, before: list[Tensor] | None = None) -> None:
        """Replace composed tensors by the model's own parameters, or by the former ones."""
        if before is not None:
            self._install(before)
        elif self._inside is not None:
            for block in self.blocks:
                _set(block, block.target)
            self._inside = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._put_back()
        super()._apply(fn, recurse)
        for block in self.blocks:
            module, attribute = block.slots[0]
            block.to(cast(nn.Parameter, module._parameters[attribute]))
        device = self.coefficients.device
        self._order = None if self._order is None else self._order.to(device)
        self._whole = self._whole.to(device)
        self._versions = [_version(b.theta0) for b in self.blocks]
        self._written = _Written()
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._put_back()
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._versions = [_version(b.theta0) for b in self.blocks]  # copies count from zero
        self._written.versions = [_version(b.target) for b in self.blocks]


class _Again:
    """Called when a backward pass enters a forward pass's outputs: until it ends, the model again holds the weights of
    that forward pass. Checkpointing reruns parts of the model and must find them, and an evaluation or merge in between
    may have overwritten the memory that the graph saved."""

    def __init__(self, composer: Composer, composed: list[Tensor]) -> None:
        self.composer, self.composed, self.at = composer, composed, composer._written.at

    def __call__(self, _: tuple[Tensor, ...]) -> None:
        assert self.at is not None
        self.composer._fold(self.at, exact=False)
        self.composer._install(self.composed)
        Variable._execution_engine.queue_callback(self.composer._put_back)


def _set(block: Block, tensor: Tensor) -> None:
    for module, attribute in block.slots:
        module._parameters[attribute] = tensor  # type: ignore[assignment]
        if isinstance(module, nn.RNNBase):  # reads its weights from a separate list
            module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]


def _held_at(model: nn.Module, tied: Mapping[str, str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """The places of each parameter. Two parameters that share one tensor in memory become one parameter."""
    out: dict[str, list[tuple[nn.Module, str]]] = {}
    every = dict(model.named_parameters(remove_duplicate=False))
    for name in every:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        held = out.setdefault(tied[name], [])
        if not any(m is module and a == attribute for m, a in held):
            held.append((module, attribute))
            module._parameters[attribute] = every[tied[name]]
    return out


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version  # tensors made in inference mode have no version


def _checked_vectors(vectors: Sequence[TaskVector]) -> list[TaskVector]:
    out = list(vectors)
    if not out:
        raise VectorError("compose: no task vectors; pass at least one")
    wrong = next((v for v in out if not isinstance(v, TaskVector)), None)
    if wrong is not None:
        raise VectorError(f"compose: got {type(wrong).__name__} among the vectors, expected a list of TaskVectors")
    return out


def _changed(source: Mapping[str, Tensor], tied: Mapping[str, str], vector: TaskVector, i: int) -> dict[str, Kind]:
    """The model's parameters that a vector changes. Buffers in a vector are ignored."""
    out = {name: kind for name, kind in vector.kinds.items() if name in source}
    lost = [n for n in vector if n not in tied]
    if not out:
        raise VectorError(f"vector {i} has none of the model's parameters; it starts with {next(iter(vector))}")
    if lost:
        raise VectorError(
            f"vector {i} changes {lost[0]}, which the model lacks ({len(lost)} such tensors); compose the model that "
            "the vectors were taken from"
        )
    return out


def _common(source: Mapping[str, Tensor], vectors: list[TaskVector], changed: list[dict[str, Kind]]) -> list[str]:
    """The tensors that take part, in the model's order."""
    for i, kinds in enumerate(changed):
        for name, kind in kinds.items():
            if tuple(source[name].shape) != kind.shape:
                raise VectorError(
                    f"{name} is {list(kind.shape)} in vector {i}, {list(source[name].shape)} in the model; was the "
                    "vector taken from a model of another size?"
                )
    names = joined_kinds([(kinds, v.partial) for kinds, v in zip(changed, vectors, strict=True)])
    return [n for n in source if n in names]


def _same_base(source: Mapping[str, Tensor], vectors: list[TaskVector], changed: list[dict[str, Kind]]) -> None:
    digests: dict[str, str] = {}
    for i, (v, names) in enumerate(zip(vectors, changed, strict=True)):
        for name in names if v.base is not None else ():
            if name not in digests:
                digests[name] = digest_of(source[name])
            if v.base is not None and v.base[name] != digests[name]:
                raise IntegrityError(
                    f"{name} differs from the base of vector {i}; compose it with its own base, or pass check=False"
                )
