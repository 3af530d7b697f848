"""Task vectors: what fine-tuning added to a model, as something to compute with.

`tau = theta_ft - theta_pre` (Ilharco et al. 2023, arXiv 2212.04089), over floating-point parameters only.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..errors import IntegrityError, VectorError
from ..files import parse_json
from ..functional import digest_of
from .bases import digests_of, joined_bases, known_as, one_base, refuse_integers
from .delta import Delta, delta_between, restore
from .files import read_metadata, write_tensors
from .select import largest
from .tensors import (
    Kind,
    Lazy,
    TensorSource,
    buffers_of,
    check_fit,
    kinds_of,
    named_tensors,
    parameters_of,
    pick,
    tied_names,
)
from .to_lora import LoRAReport, write_lora

VECTOR_FORMAT = "hatcl.task_vector"
AT, REST = ":at", ":rest"  # endings of the names under which remainders are saved


def composed(
    model: TensorSource, terms: Sequence[tuple[float, TaskVector]], *, check: bool = True
) -> Mapping[str, Tensor]:
    """All tensors of a source, `theta + sum_i c_i tau_i` where the vectors speak of them, rounded once: at once for
    what is in memory, when asked for from files.

    Raises:
        VectorError: tensors that the model lacks or that have another shape. IntegrityError: another base.
    """
    every = named_tensors(model)
    kinds = kinds_of(every)
    for _, vector in terms:
        problems = [
            f"{n} is {list(k.shape)}, the model has {list(kinds[n].shape) if n in kinds else 'no such tensor'}"
            for n, k in vector.kinds.items()
            if n not in kinds or kinds[n].shape != k.shape
        ]
        if problems:
            raise VectorError(
                f"{len(problems)} tensors of the vector do not fit: {'; '.join(problems[:5])}"
                f"{' ...' if len(problems) > 5 else ''}. Apply it to the model it was taken from"
            )

    def one(name: str) -> Tensor:
        x = every[name]
        mine = [(c, v) for c, v in terms if name in v]
        digest = digest_of(x) if check and any(v.base is not None for _, v in mine) else None
        if any(v.base is not None and v.base[name] != digest for _, v in mine if digest is not None):
            raise IntegrityError(
                f"{name} is not what this vector was taken from; apply it to its own base, or pass check=False"
            )
        return restore(x, ((c, v.delta(name).to(x.device)) for c, v in mine)) if mine else x

    return Lazy(kinds, one) if isinstance(every, Lazy) else {name: one(name) for name in every}


class TaskVector(Mapping[str, Tensor]):
    """The difference that fine-tuning made, tensor by tensor. `+`, `-`, `*` compute with it; `vector[name]` is one
    tensor of it.

    Vectors made from files read them when a tensor is asked for, also through sums and products, so that a composition
    of many checkpoints needs the memory of a few tensors. `in_memory()` ends that.

    Sums and products compute with the differences alone. The remainders of `Delta` stay where differences are kept,
    masked or saved, so that one vector with coefficient 1 gives its model back bit for bit.

    Args:
        deltas: name -> difference.
        base: name -> digest of the base's tensor, which `apply_to` compares; None = applies to anything that fits.
        partial: are tensors that it lacks known to be unchanged (a LoRA adapter's)?

    Raises:
        VectorError: not a single tensor, an integer tensor, or a number that is not finite.
    """

    def __init__(
        self,
        deltas: Mapping[str, Tensor | Delta],
        base: Mapping[str, str] | None = None,
        *,
        partial: bool = False,
    ) -> None:
        if not len(deltas):
            raise VectorError("a task vector of no tensors; are there floating-point parameters in both models?")
        self.base = base
        self.partial = partial
        self._deltas: Mapping[str, Any] = (
            Lazy(deltas.kinds, lambda name: _checked_delta(name, deltas[name]))
            if isinstance(deltas, Lazy)
            else {name: _checked_delta(name, d) for name, d in deltas.items()}
        )

    # ---- where it comes from -----------------------------------------------------------------------------------

    @classmethod
    def between(cls, pretrained: TensorSource | None, finetuned: Any, *, buffers: bool = False) -> TaskVector:
        """`finetuned - pretrained`.

        Args:
            pretrained, finetuned: modules, state dicts, safetensors files, or folders of them. `finetuned` may also be
                a peft model or the folder of a peft LoRA adapter: then the vector is the product `scaling * B A` of
                each layer, and `pretrained` is only needed for its digest and for modules that were trained in full.
            buffers: also the running statistics of norms.

        Raises:
            VectorError: names or shapes that differ (they are listed), or nothing but integers.
            IntegrityError: a file is missing or damaged.
        """
        from .adapters import is_adapter, lora_deltas  # a room of its own: it knows peft

        ours = None if pretrained is None else parameters_of(pretrained, buffers)
        if is_adapter(finetuned):
            deltas = lora_deltas(finetuned, ours, pretrained if isinstance(pretrained, nn.Module) else None)
            unknown = [] if ours is None else [n for n in deltas if n not in ours]
            if unknown:
                other = tied_names(pretrained).get(unknown[0])
                why = "it is tied to " + other if other else "pass the model that the adapter was trained on"
                raise VectorError(
                    f"the adapter changes {unknown[0]}, which the pretrained model lacks ({len(unknown)} such "
                    f"tensors); {why}"
                )
            return cls(deltas, None if ours is None else digests_of(pick(ours, list(deltas))), partial=True)
        if ours is None:
            raise VectorError("between: pretrained=None is for peft adapters only; pass the model that was fine-tuned")
        theirs = parameters_of(finetuned, buffers)
        skip = set() if buffers else buffers_of(pretrained) | buffers_of(finetuned)  # files do not tell them apart
        tied = {**tied_names(finetuned), **tied_names(pretrained)}
        ours, theirs = (known_as(side, tied, skip) for side in (ours, theirs))
        check_fit(
            ours, theirs, ("the pretrained model", "the fine-tuned one"),
            "Are they of one architecture and vocabulary? Compare the parts that fit as state dicts",
        )  # fmt: skip
        if not ours:
            raise VectorError("the pretrained model has no floating-point parameters, only integers or none at all")
        deltas = _each(lambda name, a, b: delta_between(a, b), ours, theirs, at_least=torch.float32)
        if not (isinstance(deltas, Lazy) or any(bool(d.value.any()) for d in deltas.values())):
            refuse_integers(pretrained, finetuned)
        return cls(deltas, digests_of(ours))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TaskVector:
        """What `save` wrote, read when asked for. Raises `IntegrityError` for a damaged file or one of another kind."""
        tensors = named_tensors(path)
        meta = read_metadata(path)
        if VECTOR_FORMAT not in meta:
            raise IntegrityError(
                f"{path}: not a task vector that hatcl saved; a checkpoint becomes one by "
                "TaskVector.between(pretrained, checkpoint)"
            )
        kinds = kinds_of(tensors)

        def read(name: str) -> Delta:
            if name + AT in kinds:
                return Delta(tensors[name], tensors[name + AT], tensors[name + REST])
            return Delta(tensors[name])

        names = [n for n in kinds if not n.endswith((AT, REST))]
        torn = [n for n in names if (n + AT in kinds) != (n + REST in kinds)]
        try:
            about = parse_json(meta[VECTOR_FORMAT], path)
            base, partial = about["base"], bool(about["partial"])
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(
                f"{path}: what it says of its base cannot be read ({error!r}); save it again"
            ) from error
        if torn or (base is not None and not set(names) <= set(base)):
            raise IntegrityError(f"{path}: {(torn or names)[0]} lacks a part; save the vector again")
        return cls(Lazy({n: kinds[n] for n in names}, read), base, partial=partial)

    # ---- a mapping of tensors ----------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        return self.delta(name).value

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    def __contains__(self, name: object) -> bool:  # `Mapping` would read the tensor to find out
        return name in self._deltas

    def delta(self, name: str) -> Delta:
        """A tensor with its remainders."""
        out: Delta = self._deltas[name]
        return out

    @property
    def kinds(self) -> dict[str, Kind]:
        """Shape and dtype of every tensor, without reading any."""
        if isinstance(self._deltas, Lazy):
            return self._deltas.kinds
        return {n: Kind(tuple(d.value.shape), d.value.dtype) for n, d in self._deltas.items()}

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return sum(math.prod(k.shape) for k in self.kinds.values())

    def in_memory(self) -> TaskVector:
        """Read all of it now. Copies: what files give is mapped, at odd addresses, where sums are rounded otherwise."""
        base = None if self.base is None else dict(self.base)
        lazy = isinstance(self._deltas, Lazy)
        read = {n: Delta(*(x.clone() if lazy and x is not None else x for x in d)) for n, d in self._deltas.items()}
        return TaskVector(read, base, partial=self.partial)

    def __repr__(self) -> str:
        where = "files" if isinstance(self._deltas, Lazy) else "memory"
        return f"TaskVector({len(self)} tensors, {self.numel:,} elements, in {where})"

    # ---- computing ---------------------------------------------------------------------------------------------

    def map(self, fn: Callable[..., Tensor | Delta], *others: TaskVector) -> TaskVector:
        """A vector of `fn(name, tau, *others' tau)`, tensor by tensor. Vectors that are read from files stay so.

        Raises:
            VectorError: the vectors differ in names or shapes, or belong to different bases. (A tensor that an
                adapter's vector lacks counts as zeros.)
        """
        return self._map(lambda name, *ds: fn(name, *(d.value for d in ds)), *others)

    def _map(self, fn: Callable[..., Tensor | Delta], *others: TaskVector) -> TaskVector:
        vectors = [self, *others]
        base = self.base
        sides: list[Mapping[str, Any]] = [v._deltas for v in vectors]
        for other in others:
            if self.partial and other.partial:
                continue
            check_fit(self, other, ("the first vector", "the other"))
            base = one_base(base, other.base)
        if others and all(v.partial for v in vectors):
            sides, base = _filled(vectors), joined_bases(v.base for v in vectors)
        return TaskVector(_each(fn, *sides), base, partial=self.partial)

    def __add__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return self if other == 0 else NotImplemented  # sum() starts with 0
        return self.map(lambda _, a, b: a + b, other)

    __radd__ = __add__

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self.map(lambda _, a, b: a - b, other) if isinstance(other, TaskVector) else NotImplemented

    def __neg__(self) -> TaskVector:
        return self.map(lambda _, a: -a)

    def __mul__(self, scale: float) -> TaskVector:
        if not _is_number(scale):
            return NotImplemented
        factor = _finite_scale(scale)
        return self._map(lambda _, d: d if factor == 1 else d.value * factor)

    __rmul__ = __mul__
    __array_ufunc__ = None  # NumPy's numbers leave the product to `__rmul__`

    def __truediv__(self, scale: float) -> TaskVector:
        if not _is_number(scale):
            return NotImplemented
        factor = _finite_scale(scale)
        if factor == 0:
            raise VectorError("scale: got a division by 0, expected another number")
        return self._map(lambda _, d: d if factor == 1 else d.value / factor)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def to(self, target: torch.dtype | torch.device | str) -> TaskVector:
        """Cast (bfloat16 halves the memory; the fine-tuned model then comes back rounded) or moved."""
        if isinstance(target, torch.dtype):
            if all(k.dtype == target for k in self.kinds.values()):
                return self
            cast = self.map(lambda _, a: a.to(target))
            if isinstance(cast._deltas, Lazy):
                cast._deltas.kinds = {n: Kind(k.shape, target) for n, k in cast.kinds.items()}
            return cast
        return self._map(lambda _, d: d.to(target))

    def mask(self, masks: Mapping[str, Tensor]) -> TaskVector:
        """Zero where a mask is off. Masks broadcast; tensors without one stay.

        Raises:
            VectorError: a mask for a tensor that is not there, or that does not broadcast.
        """
        kinds = self.kinds
        for name, m in masks.items():
            shape = list(kinds[name].shape) if name in kinds else None
            if shape is None or not _broadcasts_to(m.shape, shape):
                raise VectorError(
                    f"{name}: mask of shape {list(m.shape)}, "
                    + (
                        f"expected one that broadcasts to {shape}"
                        if shape is not None
                        else "the vector has no such tensor"
                    )
                )

        def masked(name: str, d: Delta) -> Delta:
            if name not in masks:
                return d
            return d.where(masks[name].to(d.value.device, torch.bool).expand(d.value.shape))

        return self._map(masked)

    def topk(self, keep: float, *, per_block: bool = False) -> TaskVector:
        """Keep the elements of largest magnitude: the share `keep`, exactly `int(keep * N)` of them (of ties the
        first), over all tensors or within each.

        Raises:
            VectorError: a share outside 0 to 1.
        """
        if not 0 <= keep <= 1:
            raise VectorError(f"keep: got {keep!r}, expected a share between 0 and 1")
        kinds = self.kinds
        if per_block:

            def one(name: str, d: Delta) -> Delta:
                k = int(keep * math.prod(kinds[name].shape))
                return d.where(largest({name: d.value}, k).mask(name, d.value))

            return self._map(one)
        cut = largest(self, int(keep * self.numel))
        return self._map(lambda name, d: d.where(cut.mask(name, d.value)))

    # ---- measuring ---------------------------------------------------------------------------------------------

    def dot(self, other: TaskVector) -> float:
        """`<self, other>`, summed in float64."""
        return math.fsum(self._dots(other).values())

    def norm(self) -> float:
        """The Euclidean norm."""
        return math.sqrt(self.dot(self))

    @overload
    def cosine(self, other: TaskVector) -> float: ...
    @overload
    def cosine(self, other: TaskVector, *, per_block: bool) -> dict[str, float] | float: ...
    def cosine(self, other: TaskVector, *, per_block: bool = False) -> dict[str, float] | float:
        """The cosine between two vectors, as a whole or per tensor; 0 where one of them is zero."""
        ab, aa, bb = self._dots(other), self._dots(self), other._dots(other)
        if per_block:
            return {n: _ratio(x, aa.get(n, 0.0), bb.get(n, 0.0)) for n, x in ab.items()}
        return _ratio(math.fsum(ab.values()), math.fsum(aa.values()), math.fsum(bb.values()))

    def _dots(self, other: TaskVector) -> dict[str, float]:
        if not (self.partial and other.partial):
            check_fit(self, other, ("the first vector", "the other"))
        both = [n for n in self if n in other]
        return {n: float((self[n].double() * other[n].double()).sum()) for n in both}

    # ---- putting it to use -------------------------------------------------------------------------------------

    @overload
    def apply_to(self, model: nn.Module, scale: float = ..., *, check: bool = ...) -> nn.Module: ...
    @overload
    def apply_to(
        self, model: Mapping[str, Tensor] | str | os.PathLike[str], scale: float = ..., *, check: bool = ...
    ) -> Mapping[str, Tensor]: ...
    def apply_to(self, model: Any, scale: float = 1.0, *, check: bool = True) -> Any:
        """`theta + scale * tau`: a new model, or new tensors for a state dict or files (from files: made when asked
        for). With scale 1 on its own base this is the fine-tuned model, bit for bit; with scale 0 the base.

        Args:
            check: compare the model with the base the vector was taken from.

        Raises:
            VectorError: tensors that the model lacks or that have another shape. IntegrityError: another base.
        """
        new = composed(model, [(_finite_scale(scale), self)], check=check)
        if isinstance(model, nn.Module):
            out = copy.deepcopy(model)
            with torch.no_grad():
                for name, x in named_tensors(out).items():
                    x.copy_(new[name])
            return out
        return new if isinstance(new, Lazy) else {n: new[first] for n, first in tied_names(model).items()}

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        shard_bytes: int | None = None,
        recipe: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Path:
        """Write safetensors: one file, or a folder of shards where `path` has no ending `.safetensors`; see
        `files.write_tensors` for the options."""
        kinds = self.kinds
        about = {"base": None if self.base is None else dict(self.base), "partial": self.partial}
        meta = {VECTOR_FORMAT: json.dumps(about)}  # one entry: safetensors writes several in any order
        return write_tensors(
            Path(path),
            kinds,
            lambda name: _flat(name, self.delta(name)),
            meta,
            shard_bytes=shard_bytes,
            recipe=recipe,
            progress=progress,
        )

    def to_lora(self, rank: int, base: nn.Module, folder: str | os.PathLike[str]) -> LoRAReport:
        """Write the nearest LoRA adapter, `B A` of this rank for each weight (the leading singular values, Eckart and
        Young 1936), in peft's format: `PeftModel.from_pretrained(base, folder)` loads it.

        It has linear layers, GPT-2's kind of them, and convolutions without groups. Biases, norms, embeddings and tied
        weights have no place in it: the report lists them, and counts them in the error.

        Args:
            rank: of every pair; where a matrix has less, the rest is zeros. base: the model it was taken from.

        Raises:
            VectorError: another architecture, or nothing that LoRA has a place for. IntegrityError: another base, or
            the disk is full. ConfigError: a rank below 1.
        """
        return write_lora(self, self.base, rank, base, Path(folder))


def _flat(name: str, d: Delta) -> dict[str, Tensor]:
    out = {name: d.value}
    if d.at is not None and d.rest is not None:
        out |= {name + AT: d.at, name + REST: d.rest}
    return out


def _checked_delta(name: str, delta: Any) -> Delta:
    d = delta if isinstance(delta, Delta) else Delta(delta)
    if not d.value.dtype.is_floating_point:
        raise VectorError(
            f"{name}: got {d.value.dtype}, expected floating point; integers are no part of a task vector"
        )
    if not bool(torch.isfinite(d.value).all()):
        bad = int((~torch.isfinite(d.value)).sum())
        raise VectorError(
            f"{name}: {bad} of {d.value.numel()} elements are NaN or infinite; is a checkpoint damaged, or a "
            "coefficient too large?"
        )
    return d


def _each(fn: Callable[..., Any], *sides: Mapping[str, Any], at_least: torch.dtype | None = None) -> Mapping[str, Any]:
    """`fn(name, *tensors)` for every name, at once or, where a side is lazy, when asked for.

    Args:
        at_least: what the results are promoted to beside the sides' own dtypes.
    """
    if any(isinstance(s, Lazy) for s in sides):
        of = [_kinds(s) for s in sides]
        kinds = {
            n: Kind(k.shape, functools.reduce(torch.promote_types, [o[n].dtype for o in of], at_least or k.dtype))
            for n, k in of[0].items()
        }
        return Lazy(kinds, lambda name: fn(name, *(s[name] for s in sides)))
    return {name: fn(name, *(s[name] for s in sides)) for name in sides[0]}


def _kinds(side: Mapping[str, Any]) -> dict[str, Kind]:
    if isinstance(side, Lazy):
        return side.kinds
    values = {n: d.value if isinstance(d, Delta) else d for n, d in side.items()}
    return {n: Kind(tuple(t.shape), t.dtype) for n, t in values.items()}


def _filled(vectors: Sequence[TaskVector]) -> list[Mapping[str, Any]]:
    """Adapters' vectors over all tensors that any of them changes."""
    kinds: dict[str, Kind] = {}
    for v in vectors:
        for name, k in v.kinds.items():
            if kinds.setdefault(name, k).shape != k.shape:
                raise VectorError(f"{name} is {list(kinds[name].shape)} in one vector, {list(k.shape)} in another")

    def reader(v: TaskVector) -> Callable[[str], Any]:
        return lambda name: (
            v.delta(name) if name in v else Delta(torch.zeros(kinds[name].shape, dtype=kinds[name].dtype))
        )

    return [Lazy(kinds, reader(v)) for v in vectors]


def _is_number(x: Any) -> bool:
    return not isinstance(x, bool) and (isinstance(x, Real) or (isinstance(x, Tensor) and x.numel() == 1))


def _finite_scale(scale: Any) -> float:
    value = float(scale.detach() if isinstance(scale, Tensor) else scale)
    if not math.isfinite(value):
        raise VectorError(f"scale: got {value}, expected a finite number")
    return value


def _broadcasts_to(shape: Sequence[int], target: Sequence[int]) -> bool:
    try:
        return list(torch.broadcast_shapes(tuple(shape), tuple(target))) == list(target)
    except RuntimeError:
        return False


def _ratio(ab: float, aa: float, bb: float) -> float:
    return ab / math.sqrt(aa * bb) if aa and bb else 0.0
