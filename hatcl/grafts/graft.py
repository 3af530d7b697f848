"""Grafts: a few elements of a fine-tuned model put into the pretrained one (Panigrahi et al. 2023, arXiv 2302.06600).

`theta(gamma) = theta_pre + gamma * (theta_ft - theta_pre)` with gamma 0 or 1 for every element. No sums are computed:
where gamma is 1 the fine-tuned value is copied, with every bit.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..config import one_of
from ..errors import GraftError, IntegrityError
from ..functional import bits_of, digest_of
from ..vectors.bases import digests_of
from ..vectors.delta import Delta, delta_between
from ..vectors.parameters import parameters_of
from ..vectors.task_vector import TaskVector
from ..vectors.tensors import Lazy, TensorSource, kinds_of, named_tensors, pick, tied_names
from . import files, inplace, shira
from .checks import checked_indices, checked_values, dtype_name, found_in

# suffixes of the names under which a tensor's indices (as such, or as one bit per element) and values are saved
AT, BITS, VALUE = ":at", ":bits", ":value"
OVERLAPS = ("equal", "mean", "first")


@dataclass(frozen=True, eq=False)
class Graft:
    """Some elements of some tensors and, if it is filled, the values of a fine-tuned model there. It is kept on the CPU
    as indices, so its memory depends on its size k, not on the model's.

    Attributes:
        shapes: the shapes of all tensors that took part, including those without an element in it, so that shares refer
        to N.
        indices: name -> flat indices in row order, `[k_name]`, ascending; int32 if they fit.
        values: name -> the values there, in their own dtype; None = only bits, which cannot be applied.
        base: name -> digest of the pretrained model's tensor, for the changed ones; None = unknown.

    Raises:
        GraftError: indices do not ascend or lie outside their tensor, or values or digests do not fit them.
    """

    shapes: dict[str, tuple[int, ...]]
    indices: dict[str, Tensor]
    values: dict[str, Tensor] | None = None
    base: dict[str, str] | None = None

    def __post_init__(self) -> None:
        shapes = {name: tuple(int(i) for i in shape) for name, shape in self.shapes.items()}
        if not shapes:
            raise GraftError("the graft has no tensors; which tensors took part?")
        unknown = next((name for name in self.indices if name not in shapes), None)
        if unknown is not None:
            raise GraftError(f"{unknown} has indices, but is not among the {len(shapes)} tensors that took part")
        given = {n: checked_indices(n, self.indices[n], math.prod(shapes[n])) for n in shapes if n in self.indices}
        indices = {n: at for n, at in given.items() if len(at)}
        object.__setattr__(self, "shapes", shapes)
        object.__setattr__(self, "indices", indices)
        if self.values is not None:
            object.__setattr__(self, "values", {n: checked_values(n, at, self.values) for n, at in indices.items()})
        if self.base is not None:
            missing = [name for name in indices if name not in self.base]
            if missing:
                raise GraftError(f"{missing[0]}: no digest of the pretrained model's tensor; pass all, or base=None")
            object.__setattr__(self, "base", {name: self.base[name] for name in indices})

    # ---- making and loading -----------------------------------------------------------------------------------

    @staticmethod
    def from_masks(
        masks: Mapping[str, Tensor], finetuned: TensorSource | None = None, pretrained: TensorSource | None = None
    ) -> Graft:
        """The graft with the elements where a mask is on.

        Args:
            masks: bool masks of all tensors that take part, in their full shapes. finetuned: the source of the values;
                None = only bits. pretrained: the model to apply it to, for the digests.

        Raises:
            GraftError: a mask is not bool, or a model lacks a tensor or has it in another shape.
        """
        wrong = next((n for n, m in masks.items() if m.dtype != torch.bool), None)
        if wrong is not None:
            raise GraftError(
                f"{wrong}: got a mask of {dtype_name(masks[wrong].dtype)}, expected bool; turn scores into a mask "
                "with >"
            )
        shapes = {n: tuple(m.shape) for n, m in masks.items()}
        bits = Graft(shapes, {n: m.reshape(-1).nonzero().view(-1) for n, m in masks.items()})
        if pretrained is not None:
            bits = Graft(bits.shapes, bits.indices, None, bits._digests(pretrained))
        return bits if finetuned is None else bits.fill(finetuned)

    def fill(self, finetuned: TensorSource) -> Graft:
        """The same elements, with the values of a model.

        Raises:
            GraftError: the model lacks a tensor, or has it in another shape or not in floating point.
        """
        tensors = self._tensors(finetuned, "the fine-tuned model")
        values = {n: inplace.take(t, self.indices[n].to(t.device, torch.long)) for n, t in tensors.items()}
        return Graft(self.shapes, self.indices, values, self.base)

    def bits(self) -> Graft:
        """The same elements, without values."""
        return Graft(self.shapes, self.indices, None, self.base)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Graft:
        """Read a file written by `save`.

        Raises:
            IntegrityError: the file is missing or damaged. GraftError: it holds scores, or something else.
        """
        tensors, about = files.read(path, files.BITS)
        try:
            shapes = {n: tuple(s) for n, s in about["shapes"].items()}
            indices = {n.removesuffix(AT): t for n, t in tensors.items() if n.endswith(AT)}
            packed = {n.removesuffix(BITS): t for n, t in tensors.items() if n.endswith(BITS)}
            indices |= {n: files.unpacked(t, math.prod(shapes[n])) if n in shapes else t for n, t in packed.items()}
            values = {n.removesuffix(VALUE): t for n, t in tensors.items() if n.endswith(VALUE)}
            return Graft(shapes, indices, values if about["values"] else None, about["base"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{path}: its parts do not fit each other ({error}); save the graft again") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one `.safetensors` file that declares that it holds bits: for each tensor the indices, a few bytes per
        element of the graft, or one bit per element of the tensor if that is less.

        Raises:
            GraftError: the path has another suffix. IntegrityError: the disk is full or not writable.
        """
        tensors = {}
        for n, at in self.indices.items():
            size = math.prod(self.shapes[n])
            dense = len(at) * at.element_size() > -(-size // 8)
            tensors[n + (BITS if dense else AT)] = files.packed(at, size) if dense else at
        tensors |= {n + VALUE: v for n, v in (self.values or {}).items()}
        about = {"shapes": self.shapes, "base": self.base, "values": self.values is not None}
        return files.write(path, files.BITS, tensors, about)

    @staticmethod
    def from_peft(folder: str | os.PathLike[str], pretrained: TensorSource) -> Graft:
        """Read a SHiRA adapter saved by peft, as the elements that it changes. N counts all parameters.

        Args:
            pretrained: the model that the adapter was trained on: a module, a state dict or files.

        Raises:
            GraftError: the adapter is another kind, or for another model. IntegrityError: the file is damaged.
        """
        found = shira.read_shira(Path(folder), pretrained)
        shapes = {n: k.shape for n, k in kinds_of(parameters_of(pretrained)).items()}
        unknown = next((n for n in found if n not in shapes), None)
        if unknown is not None:
            raise GraftError(f"{folder} changes {unknown}, which is not a parameter; a graft holds parameters only")
        values = {n: values for n, (_, values) in found.items()}
        bits = Graft(shapes, {n: at for n, (at, _) in found.items()}, values)
        return Graft(shapes, bits.indices, values, bits._digests(pretrained))

    def to_peft(self, base: nn.Module, folder: str | os.PathLike[str], *, check: bool = True) -> shira.ShiraReport:
        """Write it as a SHiRA adapter, which `PeftModel.from_pretrained(base, folder)` loads. It computes the same as
        `apply_to` up to the rounding of `pretrained + difference`, which the report states.

        SHiRA changes weights of linear layers, r (m + n) elements of each `[m, n]` with one r for all. Modules with
        other parameters in the graft (biases, norms, embeddings), and layers with too many elements, are stored in
        full.

        Args:
            base: the model that it was made for. check: see `apply_to`.

        Raises:
            GraftError: the graft has only bits, is for another architecture, has tied weights, parameters of the model
                itself, or no element in a linear layer. IntegrityError: the base is another one, or the disk is full.
        """
        _module(base, "to_peft")
        names, every = self._checked(base, check), named_tensors(base)
        found = {names[n]: self._part(n, every[names[n]]) for n in self.indices}
        path = getattr(getattr(base, "config", None), "_name_or_path", None)
        return shira.write_shira(base, found, Path(folder), path)

    # ---- content -----------------------------------------------------------------------------------------

    @functools.cached_property
    def size(self) -> int:
        """The number of its elements, k."""
        return sum(len(at) for at in self.indices.values())

    @functools.cached_property
    def numel(self) -> int:
        """The number of elements of all tensors that took part, N."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def sparsity(self) -> float:
        """`k / N`."""
        return self.size / self.numel if self.numel else 0.0

    def masks(self) -> dict[str, Tensor]:
        """The elements as bool tensors, for all tensors that took part."""
        out = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in self.shapes.items()}
        for name, at in self.indices.items():
            out[name].view(-1)[at.long()] = True
        return out

    def __repr__(self) -> str:
        filled = "with values" if self.values is not None else "bits alone"
        return f"{type(self).__name__}({self.size:,} of {self.numel:,} elements, {self.sparsity:.2g}, {filled})"

    # ---- several grafts ---------------------------------------------------------------------------------------

    def __and__(self, other: Graft) -> Graft:
        """The elements in both, with this one's values."""
        return self._kept(other, True) if isinstance(other, Graft) else NotImplemented

    def __sub__(self, other: Graft) -> Graft:
        """The elements that are only in this one."""
        return self._kept(other, False) if isinstance(other, Graft) else NotImplemented

    def __or__(self, other: Graft) -> Graft:
        """The elements in either; see `union` for values that differ."""
        return union([self, other]) if isinstance(other, Graft) else NotImplemented

    def _kept(self, other: Graft, inside: bool) -> Graft:
        check_same_tensors(self, other, ("the first graft", "the other"))
        none = torch.zeros(0, dtype=torch.int32)
        on = {n: torch.isin(at, other.indices.get(n, none)) == inside for n, at in self.indices.items()}
        values = None if self.values is None else {n: v[on[n]] for n, v in self.values.items()}
        return Graft(self.shapes, {n: at[on[n]] for n, at in self.indices.items()}, values, self.base)

    def overlap(self, other: Graft) -> float:
        """`|self & other| / |other|`: the share of the other's elements that this one has too.

        Raises:
            GraftError: the grafts are over other tensors, or the other has no element.
        """
        if not other.size:
            raise GraftError("the other graft has no element, so no share of it can be in this one")
        return (self & other).size / other.size

    # ---- applying -------------------------------------------------------------------------------------

    @overload
    def apply_to(self, model: nn.Module, *, check: bool = ...) -> nn.Module: ...
    @overload
    def apply_to(
        self, model: Mapping[str, Tensor] | str | os.PathLike[str], *, check: bool = ...
    ) -> Mapping[str, Tensor]: ...
    def apply_to(self, model: Any, *, check: bool = True) -> Any:
        """`theta_pre + gamma * (theta_ft - theta_pre)`: a new model, or new tensors for a state dict or files (for
        files they are made on demand). Where gamma is 0 the model's bits stay; where it is 1 they are the fine-tuned
        model's. A new state dict shares unchanged tensors with the given one.

        Args:
            check: compare the tensors to change with those that the graft was made for.

        Raises:
            GraftError: the graft has only bits, or the model lacks a tensor or has it in another shape. IntegrityError:
                the base is another one.
        """
        if isinstance(model, nn.Module):
            self._checked(model, check)
            out = copy.deepcopy(model)
            for name, t in self._tensors(out).items():
                self._put(name, t)
            return out
        every = named_tensors(model)
        lazy = isinstance(every, Lazy)
        found = self._checked(model, check and not lazy)
        mine = {found[name]: name for name in self.indices}

        def one(first: str) -> Tensor:
            t = every[first]
            if first not in mine:
                return t
            if check and lazy:
                self._check_base(mine[first], digest_of(t))
            t = t.detach().clone()
            self._put(mine[first], t)
            return t

        if lazy:
            return Lazy(kinds_of(every), one)
        new = {first: one(first) for first in every}
        return {name: new[first] for name, first in tied_names(model).items()}

    def apply_(self, model: nn.Module, *, check: bool = True) -> None:
        """Write the values into a module's own tensors. `remove_` restores every bit.

        Args:
            check: compare the tensors to change, as they were before any graft was applied, with those that the graft
                was made for.

        Raises:
            GraftError: the graft has only bits, or the model lacks a tensor or has it in another shape. IntegrityError:
                the base is another one.
        """
        _module(model, "apply_")
        found = self._checked(model, check)
        tensors = self._tensors(model)
        inplace.write_in(model, self, {found[n]: (t, *self._part(n, t)) for n, t in tensors.items()})

    def remove_(self, model: nn.Module, *, check: bool = True) -> None:
        """Restore every bit from before the last `apply_`. Grafts that share elements are removed in the reverse order
        of their application.

        Args:
            check: compare the elements with the values that `apply_` wrote.

        Raises:
            GraftError: it is not applied to this module, a graft applied later shares elements with it, or elements
                have changed since.
        """
        _module(model, "remove_")
        inplace.take_out(model, self, named_tensors(model), check)

    @contextlib.contextmanager
    def applied(self, model: nn.Module, *, check: bool = True) -> Iterator[None]:
        """`apply_` on entering, `remove_` on leaving. After an exception inside, the old values are restored even if
        elements have changed meanwhile."""
        self.apply_(model, check=check)
        try:
            yield
        except BaseException:
            self.remove_(model, check=False)
            raise
        self.remove_(model)

    def vector(self, pretrained: TensorSource) -> TaskVector:
        """The graft as a task vector: the difference from the pretrained model inside, zero outside. Sums of grafts are
        sums of these. With coefficient 1 the result equals that of `apply_to`, bit for bit.

        Raises:
            GraftError: the graft has only bits, or does not fit the model. IntegrityError: the base is another one.
        """
        found = self._checked(pretrained, True)
        names = dict.fromkeys([*parameters_of(pretrained), *found.values()])
        whole = pick(named_tensors(pretrained), list(names))
        kinds = {n: torch.promote_types(k.dtype, torch.float32) for n, k in kinds_of(whole).items()}
        deltas = {n: Delta(torch.zeros(k.shape, dtype=kinds[n])) for n, k in kinds_of(whole).items()}
        for name, first in ((n, found[n]) for n in self.indices):
            at, values = self._part(name, whole[first])
            inside = delta_between(inplace.take(whole[first], at), values).to("cpu")
            zeros = deltas[first].value
            zeros.view(-1)[at.cpu()] = inside.value
            if inside.at is not None:
                deltas[first] = Delta(zeros, self.indices[name][inside.at.long()], inside.rest)
        return TaskVector(deltas, digests_of(whole))

    def _checked(self, model: TensorSource, check: bool) -> dict[str, str]:
        """The model's names of the tensors; raises unless the graft can be applied."""
        if self.values is None:
            raise GraftError(
                "this graft holds only bits and no values to apply; graft.fill(finetuned) takes them from the "
                "fine-tuned model"
            )
        found = found_in(model, self.shapes, "the model")
        if check and self.base is not None:
            for name, digest in self._digests(model).items():
                self._check_base(name, digest)
        return found

    def _check_base(self, name: str, digest: str) -> None:
        if self.base is not None and digest != self.base[name]:
            raise IntegrityError(
                f"{name} differs from the tensor that this graft was made for; apply it to its own pretrained "
                "model, or pass check=False"
            )

    def _tensors(self, model: TensorSource, what: str = "the model") -> dict[str, Tensor]:
        """The model's tensors that the graft changes, under the graft's names."""
        found, every = found_in(model, self.shapes, what), named_tensors(model)
        return {name: every[found[name]] for name in self.indices}

    def _digests(self, model: TensorSource) -> dict[str, str]:
        """Digests of the model's tensors that the graft changes, as they were before any graft was applied."""
        found = found_in(model, self.shapes, "the pretrained model")
        return {n: digest_of(inplace.original(model, found[n], t)) for n, t in self._tensors(model).items()}

    def _part(self, name: str, t: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and values for one tensor, on its device and in its dtype."""
        assert self.values is not None  # ensured by `_checked`
        return self.indices[name].to(t.device, torch.long), self.values[name].to(t.device, t.dtype)

    def _put(self, name: str, t: Tensor) -> None:
        inplace.put(t, *self._part(name, t))


def union(grafts: Sequence[Graft], overlap: str = "equal") -> Graft:
    """The elements that are in any of the grafts, with their values if all have them.

    Args:
        overlap: the value of an element that several grafts have. `equal`: their values must be the same. `mean`: their
            mean, summed in float64 and rounded once. `first`: that of the first graft with the element.

    Raises:
        GraftError: there is no graft, grafts are over other tensors or for other bases, only some have values, or with
            `equal` values differ. ConfigError: `overlap` is unknown.
    """
    one_of("overlap", overlap, OVERLAPS)
    if not grafts:
        raise GraftError("union: got no grafts; pass at least one")
    first = grafts[0]
    for other in grafts[1:]:
        check_same_tensors(first, other, ("the first graft", "another"))
        if (first.values is None) != (other.values is None):
            raise GraftError(
                "some grafts hold values, others only bits; fill these (graft.fill), or use .bits() of all"
            )
    base: dict[str, str] | None = {}
    for graft in grafts:
        for name, digest in (graft.base or {}).items():
            if base is not None and base.setdefault(name, digest) != digest:
                raise GraftError(f"{name}: the grafts were made for different bases; all must start from one model")
    if any(graft.base is None for graft in grafts):
        base = None
    indices, values = {}, {}
    for name in first.shapes:
        holders = [graft for graft in grafts if name in graft.indices]
        if not holders:
            continue
        at, which = torch.unique(torch.cat([graft.indices[name] for graft in holders]), return_inverse=True)
        indices[name] = at
        if first.values is not None:
            parts = [graft.values[name] for graft in holders if graft.values is not None]
            values[name] = _joined_values(name, parts, which, len(at), overlap)
    return Graft(first.shapes, indices, None if first.values is None else values, base)


def _joined_values(name: str, parts: Sequence[Tensor], which: Tensor, count: int, overlap: str) -> Tensor:
    """Combine several grafts' values of one tensor into one per element; `which` is the element of each value."""
    other = next((p for p in parts if p.dtype != parts[0].dtype), None)
    if other is not None:
        raise GraftError(
            f"{name} is {dtype_name(parts[0].dtype)} in one graft, {dtype_name(other.dtype)} in another; fill both "
            "in the same dtype"
        )
    every = torch.cat(list(parts))
    out = torch.empty(count, dtype=every.dtype)
    end = len(every)
    for part in reversed(parts):  # so that the first graft's values stay
        inplace.put(out, which[end - len(part) : end], part)
        end -= len(part)
    differ = bits_of(every) != bits_of(out)[which]
    if overlap == "first" or not bool(differ.any()):
        return out
    if overlap == "equal":
        many = len(which[differ].unique())
        raise GraftError(
            f"{name}: {many} elements have different values in the grafts; union(grafts, overlap='mean') or 'first' "
            "chooses one value for each, .bits() leaves the values out"
        )
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, which, every.double())
    means = sums / torch.bincount(which, minlength=count)
    changed = which[differ].unique()  # equal values keep every bit
    inplace.put(out, changed, means[changed].to(out.dtype))
    return out


def overlaps(grafts: Sequence[Graft]) -> Tensor:
    """`|g_i & g_j| / |g_j|`, row i, column j: float64 `[T, T]`, with ones on the diagonal.

    Raises:
        GraftError: the grafts are over other tensors, or one has no element.
    """
    return torch.tensor([[a.overlap(b) for b in grafts] for a in grafts], dtype=torch.float64).reshape(
        len(grafts), len(grafts)
    )


def check_same_tensors(a: Graft, b: Graft, what: tuple[str, str]) -> None:
    """Raise `GraftError` unless two grafts are over the same tensors.

    Args:
        what: the error's names for the two.
    """
    for name in [*a.shapes, *b.shapes]:
        ours, theirs = (list(g.shapes[name]) if name in g.shapes else "lacking" for g in (a, b))
        if ours != theirs:
            raise GraftError(
                f"{name} is {ours} in {what[0]}, {theirs} in {what[1]}; make both from one model, with the same "
                "participating parameters"
            )


def _module(model: Any, verb: str) -> None:
    if not isinstance(model, nn.Module):
        raise GraftError(f"{verb}: got {type(model).__name__}, expected a module; apply_to gives new tensors")
